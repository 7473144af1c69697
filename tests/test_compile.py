"""torch.compile(fullgraph=True) takes the eager backend, forward and backward. (The kernels: not yet.)"""

import pytest
import torch
from conftest import labelled

import lmp_triton

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Dynamo can't trace the replaced torch.empty of conftest.py."""


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_full_graph(rng, engine, p):
    logits, target = labelled((2, 9, 10), 5)
    conv = torch.nn.Conv2d(5, 5, 1)

    def step(x, target):
        return lmp_triton.loss_max_pooling(conv(x), target, p=p, ignore_index=255, backend="eager")

    expected = step(logits, target)
    expected.backward()
    expected_grad = conv.weight.grad.clone()
    conv.weight.grad = None
    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend=engine)(logits, target)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(conv.weight.grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_bad_label_under_compile_is_nan():
    torch._dynamo.reset()
    logits, target = torch.randn(2, 3, 4), torch.full((2, 4), 7)
    compiled = torch.compile(lmp_triton.loss_max_pooling, fullgraph=True, backend="aot_eager")
    assert compiled(logits, target).isnan()
