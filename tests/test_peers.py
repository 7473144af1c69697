"""Faults of other implementations of this and of related losses, each kept out by a test (../shared/anchors.md)."""

import pytest
import torch
from support import labelled, oracle

import lmp_triton


def test_zero_losses_do_not_zero_all_weights(backend, device):
    """mpl.pytorch: prefix sums divided by a zero loss turn every weight into 0 or NaN."""
    losses = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], device=device)
    weights, _ = lmp_triton.optimal_weights(losses, p=1.7, ratio=0.3, scope="batch", backend=backend)
    assert weights[3:].min() > 0
    assert lmp_triton.pool_losses(losses, p=1.7, ratio=0.3, scope="batch", backend=backend) >= losses.mean()


def test_no_weight_above_tau(rng, backend, device):
    """mpl.pytorch, OpenVINO/OTX MaxPoolingPixelSampler: weights beyond the bound of equation 5."""
    losses = torch.rand(10, 50, device=device).exp() - 1
    for p in (1.0, 1.05, 1.3, 1.7, 5.0):
        weights, stats = lmp_triton.optimal_weights(losses, p=p, ratio=0.1, backend=backend)
        assert (weights <= stats.tau[:, None]).all()
        if p > 1:
            q = p / (p - 1)
            norm = weights.double().pow(p).sum(1).pow(1 / p)
            assert (norm <= 50 ** (-1 / q) * (1 + 1e-6)).all()


def test_n_counts_zero_losses(backend, device):
    """OTX: n shrunk to the losses that are not zero, which changes m, γ and τ."""
    losses = torch.tensor([0.0] * 90 + [1.0] * 10, device=device)
    _, stats = lmp_triton.optimal_weights(losses, p=1.3, ratio=0.25, scope="batch", backend=backend)
    assert stats.valid == 100
    assert stats.tau.item() == pytest.approx(oracle(losses, 1.3, 0.25).tau, rel=1e-6)


def test_ignored_pixels_are_not_counted(rng, backend, device):
    """detectron2 DeepLabCE, nnU-Net TopK: k is a share of all pixels, ignored ones included."""
    losses = torch.rand(100, device=device)
    mask = torch.arange(100, device=device) < 20
    pooled, stats = lmp_triton.pool_losses(
        losses, mask, p=1.0, ratio=0.5, scope="batch", backend=backend, return_stats=True
    )
    assert stats.valid == 20 and stats.saturated == 10
    assert pooled.item() == pytest.approx(losses[:20].topk(10).values.mean().item(), rel=1e-6)


def test_confident_batch(backend, device):
    """mmseg, HRNet, BiSeNet OHEM: NaN or IndexError where no pixel is below the threshold."""
    target = torch.randint(5, (2, 8, 8), device=device)
    logits = torch.full((2, 5, 8, 8), -50.0, device=device).scatter_(1, target.unsqueeze(1), 50.0).requires_grad_()
    loss = lmp_triton.loss_max_pooling(logits, target, backend=backend)
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_all_ignored_batch(backend, device):
    """The same OHEMs: NaN or IndexError where every pixel is ignored."""
    logits = torch.randn(2, 5, 8, 8, device=device, requires_grad=True)
    loss = lmp_triton.loss_max_pooling(
        logits, torch.full((2, 8, 8), 255, device=device), ignore_index=255, backend=backend
    )
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_callers_tensors_are_left_alone(rng, backend, device):
    """Fused cross-entropies overwrite the logits with their gradient by default."""
    logits, target = labelled((2, 8, 9), 6, device=device)
    copies = logits.clone(), target.clone()
    lmp_triton.loss_max_pooling(logits.requires_grad_(), target, ignore_index=255, backend=backend).backward()
    assert torch.equal(logits.detach(), copies[0]) and torch.equal(target, copies[1])


def test_all_logits_below_zero(rng, backend, device):
    """A running maximum that starts at 0 underflows here."""
    logits, target = labelled((1, 8, 8), 37, device=device, ignored=0.0)
    shifted = lmp_triton.loss_max_pooling(logits - 1000, target, backend=backend)
    assert shifted.item() == pytest.approx(
        lmp_triton.loss_max_pooling(logits, target, backend=backend).item(), rel=1e-3
    )


def test_one_class_predicted_without_rounding(backend, device):
    """p − 1 of the true class, taken in bf16, is 0 for p within 2^-9 of 1: the gradient would vanish."""
    logits = torch.zeros(1, 2, 4, dtype=torch.bfloat16, device=device)
    logits[:, 0] = 8.0
    x = logits.requires_grad_()
    target = torch.zeros(1, 4, dtype=torch.long, device=device)
    lmp_triton.loss_max_pooling(x, target, ratio=1.0, reduction="sum", backend=backend).backward()
    assert x.grad[0, 0, 0].item() == pytest.approx(-(2.718281828**-8) / 4, rel=1e-2)
