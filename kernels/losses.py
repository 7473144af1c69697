"""Stage one for losses that a user brings along: check them, mark the pixels that take no part, take statistics."""

import torch
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig, programs
from .launch import kernel, launch
from .layout import unit_of
from .workspace import BINS, WORDS, poison, publish, tally


@kernel
def mark_losses_kernel(
    values,
    mask,
    losses,
    workspace,
    programs_a_row: tl.int32,
    length: tl.int32,
    row_stride: tl.int64,
    stride: tl.int64,
    mask_row_stride: tl.int64,
    mask_stride: tl.int64,
    UNIT: tl.constexpr,
    ADJACENT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring losses into the form of the solver; grid N × programs, which stride over the tiles.

    Reads   values (N, L), any float type, strided; mask (N, L) uint8, strided, not 0 where valid.
    Writes  losses (N, L) float32: ℓ, −1 where the mask is 0, NaN where ℓ is negative or not finite;
            workspace: maximum, count and histogram of the segment, BINS + 2 atomics a program.
    Bytes   sizeof(value) + 1 read, 4 written a pixel.

    ADJACENT: the entries of a row of values and of mask lie side by side. length and the row strides are in units of
    UNIT elements, see `layout.unit_of`.
    """
    length = length * UNIT
    row_stride = row_stride * UNIT
    mask_row_stride = mask_row_stride * UNIT
    stride = 1 if ADJACENT else stride
    mask_stride = 1 if ADJACENT else mask_stride
    row = (tl.program_id(0) // programs_a_row).to(tl.int64)
    maximum = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    histogram = tl.zeros([BINS], tl.int32)
    for tile in range(tl.program_id(0) % programs_a_row, tl.cdiv(length, BLOCK), programs_a_row):
        start = tl.cast(tile, tl.int64) * BLOCK
        within = tl.arange(0, BLOCK)
        inside = start + within < length
        loss = tl.load(values + row * row_stride + (start + within) * stride, mask=inside, other=0.0)
        valid = inside
        if mask is not None:
            there = mask + row * mask_row_stride + (start + within) * mask_stride
            valid = inside & (tl.load(there, mask=inside, other=0) != 0)
        loss = poison(loss.to(tl.float32), valid)
        tl.store(losses + row * length + start + within, tl.where(valid, loss, -1.0), mask=inside)
        maximum, count, histogram = tally(loss, valid, maximum, count, histogram)
    segment = row if PER_IMAGE else row * 0
    publish(workspace + segment * WORDS, maximum, count, histogram)


def mark_losses(values: Tensor, mask: Tensor | None, losses: Tensor, workspace: Tensor, config: StreamConfig) -> None:
    """Fill losses and workspace (zeroed by the caller) from values (N, L) and mask (N, L) bool."""
    rows, length = values.shape
    strides = values.stride()
    mask_strides = strides if mask is None else mask.stride()
    unit = unit_of(length, strides[0], mask_strides[0])
    programs_a_row = programs(length, rows, config, values.device)
    launch(
        mark_losses_kernel,
        rows * programs_a_row,
        (values, mask if mask is None else mask.view(torch.uint8), losses, workspace),
        (
            programs_a_row,
            length // unit,
            strides[0] // unit,
            strides[1],
            mask_strides[0] // unit,
            mask_strides[1],
        ),
        {
            "UNIT": unit,
            "ADJACENT": strides[1] == mask_strides[1] == 1,
            "PER_IMAGE": workspace.numel() > WORDS.value + 1,
            "BLOCK": config.block,
        },
        config.warps,
    )
