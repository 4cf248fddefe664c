"""For torchrun: DistributedDataParallel and a distributed sampler."""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the process group, which it would otherwise keep
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from recipes.data import load


def main() -> None:
    dist.init_process_group("gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    torch.manual_seed(rank)
    digits = load("digits")
    data = TensorDataset(digits.normalise(digits.train.images).flatten(1), digits.train.labels)
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=25, sampler=sampler)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    print(f"{rank} {local_rank} {loss.item()}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
