"""What the compiler makes of every kernel, without a GPU, and what a model of the GPU makes of that.

    python perf/static.py [--architecture 80 86 89 90 100 120 gfx942] [--csv FILE] [--only TEXT]     every kernel
    python perf/static.py --pipelines                                                     predicted times of whole calls

Columns: registers a thread; spills; shared bytes a program; programs a multiprocessor (occupancy); loads and stores by
width in bits; instructions of threads a pixel; bytes read and written a pixel; nanoseconds a pixel by issue and by
bandwidth (`roofline`): the larger is the prediction, the latter the floor of the kernel.

A loop over the classes counts as often as it runs. What runs once a program, as the rounds over the short list, counts
as if it ran for every tile: of `select` and `forward`, --pipelines compares the loop over the losses with the roof.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Set

import pandas as pd
import triton
import triton.language as tl
from lmp_triton.kernels import launch as kernel_launch
from lmp_triton.kernels.occupancy import LIMITS, programs_a_multiprocessor
from lmp_triton.perf import catalogue, roofline
from lmp_triton.perf.compiled import Compiled, read
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


def instructions_a_pixel(cost: catalogue.Cost, code: Compiled, loop: int | None = None) -> float:
    """Of threads; loop: only those of one loop, which runs once a tile."""
    count = len(code.opcodes) if loop is None else code.loops[loop]
    if cost.again and code.loops:
        number, times = cost.again
        count += (times - 1) * code.loops[number]
    return code.warp * code.warps * count / cost.pixels


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
    instructions = instructions_a_pixel(cost, code)
    by_issue, by_bandwidth = roofline.pixel_ns(roofline.DEVICES[architecture], instructions, cost.read, cost.written)
    return found | {
        "instructions": len(code.opcodes),
        "a pixel": round(instructions, 1),
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
    """Microseconds of forward and backward in bf16, of each pipeline, by the model."""
    images, classes, pixels = shape
    device = roofline.DEVICES[architecture]
    floor = 3 * images * pixels * classes * 2 / device.gb_s / 1e3
    rows = []
    with StandIn(architecture) as gpu:
        for name in ("", "solve", "forward"):
            gpu.launches.clear()
            catalogue.forward_and_backward((images, classes, 1, pixels), solver="select", cooperative=name)
            if not name:
                stages = [(launch.name, _us(launch, device, images * pixels)) for launch in gpu.launches]
                losses, *walks, gradient = (us for _name, us in stages)
                passes = len(walks) - 1
                work = losses + sum(walks) + roofline.SOLVE_US + gradient
            waits = {"": 0, "solve": passes, "forward": passes + 1}[name]
            total = work + (1 + len(gpu.launches)) * roofline.LAUNCH_US + waits * roofline.WAIT_US
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "device": device.name,
                    "cooperative": name or "none",
                    "launches": 1 + len(gpu.launches),
                    "waits": waits,
                    "losses us": losses,
                    "walks us": sum(walks),
                    "gradient us": gradient,
                    "predicted us": total,
                    "floor us": floor,
                    "ratio": total / floor,
                }
            )
    return rows


def _us(launch: Launch, device: roofline.Device, pixels: int) -> float:
    code, cost = read(launch.compiled), catalogue.cost(launch)
    loop = None if launch.name == "logits_gradient_kernel" else 0
    instructions = instructions_a_pixel(cost, code, loop)
    return pixels * max(roofline.pixel_ns(device, instructions, cost.read, cost.written)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", default=[str(a) for a in ARCHITECTURES])
    parser.add_argument("--csv", help="write the table there (- for standard output) instead of printing it")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--dependent", action="store_true", help="with programmatic dependent launch (sm_90 and newer)")
    options = parser.parse_args()
    kernel_launch.DEPENDENT = tl.constexpr(options.dependent)
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
