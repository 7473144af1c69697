"""The gradient is the gradient: gradcheck, finite differences, and the manners of a good autograd function."""

import pytest
import torch
from support import CUDA, labelled
from torch.autograd import gradcheck

import lmp_triton

OPTIONS = [
    {},
    {"p": 1.0, "ratio": 0.37},
    {"p": 1.01},
    {"p": 4.0, "ratio": 0.5, "reduction": "none"},
    {"p": float("inf")},
    {"label_smoothing": 0.2, "weighted": True},
    {"scope": "batch", "reduction": "sum"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(rng, options):
    options = dict(options)
    logits, target = labelled((2, 3, 4), 5, torch.float64)
    if options.pop("weighted", False):
        options["weight"] = torch.rand(5, dtype=torch.float64) + 0.1
    logits.requires_grad_()
    assert gradcheck(
        lambda x: lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend="eager", **options), logits
    )


@pytest.mark.parametrize("p", [1.0, 1.3, 3.0])
def test_gradcheck_of_pool_losses(rng, p):
    losses = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9) < 0.8
    assert gradcheck(lambda x: lmp_triton.pool_losses(x, mask, p=p, ratio=0.4, backend="eager"), losses)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [5, 35])
def test_finite_differences(rng, backend, device, options, classes):
    """Along random directions, with float64 differences of the oracle path; the kernels have no float64."""
    options = dict(options)
    logits, target = labelled((2, 9, 8), classes, device=device)
    weighted = options.pop("weighted", False)
    weight = torch.rand(classes, device=device) + 0.1 if weighted else None
    x = logits.clone().requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, weight=weight, backend=backend, **options)
    loss.sum().backward()
    for _ in range(3):
        direction = torch.randn(logits.shape, dtype=torch.float64, device=device)
        values = [
            lmp_triton.loss_max_pooling(
                logits.double() + h * direction,
                target,
                ignore_index=255,
                weight=weight if weight is None else weight.double(),
                backend="eager",
                **options,
            ).sum()
            for h in (1e-6, -1e-6)
        ]
        difference = (values[0] - values[1]).item() / 2e-6
        assert (x.grad.double() * direction).sum().item() == pytest.approx(difference, rel=1e-3, abs=1e-6)


def test_grad_output_of_any_scale_and_shape(rng, backend, device):
    logits, target = labelled((3, 8, 9), 6, device=device)

    def gradient(grad_output, reduction):
        x = logits.clone().requires_grad_()
        lmp_triton.loss_max_pooling(x, target, ignore_index=255, reduction=reduction, backend=backend).backward(
            grad_output
        )
        return x.grad

    unit = gradient(torch.tensor(1.0, device=device), "mean")
    for scale in (2.0**-20, 65536.0):
        assert torch.equal(gradient(torch.tensor(scale, device=device), "mean"), unit * scale)
    expanded = torch.tensor(3.0, device=device).expand(3)
    torch.testing.assert_close(gradient(expanded, "none"), unit * 9, rtol=1e-6, atol=0)
    strided = torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0], device=device)[::2]
    each = gradient(strided, "none")
    for i in range(3):
        torch.testing.assert_close(each[i], unit[i] * 3 * (i + 1), rtol=1e-6, atol=0)


def test_twice_through_a_retained_graph(rng, backend, device):
    logits, target = labelled((2, 8, 9), 6, device=device)
    x = logits.requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    loss.backward()
    assert torch.equal(x.grad, first)


def test_loss_scaled_in_place(rng, backend, device):
    """loss /= steps is how gradient accumulation is often written."""
    logits, target = labelled((2, 8, 9), 6, device=device)
    for reduction in ("mean", "none"):
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, reduction=reduction, backend=backend)
        loss /= 4
        loss.sum().backward()
        loss = lmp_triton.loss_max_pooling(y, target, ignore_index=255, reduction=reduction, backend=backend)
        (loss / 4).sum().backward()
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("function", ["loss", "pool"])
def test_second_derivative_is_refused(rng, backend, device, function):
    logits, target = labelled((2, 8, 9), 6, device=device)
    x = logits.requires_grad_()
    if function == "loss":
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    else:
        loss = lmp_triton.pool_losses(x.square().sum(1), backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_create_graph_alone_is_fine(rng, backend, device):
    """A penalty on another part of the graph needs create_graph=True; the loss may stand beside it."""
    logits, target = labelled((1, 8, 9), 6, device=device)
    x = logits.requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (expected,) = torch.autograd.grad(lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend), x)
    assert torch.equal(grad.detach(), expected)


def test_logits_changed_in_place_are_noticed(rng, backend, device):
    logits, target = labelled((1, 8, 9), 6, device=device)
    x = logits.requires_grad_()
    y = x * 1
    loss = lmp_triton.loss_max_pooling(y, target, ignore_index=255, backend=backend)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_asked_for(rng, backend, device):
    logits, target = labelled((1, 8, 9), 6, device=device)
    loss = lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend=backend)
    assert not loss.requires_grad
    with torch.no_grad():
        again = lmp_triton.loss_max_pooling(logits.requires_grad_(), target, ignore_index=255, backend=backend)
    assert torch.equal(loss, again)


def test_statistics_carry_no_gradient(rng, backend, device):
    logits, target = labelled((2, 8, 9), 6, device=device)
    x = logits.requires_grad_()
    loss, stats = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend, return_stats=True)
    assert isinstance(stats, lmp_triton.PoolingStats)
    assert loss.requires_grad and not any(field.requires_grad for field in stats)
    assert all(field.shape == (2,) for field in stats)
    loss.backward()


@pytest.mark.skipif(CUDA, reason="looks into the interpreter")
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("p, read", [(1.0, [True, False, False]), (1.3, [True, True, False])])
def test_tiles_without_weight_read_no_logits(rng, monkeypatch, p, read, classes):
    """A tile that is ignored, or for p = 1 below α*, gets zeros; programs go from the last tile to the first."""
    from lmp_triton.kernels import gradient

    logits, target = labelled((1, 1536), classes, ignored=0.0)
    target[:, :512] = 255
    logits[:, :, 512:1024].scatter_(1, target[:, None, 512:1024], 20.0)
    found, original = [], gradient.load_classes

    def recording(tile, first, *rest):
        found.append(bool(tile.inside.handle.data.any()))
        return original(tile, first, *rest)

    monkeypatch.setattr(gradient, "load_classes", recording)
    grads = []
    for backend in ("triton", "eager"):
        x = logits.clone().requires_grad_()
        lmp_triton.loss_max_pooling(x, target, p=p, ignore_index=255, backend=backend).backward()
        grads.append(x.grad)
    chunks = len(found) // 3
    assert found == [tile for tile in read for _ in range(chunks)]
    assert not grads[0][:, :, :512].any() and (p > 1 or not grads[0][:, :, 512:1024].any())
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-8)
