"""Launches: how many, on which device, and how many kernels are compiled for changing values."""

import pytest
import torch
from conftest import CUDA, labelled

import lmp_triton

pytest.importorskip("triton")


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in order."""
    from lmp_triton.kernels import cross_entropy, gradient, losses, select, sort, weights

    names = []
    for module in (cross_entropy, gradient, losses, select, sort, weights):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):

                class Spy:
                    def __init__(self, kernel, name):
                        self.kernel, self.name = kernel, name

                    def __getitem__(self, grid):
                        names.append(self.name)
                        return self.kernel[grid]

                monkeypatch.setattr(module, name, Spy(kernel, name))
    return names


@pytest.mark.parametrize(
    "shape, solver, names",
    [
        ((2, 20, 30), "auto", ["sort_kernel"]),
        ((2, 20, 30), "select", ["select_kernel"]),
        ((1, 60, 70), "auto", ["select_kernel"]),
        ((1, 60, 70), "sort", ["sort_kernel"]),
        ((1, 96, 100), "auto", ["narrow_bracket_kernel", "select_kernel"]),
    ],
)
def test_number_of_launches(rng, launches, device, shape, solver, names):
    logits, target = labelled(shape, 5, device=device)
    x = logits.requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend="triton", solver=solver)
    assert launches == ["softmax_losses_kernel", *names]
    launches.clear()
    loss.backward()
    assert launches == ["logits_gradient_kernel"]


def test_on_the_device_of_the_tensor(rng, monkeypatch, device):
    seen = []
    original = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor.device) or original(tensor))
    logits, target = labelled((1, 20, 30), 5, device=device)
    lmp_triton.loss_max_pooling(logits.requires_grad_(), target, ignore_index=255, backend="triton").backward()
    assert seen == [logits.device] * 3


@pytest.mark.skipif(not CUDA, reason="kernels are compiled on a GPU only")
def test_no_new_kernel_for_a_new_value(rng, device):
    from lmp_triton.kernels import cross_entropy, gradient, select

    def compiled():
        kernels = (
            cross_entropy.softmax_losses_kernel,
            select.narrow_bracket_kernel,
            select.select_kernel,
            gradient.logits_gradient_kernel,
        )
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def run(p, ratio, ignore_index, shape):
        logits, target = labelled(shape, 19, device=device, ignore_index=ignore_index)
        lmp_triton.loss_max_pooling(
            logits.requires_grad_(), target, p=p, ratio=ratio, ignore_index=ignore_index, backend="triton"
        ).backward()

    run(1.3, 0.25, 255, (2, 96, 96))
    before = compiled()
    for arguments in (
        (1.0, 1.0, -1, (2, 96, 96)),
        (1.7, 0.1, -100, (3, 112, 128)),
        (float("inf"), 0.5, 254, (5, 128, 160)),
    ):
        run(*arguments)
    assert compiled() == before
