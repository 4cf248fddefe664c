"""Other people's pruning code, against the real packages."""

from __future__ import annotations

import copy

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import pruners
from ap import AP, Masks, measure_dnr


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


def test_channels_last_weights_in_a_torch_prune_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    model = model.to(memory_format=torch.channels_last)
    layers = [model[0], model[2], model[5]]
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)
    plugin = AP(model, rate=0.05)
    alive = plugin.masks.alive
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with plugin.cycle(amount=0.25):
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            for layer in layers:  # by hand: prune.l1_unstructured itself fails on such a weight
                size = layer.weight.detach().abs()
                bar = size[size > 0].kthvalue(round(0.2 * int((size > 0).sum()))).values
                prune.custom_from_mask(layer, "weight", (size > bar).to(size))
        expected = sum(int(layer.weight_mask.sum()) for layer in layers)
        assert plugin.masks.alive == expected == sum(int((layer.weight != 0).sum()) for layer in layers)
        assert expected == pytest.approx(0.75 * alive, abs=3)  # one rounding a layer
        assert model[0].weight_orig.is_contiguous(memory_format=torch.channels_last)
        alive = expected


def test_a_loop_that_writes_zeros_in_place() -> None:
    """No masks, no library: `weight[small] = 0`, momentum and rewinding included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    weights = [model[0].weight, model[2].weight]
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    plugin = AP(model, rate=0.05)
    x, y = torch.rand(64, 8), torch.randint(4, (64,))
    expected = 384
    for _ in range(4):
        with plugin.cycle(amount=0.25) as share:
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                assert sum(int((w != 0).sum()) for w in weights) == expected
            count = round(share * expected)
            bar = torch.cat([w.detach()[w != 0].abs() for w in weights]).kthvalue(count).values
            with torch.no_grad():
                for w in weights:
                    w[w.abs() <= bar] = 0
        expected -= round(0.25 * expected)
        assert plugin.masks.alive == sum(int((w != 0).sum()) for w in weights) == expected
        model.load_state_dict(start)  # brings the dead back: entering the next cycle puts them down again
    plugin.masks.apply_()
    assert sum(int((w != 0).sum()) for w in weights) == expected


@pytest.mark.parametrize(
    ("name", "options", "activation"),
    [
        ("resnet10t", {}, "layer1.0.act1"),
        ("mobilenetv3_small_050", {}, "blocks.0.0.bn1.act"),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, "blocks.0.mlp.act"),
    ],
)
def test_timm_models_are_pruned_and_measured(name: str, options: dict[str, int], activation: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    plugin = AP(model)
    alive = plugin.masks.alive
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=1e-4)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    with plugin.cycle(amount=0.3) as share:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruners.create("magnitude").prune(model, plugin.masks, share)
    optimizer.step()
    plugin.detach()
    assert plugin.masks.alive == alive - round(0.3 * alive)
    dead = sum(int((plugin.masks.weight(n)[~plugin.masks[n]] != 0).sum()) for n in plugin.masks)
    assert dead == 0
    report = measure_dnr(model, [x])
    assert activation in report.layers
    if name == "resnet10t":
        assert 0 < report.total < 1
