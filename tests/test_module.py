"""LossMaxPooling is the function with its options fixed, and behaves as a module does."""

import copy
import pickle

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import LossMaxPooling


def test_same_as_the_function(rng, backend, device):
    logits, target = labelled((2, 8, 9), 5, device=device)
    weight = torch.rand(5, device=device)
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1, "scope": "batch", "backend": backend}
    criterion = LossMaxPooling(1.7, 0.5, **options)
    assert criterion(logits, target) == lmp_triton.loss_max_pooling(logits, target, p=1.7, ratio=0.5, **options)
    criterion.p = 3.0
    assert criterion(logits, target) == lmp_triton.loss_max_pooling(logits, target, p=3.0, ratio=0.5, **options)


def test_weight_is_a_buffer():
    criterion = LossMaxPooling(weight=torch.ones(3))
    assert criterion.to("meta").weight.device.type == "meta"
    assert list(criterion.state_dict()) == ["weight"]
    assert not list(LossMaxPooling().state_dict())


def test_weight_comes_back_from_a_checkpoint(tmp_path):
    criterion = LossMaxPooling(weight=torch.rand(3))
    torch.save(criterion.state_dict(), tmp_path / "checkpoint")
    fresh = LossMaxPooling(weight=torch.ones(3))
    fresh.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    assert torch.equal(fresh.weight, criterion.weight)


def test_p_and_ratio_follow_the_module():
    """To another device, but not to a type that would round them; they are options, not state."""
    criterion = torch.nn.Sequential(LossMaxPooling(torch.tensor(1.3), torch.tensor(0.3), weight=torch.ones(3)))
    assert list(criterion.state_dict()) == ["0.weight"]
    p, ratio = criterion[0].p, criterion[0].ratio
    criterion.to(torch.bfloat16).half()
    assert criterion[0].p is p and criterion[0].ratio is ratio and ratio == torch.tensor(0.3)
    assert criterion[0].weight.dtype == torch.float16
    criterion.to("meta")
    assert criterion[0].p.is_meta and criterion[0].ratio.is_meta and criterion[0].ratio.dtype == torch.float32
    assert "p=tensor, ratio=tensor" in repr(criterion)
    criterion[0].ratio = 0.5  # a float may take the place of a tensor, and the other way round
    assert criterion.float()[0].ratio == 0.5


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_cuda_takes_everything_along(rng):
    logits, target = labelled((2, 8, 9), 5, device="cuda")
    criterion = LossMaxPooling(torch.tensor(1.3), torch.tensor(0.3), weight=torch.rand(5), ignore_index=255).cuda()
    assert criterion(logits, target).isfinite()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input(rng, backend):
    for device in ("cuda:0", "cuda:1"):
        logits, target = labelled((2, 8, 9), 5, device=device)
        x = logits.requires_grad_()
        loss = LossMaxPooling(ignore_index=255, backend=backend)(x, target)
        loss.backward()
        assert loss.device == x.grad.device == torch.device(device)


def test_copies(rng, backend, device):
    logits, target = labelled((2, 8, 9), 3, device=device)
    criterion = LossMaxPooling(
        1.7, torch.tensor(0.3), weight=torch.rand(3), ignore_index=255, reduction="sum", backend=backend
    ).to(device)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(twin) == repr(criterion) and torch.equal(twin.weight, criterion.weight)
        assert twin(logits, target) == criterion(logits, target)
        twin.ratio.fill_(1.0)
        assert criterion.ratio == torch.tensor(0.3)  # nothing shared


def test_functional_call(rng, backend, device):
    logits, target = labelled((2, 8, 9), 5, device=device)
    conv = torch.nn.Conv2d(5, 5, 1).to(device)
    model = torch.nn.ModuleDict({"conv": conv, "loss": LossMaxPooling(weight=torch.ones(5), backend=backend)})
    model.to(device).forward = lambda x, y: model["loss"](model["conv"](x), y)
    others = {name: torch.rand_like(x).requires_grad_("conv" in name) for name, x in model.state_dict().items()}
    loss = torch.func.functional_call(model, others, (logits, target.clamp_max(4)))
    loss.backward()
    model.load_state_dict(others)
    expected = model(logits, target.clamp_max(4))
    expected.backward()
    assert loss == expected and torch.equal(others["conv.weight"].grad, conv.weight.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(rng, backend, device, use_reentrant):
    """Of the head and the loss: the second forward finds the same as the first."""
    features, target = labelled((2, 8, 9), 6, device=device)
    conv = torch.nn.Conv2d(6, 5, 1).to(device)
    criterion = LossMaxPooling(ignore_index=255, backend=backend)
    target = target.where(target < 5, 255)

    def gradients(run):
        conv.zero_grad()
        x = features.clone().requires_grad_()
        loss = run(lambda x: criterion(conv(x), target), x)
        loss.backward()
        return loss, x.grad, conv.weight.grad

    def checkpointed(step, x):
        return torch.utils.checkpoint.checkpoint(step, x, use_reentrant=use_reentrant)

    for a, b in zip(gradients(checkpointed), gradients(lambda step, x: step(x)), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation(rng, backend, device):
    """With scope="image" and as many images in each, micro-batches add up to the batch."""
    features, target = labelled((4, 6, 7), 5, device=device)
    conv = torch.nn.Conv2d(5, 5, 1).to(device)
    criterion = LossMaxPooling(ignore_index=255, backend=backend)
    criterion(conv(features), target).backward()
    expected = conv.weight.grad.clone()
    conv.zero_grad()
    for x, y in zip(features.split(2), target.split(2), strict=True):
        (criterion(conv(x), y) / 2).backward()
    torch.testing.assert_close(conv.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_repr():
    assert repr(LossMaxPooling(ignore_index=255)) == (
        "LossMaxPooling(p=1.3, ratio=0.25, weight=None, ignore_index=255, label_smoothing=0, scope='image', "
        "reduction='mean', backend='auto', solver='auto')"
    )


def test_bad_options_are_refused_at_once():
    for options in ({"p": 0.3}, {"ratio": 2.0}, {"scope": "x"}, {"weight": -torch.ones(2)}, {"label_smoothing": 2.0}):
        with pytest.raises(ValueError):
            LossMaxPooling(**options)
