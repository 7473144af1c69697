"""What is refused. Bad input gets a clear error before anything is launched: the argument, what it was, what it must
be.

Nothing here reads a value on a GPU (that would be a host sync) unless the caller asks for it by `check_targets`.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import settings
from .settings import on_host
from .types import CrossEntropy, Pool

SCOPES = ("image", "batch")
REDUCTIONS = ("mean", "sum", "none")
TARGET_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LOSS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NO_TRANSFORMS = (
    "loss max-pooling does not run under the transforms of torch.func (vmap, grad, jvp, jacrev, …), with batched "
    "gradients (is_grads_batched, vectorize) or in forward mode: it has a gradient for backward alone "
    "(torch.autograd.grad, also with torch.func.functional_call), and nothing to batch: instead of vmap put samples "
    'into one batch, with scope="image" and reduction="none"'
)

NO_JIT_TRACE = "torch.jit.trace can't record loss max-pooling, whose gradient is its own: torch.export can"


def transforms(x: Tensor) -> None:
    """Refuse what would be silently wrong (a zero tangent), silently slow (a loop), or an error from the depths.

    (The first question has no public form; `autograd.Function.apply` asks it the same way.)
    """
    if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(NO_TRANSFORMS)
    if torch.jit.is_tracing():
        raise NotImplementedError(NO_JIT_TRACE)


def batched_gradient(grad_output: Tensor) -> None:
    """Refuse one under `is_grads_batched=True` or `vectorize=True`, which use an older vmap that has no other sign."""
    if not settings.compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_output):
        raise NotImplementedError(NO_TRANSFORMS)


def plain(x: Any) -> Any:
    """A NumPy scalar as the Python number it stands for, whatever else as it is."""
    if isinstance(x, int | float | Tensor) or not isinstance(x, numbers.Real):
        return x
    return int(x) if isinstance(x, numbers.Integral) else float(x)


def pooled_tensor(name: str, value: Tensor) -> None:
    """What the loss is differentiated by."""
    _tensor(name, value)
    transforms(value)


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _number(name: str, value: object, kind: str = "a float") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")


NO_SECOND_DERIVATIVE = (
    "loss max-pooling has no second derivative: the weights w* are held constant in its gradient "
    "(Rota Bulò et al. 2017, Section 4), so differentiating that gradient again would be wrong"
)


class _Once(torch.autograd.Function):
    """The identity on a gradient, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *others: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def refuse_second_derivative(grad: Tensor, *sources: Tensor) -> Tensor:
    """The gradient as it is; under create_graph=True, tied to its sources so that differentiating it raises."""
    return _Once.apply(grad, *sources) if torch.is_grad_enabled() else grad


def pool(options: Pool, device: torch.device | None) -> None:
    """The options that every entry point shares; device None (a module) leaves out where tensors are."""
    for name, value, fits, must in (
        ("p", options.p, lambda x: x >= 1, "at least 1"),
        ("ratio", options.ratio, lambda x: 0 < x <= 1, "in (0, 1]"),
    ):
        if isinstance(value, Tensor):
            if value.ndim or not value.is_floating_point():
                raise ValueError(
                    f"{name} must be a float or a 0-dim floating tensor, got shape {tuple(value.shape)}, {value.dtype}"
                )
            if value.requires_grad:
                raise ValueError(f"{name} must not require a gradient: the loss is not differentiated by it")
            if device is not None and value.device != device:
                lost = ": it was made there and has no value, set it anew" if value.is_meta else ""
                raise ValueError(f"{name} is on {value.device}, but the input is on {device}{lost}")
            if not on_host(value):
                continue  # read on the device: a bad value makes the loss NaN
        else:
            _number(name, value, "a float or a 0-dim tensor")
        if not fits(value):
            raise ValueError(f"{name} must be {must}, got {float(value)}")
    if options.scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {options.scope!r}")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {options.reduction!r}")
    if options.group is not None:
        process_group(options.group, options.scope)


def process_group(group: object, scope: str) -> None:
    """A group to pool over, of which this process is a member."""
    if scope == "image":
        raise ValueError('group goes with scope="batch": with scope="image" no segment spans the ranks')
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group needs torch.distributed: call torch.distributed.init_process_group() first")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group is one that this rank is not a member of: call with the group of this rank")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def cross_entropy(options: CrossEntropy) -> None:
    """The options that go into the pixel losses."""
    weight, ignore_index, label_smoothing, _ = options
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit an int64, got {ignore_index}")
    _number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if weight is None:
        return
    _tensor("weight", weight)
    if not weight.is_floating_point() or weight.ndim != 1:
        raise ValueError(f"weight must be a floating vector (C,), got shape {tuple(weight.shape)}, {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: the loss is not differentiated by its class weights")
    if on_host(weight):
        bad = ~((weight >= 0) & (weight < torch.inf))
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            raise ValueError(f"weight must be finite and not negative, got {weight[place].item()} for class {place}")


def logits_and_target(logits: Tensor, target: Tensor, options: CrossEntropy, scope: str) -> None:
    """Shapes, types and devices of the tensors of `loss_max_pooling` and `upsampled_loss_max_pooling`."""
    _tensor("target", target)
    if logits.dtype not in LOSS_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.ndim < 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape (N, C, *spatial), got {tuple(logits.shape)}")
    if logits.ndim == 2 and scope == "image" and options.align_corners is None:
        raise ValueError(
            f'logits of shape (N, C) = {tuple(logits.shape)} make every row a segment of one element: use scope="batch"'
        )
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"target must hold class indices (an integer type), got {target.dtype}; "
            "for soft targets compute the pixel losses yourself and give them to lmp_triton.pool_losses"
        )
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target must be uint8, int8, int16, int32 or int64, got {target.dtype}")
    expected = (logits.shape[0], *logits.shape[2:])
    if options.align_corners is not None:
        _upsampled(logits, target)
    elif tuple(target.shape) != expected:
        raise ValueError(
            f"target must have shape (N, *spatial) = {expected} for logits {tuple(logits.shape)}, "
            f"got {tuple(target.shape)}"
        )
    weight = options.weight
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, but logits are on {logits.device}")
    if weight is not None and weight.shape[0] != logits.shape[1]:
        raise ValueError(f"weight must have one entry a class, ({logits.shape[1]},), got {tuple(weight.shape)}")


def align_corners(value: bool) -> None:
    """Of upsampled logits."""
    if not isinstance(value, bool):
        raise TypeError(f"align_corners must be a bool, got {type(value).__name__}")


def _upsampled(logits: Tensor, target: Tensor) -> None:
    """Shapes where logits are upsampled to the size of the target."""
    given = tuple(logits.shape)
    if logits.ndim != 4 or 0 in logits.shape[2:]:
        raise ValueError(
            f"logits that are upsampled must have shape (N, C, h, w), got {given}: bilinear interpolation is of two "
            "spatial dimensions; others interpolate first and call lmp_triton.loss_max_pooling"
        )
    if target.ndim != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"target must have shape (N, H, W) = ({logits.shape[0]}, H, W) for logits {given}, whatever H and W, "
            f"got {tuple(target.shape)}"
        )


def labels(target: Tensor, classes: int, ignore_index: int, check_targets: bool) -> None:
    """Raise IndexError for a label outside [0, classes) that is not ignore_index.

    Always on the CPU; on a GPU only on request, since it is a host sync there.
    """
    if settings.traced() or not target.numel():
        return
    if not (on_host(target) or check_targets or settings.check_targets()):
        return
    lowest, highest = (int(x) for x in target.aminmax())
    if lowest >= 0 and highest < classes:
        return
    wide = target.long()
    bad = (wide != ignore_index) & ((wide < 0) | (wide >= classes))
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise IndexError(
            f"target[{', '.join(map(str, place))}] = {int(target[place])} is not a class in [0, {classes}) "
            f"and not ignore_index = {ignore_index}; label maps often mark unlabelled pixels by 255: "
            "then pass ignore_index=255"
        )


def losses_and_mask(losses: Tensor, mask: Tensor | None, scope: str) -> None:
    """Shapes, types and devices of the tensors of `pool_losses` and `optimal_weights`."""
    if losses.dtype not in LOSS_DTYPES:
        raise TypeError(f"losses must be float16, bfloat16, float32 or float64, got {losses.dtype}")
    if losses.ndim < (2 if scope == "image" else 1):
        raise ValueError(
            f'losses must have shape (N, *spatial) with scope="image", got {tuple(losses.shape)}; '
            'use scope="batch" for one segment'
        )
    if mask is None:
        return
    _tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where valid, got {mask.dtype}")
    if mask.shape != losses.shape:
        raise ValueError(f"mask must have the shape of losses, {tuple(losses.shape)}, got {tuple(mask.shape)}")
    if mask.device != losses.device:
        raise ValueError(f"mask is on {mask.device}, but losses are on {losses.device}")
