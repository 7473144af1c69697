"""The criteria: equal to their definitions, blind to ignored pixels, never NaN, at coarser logits as at full ones."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lmp_triton
from lmp_triton.segmentation.baselines import CRITERIA, build_criterion, median_frequency_weights

pytestmark = pytest.mark.skipif(
    find_spec("segmentation_models_pytorch") is None, reason="segmentation_models_pytorch, of the extra segmentation"
)

COUNTS = np.array([[10, 30, 0, 0], [40, 0, 8, 0]])
NEEDED = {"inverse-median-frequency": {"counts": COUNTS}}
NAMES = list(CRITERIA)


def build(name, **options):
    return build_criterion(name, **NEEDED.get(name, {}), **options)


def batch(ignored=0.2, scale=2.0, dtype=torch.float32):
    logits = (scale * torch.randn(2, 4, 12, 15)).to(dtype).requires_grad_()
    target = torch.randint(0, 4, (2, 12, 15))
    return logits, target.masked_fill(torch.rand(2, 12, 15) < ignored, 255)


def gradient(criterion, logits, target):
    loss = criterion(logits, target)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_scalar_with_a_gradient_that_learning_can_follow(name):
    logits, target = batch()
    criterion = build(name)
    loss, grad = gradient(criterion, logits, target)
    assert loss.shape == () and loss > 0 and grad.isfinite().all() and grad.abs().sum() > 0
    stepped = logits.detach() - 0.1 * grad / grad.norm()
    assert F.cross_entropy(stepped, target, ignore_index=255) < F.cross_entropy(logits, target, ignore_index=255)
    same, statistics = criterion(logits, target, return_stats=True)
    assert torch.equal(same.detach(), loss)
    assert all(value.shape == () and not value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ignored", [255, -100])
def test_ignored_pixels_take_no_part(name, ignored):
    logits, target = batch(0.3)
    target = target.masked_fill(target == 255, ignored)
    criterion = build(name, ignore_index=ignored)
    loss, grad = gradient(criterion, logits, target)
    where = (target == ignored)[:, None].expand_as(logits)
    assert (grad[where] == 0).all()
    other = logits.detach().clone()
    other[where] = 50 * torch.randn(int(where.sum()))
    torch.testing.assert_close(criterion(other, target), loss)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_valid_pixel_loss_and_gradient_are_0(name):
    logits, target = batch()
    loss, grad = gradient(build(name), logits, torch.full_like(target, 255))
    assert loss == 0 and (grad == 0).all()
    loss, statistics = build(name)(logits, torch.full_like(target, 255), return_stats=True)
    assert not any(value.isnan() for value in statistics.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sure_network_gives_no_nan(name, size, right, dtype):
    _, target = batch()
    sure = F.one_hot((target.clamp(max=3) + (0 if right else 1)) % 4, 4).permute(0, 3, 1, 2)
    logits = (size * (2 * sure - 1)).to(dtype).requires_grad_()
    loss, grad = gradient(build(name), logits, target)
    assert loss.isfinite() and grad.isfinite().all() and grad.dtype == dtype
    assert loss < 1e-3 if right else loss > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_coarse_logits_are_upsampled(name):
    coarse, (_, target) = torch.randn(2, 4, 3, 4, requires_grad=True), batch()
    full = F.interpolate(coarse, size=(12, 15), mode="bilinear", align_corners=False)
    criterion = build(name)
    loss, grad = gradient(criterion, coarse, target)
    torch.testing.assert_close(loss, criterion(full, target).detach())
    expected = torch.autograd.grad(criterion(full, target), coarse)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pooling", "cross-entropy", "inverse-median-frequency", "top-k"])
def test_the_upsampling_goes_through_the_fused_loss(name, monkeypatch):
    coarse, (_, target) = torch.randn(2, 4, 3, 4), batch()
    monkeypatch.setattr(F, "interpolate", lambda *_, **__: pytest.fail("logits at full resolution were made"))
    assert build(name)(coarse, target) > 0


def test_cross_entropy_is_the_mean_over_the_valid_pixels():
    logits, target = batch()
    torch.testing.assert_close(
        build("cross-entropy")(logits, target), F.cross_entropy(logits, target, ignore_index=255)
    )


def test_inverse_median_frequency_by_hand():
    # frequencies 50/88, 30/40, 8/48; their median is 50/88; class 3 is in no image
    weights = torch.tensor([1.0, 50 / 88 / 0.75, 50 / 88 * 6, 1.0])
    torch.testing.assert_close(median_frequency_weights(COUNTS), weights)
    logits, target = batch()
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    expected = (losses * weights[target.clamp(max=3)]).sum() / (target != 255).sum()
    torch.testing.assert_close(build("inverse-median-frequency")(logits, target), expected)
    with pytest.raises(ValueError, match="needs counts"):
        build_criterion("inverse-median-frequency")


def test_top_k_is_the_mean_of_the_hardest_of_each_image():
    logits, target = batch(0)
    losses = F.cross_entropy(logits, target, reduction="none").flatten(1)
    expected = losses.topk(36).values.mean()  # 20 % of 12·15
    torch.testing.assert_close(build("top-k", ratio=0.2)(logits, target), expected)


def test_threshold_keeps_the_pixels_whose_class_is_not_probable():
    logits, target = batch()
    losses = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    valid = target != 255
    for probability in (0.9, 0.3):
        kept = valid & (losses > -np.log(probability))
        criterion = build("threshold", probability=probability, least=1e-3)
        loss, statistics = criterion(logits, target, return_stats=True)
        torch.testing.assert_close(loss, losses[kept].mean())
        assert float(statistics["kept"]) == pytest.approx(int(kept.sum()) / int(valid.sum()))
    least = build("threshold", probability=1e-9, least=0.1)  # 36 of the 360 pixels
    torch.testing.assert_close(least(logits, target), losses[valid].topk(36).values.mean())


def test_pooling_is_the_loss_and_says_alpha_and_the_saturated_share():
    logits, target = batch()
    options = {"p": 1.7, "ratio": 0.3, "ignore_index": 255}
    loss, statistics = build_criterion("pooling", **options)(logits, target, return_stats=True)
    expected, stats = lmp_triton.loss_max_pooling(logits, target, return_stats=True, **options)
    assert torch.equal(loss, expected)
    assert statistics["alpha"] == stats.alpha.max()
    assert statistics["saturated"] == stats.saturated.sum() / stats.valid.sum()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="name must be one of"):
        build_criterion("hinge")
    with pytest.raises(ValueError, match="ratio must be"):
        build_criterion("top-k", ratio=0)
    with pytest.raises(ValueError, match="probability must be"):
        build_criterion("threshold", probability=0)
    with pytest.raises(ValueError, match="gamma must be"):
        build_criterion("focal", gamma=0.5)
