"""Dead-neuron rates set by shifting biases: exactly, layer by layer, whatever lies between a bias and its ReLU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ap import measure_dnr
from recipes import models, studies
from recipes.studies.decisive import RATE_ONLY, _biases, _shift, set_rates_


def test_a_shift_lands_half_way_between_two_values() -> None:
    z = torch.tensor([3.0, -1.0, 1.0, 2.0])
    assert _shift(z, 0.5).item() == -1.5
    assert _shift(z, 0.0).item() > 1.0
    assert _shift(z, 1.0).item() == -3.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=60, unique=True), st.floats(0, 1))
def test_a_shift_makes_just_so_many_dead(values: list[int], rate: float) -> None:
    z = torch.tensor(values, dtype=torch.float32)
    dead = int((z + _shift(z, rate) <= 0).sum())
    assert dead == round(rate * len(values))


def networks() -> list[tuple[str, nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("lenet-300-100", models.create("lenet-300-100", image_size=8, width=0.2), torch.randn(200, 3, 8, 8)),
        ("cnn", models.create("cnn", image_size=8), torch.randn(100, 3, 8, 8)),
        ("resnet20", models.create("resnet20", image_size=8, width=0.25), torch.randn(60, 3, 8, 8)),
    ]


@pytest.mark.parametrize(("name", "model", "x"), networks(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_layer_gets_the_rate_asked_for(name: str, model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    layers = list(measure_dnr(model, [x]).layers)
    targets = {layer: 0.2 + 0.6 * i / len(layers) for i, layer in enumerate(layers)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_rates_(model, x, targets)
    report = measure_dnr(model, [x])
    for layer, target in targets.items():
        assert report.layers[layer].total == pytest.approx(target, abs=0.005), layer
    assert model.training
    model.eval()
    owners = {id(owner) for owner in _biases(model, x).values()}
    for key, value in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        may_change = kind == "bias" and id(model.get_submodule(module)) in owners
        assert may_change or torch.equal(value, before[key]), key


def test_in_a_resnet_it_is_batch_norms_bias_before_the_sum() -> None:
    model = models.create("resnet20", image_size=8, width=0.25)
    names = {id(module): name for name, module in model.named_modules()}
    owners = {activation: names[id(owner)] for activation, owner in _biases(model, torch.zeros(2, 3, 8, 8)).items()}
    assert len(owners) == 19
    assert all(isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in owners.values())
    assert len(set(owners.values())) == 19


def test_the_study_gives_the_ticket_of_none_the_rate_of_ap() -> None:
    outcome = studies.run("decisive", quick=True, seeds=1, doses=(0.2,))
    rows = outcome.data["cnn"]
    for cycle in (1, 2):
        rates = {row["arm"]: row["total"] for row in rows if row["cycle"] == cycle}
        assert rates[RATE_ONLY] == pytest.approx(rates["AP"], abs=0.02)
        assert rates["none, rate +0.2"] > rates["none"] + 0.1
        densities = {row["density"] for row in rows if row["cycle"] == cycle}
        assert len(densities) == 1
