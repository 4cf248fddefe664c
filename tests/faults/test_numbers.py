"""Losses and weights that are no numbers stop a run, with the step, the layer and the learning rate."""

import math

import pytest
import torch
from torch import nn

from ap import Masks, prune_iteratively
from recipes import data
from recipes.config import Experiment
from recipes.engine import Diverged, Engine

CONFIG = Experiment(model="lenet-300-100", data="digits", epochs=2, batch_size=100, device="cpu")


def training(model, config=CONFIG):
    engine = Engine(config, data.load("digits"), 0)
    return engine.training(engine.prepare(model), 0, 0)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["1.weight", "4.bias"])
def test_weights_that_become_no_numbers_name_step_layer_and_rate(name, value):
    model = Net()
    run = training(model)

    def spoil(step):
        if step == 5:
            with torch.no_grad():
                model.get_parameter(name).view(-1)[0] = value

    with pytest.raises(Diverged, match=rf"step 5 \(epoch 0\), learning rate 0.1: the weights of {name} are not finite"):
        run.run_epoch(spoil)


def test_a_last_step_that_spoils_the_weights_is_noticed():
    """No later loss would show it."""
    model = Net()
    run = training(model)
    last = run.engine.steps_per_epoch

    def spoil(step):
        if step == last:
            with torch.no_grad():
                model.get_parameter("1.weight").fill_(math.nan)

    with pytest.raises(Diverged, match=rf"step {last - 1} .*learning rate 0.1: the weights of 1.weight are not finite"):
        run.run_epoch(spoil)


def test_running_statistics_that_are_no_numbers_are_noticed():
    """The loss of training stays finite, since only evaluation reads them."""
    model = Net()
    run = training(model)

    def spoil(step):
        model.get_buffer("2.running_var").fill_(math.inf)

    with pytest.raises(Diverged, match=r"the buffer 2.running_var is not finite"):
        run.run_epoch(spoil)


def test_buffers_that_are_infinite_on_purpose_are_no_divergence():
    """A causal mask."""

    class Masked(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((10, 10), -math.inf).triu(1))

        def forward(self, x):
            return torch.softmax(super().forward(x)[:, None] + self.mask, -1).sum(1)

    run = training(Masked())
    assert math.isfinite(run.run_epoch(lambda step: None))


def test_a_learning_rate_that_is_too_high_names_the_layer():
    run = training(Net(), Experiment(data="digits", epochs=2, batch_size=100, device="cpu", lr=1e30))
    with pytest.raises(
        Diverged, match=r"not finite at step \d+ .*learning rate 1e\+30: .*(weights of|buffer|layer)"
    ) as error:
        run.run_epoch(lambda step: None)
    assert "Lower --lr" in str(error.value)


def test_the_plugins_loop_names_the_weight_and_keeps_the_rows():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def train(model, masks, run):
        if run.cycle == 1:
            nn.init.constant_(model[2].weight, math.nan)
        return {}

    def magnitude(model, masks):
        return {name: masks.weight(name).detach().abs() for name in masks}

    with pytest.raises(FloatingPointError, match=r"2.weight .* not finite after the training of cycle 1") as error:
        prune_iteratively(model, train, magnitude, cycles=3, amount=0.3, rate=0.1)
    assert [row["cycle"] for row in error.value.history] == [0]


def test_layers_that_pruning_empties_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = Masks(model)
    scores = {"0.weight": torch.ones(4, 4), "2.weight": torch.zeros(2, 4)}
    with pytest.warns(UserWarning, match=r"pruning left no weight in 2.weight"):
        masks.prune(scores, count=8)
    with pytest.warns(UserWarning, match=r"pruning left no weight in 2.weight"):
        Masks.from_zeros(model)


def test_two_runs_agree_to_the_bit():
    """In one process, one after the other, with another run in between that draws random numbers."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Net()
        run = training(model, Experiment(data="digits", epochs=2, batch_size=100, device="cpu", deterministic=True))
        torch.randn(1000)
        while not run.done:
            loss = run.run_epoch(lambda step: None)
        results.append((loss, [p.detach().clone() for p in model.parameters()]))
    torch.use_deterministic_algorithms(False)
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))
