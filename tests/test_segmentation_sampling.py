"""Complementary sampling: what is drawn, how often, and that the same draw comes again wherever it is made."""

import io

import numpy as np
import pytest
import torch
from support import Later
from torch.utils.data import DataLoader, Dataset, DistributedSampler

sampling = Later("lmp_triton.segmentation.sampling", "torchmetrics")


CLASSES = 4  # and class 3 is in no image


@pytest.fixture
def targets():
    """20 label maps: class 0 everywhere, class 1 in every fourth, class 2 as three pixels of one; some ignored."""
    random = np.random.default_rng(torch.initial_seed() % 2**32)
    maps = np.where(random.random((20, 8, 9)) < 0.2, 255, 0).astype(np.uint8)
    maps[::4, 2:4] = 1
    maps[7, 5, [1, 4, 8]] = 2
    return maps


@pytest.fixture
def index(targets):
    return sampling.ClassIndex.of(targets, CLASSES)


class Places(Dataset):
    """Items are (image, label, row, column, seed) of the draw."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, draw):
        place = draw.pixel(self.targets[draw.image]) or (-1, -1)
        return torch.tensor([draw.image, draw.label, *place, draw.seed])


def draws_of(sampler, targets, **options):
    return torch.cat(list(DataLoader(Places(targets), batch_size=3, sampler=sampler, **options)))


def test_the_index_counts_every_pixel(targets, index):
    for label in range(CLASSES):
        assert (index.counts[:, label] == (targets == label).sum(axis=(1, 2))).all()
        assert index.images(label).tolist() == [i for i in range(20) if (targets[i] == label).any()]
    assert index.pixels.sum() == (targets != 255).sum()


def test_a_class_outside_the_range_is_refused(targets):
    with pytest.raises(ValueError, match="target 0 has the label 1"):
        sampling.ClassIndex.of(targets, 1)
    with pytest.raises(ValueError, match="empty"):
        sampling.ClassIndex.of([], 3)


def test_blend_1_draws_a_pixel_of_each_class_equally_often(targets, index):
    sampler = sampling.ComplementarySampler(index, mode="class-uniform", blend=1.0, length=3000)
    drawn = draws_of(sampler, targets)
    for image, label, row, column, _ in drawn.tolist():
        assert targets[image, row, column] == label
    count = torch.bincount(drawn[:, 1], minlength=CLASSES)
    assert count[3] == 0
    assert ((count[:3] - 1000).abs() < 130).all()  # five standard deviations
    rare = drawn[drawn[:, 1] == 2]
    assert set(map(tuple, rare[:, 2:4].tolist())) == {(5, 1), (5, 4), (5, 8)}
    assert torch.bincount(drawn[drawn[:, 1] == 1][:, 0], minlength=20)[::4].min() > 130  # of 200 expected


@pytest.mark.parametrize("mode, blend", [("uniform", 0.7), ("inverse-iou", 0.0)])
def test_uniform_sampling_is_every_image_once(mode, blend, targets, index):
    sampler = sampling.ComplementarySampler(index, mode=mode, blend=blend, seed=5)
    first = [draw.image for draw in sampler]
    assert sorted(first) == list(range(20)) and first != sorted(first)
    assert all(draw.label == -1 and draw.pixel(targets[draw.image]) is None for draw in sampler)
    sampler.set_epoch(1)
    assert [draw.image for draw in sampler] != first
    assert [draw.image for draw in sampling.ComplementarySampler(index, mode=mode, blend=blend, seed=6)] != first


def test_the_blend_is_the_share_of_draws_for_a_class(index):
    sampler = sampling.ComplementarySampler(index, blend=0.3, length=4000)
    share = np.mean([draw.label >= 0 for draw in sampler])
    assert abs(share - 0.3) < 0.04


def test_a_class_is_drawn_inversely_to_its_iou(index):
    sampler = sampling.ComplementarySampler(index, floor=0.1, refresh=2, decay=0.5)
    assert np.allclose(sampler.probabilities, [1 / 3, 1 / 3, 1 / 3, 0])  # nothing is known yet
    target = torch.tensor([[[0] * 8 + [1] * 4 + [255] * 4]])
    predictions = torch.tensor([[[0] * 10 + [1] * 2 + [1] * 4]])
    sampler.observe(predictions, target)
    assert np.isnan(sampler.iou).all()  # looked at every second time
    sampler.observe(predictions, target)
    assert np.allclose(sampler.iou[:2], [8 / 10, 2 / 4]) and np.isnan(sampler.iou[2:]).all()
    weights = np.array([1 / 0.8, 1 / 0.5, 1 / 0.1, 0])
    assert np.allclose(sampler.probabilities, weights / weights.sum())
    many = sampling.ComplementarySampler(index, blend=1.0, length=3000)
    many.load_state_dict(sampler.state_dict())
    count = np.bincount([draw.label for draw in many], minlength=CLASSES)
    assert np.abs(count / 3000 - sampler.probabilities).max() < 0.04


def test_old_batches_are_forgotten(index):
    sampler = sampling.ComplementarySampler(index, refresh=1, decay=0.5)
    target = torch.zeros(1, 1, 16, dtype=torch.long)
    sampler.observe(torch.ones_like(target), target)  # all wrong
    for _ in range(3):
        sampler.observe(target, target)  # all right
    right = 16 * (1 + 0.5 + 0.25)
    assert np.isclose(sampler.iou[0], right / (right + 16 * 0.125))


def test_coarse_predictions_are_compared_at_the_nearest_pixels(index):
    sampler = sampling.ComplementarySampler(index, refresh=1)
    coarse = torch.randint(0, 3, (2, 3, 5))
    sampler.observe(coarse, coarse.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert np.nanmin(sampler.iou) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_one_sequence_as_in_distributed_sampler(workers, drop_last, targets, index):
    """Three ranks take turns in what one rank draws; they are equally long, and the length is DistributedSampler's."""

    def drawn(replicas, rank, workers=workers):
        sampler = sampling.ComplementarySampler(
            index, blend=0.5, num_replicas=replicas, rank=rank, seed=3, drop_last=drop_last
        )
        sampler.set_epoch(2)
        theirs = DistributedSampler(Places(targets), replicas, rank, drop_last=drop_last)
        assert len(sampler) == len(theirs)
        result = draws_of(sampler, targets, num_workers=workers)
        assert len(result) == len(sampler)
        return result

    alone = drawn(1, 0, workers=0)
    for rank in range(3) if workers == 0 else [1]:
        expected = torch.cat([alone, alone])[rank::3][: 6 if drop_last else 7]
        assert torch.equal(drawn(3, rank), expected)


def test_a_restored_sampler_goes_on_where_the_other_left_off(index):
    def make():
        return sampling.ComplementarySampler(index, blend=0.8, refresh=1, seed=11)

    whole, first, second = make(), make(), make()
    wrong, right = torch.zeros(1, 2, 8, dtype=torch.long), torch.ones(1, 2, 8, dtype=torch.long)
    expected, begun, rest = [], [], []
    for sampler, into in ((whole, expected), (first, begun)):
        sampler.set_epoch(4)
        for draw in sampler:
            into.append(draw)
            sampler.observe(right if len(into) % 2 else wrong, right)
            if sampler is first and len(into) == 6:
                break
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    second.set_epoch(4)  # what a loop does at the start of the epoch that it resumes
    for draw in second:
        rest.append(draw)
        second.observe(right if (6 + len(rest)) % 2 else wrong, right)
    assert begun + rest == expected and np.array_equal(second.iou, whole.iou, equal_nan=True)
    second.set_epoch(5)
    assert len(list(second)) == len(second)


def test_what_a_worker_prefetched_can_be_drawn_again(index):
    sampler = sampling.ComplementarySampler(index, blend=0.5)
    drawn = list(sampler)
    again = sampling.ComplementarySampler(index, blend=0.5)
    again.load_state_dict(sampler.state_dict(consumed=13))
    assert list(again) == drawn[13:]


def test_bad_arguments_are_named(index, targets):
    for options in ({"mode": "x"}, {"blend": 1.1}, {"floor": 0}, {"refresh": 0}, {"seed": -1}, {"length": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            sampling.ComplementarySampler(index, **options)
    with pytest.raises(ValueError, match="all pixels are ignored"):
        sampling.ComplementarySampler(sampling.ClassIndex.of(np.full_like(targets, 255), CLASSES))
    sampler = sampling.ComplementarySampler(index)
    with pytest.raises(ValueError, match="missing or unknown keys"):
        sampler.load_state_dict({"seed": 0})
    with pytest.raises(ValueError, match="of 4 classes, the index of 3"):
        sampling.ComplementarySampler(sampling.ClassIndex.of(targets, 3)).load_state_dict(sampler.state_dict())
    with pytest.raises(IndexError, match="image 7 has 3 pixels of class 2, but pixel 3 was drawn"):
        sampling.Draw(7, 2, 3).pixel(targets[7])


def _observe_on_rank(rank, world, file, results):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    index = sampling.ClassIndex.of([np.array([[0, 1, 2]])] * 4, 3)
    sampler = sampling.ComplementarySampler(index, refresh=1)
    assert (sampler.num_replicas, sampler.rank) == (world, rank)
    target = torch.tensor([[[0, 0, 1, 1]]])
    sampler.observe(target if rank == 0 else 1 - target, target)
    results[rank] = torch.from_numpy(sampler.iou)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_counts_are_added_over_the_ranks(tmp_path):
    """One rank is all right, the other all wrong: IoU = 2 of 6 for both classes, on both."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_observe_on_rank, (2, tmp_path / "store", results), nprocs=2)
        assert len(results) == 2
        for iou in results.values():
            assert torch.allclose(iou[:2], torch.tensor([1 / 3, 1 / 3], dtype=torch.float64)) and iou[2].isnan()
