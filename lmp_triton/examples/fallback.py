"""A loss max-pooling in plain PyTorch that asks lmp_triton for its weights where that is installed and can serve them.

For authors of such a module: lmp_triton stays optional, and their own code serves wherever it doesn't.

    python -m lmp_triton.examples.fallback
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    import lmp_triton
except ImportError:
    lmp_triton = None  # type: ignore[assignment]


class PlainLossMaxPooling(nn.Module):
    """Somebody's module: losses (N, pixels) to the mean of the pooled losses; 1 < p < ∞."""

    def __init__(self, p: float = 1.3, ratio: float = 0.25) -> None:
        super().__init__()
        self.p, self.ratio = p, ratio

    def forward(self, losses: Tensor) -> Tensor:
        """The weights are constants: the gradient is w*."""
        if self.why_plain(losses) is None:
            weights, _ = lmp_triton.optimal_weights(losses, p=self.p, ratio=self.ratio, backend="triton")
        else:
            weights = self.plain_weights(losses.detach())
        return (weights * losses).sum(1).mean()

    def why_plain(self, losses: Tensor) -> str | None:
        """The reason why the code below serves, or None."""
        return "lmp_triton is not installed" if lmp_triton is None else lmp_triton.obstacle(losses=losses)

    def plain_weights(self, losses: Tensor) -> Tensor:
        """By sorting: η(α) > 0 from one loss on, and α* is the threshold before it (Section 4 of the paper)."""
        n, q = losses.shape[1], self.p / (self.p - 1)
        m = min(max(self.ratio * n, 1.0), float(n))
        largest = losses.amax(1, keepdim=True).clamp_min(1e-30)
        scaled = (losses / largest).double()
        ascending = scaled.sort(1).values
        powers = ascending**q
        sums, above = powers.cumsum(1), torch.arange(n - 1, -1, -1, device=losses.device)
        heavy = ((m - above) * powers > sums).sum(1, keepdim=True)  # |J*|
        rest = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1).gather(1, n - heavy)
        alpha = (rest / (m - heavy)) ** (1 / q)
        tau = n ** (-1 / q) * m ** (-1 / self.p)
        return (tau * (scaled / alpha.clamp_min(1e-300)).clamp_max(1.0) ** (q - 1)).to(losses.dtype)


def main() -> None:
    """Say which code serves."""
    losses = torch.rand(2, 1000, device="cuda" if torch.cuda.is_available() else "cpu")
    criterion = PlainLossMaxPooling()
    reason = criterion.why_plain(losses)
    print(f"loss {criterion(losses).item():.6f} by " + (f"plain PyTorch: {reason}" if reason else "lmp_triton"))


if __name__ == "__main__":
    main()
