"""Without a GPU: every kernel compiles for every architecture, spills nothing, and loads and stores what it must.

LMP_TRITON_ARCHITECTURES, as "80 90", leaves some out; .ci/run does so for the oldest and the newest Triton.
"""

import importlib
import inspect
import io
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "perf" / "static.py"
ARCHITECTURES = os.environ.get("LMP_TRITON_ARCHITECTURES", "80 86 89 90 100 120 gfx942").split()
pytestmark = pytest.mark.slow


def report(*arguments):
    """What the script prints, in a process of its own: under TRITON_INTERPRET nothing compiles."""
    pandas = pytest.importorskip("pandas")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--csv", "-", *arguments]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return pandas.read_csv(io.StringIO(result.stdout))


@pytest.fixture(scope="module", params=[pytest.param(a, marks=pytest.mark.xdist_group(a)) for a in ARCHITECTURES])
def table(request):
    """The static report of one architecture; its tests share a worker, and so the report."""
    pytest.importorskip("triton")
    found = report("--architecture", request.param).set_index("kernel")
    assert len(found) > 60
    return found


def nvidia(table):
    """Skips what is read from NVIDIA's instructions alone."""
    if table["architecture"].astype(str).str.startswith("gfx").any():
        pytest.skip("AMD: shown to compile, with a wavefront of 64")


def version(table):
    """Triton's, as "3.8"."""
    return ".".join(str(table["triton"].iloc[0]).split(".")[:2])


SPILLS = {
    "3.6": {
        "softmax_losses fp32 C=1024": 4,
        "upsampled_losses C=19 any sizes weights smoothing": 3,
        "upsampled_gradient C=19 any sizes weights smoothing": 8,
        "upsampled_losses C=150 stride 8": 23,
    },
    "3.9": {"forward cooperative bf16 C=150": 4},
}
"""What is known to spill, by Triton's version, and at most how many instructions: with the oldest one
number of classes and two forms of upsampled logits, with the newest a launch that is off by default. Not to grow."""


def test_nothing_spills(table):
    known = table.index.map(lambda name: SPILLS.get(version(table), {}).get(name, 0))
    assert (table["spills"] <= known).all(), table.loc[table["spills"] > known, ["registers", "spills"]]
    assert (table["stack"][table["spills"] == 0] == 0).all() or table["architecture"].eq("gfx942").all()


@pytest.mark.parametrize("classes", [2, 3, 19, 21, 32])
def test_every_logit_is_loaded_once_and_every_gradient_stored_once(table, classes):
    """All classes in registers, in one load and one store each of as many pixels as a thread has."""
    nvidia(table)
    losses, gradient = table.loc[f"softmax_losses bf16 C={classes}"], table.loc[f"logits_gradient bf16 C={classes}"]
    wide = "64" if losses["load 64"] >= classes else "32"  # 4 pixels a thread, or 2
    pixels = {"64": 4, "32": 2}[wide]
    assert losses[f"load {wide}"] == classes and losses["load 16"] == pixels  # x_label, gathered
    assert losses["load 128"] == pixels // 2  # int64 labels, two a load
    assert gradient[f"store {wide}"] == classes
    assert sum(gradient[f"store {bits}"] for bits in (8, 16, 32, 64, 128)) == classes
    losses, gradient = table.loc[f"softmax_losses fp32 C={classes}"], table.loc[f"logits_gradient fp32 C={classes}"]
    twice = {"64": "128", "32": "64"}[wide]
    assert gradient[f"store {twice}"] == classes
    # Of the same width as fp32 logits: int64 labels in the one kernel, losses (and the solution) in the other.
    assert losses[f"load {twice}"] >= classes and gradient[f"load {twice}"] in (classes, classes + 1)


@pytest.mark.parametrize("classes, chunk", [(150, 10), (847, 7), (1024, 8)])
def test_chunks_of_classes(table, classes, chunk):
    """The loop over the classes loads and stores a chunk of them."""
    nvidia(table)
    assert table.loc[f"softmax_losses bf16 C={classes}", "load 64"] == chunk
    assert table.loc[f"logits_gradient bf16 C={classes}", "store 64"] == chunk


@pytest.mark.parametrize("unit, bits, loads", [(1, 16, 4), (2, 32, 2), (16, 64, 1)])
def test_width_follows_divisibility(table, unit, bits, loads):
    """4 pixels a thread: in one load where the image's size is divisible by 4 (550·550) or 16, else in two or four."""
    nvidia(table)
    losses, gradient = (table.loc[f"{stage} bf16 C=19 unit={unit}"] for stage in ("softmax_losses", "logits_gradient"))
    assert losses[f"load {bits}"] in (19 * loads, 19 * loads + 4)  # x_label, gathered
    assert gradient[f"store {bits}"] == 19 * loads
    # Cropped logits are as well off where their rows are divisible.
    assert table.loc["softmax_losses bf16 C=19 cropped", "load 64"] >= 19


def test_rows_of_classes(table):
    """channels_last: one load a class and pixel of one thread up to 32 classes; above, as wide as the stride allows."""
    nvidia(table)
    assert table.loc["softmax_losses bf16 C=19 channels_last", "load 16"] == 19 + 1
    assert table.loc["softmax_losses bf16 C=1000 channels_last", "load 128"] >= 2
    assert table.loc["logits_gradient bf16 C=1000 channels_last", "store 128"] >= 2
    assert table.loc["softmax_losses bf16 C=150 channels_last", "load 32"] >= 4  # 300 bytes a row


BUDGET = {
    # Instructions a pixel (a loss) on the path that is taken; today's on sm_90 and Triton 3.8 in brackets.
    "softmax_losses bf16 C=19": 340,  # (268); about 480 are free at 3 TB/s, an estimate of the design
    "logits_gradient bf16 C=19": 540,  # (448; the loss is computed again, not read)
    "softmax_losses bf16 C=150": 1750,  # (1372)
    "logits_gradient bf16 C=150": 2900,  # (2457)
    "softmax_losses bf16 C=19 channels_last": 560,  # (444)
    "logits_gradient bf16 C=19 channels_last": 1300,  # (981)
    "select, first pass": 45,  # (32): at 3 TB/s an H100 has time for 38 a loss
    "select, after passes": 45,  # (36)
    "select": 45,  # (36)
    "select, p and ratio tensors": 125,  # (95): powers for any p
    "upsampled_losses C=19 stride 8": 280,  # (208), rows of cells included
    "upsampled_gradient C=19 stride 8": 310,  # (169)
    "upsampled_losses C=150 stride 8": 1800,  # (1322)
    "upsampled_gradient C=150 stride 8": 250,  # (175; a chunk of 24 classes)
    "sort one run": 900,  # (629; 772 on sm_120): what perf/NOTES.md weighs the two solvers by
    "sort runs": 1300,  # (935; 1182 on sm_120)
}
BALLOTS = {"3.6": {"select, first pass": 120, "upsampled_losses C=19 stride 8": 450}}
"""The first takes 102: `tl.histogram` counts by ballots there, eight a loss, not by atomics on shared memory."""


def test_instructions_a_pixel(table):
    nvidia(table)
    for name, most in (BUDGET | BALLOTS.get(version(table), {})).items():
        assert table.loc[name, "a pixel"] < most, name


@pytest.mark.parametrize("stage", ["upsampled_losses", "upsampled_gradient"])
def test_nodes_of_upsampled_logits_are_loaded_once_a_cell(table, stage):
    """A thread has ten classes of C = 19 and one of C = 2: four loads a class of a cell, however many pixels it has.

    In the gradient two more, of sums to which another thread's are added: a row of cells, and once a strip.
    """
    nvidia(table)
    loads = table.loc[f"{stage} C=19 stride 8", "load 32"] - table.loc[f"{stage} C=2 stride 8", "load 32"]
    each = 6 if stage == "upsampled_gradient" else 4
    assert each * (10 - 1) <= loads < (each + 1) * (10 - 1) + (version(table) == "3.6")


def test_bytes_a_pixel(table):
    """Two reads and one write of the logits; 5 more bytes written, 1 of them read again.

    9 written with many classes and weights or smoothing.
    """
    size = 19 * 2
    losses, gradient = table.loc["softmax_losses bf16 C=19"], table.loc["logits_gradient bf16 C=19"]
    assert losses["read"] == size + 8 and losses["written"] == 5
    assert gradient["read"] == size + 1 and gradient["written"] == size
    assert table.loc["softmax_losses bf16 C=150 weights smoothing", "written"] == 9


def test_a_barrier_before_each_release(table):
    """What the other threads wrote must be there when one of them says so."""
    nvidia(table)
    assert (table["unguarded"] == 0).all()
    assert (table.loc[table.index.str.startswith(("select", "sort", "forward")), "release atomics"] >= 1).all()
    assert table.loc["select cooperative, two passes", "release atomics"] == 6  # a ticket and a flag a pass, 2 tickets


def test_lanes_come_to_the_same_sums(table):
    """What counts as one value has the same bits in every lane that holds it, whichever of them stores it."""
    nvidia(table)
    assert (table["lopsided"] == 0).all()
    assert not table["dependent"].any()


def test_the_reader_of_sums_sees_a_lopsided_one():
    pytest.importorskip("triton")
    from lmp_triton.perf.compiled import _lopsided

    good = "shfl.sync.bfly.b32 %r9, %r8, 16, 31, -1;\nadd.f32 %r10, %r8, %r9;\nfma.rn.f32 %r1, %r2, %r3, %r10;"
    assert _lopsided(good) == 0
    assert _lopsided(good.replace("add.f32 %r10, %r8, %r9", "fma.rn.f32 %r10, %r6, %r7, %r9")) == 1


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a in ("90", "100")][:1])
@pytest.mark.parametrize("only", ["C=19 unit=16", "select, first", "sort one run", "mark_losses"])
def test_dependent_launches(architecture, only):
    """Compiled in, each kernel waits for the one before it before it touches memory; as a rule none does."""
    found = report("--architecture", architecture, "--only", only, "--dependent").set_index("kernel")
    assert len(found) and found["dependent"].all()
    test_nothing_spills(found)


def test_paths():
    """The cheapest and the dearest way through a loop with a branch, and out of a kernel that may return early."""
    pytest.importorskip("triton")
    from lmp_triton.perf import paths

    lines = """
        /*0000*/              @P0 EXIT ;
    .L_x_0:
        /*0010*/              LDG.E R2, [R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
        /*0030*/              MUFU.LG2 R3, R2 ;
        /*0040*/              MUFU.EX2 R3, R3 ;
    .L_x_1:
        /*0050*/              IADD3 R4, R4, 0x1, RZ ;
        /*0060*/              @P2 BRA `(.L_x_0) ;
        /*0070*/              STG.E [R6.64], R4 ;
        /*0080*/              EXIT ;
    .L_x_2:
        /*0090*/              BRA `(.L_x_2) ;
    """.splitlines()
    code = paths.parse("\n".join(line.removeprefix("    ") for line in lines))

    def cost(opcode):
        return 4 if opcode.startswith("MUFU") else 1

    assert code.loops == ((1, 6),) and code.conditional == {0, 2, 6}
    assert code.loop(cost, 0) == 4 and code.loop(cost, 0, dearest=True) == 12
    assert code.path(cost) == 1 and code.path(cost, dearest=True) == 15
    assert code.path(cost, 1) == 6 and code.path(cost, 1, times={0: 3}, dearest=True) == 3 * 12 + 2
    assert code.path(cost, 0, goal=5) == 3 and code.after(cost, 0) == 2 and code.bodies[0] == {1, 2, 3, 4, 5, 6}


def test_the_reader_of_barriers_sees_a_missing_one():
    pytest.importorskip("triton")
    from lmp_triton.perf.compiled import _releases

    good = "st.global.b32 [%r1], %r2;\nbar.sync 0;\natom.global.gpu.acq_rel.add.u64 %r3, [%r4], 1;"
    assert _releases(good) == (1, 0)
    assert _releases(good.replace("bar.sync 0;\n", "")) == (1, 1)
    assert _releases(
        good + "\nred.global.gpu.relaxed.add.u64 [%r4], 1;\natom.release.gpu.global.add.u64 %r3, [%r4], 1;"
    ) == (2, 1)


def kernel_modules():
    pytest.importorskip("triton")
    from lmp_triton import kernels

    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def groups():
    """The NamedTuples that kernels are given, with their fields and what these are annotated with."""
    for module in kernel_modules():
        for group in vars(module).values():
            if isinstance(group, type) and hasattr(group, "_fields") and group.__module__ == module.__name__:
                yield group, inspect.get_annotations(group)


def test_offsets_are_64_bits_wide():
    """Strides are 64-bit arguments, whatever their values: no tensor is too large for a compiled kernel."""
    from lmp_triton.kernels.layout import Strides
    from triton import language as tl

    assert set(inspect.get_annotations(Strides).values()) == {tl.int64}
    found = [kind for _, fields in groups() for name, kind in fields.items() if name.endswith("stride")]
    assert len(found) >= 5 and {kind for kind in found if kind is not Any} == {tl.int64}


def test_no_long_lists_of_arguments():
    """Of device functions and kernels: what belongs together travels together."""
    from triton.runtime.jit import KernelInterface

    functions = {
        f"{module.__name__}.{name}": function.fn
        for module in kernel_modules()
        for name, function in vars(module).items()
        if isinstance(function, KernelInterface)
    }
    assert len(functions) > 60
    long = {name: len(inspect.signature(f).parameters) for name, f in functions.items()}
    assert {name: count for name, count in long.items() if count > 9} == {}


def test_pipelines():
    """The prediction for every pipeline, never below the floor, and in order of their launches."""
    pytest.importorskip("triton")
    found = report("--pipelines", "--architecture", ARCHITECTURES[0])
    assert (found["predicted us"] > found["must us"]).all() and (found["must us"] > found["floor us"]).all()
    assert set(found["cooperative"]) == {"none", "solve", "forward"} and len(found) == 12
    assert (found["last us"] < 0.7 * found["searched us"]).all()  # a short list is sorted, not searched
