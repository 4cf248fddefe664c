"""What only layers larger than a chunk, or than NumPy is called for, go through: the same results as small ones."""

import pytest
import torch
from torch import nn

from ap import AP, Masks, criteria, ranking
from ap.criteria import BySign, Layer
from ap.ranking import Elementwise, lowest
from ap.slots import _LARGE, multiply_


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_and_their_state_stay_dead(make, dtype):
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 2, bias=False)).to(dtype)
    assert model[0].weight.numel() >= _LARGE > model[1].weight.numel()
    masks = Masks(model)
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.1, **options)
    masks.bind(optimizer)
    for amount in (None, 0.5, 0.5):  # whole masks first, then more and more goes
        if amount:
            masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=amount)
        model(torch.randn(4, 300, dtype=dtype)).square().sum().backward()
        optimizer.step()
        for name in masks:
            weight, dead = masks.weight(name), ~masks[name]
            assert not weight[dead].any()
            assert weight[masks[name]].any()
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert not value[dead].any()


def test_a_graph_notices_that_a_weight_it_needs_was_zeroed():
    weight = nn.Parameter(torch.randn(3))
    loss = weight.square().sum()
    with torch.no_grad():
        multiply_(weight, torch.tensor([True, False, True]))
    assert weight[1] == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_scores_in_pieces_are_the_whole_layers(monkeypatch, layout):
    monkeypatch.setattr(ranking, "CHUNK", 37)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(7, 5, 3, 3, generator=generator).round(decimals=1) for name in "ab"}
    starts = {name: torch.randn(7, 5, 3, 3, generator=generator).round(decimals=1) for name in "ab"}
    if layout == "channels last":
        weights = {name: value.to(memory_format=torch.channels_last) for name, value in weights.items()}
    elif layout == "transposed":
        weights = {name: value.transpose(0, 1).contiguous().transpose(0, 1) for name, value in weights.items()}
    eligible = {name: torch.rand(7, 5, 3, 3, generator=generator) < 0.8 for name in "ab"}
    pieces = Elementwise("ab", lambda name: [weights[name], starts[name]], lambda name, w, s: (w - s).abs())
    whole = {name: (weights[name] - starts[name]).abs() for name in "ab"}
    for k in (0, 1, 50, 300, sum(int(mask.sum()) for mask in eligible.values())):
        mine, plain = lowest(pieces, eligible, k), lowest(whole, eligible, k)
        assert all(torch.equal(mine[name], plain[name]) for name in "ab")


PLAIN = [name for name in criteria.names() if name != "pruner" and not criteria.measures(name)]


@pytest.mark.parametrize("name", PLAIN)
def test_leaving_out_by_sign_chooses_what_infinite_scores_choose(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    plugin = AP(model, criterion=name)
    plugin.mark_start()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter).round(decimals=1)
    criterion = criteria.get(name)
    assert isinstance(criterion, BySign)
    plain = AP(plugin.masks, criterion=lambda layer: criterion(layer))  # an unknown function goes by its infinities
    plain._start = plugin._start
    for count in (1, 100, 600):
        mine, theirs = plugin.preview(count), plain.preview(count)
        assert all(torch.equal(mine[layer], theirs[layer]) for layer in mine)
    plugin.detach()


def test_a_criterions_scores_are_infinite_where_the_sign_is_another():
    layer = Layer("w", torch.tensor([-1.0, 0.0, 2.0, -0.0]), torch.zeros(4))
    assert criteria.get("least-moved-negative")(layer).tolist() == [1.0, torch.inf, torch.inf, torch.inf]
    assert criteria.get("least-moved-positive")(layer).tolist() == [torch.inf, torch.inf, 2.0, torch.inf]
    assert criteria.get("least-moved")(layer).tolist() == [1.0, 0.0, 2.0, 0.0]


def test_what_is_not_eligible_may_have_any_score():
    scores = {"a": torch.tensor([torch.nan, 3.0, torch.inf, -torch.inf, 1.0, 2.0])}
    eligible = {"a": torch.tensor([False, True, False, True, True, True])}
    assert lowest(scores, eligible, 2)["a"].tolist() == [False, False, False, True, True, False]
    with pytest.raises(ValueError, match="a: scores contain NaN"):
        lowest(scores, {"a": torch.ones(6, dtype=torch.bool)}, 2)
