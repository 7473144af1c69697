"""Stage one: softmax cross-entropy of every pixel, with the statistics the solver starts from."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import Table, programs_a_row
from .launcher import launch, wait_for_launch_before
from .layout import Sizes, Strides, pixel_offsets
from .logits import Walk, image_sizes, load_label, tile_of, walk
from .softmax import minus_log_softmax, softmax_of_tile, sum_of_weights
from .workspace import WORDS, no_statistics, poison, publish, tally


class Inputs(NamedTuple):
    """What a user gave."""

    logits: Tensor
    """(N, C, *spatial), any float type, strided"""
    target: Tensor
    """(N, *spatial), any integer type, strided"""
    weight: Tensor | None
    """(C,)"""
    ignore_index: tl.int64
    smoothing: tl.float32


class Buffers(NamedTuple):
    """What becomes of it, L pixels an image."""

    losses: Tensor
    """(N, L) float32: ℓ, −1 where ignored, NaN where the label or a logit is bad."""
    labels: Tensor
    """(N, L), any integer type that holds C: a label inside [0, C), or C where ignored."""
    nll: Tensor | None
    """(N, L) float32: −log softmax of the label."""
    workspace: Tensor
    """Zeroed by the caller."""


class Task(NamedTuple):
    """What the kernel is given."""

    inputs: Inputs
    buffers: Buffers
    sizes: Sizes
    strides: Strides
    target_strides: Strides
    programs: tl.int32
    """That share an image."""


@triton.jit
def write_losses(task, program, C: tl.constexpr):
    """The work of one program of `softmax_losses_kernel`, see there. C: `logits.Constants`."""
    BLOCK: tl.constexpr = C.block
    CLASSES: tl.constexpr = C.classes
    TARGET_UNIT: tl.constexpr = 1 if C.rows else C.unit
    inputs = task.inputs
    buffers = task.buffers
    weight = inputs.weight
    image = (program // task.programs).to(tl.int64)
    target = inputs.target + image * task.target_strides.image * TARGET_UNIT
    sizes = image_sizes(task.sizes, C)
    statistics = no_statistics(BLOCK)
    weight_sum = 0.0
    if C.smooth:
        weight_sum = sum_of_weights(weight, CLASSES)

    for number in range(program % task.programs, tl.cdiv(sizes.pixels, BLOCK), task.programs):
        start = number * BLOCK
        within = tl.arange(0, BLOCK)
        tile = tile_of(inputs.logits, image, start, sizes, task.strides, C.adjacent, C)
        inside = tile.inside
        base, offsets = pixel_offsets(
            start, within, sizes, task.target_strides, TARGET_UNIT, C.other_adjacent, C.levels
        )
        label = tl.load(target + base + offsets, mask=inside, other=0).to(tl.int64)
        valid = inside & (label != inputs.ignore_index)
        good = (label >= 0) & (label < CLASSES)
        label = tl.where(good, label, 0)
        x_label = load_label(tile, label)  # for a comparison less a class

        peak, total, dot = softmax_of_tile(tile, weight, x_label, C.smooth, C)
        nll = minus_log_softmax(peak, total, x_label)
        loss = nll
        if weight is not None:
            loss *= tl.load(weight + label, mask=inside, other=0.0).to(tl.float32)
        if C.smooth:
            # Never negative, but for the rounding of this difference.
            spread = tl.maximum(weight_sum * nll - dot, 0.0, propagate_nan=tl.PropagateNan.ALL)
            loss = (1 - inputs.smoothing) * loss + (inputs.smoothing / CLASSES) * spread
        loss = poison(loss, good)

        out = image * sizes.pixels + start + within
        tl.store(buffers.losses + out, tl.where(valid, loss, -1.0), mask=inside)
        label = tl.where(valid, label, CLASSES)
        tl.store(buffers.labels + out, label.to(buffers.labels.dtype.element_ty), mask=inside)
        if buffers.nll is not None:
            tl.store(buffers.nll + out, nll, mask=inside)
        statistics = tally(statistics, loss, valid)

    segment = image if C.per_image else image * 0
    publish(buffers.workspace + segment * WORDS, statistics)


@triton.jit
def softmax_losses_kernel(task: Task, C: tl.constexpr):
    """Losses, labels and statistics of the pixels of an image; grid N × programs, which stride over the tiles.

    Reads   logits once, target once, weight.
    Writes  losses, labels, nll; workspace: maximum, count and histogram of the segment, see `workspace.publish`.
    Bytes   C·sizeof(logit) + sizeof(target) read, 5 written a pixel (C ≤ 255; 6 above; 4 more with nll).
    """
    wait_for_launch_before()
    write_losses(task, tl.program_id(0), C)


def walk_of(inputs: Inputs, buffers: Buffers, table: Table) -> Walk:
    """Over logits and target."""
    per_image = buffers.workspace.numel() > WORDS.value + 1
    return walk(inputs.logits, inputs.target, table, per_image, inputs.smoothing > 0)


def task_for(inputs: Inputs, buffers: Buffers, way: Walk, programs: int) -> Task:
    """`programs` share an image."""
    return Task(inputs, buffers, way.sizes, way.strides, way.other_strides, programs)


def softmax_losses(inputs: Inputs, buffers: Buffers, table: Table) -> None:
    """Fill the buffers from the inputs. Launches: 1."""
    images, pixels = buffers.losses.shape
    way = walk_of(inputs, buffers, table)
    programs = programs_a_row(pixels, images, way.config, inputs.logits.device)
    task = task_for(inputs, buffers, way, programs)
    launch(softmax_losses_kernel, images * programs, (task,), (way.constants,), way.config.warps)
