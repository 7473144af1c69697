"""LossMaxPooling is the function with its options fixed, and behaves as a module does."""

import copy
import pickle

import pytest
import torch
from conftest import labelled

import lmp_triton


def test_same_as_the_function(rng, backend, device):
    logits, target = labelled((2, 8, 9), 5, device=device)
    weight = torch.rand(5, device=device)
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1, "scope": "batch", "backend": backend}
    criterion = lmp_triton.LossMaxPooling(1.7, 0.5, **options)
    assert criterion(logits, target) == lmp_triton.loss_max_pooling(logits, target, p=1.7, ratio=0.5, **options)
    criterion.p = 3.0
    assert criterion(logits, target) == lmp_triton.loss_max_pooling(logits, target, p=3.0, ratio=0.5, **options)


def test_weight_is_a_buffer():
    criterion = lmp_triton.LossMaxPooling(weight=torch.ones(3))
    assert criterion.to("meta").weight.device.type == "meta"
    assert list(criterion.state_dict()) == ["weight"]
    assert not list(lmp_triton.LossMaxPooling().state_dict())


def test_copies():
    criterion = lmp_triton.LossMaxPooling(1.7, weight=torch.rand(3), ignore_index=255)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(twin) == repr(criterion) and torch.equal(twin.weight, criterion.weight)


def test_repr():
    assert repr(lmp_triton.LossMaxPooling(ignore_index=255)) == (
        "LossMaxPooling(p=1.3, ratio=0.25, weight=None, ignore_index=255, label_smoothing=0, scope='image', "
        "reduction='mean', backend='auto', solver='auto')"
    )


def test_bad_options_are_refused_at_once():
    for options in ({"p": 0.3}, {"ratio": 2.0}, {"scope": "x"}, {"weight": -torch.ones(2)}, {"label_smoothing": 2.0}):
        with pytest.raises(ValueError):
            lmp_triton.LossMaxPooling(**options)
