"""Calls that launch every kernel in every variant, by the launchers themselves, on a stand-in for a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import lmp_triton

from .standin import Launch

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = (2, 3, 19, 21, 32, 150, 847, 1024)


class Case(NamedTuple):
    """A call, and the names of its launches in their order, None for what another case shows."""

    call: Callable[[], object]
    names: tuple[str | None, ...]


def inputs(shape: tuple[int, ...], dtype: str = "bf16", layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) and labels in memory that nobody has touched."""
    images, classes, height, width = shape
    if layout == "cropped":
        logits = torch.empty(images, classes, height, 2 * width, dtype=TYPES[dtype])[..., :width]
    else:
        logits = torch.empty(shape, dtype=TYPES[dtype])
    if layout == "channels_last":
        logits = torch.empty(shape, dtype=TYPES[dtype], memory_format=torch.channels_last)
    return logits.requires_grad_(), torch.empty(images, height, width, dtype=torch.long)


def forward_and_backward(
    shape: tuple[int, ...],
    dtype: str = "bf16",
    *,
    layout: str = "contiguous",
    cooperative: str = "",
    weighted: bool = False,
    **options: object,
) -> None:
    """One call and its gradient; cooperative: see `lmp_triton.settings`."""
    logits, target = inputs(shape, dtype, layout)
    weight = torch.empty(shape[1]) if weighted else None
    with mock.patch.dict(os.environ, LMP_TRITON_COOPERATIVE=cooperative):
        loss = lmp_triton.loss_max_pooling(
            logits,
            target,
            weight=weight,
            backend="triton",
            **options,  # type: ignore[arg-type]
        )
    torch.autograd.grad(loss, logits, torch.empty_like(loss))


def upsampled(
    shape: tuple[int, ...], size: tuple[int, int], *, weighted: bool = False, label_smoothing: float = 0.0
) -> None:
    """One call and its gradient where the upsampling is fused in, from bf16 logits to labels of that size."""
    logits, _ = inputs(shape)
    target = torch.empty(shape[0], *size, dtype=torch.long)
    weight = torch.empty(shape[1]) if weighted else None
    loss = lmp_triton.upsampled_loss_max_pooling(
        logits, target, weight=weight, label_smoothing=label_smoothing, backend="triton"
    )
    torch.autograd.grad(loss, logits, torch.empty_like(loss))


def cases() -> list[Case]:
    """All of them. Sizes are divisible by 4 and by nothing more, as 550·550 is, unless a name says otherwise."""
    found = []

    def add(call: Callable[..., object], *names: str | None, **options: object) -> None:
        found.append(Case(lambda: call(**options), names))

    def logits(name: str, classes: int, dtype: str = "bf16", width: int = 12, **options: object) -> None:
        name = f"{dtype} C={classes}{name}"
        names = (f"softmax_losses {name}", None, f"logits_gradient {name}")
        add(forward_and_backward, *names, shape=(2, classes, 1, width), dtype=dtype, **options)

    for classes in CLASSES:
        for dtype in ("bf16", "fp32"):
            logits("", classes, dtype)
    for unit in (1, 2, 16):
        logits(f" unit={unit}", 19, width=3 * unit)
    for classes in (3, 19, 32, 150, 847, 1000):
        logits(" channels_last", classes, layout="channels_last")
    logits(" channels_last", 150, "fp32", layout="channels_last")
    for classes in (19, 150):
        logits(" weights smoothing", classes, weighted=True, label_smoothing=0.1)
    logits("", 1024, "fp16")
    cropped = ("softmax_losses bf16 C=19 cropped", None, "logits_gradient bf16 C=19 cropped")
    add(forward_and_backward, *cropped, shape=(2, 19, 3, 12), layout="cropped")

    def search(*names: str | None, shape: tuple[int, ...], **options: object) -> None:
        add(forward_and_backward, None, *names, None, shape=shape, solver="select", **options)

    short, longer, longest = (2, 2, 1, 2**12 + 4), (2, 2, 1, 2**13 + 4), (2, 2, 1, 2**21 + 4)
    phases = ("first pass", "second pass", "after passes")
    search("select", shape=short)
    search("select, p and ratio tensors", shape=short, reduction="none", **_tensors())
    search(*(f"select, {phase}" for phase in phases), shape=longest)
    for text, shape in (("", short), (", one pass", longer), (", two passes", longest)):
        search(f"select cooperative{text}", shape=shape, cooperative="solve")
    for classes in (19, 150):
        name = f"forward cooperative bf16 C={classes}"
        shape = (2, classes, *longer[2:])
        add(forward_and_backward, name, None, shape=shape, solver="select", cooperative="forward")
    add(forward_and_backward, None, "sort one run", None, shape=(2, 2, 1, 12), solver="sort")
    add(forward_and_backward, None, "sort runs", None, shape=short, solver="sort")
    for name, classes, nodes, size in (
        ("C=19 stride 4", 19, (8, 8), (32, 32)),
        ("C=19 stride 8", 19, (4, 4), (32, 32)),
        ("C=19 stride 16", 19, (2, 2), (32, 32)),
        ("C=19 any sizes weights smoothing", 19, (5, 5), (33, 33)),
        ("C=2 stride 8", 2, (4, 4), (32, 32)),
        ("C=150 stride 8", 150, (4, 4), (32, 32)),
    ):
        stages = ("relative_nodes", "upsampled_losses", "", "upsampled_gradient", "nodes_gradient")
        names = [f"{stage} {name}" if stage else None for stage in stages]
        if classes > 32:
            names.insert(3, None)  # the weights of pixels
        options = {"weighted": True, "label_smoothing": 0.1} if "smoothing" in name else {}
        add(upsampled, *names, shape=(2, classes, *nodes), size=size, **options)
    add(_weights, "mark_losses fp32", None, "pixel_weights fp32", "pixel_weights sums")
    return found


def _tensors() -> dict[str, Tensor]:
    return {"p": torch.empty((), dtype=torch.float64), "ratio": torch.empty((), dtype=torch.float64)}


def _weights() -> None:
    losses, mask = torch.empty(2, 12), torch.empty(2, 12, dtype=torch.bool)
    lmp_triton.optimal_weights(losses, mask, backend="triton")


class Cost(NamedTuple):
    """What a launch does to a pixel; what is read again from the cache not counted."""

    pixels: int
    """Pixels a tile."""
    read: float
    """Bytes."""
    written: float = 0
    again: tuple[int, int] | None = None
    """A loop over the classes, by its number in `paths.Code.loops`, and how often it runs."""
    walk: str = ""
    """The loop over the tiles: the "first" or the "longest"; none where a program has one tile. "cells": a loop over
    rows of cells, with one over rows of pixels in it."""
    rows: int = 0
    """Of pixels, a row of cells."""


def cost(launch: Launch) -> Cost:
    """By what the kernel was given."""
    task, constants, *rest = launch.arguments

    def size(x: Tensor | None) -> int:
        return 0 if x is None else x.element_size()

    def chunks(loop: int) -> tuple[int, int] | None:
        times = -(-constants.classes // constants.chunk)
        return (loop, times) if times > 1 else None

    if launch.name == "softmax_losses_kernel":
        given, made = task.inputs, task.buffers
        read = constants.classes * size(given.logits) + size(given.target)
        written = size(made.losses) + size(made.labels) + size(made.nll)
        return Cost(constants.block, read, written, chunks(1), "longest")
    if launch.name == "logits_gradient_kernel":
        logits = constants.classes * size(task.logits)
        (form,) = rest
        nll = 0 if form.at_once or task.nll.data_ptr() == task.losses.data_ptr() else size(task.nll)
        read = logits + size(task.labels) + size(task.losses) * form.reads_losses + nll
        return Cost(constants.block, read, logits, chunks(-1))
    if launch.name == "forward_kernel":
        given, made = task.inputs, task.buffers
        losses, solution = rest
        read = losses.classes * size(given.logits) + size(given.target) + 4 * (solution.passes + 1)
        return Cost(losses.block, read, size(made.losses) + size(made.labels) + size(made.nll), walk="first")
    if launch.name == "select_kernel":
        return Cost(constants.block, 4 * (constants.end - constants.first), walk="first")
    if launch.name == "sort_kernel":
        return Cost(constants.run, 4, 4 if constants.one_run else 12)
    if launch.name == "mark_losses_kernel":
        return Cost(constants.block, size(task.given) + size(task.mask), size(task.losses), walk="longest")
    if launch.name in ("upsampled_losses_kernel", "upsampled_gradient_kernel"):
        pixels = constants.lanes * constants.span * task.grid.rows.longest
        if launch.name == "upsampled_losses_kernel":
            written = size(task.losses) + size(task.labels) + size(task.log_totals)
            return Cost(pixels, size(task.target), written, chunks(0), "cells", task.grid.rows.longest)
        read = size(task.losses) + size(task.labels) + size(task.log_totals)
        return Cost(pixels, read, walk="cells", rows=task.grid.rows.longest)
    if launch.name == "relative_nodes_kernel":
        return Cost(constants.block, constants.classes * size(task.logits), constants.classes * size(task.nodes))
    if launch.name == "nodes_gradient_kernel":
        return Cost(constants.block, constants.sides * constants.spans * size(task.sums), size(task.grad))
    assert launch.name == "pixel_weights_kernel"
    return Cost(constants.block, size(task.losses), size(task.weights), walk="longest")
