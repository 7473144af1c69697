"""Any strides: the logits are read where they lie, never copied, and their gradient keeps their layout."""

import numpy as np
import pytest
import torch
from support import CUDA, labelled
from torch.utils._python_dispatch import TorchDispatchMode

import lmp_triton

LAYOUTS = ["contiguous", "channels_last", "cropped", "cropped channels_last", "transposed", "expanded", "cropped 3-D"]


def lay_out(layout, classes, device):
    """A view of random values, not dense where that is the point, in shapes that have a rest in every tile."""
    if layout == "cropped 3-D":
        return torch.randn(2, classes + 1, 5, 8, 9, device=device)[:, 1:, 1:4, 2:7, 1:8]
    if layout.startswith("cropped"):
        big = torch.randn(2, classes + 2, 14, 19, device=device)
        if "channels_last" in layout:
            big = big.contiguous(memory_format=torch.channels_last)
        return big[:, 1:-1, 1:13, 2:17]
    logits = torch.randn(2, classes, 12, 15, device=device)
    if layout == "channels_last":
        return logits.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return logits.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return logits[:1, :, :1].expand(2, -1, 12, -1)
    return logits


class LargeResults(TorchDispatchMode):
    """Notes the names of PyTorch's operators whose results have as many elements as the logits."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        large = isinstance(out, torch.Tensor) and out.numel() == self.size
        if large and out.untyped_storage().data_ptr() not in inputs:
            self.names.append(function.__name__)
        return out


@pytest.mark.parametrize("options", [{}, {"weighted": True, "label_smoothing": 0.1}])
@pytest.mark.parametrize("classes", [2, 19, 47, 150])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_every_layout(rng, device, layout, classes, options):
    pytest.importorskip("triton")
    options = dict(options)
    if options.pop("weighted", False):
        options["weight"] = torch.rand(classes, device=device)
    view = lay_out(layout, classes, device).detach().requires_grad_()
    target = torch.randint(classes, (2, *view.shape[2:]), device=device)
    target[:, :1] = 255
    before = view.detach().clone()
    double = view.detach().double().contiguous().requires_grad_()
    expected = lmp_triton.loss_max_pooling(double, target, ignore_index=255, backend="eager", **options)
    expected.backward()

    with LargeResults(view.numel()) as large:
        loss = lmp_triton.loss_max_pooling(view, target, ignore_index=255, backend="triton", **options)
        (grad,) = torch.autograd.grad(loss, view)
    # One allocation of that size: the gradient. (The interpreter's own copies are NumPy's; fill_ poisons fresh memory.)
    allocations = [name for name in large.names if not name.startswith("fill_")]
    assert len(allocations) == 1 and allocations[0].startswith("empty"), allocations
    torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(grad.double(), double.grad, rtol=1e-4, atol=2e-6 * double.grad.abs().max().item())
    assert torch.equal(view.detach(), before)
    if layout in ("contiguous", "channels_last", "transposed"):
        assert grad.stride() == view.stride()
    if "channels_last" in layout:
        assert grad.stride(1) == 1


@pytest.mark.parametrize("classes", [11, 60])
def test_rows_of_classes(rng, device, classes):
    """(N, C): the classes lie side by side."""
    pytest.importorskip("triton")
    logits, target = labelled((150,), classes, device=device)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, scope="batch", ignore_index=255, backend="triton")
    expected = lmp_triton.loss_max_pooling(y, target, scope="batch", ignore_index=255, backend="eager")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6 * y.grad.abs().max().item())
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("kind", ["cropped", "strided", "cropped where the logits are, too"])
def test_target_of_other_strides(rng, device, kind):
    pytest.importorskip("triton")
    logits, target = labelled((2, 12, 16), 5, device=device)
    if kind == "cropped":
        strided = torch.full((2, 20, 21), 7, device=device)[:, 3:15, 2:18].copy_(target)
    elif kind == "strided":
        strided = torch.stack([target, target + 1000], -1)[..., 0]
    else:
        logits = torch.zeros(2, 5, 13, 19, device=device)[:, :, 1:, 3:].copy_(logits)
        strided = torch.full((2, 20, 21), 7, device=device)[:, 3:15, 2:18].copy_(target)
    losses = [
        lmp_triton.loss_max_pooling(x, y, ignore_index=255, backend="triton")
        for x, y in ((logits, strided), (logits.contiguous(), target))
    ]
    assert torch.equal(*losses)
    with LargeResults(target.numel()) as large:
        lmp_triton.loss_max_pooling(logits, strided, ignore_index=255, check_targets=False, backend="triton")
    assert large.names and not any("clone" in name or "copy" in name for name in large.names), large.names


def test_more_dimensions_than_a_kernel_walks(device):
    pytest.importorskip("triton")
    view = torch.randn(1, 3, 4, 4, 4, 4, device=device)[:, :, 1:, 1:, 1:, 1:]
    target = torch.zeros(1, 3, 3, 3, 3, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=r"logits\.contiguous"):
        lmp_triton.loss_max_pooling(view, target, backend="triton")
    loss = lmp_triton.loss_max_pooling(view, target)  # "auto" falls back
    assert torch.allclose(loss, lmp_triton.loss_max_pooling(view.contiguous(), target, backend="triton"))


@pytest.mark.skipif(CUDA, reason="memory that is only reserved is a matter of the CPU")
@pytest.mark.parametrize("what", ["image", "class", "pixel"])
def test_offsets_beyond_32_bits(rng, what):
    """Strides that lead past 2^31 elements, in memory that is reserved and hardly touched."""
    pytest.importorskip("triton")
    strides = {"image": (2**31 + 64, 40, 1), "class": (40, 2**30 + 40, 1), "pixel": (8, 1, 2**26 + 8)}[what]
    shape = (2, 3, 34)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert size > 2**31
    storage = torch.from_numpy(np.zeros(size, np.int16)).view(torch.bfloat16)  # torch.zeros writes them all
    logits = storage.as_strided(shape, strides).copy_(torch.randn(shape))
    target = torch.randint(3, (2, 34))
    small = logits.clone(memory_format=torch.contiguous_format)
    assert lmp_triton.loss_max_pooling(logits, target, backend="triton") == pytest.approx(
        lmp_triton.loss_max_pooling(small, target, backend="triton").item(), rel=1e-6
    )
    grads = []
    for x in (logits, small):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(lmp_triton.loss_max_pooling(x, target, backend="triton"), x)
        grads.append(grad)
    torch.testing.assert_close(*grads)
