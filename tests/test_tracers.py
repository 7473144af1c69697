"""FakeTensorMode and make_fx, outside of torch.compile: no value is looked at, and the graph computes the same."""

import pytest
import torch
from support import labelled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import lmp_triton

pytestmark = pytest.mark.traced


def step(logits, target, backend):
    x = logits.detach().requires_grad_()
    loss, stats = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend, return_stats=True)
    weights, _ = lmp_triton.optimal_weights(x.detach()[:, 0].exp(), backend=backend)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad, *stats, weights


def test_fake_tensors(rng, backend, device):
    real = labelled((2, 6, 7), 5, device=device)
    expected = step(*real, backend)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in real]
    with mode:
        results = step(*fake, backend)
    for got, real in zip(results, expected, strict=True):
        assert (got.shape, got.dtype, got.device, got.stride()) == (real.shape, real.dtype, real.device, real.stride())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(rng, backend, device, mode):
    graph = make_fx(lambda *x: step(*x, backend), tracing_mode=mode)(*labelled((2, 6, 7), 5, device=device))
    names = {str(node.target).split(".")[1] for node in graph.graph.nodes if "lmp_triton." in str(node.target)}
    if backend == "triton":
        assert names > {"pool_logits", "logits_gradient"}
    else:
        assert names <= {"crossing"}  # the search, and on the CPU alone
    logits, target = labelled((2, 6, 7), 5, device=device)
    for got, expected in zip(graph(logits, target), step(logits, target, backend), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
