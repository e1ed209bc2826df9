"""The same model trained by PyTorch, data-parallel (DDP over gloo) or in one process.

A peer of `peers.py`; needs nothing but torch and numpy:

    python benchmarks/peer_torch.py DATA.npz --processes=2 --threads=1 --batch_size=256 --steps=100

prints a line of JSON. DATA.npz holds uint8 'images' [n, 28, 28, 1] and int32 'labels' [n]. The batch
size is that of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor], data: tuple
) -> float:
    """Takes a step for each batch of indices; returns the mean loss, which makes sure that all is done."""
    images, labels = data
    loss_fn = nn.CrossEntropyLoss()
    total = torch.zeros(())
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(images[batch].contiguous(memory_format=torch.channels_last)), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total) / len(batches)


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = np.load(args.data)
    # One channel is one memory layout, so this copy is channels_last as well.
    images = torch.from_numpy(data['images']).permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous()
    labels = torch.from_numpy(data['labels']).long()

    model: nn.Module = cnn().to(memory_format=torch.channels_last)
    if args.processes > 1:
        dist.init_process_group(
            'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=args.processes
        )
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    # Each process its slice of every global batch, in an order that all draw alike.
    rows = torch.randperm(len(images))[: len(images) // args.batch_size * args.batch_size]
    each = args.batch_size // args.processes
    mine = rows.reshape(-1, args.batch_size)[:, rank * each : (rank + 1) * each]
    batches = [mine[i % len(mine)] for i in range(args.warmup + args.steps)]

    train(model, optimizer, batches[: args.warmup], (images, labels))
    if args.processes > 1:
        dist.barrier()
    start = time.perf_counter()
    train(model, optimizer, batches[args.warmup :], (images, labels))
    if args.processes > 1:
        dist.barrier()
    seconds = time.perf_counter() - start
    if rank == 0:
        rate = args.steps * args.batch_size / seconds
        print(json.dumps({'images_per_second': rate, 'torch': torch.__version__}), flush=True)
    if args.processes > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('data')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--batch_size', type=int, default=256)
    parser.add_argument('--warmup', type=int, default=20)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args()
    if args.processes == 1:
        return worker(0, args, 0)
    # Over the loopback: a host's own name may resolve to an address that nobody listens on.
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    os.environ['OMP_NUM_THREADS'] = str(args.threads)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (args, port), nprocs=args.processes)
    return None


if __name__ == '__main__':
    main()
