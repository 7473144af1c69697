"""torch.compile and torch.export: one graph of model and loss, the result of the plain call, nothing compiled anew.

The eager backend is traced, which takes Dynamo seconds: those tests are slow. The kernels are operators.
"""

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import settings

pytestmark = pytest.mark.traced
BACKENDS = ["triton", pytest.param("eager", marks=pytest.mark.slow)]
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def model(backend, device, **options):
    """A head and the loss, as a function of features and target."""
    conv = torch.nn.Conv2d(6, 5, 1).to(device)
    criterion = lmp_triton.LossMaxPooling(ignore_index=255, backend=backend, **options).to(device)
    return conv.weight, lambda x, target: criterion(conv(x), target)


def data(device, shape=(2, 9, 10)):
    features = torch.randn(shape[0], 6, *shape[1:], device=device)
    return features, labelled(shape, 5, device=device)[1]


def compare(step, compiled, parameter, *inputs):
    """Loss, and the gradient of a parameter, are those of the plain call."""
    results = []
    for function in (step, compiled):
        outputs = function(*inputs)
        loss, stats = outputs if isinstance(outputs, tuple) else (outputs, ())
        (grad,) = torch.autograd.grad(loss.sum(), parameter)
        results.append((loss, *stats, grad))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4 if result is results[1][-1] else 2e-6, atol=1e-7)


OPTIONS = [
    {},
    {"p": 1.0},
    {"p": float("inf"), "reduction": "none", "return_stats": True},
    {"weight": torch.rand(5), "label_smoothing": 0.1, "scope": "batch", "reduction": "sum"},
]


@pytest.mark.parametrize("engine", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("options", OPTIONS)
def test_full_graph(rng, backend, device, engine, options):
    parameter, step = model(backend, device, **options)
    compare(step, torch.compile(step, fullgraph=True, backend=engine), parameter, *data(device))


@pytest.mark.parametrize("engine", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_dynamic_shapes(rng, backend, device, engine, scope):
    """One compilation for all sizes, of images and of the batch. (No convolution: Inductor compiles that anew.)"""
    scale = torch.rand(5, 1, 1, device=device, requires_grad=True)

    def step(x, target):
        return lmp_triton.loss_max_pooling(scale * x, target, ignore_index=255, scope=scope, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=engine, dynamic=True)
    compare(step, compiled, scale, *labelled((2, 9, 10), 5, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 11, 12), (4, 20, 13)):
            compare(step, compiled, scale, *labelled(shape, 5, device=device))


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_rows_of_classes(rng, backend, device, scope):
    """channels_last logits, and (N, C) ones; what is saved for backward may depend on the layout."""
    options = {"ignore_index": 255, "label_smoothing": 0.1, "scope": scope, "backend": backend}

    def step(x, target):
        return lmp_triton.loss_max_pooling(x * 1, target, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, shape in enumerate(((2, 6, 7), (3, 8, 5))):
        logits, target = labelled(shape, 40, device=device)
        x = logits.to(memory_format=torch.channels_last).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compare(step, compiled, x, x, target)
    if scope == "batch":
        logits, target = labelled((30,), 5, device=device)
        x = logits.requires_grad_()
        compare(step, torch.compile(step, fullgraph=True, backend="aot_eager"), x, x, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(rng, backend, device, dtype):
    logits, target = labelled((2, 6, 7), 40, dtype, device)
    x = logits.requires_grad_()

    def step(x, target):
        return 65536 * lmp_triton.loss_max_pooling(x, target, ignore_index=255, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, target), step(x, target)
    (grad,), (expected_grad,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=2.0**-7, atol=1e-3)


def test_losses_and_weights(rng, backend, device):
    losses = torch.rand(2, 6, 7, device=device, requires_grad=True)
    mask = torch.rand(2, 6, 7, device=device) < 0.8

    def step(losses, mask):
        pooled, stats = lmp_triton.pool_losses(losses, mask, backend=backend, return_stats=True)
        weights, _ = lmp_triton.optimal_weights(losses, mask, backend=backend)
        return pooled, (*stats, weights)

    compare(step, torch.compile(step, fullgraph=True, backend="aot_eager"), losses, losses, mask)


def test_grad_output_of_any_scale_and_stride(rng, backend, device):
    parameter, step = model(backend, device, reduction="none")
    inputs = data(device, (3, 6, 7))
    losses = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    for grad_output in (torch.tensor(65536.0).expand(3), torch.tensor([1.0, 9.0, 2.0, 9.0, 3.0, 9.0])[::2]):
        grad_output = grad_output.to(device)
        (grad,) = torch.autograd.grad(losses, parameter, grad_output, retain_graph=True)
        (expected,) = torch.autograd.grad(step(*inputs), parameter, grad_output)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6 * grad_output.max().item())


@pytest.mark.parametrize("engine", ["aot_eager", INDUCTOR])
def test_solved_once(rng, device, engine, monkeypatch):
    """What backward needs is kept, not computed again; and nothing is launched that nobody asked for."""
    called = []
    fused = pytest.importorskip("lmp_triton.fused")
    for name in ("softmax_losses", "solve", "logits_gradient", "total_weight"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, f=original, name=name, **k: (called.append(name), f(*a, **k))[1])
    parameter, step = model("triton", device)
    torch.compile(step, fullgraph=True, backend=engine)(*data(device)).backward()
    assert called == ["softmax_losses", "solve", "logits_gradient"] and parameter.grad is not None


def test_bad_label_is_nan(rng, backend, device):
    logits, target = torch.randn(2, 3, 4, device=device), torch.full((2, 4), 7, device=device)
    step = torch.compile(lmp_triton.loss_max_pooling, fullgraph=True, backend="aot_eager")
    assert step(logits, target, backend=backend).isnan()


def test_bad_parameter_read_on_the_device_is_nan(rng, backend, device):
    compiled = torch.compile(
        lambda x, y, ratio: lmp_triton.loss_max_pooling(x, y, ratio=ratio, ignore_index=255, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    logits, target = labelled((2, 6, 7), 5, device=device)
    for ratio, bad in ((0.5, False), (1.5, True), (0.0, True)):
        assert compiled(logits, target, torch.tensor(ratio, device=device)).isnan() == bad


def test_second_derivative_is_refused(rng, backend, device):
    """torch.compile has none of anything: it raises, or its gradient has no graph."""
    logits, target = labelled((2, 6, 7), 5, device=device)
    x = logits.requires_grad_()
    step = torch.compile(lmp_triton.loss_max_pooling, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(step(x, target, ignore_index=255, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|does not require grad"):
        grad.square().sum().backward()


def test_inside_a_model_that_is_compiled_and_checkpointed(rng, backend, device):
    parameter, step = model(backend, device)

    def checkpointed(x, target):
        return torch.utils.checkpoint.checkpoint(step, x, target, use_reentrant=False)

    compare(step, torch.compile(checkpointed, fullgraph=True, backend="aot_eager"), parameter, *data(device))


@pytest.mark.skipif(CUDA, reason="shows what happens to CPU tensors without the interpreter")
def test_kernels_that_cannot_run_say_so(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(settings, "interpreting", lambda: False)
    logits, target = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)
    compiled = torch.compile(lmp_triton.loss_max_pooling, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="TRITON_INTERPRET=1 was not set"):
        compiled(logits, target, backend="triton")
    with pytest.raises(Exception, match="TRITON_INTERPRET=1 was not set"):
        torch.compile(lmp_triton.pool_losses, fullgraph=True, backend="aot_eager")(logits, backend="triton")


class Loss(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 5, 1)
        self.criterion = lmp_triton.LossMaxPooling(ignore_index=255, **options)

    def forward(self, x, target):
        return self.criterion(self.conv(x), target)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(rng, device, strict, tmp_path):
    """By "auto" the eager backend: the program holds PyTorch's own operators alone, and runs without this package."""
    module = Loss(weight=torch.rand(5)).to(device)
    # With strict=True PyTorch 2.10 fails on sizes that have no upper bound: the loss sets one, to their product.
    n, h = torch.export.Dim("n", max=64), torch.export.Dim("h", max=1000)
    program = torch.export.export(module, data(device), dynamic_shapes=({0: n, 2: h}, {0: n, 1: h}), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("lmp_triton" in name for name in names)
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    for shape in ((2, 9, 10), (3, 12, 10)):
        inputs = data(device, shape)
        torch.testing.assert_close(loaded(*inputs), module(*inputs), rtol=2e-6, atol=0)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_the_kernels(rng, device, strict):
    """Only when asked for by name; the program then holds an operator, and needs this package."""
    pytest.importorskip("triton")
    module = Loss(backend="triton", ratio=torch.tensor(0.5)).to(device)
    program = torch.export.export(module, data(device), strict=strict)
    graphs = [x.graph for x in program.graph_module.modules() if isinstance(x, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert "lmp_triton.pool_logits.default" in names
    inputs = data(device)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=2e-6, atol=0)


UPSAMPLED = [{}, {"label_smoothing": 0.1, "scope": "batch", "reduction": "sum"}]


@pytest.mark.parametrize("engine", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("options", UPSAMPLED)
def test_upsampled(rng, backend, device, engine, options):
    """The loss that upsamples, in one graph with a model, and for any sizes in one compilation."""
    parameter = torch.rand(5, 1, 1, device=device, requires_grad=True)
    criterion = lmp_triton.UpsampledLossMaxPooling(ignore_index=255, backend=backend, **options).to(device)

    def step(x, target):
        return criterion(parameter * x, target)

    def sizes(images, nodes, pixels):
        return torch.randn(images, 5, *nodes, device=device), labelled((images, *pixels), 5, device=device)[1]

    compiled = torch.compile(step, fullgraph=True, backend=engine, dynamic=True)
    compare(step, compiled, parameter, *sizes(2, (4, 6), (8, 10)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(step, compiled, parameter, *sizes(3, (6, 7), (9, 14)))
