"""Under DistributedDataParallel, scores that use data are reduced, so that every rank prunes the same weights."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pruners
from ap.masks import Masks

NAMES = ["random", "lamp", "snip", "taylor", "grasp", "wanda", "synaptic-stripping", "synflow", "lookahead"]


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def data(rank):
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator))]


def prune_with_all(model, batches):
    states = {}
    for name in NAMES:
        with torch.no_grad():
            for own, fresh in zip(model.parameters(), build().parameters(), strict=True):
                own.copy_(fresh)
        masks = Masks(model)
        options = {"rounds": 3} if name == "synflow" else {}
        pruners.create(name, **options).prune(model, masks, 0.4, batches, F.cross_entropy)
        states[name] = {n: masks[n].clone() for n in masks}
    return states


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    states = prune_with_all(model, data(rank))
    with pytest.raises(TypeError, match=r"prune model\.module"):
        pruners.create("structured-magnitude").prune(model, Masks(model), 0.5, data(rank))
    torch.save(states, f"{results}.{rank}")
    dist.destroy_process_group()


def test_ranks_agree_with_each_other_and_with_one_process_that_sees_all(tmp_path):
    mp.spawn(worker, args=(str(tmp_path / "store"), str(tmp_path / "masks")), nprocs=2)
    first, second = (torch.load(f"{tmp_path}/masks.{rank}", weights_only=True) for rank in range(2))
    alone = prune_with_all(build(), data(0) + data(1))
    for name in NAMES:
        for weight, mask in first[name].items():
            assert torch.equal(mask, second[name][weight]), name
            if name != "grasp":  # each rank's product uses the gradient of all, up to rounding
                assert torch.equal(mask, alone[name][weight]), name
