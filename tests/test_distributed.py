"""Pooling over the ranks of a process group is pooling the concatenated batch, the same bits on every rank.

Real processes, over gloo: 1, 2 or 4 of them work through all cases, and bring back what the test compares.
"""

import contextlib
import datetime
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from support import labelled
from torch.utils._python_dispatch import TorchDispatchMode

import lmp_triton
from lmp_triton import settings

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

SPLITS = {1: [7], 2: [5, 2], 4: [3, 1, 0, 3]}
"""Images of each rank: uneven shards, and an empty one."""

FIELDS = ("loss", "weights", "grad", "loss_grad", *lmp_triton.PoolingStats._fields)


def cases():
    """Name → logits, target, options of the call. The same in every process: seeded."""
    torch.manual_seed(int(os.environ.setdefault("LMP_TEST_SEED", str(int.from_bytes(os.urandom(3), "little")))))
    logits, target = labelled((7, 6, 11), 5, scale=2)
    out = {"plain": (logits, target, {})}
    for name, options in (
        ("p = 1", {"p": 1.0}),
        ("p near 1", {"p": 1.001}),
        ("p = ∞", {"p": float("inf")}),
        ("ratio = 1", {"ratio": 1.0}),
        ("p and ratio as tensors", {"p": torch.tensor(1.7), "ratio": torch.tensor(0.4)}),
        ("class weights, smoothing", {"weight": torch.rand(5), "label_smoothing": 0.1}),
        ("sum", {"reduction": "sum"}),
        ("none", {"reduction": "none"}),
    ):
        out[name] = (logits, target, options)
    for name, images in (("ranks without a valid pixel", slice(4, None)), ("no valid pixel", slice(0, None))):
        ignored = target.clone()
        ignored[images] = 255
        out[name] = (logits, ignored, {})
    out["few positive losses"] = (torch.full_like(logits, -99.0).scatter_(1, target[:, None] % 5, 99.0), target, {})
    out["few positive losses"][0][0, :, 0, :3] = 0.0
    out["p = 1, m a whole number"] = (logits, target % 5, {"p": 1.0, "ratio": 0.5})
    out["a NaN"] = (logits.index_fill(0, torch.tensor(6), torch.nan), target, {})
    out["float64"] = (logits.double(), target, {"backend": "eager"})
    out["float16"] = (logits.half(), target, {})
    return out


def results_of(logits, target, options, backend, group=None):
    """Everything the public functions return for this rank's share: `FIELDS`."""
    options = {"backend": backend, "scope": "batch", "group": group, **options}
    cross_entropy = {"ignore_index": 255, **{k: options.pop(k) for k in ("weight", "label_smoothing") if k in options}}
    x = logits.clone().requires_grad_()
    loss, stats = lmp_triton.loss_max_pooling(x, target, **options, **cross_entropy, return_stats=True)
    (3 * loss).sum().backward()
    wide = torch.promote_types(x.dtype, torch.float32)
    ell = (logits[:, 0] - logits.new_tensor(0.5)).abs().to(wide).requires_grad_()
    pooled = lmp_triton.pool_losses(ell, target != 255, **options)
    pooled.sum().backward()
    options.pop("reduction", None)
    weights, weight_stats = lmp_triton.optimal_weights(ell, target != 255, **options)
    return {
        "loss": torch.stack([loss.detach().sum(), pooled.detach().sum()]),
        "weights": weights,
        "grad": x.grad,
        "loss_grad": ell.grad,
        **{k: torch.cat(v) for k, *v in zip(stats._fields, stats, weight_stats, strict=True)},
    }


def shares(tensor, world):
    return tensor.split(SPLITS[world])


def everything(rank, world, group):
    """What one rank brings back: (case, backend) → `results_of`, and the results of the other checks."""
    results = {}
    for name, (logits, target, options) in cases().items():
        for backend in ("eager", "triton") if "backend" not in options else ("eager",):
            if backend == "triton" and not settings.has_triton():
                continue
            share = shares(logits, world)[rank], shares(target, world)[rank]
            results[name, backend] = results_of(*share, options, backend, group)
    results["DDP"] = data_parallel(rank, world, group)
    if world == 4:  # two groups side by side, of two ranks each
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        logits, target, _ = cases()["plain"]
        share = shares(logits, world)[rank], shares(target, world)[rank]
        results["subgroup"] = results_of(*share, {}, "eager", groups[rank // 2])
        with pytest.raises(ValueError, match="not a member"):
            lmp_triton.pool_losses(torch.ones(3), scope="batch", group=groups[1 - rank // 2])
    if world == 2:
        for backend in ("eager", "triton") if settings.has_triton() else ("eager",):
            results["compiled", backend] = compiled(rank, group, backend)
            results["upsampled", backend] = upsampled(*(shares(x, world)[rank] for x in coarse()), backend, group)
    return results


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(5, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1))


def data_parallel(rank, world, group):
    """The gradients of a model after DDP's average, the loss multiplied by the world size."""
    images, target, _ = cases()["plain"]
    network = torch.nn.parallel.DistributedDataParallel(model(), process_group=group)
    logits = network(shares(images, world)[rank])
    loss = lmp_triton.loss_max_pooling(
        logits, shares(target, world)[rank], ignore_index=255, scope="batch", group=group
    )
    (loss * world).backward()
    return [p.grad for p in network.module.parameters()]


def compiled(rank, group, backend):
    """Loss and gradient of a compiled step."""
    logits, target, _ = cases()["plain"]
    x = shares(logits, 2)[rank].clone().requires_grad_()

    def step(x, target):
        return lmp_triton.loss_max_pooling(
            x * 1.0, target, ignore_index=255, scope="batch", group=group, backend=backend
        )

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, shares(target, 2)[rank])
    loss.backward()
    return loss.detach(), x.grad


def coarse():
    """Logits, and labels of a higher resolution."""
    torch.manual_seed(1)
    return torch.randn(7, 5, 3, 4), torch.randint(-1, 5, (7, 24, 29))


def upsampled(logits, target, backend, group=None):
    """Loss and gradient where the upsampling is fused in."""
    x = logits.clone().requires_grad_()
    options = {"ignore_index": -1, "label_smoothing": 0.1, "scope": "batch", "group": group, "backend": backend}
    loss = lmp_triton.upsampled_loss_max_pooling(x, target, **options)
    loss.backward()
    return loss.detach(), x.grad


def work(rank, world, folder):
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )
    torch.save(everything(rank, world, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def naming(what):
    """Says what was checked, with a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note(what)
        raise


def compare(results, expected, p=1.3):
    """The results of the ranks, the same bits, against those of one process on the concatenated batch.

    That may have used another solver. For p near 1 the weights of two that are right differ by up to q·2^-22·τ (the
    numerical contract), and a loss at α* may be saturated for one of them.
    """
    slack = p / (p - 1) * 2**-22 if 1 < p < 1.05 else 0.0
    for field in ("loss", *lmp_triton.PoolingStats._fields):
        for other in results[1:]:
            assert torch.equal(other[field].nan_to_num(-7), results[0][field].nan_to_num(-7)), field
    got = {
        field: torch.cat([r[field] for r in results]) if "grad" in field or field == "weights" else results[0][field]
        for field in FIELDS
    }
    sound = ~expected["alpha"].isnan()
    assert torch.equal(got["valid"], expected["valid"])
    assert ((got["saturated"] - expected["saturated"])[sound].abs() <= bool(slack)).all()
    eps = torch.finfo(expected["alpha"].dtype).eps
    for field in ("alpha", "tau"):
        torch.testing.assert_close(got[field], expected[field], rtol=2 * eps, atol=0, equal_nan=True)
    for field in ("loss", "total_weight"):
        torch.testing.assert_close(got[field], expected[field], rtol=8 * eps + slack, atol=0, equal_nan=True)
    tau = expected["tau"].nan_to_num(1.0).max().item()
    for field in ("weights", "loss_grad", "grad"):
        tolerance = 64 * torch.finfo(got[field].dtype).eps + slack
        torch.testing.assert_close(got[field], expected[field], rtol=tolerance, atol=tolerance * tau, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", SPLITS)
def test_as_one_process(tmp_path, world):
    all_cases = cases()  # fixes the seed, which the processes inherit
    torch.multiprocessing.spawn(work, (world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    for name, backend in (key for key in ranks[0] if key[0] in all_cases):
        logits, target, options = all_cases[name]
        expected = results_of(logits, target, options, backend)
        results = [r[name, backend] for r in ranks]
        with naming(f"{name}, {backend}"):
            compare(results, expected, float(options.get("p", 1.3)))
            if name == "no valid pixel":
                assert not expected["loss"].any() and not expected["grad"].any()
            elif name == "a NaN":
                assert all(r["loss"][0].isnan() for r in results)
            else:
                assert (expected["loss"] > 0).all()

    logits, target, _ = all_cases["plain"]
    with naming("DDP averages; times the world size it is the gradient of the global loss"):
        network = model()
        lmp_triton.loss_max_pooling(network(logits), target, ignore_index=255, scope="batch").backward()
        for r in ranks:
            for got, parameter in zip(r["DDP"], network.parameters(), strict=True):
                torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)

    if world == 4:
        for pair, images in ((slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 7))):
            with naming("two groups side by side"):
                compare([r["subgroup"] for r in ranks[pair]], results_of(logits[images], target[images], {}, "eager"))

    if world == 2:
        for r in ranks:
            for backend in ("eager", "triton") if settings.has_triton() else ("eager",):
                with naming(f"compiled, {backend}"):
                    loss, grad = r["compiled", backend]
                    torch.testing.assert_close(loss, r["plain", "eager"]["loss"][0], rtol=2e-6, atol=0)
                    torch.testing.assert_close(3 * grad, r["plain", "eager"]["grad"], rtol=1e-4, atol=1e-7)
        for backend in ("eager", "triton") if settings.has_triton() else ("eager",):
            with naming(f"upsampled, {backend}"):
                losses, grads = zip(*(r["upsampled", backend] for r in ranks), strict=True)
                expected, grad = upsampled(*coarse(), backend)
                assert torch.equal(*losses)
                torch.testing.assert_close(losses[0], expected, rtol=1e-6, atol=0)
                torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())


@pytest.mark.slow
def test_example(tmp_path):
    """The example under torchrun: its own check against one process passes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lmp_triton.examples.distributed"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the same loss as one process") == 2, result.stdout


@pytest.fixture
def group(tmp_path):
    """A group of this one process: all of the code, but nobody to wait for."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Counts what is sent."""

    def __init__(self):
        super().__init__()
        self.count, self.elements = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.count += 1
            self.elements += sum(t.numel() for t in torch.utils._pytree.tree_leaves(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 5), (torch.float64, 8)])
@pytest.mark.parametrize("images", [0, 3])
def test_number_of_collectives(rng, group, dtype, expected, images):
    """Fixed, whatever the input: a rank that left one out would leave the others waiting."""
    logits, target = labelled((images, 8, 9), 5, dtype)
    x = logits.requires_grad_()
    for values in (logits, logits.detach().fill_(0), logits.detach().fill_(torch.nan)):
        with Collectives() as forward:
            loss = lmp_triton.loss_max_pooling(values, target, ignore_index=255, scope="batch", group=group)
        assert forward.count == expected
        assert forward.elements < expected * 5000
    x = torch.randn_like(logits).requires_grad_()
    loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, scope="batch", group=group)
    with Collectives() as backward:
        loss.backward()
    assert backward.count == 0 and x.grad.shape == x.shape


def test_no_group_no_collective(rng, group):
    logits, target = labelled((2, 8, 9), 5)
    with Collectives() as seen:
        lmp_triton.loss_max_pooling(logits, target, ignore_index=255, scope="batch")
    assert seen.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_of_one(rng, group, backend, dtype):
    """As without a group, where on a CPU another search runs; and as a module."""
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("the kernels take no float64")
    logits, target = labelled((3, 8, 9), 5, dtype)
    expected = results_of(logits, target, {}, backend)
    got = results_of(logits, target, {}, backend, group)
    compare([got], expected)
    criterion = lmp_triton.LossMaxPooling(ignore_index=255, scope="batch", backend=backend, group=group)
    assert criterion(logits, target) == got["loss"][0]


def test_empty_share(group, backend):
    """A rank without an image takes part and gets a gradient of its own shape."""
    logits = torch.randn(0, 5, 8, 9, requires_grad=True)
    target = torch.zeros(0, 8, 9, dtype=torch.long)
    options = {"scope": "batch", "group": group, "backend": backend}
    loss, stats = lmp_triton.loss_max_pooling(logits, target, **options, return_stats=True)
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape and stats.valid == 0 and stats.total_weight == 0
    weights, _ = lmp_triton.optimal_weights(torch.zeros(0), **options)
    assert weights.shape == (0,)


def test_errors(group):
    losses = torch.ones(3)
    for options, error, says in (
        ({"group": group, "scope": "image"}, ValueError, 'goes with scope="batch"'),
        ({"group": "world"}, TypeError, "must be a torch.distributed.ProcessGroup or None, got str"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, ValueError, "not a member of"),
        ({"group": group, "solver": "sort", "backend": "triton"}, ValueError, 'with a group it must be "auto"'),
    ):
        if options.get("backend") == "triton" and not settings.has_triton():
            continue
        with pytest.raises(error, match=says):
            lmp_triton.pool_losses(losses[None], **{"scope": "batch", **options})


def test_fixed_point():
    """Read from a tensor or a number: the same, and no sum overflows."""
    from lmp_triton.search import fixed_point

    for length in (0, 1, 2, 3, 4, 1023, 1024, 2**31 + 5, 2**40 - 1, 2**61):
        scale = fixed_point(length, torch.device("cpu"), torch.float64)
        assert scale == fixed_point(torch.tensor(length), torch.device("cpu"), torch.float64).item()
        assert int(scale) * length < 2**63
