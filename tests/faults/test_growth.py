"""Ten thousand cycles leave no more behind than ten: hooks, open files, threads, objects, memory."""

import gc
import os
import threading
import tracemalloc

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optim

from ap import AP, DNRMonitor, steps
from ap.cycles import Cycles
from ap.ranking import apportion
from recipes.storage import Checkpoints, locked


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


class Writer:
    """A SummaryWriter that keeps nothing."""

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def footprint(model):
    gc.collect()
    hooks = sum(
        len(table)
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    return {
        "hooks": hooks + len(optim._global_optimizer_post_hooks) + len(steps._functions),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
    }


def rounds(number, folder, model, plugin, monitor):
    """Train, prune, activate, log, save, and start again: one cycle each."""
    fresh, weights = plugin.masks.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(8, 6)
    for cycle in range(number):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        handle = plugin.masks.bind(optimizer, mask_gradients=True)
        with plugin.cycle(amount=0.3) as share:
            with monitor:
                model(x).square().mean().backward()
            optimizer.step()
            plugin.masks.prune(magnitude(model, plugin.masks), amount=share)
        handle.remove()
        monitor.log(Writer(), cycle)
        monitor.reset()
        if cycle % 10 == 0:
            with locked(folder):
                Checkpoints(folder / "checkpoints").save({"model": {}, "loop": {}, "training": None})
            for short in (AP(model), AP(plugin.masks)):
                short.mark_start()
                short.detach()
        plugin.masks.load_state_dict(fresh)
        model.load_state_dict(weights)


def grow(number, folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    plugin, monitor = AP(model, rate=0.1), DNRMonitor(model, every=1)
    rounds(20, folder, model, plugin, monitor)
    tracemalloc.start()
    before, bytes_before = footprint(model), tracemalloc.get_traced_memory()[0]
    rounds(number, folder, model, plugin, monitor)
    monitor.history.clear()  # kept on purpose, for the monitor's pictures: a few numbers a cycle
    after, bytes_after = footprint(model), tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for what in ("hooks", "files", "threads"):
        assert after[what] == before[what], what
    assert after["objects"] - before["objects"] < 200
    assert bytes_after - bytes_before < 200_000
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 2
    return after, bytes_after - bytes_before


def test_two_hundred_cycles_leave_nothing_behind(tmp_path):
    grow(200, tmp_path)


@pytest.mark.slow
def test_ten_thousand_cycles_leave_nothing_behind(tmp_path):
    print(grow(10_000, tmp_path))


@pytest.mark.slow
def test_a_loop_of_ten_thousand_cycles():
    """One loop, a weight a cycle: its history is a row each, its state does not grow with the number otherwise."""
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 5))  # 21,000 weights
    hooks = len(steps._functions)
    loop = Cycles(model, magnitude, cycles=10_000, amount=6e-5, ap="none", rewind="init")
    history = loop.run(lambda model, masks, run: {})
    assert len(history) == 10_001
    assert history[-1]["alive"] == 21_000 - sum(row["pruned"] for row in history)
    assert [row["cycle"] for row in history] == list(range(10_001))
    assert len(steps._functions) == hooks


def test_counts_beyond_64_bits_are_apportioned_exactly():
    sizes = [2**40, 2**41, 3]
    total = 2**40 + 1
    shares = [int(share) for share in apportion(total, sizes)]
    assert sum(shares) == total
    assert all(abs(share - total * size / sum(sizes)) <= 1 for share, size in zip(shares, sizes, strict=True))
