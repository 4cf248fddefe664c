"""DistributedDataParallel: torchrun --nproc-per-node 2 distributed.py

Each rank sees its own half of the images. A pruner that scores by data adds its scores up over the ranks, AP looks at
weights that are the same everywhere, so every rank removes the same ones; the monitor's counts add up on request.
"""

import hashlib
import time

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the process group, which it would otherwise keep (docs/faq.md)
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pruners
from ap import AP, DNRMonitor
from recipes.data import load


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load("digits")
    x, y = digits.normalise(digits.train.images).flatten(1)[rank::world], digits.train.labels[rank::world]
    test_x, test_y = digits.normalise(digits.test.images).flatten(1), digits.test.labels

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plugin = AP(model)
    taylor = pruners.create("taylor")
    for cycle in range(5):
        with plugin.cycle(amount=0.3) as share, DNRMonitor(model, every=5) as monitor:
            for _ in range(5):
                for batch in torch.randperm(len(x)).split(25):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimizer.step()
            taylor.prune(model, plugin.masks, share, [(x, y)], F.cross_entropy)
        own, both = monitor.report(mode="train"), monitor.sync(mode="train")
        bits = torch.cat([plugin.masks[name].flatten() for name in plugin.masks])
        digest = hashlib.sha256(bits.numpy()).hexdigest()[:8]
        # One string, one write: the ranks' lines may come in any order, but whole.
        accuracy = (net(test_x).argmax(1) == test_y).double().mean()
        print(
            f"cycle {cycle} rank {rank}: {plugin.masks.alive} alive, masks {digest}, "
            f"dead neurons {own.total:.2%} here, {both.total:.2%} on all ranks; accuracy {accuracy:.1%}\n",
            end="",
            flush=True,
        )
    time.sleep(
        0.2
    )  # gloo's threads let go of the last result: before torch 2.8 the next line may wait for them for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
