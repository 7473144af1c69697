"""Automatic mixed precision: autocast changes nothing but the logits, and a loss scale of any size gets through."""

import pytest
import torch
from support import labelled
from torch.utils._python_dispatch import TorchDispatchMode

import lmp_triton

LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(rng, backend, device, dtype, backward_inside):
    """The head computes in the low precision, the loss in float32: the same bits as from the same logits without."""
    features, target = labelled((2, 8, 9), 5, device=device)
    conv = torch.nn.Conv2d(5, 5, 1).to(device)
    criterion = lmp_triton.LossMaxPooling(
        ignore_index=255, weight=torch.rand(5), label_smoothing=0.1, backend=backend
    ).to(device)
    with torch.autocast(device.type, dtype):
        logits = conv(features)
        logits.retain_grad()
        loss = criterion(logits, target)
        pooled = lmp_triton.pool_losses(features.square().sum(1), backend=backend)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert logits.dtype == dtype == logits.grad.dtype and loss.dtype == torch.float32 == conv.weight.grad.dtype
    x = logits.detach().requires_grad_()
    expected = criterion(x, target)
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(logits.grad, x.grad)
    assert torch.equal(pooled, lmp_triton.pool_losses(features.square().sum(1), backend=backend))


@pytest.mark.parametrize("dtype", LOW)
def test_grad_scaler(rng, backend, device, dtype):
    """A step as in the documentation of torch.amp, near the one in float32; one that overflows is skipped."""
    features, target = labelled((2, 24, 25), 19, device=device, ignored=0.0)
    conv = torch.nn.Conv2d(19, 19, 1).to(device)
    loss = lmp_triton.loss_max_pooling(conv(features), target, backend=backend)
    expected = torch.autograd.grad(loss, conv.weight)[0]
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.1)
    before = conv.weight.detach().clone()

    def step(scale_of_loss):
        optimiser.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = lmp_triton.loss_max_pooling(conv(features), target, backend=backend) * scale_of_loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()

    step(1.0)
    assert (conv.weight.grad - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(conv.weight.detach(), before - 0.1 * conv.weight.grad)
    assert scaler.get_scale() == 65536.0
    after = conv.weight.detach().clone()
    step(torch.finfo(torch.float32).max)
    assert torch.equal(conv.weight, after) and scaler.get_scale() == 32768.0
    step(1.0)
    assert not torch.equal(conv.weight, after) and conv.weight.isfinite().all()


def test_fp16_under_a_loss_scale(rng, backend, device):
    """τ is about 1/m: unscaled, the gradient of a large image would vanish in float16."""
    logits, target = labelled((1, 64, 65), 19, torch.float16, device, ignored=0.0)
    x = logits.requires_grad_()
    (lmp_triton.loss_max_pooling(x, target, backend=backend) * 65536).backward()
    y = logits.detach().double().requires_grad_()
    (lmp_triton.loss_max_pooling(y, target, backend="eager") * 65536).backward()
    large = y.grad.abs() > 2**-14  # normal numbers of float16
    assert large.sum() > y.grad.numel() / 2
    relative = (x.grad.double() - y.grad).abs()[large] / y.grad.abs()[large]
    assert relative.max() < 1e-3
    flushed = (x.grad == 0) & (y.grad.abs() > 2**-24)
    assert not flushed.any()


class Watch(TorchDispatchMode):
    """What is read back to the host, and copied, while it is on."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.reads, self.allocations = elements, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"):
            self.reads.append(function.name())
        self.allocations += "empty" in function.name() and out.numel() >= self.elements
        return out


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("expanded", [True, False])
def test_grad_output_costs_no_sync_and_no_copy(rng, backend, device, dtype, expanded):
    """Of any scale, and of any stride: `sum().backward()` expands one number over the images."""
    logits, target = labelled((3, 8, 9), 6, dtype, device)
    x = logits.requires_grad_()
    losses = lmp_triton.loss_max_pooling(x, target, ignore_index=255, reduction="none", backend=backend)
    for scale in (1.0, 0.0, 2.0**-10, 65536.0):
        grad_output = torch.full((), scale, device=device).expand(3)
        with Watch(logits.numel()) as watch:
            (grad,) = torch.autograd.grad(
                losses, x, grad_output if expanded else grad_output.contiguous(), retain_graph=True
            )
        if backend == "eager" and device.type == "cpu":  # looks at values; logits and softmax in float32, of a slice
            assert watch.allocations == 1 + 2 * (dtype != torch.float32)
        else:
            assert watch.reads == [] and watch.allocations == 1
        y = logits.detach().double().requires_grad_()
        exact = lmp_triton.loss_max_pooling(y, target, ignore_index=255, reduction="none", backend="eager")
        (exact,) = torch.autograd.grad(exact, y, grad_output.double())
        unit = torch.finfo(dtype).eps
        # The interpreter truncates to bfloat16, and a float16 below 2^-14 is subnormal.
        torch.testing.assert_close(grad.double(), exact, rtol=max(2 * unit, 1e-4), atol=max(2.0**-24, 1e-6 * scale))
