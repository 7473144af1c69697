"""What the compiler makes of every kernel, without a GPU, and what a model of the GPU makes of that.

    python perf/static.py [--architecture 80 86 89 90 100 120 gfx942] [--csv FILE] [--only TEXT]     every kernel
    python perf/static.py --pipelines                                                     predicted times of whole calls

Columns: registers a thread; spills; shared bytes a program; programs a multiprocessor (occupancy); loads and stores by
width in bits; of the loop over the tiles, on the path that is taken, instructions of threads a pixel and the issue
slots they come to, and the slots on the dearest path; slots of a warp for what a program does once; bytes read and
written a pixel; nanoseconds a pixel by issue and by bandwidth (`roofline`, which says what is assumed): the larger is
the prediction, the latter the floor of the kernel.

A loop over the classes counts as often as it runs. Where several walks share a launch, the first counts. Where a
program has one tile, as in the gradients and the sorts, the cheapest way through its last power counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

import pandas as pd
import triton
import triton.language as tl
from lmp_triton.kernels import launcher
from lmp_triton.kernels.occupancy import LIMITS, programs_a_multiprocessor
from lmp_triton.perf import catalogue, roofline
from lmp_triton.perf.compiled import Compiled, read
from lmp_triton.perf.paths import END
from lmp_triton.perf.standin import Launch, StandIn

ARCHITECTURES: tuple[int | str, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
WIDTHS = (8, 16, 32, 64, 128)


def launches(architecture: int | str, only: str | Set[str] = "") -> Iterator[tuple[str, Launch]]:
    """Every kernel and variant whose name holds `only`, or is one of them, as it is launched on an architecture."""
    with StandIn(architecture) as gpu:
        for case in catalogue.cases():
            names = [name for name in case.names if name]
            wanted = [name for name in names if (only in name if isinstance(only, str) else name in only)]
            if not wanted:
                continue
            gpu.launches.clear()
            case.call()
            cooperative = [launch.cooperative for launch in gpu.launches]
            if isinstance(architecture, str) and "cooperative" in str(case.names):
                assert not any(cooperative)  # its limits are not known: separate launches
                continue
            for name, launch in zip(case.names, gpu.launches, strict=True):
                if name in wanted:
                    yield str(name), launch


class Slots(NamedTuple):
    """Issue slots (`roofline.slots`) of one launch."""

    least: float
    """A pixel, of threads, on the cheapest path of a tile."""
    most: float
    """On the dearest."""
    instructions: float
    """As least, each instruction counted as one."""
    once: float
    """Of a warp, what a program does once."""
    last: float = 0
    """Of a warp, what the last program does after its walk, at most: the dearest path, which sorts the list."""
    searched: float = 0
    """The same, where the list is too long to be sorted."""


def issue(cost: catalogue.Cost, code: Compiled, device: roofline.Device, losses: str = "untrained") -> Slots:
    """On the path that is taken; where loops are not read, as in AMD's assembly, of all instructions."""
    a_pixel = code.warp * code.warps / cost.pixels
    weight = roofline.slots(device, losses)
    if code.flow is None:
        every = len(code.opcodes) * a_pixel
        return Slots(every, every, every, 0)
    flow = code.flow
    times = dict([cost.again]) if cost.again else {}
    ways = ((weight, False), (weight, True), (_one, False))
    if cost.walk == "cells":
        return _cells(cost, code, weight)
    if not cost.walk:
        # Through the last power of the kernel: not by a way that returns early.
        through = max((i for i, x in enumerate(code.opcodes) if x.startswith("MUFU.EX2")), default=0)
        found = [flow.path(w, through, END, times, dearest) for w, dearest in ways]
        if through:
            found = [x + flow.path(w, 0, through, times, dearest) for x, (w, dearest) in zip(found, ways, strict=True)]
        return Slots(*(x * a_pixel for x in found), once=0)
    number = 0
    if cost.walk == "longest":
        number = max(range(len(flow.loops)), key=lambda i: flow.loops[i][1] - flow.loops[i][0])
    head, _end = flow.loops[number]
    found = [flow.loop(w, number, times, dearest) for w, dearest in ways]
    # Of the loops after the walk only that of the rounds has another one in it.
    inner = (i for i, x in enumerate(flow.bodies) if flow.loops[i][0] > head and any(y < x for y in flow.bodies))
    rounds = next(inner, None)
    last = flow.after(weight, number, True, frozenset() if rounds is None else flow.bodies[rounds])
    searched = last
    if rounds is not None:
        searched = flow.after(weight, number, True) + (roofline.ROUNDS - 1) * flow.loop(weight, rounds, dearest=True)
    once = flow.path(weight, 0, head) + flow.after(weight, number)
    return Slots(*(x * a_pixel for x in found), once, last, searched)


def _one(opcode: str) -> float:
    return 1.0


def _cells(cost: catalogue.Cost, code: Compiled, weight: Callable[[str], float]) -> Slots:
    """Of the kernels for logits that are upsampled: a loop over rows of cells, in it one over rows of pixels.

    Loops in that one are over the classes: chunks of them, or one by one where cells are deep, which is left out.
    """
    flow = code.flow
    assert flow is not None
    bodies, heads = flow.bodies, [head for head, _end in flow.loops]
    walk = 0
    rows, *inner = sorted((i for i, x in enumerate(bodies) if x < bodies[walk]), key=lambda i: -len(bodies[i]))
    inside = [i for i in inner if bodies[i] < bodies[rows]]
    times: dict[int, int] = {}
    if cost.again:
        times = {i: cost.again[1] - 1 for i in inner if i not in inside} | {inside.pop(0): cost.again[1]}
    row_of_pixels, outside = bodies[rows].difference(*(bodies[i] for i in inside)), bodies[walk] - bodies[rows]
    after = {x for place in row_of_pixels for x in flow.onward[place]} & outside
    a_pixel = code.warp * code.warps / cost.pixels

    def cells(weight: Callable[[str], float], dearest: bool) -> float:
        before = flow.path(weight, heads[walk], heads[rows], times, dearest, outside)
        once = flow.path(weight, heads[rows], heads[rows], times, dearest, row_of_pixels)
        rest = min(flow.path(weight, x, heads[walk], times, dearest, outside) for x in after)
        return (before + cost.rows * once + rest) * a_pixel

    found = cells(weight, False), cells(weight, True), cells(_one, False)
    return Slots(*found, once=flow.path(weight, 0, heads[walk]) + flow.after(weight, walk))


def row(name: str, launch: Launch, architecture: int | str) -> dict[str, object]:
    """One kernel on one architecture."""
    code, cost = read(launch.compiled), catalogue.cost(launch)
    found: dict[str, object] = {
        "kernel": name,
        "architecture": architecture,
        "triton": triton.__version__,
        "warps": code.warps,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
    }
    if isinstance(architecture, int):
        limits = LIMITS[architecture]
        found["programs a multiprocessor"] = programs_a_multiprocessor(limits, code.registers, code.shared, code.warps)
    found |= {f"load {bits}": code.loads[bits] for bits in WIDTHS}
    found |= {f"store {bits}": code.stores[bits] for bits in WIDTHS}
    device = roofline.DEVICES[architecture]
    taken = issue(cost, code, device)
    by_issue, by_bandwidth = roofline.pixel_ns(device, taken.least, cost.read, cost.written)
    return found | {
        "instructions": len(code.opcodes),
        "a pixel": round(taken.instructions, 1),
        "slots": round(taken.least, 1),
        "slots, most": round(taken.most, 1),
        "once": round(taken.once),
        "read": cost.read,
        "written": cost.written,
        "ns issue": round(by_issue, 5),
        "ns bandwidth": round(by_bandwidth, 5),
        "release atomics": code.releases,
        "unguarded": code.unguarded,
        "lopsided": code.lopsided,
        "dependent": code.dependent,
    }


SHAPES = ((2, 19, 550 * 550), (4, 21, 321 * 321), (8, 19, 1024 * 1024), (16, 150, 512 * 512))


def predict(shape: tuple[int, int, int], architecture: int | str) -> list[dict[str, object]]:
    """Microseconds of forward and backward in bf16, of each pipeline, by the model (`roofline`)."""
    images, classes, pixels = shape
    device = roofline.DEVICES[architecture]
    floor, must = roofline.floors(device, images * pixels, classes)
    rows = []
    with StandIn(architecture, device.multiprocessors) as gpu:
        for name in ("", "solve", "forward"):
            gpu.launches.clear()
            catalogue.forward_and_backward((images, classes, 1, pixels), solver="select", cooperative=name)
            if not name:
                losses, *walks, gradient = (_us(launch, device, images * pixels) for launch in gpu.launches)
                passes = len(walks) - 1
                last, searched = map(
                    sum, zip(*(_last_us(launch, device) for launch in gpu.launches[1:-1]), strict=True)
                )
                work = losses + sum(walks) + last + gradient
            waits = {"": 0, "solve": passes, "forward": passes + 1}[name]
            apart = (1 + len(gpu.launches)) * roofline.LAUNCH_US + waits * roofline.WAIT_US
            total = work + apart
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "device": device.name,
                    "cooperative": name or "none",
                    "launches": 1 + len(gpu.launches),
                    "waits": waits,
                    "losses us": losses,
                    "walks us": sum(walks),
                    "last us": last,
                    "searched us": searched,
                    "gradient us": gradient,
                    "predicted us": total,
                    "floor us": floor,
                    "ratio": total / floor,
                    "must us": must,
                    "ratio to must": total / must,
                    "must and launches, ratio": (must + apart) / floor,
                }
            )
    return rows


def _us(launch: Launch, device: roofline.Device, pixels: int) -> float:
    """Of all programs of a launch."""
    code, cost = read(launch.compiled), catalogue.cost(launch)
    taken = issue(cost, code, device)
    walk = pixels * max(roofline.pixel_ns(device, taken.least, cost.read, cost.written)) / 1e3
    return walk + roofline.once_us(device, taken.once, code.warps, launch.programs)


def _last_us(launch: Launch, device: roofline.Device) -> tuple[float, float]:
    """Of the last program of a walk, once the others are done: with a list that is sorted, and with a longer one."""
    code = read(launch.compiled)
    taken = issue(catalogue.cost(launch), code, device)
    return roofline.alone_us(device, taken.last, code.warps), roofline.alone_us(device, taken.searched, code.warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", default=[str(a) for a in ARCHITECTURES])
    parser.add_argument("--csv", help="write the table there (- for standard output) instead of printing it")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--dependent", action="store_true", help="with programmatic dependent launch (sm_90 and newer)")
    options = parser.parse_args()
    launcher.DEPENDENT = tl.constexpr(options.dependent)
    chosen = [int(a) if a.isdigit() else a for a in options.architecture]
    rows = []
    for architecture in chosen:
        if options.pipelines:
            if isinstance(architecture, int):  # loops are not read from AMD's assembly
                rows += [row for shape in SHAPES for row in predict(shape, architecture)]
            continue
        for name, launch in launches(architecture, options.only):
            rows.append(row(name, launch, architecture))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    found = pd.DataFrame(rows)
    if options.csv:
        found.to_csv(sys.stdout if options.csv == "-" else options.csv, index=False, float_format="%.5g")
    else:
        print(found.to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep=""))


if __name__ == "__main__":
    main()
