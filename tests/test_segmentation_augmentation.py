"""The paper's augmentation: image and labels stay aligned, the crop lies where it was asked for, the scale is right."""

import pytest
import torch
import torch.nn.functional as F
from support import Later

transforms = Later("lmp_triton.segmentation.transforms", "torchvision")


IGNORED = 255


def pair(height, width):
    """A label map of blocks, and an image with 60 times the label in every channel."""
    target = torch.randint(0, 4, (height // 15 + 1, width // 15 + 1), dtype=torch.uint8)
    target = target.repeat_interleave(15, 0).repeat_interleave(15, 1)[:height, :width].contiguous()
    return (60 * target).expand(3, -1, -1).clone(), target


@pytest.mark.parametrize("size", [(40, 60), (20, 90), (12, 9)])
def test_image_and_labels_stay_aligned(size):
    image, target = pair(*size)
    kept, seen = (image.clone(), target.clone()), 0
    transform = transforms.training(24, mean=(0.5,) * 3, std=(1.0,) * 3)
    for seed in range(20):
        pixel = tuple(int(torch.randint(length, ())) for length in size) if seed % 2 else None
        crop, labels = transforms.apply(transform, image, target, pixel, seed)
        assert crop.shape == (3, 24, 24) and labels.shape == (24, 24)
        # At the edges of blocks the image is interpolated and the label map is not, and of what ends there the crop's
        # edge may show a trace: look two pixels away from both.
        around = labels[None].float()
        calm = (F.max_pool2d(around, 5, 1, 2) == -F.max_pool2d(-around, 5, 1, 2))[0]
        calm[:2] = calm[-2:] = calm[:, :2] = calm[:, -2:] = False
        value = torch.where(labels == IGNORED, 255 * 0.5, 60.0 * labels)  # padding has the mean colour
        assert (255 * (crop[:, calm] + 0.5) - value[calm]).abs().max() < 2
        seen += int((calm & (labels != IGNORED)).sum())
    assert seen > 200
    assert torch.equal(image, kept[0]) and torch.equal(target, kept[1])


def test_at_scale_1_the_crop_is_a_piece_of_the_image_with_the_pixel_in_its_middle():
    image, target = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8), torch.randint(0, 200, (30, 40))
    for row, column in ((15, 20), (0, 0), (29, 39), (3, 38)):
        crop, labels = transforms.apply(transforms.ScaledCrop(9, (1.0, 1.0)), image, target, (row, column))
        top, left = min(max(row - 4, 0), 21), min(max(column - 4, 0), 31)
        assert torch.equal(crop, image[:, top : top + 9, left : left + 9])
        assert torch.equal(labels, target[top : top + 9, left : left + 9])


def test_without_a_pixel_every_place_is_as_likely():
    image, target = torch.zeros(3, 1, 14, dtype=torch.uint8), torch.arange(14)[None]
    first = [int(transforms.apply(transforms.ScaledCrop(1, (1.0, 1.0)), image, target)[1][0, 0]) for _ in range(1400)]
    count = torch.bincount(torch.tensor(first), minlength=14)
    assert count.min() > 50 and count.max() < 155


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_an_object_grows_by_the_scale(scale):
    target = torch.zeros(200, 200, dtype=torch.uint8)
    target[90:110, 95:105] = 1
    _, labels = transforms.apply(
        transforms.ScaledCrop(60, (scale, scale)), torch.zeros(3, 200, 200, dtype=torch.uint8), target, (100, 100)
    )
    rows, columns = (labels == 1).any(1).sum(), (labels == 1).any(0).sum()
    assert abs(int(rows) - 20 * scale) <= 1 and abs(int(columns) - 10 * scale) <= 1


def test_the_scale_is_uniform_and_the_flip_even():
    image, target = torch.zeros(3, 400, 400, dtype=torch.uint8), torch.zeros(400, 400, dtype=torch.uint8)
    target[190:210, 190:200], target[190:210, 200:210] = 1, 2
    transform, scales, flips = transforms.training(100), [], 0
    for seed in range(150):
        _, labels = transforms.apply(transform, image, target, (200, 200), seed)
        scales.append(float((labels > 0).any(1).sum()) / 20)
        first, second = ((labels == c).nonzero()[:, 1].float().mean() for c in (1, 2))
        flips += int(first > second)
    quarters = torch.histc(torch.tensor(scales), 4, 0.45, 1.55)
    assert quarters.sum() == 150 and quarters.min() > 15
    assert 45 < flips < 105


def test_a_point_follows_what_comes_before_the_crop():
    """Any transform of torchvision before the crop carries the place along."""
    from torchvision.transforms import v2

    image, target = torch.zeros(3, 50, 80, dtype=torch.uint8), torch.zeros(50, 80, dtype=torch.uint8)
    target[10, 70] = 3
    transform = v2.Compose(
        [v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0), transforms.ScaledCrop(5, (1.0, 1.0))]
    )
    assert transforms.apply(transform, image, target, (10, 70))[1][2, 2] == 3


def test_evaluation_has_nothing_random():
    from torchvision import tv_tensors

    image = torch.randint(0, 256, (3, 6, 7), dtype=torch.uint8)
    result = transforms.evaluation()(tv_tensors.Image(image))
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.MEAN, transforms.STD))
    torch.testing.assert_close(result.as_subclass(torch.Tensor), (image / 255 - mean) / std)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="size must be"):
        transforms.ScaledCrop(0)
    with pytest.raises(ValueError, match="scale must be"):
        transforms.ScaledCrop(3, (1.5, 0.5))
