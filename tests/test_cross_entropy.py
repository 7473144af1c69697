"""ratio = 1 is the mean of F.cross_entropy(reduction="none") over the valid pixels, value and gradient, in all options.

Everything else is compared with the float64 eager path on the same logits.
"""

import pytest
import torch
import torch.nn.functional as F
from support import labelled

import lmp_triton

SHAPES = [
    (2, 17, 23),  # odd: no vector loads
    (3, 10, 18),  # divisible by 4 only, as 550·550
    (1, 32, 32),  # divisible by 16
    (4, 5),  # one spatial dimension
    (2, 3, 4, 5),  # three
    (2, 1, 1),  # one pixel an image
]


def mean_of_segments(losses, valid, scope):
    """The mean over segments of the mean over the valid pixels of each."""
    if scope == "batch":
        losses, valid = losses.reshape(1, -1), valid.reshape(1, -1)
    losses, valid = losses.flatten(1), valid.flatten(1)
    counts = valid.sum(1)
    means = torch.where(valid, losses, 0).sum(1) / counts.clamp_min(1)
    return means.sum() / (counts > 0).sum().clamp_min(1)


ROUNDING = 2.0**-21
"""What float32 leaves of logits of a few units, absolute: a softmax near 1, less 1, has no relative accuracy."""


def compare(a, b, rtol, atol=0.0):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 19, 47])  # one chunk; one chunk; chunks with a rest
def test_ratio_1(rng, backend, device, classes, weighted, smoothing, scope):
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    print(shape)
    p = float(rng.choice([1.0, 1.3, 4.0]))
    logits, target = labelled(shape, classes, device=device, scale=3.0)
    weight = torch.rand(classes, device=device) * 2 if weighted else None
    if weighted:
        weight[0] = 0.0
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": smoothing}
    a = logits.clone().requires_grad_()
    loss = lmp_triton.loss_max_pooling(a, target, p=p, ratio=1.0, scope=scope, backend=backend, **options)
    b = logits.double().requires_grad_()
    options["weight"] = weight if weight is None else weight.double()
    losses = F.cross_entropy(b, target.long(), reduction="none", **options)
    losses.retain_grad()
    expected = mean_of_segments(losses, target != 255, scope)
    compare(loss, expected, 2e-6, 4 * ROUNDING)
    loss.backward()
    expected.backward()
    compare(a.grad, b.grad, 1e-5, 2 * ROUNDING * losses.grad.max().item())  # 2: the largest class weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p, ratio", [(1.05, 0.3), (1.3, 0.25), (float("inf"), 0.5)])  # at p = 1 w* jumps with rounding
def test_against_float64(rng, backend, device, shape, p, ratio):
    classes = int(rng.choice([2, 3, 5, 21, 33, 40]))
    print(classes)
    logits, target = labelled(shape, classes, device=device, scale=2.0)
    reductions = []
    for dtype, which in ((torch.float32, backend), (torch.float64, "eager")):
        x = logits.detach().clone().to(dtype).requires_grad_()
        for reduction in ("none", "sum", "mean"):
            loss = lmp_triton.loss_max_pooling(
                x, target, p=p, ratio=ratio, ignore_index=255, reduction=reduction, backend=which
            )
            (loss * torch.arange(1, loss.numel() + 1, device=device).view_as(loss)).sum().backward()
            reductions.append((loss.detach(), x.grad.clone()))
            x.grad = None
    stats = lmp_triton.loss_max_pooling(
        logits, target, p=p, ratio=ratio, ignore_index=255, backend="eager", return_stats=True
    )[1]
    step = stats.tau.max().item() * shape[0]  # the largest factor of the upstream gradient is the number of images
    for (loss, grad), (expected, expected_grad) in zip(reductions[:3], reductions[3:], strict=True):
        compare(loss, expected, 3e-6, 4 * ROUNDING * shape[0])
        compare(grad, expected_grad, 1e-4, 4 * ROUNDING * step)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [150, 1024])
def test_many_classes(rng, backend, device, classes):
    logits, target = labelled((2, 6, 10), classes, device=device, scale=2.0)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target.clamp_max(classes - 1), ignore_index=3, backend=backend)
    expected = lmp_triton.loss_max_pooling(y, target.clamp_max(classes - 1), ignore_index=3, backend="eager")
    loss.backward()
    expected.backward()
    compare(loss, expected, 3e-6)
    compare(x.grad, y.grad, 1e-4, 1e-6 * y.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_types_of_target(rng, backend, device, dtype):
    """torch.uint8 == -100 is True for 156: labels are widened before any comparison."""
    logits, target = labelled((2, 9, 11), 200 if dtype == torch.uint8 else 20, device=device, ignore_index=-100)
    if dtype == torch.uint8:
        target[target == -100] = 156
    loss = lmp_triton.loss_max_pooling(logits, target.to(dtype), backend=backend)
    compare(loss, lmp_triton.loss_max_pooling(logits.double(), target, backend="eager"), 2e-6)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_layouts(rng, backend, device, layout):
    """Any strides; the logits are left alone and their gradient keeps their layout."""
    logits, target = labelled((2, 12, 16), 7, device=device)
    if layout == "channels_last":
        view = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        big = torch.full((2, 9, 14, 20), torch.nan, device=device)
        view = big[:, 1:8, 1:13, 2:18].copy_(logits)
    elif layout == "transposed":
        view = logits.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        view = logits = logits[:1].expand(2, -1, -1, -1)
    view = view.detach().requires_grad_()
    before = view.detach().clone()
    loss = lmp_triton.loss_max_pooling(view, target, ignore_index=255, backend=backend)
    loss.backward()
    reference = logits.double().contiguous().requires_grad_()
    expected = lmp_triton.loss_max_pooling(reference, target, ignore_index=255, backend="eager")
    expected.backward()
    compare(loss, expected, 2e-6)
    compare(view.grad, reference.grad, 1e-5, 1e-6 * reference.grad.abs().max().item())
    assert torch.equal(view.detach(), before)
    if layout in ("channels_last", "transposed"):
        assert view.grad.stride() == view.stride()


def test_strided_target(rng, backend, device):
    logits, target = labelled((3, 8, 10), 5, device=device)
    strided = torch.stack([target, target + 1000], -1)[..., 0]
    assert torch.equal(
        lmp_triton.loss_max_pooling(logits, strided, ignore_index=255, backend=backend),
        lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend=backend),
    )


def test_classification(rng, backend, device):
    """(N, C) logits, one segment."""
    logits, target = labelled((300,), 11, device=device)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, scope="batch", ignore_index=255, backend=backend)
    expected = lmp_triton.loss_max_pooling(y, target, scope="batch", ignore_index=255, backend="eager")
    loss.backward()
    expected.backward()
    compare(loss, expected, 2e-6)
    compare(x.grad, y.grad, 1e-5, 1e-6 * y.grad.abs().max().item())
    assert x.grad.shape == (300, 11)


@pytest.mark.parametrize("classes", [7, 40])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_translation(rng, backend, device, classes, shift):
    """The softmax does not change when all logits of a pixel move, and neither may what is computed of it."""
    logits, target = labelled((2, 8, 8), classes, device=device)
    logits = (logits * 64).round() / 64  # so that adding the shift is exact
    grads = []
    for x in (logits, logits + shift):
        x = x.requires_grad_()
        lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend).backward()
        grads.append(x.grad)
    compare(grads[1], grads[0], 1e-5, 1e-6 * grads[0].abs().max().item())


@pytest.mark.parametrize("classes", [7, 40])
def test_label_far_below_the_rest(rng, backend, device, classes):
    """A loss of 10⁴, rounded to float32, is too coarse to get the softmax back from it."""
    logits, target = labelled((1, 8, 8), classes, ignored=0.0, device=device)
    logits = logits.scatter_(1, target.unsqueeze(1), -1e4)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    lmp_triton.loss_max_pooling(x, target, ratio=1.0, backend=backend).backward()
    lmp_triton.loss_max_pooling(y, target, ratio=1.0, backend="eager").backward()
    compare(x.grad, y.grad, 2e-6, 1e-9)


@pytest.mark.parametrize("classes", [7, 40])
def test_masked_classes(rng, backend, device, classes):
    """−inf logits of other classes are legal: their gradient is 0."""
    logits, target = labelled((1, 8, 8), classes, device=device)
    logits[:, 1] = -torch.inf
    target[target == 1] = 0
    x = logits.requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[:, 1].any()
