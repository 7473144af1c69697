"""No host sync, no data-dependent shape, no surprise memory, nothing at import, no new kernel for a new value."""

import os
import subprocess
import sys

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import dispatch, settings


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_eager_reads_no_value(p, scope):
    """On the meta device a tensor has no values: reading one, or a shape that depends on one, raises."""
    logits = torch.randn(2, 5, 6, 7, device="meta", requires_grad=True)
    target = torch.zeros(2, 6, 7, dtype=torch.long, device="meta")
    weight = torch.rand(5, device="meta")
    loss, stats = lmp_triton.loss_max_pooling(
        logits, target, p=p, weight=weight, label_smoothing=0.1, scope=scope, return_stats=True
    )
    loss.backward()
    assert logits.grad.shape == logits.shape and stats.alpha.shape == ((2,) if scope == "image" else (1,))
    lmp_triton.pool_losses(torch.rand(2, 30, device="meta"), torch.ones(2, 30, dtype=torch.bool, device="meta"))


@pytest.mark.skipif(not CUDA, reason="needs a GPU; the test above covers the eager backend")
def test_no_sync_on_a_gpu(backend, device):
    logits, target = labelled((2, 50, 60), 19, device=device)
    x = logits.requires_grad_()
    scale = torch.tensor(3.0, device=device)
    for checked in (False, True):  # the first round compiles
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            loss, _ = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend, return_stats=True)
            (loss * scale).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_between_forward_and_backward(rng, backend, device):
    """One tensor of the size of the logits is saved: the logits themselves. The rest is some bytes a pixel."""
    logits, target = labelled((2, 30, 40), 19, device=device)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
    assert saved.pop(logits.untyped_storage().data_ptr())
    pixels = target.numel()
    # Losses and a label: of one byte by Triton, of two by eager.
    assert sum(saved.values()) <= pixels * (5 if backend == "triton" else 6) + 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_float64_of_the_size_of_the_logits(rng, backend, device, dtype):
    from torch.utils._python_dispatch import TorchDispatchMode

    logits, target = labelled((2, 30, 40), 19, dtype, device)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.add((out.dtype, out.numel() >= logits.numel()))
            return out

    x = logits.requires_grad_()
    with Watch():
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
        loss.backward()
    assert (torch.float64, True) not in seen and seen


def test_import_brings_nothing_along():
    """Neither Triton nor pandas, nothing of lmp_triton.segmentation, and no top-level module called kernels."""
    code = (
        "import sys, lmp_triton, lmp_triton.cli; "
        "assert not {'triton', 'pandas', 'matplotlib', 'kernels', 'rich', 'scipy'} & set(sys.modules), 'imported'; "
        "assert not {'torchvision', 'torchmetrics', 'lmp_triton.segmentation'} & set(sys.modules), 'imported'; "
        "import lmp_triton.kernels; assert 'kernels' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


@pytest.mark.parametrize("name", ["backend", "environment"])
def test_choice_of_backend(monkeypatch, name):
    logits = torch.zeros(2, 3, 5)
    assert dispatch.choose(logits) == ("triton" if CUDA and logits.is_cuda else "eager")
    if name == "backend":
        assert dispatch.choose(logits, "eager") == "eager"
    else:
        monkeypatch.setenv(settings.BACKEND, "eager")
        assert dispatch.choose(logits) == "eager"
        monkeypatch.setenv(settings.BACKEND, "gpu")
        with pytest.raises(ValueError, match="LMP_TRITON_BACKEND must be one of"):
            dispatch.choose(logits)


@pytest.mark.skipif(CUDA, reason="shows what the interpreter serves")
def test_a_named_backend_serves_or_says_why(monkeypatch):
    pytest.importorskip("triton")
    assert dispatch.choose(torch.zeros(2, 3, 5), "triton") == "triton"
    monkeypatch.setenv(settings.BACKEND, "triton")
    assert dispatch.choose(torch.zeros(2, 3, 5)) == "triton"
    for values, reason in (
        (torch.zeros(2, 3, 5, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(2, 1025, 5), "up to 1024 classes, not 1025"),
        (torch.zeros(2, 3, 5, device="meta"), "not on meta"),
        (torch.zeros(1).expand(2, 3, 2**31), "losses a segment"),
    ):
        with pytest.raises(ValueError, match=f"cannot serve this call: .*{reason}"):
            dispatch.choose(values, "triton")
    pooled_together = torch.zeros(1).expand(4, 2**30)
    assert dispatch.choose(pooled_together, "triton") == "triton"
    with pytest.raises(ValueError, match="losses a segment"):
        dispatch.choose(pooled_together, "triton", scope="batch")
    monkeypatch.setattr(settings, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 was not set"):
        dispatch.choose(torch.zeros(2, 3, 5), "triton")
    monkeypatch.setattr(settings, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.choose(torch.zeros(2, 3, 5), "triton")
    monkeypatch.delenv(settings.BACKEND)
    assert dispatch.choose(torch.zeros(2, 3, 5)) == "eager"
