"""Other people's pruning code, against the real packages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ap import AP, Masks


def test_to_torch_prune_and_back_on_channels_last_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    masks = Masks(model)
    masks.prune({n: masks.weight(n).detach().abs() for n in masks}, amount=0.5)
    before = model(torch.ones(1, 3, 8, 8))
    masks.to_torch_prune()
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), before)
    again = Masks.from_torch_prune(model)
    for name in masks:
        assert torch.equal(again[name], masks[name])
        assert torch.equal(model.get_submodule(name[0]).weight_mask.bool(), masks[name])
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    assert int((model[0].weight == 0).sum()) == int((~masks["0.weight"]).sum())


def test_from_torch_prune_wants_a_pruned_model() -> None:
    with pytest.raises(ValueError, match="masked none"):
        Masks.from_torch_prune(nn.Linear(2, 2))


def test_the_owner_of_a_torch_prune_loop_keeps_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    plugin = AP(model, rate=0.05)
    with plugin.cycle(amount=0.25) as share:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.rand(4, 8)).square().mean().backward()
        optimizer.step()
        parts = [(model[0], "weight"), (model[2], "weight")]
        prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=share)
    plugin.detach()
    assert sum(int(layer.weight_mask.sum()) for layer, _ in parts) == plugin.masks.alive == 240
