"""What goes wrong around a call: a rank dies, memory or the compiler's cache is gone, threads, forks. Nothing hangs."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
import torch.distributed as dist
from support import CUDA, labelled

import lmp_triton

RANK = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
import lmp_triton
from lmp_triton import distributed

rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
limit = datetime.timedelta(seconds=8)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=limit)
add, calls = distributed.sum_of_integers, []

def dies(*arguments):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), getattr(signal, how))
    return add(*arguments)

if rank == 1:
    distributed.sum_of_integers = dies
logits, target = torch.randn(2, 5, 40), torch.randint(5, (2, 40))
print("calls", flush=True)
try:
    lmp_triton.loss_max_pooling(logits, target, scope="batch", group=dist.group.WORLD)
except RuntimeError as error:
    print("RuntimeError", str(error)[:200].replace(chr(10), " "), flush=True)
    os._exit(7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone(tmp_path, how):
    """Killed, or stopped, in the middle of a solve: the other one raises within the timeout of the group, 8 seconds."""
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), how], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said, _ = ranks[0].communicate(timeout=90)  # most of it to import torch
        assert ranks[0].returncode == 7 and "RuntimeError" in said, (ranks[0].returncode, said)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_out_of_memory_in_the_gradient_buffer(rng, monkeypatch, backend, device):
    """An exception, and the next call is as if nothing had happened."""
    if CUDA and backend == "eager":
        device = torch.device("cpu")
    logits, target = labelled((2, 9, 11), 5, device=device)

    def call():
        x = logits.clone().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
        return x, loss

    x, loss = call()
    loss.backward()
    y, again = call()
    shape = logits.shape
    full = torch.OutOfMemoryError("out of memory")

    def no_room(original):
        def allocate(*arguments, **options):
            out = original(*arguments, **options)
            if out.numel() == shape.numel():
                raise full
            return out

        return allocate

    with monkeypatch.context() as patch:
        for name in ("empty_like", "empty"):
            patch.setattr(torch, name, no_room(getattr(torch, name)))
        with pytest.raises(torch.OutOfMemoryError):
            again.backward()
    assert y.grad is None
    z, third = call()
    third.backward()
    assert torch.equal(z.grad, x.grad) and torch.equal(third, loss)


def test_threads_at_once(rng):
    """Eager; every thread gets what it gets alone. (The interpreter has one place for the number of the program.)"""
    batches = [labelled((2, 13, 17), 5) for _ in range(4)]

    def gradient(batch):
        x = batch[0].clone().requires_grad_()
        lmp_triton.loss_max_pooling(x, batch[1], ignore_index=255, backend="eager").backward()
        return x.grad

    expected, found = [gradient(batch) for batch in batches], {}

    def work(number):
        torch.set_num_threads(1)
        found[number] = [gradient(batches[number]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(expected):
        assert len(found[number]) == 10 and all(torch.equal(got, want) for got in found[number])


IN_A_PROCESS_WITHOUT_THE_INTERPRETER = {
    # Two threads launch at once: every launch is made, each kernel once compiled or twice, and not mixed up.
    "threads": """
        import threading, torch, lmp_triton
        from lmp_triton.perf.standin import StandIn
        errors = []
        def work(classes):
            try:
                for _ in range(20):
                    x, y = torch.empty(1, classes, 64, 64, requires_grad=True), torch.empty(1, 64, 64, dtype=torch.long)
                    lmp_triton.loss_max_pooling(x, y, backend="triton").backward()
            except Exception as error:
                errors.append(repr(error))
        with StandIn() as gpu:
            threads = [threading.Thread(target=work, args=(classes,)) for classes in (3, 3, 5)]
            [t.start() for t in threads]; [t.join() for t in threads]
            names = [launch.name for launch in gpu.launches]
        assert not errors, errors
        assert names.count("logits_gradient_kernel") == names.count("softmax_losses_kernel") == 60, names
        print("as it should")
    """,
    # The first use where Triton can't keep what it compiled: which folder, and no quiet fall back to eager.
    "cache": """
        import os, torch, lmp_triton
        os.environ["TRITON_CACHE_DIR"] = "/dev/null/cache"
        import triton
        from lmp_triton.perf.standin import StandIn
        x, y = torch.empty(1, 3, 64, 64), torch.empty(1, 64, 64, dtype=torch.long)
        with StandIn():
            try:
                lmp_triton.loss_max_pooling(x, y, backend="triton")
            except OSError as error:
                assert "/dev/null/cache" in str(error), error
                print("as it should")
    """,
    # The first launch where there is no C compiler for Triton's launcher.
    "compiler": """
        import torch, lmp_triton
        from lmp_triton.perf.standin import StandIn
        def no_compiler(self, source, metadata):
            import inspect, shutil, triton.runtime.build as build
            shutil.which = lambda name: None
            needed = [x for x in inspect.signature(build._build).parameters.values() if x.default is x.empty]
            build._build("launcher", "x.c", "/tmp", *[[]] * (len(needed) - 3))
        x, y = torch.empty(1, 3, 64, 64), torch.empty(1, 64, 64, dtype=torch.long)
        StandIn.launcher_cls = no_compiler
        with StandIn():
            try:
                lmp_triton.loss_max_pooling(x, y, backend="triton")
            except RuntimeError as error:
                assert "C compiler" in str(error), error
                print("as it should")
    """,
}


@pytest.mark.skipif(CUDA, reason="on a GPU that is not there")
@pytest.mark.parametrize("what", IN_A_PROCESS_WITHOUT_THE_INTERPRETER)
def test_on_a_gpu_that_is_not_there(tmp_path, what):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CC")}
    code = textwrap.dedent(IN_A_PROCESS_WITHOUT_THE_INTERPRETER[what])
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "as it should", result.stdout + result.stderr[-3000:]


IN_WHICH_ORDER = {
    "Triton first": """
        import os, torch, triton, lmp_triton
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            lmp_triton.pool_losses(torch.rand(1, 9), backend="triton")
        except ValueError as error:
            assert "TRITON_INTERPRET=1 was not set when Triton was imported" in str(error), error
        assert lmp_triton.pool_losses(torch.rand(1, 9)).isfinite()
        try:
            import lmp_triton.kernels
        except ImportError as error:
            print(error)
    """,
    "kernels first": """
        import os, torch, lmp_triton.kernels
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            lmp_triton.pool_losses(torch.rand(1, 9), backend="triton")
        except ValueError as error:
            print(error)
    """,
    "taken back": """
        import os
        os.environ["TRITON_INTERPRET"] = "1"
        import torch, triton, lmp_triton
        del os.environ["TRITON_INTERPRET"]
        try:
            lmp_triton.pool_losses(torch.rand(1, 9), backend="triton")
        except ImportError as error:
            print(error)
    """,
}


@pytest.mark.parametrize("order", IN_WHICH_ORDER)
def test_the_interpreter_is_asked_for_before_triton_is_imported(order):
    """Otherwise the message says so; "0 active drivers" was Triton's."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(IN_WHICH_ORDER[order])]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    says = (
        "was not set when Triton was imported" if order == "kernels first" else "was changed after Triton was imported"
    )
    assert says in result.stdout, result.stdout + result.stderr[-2000:]


class Pooled(torch.utils.data.Dataset):
    """Pools in the worker that loads, as hard-example mining does."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        losses = torch.arange(200.0).add(index).view(1, -1).log1p()
        return lmp_triton.pool_losses(losses, backend="eager").detach()


@pytest.mark.parametrize("used", [False, True])
def test_forked_workers(tmp_path, used):
    """DataLoader's workers, forked after the import, before or after the first use in the process they come from."""
    code = f"""
import multiprocessing, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import lmp_triton
from test_drills import Pooled
data = Pooled()
if {used}:
    data[0]
    x = torch.randn(2, 19, 200, 200, requires_grad=True)  # large enough for all of PyTorch's threads
    lmp_triton.loss_max_pooling(x, torch.randint(19, (2, 200, 200)), backend="eager").backward()
options = dict(batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
found = list(torch.utils.data.DataLoader(data, **options))
assert all(torch.equal(a, data[i]) for i, a in enumerate(found)) and len(found) == 4
print("as it should")
"""
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert result.stdout.strip() == "as it should", result.stderr[-3000:]
    assert time.monotonic() - start < 170
