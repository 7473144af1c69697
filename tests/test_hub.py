"""The package as a kernel of the Hugging Face Hub: loadable from its build folder alone, beside the package itself."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import labelled
from torch import nn

import lmp_triton
from lmp_triton.integrations import hub
from lmp_triton.settings import has_triton


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    hub.build(out)
    return out


@pytest.fixture
def loaded(folder):
    kernels = pytest.importorskip("kernels", reason="needs kernels: pip install 'lmp-triton[clients]'")
    return kernels.get_local_kernel(folder)


def test_layout(folder):
    """The rules of the Hub: a variant is a package with metadata, its name unique to what is in it."""
    names = {"cuda": "torch-cuda", "cpu": "torch-cpu"}
    assert {path.name for path in (folder / "build").iterdir()} == set(names.values())
    for backend, name in names.items():
        variant = folder / "build" / name
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["license"] == "Apache-2.0"
        assert metadata["id"].startswith(f"lmp_triton_{backend}_") and metadata["id"].isidentifier()
        assert (variant / "__init__.py").is_file() and (variant / "kernels" / "select.py").is_file()


def test_imports(folder):
    """Within the kernel relative, otherwise the standard library, torch and Triton; operators under its own name."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    files = list((folder / "build" / "torch-cuda").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        assert '"lmp_triton::' not in text and "torch.ops.lmp_triton." not in text
        for node in ast.walk(ast.parse(text)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            found = {name.split(".")[0] for name in modules}
            assert found <= allowed | ({"numpy"} if file.name == "host.py" else set()), (file, modules)


def test_without_numpy(folder, tmp_path):
    """What the eager backend does in NumPy, PyTorch does where that is not installed."""
    losses = torch.linspace(0, 3, 9000).view(1, -1)
    expected = lmp_triton.pool_losses(losses, backend="eager").item()
    code = f"""
import sys
sys.modules["numpy"] = None
sys.path.insert(0, {str(folder / "build")!r})
import importlib
import torch
module = importlib.import_module("torch-cpu")
losses = torch.linspace(0, 3, 9000).view(1, -1).requires_grad_()
loss = module.pool_losses(losses, backend="eager")
loss.backward()
logits = torch.randn(1, 3, 9000, requires_grad=True)
module.loss_max_pooling(logits, torch.randint(3, (1, 9000)), backend="eager").backward()
assert losses.grad.any() and logits.grad.any()
print(loss.item())
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(expected, rel=1e-6)


def test_stands_alone(folder, tmp_path):
    """Loaded as the `kernels` package does, where lmp_triton is not installed."""
    variant = folder / "build" / "torch-cpu"
    code = f"""
import importlib.util, sys
sys.modules["lmp_triton"] = None
spec = importlib.util.spec_from_file_location("lmp_unique", {str(variant / "__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["lmp_unique"] = module
spec.loader.exec_module(module)
import torch
x, y = torch.randn(1, 3, 20, requires_grad=True), torch.randint(3, (1, 20))
for backend, solver in {[("eager", "auto")] + [("triton", "select")] * has_triton()}:
    module.loss_max_pooling(x, y, backend=backend, solver=solver).backward()
    module.optimal_weights(torch.rand(2, 20), backend=backend, solver=solver)
assert x.grad.any()
print("ok")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr


def test_same_as_the_package(rng, loaded, folder, backend):
    assert Path(loaded.__file__).is_relative_to(folder) and loaded.api is not lmp_triton.api
    logits, target = labelled((2, 8, 9), 5)
    results = []
    for library in (loaded, lmp_triton):
        x = logits.clone().requires_grad_()
        loss = library.loss_max_pooling(x, target, ignore_index=255, backend=backend)
        loss.backward()
        weights, stats = library.optimal_weights(x[:, 0].exp(), p=1.7, backend=backend)
        pooled = library.pool_losses(x[:, 0].exp(), backend=backend)
        results.append((loss, x.grad, weights, *stats, pooled))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert loaded.LossMaxPooling(ignore_index=255, backend=backend)(logits, target) == results[0][0]
    assert loaded.obstacle(losses=logits[:, 0].double()) is not None


def test_two_versions_in_one_process(loaded, tmp_path):
    """Another build is another module; nothing of the two is shared."""
    import kernels

    hub.build(tmp_path)
    for variant in (tmp_path / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        metadata["id"] += "_other"
        (variant / "metadata.json").write_text(json.dumps(metadata))
    other = kernels.get_local_kernel(tmp_path)
    assert other is not loaded and other.eager is not loaded.eager
    assert other.pool_losses(torch.ones(1, 4)) == loaded.pool_losses(torch.ones(1, 4)) == 1


class Criterion(nn.Module):
    """Somebody's loss, with another forward."""

    def __init__(self):
        super().__init__()
        self.p, self.ratio, self.ignore_index = 1.7, 0.5, 255

    def forward(self, logits, target):
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=self.ignore_index)


def test_layer(rng, loaded, folder):
    """`kernelize` lends the layer's forward to a module that has the options."""
    import kernels

    repository = kernels.LocalLayerRepository(folder, layer_name="LossMaxPooling")
    kernels.replace_kernel_forward_from_hub(Criterion, "Criterion")
    model, (logits, target) = Criterion(), labelled((2, 8, 9), 5)
    plain = model(logits, target)
    with kernels.use_kernel_mapping({"Criterion": {"cpu": repository}}):
        model = kernels.kernelize(
            model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=kernels.KernelizeFallback.NONE
        )
    expected = lmp_triton.loss_max_pooling(logits, target, p=1.7, ratio=0.5, ignore_index=255)
    assert model(logits, target) == expected != plain


def test_layer_on_losses(rng, loaded):
    layer = loaded.layers.PoolLosses()
    losses = torch.rand(2, 30)
    assert layer(losses) == lmp_triton.pool_losses(losses)
    layer.p = 2.0
    assert layer(losses) == lmp_triton.pool_losses(losses, p=2.0)


def test_does_not_overwrite(folder):
    with pytest.raises(FileExistsError, match="remove it first"):
        hub.build(folder)


def test_command(tmp_path, capsys):
    hub.main([str(tmp_path)])
    assert "torch-cuda" in capsys.readouterr().out
    assert (tmp_path / "build" / "torch-cpu" / "__init__.py").is_file()
