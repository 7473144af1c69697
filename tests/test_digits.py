"""Composed digits: the planted imbalance, scans kept apart, seeds; and the small network that is trained on them."""

import numpy as np
import pytest
import torch
from support import Later

from lmp_triton.segmentation import digits
from lmp_triton.segmentation.unet import UNet

loop = Later("lmp_triton.segmentation.loop", "torchmetrics")


def ComposedDigits(*arguments, **options):
    pytest.importorskip("sklearn", reason="scikit-learn, of the extras demo and segmentation")
    return digits.ComposedDigits(*arguments, **options)


@pytest.fixture(scope="module")
def training():
    return ComposedDigits(train=True, canvases=600)


def pixels(data):
    return np.bincount(data.labels.numpy().ravel(), minlength=11) / data.labels.numel()


def test_an_item_is_an_image_of_bytes_and_a_label_of_classes(training):
    image, label = training[3]
    assert image.shape == (1, 64, 64) and image.dtype == torch.uint8
    assert label.shape == (64, 64) and label.dtype == torch.int64
    assert len(training) == 600
    assert training.labels.max() == len(digits.CLASSES) - 1


def test_the_imbalance_is_the_planted_one(training):
    shares = pixels(training)
    assert shares[0] == pytest.approx(0.9, abs=0.02)
    # 3000 digits: digit k is drawn ∝ (k + 1)^-1.5. Ones and sevens have less ink than noughts and eights.
    planted = np.arange(1, 11) ** -1.5
    ratio = shares[1:] / shares[1:].sum() / (planted / planted.sum())
    assert ((ratio > 0.5) & (ratio < 1.6)).all()
    assert 20 < shares[1] / shares[10] < 60


def test_test_digits_are_equally_frequent():
    shares = pixels(ComposedDigits(train=False, canvases=300))[1:]
    assert shares.min() > 0.06 * shares.sum()


def test_no_scan_is_in_training_and_test(monkeypatch):
    seen = {True: set(), False: set()}
    resize = digits._resize
    for train in (True, False):
        recorder = seen[train]

        def record(scan, side, recorder=recorder):
            recorder.add(scan.tobytes())
            return resize(scan, side)

        monkeypatch.setattr(digits, "_resize", record)
        ComposedDigits(train=train, canvases=150)
    assert len(seen[True]) > 250 and len(seen[False]) > 250
    assert not seen[True] & seen[False]


def test_a_seed_fixes_the_canvases_and_another_changes_them():
    first, again, other = (ComposedDigits(canvases=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


def test_ink_is_brighter_than_the_background_by_more_than_the_noise(training):
    images = training.images[:, 0].float()
    background, ink = images[training.labels == 0], images[training.labels > 0]
    assert background.std() > 5
    assert ink.mean() > background.mean() + 2 * background.std()


def test_no_digits_is_all_background():
    assert (ComposedDigits(canvases=2, digits=0).labels == 0).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"canvases": 0}, "canvases"), ({"digits": -1}, "digits"), ({"extent": (0, 4)}, "extent"), ({"size": 9}, "size")],
)
def test_arguments_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        ComposedDigits(**{"canvases": 1, **options})


# The network and the loop.


@pytest.mark.parametrize("stride", [1, 2])
def test_the_network_keeps_any_size(stride):
    logits = UNet(4, 17, width=4, stride=stride)(torch.zeros(1, 4, 17, 150, dtype=torch.uint8))
    assert logits.shape == (1, 17, 17, 150)


def test_bytes_and_the_same_image_in_floats_give_the_same_logits():
    network = UNet(3, 5, width=4, depth=1).eval()
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(network(image), network(image / 127.5 - 1))


def test_the_learning_rate_falls_as_a_polynomial():
    layer = torch.nn.Linear(1, 1)
    optimizer, schedule = loop.poly_sgd(layer.parameters(), steps=10, lr=2.0)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * (1 - step / 10) ** 0.9)
        optimizer.step()
        schedule.step()


def test_a_few_steps_lower_the_loss(training):
    torch.manual_seed(0)
    network = UNet(1, 11, width=4, depth=1, stride=2)
    optimizer, schedule = loop.poly_sgd(network.parameters(), steps=20, lr=0.1)
    losses = []

    def criterion(logits, labels):
        loss = torch.nn.functional.cross_entropy(logits, labels)
        losses.append(loss.item())
        return loss

    steps, observed = [], []
    batch = training.images[:4], training.labels[:4].long()
    loop.fit(
        network,
        criterion,
        [batch] * 20,
        optimizer,
        schedule,
        on_step=lambda: steps.append(1),
        observe=lambda classes, labels: observed.append((classes, labels)),
    )
    assert len(steps) == len(observed) == 20
    assert observed[0][0].shape == batch[1].shape and torch.equal(observed[0][1], batch[1])
    assert losses[-1] < losses[0] / 3


def test_iou_is_nan_for_a_class_that_no_pixel_has():
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.zeros(images.shape[0], 4, 4, dtype=torch.long), 3).movedim(-1, 1)

    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 0] = 1
    labels[0, 1] = 255
    iou = loop.iou(Constant(), [(torch.zeros(1, 1, 4, 4), labels)], 3, ignore_index=255)
    assert iou[:2].tolist() == pytest.approx([8 / 12, 0])
    assert iou[2].isnan()
