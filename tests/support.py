"""What several tests share: the machine they run on, inputs, the oracle, every way to a solution."""

import contextlib
import importlib

import pytest
import torch

import lmp_triton
from lmp_triton import reference

CUDA = torch.cuda.is_available()

SOLVERS = {
    "eager": {},
    "select": {},
    "select, narrowed": {"select": {"block": 256, "capacity": 16, "passes": (10, 200)}},
    "select, cooperative": {"select": {"block": 256, "capacity": 16, "sorted": 4, "passes": (10, 200)}},
    "sort": {"sort": {"run": 1024, "lanes": 16}},
    "sort, runs": {"sort": {"run": 128, "lanes": 4}},
}
"""Every way to a solution, with block sizes that send some hundred losses through all of it."""


def solve(losses, p=1.3, ratio=0.25, **options):
    """Loss, weights and statistics by `pool_losses`, whose gradient the weights are."""
    x = losses.detach().clone().requires_grad_()
    loss, stats = lmp_triton.pool_losses(x, p=p, ratio=ratio, return_stats=True, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, stats


@contextlib.contextmanager
def cut_small(threads, images=600):
    """Passes of the eager backend over a hundred numbers go by as many slices and blocks as over millions.

    With one or two threads by NumPy, with more by PyTorch; images: elements of a temporary of whole images.
    """
    from lmp_triton import host, host_search, slices

    limits = {
        slices: {"GRAIN": 48, "CACHE": 160, "WHOLE": 200, "IMAGES": images},
        host: {"BLOCK": 32, "COUNTED": 50},
        host_search: {"SORTED_LENGTH": 16},
    }
    before = {module: {name: getattr(module, name) for name in names} for module, names in limits.items()}
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for module, values in limits.items():
            vars(module).update(values)
        yield
    finally:
        torch.set_num_threads(threads_before)
        for module, values in before.items():
            vars(module).update(values)


def oracle(losses, p, ratio):
    """The float64 solution for a vector of float32 losses."""
    ell = losses.detach().double().cpu().numpy()
    return reference.solve(ell, reference.support(ell.size, ratio), p)


def labelled(shape, classes, dtype=torch.float32, device="cpu", ignored=0.1, ignore_index=255, scale=1.0):
    """Random logits (N, C, *spatial) and target (N, *spatial), some of it ignored."""
    n, *spatial = shape
    logits = (scale * torch.randn(n, classes, *spatial)).to(dtype).to(device)
    target = torch.randint(classes, (n, *spatial))
    target[torch.rand(target.shape) < ignored] = ignore_index
    return logits, target.to(device)


class Later:
    """A module that is imported when a test first uses it: for what is slow to import.

    The test is skipped where one of the packages that the module needs is not installed.
    """

    def __init__(self, name, *needs):
        self._name, self._needs = name, needs

    def __getattr__(self, attribute):
        for package in self._needs:
            pytest.importorskip(package)
        return getattr(importlib.import_module(self._name), attribute)
