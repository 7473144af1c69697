"""No kernel touches what is not its own: addresses and their order, watched in the interpreter (tests/watch.py)."""

import pytest
import torch
from support import CUDA, SOLVERS, labelled

import lmp_triton
from lmp_triton import settings

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(CUDA, reason="watches the interpreter; compute-sanitizer does so on a GPU")

import triton.language as tl  # noqa: E402
from watch import watching  # noqa: E402

LAYOUTS = ("contiguous", "channels_last", "cropped", "offset", "expanded", "every other row")


def laid_out(logits, layout):
    """The same values, lying otherwise in memory."""
    if layout == "contiguous":
        return logits
    if layout == "channels_last":
        return logits.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded":
        return logits[:1].expand(logits.shape)
    first, last = (1, 1) if layout == "offset" else (0, 3)
    step = 2 if layout == "every other row" else 1
    around = torch.full((*logits.shape[:2], step * logits.shape[2] + 1, logits.shape[3] + first + last), torch.nan)
    view = around.to(logits.dtype)[:, :, : step * logits.shape[2] : step, first : first + logits.shape[3]]
    return view.copy_(logits)


def watched(logits, target, **options):
    """Forward and backward, watched; the inputs are what they were. Returns the loss, the gradient and the watch."""
    kept = logits.clone(), target.clone()
    logits = logits.detach().requires_grad_()
    with watching(read_only=(logits, target)) as watch:
        loss = lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend="triton", **options)
        loss.backward()
    assert watch.launches >= 3 - ("forward" in settings.cooperative()) and watch.accesses
    assert torch.equal(logits, kept[0]) and torch.equal(target, kept[1])
    assert logits.grad.isfinite().all() and loss.isfinite()
    return loss.detach(), logits.grad, watch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 5, 33])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 33)])
def test_logits_in_every_layout(rng, layout, classes, size):
    logits, target = labelled((2, *size), classes, dtype=torch.bfloat16 if classes == 5 else torch.float32)
    x = laid_out(logits, layout)
    loss, grad, _watch = watched(x, target)
    y = x.detach().contiguous().float().requires_grad_()
    expected = lmp_triton.loss_max_pooling(y, target, ignore_index=255, backend="eager")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.float(), y.grad, rtol=2e-2 if classes == 5 else 1e-4, atol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [3, 33])  # at once; in chunks, the last one not full
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weights_and_smoothing(rng, layout, classes, smoothing):
    logits, target = labelled((3, 5, 7), classes)
    weight = torch.rand(classes).index_fill_(0, torch.tensor(1), 0.0)
    options = {"label_smoothing": smoothing}
    kept = weight.clone()
    watched(laid_out(logits, layout), target.to(torch.uint8), weight=weight, **options)
    if smoothing:
        watched(laid_out(logits, layout), target, **options)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "eager"])
@pytest.mark.parametrize("length", [1, 256, 700])
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_every_solver(rng, monkeypatch, configure, name, length, p):
    """Losses with ties and zeros, masked; pool_losses and optimal_weights."""
    configure(**SOLVERS[name])
    if "cooperative" in name:
        monkeypatch.setenv(settings.COOPERATIVE, "solve")
    losses = torch.randn(2, length).mul(2).exp().round(decimals=1)
    mask, solver = torch.rand(2, length) < 0.8, name.split(",")[0]
    kept = losses.clone(), mask.clone()
    x = losses.detach().requires_grad_()
    with watching(read_only=(x, mask)) as watch:
        lmp_triton.pool_losses(x, mask, p=p, reduction="sum", backend="triton", solver=solver).backward()
        weights, _stats = lmp_triton.optimal_weights(losses, mask, p=p, backend="triton", solver=solver)
    assert watch.launches >= 5 and torch.equal(losses, kept[0]) and torch.equal(mask, kept[1])
    torch.testing.assert_close(x.grad, weights)


@pytest.mark.parametrize("cooperative", settings.WAYS)
def test_passes_and_cooperative_launches(rng, monkeypatch, configure, cooperative):
    """Every phase of the search, also one with nothing to do: passes for a bracket that holds few losses already."""
    monkeypatch.setenv(settings.COOPERATIVE, cooperative)
    for capacity in (4, 4096):
        select = {"block": 256, "capacity": capacity, "solve_block": 128, "passes": (10, 200)}
        configure(select=select, forward_solve_block=128, stream={"block": 256})
        logits, target = labelled((2, 20, 31), 5)
        loss, *_ = watched(logits, target, solver="select")
        expected = lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend="eager")
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("length", [300, 511])
def test_a_list_that_overflows(rng, configure, length):
    """Many equal losses: the short list is full, and the last program walks all losses of its segment."""
    configure(select={"block": 256, "capacity": 16, "solve_block": 128, "passes": ()})
    losses = torch.full((2, length), 0.7).index_fill(1, torch.arange(9), 3.0)
    with watching(read_only=(losses,)):
        loss = lmp_triton.pool_losses(losses, p=1.0, reduction="none", backend="triton", solver="select")
    torch.testing.assert_close(loss, lmp_triton.pool_losses(losses, p=1.0, reduction="none", backend="eager"))


# Kernels that do what must not be done, each in one way: the watch sees it.


@triton.jit
def copy(source, out, n, LEFT: tl.constexpr, RIGHT: tl.constexpr, INTO: tl.constexpr, BLOCK: tl.constexpr):
    """LEFT, RIGHT: how far the mask of the load is off; INTO: that of the store."""
    index = tl.arange(0, BLOCK) - LEFT
    x = tl.load(source + index, mask=(index >= -LEFT) & (index < n + RIGHT), other=0.0)
    tl.store(out + index, x, mask=(index >= 0) & (index < n + INTO))


@triton.jit
def hand_over(data, ticket, out, SEM: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Every program writes a word; the one with the last ticket adds them up."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(data + program, program + 1)
    if BEFORE:
        tl.debug_barrier()
    mine = tl.atomic_add(ticket, 1, sem=SEM)
    if AFTER:
        tl.debug_barrier()
    if mine == programs - 1:
        total = 0
        for other in range(programs):
            total += tl.load(data + other)
        tl.store(out, total)


@triton.jit
def through_memory(data, out, BARRIER: tl.constexpr):
    tl.store(data, 5)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out, tl.load(data))


@triton.jit
def all_write(out, SAME: tl.constexpr):
    tl.store(out, 7 if SAME else tl.program_id(0))


def fails(say, launch, *tensors_to_read):
    with pytest.raises(Exception, match=say), watching(read_only=tensors_to_read):
        launch()


@pytest.mark.parametrize(
    "left, right, into, say",
    [
        (0, 0, 0, None),
        (1, 0, 0, "reads element -1, which is none"),
        (0, 1, 0, "reads element 11, which is none"),
        (0, 0, 1, "writes element 11, which is none"),
    ],
)
def test_the_watch_sees_masks_that_are_off(left, right, into, say):
    around = torch.arange(13.0), torch.zeros(13)
    source, out = (x[1:12] for x in around)

    def launch():
        copy[(1,)](source, out, 11, left, right, into, 16)

    if say is None:
        with watching(read_only=(source,)):
            launch()
        assert torch.equal(out, source) and not out.isnan().any()
    else:
        fails(say, launch, source)


def test_the_watch_sees_what_is_not_an_element():
    """Between the rows of a view; in a tensor that may only be read."""
    rows, out = torch.zeros(4, 8)[:, :5], torch.zeros(16)
    fails("reads element 5, which is none", lambda: copy[(1,)](rows, out, 16, 0, 0, 0, 16))
    one = torch.zeros(16)
    fails("writes, but may only read", lambda: copy[(1,)](torch.ones(16), one, 16, 0, 0, 0, 16), one)


@pytest.mark.parametrize(
    "sem, before, after, say",
    [
        ("acq_rel", True, True, None),
        ("relaxed", True, True, "reads, unordered, what another one writes"),
        ("acquire", True, True, "reads, unordered, what another one writes"),
        ("release", True, True, "reads, unordered, what another one writes"),
        ("acq_rel", False, True, "releases without a barrier"),
        ("acq_rel", True, False, "reads without a barrier after an acquire"),
    ],
)
def test_the_watch_sees_what_is_not_ordered(sem, before, after, say):
    data, ticket, out = (torch.zeros(n, dtype=torch.int32) for n in (4, 1, 1))

    def launch():
        hand_over[(4,)](data, ticket, out, sem, before, after)

    if say is None:
        with watching():
            launch()
        assert out.item() == 10
    else:
        fails(say, launch)


def test_the_watch_sees_threads_that_do_not_wait_for_each_other():
    data, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with watching():
        through_memory[(1,)](data, out, True)
    fails("reads without a barrier what its own threads stored", lambda: through_memory[(1,)](data, out, False))
    with watching():
        all_write[(3,)](out, True)
    fails("writes, unordered, what another one writes", lambda: all_write[(3,)](out, False))
