"""The kernels as operators of PyTorch: registered as it asks, the same as the plain call, and not in its way."""

import os
import subprocess
import sys

import pytest
import torch
from support import labelled
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import lmp_triton
from lmp_triton import dispatch, operators
from lmp_triton.autograd import FromLogits, FromLosses, Options

pytestmark = [
    pytest.mark.traced,
    pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed on this platform"),
]

OPERATORS = torch.ops.lmp_triton


def inputs(device, classes=5, dtype=torch.float32, weighted=False, channels_last=False, shape=(2, 4, 5)):
    logits, target = labelled(shape, classes, dtype, device)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    weight = torch.rand(classes, device=device) if weighted else None
    return logits.requires_grad_(), target, weight


CALLS = [
    # What is saved for backward differs: labels of one byte or two, −log softmax or not.
    ({}, 0.0, {}),
    ({"classes": 40, "weighted": True, "dtype": torch.bfloat16}, 0.1, {"reduction": "none"}),
    ({"classes": 300}, 0.1, {"segments": 1, "reduction": "sum"}),
    ({"channels_last": True, "dtype": torch.float16}, 0.0, {"solver": "select"}),
]


def arguments(device, call, parameter=float):
    """What `lmp_triton::pool_logits` takes."""
    tensors, smoothing, options = call
    logits, target, weight = inputs(device, **tensors)
    options = Options("triton", **{"segments": logits.shape[0], "reduction": "mean", **options})
    p, ratio = (parameter(x) for x in (1.3, 0.25))
    return logits, target, weight, p, ratio, options._replace(ignore_index=255, label_smoothing=smoothing)


def check(operator, *args):
    results = torch.library.opcheck(operator.default, args)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def flat(p, ratio, options, *names):
    return *operators._parameters(p, ratio), options.segments, options.reduction, options.solver, *names


@pytest.mark.parametrize("parameter", [float, torch.tensor])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_from_logits(rng, device, call, parameter):
    logits, target, weight, p, ratio, options = arguments(device, call, parameter)
    if isinstance(p, torch.Tensor):
        p, ratio = p.to(device), ratio.to(device)
    args = (logits, target, weight, *flat(p, ratio, options, 255, options.label_smoothing))
    check(OPERATORS.pool_logits, *args)
    _, solution, _, losses, saved = OPERATORS.pool_logits(*args)
    grad_output = torch.rand(options.segments if options.reduction == "none" else (), device=device)
    check(
        OPERATORS.logits_gradient,
        logits.detach(),
        losses,
        saved,
        solution,
        grad_output,
        weight,
        options.label_smoothing,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck_from_losses(rng, device, reduction, masked):
    values = torch.rand(2, 20, device=device, dtype=torch.float16, requires_grad=True)
    mask = torch.rand(2, 20, device=device) < 0.8 if masked else None
    args = (values, mask, 1.3, 0.25, None, None, 2, reduction, "auto")
    check(OPERATORS.pool_losses, *args)
    value, solution, _, losses = OPERATORS.pool_losses(*args)
    check(OPERATORS.pixel_weights, losses, solution, torch.rand_like(value), torch.float16)
    check(OPERATORS.total_weight, losses, solution)


@pytest.mark.parametrize("call", CALLS)
def test_same_as_the_function(rng, device, call):
    """Bit for bit, forward and backward."""
    x, *rest = arguments(device, call)
    y = x.detach().clone().requires_grad_()
    outputs, expected = operators.pool_logits(x, *rest), FromLogits.apply(y, *rest)
    grad_output = torch.rand_like(expected[0])
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    outputs[0].backward(grad_output)
    expected[0].backward(grad_output)
    assert torch.equal(x.grad, y.grad)


def test_same_as_the_function_from_losses(rng, device):
    x = torch.rand(2, 30, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    options = Options("triton", 2, "none")
    outputs, expected = operators.pool_losses(x, None, 1.3, 0.5, options), FromLosses.apply(y, None, 1.3, 0.5, options)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    outputs[0].sum().backward()
    expected[0].sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("function", ["logits", "losses"])
def test_second_derivative_is_refused(rng, device, function):
    if function == "logits":
        x, *rest = arguments(device, CALLS[0])
        value = operators.pool_logits(x, *rest)[0]
    else:
        x = torch.rand(2, 30, device=device, requires_grad=True)
        value = operators.pool_losses(x, None, 1.3, 0.5, Options("triton", 2, "mean"))[0]
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_vmap_and_forward_mode_are_refused(rng, device):
    """PyTorch would run a loop for the one and return a zero for the other."""
    x, *rest = arguments(device, CALLS[0])
    x = x.detach()
    with pytest.raises(NotImplementedError, match="does not run under the transforms"):
        torch.func.vmap(lambda logits: operators.pool_logits(logits, *rest)[0])(x.unsqueeze(0))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="does not run under the transforms"):
        operators.pool_logits(forward_ad.make_dual(x, x), *rest)
    losses = torch.rand(2, 30, device=device)
    options = Options("triton", 2, "mean")
    with pytest.raises(NotImplementedError, match="does not run under the transforms"):
        torch.func.vmap(lambda x: operators.pool_losses(x, None, 1.3, 0.5, options)[0])(losses.unsqueeze(0))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="does not run under the transforms"):
        operators.pool_losses(forward_ad.make_dual(losses, losses), None, 1.3, 0.5, options)


def test_the_plain_call_does_without(rng, backend, device):
    """An operator costs a call several times what `autograd.Function` does; see perf/NOTES.md."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    logits, target, _ = inputs(device)
    with Watch():
        loss, _ = lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend=backend, return_stats=True)
        loss.backward()
        lmp_triton.optimal_weights(torch.rand(2, 9, device=device), backend=backend)
    assert names and not any("lmp_triton" in name for name in names)


def test_registered_at_import_without_triton():
    """A saved graph finds the operators once the package is imported; Triton comes with the first call."""
    code = "import sys, torch, lmp_triton; torch.ops.lmp_triton.pool_logits.default; assert 'triton' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


def test_auto_takes_triton_on_cuda_where_code_is_traced(monkeypatch):
    """Shown without a GPU, by tensors that have a device and no memory."""
    from lmp_triton.kernels import configs
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(configs, "table", configs.table.__wrapped__)  # nothing is to be remembered of this
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(2, 5, 6, 7, device="cuda")
        target = torch.empty(2, 6, 7, device="cuda", dtype=torch.long)

        def step(logits, target):
            loss, stats = lmp_triton.loss_max_pooling(logits, target, return_stats=True)
            weights, _ = lmp_triton.optimal_weights(logits[:, 0])
            return loss, *stats, weights

        assert dispatch.choose(logits) == "triton"
        graph = make_fx(step)(logits, target).graph
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert dispatch.choose(logits) == "eager"
    called = {str(node.target).removesuffix(".default") for node in graph.nodes if "lmp_triton" in str(node.target)}
    assert called == {f"lmp_triton.{x}" for x in ("pool_logits", "pool_losses", "pixel_weights", "total_weight")}
