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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lmp_triton
from lmp_triton import dispatch

from .workloads import Workload

Loss = Callable[[Tensor, Tensor], Tensor]
P, RATIO = 1.3, 0.25


class Unavailable(Exception):
    """A provider can't run here; the message says why."""


class Provider(NamedTuple):
    """A way to a loss."""

    make: Callable[[Workload], Loss]
    pooled: bool = False
    """Computes the max-pooled loss: value and gradient are compared with the oracle."""


@contextlib.contextmanager
def asking(cooperative: str) -> Iterator[None]:
    """`dispatch.COOPERATIVE_VARIABLE` for a while."""
    before = os.environ.get(dispatch.COOPERATIVE_VARIABLE, "")
    os.environ[dispatch.COOPERATIVE_VARIABLE] = cooperative
    try:
        yield
    finally:
        os.environ[dispatch.COOPERATIVE_VARIABLE] = before


def ours(backend: str, solver: str = "auto", cooperative: str = "") -> Callable[[Workload], Loss]:
    """This project: one backend, solver and way to launch."""

    def make(workload: Workload) -> Loss:
        if backend == "triton" and not torch.cuda.is_available():
            raise Unavailable("the kernels need a GPU")
        options = {"p": P, "ratio": RATIO, "scope": workload.scope, "backend": backend, "solver": solver}
        loss = functools.partial(lmp_triton.loss_max_pooling, **options)  # type: ignore[arg-type]
        if not cooperative:
            return loss

        def asked(logits: Tensor, target: Tensor) -> Tensor:
            with asking(cooperative):
                return loss(logits, target)

        return asked

    return make


def compiled(make: Callable[[Workload], Loss]) -> Callable[[Workload], Loss]:
    """The same under torch.compile."""
    return lambda workload: torch.compile(make(workload), fullgraph=True, dynamic=False)


def cross_entropy(workload: Workload) -> Loss:
    """The mean over the pixels that count."""
    return F.cross_entropy


def by_sorting(workload: Workload) -> Loss:
    """The same loss in eager PyTorch, all losses sorted, prefix sums in float64: as it is usually written."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        valid = target != -100
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        if workload.scope == "batch":
            losses, valid = losses.view(1, -1), valid.view(1, -1)
        losses, valid = losses.flatten(1), valid.flatten(1)
        with torch.no_grad():
            q, total = P / (P - 1), losses.shape[1]
            n = valid.sum(1, keepdim=True).double()
            m = (RATIO * n).clamp_min(1)
            ascending = torch.where(valid, losses, 0.0).double().sort(1).values
            largest = ascending[:, -1:].clamp_min(1e-300)
            powers = (ascending / largest).pow(q)
            sums = powers.cumsum(1)
            c = m - total + torch.arange(1, total + 1, device=losses.device)
            first = ((c * powers - sums <= 0) | (powers == 0)).sum(1, keepdim=True)
            alpha = largest * (sums.gather(1, (first - 1).clamp_min(0)) / (m - total + first)).pow(1 / q)
            tau = n.pow(-1 / q) * m.pow(-1 / P)
            weights = torch.where(valid, tau * (losses / alpha).clamp_max(1).pow(q - 1), 0.0).float()
        return (weights * losses).sum(1).mean()

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
BASE = "F.cross_entropy, compiled"
"""What the others are compared with, and F.cross_entropy where that failed."""


def check(logits: Tensor, target: Tensor, value: Tensor, grad: Tensor, workload: Workload) -> str | None:
    """Why a max-pooled loss and its gradient are wrong, or None: against the float64 oracle, at up to 4096 pixels."""
    from lmp_triton import reference

    x = logits.detach()
    losses = F.cross_entropy(x.float(), target, reduction="none")
    images = 1 if workload.scope == "batch" else x.shape[0]
    rows, labels = losses.reshape(images, -1), target.reshape(images, -1)
    flat = x.unsqueeze(0).movedim(2, 1) if x.ndim == 2 else x.flatten(2)
    slope = grad.unsqueeze(0).movedim(2, 1) if grad.ndim == 2 else grad.flatten(2)
    expected, worst = 0.0, 0.0
    for i in range(images):
        place = (labels[i] != -100).nonzero().squeeze(1)
        ell = rows[i][place].double().cpu().numpy()
        solution = reference.solve(ell, reference.support(ell.size, RATIO), P)
        expected += solution.loss / images
        some = torch.randperm(ell.size)[: 4096 // images + 1]
        weights = torch.as_tensor(solution.weights)[some].to(x.device)
        at = place[some.to(place.device)]
        want = flat[i][:, at].double().softmax(0)
        want -= F.one_hot(labels[i][at], x.shape[1]).T
        want *= weights / images
        error = (slope[i][:, at].double() - want).abs().max().item()
        worst = max(worst, error / (solution.tau / images))
    if not abs(value.item() - expected) <= 1e-5 * expected:
        return f"wrong: the loss is {value.item()}, the oracle's {expected}"
    allowed = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[logits.dtype]
    if not (worst <= allowed and math.isfinite(worst)):
        return f"wrong: the gradient is off by {worst:.2g} of τ"
    return None
