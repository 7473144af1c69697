"""The results page: figures from the oracle, tables from the rows, rows that are appended whole and not made twice."""

import csv
import dataclasses

import numpy as np
import pytest
from support import Later

report = Later("lmp_triton.segmentation.report", "pandas", "matplotlib", "torchmetrics", "sklearn")
experiments = Later("lmp_triton.segmentation.experiments", "torchmetrics", "sklearn")
land_cover = Later("lmp_triton.segmentation.land_cover", "matplotlib", "torchmetrics", "sklearn")


@pytest.mark.parametrize(("p", "tau"), [(1.4, 0.6), (2.0, 0.65), (1.4, 0.55)])
def test_figure_1_shows_the_boundary_of_the_set(p, tau):
    gamma = 2 ** -(1 - 1 / p)
    weights = report.boundary(p, tau)
    norm, largest = np.linalg.norm(weights, ord=p, axis=1), weights.max(axis=1)
    assert (norm <= gamma + 1e-12).all() and (largest <= tau + 1e-12).all()
    inside = (norm < gamma - 1e-9) & (largest < tau - 1e-9)
    assert not inside.any(), "w* of some direction is not on the boundary"
    assert (norm > gamma - 1e-9).sum() > len(weights) / 4


def rows(*entries):
    import pandas as pd

    columns = ("loss", "p", "ratio", "sampling", "lr", "seed", "miou", "rare")
    return pd.DataFrame([dict(zip(columns, entry, strict=True)) for entry in entries])


def test_a_table_has_means_spreads_and_gains_seed_by_seed():
    nan = float("nan")
    data = rows(
        ("cross-entropy", nan, nan, "uniform", 0.1, 0, 30.0, 5.0),
        ("cross-entropy", nan, nan, "uniform", 0.1, 1, 20.0, 1.0),
        ("cross-entropy", nan, nan, "uniform", 0.3, 0, 99.0, 1.0),
        ("pooling", 1.3, 0.05, "uniform", 0.1, 1, 42.0, 20.0),
        ("pooling", 1.3, 0.05, "uniform", 0.1, 0, 50.0, 30.0),
        ("pooling", 1.3, 0.05, "uniform", 0.1, 2, 46.0, 25.0),
        ("pooling", 1.3, 0.1, "uniform", 0.1, 2, 1.0, 1.0),
    )
    settings = {"base": experiments.CROSS_ENTROPY, "ours": experiments.POOLING, "none": experiments.Setting("focal")}
    lines = report.table(data, settings).splitlines()[2:]
    assert lines == [
        "| base | 2 | 25.0 ± 7.1 | 3.0 ± 2.8 |  |",
        "| ours | 3 | 46.0 ± 4.0 | 25.0 ± 5.0 | +21.0 ± 1.4 |",
    ]


def test_the_page_is_what_the_rows_give():
    rows, scene = (report.read(module.ROWS) for module in (experiments, land_cover))
    assert report.page(rows, scene) == report.PAGE.read_text()


def test_every_setting_has_its_own_key():
    settings = [setting for group in experiments.SETTINGS.values() for setting in group]
    assert len(set(settings)) == len(settings)


def test_runs_are_appended_whole_and_not_made_twice(tmp_path, monkeypatch, capsys):
    assert experiments.SETTINGS  # skips where a package is missing
    from lmp_triton.segmentation import experiments as module

    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "ROWS", tmp_path / "digits.csv")
    monkeypatch.setattr(module, "EVOLUTION", tmp_path / "evolution.npz")
    monkeypatch.setattr(module, "TEST_CANVASES", 20)
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "SHOWN_AT", (1, 2))
    monkeypatch.setattr(module, "canvases", small(module))
    two = [module.CROSS_ENTROPY, module.Setting(p=1.3, ratio=0.1, sampling="inverse-iou")]
    monkeypatch.setattr(module, "SETTINGS", {"main": two})
    monkeypatch.setattr("sys.argv", ["experiments", "--seeds", "1"])
    module.main()
    with (tmp_path / "digits.csv").open() as file:
        made = list(csv.DictReader(file))
    assert [row["loss"] for row in made] == ["cross-entropy", "pooling"]
    assert made[0]["p"] == "" and made[1]["sampling"] == "inverse-iou"
    assert {field.name for field in dataclasses.fields(module.Setting)} <= made[0].keys()
    assert all(0 <= float(row["miou"]) <= 100 for row in made)
    kept = np.load(tmp_path / "evolution.npz")
    assert kept["cross-entropy 1"].shape == kept["cross-entropy 2"].shape == (2, 64, 64)

    module.main()
    with (tmp_path / "digits.csv").open() as file:
        assert list(csv.DictReader(file)) == made


@pytest.mark.slow
def test_a_run_on_the_land_cover_scene(tmp_path, monkeypatch):
    assert land_cover.SETTINGS  # skips where a package is missing
    from lmp_triton.demo.requirements import MissingRequirement
    from lmp_triton.segmentation import land_cover as module

    try:
        module.scene()
    except MissingRequirement as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(module, "ROWS", tmp_path / "land-cover.csv")
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr("sys.argv", ["land_cover", "--seeds", "1"])
    module.main()
    with module.ROWS.open() as file:
        made = list(csv.DictReader(file))
    assert [(row["p"], row["ratio"]) for row in made] == [("", ""), ("1.0", "0.25"), ("1.3", "0.25"), ("1.3", "0.1")]
    assert all(0 < float(row["miou"]) < 100 for row in made)


def small(module):
    """Few canvases, made once."""
    made = {}

    def canvases(seed):
        if seed not in made:
            kinds = ((True, 8), (False, 20))
            made[seed] = tuple(module.digits.ComposedDigits(train, canvases=n, seed=seed) for train, n in kinds)
        return made[seed]

    return canvases


def test_a_seed_gives_the_same_bits_again(monkeypatch):
    assert experiments.SETTINGS  # skips where a package is missing
    from lmp_triton.segmentation import experiments as module

    monkeypatch.setattr(module, "canvases", small(module))
    setting = module.Setting(p=1.3, ratio=0.1, sampling="inverse-iou")
    first, again = (module.train(setting, 3, steps=3)[0].state_dict() for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)
