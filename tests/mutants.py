"""Breaks kernels, eager backend and host code in known ways, one at a time, and runs the tests that should notice.

    python tests/mutants.py [--only TEXT ...] [--write]

Noticed means that a test failed: exit status 1 of pytest. A way that no test notices is a survivor; one whose tests
could not be run to their end is unsettled. Works on copies of the package, takes three minutes of one core, and is no
part of CI. --write renews tests/mutants.md, the table of the last run. A snippet that is not in its file, or is there
twice, is an error, and so are tests that fail with nothing broken: the code has moved on, and the way to break it has
to move with it.
"""

import argparse
import multiprocessing
import os
import queue
import resource
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CPU_LIMIT, LIMIT = 300, 3600
"""Seconds of a core, which what else the machine does takes nothing from, and of the clock, for what only waits."""


class Mutant(NamedTuple):
    """One way to break it."""

    file: str
    old: str
    new: str
    tests: str
    """Arguments of pytest: the few tests that should notice."""
    what: str


ONE_PIXEL = "tests/test_memory.py -k 'every_layout and size0-5-contiguous'"
TILE = "tests/test_memory.py -k 'every_layout and size1-5-contiguous'"
WEIGHTS = "tests/test_memory.py -k 'weights_and and 33-0.1'"
PASSES = "tests/test_memory.py -k passes"
OVERFLOW = "tests/test_memory.py -k overflows"
SORTED = "tests/test_memory.py -k 'every_solver and 1.3-700 and sort'"
SIDE_BY_SIDE = "tests/test_layouts.py -k 'every_layout and channels_last-19-options0'"
STRIDED_TARGET = "tests/test_layouts.py -k target_of_other"
LOSSES = "tests/test_cross_entropy.py -k 'ratio_1 and triton-2-False-0.0'"
SMOOTHED = "tests/test_cross_entropy.py -k 'ratio_1 and triton-2-False-0.1'"
IGNORED_IMAGE = "tests/test_inputs.py -k 'one_image_ignored and triton'"
UNCHECKED = "tests/test_inputs.py -k 'unchecked and triton-C-3'"
BAD_LOGITS = "tests/test_inputs.py -k 'bad_logits_poison and triton-nan-3'"
ORACLE = "tests/test_solver.py -k 'against and select-1.3'"
AT_P_1 = "tests/test_solver.py -k 'against and select-1.0]'"
FAR_APART = "tests/test_solver.py -k 'fifty_orders and select]'"
NARROWED = "tests/test_solver.py -k 'against and narrowed-1.0]'"
NEXT_TO_ALPHA = "tests/test_solver.py -k next_to_alpha"
SORTED_LIST = "tests/test_solver.py -k sorted_or_in_rounds"
IN_THE_BRACKET = "tests/test_perf.py -k simulation_of_the_search"
LISTED = 'mask=index < candidates.length, other=-1.0, cache_modifier=".cg")\n        bits = float_bits(x)\n        '
WITHIN = "in_bracket = (bits > candidates.lo) & (bits <= candidates.hi)"
COUNTS = "tests/test_solver.py -k 'exact_counts and select-'"
COUNTS_OF_RUNS = "tests/test_solver.py -k 'exact_counts and runs-'"
TURNS, TURNS_SOLVE, TURNS_FORWARD = (
    f"'tests/test_waiting.py::test_the_same_bits_in_every_order[{way}-in turn]'" for way in ("", "solve", "forward")
)
TURNS_SORT = "'tests/test_waiting.py::test_sorting_takes_turns_too[in turn]'"
KEY = "tests/test_launch.py -k 'anew or handed_on'"
UPSAMPLED = "tests/test_upsampling.py -k 'test_options and triton-5-options1'"
UPSAMPLED_PROGRAMS = "tests/test_upsampling.py -k 'programs_that_meet'"
UPSAMPLED_DEEP = "tests/test_upsampling.py -k 'sure_of_different and triton'"
EAGER_ORACLE = "tests/test_solver.py -k 'against and eager-1.3'"
EAGER_COUNTS = "tests/test_solver.py -k 'exact_counts and eager'"
EAGER_SMOOTHED = "tests/test_cross_entropy.py -k 'ratio_1 and eager-2-False-0.1'"
EAGER_IGNORED = "tests/test_inputs.py -k 'one_image_ignored and eager'"
EAGER_NUMPY = "tests/test_slices.py -k 'numpy and dtype0-1.3'"
EAGER_MARKS = "tests/test_slices.py -k 'marks and 2-target_type0'"
EAGER_MARKS_TORCH = "tests/test_slices.py -k 'marks and 3-target_type0'"
EAGER_CUT = "tests/test_slices.py -k 'all_there_is or (however and dtype0-contiguous)'"
EAGER_BAD = "tests/test_inputs.py -k 'eager and (bad_losses or infinite_losses)'"

MUTANTS = (
    # Masks and addresses
    Mutant(
        "kernels/layout.py",
        "return math.gcd(16, *sizes)",
        "return 16",
        ORACLE,
        "a promise that 16 divides what it does not",
    ),
    Mutant(
        "kernels/select.py",
        "x = tl.load(share.losses + index, mask=index < share.length, other=-1.0)\n            bits = float_bits(x)\n            x = tl.where",
        "x = tl.load(share.losses + index, mask=index <= share.length, other=-1.0)\n            bits = float_bits(x)\n            x = tl.where",
        PASSES,
        "mask of the narrowing pass off by one",
    ),
    Mutant(
        "kernels/select.py",
        LISTED + WITHIN + "\n        over",
        LISTED.replace("<", "<=") + WITHIN + "\n        over",
        OVERFLOW,
        "mask of the heaviest losses off by one",
    ),
    Mutant(
        "kernels/select.py",
        "tl.where(place > 0, 0.0, lo.powers.to(tl.float32) * tl.exp2(-loss_decay)) + ",
        "",
        ORACLE,
        "what lies below the sorted list is left out",
    ),
    Mutant(
        "kernels/select.py",
        "hi.above + (LENGTH - 1 - place)",
        "hi.above + (LENGTH - place)",
        ORACLE,
        "a sorted loss counts as above itself",
    ),
    Mutant(
        "kernels/bracket.py",
        "-q * log2_ratio(x, t)",
        "-q * (log2_ratio(x, t) - 1e-7)",
        NEXT_TO_ALPHA,
        "errors of decays add up",
    ),
    Mutant(
        "kernels/select.py",
        "if fits & (listed <= SORTED):",
        "if fits:",
        SORTED_LIST,
        "a list too long to be sorted is cut off",
    ),
    Mutant(
        "kernels/select.py",
        "mask=is_listed & (slot < capacity)",
        "mask=is_listed & (slot <= capacity)",
        OVERFLOW,
        "the short list overruns by one",
    ),
    Mutant(
        "kernels/weighting.py",
        "inside = index < length",
        "inside = index <= length",
        SORTED,
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
        "kernels/sort.py",
        "index * length + at",
        "index * (length + 1) + at",
        ONE_PIXEL,
        "wrong stride between segments",
    ),
    Mutant(
        "kernels/sort.py",
        "fits = candidate <= RUN\n",
        "fits = candidate <= RUN + 1\n",
        COUNTS_OF_RUNS,
        "the binary search leaves its run",
    ),
    Mutant(
        "kernels/gradient.py",
        "mask=inside, eviction_policy=LAST)\n\n\ndef",
        "eviction_policy=LAST)\n\n\ndef",
        ONE_PIXEL,
        "store of the gradient without a mask",
    ),
    Mutant(
        "kernels/gradient.py",
        "mask=pixels.inside[:, None] & (classes < CLASSES),",
        "mask=pixels.inside[:, None] & (classes <= CLASSES),",
        SIDE_BY_SIDE,
        "a class too many is stored",
    ),
    Mutant(
        "kernels/gradient.py",
        "saved = image * sizes.pixels + start",
        "saved = image * (sizes.pixels - 1) + start",
        TILE,
        "wrong stride of the saved losses",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "good = (label >= 0) & (label < CLASSES)",
        "good = (label >= 0) & (label <= CLASSES)",
        UNCHECKED,
        "label C counts as good: read out of bounds",
    ),
    Mutant(
        "kernels/softmax.py",
        "mask=c < CLASSES, other=0.0).to(tl.float32)",
        "mask=c <= CLASSES, other=0.0).to(tl.float32)",
        WEIGHTS,
        "a class weight too many is read",
    ),
    # Ignored pixels, labels, weights, smoothing
    Mutant(
        "kernels/cross_entropy.py",
        "valid = inside & (label != inputs.ignore_index)",
        "valid = inside",
        IGNORED_IMAGE,
        "ignore_index dropped",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "loss = (1 - inputs.smoothing) * loss + (inputs.smoothing / CLASSES) * spread",
        "loss = (1 - inputs.smoothing) * loss + inputs.smoothing * spread",
        SMOOTHED,
        "smoothing not divided by the classes",
    ),
    Mutant(
        "kernels/softmax.py",
        "+ (peak - x_label)",
        "+ (peak - 0.999 * x_label)",
        LOSSES,
        "wrong loss by a part of a logit",
    ),
    Mutant(
        "kernels/cross_entropy.py",
        "loss = poison(loss, good)",
        "loss = tl.where(good, loss, 0.0)",
        UNCHECKED,
        "NaN and infinite losses pass",
    ),
    Mutant(
        "kernels/gradient.py",
        "idle = label == CLASSES",
        "idle = label < 0",
        TILE,
        "the gradient of ignored pixels is not zero",
    ),
    Mutant(
        "kernels/gradient.py",
        "hit *= 1 - task.smoothing",
        "hit *= 1 + task.smoothing",
        SMOOTHED,
        "sign of the smoothing",
    ),
    Mutant(
        "kernels/gradient.py",
        "d = exponentials[i] * spread - tl.where(pixels.label == i, pixels.hit, 0.0)",
        "d = exponentials[i] * spread + tl.where(pixels.label == i, pixels.hit, 0.0)",
        LOSSES,
        "sign of the true class",
    ),
    Mutant(
        "kernels/gradient.py",
        "(tl.where(pixels.idle, 0.0, d),)",
        "(d,)",
        SIDE_BY_SIDE,
        "ignored pixels, rows of classes",
    ),
    Mutant(
        "kernels/gradient.py",
        "for level in tl.static_range(1, WIDTH.bit_length()):\n        halves = ()",
        "for level in tl.static_range(1, WIDTH.bit_length()):\n        xs = xs if level > 1 else xs[:1] + xs[2:3] + xs[1:2] + xs[3:]\n        halves = ()",
        SIDE_BY_SIDE,
        "two classes change places",
    ),
    # The solution
    Mutant(
        "kernels/solution.py",
        "m = tl.maximum(tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64)), 1.0)",
        "m = tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64))",
        ORACLE,
        "m may be less than 1",
    ),
    Mutant(
        "kernels/solution.py",
        "log2_n * inverse_q + log2_m * inverse_p",
        "log2_n * inverse_q + log2_m * inverse_q",
        ORACLE,
        "τ misnormalised",
    ),
    Mutant(
        "kernels/solution.py",
        "uniform = (n > 0) & ((m >= n.to(tl.float64)) | (segment.q == 1))",
        "uniform = (n > 0) & (segment.q == 1)",
        COUNTS,
        "ratio 1 is not the mean",
    ),
    Mutant(
        "kernels/solution.py",
        "poisoned |= max_bits >= INF_BITS",
        "poisoned |= max_bits > 0x7FFFFFFF",
        BAD_LOGITS,
        "a poisoned segment is not",
    ),
    Mutant(
        "kernels/solution.py",
        "== segments - 1:\n            reduce",
        "== segments:\n            reduce",
        LOSSES,
        "wrong ticket of the last segment",
    ),
    Mutant(
        "kernels/solution.py",
        "filled += there.to(tl.int32)",
        "filled += inside.to(tl.int32)",
        IGNORED_IMAGE,
        "empty segments count in the mean",
    ),
    Mutant(
        "kernels/solution.py",
        "pivot.above + tl.where((drop == 0) & (pivot.bits > 0), ties, 0)",
        "pivot.above",
        COUNTS,
        "ties at τ not counted as saturated",
    ),
    Mutant(
        "kernels/numerics.py",
        "far = tl.log2(x * normaliser(x) / t_near_1) + (exponent_bits(x) - exponent_bits(t)).to(tl.float32)",
        "far = tl.log2(x / t)",
        FAR_APART,
        "powers of far losses under- and overflow",
    ),
    Mutant(
        "kernels/numerics.py",
        "series = 1.0 / 3 + y * series",
        "series = 1.0 / 4 + y * series",
        ORACLE,
        "a coefficient of the series",
    ),
    Mutant("kernels/bracket.py", "hi = tl.maximum(hi, lo + 1)\n", "", AT_P_1, "a bracket that is empty"),
    Mutant(
        "kernels/bracket.py",
        "is_lo = (above.to(tl.float64) + powers >= m) | (t == 0)",
        "is_lo = (above.to(tl.float64) + powers > m + 1) | (t == 0)",
        SORTED_LIST,
        "the end of the bracket off by one loss",
    ),
    Mutant(
        "kernels/bracket.py",
        "counts += tl.where(place == 0, segment.n.to(tl.int32) - tl.sum(counts, 0), 0)",
        "counts += 0",
        IN_THE_BRACKET,
        "the smallest losses are in no bin",
    ),
    Mutant(
        "kernels/select.py",
        "from_normalised(heavy + extra, ",
        "from_normalised(extra, ",
        ORACLE,
        "losses above the bracket dropped",
    ),
    Mutant(
        "kernels/select.py",
        "tl.store(here + BELOW_POWERS, tl.cast(0, tl.int64))\n",
        "",
        NARROWED,
        "a total is not zero again after a pass",
    ),
    Mutant(
        "kernels/sort.py",
        "ties += tl.where(there, position - positions(runs.losses, first, threshold - 1, C), 0).to(tl.int64)",
        "ties += there.to(tl.int64)",
        COUNTS_OF_RUNS,
        "ties in a run count once",
    ),
    # What programs tell each other
    Mutant(
        "kernels/workspace.py",
        "FIRST_BIN) >> BIN_SHIFT, octave)",
        "FIRST_BIN) >> BIN_SHIFT, 0)",
        IN_THE_BRACKET,
        "small losses are counted in bin 0",
    ),
    Mutant(
        "kernels/bracket.py",
        "FIRST_OCTAVE + (place << OCTAVE_SHIFT)",
        "FIRST_BIN + (place << BIN_SHIFT)",
        IN_THE_BRACKET,
        "the bins of an octave lie elsewhere",
    ),
    Mutant(
        "kernels/workspace.py",
        'ticket = tl.atomic_add(counter, 1, sem="acq_rel")',
        'ticket = tl.atomic_add(counter, 1, sem="relaxed")',
        TURNS,
        "a ticket that orders nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        'tl.atomic_add(flag, 1, sem="release")',
        'tl.atomic_add(flag, 1, sem="relaxed")',
        TURNS_FORWARD,
        "a flag that publishes nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        'tl.atomic_add(flag, 0, sem="acquire") < value',
        'tl.atomic_add(flag, 0, sem="relaxed") < value',
        TURNS_FORWARD,
        "a wait that learns nothing",
    ),
    Mutant(
        "kernels/workspace.py",
        "    tl.debug_barrier()  # Triton 3.6",
        "    # Triton 3.6",
        TURNS,
        "no barrier before a ticket",
    ),
    Mutant(
        "kernels/workspace.py",
        "    tl.debug_barrier()\n    return ticket",
        "    return ticket",
        TURNS,
        "no barrier after a ticket",
    ),
    Mutant(
        "kernels/workspace.py",
        "< value:\n        pass\n    tl.debug_barrier()",
        "< value:\n        pass",
        TURNS_SOLVE,
        "no barrier after a wait",
    ),
    Mutant(
        "kernels/select.py",
        "        if PASS == 0 and not WAIT:",
        "        if PASS == 1 and not WAIT:",
        PASSES,
        "a bracket that stays is not stored for the next launch",
    ),
    Mutant(
        "kernels/select.py",
        "            if WAIT:\n                raise_flag(here + PASSED)\n",
        "",
        TURNS_SOLVE,
        "a flag that nobody raises",
    ),
    Mutant(
        "kernels/select.py",
        "wait_for(here + PASSED, flag)",
        "wait_for(here + PASSED, flag - 1)",
        TURNS_FORWARD,
        "a wait for the phase before",
    ),
    Mutant(
        "kernels/select.py",
        "== share.programs - 1:\n            base",
        "== share.programs - 2:\n            base",
        TURNS,
        "wrong ticket count in a pass",
    ),
    Mutant(
        "kernels/select.py",
        "            tl.store(here + FINISHED, tl.cast(0, tl.int64))\n",
        "",
        TURNS,
        "the ticket counter is not zero again",
    ),
    Mutant("kernels/sort.py", "== task.runs - 1:", "== task.runs - 2:", TURNS_SORT, "a run too few is waited for"),
    Mutant(
        "kernels/sort.py",
        "    tl.debug_barrier()  # the neighbour",
        "    # the neighbour",
        SORTED,
        "no barrier before the neighbour's loss is read",
    ),
    # The host's side
    Mutant(
        "kernels/launcher.py",
        "compiled[grid, 1, 1](*arguments, *constants)",
        "compiled[grid, 1, 1](*constants, *arguments)",
        KEY,
        "wrong order of arguments once it is compiled",
    ),
    Mutant(
        "kernels/launcher.py",
        "key = [kernel, constants, warps, cooperative, registers]\n",
        "key = [kernel, constants, warps, registers]\n",
        KEY,
        "a compiled kernel's key without the way to launch",
    ),
    Mutant(
        "kernels/launcher.py",
        "key += (x.dtype, x.get_device(), x.data_ptr() & 15 == 0)",
        "key += (x.dtype, x.get_device())",
        KEY,
        "a compiled kernel's key without the alignment",
    ),
    Mutant(
        "kernels/launcher.py",
        "key = [kernel, constants, warps, cooperative, registers]",
        "key = [kernel, warps, cooperative, registers]",
        KEY,
        "a compiled kernel's key without the constants",
    ),
    Mutant(
        "lmp_triton/fused.py", "return torch.zeros(", "return torch.empty(", LOSSES, "a workspace that is not zeroed"
    ),
    Mutant(
        "lmp_triton/fused.py",
        "    return target if len(layout_of(logits, target).sizes) <= settings.MAX_LEVELS else target.contiguous()",
        "    return target.contiguous()",
        STRIDED_TARGET,
        "the target is copied though it need not be",
    ),
    # Eager
    Mutant(
        "lmp_triton/eager.py",
        "ell.copy_(_mark(ell, y == label, y != cross_entropy.ignore_index))",
        "ell.copy_(_mark(ell, y == label, y == y))",
        EAGER_MARKS_TORCH,
        "eager: ignore_index dropped",
    ),
    Mutant(
        "lmp_triton/search.py",
        "torch.minimum(ratio * n, n).clamp_min(1.0)",
        "torch.minimum(ratio * n, n)",
        EAGER_NUMPY,
        "eager: m may be less than 1",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "(xp.log2(n) / q + xp.log2(m) / p)",
        "(xp.log2(n) / p + xp.log2(m) / p)",
        EAGER_ORACLE,
        "eager: τ misnormalised",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "uniform = some & ((m >= n) | (q == 1))",
        "uniform = some & (q == 1)",
        EAGER_COUNTS,
        "eager: ratio 1 is not the mean",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "good = good & (losses >= 0) & (losses < torch.inf)",
        "good = good & (losses >= 0)",
        EAGER_BAD,
        "eager: infinite losses pass",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "sub_(rest[0], alpha=smoothing / classes)",
        "sub_(rest[0], alpha=smoothing)",
        EAGER_SMOOTHED,
        "eager: smoothing not divided",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "scale = (wide + some) / xp.clip(some.sum(), 1, None)",
        "scale = (wide + 1) / len(wide)",
        EAGER_IGNORED,
        "eager: empty segments count in the mean",
    ),
    Mutant(
        "lmp_triton/host.py",
        "w -= (ell <= pivots[rows]) * drops[rows]",
        "w -= drops[rows]",
        EAGER_NUMPY,
        "eager, NumPy: saturated weights below 1",
    ),
    Mutant(
        "lmp_triton/host.py",
        "np.copyto(w, 1.0, where=ell > pivots[rows])",
        "pass",
        EAGER_SMOOTHED,
        "eager, NumPy: no weight at all where the pivot is 0",
    ),
    Mutant(
        "lmp_triton/host.py",
        "np.clip(ell, 0, bases[rows], out=w)",
        "np.clip(ell, None, bases[rows], out=w)",
        EAGER_NUMPY,
        "eager, NumPy: weights of ignored losses undefined",
    ),
    Mutant(
        "lmp_triton/host_search.py",
        "return max(1.0, min(valid, ratio * valid))",
        "return min(valid, ratio * valid)",
        EAGER_ORACLE,
        "eager, NumPy: m may be less than 1",
    ),
    Mutant(
        "lmp_triton/host_search.py",
        ">= m - beyond - (k - 1))",
        ">= m - beyond - k)",
        EAGER_ORACLE,
        "eager, NumPy: one loss too many above the pivot",
    ),
    Mutant(
        "lmp_triton/host_search.py",
        "power_total += float(",
        "power_total = float(",
        EAGER_NUMPY,
        "eager, NumPy: the sum of the last block alone",
    ),
    Mutant(
        "lmp_triton/host.py",
        "np.copyto(w, 0.0, where=ell == IGNORED)",
        "pass",
        EAGER_BAD,
        "eager, NumPy: ignored losses of a poisoned segment get a weight",
    ),
    Mutant(
        "lmp_triton/host_search.py",
        "inside.append(ell[near ^ over])",
        "inside.append(ell[near])",
        EAGER_NUMPY,
        "eager, NumPy: losses above the bracket counted twice",
    ),
    Mutant(
        "lmp_triton/host.py",
        "(some >> shift) & 0xFFFF",
        "(some >> shift + 1) & 0xFFFF",
        EAGER_NUMPY,
        "eager, NumPy: a histogram of other bits",
    ),
    Mutant(
        "lmp_triton/host.py",
        "bad |= ~((ell >= 0) & (ell < np.inf))",
        "bad |= ~(ell >= 0) & ~(ell < np.inf) & False",
        EAGER_MARKS,
        "eager, NumPy: undefined losses pass",
    ),
    Mutant(
        "lmp_triton/host.py",
        "np.copyto(ell, np.nan, where=bad)",
        "pass",
        EAGER_MARKS,
        "eager, NumPy: bad labels pass",
    ),
    Mutant(
        "lmp_triton/slices.py",
        "pixels -= pixels % 16 if pixels > 16 else 0",
        "pixels += 1",
        EAGER_CUT,
        "eager: slices larger than asked for",
    ),
    Mutant(
        "lmp_triton/eager.py",
        "d.addcmul_(w, share[:, None], value=-1)",
        "d.addcmul_(w, share[:, None], value=1)",
        EAGER_SMOOTHED,
        "eager: the share of smoothing with the wrong sign",
    ),
    Mutant(
        "kernels/launcher.py",
        "key = [kernel, constants, warps, cooperative, registers]",
        "key = [kernel, constants, warps, cooperative]",
        KEY,
        "a compiled kernel's key without the registers",
    ),
    # Upsampled
    Mutant(
        "kernels/upsampled_losses.py",
        "for row_number in range(grid.rows.longest):",
        "for row_number in range(grid.rows.longest - 1):",
        UPSAMPLED,
        "upsampled: the last row of a cell is left out",
    ),
    Mutant(
        "kernels/upsampled_losses.py",
        "row.x_place * ((b - a) + y * ((d - c) - (b - a)))",
        "row.x_place * ((b - a) + y * ((d - c) + (b - a)))",
        UPSAMPLED,
        "upsampled: sign in the interpolation",
    ),
    Mutant(
        "kernels/upsampled_losses.py",
        "deep = (tl.min(depth, 0) < SHALLOW) | (tl.max(tl.max(steep, 0), 0) > STEEP)",
        "deep = tl.min(depth, 0) < LOWEST_NODE",
        UPSAMPLED_DEEP,
        "upsampled: all exponentials vanish between sure nodes",
    ),
    Mutant(
        "kernels/upsampled_losses.py",
        "loss = tl.where(valid, loss, -1.0)",
        "loss = tl.where(row.there, loss, -1.0)",
        UPSAMPLED,
        "upsampled: ignore_index dropped",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "(spans.index + C.overlap < a_row)",
        "(spans.index + C.overlap < a_row - 1)",
        UPSAMPLED,
        "upsampled: a node gets nothing from one side",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "mask=there & (cell > 0)",
        "mask=there & (cell > 1)",
        UPSAMPLED_PROGRAMS,
        "upsampled: a node gets nothing from one side, both being kept apart",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "mine = there & ((lane >= C.overlap)",
        "mine = there & ((lane >= 0)",
        UPSAMPLED_PROGRAMS,
        "upsampled: two programs that overlap both store what is given to a node",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "there & (strip > 0) & (cell == strip * task.height)",
        "there & (strip > 1) & (cell == strip * task.height)",
        UPSAMPLED_PROGRAMS,
        "upsampled: what the first strip of cells ends with is left out",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "right = tl.where(alone, both, right)\n        tl.store",
        "right = tl.where(alone, 0.0, right)\n        tl.store",
        UPSAMPLED,
        "upsampled: nothing for nodes at the border",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "below = y * x",
        "below = (1 - y) * x",
        UPSAMPLED,
        "upsampled: upper and lower nodes change places",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "steep = tl.max(tl.max(values.steep, 1), 0) > STEEP",
        "steep = tl.max(tl.max(values.steep, 1), 0) < 0",
        UPSAMPLED_DEEP,
        "upsampled: a progression too steep for float32",
    ),
    Mutant(
        "kernels/upsampled_gradient.py",
        "tl.where(pixels.hit[k] != 0.0, 1 << (c // C.groups & 31), 0)",
        "tl.where(pixels.hit[k] != 0.0, 1 << (c // C.groups & 3), 0)",
        "tests/test_upsampling.py -k 'test_options and triton-33-options0'",
        "upsampled: a label is left out",
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


def preload():
    """What takes seconds to import, once for all runs: each is a fork of this process."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    torch.compile(torch.neg, backend="eager")(torch.ones(1))


def pytest_in(site, tests):
    """In a process of its own: run tests on the copy of the package at `site`."""
    import pytest

    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 10))
    with (site / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(site / "checkout")
    os.environ["PYTHONPATH"] = str(site / "site")
    sys.path[:] = [str(site / "site"), *(x for x in sys.path if Path(x).resolve() not in (ROOT, ROOT / "tests"))]
    import lmp_triton.kernels.launcher as launcher

    assert Path(launcher.__file__).is_relative_to(site), launcher.__file__
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


def run(site, tests):
    """The exit status of pytest, and the test that failed or the last line."""
    process = multiprocessing.get_context("fork").Process(target=pytest_in, args=(site, tests))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        os.killpg(process.pid, 9)
        process.join()
    said = (site / "said").read_text().splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    last = (failed or said or [""])[-1]
    return process.exitcode, last.removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0]


def place_of(site, mutant):
    """The file to change, with its text; fails loudly if the snippet is not there exactly once."""
    folder, _, rest = mutant.file.partition("/")
    path = site / "site" / "lmp_triton" / (mutant.file if folder == "kernels" else rest)
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise SystemExit(f"{mutant.file}: {count} times, not once: {mutant.old!r} ({mutant.what})")
    return path, text


class Row(NamedTuple):
    """What came of one."""

    mutant: Mutant
    status: int
    """1: noticed, 0: it survives, else unsettled."""
    said: str


def tried(sites, mutant):
    """The tests run with this broken."""
    site = sites.get()
    path, text = place_of(site, mutant)
    start = time.monotonic()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        row = Row(mutant, *run(site, mutant.tests))
    finally:
        path.write_text(text)
        sites.put(site)
    how = {0: "SURVIVES", 1: "noticed"}.get(row.status, f"UNSETTLED ({row.status})")
    print(f"{how} {mutant.what}: {row.said} ({time.monotonic() - start:.0f} s)", flush=True)
    return row


def whole(sites, tests):
    """Raises unless these tests pass with nothing broken."""
    site = sites.get()
    try:
        status, said = run(site, tests)
    finally:
        sites.put(site)
    if status:
        raise SystemExit(f"with nothing broken: {tests}: {said} ({status})")


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
        preload()
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda tests: whole(sites, tests), dict.fromkeys(m.tests for m in chosen)))
            print("all tests pass with nothing broken", flush=True)
            rows = list(pool.map(lambda mutant: tried(sites, mutant), chosen))
    print(summary(rows))
    if options.write:
        write(rows)
    return 1 if any(row.status != 1 for row in rows) else 0


def summary(rows):
    """In numbers."""
    survivors = sum(row.status == 0 for row in rows)
    return f"{len(rows)} ways, {survivors} not noticed, {sum(row.status not in (0, 1) for row in rows)} unsettled"


def write(rows):
    """The table."""
    settled, unsettled = ([row for row in rows if (row.status in (0, 1)) == wanted] for wanted in (True, False))
    noticed_by = [row.said.replace("|", " ") if row.status else "**nothing**" for row in settled]
    lines = [
        "# Ways to break it, and the test that notices",
        "",
        f"`python tests/mutants.py --write`: {summary(rows)}. Noticed is what makes a test fail; the same tests pass",
        "with nothing broken.",
        "",
        "| broken | in | noticed by |",
        "| --- | --- | --- |",
        *(f"| {row.mutant.what} | {row.mutant.file} | {by} |" for row, by in zip(settled, noticed_by, strict=True)),
        "",
    ]
    if unsettled:
        lines += ["Unsettled, for the tests did not come to an end:", ""]
        lines += [*(f"- {row.mutant.what}: {row.said} ({row.status})" for row in unsettled), ""]
    lines += ["What can't be noticed without a GPU:", "", *(f"- {what}" for what in NOT_WITHOUT_A_GPU), ""]
    (ROOT / "tests" / "mutants.md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
