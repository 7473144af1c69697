"""bf16 and fp16: no further from float64 than twice F.cross_entropy in the same type; loss scales: test_amp.py."""

import pytest
import torch
import torch.nn.functional as F
from support import CUDA, labelled

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
