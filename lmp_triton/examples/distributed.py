"""Train with DistributedDataParallel, the loss pooled over all processes.

    torchrun --nproc-per-node 2 -m lmp_triton.examples.distributed

On GPUs where each process can have its own, else on the CPU.
"""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lmp_triton


def main() -> None:
    """A few steps; at each the loss is compared with that of one process on the whole batch."""
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same on every rank: the whole batch, of which each takes its share
    images = torch.randn(5, 3, 32, 32, device=device)
    target = torch.randint(0, 4, (5, 32, 32), device=device)
    target[target == 3] = 255
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).to(device)
    alone = copy.deepcopy(network)

    criterion = lmp_triton.LossMaxPooling(ignore_index=255, scope="batch", group=dist.group.WORLD)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    share = slice(rank, None, world)  # uneven: 3 and 2 images for two processes

    criterion_alone = lmp_triton.LossMaxPooling(ignore_index=255, scope="batch")
    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        loss = criterion(model(images[share]), target[share])
        optimizer.zero_grad()
        (loss * world).backward()  # DDP averages the gradients of the ranks; those of one global loss add up
        optimizer.step()

        loss_alone = criterion_alone(alone(images), target)
        optimizer_alone.zero_grad()
        loss_alone.backward()
        optimizer_alone.step()
        torch.testing.assert_close(loss, loss_alone, rtol=1e-4, atol=0)
        # One write a line: the ranks share the terminal.
        print(f"rank {rank} of {world}, step {step}: loss {loss.item():.6f}, alone {loss_alone.item():.6f}\n", end="")
    print(f"rank {rank}: the same loss as one process\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
