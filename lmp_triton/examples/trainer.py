"""The loss in the Trainer of Hugging Face transformers, on a SegFormer: `python -m lmp_triton.examples.trainer`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import lmp_triton


def loss_max_pooling(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func`: SegFormer's logits have a quarter of the height and width of the labels, and stay so."""
    loss = lmp_triton.upsampled_loss_max_pooling(outputs.logits, labels, ignore_index=255)
    assert isinstance(loss, Tensor)
    return loss


def segformer(**options: Any) -> SegformerForSemanticSegmentation:
    """A small one, initialised at random."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_labels=3,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 40, 64],
            num_attention_heads=[1, 1, 2, 4],
            decoder_hidden_size=32,
            **options,
        )
    )


def images(count: int, size: int = 64) -> list[dict[str, Tensor]]:
    """Made-up images, in patches of 8; the label is the brightest channel."""
    pixels = torch.randn(count, 3, size // 8, size // 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = pixels.argmax(1)
    labels[:, :4] = 255
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def trainer(model: torch.nn.Module, dataset: list[dict[str, Tensor]], folder: str, **arguments: Any) -> Trainer:
    """A Trainer with this loss."""
    out = Trainer(
        model,
        TrainingArguments(
            folder,
            # Trainer would multiply a loss normalised by num_items_in_batch by the number of processes. This one is a
            # mean over images, which DDP's average suits; over all processes together (`group=`) leave it True.
            average_tokens_across_devices=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            **arguments,
        ),
        train_dataset=dataset,
        compute_loss_func=loss_max_pooling,
    )
    # For the same reason: a mean is yet to be divided by the number of accumulated batches.
    out.loss_is_scaled_for_ga = False
    return out


def main(steps: int = 10) -> list[float]:
    """Train on made-up images; returns the loss of every step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(
            segformer(), images(8), folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3
        )
        run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
