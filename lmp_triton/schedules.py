"""p and ratio that change from step to step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SHAPES = ("linear", "cosine")


def anneal(step: int, steps: int, start: float, end: float, shape: str = "linear") -> float:
    """The value after `step` of `steps` steps on the way from `start` to `end`: `start` at 0, `end` from `steps` on.

    Args:
        step: 0 or more.
        steps: 1 or more.
        shape: "linear", or "cosine": slow at both ends.

    Raises:
        ValueError: step, steps or shape is none of these.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step must be at least 0 and steps at least 1, got step={step}, steps={steps}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    if step >= steps:
        return end
    done = step / steps
    if shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * done


class RatioSchedule:
    """Anneals the `ratio` of a loss: plain mean at first, the hard pixels alone once the network knows the easy ones.

        criterion = lmp_triton.LossMaxPooling(ratio=0.25)
        schedule = lmp_triton.RatioSchedule(criterion, steps=1000)
        for images, target in batches:
            criterion(model(images), target).backward()
            optimizer.step()
            schedule.step()

    A float `criterion.ratio` is replaced at each step. A 0-dim tensor is filled in place, without a host sync: under
    torch.compile and in a CUDA graph, where a float is a constant, the next call or replay reads the new value and
    nothing compiles anew.

        criterion = lmp_triton.LossMaxPooling(ratio=torch.tensor(0.25)).to(device)

    Args:
        criterion: a `LossMaxPooling`, or anything with an attribute `ratio`. Its ratio is set to `start` at once.
        steps: after so many calls of `step` the ratio is `end`, and stays there.
        start: in (0, 1]. Default 1, the mean.
        end: in (0, 1]. Default: the ratio that the criterion has now (read once; of a tensor on a GPU a host sync).
        shape: "linear" or "cosine".

    Raises:
        ValueError: an argument is none of these.
    """

    def __init__(
        self, criterion: Any, steps: int, *, start: float = 1.0, end: float | None = None, shape: str = "linear"
    ) -> None:
        self.criterion = criterion
        end = float(criterion.ratio) if end is None else end
        for name, value in (("start", start), ("end", end)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self.steps, self.start, self.end, self.shape = steps, start, end, shape
        self.last_step = 0
        self._set()

    @property
    def ratio(self) -> float:
        """The ratio at the present step."""
        return anneal(self.last_step, self.steps, self.start, self.end, self.shape)

    def step(self) -> None:
        """Go one step on; call it once after each step of the optimiser."""
        self.last_step += 1
        self._set()

    def _set(self) -> None:
        ratio = self.criterion.ratio
        if isinstance(ratio, Tensor):
            with torch.no_grad():
                ratio.fill_(self.ratio)
        else:
            self.criterion.ratio = self.ratio

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs for a resumed run to go on: the step and the options, as in torch.optim."""
        return {key: value for key, value in vars(self).items() if key != "criterion"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run left off that saved this: sets the criterion's ratio."""
        unknown = state_dict.keys() ^ self.state_dict().keys()
        if unknown:
            raise ValueError(f"not a state_dict of RatioSchedule: missing or unknown keys {sorted(unknown)}")
        vars(self).update(state_dict)
        self._set()
