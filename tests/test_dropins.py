"""What takes the place of existing code behaves as that code's users expect, and pools right."""

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import CUDA, labelled, oracle

import lmp_triton
from lmp_triton import settings
from lmp_triton.examples import fallback, registry
from lmp_triton.integrations.dropins import DecodeHeadLoss, MaxPoolingLoss, MaxPoolingPixelSampler

# --- mpl.pytorch's MaxPoolingLoss ---------------------------------------------------------------------------------


def test_signature_of_mpl():
    parameters = inspect.signature(MaxPoolingLoss).parameters
    positional = [(n, p.default) for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [("ratio", 0.3), ("p", 1.7), ("reduce", True)]
    assert "ratio=0.5, p=2, reduce=False" in repr(MaxPoolingLoss(0.5, 2.0, False))


@pytest.mark.parametrize("shape", [(400,), (20, 20), (2, 5, 40), (2, 4, 10, 5)])
def test_all_values_are_one_segment(rng, backend, device, shape):
    loss = (torch.rand(shape).exp() - 1).to(device).requires_grad_()
    expected = oracle(loss.flatten(), 1.7, 0.3)
    reduced = MaxPoolingLoss(backend=backend)(loss)
    (grad,) = torch.autograd.grad(reduced, loss)
    assert reduced.shape == () and reduced.item() == pytest.approx(expected.loss, rel=2e-6)
    weights = torch.from_numpy(expected.weights).float().view(shape).to(device)
    torch.testing.assert_close(grad, weights, rtol=0, atol=1e-5 * expected.tau)

    parts = MaxPoolingLoss(reduce=False, backend=backend)(loss)
    torch.testing.assert_close(parts, weights * loss, rtol=1e-5, atol=1e-5 * expected.tau)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), loss)[0], grad, rtol=0, atol=1e-6 * expected.tau)


def test_not_contiguous(rng, backend, device):
    """mpl.pytorch: view() fails on these."""
    loss = torch.rand(20, 30, device=device)
    for reduce in (True, False):
        criterion = MaxPoolingLoss(reduce=reduce, backend=backend)
        torch.testing.assert_close(criterion(loss.t()).sum(), criterion(loss).sum(), rtol=2e-6, atol=0)
        assert criterion(loss.t()).shape == (() if reduce else (30, 20))


def test_each_image_on_its_own(rng, backend, device):
    loss = torch.rand(3, 50, device=device)
    expected = torch.stack([MaxPoolingLoss(backend=backend)(row) for row in loss])
    mean = MaxPoolingLoss(scope="image", backend=backend)(loss)
    torch.testing.assert_close(mean, expected.mean(), rtol=2e-6, atol=0)
    parts = MaxPoolingLoss(reduce=False, scope="image", backend=backend)(loss)
    torch.testing.assert_close(parts.sum(1), expected, rtol=2e-6, atol=0)


def test_mask(rng, backend, device):
    """Ignored pixels are left out, whatever their loss."""
    loss, mask = torch.rand(100, device=device), torch.arange(100, device=device) < 60
    garbage = loss.masked_fill(~mask, torch.nan)
    garbage.requires_grad_()
    for reduce in (True, False):
        criterion = MaxPoolingLoss(reduce=reduce, backend=backend)
        got = criterion(garbage, mask).sum()
        torch.testing.assert_close(got, criterion(loss[mask]).sum(), rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(got, garbage)
        assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].sum() > 0.5


def test_bad_options():
    for options in ({"ratio": 0.0}, {"p": 0.9}, {"scope": "x"}):
        with pytest.raises(ValueError):
            MaxPoolingLoss(**options)


# --- pixel samplers -----------------------------------------------------------------------------------------------


class Context:
    """What a sampler gets from a decode head."""

    ignore_index = 255

    def __init__(self, *loss_decode):
        self.loss_decode = loss_decode[0] if len(loss_decode) == 1 else torch.nn.ModuleList(loss_decode)


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_mean_of_weighted_losses_is_the_pooled_loss(rng, backend, device, scope, avg_non_ignore):
    logits, target = labelled((3, 6, 7), 5, device=device, ignored=0.3)
    target[2] = 255
    sampler = MaxPoolingPixelSampler(ratio=0.25, p=1.3, avg_non_ignore=avg_non_ignore, scope=scope, backend=backend)
    weight = sampler.sample(logits.requires_grad_(), target.unsqueeze(1))
    assert weight.shape == target.shape and not weight.requires_grad and not weight[target == 255].any()
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    averaged = (target != 255).sum() if avg_non_ignore else target.numel()
    expected = lmp_triton.loss_max_pooling(logits, target, ignore_index=255, scope=scope, backend=backend)
    torch.testing.assert_close((weight * losses).sum() / averaged, expected, rtol=2e-6, atol=0)

    same = sampler.sample(losses=losses, valid_mask=target != 255)
    torch.testing.assert_close(same, weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(sampler.sample(losses=losses, seg_label=target[:, None]), same)


def test_losses_of_the_decode_head(rng):
    """As OHEMPixelSampler ranks by: those of the head, summed, its class weights and all."""
    logits, target = labelled((2, 6, 7), 3)
    one, two = DecodeHeadLoss(class_weight=[1.0, 2.0, 0.5]), DecodeHeadLoss(loss_weight=0.4)
    losses = [m(logits, target, reduction_override="none", ignore_index=255) for m in (one, two)]
    mask = target != 255
    for context, summed in ((Context(one), losses[0]), (Context(one, two), sum(losses))):
        got = MaxPoolingPixelSampler(context).sample(logits, target[:, None])
        assert torch.equal(got, MaxPoolingPixelSampler(context).sample(losses=summed, valid_mask=mask))
    assert not torch.equal(got, MaxPoolingPixelSampler().sample(logits, target[:, None]))


def test_nothing_valid(backend, device):
    logits, target = torch.randn(2, 3, 4, 5, device=device), torch.full((2, 1, 4, 5), 255, device=device)
    assert not MaxPoolingPixelSampler(backend=backend).sample(logits, target).any()


def test_sampler_needs_losses_and_a_mask():
    logits, losses = torch.zeros(1, 3, 4), torch.zeros(1, 4)
    for arguments, says in (
        ({"seg_logit": logits}, "needs losses, or seg_logit and seg_label"),
        ({"losses": losses}, "needs valid_mask or seg_label"),
    ):
        with pytest.raises(ValueError, match=says):
            MaxPoolingPixelSampler().sample(**arguments)
    with pytest.raises(ValueError, match="mask must have the shape of losses"):
        MaxPoolingPixelSampler().sample(losses=losses, seg_label=torch.zeros(1, 1, 5, dtype=torch.long))


# --- a loss of a decode head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_a_decode_head(rng, backend, device, reduction):
    logits, target = labelled((2, 6, 7), 3, device=device)
    module = DecodeHeadLoss(class_weight=[1.0, 2.0, 0.5], loss_weight=0.4, backend=backend).to(device)
    options = {"ignore_index": 255, "reduction": reduction, "backend": backend}
    expected = 0.4 * lmp_triton.loss_max_pooling(logits, target, weight=module.class_weight, **options)
    got = module(logits, target, ignore_index=255, reduction_override=reduction)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    ones = torch.ones(target.shape, device=device)
    got = module(logits, target, ones, None, reduction, 255)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
    twice = module(logits, target, 2 * ones, None, reduction, 255)
    torch.testing.assert_close(twice, 2 * expected, rtol=2e-6, atol=0)


def test_options_of_a_decode_head(rng):
    logits, target = labelled((2, 6, 7), 3)
    module = DecodeHeadLoss(loss_name="loss_hard", loss_weight=2.0)
    assert module.loss_name == "loss_hard" and DecodeHeadLoss().loss_name == "loss_lmp" and not module.state_dict()
    losses = module(logits, target, reduction_override="none", ignore_index=255)
    assert torch.equal(losses, 2 * F.cross_entropy(logits, target, ignore_index=255, reduction="none"))
    with pytest.raises(ValueError, match="avg_factor must be None, got 7"):
        module(logits, target, avg_factor=7)
    with pytest.raises(ValueError, match="reduction must be one of"):
        module(logits, target, reduction_override="average", ignore_index=255)
    with pytest.raises(ValueError, match="weight must be finite and not negative"):
        DecodeHeadLoss(class_weight=[1.0, -1.0])


class MeanCrossEntropy(DecodeHeadLoss):
    """The plain loss of a head that gets weights from a sampler: the mean over all pixels."""

    def forward(self, cls_score, label, weight=None, avg_factor=None, reduction_override=None, ignore_index=-100):
        losses = F.cross_entropy(cls_score, label, ignore_index=ignore_index, reduction="none")
        return losses if reduction_override == "none" else (losses * weight).mean()


def test_sampler_from_a_registry(rng):
    """A head with a sampler and a plain cross-entropy: loss max-pooling over the batch."""
    known = registry.registry()
    known.register_module("CrossEntropy", MeanCrossEntropy)
    sampler = {"type": "MaxPoolingPixelSampler", "ratio": 0.25, "p": 1.3}
    head = registry.DecodeHead(known, 4, 3, [{"type": "CrossEntropy"}], sampler)
    features, target = torch.randn(2, 4, 6, 7), labelled((2, 6, 7), 3)[1]
    (loss,) = head.loss(features, target.unsqueeze(1)).values()
    expected = lmp_triton.loss_max_pooling(head.conv_seg(features), target, ignore_index=255, scope="batch")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)


# --- a module with code of its own --------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="shows what the interpreter serves")
def test_obstacle(monkeypatch):
    pytest.importorskip("triton")
    losses, logits = torch.rand(2, 4, 5), torch.randn(2, 3, 4, 5)
    assert lmp_triton.obstacle(losses=losses) is None and lmp_triton.obstacle(logits=logits) is None
    assert lmp_triton.obstacle(losses=losses[0, 0], scope="batch") is None
    assert "not torch.float64" in lmp_triton.obstacle(losses=losses.double())
    assert "up to 1024 classes" in lmp_triton.obstacle(logits=torch.zeros(1, 1025, 2, 2))
    assert "up to 1024 classes" in lmp_triton.obstacle(logits=torch.zeros(3, 1025), scope="batch")
    assert "losses a segment" in lmp_triton.obstacle(losses=torch.zeros(1).expand(4, 2**30), scope="batch")
    assert lmp_triton.obstacle(losses=torch.zeros(1).expand(2, 2**16, 2**8).mT) is None
    for arguments in ({}, {"losses": losses, "logits": logits}):
        with pytest.raises(ValueError, match="either losses or logits"):
            lmp_triton.obstacle(**arguments)
    with pytest.raises(ValueError, match="losses must have shape"):
        lmp_triton.obstacle(losses=losses[0, 0])
    monkeypatch.setattr(settings, "interpreting", lambda: False)
    assert "TRITON_INTERPRET=1 was not set" in lmp_triton.obstacle(losses=losses)
    monkeypatch.setattr(settings, "has_triton", lambda: False)
    assert "Triton is not installed" in lmp_triton.obstacle(losses=losses)


@pytest.mark.parametrize("p", [1.05, 1.3, 4.0])
@pytest.mark.parametrize("ratio", [0.01, 0.25, 1.0])
def test_code_of_the_fallback_example(rng, p, ratio):
    """It is a peer to be copied from: right on its own, and the same by the kernels."""
    losses = (torch.rand(3, 200).exp() - 1).requires_grad_()
    module = fallback.PlainLossMaxPooling(p, ratio)
    weights, stats = lmp_triton.optimal_weights(losses, p=p, ratio=ratio)
    plain = module.plain_weights(losses.detach())
    torch.testing.assert_close(plain, weights, rtol=0, atol=1e-5 * stats.tau.max().item())
    if settings.has_triton():
        assert module.why_plain(losses) is None
    torch.testing.assert_close(module(losses), (weights * losses).sum(1).mean(), rtol=2e-6, atol=0)


def test_without_lmp_triton(tmp_path):
    """The module of the example works where lmp_triton is absent."""
    path = Path(fallback.__file__)
    code = f"import sys, runpy; sys.modules['lmp_triton'] = None; runpy.run_path({str(path)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "by plain PyTorch: lmp_triton is not installed" in result.stdout


def test_fallback_example(capsys):
    runpy.run_path(fallback.__file__, run_name="__main__")
    assert "by lmp_triton" in capsys.readouterr().out or not settings.has_triton()
