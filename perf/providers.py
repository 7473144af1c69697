"""What is timed: this project's ways to the loss, the same loss done otherwise, and its peers.

A peer is an installed package, or written afresh from its definition. A provider that is missing says so in the
results; it is not dropped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lmp_triton
from lmp_triton import reference, settings

from .workloads import Losses, Workload

Loss = Callable[..., Tensor]
"""Of what the workload makes: logits and target, or losses and no mask."""


class Unavailable(Exception):
    """A provider can't run here; the message says why."""


class Provider(NamedTuple):
    """A way to a loss."""

    make: Callable[[Any], Loss]
    """Of a `Workload` or `Losses`."""
    pooled: bool = False
    """Computes the max-pooled loss: value and gradient are compared with the oracle."""


@contextlib.contextmanager
def asking(cooperative: str) -> Iterator[None]:
    """`settings.COOPERATIVE` for a while."""
    before = os.environ.get(settings.COOPERATIVE, "")
    os.environ[settings.COOPERATIVE] = cooperative
    try:
        yield
    finally:
        os.environ[settings.COOPERATIVE] = before


def ours(
    backend: str, solver: str = "auto", cooperative: str = "", standing_in: bool = False
) -> Callable[[Workload | Losses], Loss]:
    """This project: one backend, solver and way to launch; standing_in: on a GPU that is not there."""

    def make(workload: Workload | Losses) -> Loss:
        if backend == "triton" and not (torch.cuda.is_available() or standing_in):
            raise Unavailable("the kernels need a GPU")
        options: dict[str, Any] = {"p": workload.p, "ratio": workload.ratio, "backend": backend, "solver": solver}
        if isinstance(workload, Losses):
            loss: Loss = functools.partial(lmp_triton.pool_losses, **options)
        else:
            loss = functools.partial(lmp_triton.loss_max_pooling, scope=workload.scope, **options)
        if not cooperative:
            return loss

        def asked(logits: Tensor, target: Tensor) -> Tensor:
            with asking(cooperative):
                return loss(logits, target)

        return asked

    return make


def tuned(**changes: object) -> Callable[[Workload | Losses], Loss]:
    """The kernels by selection with other entries in the table of the search."""

    def make(workload: Workload | Losses) -> Loss:
        loss = ours("triton", "select")(workload)
        from lmp_triton.kernels import configs

        table = configs.table(torch.device("cuda"))
        table = table._replace(select=table.select._replace(**changes))

        def with_these(*inputs: Tensor) -> Tensor:
            with configs.using(table):
                return loss(*inputs)

        return with_these

    return make


def large(loss: Loss) -> Loss:
    """Of logits that are first interpolated to the size of the labels."""
    return lambda logits, target: loss(F.interpolate(logits, target.shape[1:], mode="bilinear"), target)


def upsampled(backend: str, ratio: float | None = None) -> Callable[[Workload], Loss]:
    """This project's loss of logits smaller than the labels; ratio: instead of the workload's."""

    def make(workload: Workload) -> Loss:
        if backend == "triton" and not torch.cuda.is_available():
            raise Unavailable("the kernels need a GPU")
        ratio_ = workload.ratio if ratio is None else ratio
        return functools.partial(
            lmp_triton.upsampled_loss_max_pooling, p=workload.p, ratio=ratio_, scope=workload.scope, backend=backend
        )

    return make


def compiled(make: Callable[[Any], Loss]) -> Callable[[Any], Loss]:
    """The same under torch.compile."""
    return lambda workload: torch.compile(make(workload), fullgraph=True, dynamic=False)


def cross_entropy(workload: Workload) -> Loss:
    """The mean over the pixels that count."""
    return F.cross_entropy


class _Passes(torch.autograd.Function):
    """Forward log_softmax and gather, backward softmax, a product and scatter: see `passes_alone`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        at = target.clamp_min(0).unsqueeze(1)
        ctx.save_for_backward(logits, at)
        return logits.log_softmax(1).gather(1, at).mean().neg()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, at = ctx.saved_tensors
        weights = torch.full_like(at, 1 / at.numel(), dtype=logits.dtype) * grad_output
        return logits.softmax(1).mul_(weights).scatter_add_(1, at, weights.neg()), None


def passes_alone(workload: Workload) -> Loss:
    """What is left of a weighted cross-entropy without its weights: the passes over logits that no form can spare which
    keeps no copy of them. Its gradient is that of the mean over all pixels, ignored ones too."""
    return lambda logits, target: _Passes.apply(logits, target)


class _Nothing(torch.autograd.Function):
    """A loss of 0 and a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


def nothing_at_all(workload: Workload) -> Loss:
    """What PyTorch takes for any loss that has a gradient of its own, were there nothing to compute."""
    return lambda logits, target: _Nothing.apply(logits)


def sorted_pooling(losses: Tensor, valid: Tensor | None, p: float, ratio: float) -> Tensor:
    """Algorithm 1 in eager PyTorch as it is usually written: all losses sorted, prefix sums of powers.

    Args:
        losses: (segments, n). valid: the same shape, bool, or None: all.

    Returns:
        The mean over the segments. float64 inside, or the powers underflow.
    """
    with torch.no_grad():
        total = losses.shape[1]
        n = (losses.new_full((len(losses), 1), total) if valid is None else valid.sum(1, keepdim=True)).double()
        m = (ratio * n).clamp_min(1)
        counted = losses if valid is None else torch.where(valid, losses, 0.0)
        ascending = counted.double().sort(1).values
        if p == 1:
            k = m.ceil().long()
            alpha = ascending.gather(1, total - k)
            ties = (counted == alpha).sum(1, keepdim=True)
            share = (m - (counted > alpha).sum(1, keepdim=True)) / ties
            weights = torch.where(counted > alpha, 1.0, torch.where(counted == alpha, share, 0.0)) / m
        else:
            q = p / (p - 1)
            largest = ascending[:, -1:].clamp_min(1e-300)
            powers = (ascending / largest).pow(q)
            sums = powers.cumsum(1)
            c = m - total + torch.arange(1, total + 1, device=losses.device)
            first = ((c * powers - sums <= 0) | (powers == 0)).sum(1, keepdim=True)
            alpha = largest * (sums.gather(1, (first - 1).clamp_min(0)) / (m - total + first)).pow(1 / q)
            weights = n.pow(-1 / q) * m.pow(-1 / p) * (losses / alpha.clamp_min(1e-300)).clamp_max(1).pow(q - 1)
        weights = (weights if valid is None else torch.where(valid, weights, 0.0)).to(losses.dtype)
    return (weights * losses).sum(1).mean()


def by_sorting(workload: Workload | Losses) -> Loss:
    """`sorted_pooling` of the losses, or of those that F.cross_entropy makes of the logits."""
    if isinstance(workload, Losses):
        return lambda losses, mask: sorted_pooling(losses, mask, workload.p, workload.ratio)
    segments = 1 if workload.scope == "batch" else workload.shape[0]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.float(), target, reduction="none").view(segments, -1)
        return sorted_pooling(losses, (target != -100).view(segments, -1), workload.p, workload.ratio)

    return loss


def largest(workload: Losses) -> Loss:
    """torch.topk: p = 1 with a whole m."""
    if workload.p != 1:
        raise Unavailable("p = 1 only")
    return lambda losses, mask: losses.topk(int(workload.ratio * losses.shape[1]), 1, sorted=False).values.mean()


def mpl_pytorch(workload: Losses) -> Loss:
    """mpl.pytorch's steps, written afresh: one sort of everything, a scan on the host, weights scattered back."""
    p, ratio = workload.p, workload.ratio

    def loss(losses: Tensor, mask: None) -> Tensor:
        flat = losses.reshape(-1)
        ascending, order = flat.detach().sort()
        ell = ascending.cpu().numpy().astype(np.float64)
        n, m = ell.size, ratio * ell.size
        if p == 1:
            scaled = (np.arange(n) >= n - m) / m
        else:
            q = p / (p - 1)
            powers = (ell / ell[-1]) ** q
            sums = np.cumsum(powers)
            eta = (m - n + np.arange(1, n + 1)) * powers - sums
            first = min(int(np.searchsorted(eta > 0, True)), n - 1)  # from here on τ
            alpha = ell[-1] * (sums[max(first - 1, 0)] / (m - n + first)) ** (1 / q)
            scaled = n ** (-1 / q) * m ** (-1 / p) * np.minimum(ell / alpha, 1) ** (q - 1)
        weights = torch.empty_like(flat)
        weights[order] = torch.as_tensor(scaled, dtype=flat.dtype, device=flat.device)
        return (weights * flat).sum()

    return loss


def liger(workload: Workload) -> Loss:
    """Liger-Kernel's fused cross-entropy; it takes (pixels, C), so the permutation counts."""
    function = _package("liger_kernel.transformers.functional", "liger-kernel").liger_cross_entropy  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a GPU")
    classes = workload.shape[1]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # It writes the gradient over its input: the copy that movedim makes protects ours.
        return function(logits.movedim(1, -1).reshape(-1, classes), target.reshape(-1), ignore_index=-100)

    return loss


def hardest_pixels(workload: Workload) -> Loss:
    """detectron2's DeepLabCE: the mean of the largest fifth of the losses, ignored pixels counted among them."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, reduction="none").view(-1)
        return losses.topk(int(0.2 * losses.numel())).values.mean()

    return loss


def ohem(workload: Workload) -> Loss:
    """mmsegmentation's OHEMPixelSampler: pixels whose label has a probability below 0.7, at least 100 000 an image."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            valid = target != -100
            label = torch.where(valid, target, 0).unsqueeze(1)
            probability = logits.softmax(1).gather(1, label).squeeze(1)[valid]
            ascending = probability.sort().values
            least = min(100_000 * target.shape[0], ascending.numel()) - 1
            threshold = ascending[least].clamp_min(0.7)
            chosen = torch.zeros_like(target, dtype=torch.bool)
            chosen[valid] = probability < threshold
        losses = F.cross_entropy(logits, target, reduction="none")
        return (losses * chosen).mean()

    return loss


def lovasz(workload: Workload) -> Loss:
    """Lovász-softmax of segmentation_models_pytorch: a sort a class."""
    module = _package("segmentation_models_pytorch.losses", "segmentation-models-pytorch")
    if len(workload.shape) != 4:
        raise Unavailable("takes (N, C, H, W) only")
    return module.LovaszLoss("multiclass", ignore_index=-100)


def _package(module: str, package: str) -> object:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed ({error})") from error


PROVIDERS = {
    "lmp_triton": Provider(ours("triton"), pooled=True),
    "lmp_triton, select": Provider(ours("triton", "select"), pooled=True),
    "lmp_triton, sort": Provider(ours("triton", "sort"), pooled=True),
    "lmp_triton, cooperative solve": Provider(ours("triton", "select", "solve"), pooled=True),
    "lmp_triton, cooperative forward": Provider(ours("triton", "select", "forward"), pooled=True),
    "lmp_triton, eager": Provider(ours("eager"), pooled=True),
    "lmp_triton, eager, compiled": Provider(compiled(ours("eager")), pooled=True),
    "LMP by torch.sort": Provider(by_sorting, pooled=True),
    "F.cross_entropy": Provider(cross_entropy),
    "F.cross_entropy, compiled": Provider(compiled(cross_entropy)),
    "Liger cross-entropy": Provider(liger),
    "top-k (detectron2)": Provider(hardest_pixels),
    "OHEM (mmseg)": Provider(ohem),
    "Lovász (smp)": Provider(lovasz),
}
LARGE = "F.interpolate + F.cross_entropy"
UPSAMPLED = {
    "lmp_triton, upsampled": Provider(upsampled("triton"), pooled=True),
    "lmp_triton, upsampled, ratio=1": Provider(upsampled("triton", 1.0)),
    "lmp_triton, eager, upsampled": Provider(upsampled("eager"), pooled=True),
    "lmp_triton, eager, upsampled, ratio=1": Provider(upsampled("eager", 1.0)),
    "F.interpolate + lmp_triton": Provider(lambda workload: large(ours("triton")(workload)), pooled=True),
    "F.interpolate + lmp_triton, eager": Provider(lambda workload: large(ours("eager")(workload)), pooled=True),
    LARGE: Provider(lambda workload: large(F.cross_entropy)),
    f"{LARGE}, compiled": Provider(compiled(lambda workload: large(F.cross_entropy))),
}
"""Of logits smaller than the labels."""
SOLVERS = {
    "lmp_triton": Provider(ours("triton"), pooled=True),
    "lmp_triton, eager": Provider(ours("eager"), pooled=True),
    "LMP by torch.sort": Provider(by_sorting, pooled=True),
    "mpl.pytorch's algorithm": Provider(mpl_pytorch, pooled=True),
    "torch.topk": Provider(largest, pooled=True),
}
"""Of losses; those of PROVIDERS that are named alike are the same."""
BASE = "F.cross_entropy, compiled"
"""What the others are compared with, and F.cross_entropy where that failed."""


def check(inputs: tuple[Tensor, Tensor | None], value: Tensor, workload: Workload | Losses) -> str | None:
    """Why a max-pooled loss and its gradient are wrong, or None: against the float64 oracle."""
    values, target = inputs
    assert values.grad is not None
    if isinstance(workload, Losses):
        expected, worst = _check_losses(values.detach(), values.grad, workload)
        allowed = 2e-5
    elif workload.stride > 1:
        assert target is not None
        expected, worst = _check_upsampled(values.detach(), target, values.grad, workload)
        allowed = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[values.dtype]
    else:
        assert target is not None
        expected, worst = _check_logits(values.detach(), target, values.grad, workload)
        allowed = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[values.dtype]
    if not abs(value.item() - expected) <= 1e-5 * expected:
        return f"wrong: the loss is {value.item()}, the oracle's {expected}"
    if not (worst <= allowed and math.isfinite(worst)):
        return f"wrong: the gradient is off by {worst:.2g} of τ"
    return None


def _check_losses(losses: Tensor, grad: Tensor, workload: Losses) -> tuple[float, float]:
    """The oracle's loss, and the largest error of a weight in units of τ."""
    ell = losses[0].double().cpu().numpy()
    solution = reference.solve(ell, reference.support(ell.size, workload.ratio), workload.p)
    return solution.loss, float(np.abs(grad[0].double().cpu().numpy() - solution.weights).max() / solution.tau)


def _check_logits(x: Tensor, target: Tensor, grad: Tensor, workload: Workload) -> tuple[float, float]:
    """The oracle's loss, and the largest error of the gradient at up to 4096 pixels in units of τ."""
    losses = F.cross_entropy(x.float(), target, reduction="none")
    images = 1 if workload.scope == "batch" else x.shape[0]
    rows, labels = losses.reshape(images, -1), target.reshape(images, -1)
    flat = x.unsqueeze(0).movedim(2, 1) if x.ndim == 2 else x.flatten(2)
    slope = grad.unsqueeze(0).movedim(2, 1) if grad.ndim == 2 else grad.flatten(2)
    expected, worst = 0.0, 0.0
    for i in range(images):
        place = (labels[i] != -100).nonzero().squeeze(1)
        ell = rows[i][place].double().cpu().numpy()
        solution = reference.solve(ell, reference.support(ell.size, workload.ratio), workload.p)
        expected += solution.loss / images
        some = torch.randperm(ell.size)[: 4096 // images + 1]
        weights = torch.as_tensor(solution.weights)[some].to(x.device)
        at = place[some.to(place.device)]
        want = flat[i][:, at].double().softmax(0)
        want -= F.one_hot(labels[i][at], x.shape[1]).T
        want *= weights / images
        error = (slope[i][:, at].double() - want).abs().max().item()
        worst = max(worst, error / (solution.tau / images))
    return expected, worst


def _check_upsampled(x: Tensor, target: Tensor, grad: Tensor, workload: Workload) -> tuple[float, float]:
    """The oracle's loss, and the largest error of the gradient of one image in units of τ·stride², all in float64."""
    images, expected, worst = x.shape[0], 0.0, 0.0
    for i in range(images):
        small = x[i : i + 1].double().requires_grad_()
        losses = large(functools.partial(F.cross_entropy, reduction="none"))(small, target[i : i + 1])
        place = target[i : i + 1] != -100
        ell = losses[place].detach().cpu().numpy()
        solution = reference.solve(ell, reference.support(ell.size, workload.ratio), workload.p)
        expected += solution.loss / images
        if i:
            continue
        weights = torch.zeros_like(losses)
        weights[place] = torch.as_tensor(solution.weights, device=x.device)
        (want,) = torch.autograd.grad(losses, small, weights / images)
        worst = float((grad[i : i + 1] - want).abs().max()) / (solution.tau / images * workload.stride**2)
    return expected, worst
