"""Under DistributedDataParallel every rank prunes the same weights, and none comes back."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ap import AP


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP broadcasts rank 0's weights
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)))
    plugin = AP(model, rate=0.05)
    assert plugin.masks.names == ["0.weight", "2.weight"]
    for _ in range(2):
        with plugin.cycle(amount=0.3) as share:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 6)).square().mean().backward()
                optimizer.step()
            scores = {name: plugin.masks.weight(name).detach().abs() for name in plugin.masks}
            plugin.masks.prune(scores, amount=share)
    torch.save(plugin.masks.state_dict(), f"{results}.{rank}")
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path / "masks")), nprocs=2)
    first, second = (torch.load(f"{tmp_path}/masks.{rank}", weights_only=True) for rank in range(2))
    for name, bits in first["bits"].items():
        assert torch.equal(bits, second["bits"][name])
    alive = sum(int(((bits[:, None] >> torch.arange(8)) & 1).sum()) for bits in first["bits"].values())
    assert alive == 128 - round(0.3 * 128) - round(0.3 * 90)
