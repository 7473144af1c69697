"""Stages one and two in one cooperative launch: the losses, a wait for all programs of a segment, the solution."""

import triton.language as tl
from torch import Tensor

from .configs import Table, fraction_bits, passes_for, programs
from .cross_entropy import walk, write_losses
from .launch import TooLarge, kernel, launch, resident_programs
from .layout import unit_of
from .select import solve_segment
from .solution import Parameters
from .workspace import FINISHED, PASSED, WORDS, raise_flag, take_ticket, wait_for


@kernel
def forward_kernel(
    logits,
    target,
    weight,
    losses,
    labels,
    nll,
    workspace,
    short_list,
    solution,
    loss,
    counts,
    value,
    p_tensor,
    ratio_tensor,
    programs_an_image: tl.int32,
    pixels: tl.int32,
    image_stride: tl.int64,
    class_stride: tl.int64,
    size_1: tl.int32,
    size_2: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    target_image_stride: tl.int64,
    target_stride_0: tl.int64,
    target_stride_1: tl.int64,
    target_stride_2: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    p: tl.int64,
    ratio: tl.int64,
    programs_a_segment: tl.int32,
    length: tl.int32,
    capacity: tl.int32,
    fraction_bits: tl.int32,
    segments: tl.int32,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    ADJACENT: tl.constexpr,
    OTHER_ADJACENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SMOOTH: tl.constexpr,
    LOSSES_UNIT: tl.constexpr,
    PASSES: tl.constexpr,
    REDUCTION: tl.constexpr,
    SOLVE_BLOCK: tl.constexpr,
):
    """From logits to the reduced loss; grid N × programs, which stride over the tiles.

    Reads, writes and bytes are those of `softmax_losses_kernel` and of all phases of `select_kernel`, whose losses now
    come from the second-level cache where they fit. Waits after the losses and after each pass for the other programs
    of the segment: all must be on the device at once, which a cooperative launch guarantees.
    """
    write_losses(
        logits,
        target,
        weight,
        losses,
        labels,
        nll,
        workspace,
        tl.program_id(0),
        programs_an_image,
        pixels,
        image_stride,
        class_stride,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        target_image_stride,
        target_stride_0,
        target_stride_1,
        target_stride_2,
        ignore_index,
        smoothing,
        CLASSES,
        UNIT,
        LEVELS,
        ADJACENT,
        OTHER_ADJACENT,
        ROWS,
        CHUNK,
        BLOCK,
        PER_IMAGE,
        SMOOTH,
    )
    segment = (tl.program_id(0) // programs_a_segment).to(tl.int64)
    here = workspace + segment * WORDS
    if take_ticket(here + FINISHED) == programs_a_segment - 1:
        tl.store(here + FINISHED, tl.cast(0, tl.int64))
        raise_flag(here + PASSED)
    wait_for(here + PASSED, 1)
    solve_segment(
        losses,
        short_list,
        workspace,
        solution,
        loss,
        counts,
        value,
        segment,
        tl.program_id(0) % programs_a_segment,
        programs_a_segment,
        p,
        p_tensor,
        ratio,
        ratio_tensor,
        length * LOSSES_UNIT,
        capacity,
        fraction_bits,
        segments,
        1,
        PASSES,
        0,
        PASSES + 1,
        True,
        REDUCTION,
        BLOCK,
        SOLVE_BLOCK,
    )


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    losses: Tensor,
    labels: Tensor,
    nll: Tensor | None,
    short_list: Tensor,
    workspace: Tensor,
    solution: Tensor,
    loss: Tensor,
    counts: Tensor,
    value: Tensor,
    parameters: Parameters,
    reduction: str,
    table: Table,
) -> None:
    """What `cross_entropy.softmax_losses` and `select.select` do. Launches: 1.

    Raises:
        TooLarge: there are more images than programs that fit on the device at once; nothing was launched.
    """
    images, segments = logits.shape[0], solution.shape[1]
    length = losses.numel() // segments
    unit, passes = unit_of(length), passes_for(length, table.select)
    way = walk(logits, target, table)
    outputs = (short_list, solution, loss, counts, value)
    tensors = (logits, target, weight, losses, labels, nll, workspace, *outputs)
    tensors = (*tensors, parameters.p_tensor, parameters.ratio_tensor)
    constants = way.constants | {
        "PER_IMAGE": segments > 1,
        "SMOOTH": label_smoothing > 0,
        "LOSSES_UNIT": unit,
        "PASSES": passes,
        "REDUCTION": reduction,
        "SOLVE_BLOCK": table.forward_solve_block,
    }

    def numbers(programs_an_image: int) -> tuple[int | float, ...]:
        return (
            programs_an_image,
            *way.numbers,
            ignore_index,
            label_smoothing,
            parameters.p,
            parameters.ratio,
            programs_an_image * images // segments,
            length // unit,
            short_list.shape[1],
            fraction_bits(length),
            segments,
        )

    warps = way.config.warps
    room = resident_programs(forward_kernel, tensors, numbers(1), constants, warps)
    if room is None:
        # One after another, as in the interpreter, programs can't wait for each other: one a segment.
        room = images if images == segments else 1
    programs_an_image = min(programs(losses.shape[1], images, way.config, logits.device), room // images)
    if programs_an_image < 1:
        raise TooLarge(f"{images} images, but only {room} programs are on the device at once")
    launch(
        forward_kernel,
        images * programs_an_image,
        tensors,
        numbers(programs_an_image),
        constants,
        warps,
        cooperative=True,
    )
