"""Whatever a user can pass: eager, the kernels in the interpreter and a float64 oracle side by side.

    python -m tests.fuzz --minutes 60 [--seed N]

tests/test_fuzz.py gives it a fixed budget. A failing example is shrunk and printed; the run goes on with another seed
and ends with a list of what was found.
"""

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:] = [str(HERE), *(x for x in sys.path if Path(x or ".").resolve() != HERE.parent)]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import torch.nn.functional as F  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from support import cut_small  # noqa: E402

import lmp_triton  # noqa: E402
from lmp_triton import reference  # noqa: E402

CUDA = torch.cuda.is_available()
LAYOUTS = ("contiguous", "channels_last", "cropped", "offset", "expanded", "transposed")
NEAR_ONE = 1.05
"""Below it the weights follow the last bits of the losses, which differ by backend: the loss alone is compared."""


class Case(NamedTuple):
    """One call of loss_max_pooling, and what is done with its result."""

    images: int
    classes: int
    spatial: tuple[int, ...]
    layout: str
    dtype: str
    labels: str
    scale: float
    ignored: float
    all_ignored: bool
    """The first image."""
    ignore_index: int
    special: tuple[tuple[int, str], ...]
    """Places among the logits, modulo their number, and what stands there."""
    p: float
    ratio: float
    weighted: str
    smoothing: float
    scope: str
    reduction: str
    solver: str
    grad_output: str
    cut: int
    """So many threads' way to cut up the passes of the eager backend; 0: whole, these are short."""
    seed: int


SPECIAL = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "1e4": 1e4, "-1e4": -1e4, "denormal": 1e-40}
CASES = st.builds(
    Case,
    images=st.sampled_from([0, 1, 1, 2, 3]),
    classes=st.sampled_from([1, 2, 3, 5, 33]),
    spatial=st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 7, 8]), max_size=3).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    labels=st.sampled_from(["int64", "int64", "uint8", "int32", "int16"]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    ignored=st.sampled_from([0.0, 0.2, 0.9]),
    all_ignored=st.booleans(),
    ignore_index=st.sampled_from([-100, 255, 0]),
    special=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(sorted(SPECIAL))), max_size=2).map(tuple),
    p=st.one_of(st.sampled_from([1.0, 1.05, 1.3, 2.0, math.inf]), st.floats(1, 1.05), st.floats(1.05, 50)),
    ratio=st.one_of(st.sampled_from([0.25, 1.0]), st.floats(1e-3, 1)),
    weighted=st.sampled_from(["no", "no", "yes", "zeros"]),
    smoothing=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    scope=st.sampled_from(["image", "batch"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    solver=st.sampled_from(["auto", "select", "sort"]),
    grad_output=st.sampled_from(["ones", "large", "small", "zero", "strided", "expanded"]),
    cut=st.sampled_from([0, 1, 1, 3]),
    seed=st.integers(0, 2**31),
).map(lambda case: case if case.spatial else case._replace(scope="batch"))  # a row is no image


def laid_out(logits, layout):
    """The same values, lying otherwise in memory."""
    n, classes, *spatial = logits.shape
    if layout == "channels_last":
        return logits.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded" and n:
        return logits[:1].expand(logits.shape)
    if layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if layout in ("cropped", "offset"):
        more = 1 if layout == "offset" else 3
        around = torch.full((n, classes, *(x + more for x in spatial)), math.nan, dtype=logits.dtype)
        first = more - 1 if layout == "cropped" else 1
        view = around[(slice(None), slice(None), *(slice(first, first + x) for x in spatial))]
        return view.copy_(logits)
    return logits


def inputs_of(case):
    """logits, target and weight."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.images, case.classes, *case.spatial)
    logits = case.scale * torch.randn(shape, generator=generator)
    for place, what in case.special if logits.numel() else ():
        logits.view(-1)[place % logits.numel()] = SPECIAL[what]
    logits = laid_out(logits.to(getattr(torch, case.dtype)), case.layout)
    target = torch.randint(case.classes, (case.images, *case.spatial), generator=generator)
    target[torch.rand(target.shape, generator=generator) < case.ignored] = case.ignore_index
    if case.all_ignored:
        target[:1] = case.ignore_index
    weight = None
    if case.weighted != "no":
        weight = torch.rand(case.classes, generator=generator) + 0.1
        if case.weighted == "zeros":
            weight[::2] = 0
    labels = "int64" if case.labels == "uint8" and case.ignore_index < 0 else case.labels
    return logits, target.to(getattr(torch, labels)), weight


def grad_output_of(case, like):
    """What comes from above, of any stride and scale."""
    scale = {"large": 1000.0, "small": 1e-3, "zero": 0.0}.get(case.grad_output, 1.0)
    if case.grad_output == "strided" and like.ndim:
        return torch.rand(2 * len(like), device=like.device)[::2] + 0.5
    if case.grad_output == "expanded":
        return torch.full((1,) * like.ndim, 2.0, device=like.device).expand(like.shape)
    return torch.full_like(like, scale)


def expected_of(case, logits, target, weight, grad_output):
    """By float64: the loss (of each segment, for "none"), the gradient, and how far it may be off at each logit.

    A segment with a valid loss that is no finite number is NaN.
    """
    x = logits.detach().double().requires_grad_()
    options = {"ignore_index": case.ignore_index, "label_smoothing": case.smoothing, "reduction": "none"}
    weight = None if weight is None else weight.double()
    losses = F.cross_entropy(x, target.long(), weight=weight, **options) if x.numel() else x.sum(1)
    segments = 1 if case.scope == "batch" else case.images
    rows, valid = (y.reshape(segments, -1 if segments else 0) for y in (losses, target != case.ignore_index))
    values, weights, taus = [], torch.zeros_like(rows), torch.zeros(segments, 1, dtype=torch.float64)
    for i in range(segments):
        ell = rows[i][valid[i]].detach()
        if not ell.isfinite().all():
            values.append(math.nan)
            weights[i] = taus[i] = math.nan
        elif not len(ell):
            values.append(0.0)
        else:
            solution = reference.solve(ell.numpy().clip(0), reference.support(len(ell), case.ratio), case.p)
            values.append(solution.loss)
            weights[i][valid[i]] = torch.as_tensor(solution.weights)
            taus[i] = solution.tau
    value = torch.tensor(values, dtype=torch.float64)
    counted = valid.any(1).sum().clamp_min(1)
    share = torch.ones(segments, dtype=torch.float64)
    if case.reduction != "none":
        share = share / (counted if case.reduction == "mean" else 1)
        value = (value * share).sum()
    share = (share * grad_output.double().reshape(-1)).unsqueeze(1) if segments else share.unsqueeze(1)
    grad = torch.zeros_like(x)
    if losses.requires_grad and losses.numel():
        at = torch.where(valid & rows.isfinite(), weights * share, 0.0).view_as(losses)
        (grad,) = torch.autograd.grad(losses, x, at)
    counts = valid.view(losses.shape).unsqueeze(1)
    grad = torch.where(counts, grad, 0.0)  # whatever the logits of an ignored pixel are
    spoiled = (weights.isnan() & valid).view(losses.shape).unsqueeze(1).expand_as(x)
    scale = (taus * share.abs()).expand_as(rows).reshape(losses.shape).unsqueeze(1).expand_as(x)
    return value, torch.where(spoiled, math.nan, grad), scale


def call(case, backend, logits, target, weight):
    """The loss and its gradient by a backend."""
    device = "cuda" if CUDA and backend == "triton" else "cpu"
    logits, target = (laid_out_there(t, device) for t in (logits, target))
    x = logits.detach().requires_grad_()
    kept = x.detach().clone(), target.clone()
    value = lmp_triton.loss_max_pooling(
        x,
        target,
        p=case.p,
        ratio=case.ratio,
        weight=None if weight is None else weight.to(device),
        ignore_index=case.ignore_index,
        label_smoothing=case.smoothing,
        scope=case.scope,
        reduction=case.reduction,
        backend=backend,
        solver="auto" if backend == "eager" else case.solver,
    )
    grad_output = grad_output_of(case, value)
    value.backward(grad_output)
    assert torch.equal(x.detach().nan_to_num(), kept[0].nan_to_num()) and torch.equal(target, kept[1]), "inputs changed"
    assert value.dtype == torch.float32 and x.grad.dtype == x.dtype and x.grad.shape == x.shape
    return value.detach().cpu().double(), x.grad.cpu().double(), grad_output.detach().cpu()


def laid_out_there(tensor, device):
    """On a device, with the strides it has."""
    if device == "cpu":
        return tensor
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return there.copy_(tensor)


def check(case, backends=("eager", "triton")):
    """All that must hold; AssertionError if it doesn't."""
    logits, target, weight = inputs_of(case)
    q = case.p / (case.p - 1) if 1 < case.p < math.inf else 1.0
    if case.reduction == "none" and case.grad_output == "strided":
        torch.manual_seed(case.seed)
    for backend in backends:
        torch.manual_seed(case.seed)
        with cut_small(case.cut) if case.cut and backend == "eager" else contextlib.nullcontext():
            value, grad, grad_output = call(case, backend, logits, target, weight)
        want, want_grad, scale = expected_of(case, logits, target, weight, grad_output)
        assert value.shape == want.shape, (backend, value.shape, want.shape)
        size = logits.detach().double()[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 0.0
        # A loss is a difference of logits: as exact as they are.
        allowed = 1e-6 + 1e-6 * size * (1 if weight is None else 2)
        close = torch.isclose(value, want, rtol=2e-5, atol=allowed, equal_nan=True).all()
        assert close, f"{backend}: the loss is {value.tolist()}, not {want.tolist()}"
        if case.p < NEAR_ONE:
            assert torch.equal(grad.isnan(), want_grad.isnan()), f"{backend}: where the gradient is NaN"
            continue
        rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[case.dtype]
        # The weights follow the losses, the more the larger q is, and the more so where the largest are tiny.
        most = 3e-5 * (1 + q) * (1 + size)
        allowed = (scale * most * (1.5 if weight is None else 2)).nan_to_num() + rounding * want_grad.abs().nan_to_num()
        allowed += {"float32": 1e-12, "float16": 1e-7, "bfloat16": 1e-12}[case.dtype]
        assert torch.equal(grad.isnan(), want_grad.isnan()), f"{backend}: where the gradient is NaN"
        over = ((grad - want_grad).abs() - allowed).nan_to_num(0.0)
        assert (over <= 0).all(), f"{backend}: the gradient is off by {over.max().item():.3g} more than allowed"


def examples(count, number=None):
    """A budget; a number: the seed."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    found = settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=checks,
        database=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink)[: 1 if os.environ.get("LMP_TEST_SHRINK") == "0" else 2],
    )
    return (lambda test: seed(number)(found(test))) if number is not None else found


def main():
    """Until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--backend", nargs="+", default=["eager", "triton"], choices=["eager", "triton"])
    options = parser.parse_args()
    if not CUDA:
        import interpreter

        interpreter.speed_up()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a kernel computes what it then masks, and NumPy remarks on it
    end, number, found, tried = time.monotonic() + 60 * options.minutes, options.seed, Counter(), Counter()

    def one(case):
        if time.monotonic() < end:
            tried["cases"] += 1
            check(case, options.backend)

    print(f"seed {number}")
    while time.monotonic() < end:
        try:
            examples(100, number)(given(CASES)(one))()
        except Exception as error:
            if time.monotonic() > end:
                break  # it was being shrunk when the time was up
            first = " ".join(str(error).split())[:160]
            if not found[first.split(":")[0]]:
                print(
                    f"seed {number}: {type(error).__name__}: {first}\n  {getattr(error, '__notes__', '')}", flush=True
                )
            found[first.split(":")[0]] += 1
        number += 1
    print(f"{tried['cases']} cases, {sum(found.values())} of {number - options.seed} rounds failed: {dict(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
