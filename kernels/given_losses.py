"""Stage one for losses that a user brings along: check them, mark the pixels that take no part, take statistics."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig, programs_a_row
from .launcher import launch, wait_for_launch_before
from .layout import unit_of
from .workspace import WORDS, no_statistics, poison, publish, tally


class Task(NamedTuple):
    """What the kernel reads and writes, see there; length and strides of rows in units (see `layout.unit_of`)."""

    given: Tensor
    mask: Tensor | None
    losses: Tensor
    workspace: Tensor
    length: tl.int32
    row_stride: tl.int64
    stride: tl.int64
    mask_row_stride: tl.int64
    mask_stride: tl.int64
    programs: tl.int32
    """That share a row."""


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    unit: int
    adjacent: bool
    """The entries of a row of the losses and of the mask lie side by side."""
    per_image: bool
    block: int


@triton.jit
def mark_losses_kernel(task: Task, C: tl.constexpr):
    """Bring losses into the form of the solver; grid N × programs, which stride over the tiles.

    Reads   given (N, L), any float type, strided; mask (N, L) uint8, strided, not 0 where valid, or None.
    Writes  losses (N, L) float32: ℓ, −1 where the mask is 0, NaN where ℓ is negative or not finite;
            workspace: maximum, count and histogram of the segment, see `workspace.publish`.
    Bytes   sizeof(loss) + 1 read, 4 written a pixel.
    """
    wait_for_launch_before()
    BLOCK: tl.constexpr = C.block
    program = tl.program_id(0)
    length = task.length * C.unit
    stride = 1 if C.adjacent else task.stride
    mask_stride = 1 if C.adjacent else task.mask_stride
    row = (program // task.programs).to(tl.int64)
    statistics = no_statistics(BLOCK)
    for tile in range(program % task.programs, tl.cdiv(length, BLOCK), task.programs):
        start = tl.cast(tile, tl.int64) * BLOCK
        within = tl.arange(0, BLOCK)
        inside = start + within < length
        values = task.given + row * (task.row_stride * C.unit) + (start + within) * stride
        loss = tl.load(values, mask=inside, other=0.0)
        valid = inside
        if task.mask is not None:
            there = task.mask + row * (task.mask_row_stride * C.unit) + (start + within) * mask_stride
            valid = inside & (tl.load(there, mask=inside, other=0) != 0)
        loss = poison(loss.to(tl.float32), valid)
        tl.store(task.losses + row * length + start + within, tl.where(valid, loss, -1.0), mask=inside)
        statistics = tally(statistics, loss, valid)
    segment = row if C.per_image else row * 0
    publish(task.workspace + segment * WORDS, statistics)


def mark_losses(values: Tensor, mask: Tensor | None, losses: Tensor, workspace: Tensor, config: StreamConfig) -> None:
    """Fill losses and workspace (zeroed by the caller) from values (N, L) and mask (N, L) bool. Launches: 1."""
    rows, length = values.shape
    strides = values.stride()
    mask_strides = strides if mask is None else mask.stride()
    unit = unit_of(length, strides[0], mask_strides[0])
    programs = programs_a_row(length, rows, config, values.device)
    task = Task(
        values,
        mask if mask is None else mask.view(torch.uint8),
        losses,
        workspace,
        length // unit,
        strides[0] // unit,
        strides[1],
        mask_strides[0] // unit,
        mask_strides[1],
        programs,
    )
    per_image = workspace.numel() > WORDS.value + 1
    constants = Constants(unit, strides[1] == mask_strides[1] == 1, per_image, config.block)
    launch(mark_losses_kernel, rows * programs, (task,), (constants,), config.warps)
