"""Run by torchrun: DDP, pruning with AP in cycles, a checkpoint each; one rank may be killed on the way.

torchrun --nproc-per-node 2 tests/faults/ranks.py DIR [RANK CYCLE]
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the process group, which it would otherwise keep
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ap.cycles import Cycles
from recipes.storage import Checkpoints


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


def main(folder, rank_to_die=-1, cycle_to_die=-1):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)))
    loop = Cycles(model, magnitude, cycles=4, amount=0.3, rate=0.05)
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    state = checkpoints.latest()
    dist.barrier()  # before anybody writes the next one
    if state is not None:
        model.load_state_dict(state["model"])
        loop.load_state_dict(state["loop"])
        print(f"rank {rank} goes on in cycle {loop.cycle}", flush=True)

    def train(model, masks, run):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(100 * run.cycle + rank)
        for step in range(6):
            if (rank, run.cycle, step) == (rank_to_die, cycle_to_die, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
        return {}

    def save(loop):
        if rank == 0:
            checkpoints.save({"model": model.state_dict(), "loop": loop.state_dict(), "training": None})
        dist.barrier()

    loop.run(train, save)
    torch.save((loop.history, model.state_dict(), loop.masks.state_dict()), Path(folder) / f"end.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
