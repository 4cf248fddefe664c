"""Rates and means set by shifting biases: exactly, layer by layer, whatever lies between a bias and its ReLU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ap import measure_dnr
from recipes import models, studies
from recipes.studies.decisive import RATE_ONLY
from recipes.studies.means import AP_RESTORED, MEANS_KEPT, MEANS_ONLY, NONE_RESTORED
from recipes.studies.tickets import _biases, _shift, means, set_means_, set_rates_


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


@pytest.mark.parametrize(("name", "model", "x"), networks(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_channel_gets_the_mean_asked_for(name: str, model: nn.Module, x: torch.Tensor) -> None:
    targets = {layer: torch.randn_like(mean) for layer, mean in means(model, x).items()}
    set_means_(model, x, targets)
    seen: dict[str, torch.Tensor] = {}
    for layer in targets:
        hook = lambda module, inputs, layer=layer: seen.update({layer: inputs[0]})  # noqa: E731
        model.get_submodule(layer).register_forward_pre_hook(hook)
    with torch.no_grad():
        model.eval()(x)
    for layer, target in targets.items():
        z = seen[layer]
        mean = torch.stack([z[:, channel].mean() for channel in range(z.shape[1])])
        torch.testing.assert_close(mean, target, atol=1e-4, rtol=1e-4)


def test_the_means_of_a_network_are_its_own() -> None:
    _, model, x = networks()[1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_means_(model, x, means(model, x))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=0)


def test_the_study_of_means_trains_both_tickets_both_ways() -> None:
    outcome = studies.run("means", quick=True, seeds=1)
    rows = outcome.data["cnn"]
    assert {row["arm"] for row in rows} == {"none", "AP", MEANS_ONLY, MEANS_KEPT, NONE_RESTORED, AP_RESTORED}
    assert len({row["density"] for row in rows if row["cycle"] == 1}) == 1
    assert len(outcome.verdicts) == 4
    accuracies = {row["arm"]: row["accuracy"] for row in rows if row["cycle"] == 2}
    assert len(set(accuracies.values())) > 1
    start = {row["arm"]: row["start"] for row in rows if row["cycle"] == 1}
    for layer, (mean, _) in start["none"].items():
        assert start[MEANS_KEPT][layer][0] == pytest.approx(mean, abs=1e-3)
        assert start[MEANS_ONLY][layer][0] == pytest.approx(start["AP"][layer][0], abs=1e-3)
        assert start[AP_RESTORED][layer] == pytest.approx(start[NONE_RESTORED][layer], abs=1e-3)
    with pytest.raises(ValueError, match="mlp, cnn or vgg"):
        studies.run("means", quick=True, networks=("resnet",))
