"""Datasets: the real folder layouts and label maps, on tiny trees; every fault of the data names its file."""

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from support import Later

datasets = Later("lmp_triton.segmentation.datasets", "torchvision", "torchmetrics")
sampling = Later("lmp_triton.segmentation.sampling", "torchmetrics")
transforms = Later("lmp_triton.segmentation.transforms", "torchvision")


ABC = ("a", "b", "c")


def of_folder(root, **options):
    return datasets.Folder(root / "images", root / "masks", ABC, **options)


# What is read


def test_cityscapes_maps_ids_to_its_19_classes(tmp_path):
    data = datasets.Cityscapes(trees.cityscapes(tmp_path))
    assert len(data) == 3 and len(data.classes) == 19
    assert (data.classes[0], data.classes[13], data.classes[18]) == ("road", "car", "bicycle")
    image, target = data[1]  # ids 7, 26, 24, 31: road, car, person, train
    assert image.dtype == torch.float32 and image.shape == (3, 16, 24)
    assert target.dtype == torch.int64
    assert torch.equal(target, torch.from_numpy(trees.stripes((0, 13, 11, 16))))
    assert torch.equal(data[0][1], torch.from_numpy(trees.stripes((0, 1, 255, 18))))  # id 4 is void
    stored = np.array(Image.open(data.pairs[1][0]))
    mean, std = torch.tensor(transforms.MEAN), torch.tensor(transforms.STD)
    torch.testing.assert_close(image, ((torch.from_numpy(stored) / 255 - mean) / std).permute(2, 0, 1))


def test_voc_alone_and_extended(tmp_path):
    trees.voc(tmp_path)
    trees.sbd(tmp_path / "sbd")
    alone = datasets.PascalVOC(tmp_path)
    assert [pair[0].stem for pair in alone.pairs] == ["2007_000032", "2007_000039"]
    assert torch.equal(alone[1][1], torch.from_numpy(trees.stripes((0, 255, 2))))
    extended = datasets.PascalVOC(tmp_path, sbd=tmp_path / "sbd")
    # without VOC's validation image 2007_000033; of 2007_000032 VOC's labels
    names = ["2007_000032", "2007_000039", "2008_000002", "2008_000008"]
    assert [pair[0].stem for pair in extended.pairs] == names
    assert torch.equal(extended[0][1], torch.from_numpy(trees.stripes((0, 255, 1))))
    assert torch.equal(extended[2][1], torch.from_numpy(trees.stripes((0, 15))))
    assert torch.equal(extended[3][1], torch.from_numpy(trees.stripes((0, 18))))
    assert [pair[0].stem for pair in datasets.PascalVOC(tmp_path, "val").pairs] == ["2007_000033"]


def test_a_folder_and_its_options(tmp_path):
    data = of_folder(trees.folder(tmp_path))
    assert torch.equal(data[1][1], torch.from_numpy(trees.stripes((0, 255, 1))))
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    for mask in list((tmp_path / "masks").iterdir()):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    data = of_folder(tmp_path, mask_suffix="_mask", labels={0: 2, 1: 255, 2: 0, 255: 1})
    assert torch.equal(data[0][1], torch.from_numpy(trees.stripes((2, 255, 0))))
    assert torch.equal(data[1][1], torch.from_numpy(trees.stripes((2, 1, 255))))


def test_a_label_map_may_have_16_bits_or_a_negative_ignore_index(tmp_path):
    trees.folder(tmp_path, labels=((0, 1),))
    Image.fromarray(np.full((16, 24), 1000, np.uint16)).save(tmp_path / "masks" / "scene 0.png")
    data = of_folder(tmp_path, labels={1000: 2, 7: -1}, ignore_index=-1)
    assert (data[0][1] == 2).all()


# Draws


def test_a_draw_is_cropped_around_its_pixel_and_the_same_every_time(tmp_path):
    trees.folder(tmp_path, size=(60, 40))
    data = of_folder(tmp_path, transform=transforms.training(17))
    index = sampling.ClassIndex.build(data, progress=False)
    for draw in sampling.ComplementarySampler(index, mode="class-uniform", blend=1.0, length=30, seed=4):
        image, target = data[draw]
        assert image.shape == (3, 17, 17) and target.shape == (17, 17)
        assert (target == draw.label).any()
        torch.manual_seed(99)
        again = data[draw]
        assert torch.equal(again[0], image) and torch.equal(again[1], target)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        data[draw]
        assert torch.equal(torch.get_rng_state(), before)
    assert any(
        not torch.equal(data[sampling.Draw(0, seed=seed)][0], data[sampling.Draw(0, seed=0)][0]) for seed in range(1, 5)
    )


def test_arrays_are_a_dataset():
    images = torch.randint(0, 256, (3, 1, 10, 12), dtype=torch.uint8)
    targets = torch.randint(0, 3, (3, 10, 12), dtype=torch.uint8)
    data = datasets.Arrays(images, targets, ABC, transform=transforms.evaluation(mean=(0.0,), std=(1.0,)))
    torch.testing.assert_close(data[2][0], images[2] / 255)
    assert torch.equal(data[2][1], targets[2].long())
    assert (sampling.ClassIndex.build(data, progress=False).counts.sum(1) == 120).all()
    with pytest.raises(ValueError, match=r"targets\[0, 0, 0\] = 9"):
        datasets.Arrays(images, torch.full_like(targets, 9), ABC)
    with pytest.raises(ValueError, match="images must be uint8"):
        datasets.Arrays(images.float(), targets, ABC)
    with pytest.raises(ValueError, match="targets must be integers"):
        datasets.Arrays(images, targets[:, 1:], ABC)


# The cache of the index


def test_the_index_is_cached_until_a_file_changes(tmp_path, capsys):
    data, cache = of_folder(trees.folder(tmp_path / "data")), tmp_path / "cache"
    first = sampling.ClassIndex.build(data, cache=cache)
    assert "reading every image" in capsys.readouterr().err
    assert first.counts.tolist() == [[128, 128, 128], [128, 128, 0], [256, 0, 128]]
    data.read = None  # nothing is read again
    assert np.array_equal(sampling.ClassIndex.build(data, cache=cache).counts, first.counts)
    trees.mask(tmp_path / "data" / "masks" / "scene 2.png", trees.stripes((1, 1)))
    changed = sampling.ClassIndex.build(of_folder(tmp_path / "data"), cache=cache, progress=False)
    assert changed.counts[2].tolist() == [0, 384, 0]
    assert of_folder(tmp_path / "data", labels={0: 0, 1: 1, 2: 2, 255: 255}).fingerprint() == (
        of_folder(tmp_path / "data").fingerprint()
    )
    assert of_folder(tmp_path / "data", labels={0: 1, 1: 0, 2: 2, 255: 255}).fingerprint() != (
        of_folder(tmp_path / "data").fingerprint()
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY"])
def test_a_broken_cache_is_made_anew(content, tmp_path):
    data, cache = of_folder(trees.folder(tmp_path / "data")), tmp_path / "cache"
    first = sampling.ClassIndex.build(data, cache=cache, progress=False)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert np.array_equal(sampling.ClassIndex.build(data, cache=cache, progress=False).counts, first.counts)
    assert len(np.load(file, allow_pickle=False)["counts"]) == 3 and len(list(cache.iterdir())) == 1


# Faults: before a training where that can be known


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(
        datasets.DatasetError, match=f"{tmp_path}/nowhere/leftImg8bit/train: no such folder .{tmp_path} exists"
    ):
        datasets.Cityscapes(tmp_path / "nowhere")
    (tmp_path / "leftImg8bit" / "val").mkdir(parents=True)
    (tmp_path / "gtFine" / "val").mkdir(parents=True)
    with pytest.raises(datasets.DatasetError, match="leftImg8bit/val: no file"):
        datasets.Cityscapes(tmp_path, "val")
    with pytest.raises(datasets.DatasetError, match="nowhere/VOCdevkit/VOC2012/ImageSets/Segmentation: no such folder"):
        datasets.PascalVOC(tmp_path / "nowhere")
    trees.voc(tmp_path)
    with pytest.raises(datasets.DatasetError, match="no-sbd: no such folder"):
        datasets.PascalVOC(tmp_path, sbd=tmp_path / "no-sbd")
    with pytest.raises(datasets.DatasetError, match="nowhere: no such folder"):
        datasets.Folder(tmp_path / "nowhere", tmp_path, ABC)
    (tmp_path / "empty").mkdir()
    with pytest.raises(datasets.DatasetError, match="empty: no image in it"):
        datasets.Folder(tmp_path / "empty", tmp_path / "empty", ABC)
    for bad in (lambda: datasets.Cityscapes(tmp_path, "test"), lambda: datasets.PascalVOC(tmp_path, "test")):
        with pytest.raises(ValueError, match="split must be"):
            bad()


def test_a_missing_file_is_named(tmp_path):
    trees.cityscapes(tmp_path)
    missing = tmp_path / "gtFine/train/bochum/bochum_000000_0_gtFine_labelIds.png"
    missing.unlink()
    with pytest.raises(datasets.DatasetError, match=f"{missing}: no such file"):
        datasets.Cityscapes(tmp_path)
    trees.voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2007_000039.jpg").unlink()
    with pytest.raises(datasets.DatasetError, match=r"2007_000039.jpg: no such file"):
        datasets.PascalVOC(tmp_path)
    root = trees.folder(tmp_path / "folder")
    trees.image(root / "images" / "lonely.jpg")
    with pytest.raises(datasets.DatasetError, match=r"lonely.jpg: no mask lonely.png"):
        of_folder(root)
    (root / "images" / "lonely.jpg").unlink()
    trees.mask(root / "masks" / "lonely.png", trees.stripes((0, 1)))
    with pytest.raises(datasets.DatasetError, match=r"lonely.png: no image of that name"):
        of_folder(root)
    trees.image(root / "images" / "lonely.jpg")
    trees.image(root / "images" / "lonely.png")
    with pytest.raises(datasets.DatasetError, match=r"lonely.png: lonely.jpg has the same name"):
        of_folder(root)


def test_an_unknown_label_is_named_with_its_file(tmp_path):
    data = of_folder(trees.folder(tmp_path, labels=((0, 1), (0, 7))))
    with pytest.raises(
        datasets.DatasetError, match=r"scene 1.png: unknown label 7 at row 0, column 12; known are 0-2, 255"
    ):
        sampling.ClassIndex.build(data, progress=False)
    with pytest.raises(datasets.DatasetError, match=r"scene 1.png: unknown label 7"):
        data[1]
    with pytest.raises(ValueError, match="labels must map"):
        of_folder(tmp_path, labels={0: 3})


@pytest.mark.filterwarnings("error")
def test_a_class_that_no_pixel_has_is_warned_of(tmp_path):
    data = of_folder(trees.folder(tmp_path / "data", labels=((0, 255), (0, 2))))
    for _ in range(2):  # read, and from the cache
        with pytest.warns(UserWarning, match="no image holds a pixel of b: are the labels right"):
            sampling.ClassIndex.build(data, cache=tmp_path / "cache", progress=False)
    trees.folder(tmp_path / "data", labels=((0, 1), (0, 2)))
    sampling.ClassIndex.build(data, cache=tmp_path / "cache", progress=False)


def test_sizes_that_differ_are_named(tmp_path):
    trees.folder(tmp_path)
    trees.mask(tmp_path / "masks" / "scene 2.png", trees.stripes((0, 1), (25, 16)))
    with pytest.raises(
        datasets.DatasetError, match=r"scene 2.png: the label map has 25 × 16 .*scene 2.jpg has 24 × 16"
    ):
        sampling.ClassIndex.build(of_folder(tmp_path), progress=False)


@pytest.mark.parametrize("name", ["images/scene 1.jpg", "masks/scene 1.png"])
@pytest.mark.parametrize("keep", [0, 30, 0.5, 0.8])
def test_a_truncated_file_is_named(name, keep, tmp_path):
    file = trees.folder(tmp_path, size=(90, 80)) / name
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(datasets.DatasetError, match=f"{name}: cannot be read as"):
        sampling.ClassIndex.build(of_folder(tmp_path), progress=False)


def test_a_file_that_is_something_else_is_named(tmp_path):
    trees.voc(tmp_path)
    trees.sbd(tmp_path / "sbd")
    (tmp_path / "sbd" / "cls" / "2008_000002.mat").write_bytes(b"no matrix")
    with pytest.raises(datasets.DatasetError, match=r"2008_000002.mat: not a label file of SBD"):
        sampling.ClassIndex.build(datasets.PascalVOC(tmp_path, sbd=tmp_path / "sbd"), progress=False)
    trees.folder(tmp_path)
    trees.image(tmp_path / "masks" / "scene 0.png")
    with pytest.raises(datasets.DatasetError, match=r"scene 0.png: an image of mode RGB; a label map has one integer"):
        of_folder(tmp_path)[0]
