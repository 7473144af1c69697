"""Breaks kernels, eager backend and host code in known ways, one at a time, and runs the tests that should notice.

    python tests/mutants.py [--only TEXT ...] [--write]

A way that no test notices is a survivor. Works on copies of the package; takes half an hour, and is no part of CI.
--write renews tests/mutants.md, the table of the last run. A snippet that is not in its file, or is there twice, is an
error: the code has moved on, and the way to break it has to move with it.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 150.0
"""Seconds; a test that takes longer has noticed (it hangs)."""


class Mutant(NamedTuple):
    """One way to break it."""

    file: str
    old: str
    new: str
    tests: str
    """Arguments of pytest."""
    what: str


MEMORY = "tests/test_memory.py"
MASKS = (
    MEMORY
    + " -k 'overflows or passes or (every_layout and (size0-5 or size1-5 or size1-33)) or (every_solver and 1.3-700)'"
)
SORTED = MEMORY + " -k 'every_solver and 1.3-700 and sort'"
WAIT = "tests/test_waiting.py"
ORDER = "tests/test_waiting.py tests/test_memory.py -k 'same_bits or passes'"
FUZZ = "tests/test_fuzz.py -k triton"
EAGER = "tests/test_fuzz.py tests/test_properties.py tests/test_solver.py -k eager"
PROPERTIES = "tests/test_properties.py tests/test_fuzz.py -k 'select or sort or triton'"

MUTANTS = (
    # Masks and addresses
    Mutant(
        "kernels/select.py",
        "x = tl.load(share.losses + index, mask=index < share.length, other=-1.0)\n            bits = float_bits(x)\n            x = tl.where",
        "x = tl.load(share.losses + index, mask=index <= share.length, other=-1.0)\n            bits = float_bits(x)\n            x = tl.where",
        MEMORY + " -k passes",
        "mask of the narrowing pass off by one",
    ),
    Mutant(
        "kernels/select.py",
        'mask=index < candidates.length, other=-1.0, cache_modifier=".cg")\n        bits = float_bits(x)\n        over',
        'mask=index <= candidates.length, other=-1.0, cache_modifier=".cg")\n        bits = float_bits(x)\n        over',
        MEMORY + " -k overflows",
        "mask of the heaviest losses off by one",
    ),
    Mutant(
        "kernels/select.py",
        "mask=is_listed & (slot < capacity)",
        "mask=is_listed & (slot <= capacity)",
        MEMORY + " -k overflows",
        "the short list overruns by one",
    ),
    Mutant(
        "kernels/weighting.py",
        "inside = index < length",
        "inside = index <= length",
        MASKS,
        "mask of the weights off by one",
    ),
    Mutant(
        "kernels/sort.py",
        "mask=at < length, other=-1.0",
        "mask=at <= length, other=-1.0",
        SORTED,
        "mask of a run off by one",
    ),
    Mutant(
        "kernels/sort.py", "index * length + at", "index * (length + 1) + at", MASKS, "wrong stride between segments"
    ),
    Mutant(
        "kernels/sort.py",
        'mask=fits, other=0, cache_modifier=".cg")\n        position',
        'mask=candidate <= RUN + 1, other=0, cache_modifier=".cg")\n        position',
        PROPERTIES,
        "the binary search leaves its run",
    ),
    Mutant(
        "kernels/gradient.py",
        "mask=inside, eviction_policy=LAST)\n\n\ndef",
        "eviction_policy=LAST)\n\n\ndef",
        MASKS,
        "store of the gradient without a mask",
    ),
    Mutant(
        "kernels/gradient.py",
        "mask=pixels.inside[:, None] & (classes < CLASSES),",
        "mask=pixels.inside[:, None] & (classes <= CLASSES),",
        MASKS,
        "a class too many is stored",
    ),
    Mutant(
        "kernels/gradient.py",
        "saved = image * sizes.pixels + start",
        "saved = image * (sizes.pixels - 1) + start",
        MASKS,
        "wrong stride of the saved losses",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "good = (label >= 0) & (label < CLASSES)",
        "good = (label >= 0) & (label <= CLASSES)",
        "tests/test_inputs.py tests/test_cross_entropy.py tests/test_memory.py",
        "label C counts as good: read out of bounds",
    ),
    Mutant(
        "kernels/softmax.py",
        "mask=c < CLASSES, other=0.0).to(tl.float32)",
        "mask=c <= CLASSES, other=0.0).to(tl.float32)",
        MEMORY + " -k weights_and",
        "a class weight too many is read",
    ),
    # Ignored pixels, labels, weights, smoothing
    Mutant(
        "kernels/cross_entropy.py",
        "valid = inside & (label != inputs.ignore_index)",
        "valid = inside",
        FUZZ,
        "ignore_index dropped",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "loss = (1 - inputs.smoothing) * loss + (inputs.smoothing / CLASSES) * spread",
        "loss = (1 - inputs.smoothing) * loss + inputs.smoothing * spread",
        FUZZ,
        "smoothing not divided by the classes",
    ),
    Mutant(
        "kernels/softmax.py",
        "+ (peak - x_label)",
        "+ (peak - 0.999 * x_label)",
        FUZZ,
        "wrong loss by a part of a logit",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "loss = poison(loss, good)",
        "loss = tl.where(good, loss, 0.0)",
        FUZZ,
        "NaN and infinite losses pass",
    ),
    Mutant(
        "kernels/gradient.py",
        "idle = label == CLASSES",
        "idle = label < 0",
        FUZZ,
        "the gradient of ignored pixels is not zero",
    ),
    Mutant(
        "kernels/gradient.py", "hit *= 1 - task.smoothing", "hit *= 1 + task.smoothing", FUZZ, "sign of the smoothing"
    ),
    Mutant(
        "kernels/gradient.py",
        "d = exponentials[i] * spread - tl.where(pixels.label == i, pixels.hit, 0.0)",
        "d = exponentials[i] * spread + tl.where(pixels.label == i, pixels.hit, 0.0)",
        FUZZ,
        "sign of the true class",
    ),
    Mutant("kernels/gradient.py", "(tl.where(pixels.idle, 0.0, d),)", "(d,)", FUZZ, "ignored pixels, rows of classes"),
    Mutant(
        "kernels/gradient.py",
        "for level in tl.static_range(1, WIDTH.bit_length()):\n        halves = ()",
        "for level in tl.static_range(1, WIDTH.bit_length()):\n        xs = xs if level > 1 else xs[:1] + xs[2:3] + xs[1:2] + xs[3:]\n        halves = ()",
        MASKS,
        "two classes change places",
    ),
    # The solution
    Mutant(
        "kernels/solution.py",
        "m = tl.maximum(tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64)), 1.0)",
        "m = tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64))",
        PROPERTIES,
        "m may be less than 1",
    ),
    Mutant(
        "kernels/solution.py",
        "tau = tl.exp2(-(tl.log2(some) / q + tl.log2(m) / segment.p))",
        "tau = tl.exp2(-(tl.log2(some) / q + tl.log2(m) / q))",
        PROPERTIES,
        "τ misnormalised",
    ),
    Mutant(
        "kernels/solution.py",
        "uniform = (n > 0) & ((m >= n.to(tl.float64)) | (q == 1))",
        "uniform = (n > 0) & (q == 1)",
        PROPERTIES,
        "ratio 1 is not the mean",
    ),
    Mutant(
        "kernels/solution.py",
        "poisoned = (max_bits >= INF_BITS) |",
        "poisoned = (max_bits > 0x7FFFFFFF) |",
        FUZZ,
        "a poisoned segment is not",
    ),
    Mutant(
        "kernels/solution.py",
        "== segments - 1:\n            reduce",
        "== segments:\n            reduce",
        FUZZ,
        "wrong ticket of the last segment",
    ),
    Mutant(
        "kernels/solution.py",
        "filled += there.to(tl.float64)",
        "filled += inside.to(tl.float64)",
        FUZZ,
        "empty segments count in the mean",
    ),
    Mutant(
        "kernels/solution.py",
        "pivot.above + tl.where((drop == 0) & (pivot.bits > 0), ties, 0)",
        "pivot.above",
        "tests/test_solver.py",
        "ties at τ not counted as saturated",
    ),
    Mutant(
        "kernels/numerics.py",
        "far = tl.log2(x * normaliser(x) / t_near_1) + (exponent_bits(x) - exponent_bits(t)).to(tl.float32)",
        "far = tl.log2(x / t)",
        "tests/test_solver.py tests/test_properties.py -k 'select or sort'",
        "powers of far losses under- and overflow",
    ),
    Mutant(
        "kernels/numerics.py",
        "series = 1.0 / 3 + y * series",
        "series = 1.0 / 4 + y * series",
        PROPERTIES,
        "a coefficient of the series",
    ),
    Mutant(
        "kernels/bracket.py",
        "hi = tl.maximum(hi, lo + 1)\n",
        "",
        "tests/test_solver.py tests/test_properties.py -k 'select or sort'",
        "a bracket that is empty",
    ),
    Mutant(
        "kernels/bracket.py",
        "is_lo = (above.to(tl.float64) + powers >= m) | (t == 0)",
        "is_lo = (above.to(tl.float64) + powers > m + 1) | (t == 0)",
        PROPERTIES,
        "the end of the bracket off by one loss",
    ),
    Mutant(
        "kernels/bracket.py",
        "counts += tl.where(place == 0, segment.n - tl.sum(counts, 0), 0)",
        "counts += 0",
        PROPERTIES,
        "the smallest losses are in no bin",
    ),
    Mutant(
        "kernels/select.py",
        "heavy_sum = from_fixed(heavy + extra, fraction_bits - 2)",
        "heavy_sum = from_fixed(extra, fraction_bits - 2)",
        PROPERTIES,
        "losses above the bracket dropped",
    ),
    Mutant(
        "kernels/select.py",
        "tl.store(here + BELOW_POWERS, tl.cast(0, tl.int64))\n",
        "",
        "tests/test_solver.py tests/test_determinism.py -k 'narrowed or tiling'",
        "a total is not zero again after a pass",
    ),
    Mutant(
        "kernels/sort.py",
        "ties += tl.where(there, position - positions(runs.losses, first, threshold - 1, C), 0).to(tl.int64)",
        "ties += there.to(tl.int64)",
        "tests/test_solver.py -k sort",
        "ties in a run count once",
    ),
    # What programs tell each other
    Mutant(
        "kernels/workspace.py",
        'ticket = tl.atomic_add(counter, 1, sem="acq_rel")',
        'ticket = tl.atomic_add(counter, 1, sem="relaxed")',
        ORDER,
        "a ticket that orders nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        'tl.atomic_add(flag, 1, sem="release")',
        'tl.atomic_add(flag, 1, sem="relaxed")',
        ORDER,
        "a flag that publishes nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        'tl.atomic_add(flag, 0, sem="acquire") < value',
        'tl.atomic_add(flag, 0, sem="relaxed") < value',
        ORDER,
        "a wait that learns nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        "    tl.debug_barrier()  # Triton 3.6",
        "    # Triton 3.6",
        ORDER,
        "no barrier before a ticket",
    ),
    Mutant(
        "kernels/workspace.py",
        "    tl.debug_barrier()\n    return ticket",
        "    return ticket",
        ORDER,
        "no barrier after a ticket",
    ),
    Mutant(
        "kernels/workspace.py",
        "< value:\n        pass\n    tl.debug_barrier()",
        "< value:\n        pass",
        ORDER,
        "no barrier after a wait",
    ),
    Mutant(
        "kernels/select.py",
        "        if PASS == 0 and not WAIT:",
        "        if PASS == 1 and not WAIT:",
        "tests/test_solver.py tests/test_launch.py -k 'passes or narrowed or same_from'",
        "a bracket that stays is not stored for the next launch",
    ),
    Mutant(
        "kernels/select.py",
        "            if WAIT:\n                raise_flag(here + PASSED)\n",
        "",
        WAIT,
        "a flag that nobody raises",
    ),
    Mutant(
        "kernels/select.py",
        "wait_for(here + PASSED, flag)",
        "wait_for(here + PASSED, flag - 1)",
        WAIT,
        "a wait for the phase before",
    ),
    Mutant(
        "kernels/select.py",
        "== share.programs - 1:\n            base",
        "== share.programs - 2:\n            base",
        WAIT + " tests/test_launch.py -k 'same'",
        "wrong ticket count in a pass",
    ),
    Mutant(
        "kernels/select.py",
        "            tl.store(here + FINISHED, tl.cast(0, tl.int64))\n",
        "",
        WAIT + " tests/test_launch.py -k 'same'",
        "the ticket counter is not zero again",
    ),
    Mutant(
        "kernels/sort.py", "== task.runs - 1:", "== task.runs - 2:", WAIT + " -k sorting", "a run too few is waited for"
    ),
    Mutant(
        "kernels/sort.py",
        "    tl.debug_barrier()  # the neighbour",
        "    # the neighbour",
        SORTED,
        "no barrier before the neighbour's loss is read",
    ),
    # The host's side
    Mutant(
        "kernels/launch.py",
        "key += (x.dtype, x.get_device(), x.data_ptr() & 15 == 0)",
        "key += (x.dtype, x.get_device())",
        "tests/test_launch.py -k anew",
        "a compiled kernel's key without the alignment",
    ),
    Mutant(
        "kernels/launch.py",
        "key = [kernel, constants, warps, cooperative]",
        "key = [kernel, warps, cooperative]",
        "tests/test_launch.py -k anew",
        "a compiled kernel's key without the constants",
    ),
    Mutant("lmp_triton/fused.py", "return torch.zeros(", "return torch.empty(", FUZZ, "a workspace that is not zeroed"),
    Mutant(
        "lmp_triton/fused.py",
        "    return target if len(layout_of(logits, target).sizes) <= settings.MAX_LEVELS else target.contiguous()",
        "    return target.contiguous()",
        "tests/test_layouts.py tests/test_no_hidden_cost.py",
        "the target is copied though it need not be",
    ),
    # Eager
    Mutant(
        "lmp_triton/eager.py",
        "ell.copy_(_mark(ell, y == label, y != cross_entropy.ignore_index))",
        "ell.copy_(_mark(ell, y == label, y == y))",
        EAGER,
        "eager: ignore_index dropped",
    ),
    Mutant(
        "lmp_triton/search.py",
        "torch.minimum(ratio * n, n).clamp_min(1.0)",
        "torch.minimum(ratio * n, n)",
        EAGER,
        "eager: m may be less than 1",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "(valid.to(wide).log2() / q + m.log2() / p)",
        "(valid.to(wide).log2() / p + m.log2() / p)",
        EAGER,
        "eager: τ misnormalised",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "uniform = (valid > 0) & ((m >= valid) | (q == 1))",
        "uniform = (valid > 0) & (q == 1)",
        EAGER,
        "eager: ratio 1 is not the mean",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "good = good & (losses >= 0) & (losses < torch.inf)",
        "good = good & (losses >= 0)",
        EAGER,
        "eager: infinite losses pass",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "sub_(rest[0], alpha=smoothing / classes)",
        "sub_(rest[0], alpha=smoothing)",
        EAGER,
        "eager: smoothing not divided",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "scale = (valid > 0).to(wide) / (valid > 0).sum().clamp_min(1)",
        "scale = (valid >= 0).to(wide) / valid.numel()",
        EAGER,
        "eager: empty segments count in the mean",
    ),
)
NOT_WITHOUT_A_GPU = (
    "a cached line of the first-level cache read in place of .cg (the interpreter has no caches)",
    "an eviction policy or cache modifier that is wrong or slow",
    "a cooperative launch whose attribute is lost: the interpreter and the stand-in see the request, not the device's",
    "a vector load wider than its address is aligned (the key of compiled kernels is tested; the fault itself needs a GPU)",
    "lanes that hold different sums of one value (rounded() in numerics.py; the emulator in place of a GPU sees it)",
)


def assemble(folder):
    """A copy of the package as it would be installed, and of the checkout that its tests lie in."""
    ignore = shutil.ignore_patterns("__pycache__", "results", "*.pyc")
    package, checkout = folder / "site" / "lmp_triton", folder / "checkout"
    shutil.copytree(ROOT / "lmp_triton", package, ignore=ignore)
    for name in ("kernels", "perf"):
        shutil.copytree(ROOT / name, package / name, ignore=ignore)
    shutil.copytree(ROOT / "tests", checkout / "tests", ignore=ignore)
    for name in ("kernels", "perf"):  # for tests that read the sources
        (checkout / name).symlink_to(package / name)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    code = "import lmp_triton, lmp_triton.kernels.launch as x; print(lmp_triton.__file__, x.__file__)"
    environ = os.environ | {"PYTHONPATH": str(folder / "site")}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd="/", capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(package)) for path in said.stdout.split()), said.stdout


def run(site, tests):
    """The exit status of pytest and its last line."""
    environ = os.environ | {
        "PYTHONPATH": str(site / "site"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LMP_TEST_SHRINK": "0",
    }
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    process = subprocess.Popen(
        command,
        shell=True,
        cwd=site / "checkout",
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return None, f"over {LIMIT:.0f} s"
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.returncode, (failed or said.splitlines() or [""])[-1]


def place_of(site, mutant):
    """The file to change, with its text; fails loudly if the snippet is not there exactly once."""
    folder, _, rest = mutant.file.partition("/")
    path = site / "site" / "lmp_triton" / (mutant.file if folder == "kernels" else rest)
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise SystemExit(f"{mutant.file}: {count} times, not once: {mutant.old!r} ({mutant.what})")
    return path, text


def tried(sites, mutant):
    """What is broken, where, and the test that noticed, or None."""
    site = sites.get()
    path, text = place_of(site, mutant)
    start = time.monotonic()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code, said = run(site, mutant.tests)
    finally:
        path.write_text(text)
        sites.put(site)
    noticed = code is None or code == 1
    name = said.removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0]
    how = "noticed" if noticed else f"SURVIVES ({code})"
    print(f"{how:12} {mutant.what}: {name} ({time.monotonic() - start:.0f} s)", flush=True)
    return mutant.what, mutant.file, name if noticed else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="ways whose description or file holds one of these")
    parser.add_argument("--write", action="store_true", help="renew tests/mutants.md")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="only look whether every snippet is there once")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.only or any(text in m.what + m.file for text in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        sites = queue.Queue()
        for number in range(options.jobs):
            sites.put(Path(folder, str(number)))
            assemble(Path(folder, str(number)))
        for mutant in MUTANTS:
            place_of(Path(folder, "0"), mutant)
        if options.check:
            print(f"{len(MUTANTS)} ways, each snippet there once")
            return 0
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(lambda mutant: tried(sites, mutant), chosen))
    survivors = [row for row in rows if row[2] is None]
    print(f"{len(chosen)} ways, {len(survivors)} not noticed")
    if options.write:
        write(rows, survivors)
    return 1 if survivors else 0


def write(rows, survivors):
    """The table."""
    lines = [
        "# Ways to break it, and the test that notices",
        "",
        f"`python tests/mutants.py --write`: {len(rows)} ways, {len(survivors)} not noticed.",
        "",
        "| broken | in | noticed by |",
        "| --- | --- | --- |",
        *(f"| {what} | {file} | {(name or '**nothing**').replace('|', ' ')} |" for what, file, name in rows),
        "",
        "What can't be noticed without a GPU:",
        "",
        *(f"- {what}" for what in NOT_WITHOUT_A_GPU),
        "",
    ]
    (ROOT / "tests" / "mutants.md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
