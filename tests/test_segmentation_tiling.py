"""Tiles cover every pixel once, and are the paper's; nothing shows at the seams."""

import itertools

import pytest
import torch
from torch import nn

from lmp_triton.segmentation.tiling import EFFICIENT, OPTIMISED, Span, Tiling, predict, tiled

TILINGS = [
    EFFICIENT,
    Tiling(count=(2, 3), overlap=(4, 7)),
    Tiling(size=(11, 16), overlap=5),
    Tiling(size=(None, 9)),
    Tiling(size=(64, 13), overlap=(0, 12)),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_pointwise_model_gives_the_same_on_tiles(tiling):
    for _ in range(5):
        height, width = (int(x) for x in torch.randint(20, 60, (2,)))
        images = torch.randn(2, 3, height, width)
        model = nn.Conv2d(3, 5, 1)
        whole = predict(model, images)
        assert whole.shape == (2, height, width)
        agree = predict(model, images, tiling) == whole
        assert agree.float().mean() > 0.999  # a tie in another order of addition
        assert torch.equal(tiled(torch.sin, images.double(), tiling), torch.sin(images.double()))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_pixel_is_decided_once_and_by_a_tile_that_sees_it(tiling):
    for length in range(24, 90):
        for axis in (0, 1):
            spans = tiling.spans(length, axis)
            assert spans[0].first == 0 and spans[-1].last == length
            assert all(a.last == b.first for a, b in itertools.pairwise(spans))
            assert all(0 <= s.start <= s.first < s.last <= s.stop <= length for s in spans)
            sizes, overlaps = (
                [s.stop - s.start for s in spans],
                [a.stop - b.start for a, b in itertools.pairwise(spans)],
            )
            if tiling.count:
                assert len(spans) == tiling.count[axis] and max(sizes) - min(sizes) <= 1
                assert set(overlaps) <= {tiling.overlaps[axis]}
            else:
                assert set(sizes) == {min(length, tiling.size[axis] or length)}
                assert min(overlaps, default=99) >= tiling.overlaps[axis]


def test_the_papers_tilings_of_cityscapes():
    assert EFFICIENT.spans(1024, 0) == [Span(0, 1024, 0, 1024)]
    efficient = EFFICIENT.spans(2048, 1)
    assert [s[:2] for s in efficient] == [s[2:] for s in efficient]  # no overlap
    assert [s.stop - s.start for s in efficient] == [409, 410, 409, 410, 410]
    optimised = OPTIMISED.spans(2048, 1)
    assert OPTIMISED.spans(1024, 0) == [Span(0, 1024, 0, 1024)]
    for left, right in itertools.pairwise(optimised):
        assert left.stop - right.start == 200 and left.last == right.start + 100 == right.first


def test_the_left_tile_decides_the_first_half_of_an_overlap():
    """A function that gives every pixel of a tile the tile's first column."""
    columns = torch.arange(30.0).expand(1, 1, 4, 30)
    result = tiled(lambda tile: tile[..., :1].expand_as(tile), columns, Tiling(size=(None, 20), overlap=10))
    assert result[0, 0, 0].tolist() == [0] * 15 + [10] * 15


def test_coarse_logits_are_upsampled_in_their_tile():
    images = torch.randn(1, 3, 24, 40)
    labels = predict(nn.Conv2d(3, 4, 8, stride=8), images, Tiling(count=(1, 2)))
    assert labels.shape == (1, 24, 40) and labels.dtype == torch.long


def test_bad_tilings_are_refused():
    for options in (
        {},
        {"count": (1, 1), "size": (3, 3)},
        {"count": (0, 1)},
        {"size": (8, 8), "overlap": 8},
        {"size": (8, 8), "overlap": -1},
    ):
        with pytest.raises(ValueError, match=r"count|size|overlap"):
            Tiling(**options)
    with pytest.raises(ValueError, match="20 pixels are too few for 5 tiles with an overlap of 16"):
        Tiling(count=(1, 5), overlap=16).spans(20, 1)
    with pytest.raises(ValueError, match="function made"):
        tiled(lambda tile: tile[..., ::2], torch.zeros(1, 1, 8, 8), Tiling(size=(4, 4)))
