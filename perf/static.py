"""What the compiler makes of every kernel, without a GPU: registers, spills, load widths, instructions a pixel.

    python perf/static.py [--capability 80 86 89 90 100 120] [--csv FILE]

Instructions are counted once over the whole kernel, so where there is a loop over the classes (C > 32) or over a short
list they are not instructions executed.
"""

from __future__ import annotations

import argparse
import sys

import pandas as pd
import triton
from lmp_triton.perf import catalogue
from lmp_triton.perf.compiled import compile_for

CAPABILITIES = (80, 86, 89, 90, 100, 120)

LAUNCHES = {
    "softmax_losses bf16 C=2": catalogue.softmax_losses(2),
    "softmax_losses bf16 C=19": catalogue.softmax_losses(19),
    "softmax_losses bf16 C=19 odd": catalogue.softmax_losses(19, unit=1),
    "softmax_losses bf16 C=19 rows": catalogue.softmax_losses(19, rows=True),
    "softmax_losses fp32 C=19": catalogue.softmax_losses(19, "fp32"),
    "softmax_losses bf16 C=32": catalogue.softmax_losses(32),
    "softmax_losses bf16 C=150": catalogue.softmax_losses(150),
    "softmax_losses fp16 C=1024": catalogue.softmax_losses(1024, "fp16"),
    "softmax_losses bf16 C=19 weights smoothing": catalogue.softmax_losses(19, weighted=True, smooth=True),
    "logits_gradient bf16 C=2": catalogue.logits_gradient(2),
    "logits_gradient bf16 C=19": catalogue.logits_gradient(19),
    "logits_gradient bf16 C=19 odd": catalogue.logits_gradient(19, unit=1),
    "logits_gradient bf16 C=19 rows": catalogue.logits_gradient(19, rows=True),
    "logits_gradient fp32 C=19": catalogue.logits_gradient(19, "fp32"),
    "logits_gradient bf16 C=32": catalogue.logits_gradient(32),
    "logits_gradient bf16 C=150": catalogue.logits_gradient(150),
    "logits_gradient fp16 C=1024": catalogue.logits_gradient(1024, "fp16"),
    "logits_gradient bf16 C=150 weights smoothing": catalogue.logits_gradient(150, weighted=True, smooth=True),
    "mark_losses fp32": catalogue.mark_losses(),
    "select": catalogue.select_threshold(),
    "select tensors": catalogue.select_threshold("none", tensors=True),
    "select narrowed": catalogue.select_threshold(narrowed=True),
    "narrow_bracket first": catalogue.narrow_bracket(),
    "narrow_bracket again": catalogue.narrow_bracket(first=False),
    "sort one run": catalogue.sort_runs(one_run=True),
    "sort runs": catalogue.sort_runs(),
    "pixel_weights fp32": catalogue.pixel_weights(),
    "pixel_weights sums": catalogue.pixel_weights(write=False, total=True),
}


def row(name: str, capability: int) -> dict[str, object]:
    """One kernel on one architecture."""
    launch = LAUNCHES[name]
    found = compile_for(launch.kernel, capability, launch.signature, launch.constants, launch.num_warps)
    accesses = {"16": "U16", "32": "E", "64": "64", "128": "128"}
    row = {
        "kernel": name,
        "sm": capability,
        "triton": triton.__version__,
        "registers": found.registers,
        "spills": found.count("LDL") + found.count("STL"),
        "stack": found.stack,
        "shared": found.shared,
        "instructions": len(found.opcodes),
        "a pixel": round(32 * launch.num_warps * len(found.opcodes) / launch.pixels, 1),
    }
    for kind in ("LDG", "STG"):
        for bits, ending in accesses.items():
            row[f"{kind} {bits}"] = sum(o.startswith(kind) and o.split(".")[-1] == ending for o in found.opcodes)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--csv", help="write the table there (- for standard output) instead of printing it")
    arguments = parser.parse_args()
    table = pd.DataFrame([row(name, capability) for capability in arguments.capability for name in LAUNCHES])
    if arguments.csv:
        table.to_csv(sys.stdout if arguments.csv == "-" else arguments.csv, index=False)
    else:
        print(table.to_string(index=False))


if __name__ == "__main__":
    main()
