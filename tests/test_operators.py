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
from lmp_triton import dispatch, fused, operators, settings
from lmp_triton.types import CrossEntropy, PixelLosses, Pool

pytestmark = [
    pytest.mark.traced,
    pytest.mark.skipif(not settings.has_triton(), reason="Triton is not installed on this platform"),
]

OPERATORS = torch.ops.lmp_triton


def inputs(
    device, classes=5, dtype=torch.float32, weighted=False, channels_last=False, shape=(2, 4, 5), upsampled=None
):
    logits, target = labelled(shape, classes, dtype, device)
    if channels_last:
        logits = logits.to(memory_format=torch.channels_last)
    if upsampled:
        target = labelled((shape[0], *upsampled), classes, device=device)[1]
    weight = torch.rand(classes, device=device) if weighted else None
    return logits, target, weight


CALLS = [
    # What is saved for backward differs: labels of one byte or two, −log softmax or not.
    ({}, 0.0, {}),
    ({"classes": 40, "weighted": True, "dtype": torch.bfloat16}, 0.1, {"reduction": "none"}),
    ({"classes": 300}, 0.1, {"scope": "batch", "reduction": "sum"}),
    ({"channels_last": True, "dtype": torch.float16}, 0.0, {"solver": "select"}),
    ({"upsampled": (8, 11)}, 0.1, {"scope": "batch"}),
]


def arguments(device, call, parameter=float):
    """What `pool_logits` takes."""
    tensors, smoothing, options = call
    logits, target, weight = inputs(device, **tensors)
    align_corners = False if "upsampled" in tensors else None
    p, ratio = (parameter(x) for x in (1.3, 0.25))
    if parameter is not float:
        p, ratio = p.to(device), ratio.to(device)
    return logits, target, CrossEntropy(weight, 255, smoothing, align_corners), Pool(p, ratio, **options)


def check_operator(operator, *args):
    results = torch.library.opcheck(operator.default, args)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("parameter", [float, torch.tensor])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_from_logits(rng, device, call, parameter):
    logits, target, cross_entropy, pool = arguments(device, call, parameter)
    args = (logits, target, *cross_entropy, *operators._flat(pool))
    check_operator(OPERATORS.pool_logits, *args)
    check_operator(OPERATORS.softmax_losses, logits, target, *cross_entropy, pool.scope)
    losses, saved, value, solution, _ = OPERATORS.pool_logits(*args)
    grad_output = torch.rand(value.shape, device=device)
    check_operator(OPERATORS.logits_gradient, logits, losses, saved, solution, grad_output, *cross_entropy)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck_from_losses(rng, device, reduction, masked):
    losses = torch.rand(2, 20, device=device, dtype=torch.float16)
    mask = torch.rand(2, 20, device=device) < 0.8 if masked else None
    check_operator(OPERATORS.marked_losses, losses, mask, "image")
    args = (losses, mask, 1.3, 0.25, None, None, "image", reduction, "auto")
    check_operator(OPERATORS.pool_losses, *args)
    marked, value, solution, _ = OPERATORS.pool_losses(*args)
    check_operator(OPERATORS.pixel_weights, marked, solution, torch.rand_like(value), torch.float16)
    check_operator(OPERATORS.total_weight, marked, solution)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_same_as_the_stages_from_logits(rng, device, call):
    """Bit for bit."""
    logits, target, cross_entropy, pool = arguments(device, call)
    (pixels, pooling), (expected, expected_pooling) = (
        stages.pool_logits(logits, target, cross_entropy, pool) for stages in (operators, fused)
    )
    assert equal(pooling, expected_pooling) and torch.equal(pixels.losses, expected.losses)
    assert equal(pixels.saved, expected.saved)
    grad_output = torch.rand_like(pooling.value)
    rest = (pooling.solution, grad_output, cross_entropy)
    assert equal([operators.logits_gradient(logits, pixels, *rest)], [fused.logits_gradient(logits, expected, *rest)])
    alone = operators.softmax_losses(logits, target, cross_entropy, pool.scope)
    assert torch.equal(alone.losses, expected.losses) and equal(alone.saved, expected.saved)


def test_same_as_the_stages_from_losses(rng, device):
    losses, pool = torch.rand(2, 30, device=device, dtype=torch.bfloat16), Pool(1.3, 0.5, reduction="none")
    (pixels, pooling), (expected, expected_pooling) = (
        stages.pool_losses(losses, None, pool) for stages in (operators, fused)
    )
    assert equal(pooling, expected_pooling) and torch.equal(pixels.losses, expected.losses)
    assert torch.equal(operators.marked_losses(losses, None, "image").losses, expected.losses)
    rest = (PixelLosses(expected.losses), pooling.solution)
    one = torch.ones((), device=device)
    for name, more in (("total_weight", ()), ("pixel_weights", (one, torch.float32))):
        assert torch.equal(getattr(operators, name)(*rest, *more), getattr(fused, name)(*rest, *more))


def test_no_derivative_of_their_own(rng, device):
    """The two functions of `lmp_triton.autograd` have it, for every backend."""
    logits, *rest = arguments(device, CALLS[0])
    value = operators.pool_logits(logits.requires_grad_(), *rest)[1].value
    with pytest.raises(RuntimeError, match="no autograd formula"):
        value.backward()


def dual(function, x):
    """In forward mode, without torch.func."""
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


TRANSFORMS = {
    "vmap": lambda function, x: torch.func.vmap(function)(x.unsqueeze(0)),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "forward mode": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(rng, device, transform):
    """PyTorch would run a loop for one, return a zero for another, or say what is no help."""
    logits, target, cross_entropy, pool = arguments(device, CALLS[0])
    losses, flat = torch.rand(2, 30, device=device), operators._flat(pool)
    marked, value, solution, _ = OPERATORS.pool_losses(losses, None, *flat)
    pixel, saved, _, of_logits, _ = OPERATORS.pool_logits(logits, target, *cross_entropy, *flat)
    rest, half = (pixel, saved, of_logits, value, *cross_entropy), torch.tensor(0.5, dtype=torch.float64)
    calls = {
        "softmax_losses": (lambda x: OPERATORS.softmax_losses(x, target, *cross_entropy, "image")[0], logits),
        "marked_losses": (lambda x: OPERATORS.marked_losses(x, None, "image"), losses),
        "pool_logits": (lambda x: OPERATORS.pool_logits(x, target, *cross_entropy, *flat)[2], logits),
        "pool_losses": (lambda x: OPERATORS.pool_losses(x, None, *flat)[1], losses),
        "total_weight": (lambda x: OPERATORS.total_weight(x, solution), marked),
        "pixel_weights": (lambda x: OPERATORS.pixel_weights(x, solution, value, torch.float32), marked),
        "logits_gradient": (lambda x: OPERATORS.logits_gradient(x, *rest), logits),
        "crossing": (lambda x: OPERATORS.crossing(x, half, 2 * half)[3], torch.rand(2, 30)),
    }
    assert calls.keys() == {*operators.OPERATORS, "crossing"}
    for function, x in calls.values():
        with pytest.raises(NotImplementedError, match="does not run under the transforms"):
            TRANSFORMS[transform](function, x)


def test_the_plain_call_does_without(rng, backend, device):
    """An operator costs a call several times what `autograd.Function` does; see perf/NOTES.md."""
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    logits, target, _ = inputs(device)
    logits.requires_grad_()
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
    monkeypatch.setattr(configs, "_table", configs._table.__wrapped__)  # nothing is to be remembered of this
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.delenv(settings.BACKEND, raising=False)
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
