import math

import pytest
import torch
import torchvision
from torch import nn

from ap import activations, init
from ap.activations import ranges

# Computed in the literature's way, by numerical integration; to the digits given there.
GAINS = {
    "relu": math.sqrt(2),
    "leaky_relu": 1.41414,
    "prelu": math.sqrt(2 / (1 + 0.0625)),
    "relu6": 1.41421,
    "elu": 1.24520,
    "selu": 1.0,
    "softplus": 1.04187,
    "mish": 1.48685,
    "hardswish": 1.73666,
    "gelu": 1.53353,
    "silu": 1.67653,
    "smelu": 1.40962,
    "helu": math.sqrt(2),
    "gcu": 1.83495,
    "relu_squared": math.sqrt(2 / 3),
    "star_relu": 1.0,
}


@pytest.mark.parametrize("name", GAINS)
def test_gains(name):
    assert init.gain(name) == pytest.approx(GAINS[name], abs=1.1e-5)


def test_gains_of_parameters_modules_and_functions():
    assert init.gain("gelu", approximate="tanh") == pytest.approx(1.53358, abs=1e-5)
    assert init.gain("smelu", beta=1.0) == pytest.approx(1.38034, abs=1e-5)
    assert init.gain("smelu", beta=2.0) == pytest.approx(1.22405, abs=1e-5)
    assert init.gain("swish", beta=0.5) == pytest.approx(1.86018, abs=1e-5)
    assert init.gain(nn.LeakyReLU(0.5)) == pytest.approx(math.sqrt(2 / 1.25))
    assert init.gain(lambda z: 3 * z) == pytest.approx(1 / 3)
    prelu = nn.PReLU(2)
    with torch.no_grad():
        prelu.weight.copy_(torch.tensor([0.0, 1.0]))
    assert init.gain(prelu) == pytest.approx(1 / math.sqrt(0.75))  # the mean of 1/2 and 1


@pytest.mark.parametrize("name", sorted({spec.name for spec in ranges.MODULES.values()} | set(GAINS)))
def test_gain_against_a_simulation(name):
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5
    module = activations.create(name).double().eval()
    with torch.no_grad():
        simulated = 1.5 / module(z).square().mean().sqrt().item()
    assert init.gain(name, variance=2.25) == pytest.approx(simulated, rel=0.01)


def test_stability():
    for name in ("relu", "helu", "prelu", "leaky_relu", "elu", "selu", "tanh", "smelu"):
        assert init.stability_exponent(name) <= 1 + 1e-6, name
    for name in ("gelu", "silu", "hardswish", "gcu", "relu_squared"):
        assert init.stability_exponent(name) > 1.01, name
    assert init.stability_exponent("relu_squared") == pytest.approx(2, abs=1e-3)


def test_signal_variance_in_theory():
    assert init.signal_variance("relu", 30, weight_variance=1.0)[-1] == pytest.approx(9.3e-10, rel=0.01)
    for name in ("relu", "smelu", "selu", "tanh", "elu"):
        assert init.signal_variance(name, 30)[-1] == pytest.approx(1.0, rel=1e-5)
    drifting = init.signal_variance("silu", 30, weight_variance=init.gain("silu") ** 2, variance=1.01)
    assert drifting[-1] > 1.05


@pytest.mark.parametrize(("name", "mean_over"), [("relu", 4), ("smelu", 4), ("tanh", 1), ("selu", 2)])
def test_signal_variance_through_30_real_layers(name, mean_over):
    """With the right gain the variance stays within a factor of 2; finite widths fluctuate, hence the mean of draws."""
    width, found = 512, []
    for draw in range(mean_over):
        torch.manual_seed(draw)
        layers = []
        for _ in range(31):
            layers += [nn.Linear(width, width, bias=False), activations.create(name)]
        model = nn.Sequential(*layers)
        init.initialize_(model)
        x = torch.randn(256, width) / init.gain(name)
        with torch.no_grad():
            found.append(model[:-1](x).var().item())
    assert 0.5 < sum(found) / len(found) < 2


def test_pytorchs_default_loses_the_signal():
    torch.manual_seed(0)
    layers = []
    for _ in range(30):
        layers += [nn.Linear(256, 256, bias=False), nn.ReLU()]
    with torch.no_grad():
        default = nn.Sequential(*layers)(torch.randn(64, 256)).var().item()
        init.initialize_(model := nn.Sequential(*layers))
        ours = model(torch.randn(64, 256)).var().item()
    assert default < 1e-15
    assert ours > 1e-2


def test_each_layer_gets_the_gain_of_what_follows_it():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 4, 3, groups=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    stds = init.initialize_(model)
    assert stds == {
        "0": pytest.approx(1.53353 / math.sqrt(27), rel=1e-4),
        "3": pytest.approx(1.67653 / math.sqrt(36), rel=1e-4),
        "6": pytest.approx(1 / 4),
    }
    assert bool((model[0].bias == 0).all())
    fan_out = init.initialize_(model, "relu", mode="fan_out")
    assert fan_out["0"] == pytest.approx(math.sqrt(2 / 72))
    assert fan_out["3"] == pytest.approx(math.sqrt(2 / (2 * 9)))


def test_initialise_torchvision_models():
    model = torchvision.models.resnet18()
    stds = init.initialize_(model, "prelu")
    assert stds["layer1.0.conv1"] == pytest.approx(math.sqrt(2 / 1.0625 / (64 * 9)))
    assert stds["fc"] == pytest.approx(1 / math.sqrt(512))
    weight = model.layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx(stds["layer1.0.conv1"], rel=0.02)


def test_draws_follow_the_generator_and_the_distribution():
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU())
    init.initialize_(model, generator=torch.Generator().manual_seed(1), distribution="uniform")
    first = model[0].weight.clone()
    init.initialize_(model, generator=torch.Generator().manual_seed(1), distribution="uniform")
    assert torch.equal(model[0].weight, first)
    assert first.abs().max() <= math.sqrt(3) * math.sqrt(2 / 200)
    assert first.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.gain("rellu"), "no activation is named 'rellu'"),
        (lambda: init.gain("relu", variance=0), "variance must be positive"),
        (lambda: init.gain(lambda z: z * 0), "no gain keeps the variance"),
        (lambda: init.initialize_(nn.Linear(2, 2), mode="fan"), "mode must be"),
        (lambda: init.gain(nn.ReLU(), beta=2), None),
    ],
)
def test_bad_input(call, message):
    if message is None:
        assert call() == pytest.approx(math.sqrt(2))
        return
    with pytest.raises(ValueError, match=message):
        call()
