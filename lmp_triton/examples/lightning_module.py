"""The loss in a module of PyTorch Lightning: `python -m lmp_triton.examples.lightning_module`."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lmp_triton


class Segmentation(lightning.LightningModule):
    """Any network that gives logits (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))
        self.criterion = lmp_triton.LossMaxPooling(ignore_index=255)
        self.history: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, target = batch
        loss = self.criterion(self.network(images), target)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: tuple[Tensor, Tensor], index: int) -> None:
        """Keep the loss."""
        self.history.append(outputs["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As usual."""
        return torch.optim.Adam(self.parameters(), lr=2e-2)


def main(steps: int = 10) -> list[float]:
    """Train on made-up images; returns the loss of every step."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    target = images.argmax(1)  # the brightest channel
    target[:, :4] = 255
    module = Segmentation()
    run = lightning.Trainer(
        max_epochs=steps, log_every_n_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    run.fit(module, DataLoader(TensorDataset(images, target), batch_size=4))
    return module.history


if __name__ == "__main__":
    print(main())
