"""Tables, plots and comparisons of what `bench.run` wrote."""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
from pathlib import Path

import pandas as pd

from . import table as table_file
from .providers import BASE, LARGE
from .table import NUMBERS, Unusable

BASES = (BASE, "F.cross_entropy", f"{LARGE}, compiled", LARGE, "LMP by torch.sort")
KEYS = ["workload", "provider", "pass", "clock"]
CLOCKS = ("graph", "kernel", "end to end", "host")


def read(path: Path) -> pd.DataFrame:
    """The long table, numbers as numbers.

    Raises:
        table.Unusable: there is none, or it holds no row.
    """
    rows = table_file.read(path)
    if not rows:
        raise Unusable(f"{path} holds no row")
    frame = pd.DataFrame(rows)
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name])
    frame["kernels_us"] = frame["kernels_us"].where(frame["kernels_us"] != "")
    return frame


def latest(table: pd.DataFrame) -> pd.DataFrame:
    """Of several commits in one table, the last one written for each device."""
    last = table.groupby("device")["commit"].transform("last")
    return table[table["commit"] == last]


def best_clock(table: pd.DataFrame) -> str:
    """The clock nearest to the device that the table has."""
    return next(clock for clock in CLOCKS if ((table["clock"] == clock) & (table["status"] == "ok")).any())


def pivots(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Titles and tables: milliseconds, ratios to cross-entropy, percent of the device's bandwidth, memory, problems."""
    good = table[table["status"] == "ok"]
    clock = best_clock(table)
    found = {}
    for passes in ("forward+backward", "forward"):
        some = good[(good["clock"] == clock) & (good["pass"] == passes)]
        times = some.pivot_table(index="workload", columns="provider", values="ms", sort=False)
        found[f"{passes}, {clock}, median ms"] = times
        base = next((name for name in BASES if name in times), None)
        if base:
            found[f"{passes}, {clock}, ratio to {base}"] = times.div(times[base], axis=0)
        if some["percent_of_device"].notna().any():
            percent = some.pivot_table(index="workload", columns="provider", values="percent_of_device", sort=False)
            found[f"{passes}, {clock}, percent of the bandwidth measured on the device"] = percent
        if some["peak_mib"].notna().any():
            memory = some.pivot_table(index="workload", columns="provider", values="peak_mib", sort=False)
            found[f"{passes}, peak MiB above the inputs"] = memory
    problems = table[table["status"] != "ok"]
    if len(problems):
        reasons = problems.groupby(["provider", "status"], sort=False)["workload"].nunique()
        found["not measured, and why"] = reasons.rename("workloads").reset_index().set_index("provider")
    return found


def stages_of(table: pd.DataFrame) -> dict[str, list[tuple[str, float]]]:
    """The time of each provider of one workload and clock in stages, in ms.

    Its kernels where there are few of them and they were profiled, forward and backward otherwise.
    """
    found = {}
    for name, rows in table.groupby("provider", sort=False):
        by_pass = rows.set_index("pass")
        both = by_pass.loc["forward+backward"]
        kernels = both.get("kernels_us")
        if isinstance(kernels, str) and both["launches"] <= 8:
            pairs = (part.rsplit("=", 1) for part in kernels.split("; "))
            found[str(name)] = [(kernel, float(us) / 1e3) for kernel, us in pairs]
        else:
            forward = float(by_pass.loc["forward", "ms"])
            found[str(name)] = [("forward", forward), ("backward", max(0.0, float(both["ms"]) - forward))]
    return found


def plots(table: pd.DataFrame) -> dict[str, bytes]:
    """File names and PNGs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    good = table[table["status"] == "ok"]
    clock = best_clock(table)
    some = good[(good["clock"] == clock) & (good["pass"] == "forward+backward")]
    found = {}

    def save(name: str, figure: plt.Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, bbox_inches="tight")
        plt.close(figure)
        found[name] = buffer.getvalue()

    workloads = list(dict.fromkeys(some["workload"]))
    rows = math.ceil(len(workloads) / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(13, 2.8 * rows), squeeze=False)
    for axes, workload in zip(grid.flat, workloads, strict=False):
        for name, stages in stages_of(good[(good["clock"] == clock) & (good["workload"] == workload)]).items():
            left = 0.0
            for number, (stage, time) in enumerate(stages):
                axes.barh(name, time, left=left, color=f"C{number % 10}")
                if time > 0.15 * sum(t for _, t in stages):
                    axes.text(left, name, " " + stage.removesuffix("_kernel")[:18], fontsize=6, va="center")
                left += time
        axes.set_title(workload, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("ms", fontsize=8)
    for axes in list(grid.flat)[len(workloads) :]:
        axes.axis("off")
    figure.tight_layout()
    save("stages.png", figure)

    if not some["effective_gb_s"].notna().any():
        return found  # host times: no bandwidth bounds them

    figure, axes = plt.subplots(figsize=(9, 5))
    for name, group in some.groupby("provider", sort=False):
        group = group.sort_values("logits_bytes")
        axes.plot(group["logits_bytes"] / 2**20, group["effective_gb_s"], "o-", label=name, alpha=0.8)
    roof = some["device_gb_s"].median()
    axes.axhline(roof, color="black", linestyle=":", label="a large copy on this device")
    axes.set(xscale="log", yscale="log", xlabel="logits, MiB", ylabel="two reads and one write of the logits, GB/s")
    axes.set_title(f"Throughput, forward + backward ({clock}), {some['device'].iloc[0]}")
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save("throughput.png", figure)

    figure, axes = plt.subplots(figsize=(9, 5))
    floor = 3 * some["logits_bytes"] / roof / 1e6
    for name, group in some.assign(floor=floor).groupby("provider", sort=False):
        axes.plot(group["floor"], group["ms"], "o", label=name, alpha=0.8)
    ends = [floor.min(), floor.max()]
    axes.plot(ends, ends, color="black", linestyle=":", label="the roof: bytes / bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="least time by bandwidth, ms", ylabel="time, ms")
    axes.set_title("Distance from the limit, forward + backward")
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save("roofline.png", figure)
    return found


def run(options: argparse.Namespace) -> int:
    """Print the tables; write the plots and one page that holds everything."""
    table = latest(read(options.file))
    if not (table["status"] == "ok").any():
        raise Unusable(f"{options.file} holds no measured row of its last commit")
    folder = options.to or options.file.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"{folder} can't be written: {error.strerror}") from None
    about = table[["device", "capability", "driver", "torch", "triton", "commit", "date"]].drop_duplicates()
    parts = [f"<h1>lmp_triton: {html.escape(options.file.name)}</h1>", about.to_html(index=False)]
    print(about.to_string(index=False))
    for title, pivot in pivots(table).items():
        print(f"\n{title}")
        print(pivot.to_string(float_format=lambda x: f"{x:.3g}", na_rep="–"))
        parts.append(f"<h2>{html.escape(title)}</h2>" + pivot.to_html(float_format=lambda x: f"{x:.3g}", na_rep="–"))
    for name, picture in plots(table).items():
        (folder / name).write_bytes(picture)
        parts.append(f'<p><img src="data:image/png;base64,{base64.b64encode(picture).decode()}" alt="{name}"></p>')
    style = "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:2px 8px}</style>"
    (folder / "report.html").write_text(f"<!doctype html><meta charset=utf-8>{style}" + "\n".join(parts))
    print(f"\nwrote {folder / 'report.html'}")
    return 0


def side(spec: str) -> pd.DataFrame:
    """FILE, or FILE@TEXT: only rows of a commit that starts so or of a device whose name holds TEXT.

    Raises:
        table.Unusable: no such rows, or of several devices.
    """
    path, _, text = spec.partition("@")
    table = read(Path(path))
    if text:
        chosen = table["commit"].str.startswith(text) | table["device"].str.contains(text, regex=False)
        if not chosen.any():
            raise Unusable(f"{path} has no row of a commit or device like {text!r}")
        table = table[chosen]
    table = latest(table)
    devices = table["device"].unique()
    if len(devices) > 1:
        raise Unusable(f"{path} holds several devices: choose one by {path}@NAME ({'; '.join(devices)})")
    return table.drop_duplicates(KEYS, keep="last")


def compare(options: argparse.Namespace) -> int:
    """Print the ratios of times, B to A; 1 if any is above the threshold."""
    a, b = (side(spec) for spec in (options.a, options.b))
    joined = a[a["status"] == "ok"].merge(b[b["status"] == "ok"], on=KEYS, suffixes=(" A", " B"))
    if joined.empty:
        raise Unusable("the two sides have no workload and provider in common")
    joined["ratio"] = joined["ms B"] / joined["ms A"]
    joined = joined.sort_values("ratio", ascending=False)
    print(joined[[*KEYS, "ms A", "ms B", "ratio"]].to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    pairs = {name: set(map(tuple, x[["workload", "provider"]].to_numpy())) for name, x in (("A", a), ("B", b))}
    bad = b[(b["status"] != "ok") & ~b["status"].str.startswith("not available")]
    for workload, provider, status in bad[["workload", "provider", "status"]].drop_duplicates().to_numpy():
        print(f"no time in B: {provider} on {workload}: {status}")
    missing = len(pairs["A"] - pairs["B"])
    slower = int((joined["ratio"] > options.threshold).sum())
    print(f"\n{len(joined)} in common, {slower} slower by more than {options.threshold:g}×", end="")
    print(f"; {missing} pairs of workload and provider in A only" if missing else "")
    return 1 if slower else 0
