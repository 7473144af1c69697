"""torch.func and forward mode: refused, and clearly.

PyTorch would answer with an error from its depths, a silent loop or a silent zero.
"""

import pytest
import torch
from support import labelled
from torch.autograd import forward_ad

import lmp_triton

pytestmark = pytest.mark.traced
TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(x.unsqueeze(0)),
    "linearize": lambda f, x: torch.func.linearize(f, x),
}


@pytest.fixture(params=["loss_max_pooling", "pool_losses", "optimal_weights"])
def function(request, rng, backend, device):
    logits, target = labelled((2, 6, 7), 5, device=device)

    def call(x):
        if request.param == "loss_max_pooling":
            return lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
        result = getattr(lmp_triton, request.param)(x.square().sum(1), backend=backend)
        return result[0].sum() if request.param == "optimal_weights" else result

    return call, logits


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(function, name):
    with pytest.raises(NotImplementedError, match=r"does not run under the transforms of torch.func"):
        TRANSFORMS[name](*function)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_is_refused(function, requires_grad):
    call, x = function
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="or in forward mode"):
        call(forward_ad.make_dual(x.requires_grad_(requires_grad), torch.ones_like(x)))


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "jacfwd"])
def test_transforms_are_refused_under_compile(function, name):
    call, x = function
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMS[name](call, x), backend="aot_eager")
    with pytest.raises(NotImplementedError, match=r"does not run under the transforms of torch.func"):
        compiled(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: TRANSFORMS[name](call, x), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"does not run under the transforms of torch.func"):
        compiled(x)


def test_batched_gradients_are_refused(rng, backend, device):
    """These use an older vmap, in the backward pass alone."""
    logits, target = labelled((2, 6, 7), 5, device=device)

    def call(x):
        return lmp_triton.loss_max_pooling(x, target, ignore_index=255, reduction="none", backend=backend)

    x = logits.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="with batched gradients"):
        torch.autograd.grad(call(x), x, torch.eye(2, device=device), is_grads_batched=True)
    with pytest.raises(NotImplementedError, match="with batched gradients"):
        torch.autograd.functional.jacobian(call, logits, vectorize=True)
    y = torch.rand(2, 9, device=device, requires_grad=True)
    loss = lmp_triton.pool_losses(y, reduction="none", backend=backend)
    with pytest.raises(NotImplementedError, match="with batched gradients"):
        torch.autograd.grad(loss, y, torch.eye(2, device=device), is_grads_batched=True)
    rows = torch.autograd.functional.jacobian(call, logits)  # one after another they do
    for i in range(2):
        (expected,) = torch.autograd.grad(call(x)[i], x)
        assert torch.equal(rows[i], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_jit_trace_is_refused(function):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace can't record"):
        torch.jit.trace(*function)
