"""Stages one and two in one cooperative launch: the losses, a wait for all programs of a segment, the solution."""

import triton
import triton.language as tl
from torch import Tensor

from . import cross_entropy, select
from .configs import Table, neighbours, passes_for, programs_a_row
from .cross_entropy import write_losses
from .launcher import TooLarge, launch, resident_programs
from .layout import unit_of
from .select import solve_segment
from .solution import Outputs, Parameters, power_for
from .workspace import FINISHED, PASSED, WORDS, raise_flag, take_ticket, wait_for


@triton.jit
def forward_kernel(losses: cross_entropy.Task, solution: select.Task, LOSSES: tl.constexpr, SOLUTION: tl.constexpr):
    """From logits to the reduced loss; grid N × programs, which stride over the tiles.

    Reads, writes and bytes are those of `softmax_losses_kernel` and of all phases of `select_kernel`, whose losses now
    come from the second-level cache where they fit. Waits after the losses and after each pass for the other programs
    of the segment: all must be on the device at once, which a cooperative launch guarantees.
    """
    program = tl.program_id(0)
    write_losses(losses, program, LOSSES)
    segment = (program // solution.programs).to(tl.int64)
    here = solution.workspace + segment * WORDS
    if take_ticket(here + FINISHED) == solution.programs - 1:
        tl.store(here + FINISHED, tl.cast(0, tl.int64))
        raise_flag(here + PASSED)
    wait_for(here + PASSED, 1)
    solve_segment(solution, segment, program % solution.programs, 1, SOLUTION)


def losses_and_solution(
    inputs: cross_entropy.Inputs,
    buffers: cross_entropy.Buffers,
    short_list: Tensor,
    outputs: Outputs,
    parameters: Parameters,
    reduction: str,
    table: Table,
) -> None:
    """What `cross_entropy.softmax_losses` and `select.solve_by_selection` do. Launches: 1.

    Raises:
        TooLarge: there are more images than programs that fit on the device at once; nothing was launched.
    """
    images, pixels = buffers.losses.shape
    segments = outputs.segments
    losses = buffers.losses.view(segments, -1)
    length, passes = losses.shape[1], passes_for(losses.shape[1], table.select)
    device = inputs.logits.device
    way = cross_entropy.walk_of(inputs, buffers, table)
    unit, power = unit_of(length), power_for(parameters, table.select.approximation)
    tiles = (way.config.block, neighbours(unit, way.config), table.forward_solve_block, table.select.sorted)
    solve = select.Constants(unit, passes, 0, passes + 1, True, reduction, power, *tiles)
    constants = (way.constants, solve)

    def tasks(programs: int) -> tuple[cross_entropy.Task, select.Task]:
        """With so many an image."""
        a_segment = programs * images // segments
        return (
            cross_entropy.task_for(inputs, buffers, way, programs),
            select.task_for(losses, short_list, buffers.workspace, outputs, parameters, a_segment),
        )

    room = resident_programs(forward_kernel, tasks(1), constants, way.config.warps, device)
    if room is None:
        # One after another, as in the interpreter, programs can't wait for each other: one a segment.
        room = images if images == segments else 1
    programs = min(programs_a_row(pixels, images, way.config, device), room // images)
    if programs < 1:
        raise TooLarge(f"{images} images, but only {room} programs are on the device at once")
    launch(forward_kernel, images * programs, tasks(programs), constants, way.config.warps, cooperative=True)
