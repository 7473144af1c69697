"""One machine, two ways: with a GPU the kernels run on it, without one in Triton's interpreter on the CPU."""

import contextlib
import os
import sys
from pathlib import Path

import torch

# `python -m pytest` puts the checkout first, where the folder kernels/ hides the package of that name from PyPI.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parents[1].resolve()]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from support import CUDA, SOLVERS  # noqa: E402

from lmp_triton import settings  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # what goes into the loss is compared in float32
torch.set_num_threads(1)  # the shapes are small, and pytest-xdist uses the cores

# Dynamo takes down PyTorch's functions when it first runs: before `poisoned_allocations` replaces some of them.
torch.compile(torch.neg, backend="eager")(torch.ones(1))
torch._dynamo.reset()


if not CUDA and settings.has_triton():
    import interpreter

    interpreter.speed_up()


def pytest_collection_modifyitems(items):
    for item in items:
        params = set(map(str, item.callspec.params.values())) if hasattr(item, "callspec") else set()
        if not settings.has_triton() and params & {"triton", *SOLVERS} - {"eager"}:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed on this platform"))


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def configure():
    """Other entries in the table of configurations for this test: configure(select={"block": 256})."""
    with contextlib.ExitStack() as until_the_end:

        def use(**changes):
            from lmp_triton.kernels import configs

            table = configs.table_for(0)
            for name, change in changes.items():
                changed = getattr(table, name)._replace(**change) if isinstance(change, dict) else change
                table = table._replace(**{name: changed})
            until_the_end.enter_context(configs.using(table))

        yield use


@pytest.fixture(params=SOLVERS)
def solver(request, monkeypatch, configure):
    """Options of a call that takes this way."""
    if request.param == "eager":
        return {"backend": "eager"}
    if not CUDA:  # there, block sizes are what they are in use
        configure(**SOLVERS[request.param])
    if "cooperative" in request.param:
        monkeypatch.setenv(settings.COOPERATIVE, "solve")
    return {"backend": "triton", "solver": request.param.split(",")[0]}


@pytest.fixture
def device():
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(autouse=True)
def poisoned_allocations(request, monkeypatch):
    """Fresh memory holds NaN, or 0x7F bytes: what a kernel forgets to write shows.

    Not in tests marked "traced": a tracer can't take the replaced functions, or would remember them for later tests.
    """
    if request.node.get_closest_marker("traced"):
        return

    def poison(tensor):
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        with torch.no_grad():
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 0x7F)

    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: poison(original(*a, **k)))


@pytest.fixture
def rng():
    """Fresh random inputs on every run; the seed is printed with a failure."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)
