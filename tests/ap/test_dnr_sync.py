"""monitor.sync() over torch.distributed ranks: two real processes with gloo."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from ap.dnr import DNRMonitor

BATCHES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 3, 4, 5)]
LARGER = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(9))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Tanh())


def work(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(model())
    net.eval()
    results = {}
    with torch.no_grad(), DNRMonitor(net, every=1) as monitor:
        for x in BATCHES[rank::2]:
            net(x)
        results["local"] = monitor.report().to_dict()
        results["synced"] = monitor.sync().to_dict()
        results["again"] = monitor.sync("eval").to_dict()
        if rank == 0:  # one rank alone sees another size, and training passes
            net(LARGER)
            net.train()
            net(BATCHES[0])
        results["uneven"] = monitor.sync("eval").to_dict()
        results["train"] = monitor.sync("train").to_dict()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def alone(batches):
    net = model().eval()
    with torch.no_grad(), DNRMonitor(net, every=1) as monitor:
        for x in batches:
            net(x)
    return monitor.report().to_dict()


def without_mode(report):
    return {key: value for key, value in report.items() if key != "mode"}


def test_a_report_is_local_and_sync_is_the_sum(ranks):
    assert [r["local"] for r in ranks] == [alone(BATCHES[0::2]), alone(BATCHES[1::2])]
    whole = alone(BATCHES)
    for r in ranks:
        assert r["synced"] == whole
        assert without_mode(r["again"]) == without_mode(whole)  # summed once, however often it is called


def test_ranks_may_differ_in_what_they_saw(ranks):
    expected = without_mode(alone([*BATCHES, LARGER]))
    for r in ranks:
        assert without_mode(r["uneven"]) == expected
        assert (r["train"]["passes"], r["train"]["layers"]["1"]["samples"]) == (1, 2)


def test_without_distributed_it_is_the_report():
    net = model()
    with DNRMonitor(net, every=1) as monitor:
        net(BATCHES[0])
    assert monitor.sync("train") == monitor.report("train")
