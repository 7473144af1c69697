"""Every kernel as the launchers launch it: what to hand to `compiled.compile_for`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lmp_triton.kernels import cross_entropy, gradient, losses, select, sort, weights
from lmp_triton.kernels.configs import SELECT, SORT, STREAM, pixel_config


class Launch(NamedTuple):
    """A kernel, the types of its arguments, its constants and its warps."""

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    pixels: int
    """Pixels a tile."""


def _labels(classes: int) -> str:
    return "*u8" if classes <= 256 else "*i16"


def softmax_losses(
    classes: int,
    dtype: str = "bf16",
    *,
    weighted: bool = False,
    smooth: bool = False,
    unit: int = 4,
    rows: bool = False,
) -> Launch:
    """unit: what divides the sizes, as `configs.unit_of`; rows: channels_last logits."""
    config = pixel_config(classes)
    signature = dict.fromkeys(cross_entropy.DYNAMIC, "i32") | {
        "logits": f"*{dtype}",
        "target": "*i64",
        "weight": "*fp32",
        "losses": "*fp32",
        "labels": _labels(classes),
        "nll": "*fp32",
        "workspace": "*i64",
        "smoothing": "fp32",
    }
    constants = {
        "target_pixel_stride": 1,
        "CLASSES": classes,
        "UNIT": unit,
        "PER_IMAGE": True,
        "HAS_WEIGHT": weighted,
        "SMOOTH": smooth,
        "SAVE_NLL": (weighted or smooth) and classes > config.chunk,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
    }
    _pixel_stride("pixel_stride", rows, signature, constants)
    return Launch(cross_entropy.softmax_losses_kernel, signature, constants, config.warps, config.block)


def logits_gradient(
    classes: int,
    dtype: str = "bf16",
    *,
    weighted: bool = False,
    smooth: bool = False,
    unit: int = 4,
    rows: bool = False,
) -> Launch:
    """As `softmax_losses`."""
    config = pixel_config(classes)
    signature = dict.fromkeys(gradient.DYNAMIC, "i32") | {
        "logits": f"*{dtype}",
        "losses": "*fp32",
        "labels": _labels(classes),
        "nll": "*fp32",
        "weight": "*fp32",
        "solution": "*fp32",
        "grad_output": "*fp32",
        "grad": f"*{dtype}",
        "smoothing": "fp32",
    }
    constants = {
        "CLASSES": classes,
        "UNIT": unit,
        "PER_IMAGE": True,
        "HAS_WEIGHT": weighted,
        "SMOOTH": smooth,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
    }
    _pixel_stride("pixel_stride", rows, signature, constants)
    _pixel_stride("grad_pixel_stride", rows, signature, constants)
    return Launch(gradient.logits_gradient_kernel, signature, constants, config.warps, config.block)


def mark_losses(dtype: str = "fp32", *, masked: bool = True, unit: int = 4) -> Launch:
    """Losses of a user."""
    names = ("programs_a_row", "length", "row_stride", "mask_row_stride")
    signature = dict.fromkeys(names, "i32") | {
        "values": f"*{dtype}",
        "mask": "*u8",
        "losses": "*fp32",
        "workspace": "*i64",
    }
    constants = {
        "stride": 1,
        "mask_stride": 1,
        "UNIT": unit,
        "PER_IMAGE": True,
        "HAS_MASK": masked,
        "BLOCK": STREAM.block,
    }
    return Launch(losses.mark_losses_kernel, signature, constants, STREAM.warps, STREAM.block)


_SOLVER = {
    "losses": "*fp32",
    "workspace": "*i64",
    "solution": "*fp32",
    "loss": "*fp32",
    "counts": "*i64",
    "value": "*fp32",
}


def narrow_bracket(*, first: bool = True, tensors: bool = False, unit: int = 4) -> Launch:
    """first: from the histogram of stage one; tensors: p and ratio are read on the device."""
    names = ("programs_a_row", "length", "capacity", "fraction_bits")
    signature = dict.fromkeys(names, "i32") | {"losses": "*fp32", "workspace": "*i64"}
    constants = {"FIRST": first, "UNIT": unit, "BLOCK": SELECT.block}
    _parameters(tensors, signature, constants)
    return Launch(select.narrow_bracket_kernel, signature, constants, SELECT.warps, SELECT.block)


def select_threshold(
    reduction: str = "mean", *, narrowed: bool = False, tensors: bool = False, unit: int = 4
) -> Launch:
    """narrowed: a pass of `narrow_bracket` came before; tensors: p and ratio are read on the device."""
    names = ("programs_a_row", "length", "capacity", "fraction_bits", "segments")
    signature = dict.fromkeys(names, "i32") | _SOLVER | {"short_list": "*fp32"}
    constants = {"NARROWED": narrowed, "REDUCTION": reduction, "UNIT": unit, "BLOCK": SELECT.block}
    _parameters(tensors, signature, constants)
    return Launch(select.select_kernel, signature, constants, SELECT.warps, SELECT.block)


def sort_runs(reduction: str = "mean", *, one_run: bool = False, tensors: bool = False, unit: int = 4) -> Launch:
    """one_run: segments that fit in one."""
    names = ("runs", "length", "fraction_bits", "segments")
    scratch = {"sorted_runs": "*i32", "powers": "*fp32", "sums": "*fp32"}
    signature = dict.fromkeys(names, "i32") | _SOLVER | scratch
    constants = {
        "REDUCTION": reduction,
        "ONE_RUN": one_run,
        "UNIT": unit,
        "RUN": SORT.run,
        "STEPS": SORT.run.bit_length(),
        "LANES": SORT.lanes,
    }
    _parameters(tensors, signature, constants)
    return Launch(sort.sort_kernel, signature, constants, SORT.warps, SORT.run)


def pixel_weights(dtype: str = "fp32", *, write: bool = True, total: bool = False, unit: int = 4) -> Launch:
    """The weights, or their sums."""
    names = ("programs_a_row", "grad_output_stride", "segments", "length", "fraction_bits")
    signature = dict.fromkeys(names, "i32") | {
        "losses": "*fp32",
        "solution": "*fp32",
        "grad_output": "*fp32",
        "weights": f"*{dtype}",
        "totals": "*i64",
    }
    constants = {"UNIT": unit, "WRITE": write, "SUM": total, "BLOCK": STREAM.block}
    return Launch(weights.pixel_weights_kernel, signature, constants, STREAM.warps, STREAM.block)


def _pixel_stride(name: str, rows: bool, signature: dict[str, str], constants: dict[str, Any]) -> None:
    """Triton makes a constant of an integer argument that is 1."""
    if rows:
        signature[name] = "i32"
    else:
        constants[name] = 1


def _parameters(tensors: bool, signature: dict[str, str], constants: dict[str, Any]) -> None:
    """p and ratio as the bits of a float64, or read from tensors."""
    for name in ("p", "ratio"):
        signature[name] = "*fp64" if tensors else "i64"
        constants[f"{name.upper()}_IS_TENSOR"] = tensors
