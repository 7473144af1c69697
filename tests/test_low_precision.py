"""bf16 and fp16: no further from float64 than twice F.cross_entropy in the same type, and nothing flushed to zero."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, labelled

import lmp_triton

LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("classes", [19, 40])
@pytest.mark.parametrize("dtype", LOW)
def test_error_against_cross_entropy(rng, backend, device, dtype, classes):
    logits, target = labelled((2, 24, 24), classes, dtype, device, ignored=0.0, scale=3.0)

    def run(function, dtype):
        x = logits.detach().clone().to(dtype).requires_grad_()
        loss = function(x, target)
        loss.backward()
        return loss.double(), x.grad.double()

    exact, exact_grad = run(F.cross_entropy, torch.float64)
    theirs, their_grad = run(F.cross_entropy, dtype)
    ours, our_grad = run(lambda x, y: lmp_triton.loss_max_pooling(x, y, ratio=1.0, backend=backend), dtype)
    assert (ours - exact).abs() <= max(2 * (theirs - exact).abs().item(), 1e-5 * exact.item())
    # The interpreter truncates float32 to bfloat16 where the hardware rounds: one unit in the last place, 2^-8, more.
    truncation = 2.0**-8 * exact_grad.abs() if dtype == torch.bfloat16 and backend == "triton" and not CUDA else 0.0
    excess = (our_grad - exact_grad).abs() - truncation
    assert excess.max() <= 2 * (their_grad - exact_grad).abs().max()


@pytest.mark.parametrize("dtype", LOW)
def test_loss_is_float32_and_gradient_like_the_logits(rng, backend, device, dtype):
    logits, target = labelled((2, 8, 8), 5, dtype, device)
    x = logits.requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype


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


@pytest.mark.skipif(not CUDA, reason="GradScaler needs a GPU; the test above uses its initial scale by hand")
def test_grad_scaler(rng, backend, device):
    conv = torch.nn.Conv2d(3, 19, 1).to(device)
    scaler = torch.amp.GradScaler("cuda")
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.1)
    x, target = torch.randn(2, 3, 32, 32, device=device), torch.randint(19, (2, 32, 32), device=device)
    with torch.autocast("cuda", torch.float16):
        logits = conv(x)
        loss = lmp_triton.loss_max_pooling(logits, target, backend=backend)
    assert logits.dtype == torch.float16 and loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(parameter.isfinite().all() for parameter in conv.parameters())
