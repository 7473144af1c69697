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
from collections.abc import Callable

import pandas as pd
import triton
from lmp_triton.kernels.configs import Table, table_for
from lmp_triton.kernels.occupancy import LIMITS, programs_a_multiprocessor
from lmp_triton.perf import catalogue, roofline
from lmp_triton.perf.compiled import Compiled, compile_for

ARCHITECTURES: tuple[int | str, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
CLASSES = (2, 3, 19, 21, 32, 150, 847, 1024)
WIDTHS = (8, 16, 32, 64, 128)


def launches(table: Table) -> dict[str, catalogue.Launch]:
    """Every kernel and variant, by name, with the configurations of an architecture."""
    found = {}
    stages: dict[str, Callable[..., catalogue.Launch]] = {
        "softmax_losses": catalogue.softmax_losses,
        "logits_gradient": catalogue.logits_gradient,
    }
    for stage, make in stages.items():
        for classes in CLASSES:
            for dtype in ("bf16", "fp32"):
                found[f"{stage} {dtype} C={classes}"] = make(classes, dtype, table=table)
        for unit in (1, 2, 16):  # 4 above: 550·550
            found[f"{stage} bf16 C=19 unit={unit}"] = make(19, table=table, unit=unit)
        for classes, unit in ((3, 1), (19, 1), (32, 16), (150, 2), (847, 1), (1000, 8)):
            name = f"{stage} bf16 C={classes} channels_last"
            found[name] = make(classes, table=table, unit=unit, layout="channels_last")
        found[f"{stage} fp32 C=150 channels_last"] = make(150, "fp32", table=table, unit=2, layout="channels_last")
        found[f"{stage} bf16 C=19 cropped"] = make(19, table=table, layout="cropped")
        found[f"{stage} fp16 C=1024"] = make(1024, "fp16", table=table)
        for classes in (19, 150):
            name = f"{stage} bf16 C={classes} weights smoothing"
            found[name] = make(classes, table=table, weighted=True, smooth=True)
    found |= {
        "mark_losses fp32": catalogue.mark_losses(table=table),
        "select": catalogue.select_threshold(table=table),
        "select, p and ratio tensors": catalogue.select_threshold("none", table=table, tensors=True),
        "select, first pass": catalogue.select_threshold(table=table, passes=2),
        "select, second pass": catalogue.select_threshold(table=table, passes=2, phases=(1, 2)),
        "select, after passes": catalogue.select_threshold(table=table, passes=2, phases=(2, 3)),
        "select cooperative": catalogue.select_threshold(table=table, phases=(0, 1), wait=True),
        "select cooperative, one pass": catalogue.select_threshold(table=table, passes=1, phases=(0, 2), wait=True),
        "select cooperative, two passes": catalogue.select_threshold(table=table, passes=2, phases=(0, 3), wait=True),
        "forward cooperative bf16 C=19": catalogue.forward_in_one(19, table=table),
        "forward cooperative bf16 C=150": catalogue.forward_in_one(150, table=table),
        "sort one run": catalogue.sort_runs(table=table, one_run=True),
        "sort runs": catalogue.sort_runs(table=table),
        "pixel_weights fp32": catalogue.pixel_weights(table=table),
        "pixel_weights sums": catalogue.pixel_weights(table=table, write=False, total=True),
    }
    return found


def compiled(launch: catalogue.Launch, architecture: int | str) -> Compiled:
    """A launch compiled."""
    return compile_for(
        launch.kernel, architecture, launch.signature, launch.constants, launch.num_warps, launch.cooperative
    )


def instructions_a_pixel(launch: catalogue.Launch, code: Compiled, loop: int | None = None) -> float:
    """Of threads; loop: only those of one loop, which runs once a tile."""
    count = len(code.opcodes) if loop is None else code.loops[loop]
    if launch.again and code.loops:
        number, times = launch.again
        count += (times - 1) * code.loops[number]
    return code.warp * launch.num_warps * count / launch.pixels


def row(name: str, launch: catalogue.Launch, architecture: int | str) -> dict[str, object]:
    """One kernel on one architecture."""
    code = compiled(launch, architecture)
    found: dict[str, object] = {
        "kernel": name,
        "architecture": architecture,
        "triton": triton.__version__,
        "warps": launch.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
    }
    if isinstance(architecture, int):
        limits = LIMITS[architecture]
        found["programs a multiprocessor"] = programs_a_multiprocessor(
            limits, code.registers, code.shared, launch.num_warps
        )
    found |= {f"load {bits}": code.loads[bits] for bits in WIDTHS}
    found |= {f"store {bits}": code.stores[bits] for bits in WIDTHS}
    instructions = instructions_a_pixel(launch, code)
    by_issue, by_bandwidth = roofline.pixel_ns(
        roofline.DEVICES[architecture], instructions, launch.read, launch.written
    )
    return found | {
        "instructions": len(code.opcodes),
        "a pixel": round(instructions, 1),
        "read": launch.read,
        "written": launch.written,
        "ns issue": round(by_issue, 5),
        "ns bandwidth": round(by_bandwidth, 5),
        "release atomics": code.releases,
        "unguarded": code.unguarded,
    }


SHAPES = ((2, 19, 550 * 550), (4, 21, 321 * 321), (8, 19, 1024 * 1024), (16, 150, 512 * 512))


def predict(shape: tuple[int, int, int], architecture: int | str) -> list[dict[str, object]]:
    """Microseconds of forward and backward in bf16, of each pipeline, by the model."""
    images, classes, pixels = shape
    table, device = table_for(architecture if isinstance(architecture, int) else 0), roofline.DEVICES[architecture]
    unit = next(unit for unit in (16, 8, 4, 2, 1) if pixels % unit == 0)
    passes = sum(pixels > longest for longest in table.select.passes)

    def us(launch: catalogue.Launch, loop: int | None = None) -> float:
        code = compiled(launch, architecture)
        instructions = instructions_a_pixel(launch, code, loop)
        return images * pixels * max(roofline.pixel_ns(device, instructions, launch.read, launch.written)) / 1e3

    losses = us(catalogue.softmax_losses(classes, table=table, unit=unit), loop=0)
    gradient = us(catalogue.logits_gradient(classes, table=table, unit=unit))
    walks = [
        us(catalogue.select_threshold(table=table, passes=passes, phases=(i, i + 1)), 0) for i in range(passes + 1)
    ]
    floor = 3 * images * pixels * classes * 2 / device.gb_s / 1e3
    work = losses + sum(walks) + roofline.SOLVE_US + gradient
    rows = []
    for name, launches_, waits in (
        ("none", 3 + len(walks), 0),
        ("solve", 4, passes),
        ("forward", 3, passes + 1),
    ):
        total = work + launches_ * roofline.LAUNCH_US + waits * roofline.WAIT_US
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "device": device.name,
                "cooperative": name,
                "launches": launches_,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", default=[str(a) for a in ARCHITECTURES])
    parser.add_argument("--csv", help="write the table there (- for standard output) instead of printing it")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--pipelines", action="store_true")
    options = parser.parse_args()
    chosen = [int(a) if a.isdigit() else a for a in options.architecture]
    rows = []
    for architecture in chosen:
        if options.pipelines:
            if isinstance(architecture, int):  # loops are not read from AMD's assembly
                rows += [row for shape in SHAPES for row in predict(shape, architecture)]
            continue
        table = table_for(architecture if isinstance(architecture, int) else 0)
        for name, launch in launches(table).items():
            if options.only in name:
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
