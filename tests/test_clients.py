"""The loss inside the frameworks people train with, run for real on a CPU: the examples are what the README points to.

Each is skipped where its package is missing: `pip install 'lmp-triton[clients]'`.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import lmp_triton

pytestmark = [pytest.mark.slow, pytest.mark.traced]


def falls(history, to):
    """Whether training works: the loss falls at least to this share."""
    assert torch.tensor(history).isfinite().all()
    assert history[-1] < to * history[0], history
    return True


def test_segmentation_models():
    pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")
    from lmp_triton.examples import segmentation_models

    assert falls(segmentation_models.main(), to=0.8)


def test_deeplab():
    pytest.importorskip("torchvision", reason="needs torchvision")
    from lmp_triton.examples import deeplab

    assert falls(deeplab.main(), to=0.9)


def test_lightning():
    pytest.importorskip("lightning", reason="needs lightning")
    from lmp_triton.examples import lightning_module

    assert falls(lightning_module.main(), to=0.85)


def test_registry():
    from lmp_triton.examples import registry

    assert falls(registry.main(), to=0.6)


@pytest.fixture
def hugging_face():
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate")
    from lmp_triton.examples import trainer

    return trainer


def test_trainer(hugging_face):
    assert falls(hugging_face.main(), to=0.93)


def trained(hugging_face, folder, **arguments):
    """A SegFormer without chance in it after a step of SGD on four times the same image, and the loss of the step."""
    torch.manual_seed(0)
    model = hugging_face.segformer(classifier_dropout_prob=0.0, drop_path_rate=0.0)
    run = hugging_face.trainer(
        model,
        hugging_face.images(1) * 4,
        str(folder),
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    run.train()
    return {k: v.clone() for k, v in model.named_parameters()}, run.state.log_history[0]["loss"]


def same(a, b, start):
    """The same step, and a step at all: twice or half the gradient would show."""
    for name in a:
        step = (b[name] - start[name]).abs().max()
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-3 * step.item() + 1e-7)
    return any((b[name] - start[name]).abs().max() > 1e-3 for name in a)


def test_trainer_accumulates(hugging_face, tmp_path):
    """Two batches of two, accumulated, are one of four; and the loss of the step is that of the function."""
    whole, loss = trained(hugging_face, tmp_path, per_device_train_batch_size=4)
    halves, _ = trained(hugging_face, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = hugging_face.segformer(classifier_dropout_prob=0.0, drop_path_rate=0.0)
    assert same(halves, whole, dict(model.named_parameters()))
    (sample,) = hugging_face.images(1)
    logits = model.train()(sample["pixel_values"].expand(4, -1, -1, -1)).logits
    logits = F.interpolate(logits, (64, 64), mode="bilinear")
    expected = lmp_triton.loss_max_pooling(logits, sample["labels"].expand(4, -1, -1), ignore_index=255)
    assert loss == pytest.approx(expected.item(), rel=1e-3)


def trained_by_two(rank, folder, port):
    """One of two processes of a Trainer: without a group, then over both."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from lmp_triton.examples import trainer

    results = [trained(trainer, folder, per_device_train_batch_size=2, ddp_backend="gloo")[0]]

    def pooled_together(outputs, labels, num_items_in_batch=None):
        logits = F.interpolate(outputs.logits, labels.shape[-2:], mode="bilinear")
        return lmp_triton.loss_max_pooling(logits, labels, ignore_index=255, scope="batch", group=dist.group.WORLD)

    trainer.loss_max_pooling = pooled_together
    trainer.TrainingArguments = with_average(trainer.TrainingArguments)
    results.append(trained(trainer, folder, per_device_train_batch_size=2, ddp_backend="gloo")[0])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def with_average(original):
    """TrainingArguments as they are for a loss over all processes: Trainer multiplies by their number, DDP divides."""
    return lambda *args, **kwargs: original(*args, **{**kwargs, "average_tokens_across_devices": True})


def test_trainer_of_two_processes(hugging_face, tmp_path):
    """The example's settings suit DDP, and so does a group with what its comment says."""
    whole, _ = trained(hugging_face, tmp_path, per_device_train_batch_size=4)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(trained_by_two, (str(tmp_path), port), nprocs=2)
    torch.manual_seed(0)
    start = dict(hugging_face.segformer(classifier_dropout_prob=0.0, drop_path_rate=0.0).named_parameters())
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt"):
            assert same(result, whole, start)
