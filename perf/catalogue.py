"""Every kernel as the launchers launch it: what to hand to `compiled.compile_for`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmp_triton.kernels import configs, cross_entropy, forward, gradient, losses, select, sort, weights
from lmp_triton.kernels.launch import TYPES


class Launch(NamedTuple):
    """A kernel, the types of its arguments, its constants and its warps."""

    kernel: Any
    signature: Mapping[str, str]
    """The type of each argument that is no constant, as "*bf16" or "i32"."""
    constants: Mapping[str, Any]
    num_warps: int
    pixels: int
    """Pixels a tile."""
    read: float = 0
    """Bytes read a pixel, at least; what is read again from the cache not counted."""
    written: float = 0
    """Bytes written a pixel."""
    again: tuple[int, int] | None = None
    """A loop over the classes, by its number in `Compiled.loops`, and how often it runs."""
    cooperative: bool = False


def _launch(
    kernel: Any, pointers: Mapping[str, str | None], constants: Mapping[str, Any], warps: int, pixels: int, **more: Any
) -> Launch:
    """pointers: the type of each tensor, None where there is none."""
    given = {name: f"*{type_}" for name, type_ in pointers.items() if type_}
    none = {name: None for name, type_ in pointers.items() if not type_}
    parameters = inspect.signature(kernel.fn).parameters.values()
    numbers = {x.name: TYPES[x.annotation] for x in parameters if x.annotation in TYPES}
    found = given.keys() | none.keys() | numbers.keys() | constants.keys()
    assert found == {x.name for x in parameters}, (kernel, found ^ {x.name for x in parameters})
    return Launch(kernel, given | numbers, none | dict(constants), warps, pixels, **more)


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _logits(
    table: configs.Table,
    classes: int,
    dtype: str,
    weighted: bool,
    smooth: bool,
    unit: int,
    layout: str,
    gradient: bool,
) -> tuple[configs.LogitsConfig, dict[str, str | None], dict[str, Any], bool]:
    """The configuration, the tensors, the constants, and whether −log softmax is stored beside the losses."""
    adjacent = layout == "channels_last"
    rows = adjacent and classes > table.rows.above
    if rows:
        config = configs.row_config(table, classes, unit, SIZES[dtype])
    else:
        config = configs.pixel_config(table, classes, adjacent)
    nll = (weighted or smooth) and (rows or classes > config.chunk)
    pointers = {
        "logits": dtype,
        "weight": "fp32" if weighted else None,
        "losses": "fp32",
        "labels": "u8" if classes <= 256 else "i16",
        "nll": "fp32" if nll else None,
    }
    constants = {
        "CLASSES": classes,
        "UNIT": unit if rows or not adjacent else 1,
        "LEVELS": 2 if layout == "cropped" else 1,
        "ADJACENT": not adjacent,
        "OTHER_ADJACENT": not (adjacent and gradient),
        "ROWS": rows,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
        "PER_IMAGE": True,
        "SMOOTH": smooth,
    }
    return config, pointers, constants, nll


def _chunks(loop: int, classes: int, config: configs.LogitsConfig) -> tuple[int, int] | None:
    chunks = -(-classes // config.chunk)
    return (loop, chunks) if chunks > 1 else None


def softmax_losses(
    classes: int,
    dtype: str = "bf16",
    *,
    table: configs.Table = configs.AMPERE,
    weighted: bool = False,
    smooth: bool = False,
    unit: int = 4,
    layout: str = "contiguous",
) -> Launch:
    """unit: what divides the sizes, as `layout.unit_of`; layout: or "channels_last", "cropped"."""
    config, pointers, constants, nll = _logits(table, classes, dtype, weighted, smooth, unit, layout, False)
    return _launch(
        cross_entropy.softmax_losses_kernel,
        pointers | {"target": "i64", "workspace": "i64"},
        constants,
        config.warps,
        config.block,
        read=classes * SIZES[dtype] + 8,
        written=4 + (1 if classes <= 256 else 2) + 4 * nll,
        again=_chunks(1, classes, config),
    )


def logits_gradient(
    classes: int,
    dtype: str = "bf16",
    *,
    table: configs.Table = configs.AMPERE,
    weighted: bool = False,
    smooth: bool = False,
    unit: int = 4,
    layout: str = "contiguous",
) -> Launch:
    """As `softmax_losses`."""
    config, pointers, constants, nll = _logits(table, classes, dtype, weighted, smooth, unit, layout, True)
    return _launch(
        gradient.logits_gradient_kernel,
        pointers | {"nll": "fp32", "solution": "fp32", "grad_output": "fp32", "grad": dtype},
        constants | {"WIDTH": 1 << (classes - 1).bit_length() if layout == "channels_last" and not config.rows else 0},
        config.warps,
        config.block,
        read=classes * SIZES[dtype] + 4 + (1 if classes <= 256 else 2) + 4 * nll,
        written=classes * SIZES[dtype],
        again=_chunks(-1, classes, config),
    )


def mark_losses(
    dtype: str = "fp32", *, table: configs.Table = configs.AMPERE, masked: bool = True, unit: int = 4
) -> Launch:
    """Losses of a user."""
    return _launch(
        losses.mark_losses_kernel,
        {"values": dtype, "mask": "u8" if masked else None, "losses": "fp32", "workspace": "i64"},
        {"UNIT": unit, "ADJACENT": True, "PER_IMAGE": True, "BLOCK": table.stream.block},
        table.stream.warps,
        table.stream.block,
        read=SIZES[dtype] + masked,
        written=4,
    )


_SOLUTION = {"solution": "fp32", "loss": "fp32", "counts": "i64", "value": "fp32"}


def _parameters(tensors: bool) -> dict[str, str | None]:
    """Whether p and ratio are read on the device."""
    return dict.fromkeys(("p_tensor", "ratio_tensor"), "fp64" if tensors else None)


def select_threshold(
    reduction: str = "mean",
    *,
    table: configs.Table = configs.AMPERE,
    passes: int = 0,
    phases: tuple[int, int] = (0, 1),
    wait: bool = False,
    tensors: bool = False,
    unit: int = 4,
) -> Launch:
    """passes: how many narrow the bracket; phases: from which to before which; tensors: p, ratio read on the device."""
    config = table.select
    return _launch(
        select.select_kernel,
        {"losses": "fp32", "short_list": "fp32", "workspace": "i64"} | _SOLUTION | _parameters(tensors),
        {
            "UNIT": unit,
            "PASSES": passes,
            "FIRST": phases[0],
            "END": phases[1],
            "WAIT": wait,
            "REDUCTION": reduction,
            "BLOCK": config.block,
            "SOLVE_BLOCK": config.solve_block,
        },
        config.warps,
        config.block,
        read=4 * (phases[1] - phases[0]),
        cooperative=wait,
    )


def forward_in_one(
    classes: int,
    dtype: str = "bf16",
    *,
    table: configs.Table = configs.AMPERE,
    passes: int = 1,
    unit: int = 4,
) -> Launch:
    """Losses and all phases of the solve."""
    config, pointers, constants, _nll = _logits(table, classes, dtype, False, False, unit, "contiguous", False)
    more = {
        "LOSSES_UNIT": unit,
        "PASSES": passes,
        "REDUCTION": "mean",
        "SOLVE_BLOCK": table.forward_solve_block,
    }
    return _launch(
        forward.forward_kernel,
        pointers | {"target": "i64", "workspace": "i64", "short_list": "fp32"} | _SOLUTION | _parameters(False),
        constants | more,
        config.warps,
        config.block,
        read=classes * SIZES[dtype] + 8 + 4 * (passes + 1),
        written=4 + (1 if classes <= 256 else 2),
        cooperative=True,
    )


def sort_runs(
    reduction: str = "mean",
    *,
    table: configs.Table = configs.AMPERE,
    one_run: bool = False,
    tensors: bool = False,
    unit: int = 4,
) -> Launch:
    """one_run: segments that fit in one."""
    config = table.sort
    scratch = {"sorted_runs": "i32", "powers": None if one_run else "fp32", "sums": None if one_run else "fp32"}
    return _launch(
        sort.sort_kernel,
        {"losses": "fp32", "workspace": "i64"} | scratch | _SOLUTION | _parameters(tensors),
        {
            "REDUCTION": reduction,
            "ONE_RUN": one_run,
            "UNIT": unit,
            "RUN": config.run,
            "STEPS": config.run.bit_length(),
            "LANES": config.lanes,
        },
        config.warps,
        config.run,
        read=4,
        written=4 if one_run else 12,
    )


def pixel_weights(
    dtype: str = "fp32",
    *,
    table: configs.Table = configs.AMPERE,
    write: bool = True,
    total: bool = False,
    unit: int = 4,
) -> Launch:
    """The weights, or their sums."""
    return _launch(
        weights.pixel_weights_kernel,
        {
            "losses": "fp32",
            "solution": "fp32",
            "grad_output": "fp32",
            "weights": dtype if write else None,
            "totals": "i64" if total else None,
        },
        {"UNIT": unit, "BLOCK": table.stream.block},
        table.stream.warps,
        table.stream.block,
        read=4,
        written=SIZES[dtype] * write,
    )
