"""What a call costs the host apart from the kernels: the checks, autograd, and the same by operators.

    python perf/host_cost.py

The stages are replaced by ones that return the same tensors each time, so this runs on a CPU and shows what a kernel
launch comes on top of. Prints the median of the fastest half of the rounds, in microseconds.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # a GPU is not needed, and nothing is launched

import torch

import lmp_triton
from lmp_triton import checks, dispatch, fused, operators
from lmp_triton.autograd import FromLogits, Options


def replace_stages(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Run each stage once, then return what it returned."""
    pixels = fused.softmax_losses(logits, target, None, 255, 0.0, logits.shape[0])
    pooling = fused.solve(pixels, 1.3, 0.25, logits.shape[0], "mean")
    grad = torch.zeros_like(logits)
    fused.softmax_losses = lambda *_: pixels._replace(losses=pixels.losses.detach())  # type: ignore[assignment]
    fused.solve = lambda *_: pooling._replace(value=pooling.value.detach())  # type: ignore[assignment]
    fused.logits_gradient = lambda *_: grad.detach()  # type: ignore[assignment]


def microseconds(function: Callable[[], object], rounds: int = 41, calls: int = 500) -> float:
    """The time of one call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(sorted(times)[: rounds // 2])


def main() -> None:
    torch.set_num_threads(1)
    logits, target = torch.randn(1, 3, 16), torch.zeros(1, 16, dtype=torch.long)
    replace_stages(logits, target)
    logits.requires_grad_()
    options = Options("triton", 1, "mean", "auto", 255)
    checks.labels = lambda *_: None  # not done on a GPU

    def function() -> torch.Tensor:
        return FromLogits.apply(logits, target, None, 1.3, 0.25, options)[0]

    def operator() -> torch.Tensor:
        return operators.pool_logits(logits, target, None, 1.3, 0.25, options)[0]

    def loss() -> torch.Tensor:
        return lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend="triton")

    compiled = torch.compile(loss, backend="aot_eager")
    print(f"torch {torch.__version__}, {dispatch.choose(logits, 'triton')}; microseconds a call")
    print("forward:")
    print(f"  autograd.Function                        {microseconds(function):6.1f}")
    print(f"  operator                                 {microseconds(operator):6.1f}")
    print(f"  loss_max_pooling                         {microseconds(loss):6.1f}")
    print("    of that, what operators added to it:")
    print(f"    refusal of transforms                  {microseconds(lambda: checks.transforms(logits)):6.2f}")
    print(f"    whether code is being traced           {microseconds(torch.compiler.is_compiling):6.2f} (4 times)")
    print("forward and backward:")
    print(f"  autograd.Function                        {microseconds(lambda: function().backward()):6.1f}")
    print(f"  operator                                 {microseconds(lambda: operator().backward()):6.1f}")
    print(f"  loss_max_pooling                         {microseconds(lambda: loss().backward()):6.1f}")
    print(f"  torch.compile(loss_max_pooling)          {microseconds(lambda: compiled().backward()):6.1f}")


if __name__ == "__main__":
    main()
