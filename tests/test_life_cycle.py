"""A LossMaxPooling lives through what happens to modules: built without memory, copied, cast, shared, saved, loaded."""

import copy
import io
import pickle

import pytest
import torch
from support import labelled
from torch import nn

import lmp_triton
from lmp_triton import LossMaxPooling

WEIGHT = [1.0, 0.5, 2.0]


class Model(nn.Module):
    """A criterion inside a model, as frameworks build them; whatever is a tensor is made in the constructor."""

    def __init__(self, ratio=0.25):
        super().__init__()
        self.criterion = LossMaxPooling(ratio=ratio, weight=torch.tensor(WEIGHT), ignore_index=255)
        self.plain = nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT))


@pytest.fixture
def data(rng):
    return labelled((2, 6, 7), 3)


def test_built_on_meta(data):
    """As nn.CrossEntropyLoss builds; then given memory and a state."""
    expected = Model()
    with torch.device("meta"):
        model = Model()
    assert model.criterion.weight.is_meta and model.plain.weight.is_meta
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert model.criterion(*data) == expected.criterion(*data)
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(expected.state_dict(), assign=True)
    assert model.criterion(*data) == expected.criterion(*data)


def test_ratio_on_meta(data):
    """It has no value, is not in the state, and never passes for one; a number or a tensor on the CPU survives."""
    with torch.device("meta"):
        lost = LossMaxPooling(ratio=torch.tensor(0.25))
        kept = LossMaxPooling(ratio=torch.tensor(0.25, device="cpu"))
    assert "ratio=tensor" in repr(lost)
    with pytest.raises(
        ValueError, match="ratio is on meta, but the input is on cpu: it was made there and has no value"
    ):
        lost(*data)
    for module in (lost.to_empty(device="cpu"), copy.deepcopy(lost)):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got nan"):
            module(*data)
    lost.ratio = torch.tensor(0.25)
    kept.to_empty(device="cpu")
    data[1].clamp_(max=2)
    assert lost(*data) == kept(*data) == LossMaxPooling()(*data)


def test_accelerate(data):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=True):
        model = Model(ratio=torch.tensor(0.25, device="cpu"))
    assert model.criterion.weight.is_meta
    model.to_empty(device="cpu").load_state_dict(Model().state_dict())
    assert model.criterion(*data) == Model().criterion(*data)


def test_from_pretrained(data, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Pretrained(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Conv2d(3, 3, 1)
            self.model = Model()
            self.post_init()

        def _init_weights(self, module):
            pass

    model = Pretrained(transformers.PretrainedConfig())
    model.model.criterion.weight.mul_(3)
    model.save_pretrained(tmp_path)
    loaded = Pretrained.from_pretrained(tmp_path)
    assert loaded.model.criterion(*data) == model.model.criterion(*data)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(data, clone):
    module = LossMaxPooling(ratio=torch.tensor(0.3), weight=torch.tensor(WEIGHT), ignore_index=255)
    twin = clone(module)
    assert twin(*data) == module(*data) and repr(twin) == repr(module)
    if clone is not copy.copy:
        twin.weight.zero_()
        twin.ratio.fill_(1.0)
        assert module.weight.any() and module.ratio != 1


def test_half_keeps_parameters(data):
    module = LossMaxPooling(p=torch.tensor(1.3), weight=torch.tensor(WEIGHT), ignore_index=255).half()
    assert module.weight.dtype == torch.float16 and module.p.dtype == torch.float32
    expected = LossMaxPooling(weight=torch.tensor(WEIGHT), ignore_index=255)(*data)  # the weights are halves
    torch.testing.assert_close(module(*data), expected)


def test_share_memory_and_save(data):
    module = LossMaxPooling(weight=torch.tensor(WEIGHT), ignore_index=255).share_memory()
    assert module.weight.is_shared()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = LossMaxPooling(weight=torch.ones(3), ignore_index=255)
    other.load_state_dict(torch.load(file))
    assert other(*data) == module(*data)


def test_state_is_that_of_cross_entropy(data):
    """Both ways: a checkpoint survives the change of the criterion."""
    pooled, plain = (
        LossMaxPooling(weight=torch.tensor(WEIGHT), ignore_index=255),
        nn.CrossEntropyLoss(weight=torch.ones(3)),
    )
    plain.load_state_dict(pooled.state_dict())
    assert plain.weight.tolist() == WEIGHT
    pooled.load_state_dict(nn.CrossEntropyLoss(weight=torch.ones(3)).state_dict())
    assert pooled(*data) == LossMaxPooling(weight=torch.ones(3), ignore_index=255)(*data)


def test_with_a_process_group(tmp_path):
    """Copies share it (Lightning's and EMA's deepcopy); what leaves the process can't take it along, and says so."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = LossMaxPooling(scope="batch", group=dist.group.WORLD, weight=torch.tensor(WEIGHT))
        for twin in (copy.copy(module), copy.deepcopy(module)):
            assert twin.group is dist.group.WORLD
            assert twin(torch.randn(1, 3, 5), torch.zeros(1, 5, dtype=torch.long)).isfinite()
        with pytest.raises(TypeError, match="can't be pickled: save the state_dict, or set its group to None"):
            pickle.dumps(module)
        torch.save(module.state_dict(), io.BytesIO())
        module.group = None
        assert pickle.loads(pickle.dumps(module)).group is None
    finally:
        dist.destroy_process_group()


def test_weights_that_are_none(data):
    for bad in (float("nan"), float("inf"), -1.0):
        for make in (LossMaxPooling, lambda **o: lmp_triton.loss_max_pooling(*data, **o)):
            with pytest.raises(ValueError, match=r"weight must be finite and not negative, got .* for class 1"):
                make(weight=torch.tensor([1.0, bad, 1.0]), ignore_index=255)
