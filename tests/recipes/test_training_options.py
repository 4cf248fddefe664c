"""Accumulation, clipping, the mean of weights, cut-out and mixup in trainings, also in ones that are taken up again."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ap import DNRMonitor, Masks
from recipes.config import Experiment
from recipes.data import load
from recipes.engine import Engine
from recipes.models import create

DATA = load("digits")
BASE = {"epochs": 2, "batch_size": 60, "lr": 0.05, "device": "cpu"}


def network(seed=0, norm=False):
    torch.manual_seed(seed)
    body = create("cnn", in_channels=1, image_size=8)
    return nn.Sequential(body, nn.BatchNorm1d(10), nn.Dropout(0.1), nn.Linear(10, 10)) if norm else body


def train(model, masks=None, monitor=None, **options):
    training = Engine(Experiment(**(BASE | options)), DATA, 0).training(model, 0, 0, monitor, masks)
    while not training.done:
        training.run_epoch(lambda step: None)
    training.finish()
    return training


def half_dead(model):
    masks = Masks(model)
    masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=0.5)
    masks.hold()
    return masks


@pytest.mark.parametrize("parts", [3, 60])
def test_accumulated_steps_are_the_whole_step(parts):
    """Without BatchNorm; the counts of dead neurons are the same integers, as long as no unit is near its threshold."""
    trained, reports, losses = [], [], []
    for accumulate in (1, parts):
        model = network()
        with DNRMonitor(model, every=1) as monitor:
            losses.append(train(model, monitor=monitor, accumulate=accumulate, epochs=1).last_loss)
        trained.append(model)
        reports.append(monitor.report("train"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, layer in reports[0].layers.items():
        assert layer.samples == reports[1].layers[name].samples == 1200
        assert layer.total == pytest.approx(reports[1].layers[name].total, abs=1e-4)
    assert 0 < reports[0].total < 1


def reference(model, masks, clip_norm, epochs=1):
    """The same training, written down plainly; returns the norms before clipping."""
    engine = Engine(Experiment(**BASE), DATA, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    norms = []
    for epoch in range(epochs):
        plan = engine.train_set.epoch(0, epoch)
        for start in range(0, 1200, 60):
            x, y = engine.train_set.batch(plan, start, start + 60)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for name in masks:
                masks.weight(name).grad[~masks[name]] = 0
            norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().square().sum().sqrt()
            norms.append(float(norm))
            for parameter in model.parameters():
                parameter.grad *= min(1.0, clip_norm / float(norm))
            optimizer.step()
    return norms


def test_clipping_is_by_the_norm_of_living_weights_gradients():
    first, second = network(), network()
    norms = reference(first, half_dead(first), 3.0)
    assert min(norms) < 3 < max(norms)  # some steps are clipped, some are not
    train(second, half_dead(second), clip_norm=3.0, epochs=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)  # other kernels round otherwise; the norm of all: 1e-2
    unclipped = network()
    train(unclipped, half_dead(unclipped), epochs=1)
    assert not torch.allclose(next(unclipped.parameters()), next(second.parameters()), rtol=1e-3)


def test_the_mean_of_weights_is_what_is_kept_and_masks_hold_in_it():
    model, plain = network(norm=True), network(norm=True)
    masks = half_dead(model)
    train(model, masks, ema=0.9)
    for name in masks:
        assert torch.equal(masks.weight(name) != 0, masks[name])
    train(plain, half_dead(plain))
    assert not torch.equal(model[1].running_mean, plain[1].running_mean)
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, rtol=0.5, atol=0.5)
    assert int(model[1].num_batches_tracked) == int(plain[1].num_batches_tracked) == 40
    engine = Engine(Experiment(**BASE), DATA, 0)
    assert engine.evaluate(model, engine.test_set)[0] > 0.7


OPTIONS = {
    "cutout": {"cutout": 3},
    "mixup": {"mixup": 0.4},
    "ema": {"ema": 0.95},
    "accumulate": {"accumulate": 3},
    "clip_norm": {"clip_norm": 0.5},
    "all": {
        "cutout": 3,
        "mixup": 0.4,
        "ema": 0.95,
        "accumulate": 2,
        "clip_norm": 0.5,
        "optimizer": "adamw",
        "lr": 1e-3,
    },
}


@pytest.mark.parametrize("save_at", [20, 27, 40])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_that_is_saved_goes_on_to_the_same_bits(name, save_at):
    whole = network(norm=True)
    expected = train(whole, half_dead(whole), **OPTIONS[name])

    model = network(norm=True)
    masks = half_dead(model)
    engine = Engine(Experiment(**(BASE | OPTIONS[name])), DATA, 0)
    training = engine.training(model, 0, 0, None, masks)
    buffer = io.BytesIO()

    def after_step(step):
        if step == save_at:
            torch.save({"training": training.state_dict(), "masks": masks.state_dict()}, buffer)
            raise StopIteration

    def until_stopped():
        while True:
            training.run_epoch(after_step)

    with pytest.raises(StopIteration):
        until_stopped()
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = network(seed=5, norm=True)
    masks = Masks(fresh)
    masks.load_state_dict(state["masks"])
    masks.hold()
    found = engine.training(fresh, 0, 0, None, masks)
    found.load_state_dict(state["training"])
    while not found.done:
        found.run_epoch(lambda step: None)
    found.finish()
    assert found.last_loss == expected.last_loss
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[key]), key


def test_deterministic_mode_is_reproducible_to_the_bit_with_everything_on():
    found = []
    try:
        for stray in (1, 2):
            model = network(norm=True)
            torch.manual_seed(stray)
            training = train(model, half_dead(model), augment="crop-flip", deterministic=True, **OPTIONS["all"])
            found.append((training.last_loss, model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def test_after_a_training_a_pruner_draws_the_same_whatever_the_training_drew():
    draws = []
    for norm in (False, True):  # with dropout or without
        train(network(norm=norm), epochs=1)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_dropout_draws_other_numbers_in_the_retraining_and_in_each_cycle():
    engine = Engine(Experiment(**BASE), DATA, 0)
    draws = []
    for cycle, phase in ((0, "train"), (0, "retrain"), (1, "train"), (0, "train")):
        engine.training(network(), 0, cycle, phase=phase)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutout": -1}, "--cutout must be a whole number, 0 or more"),
        ({"mixup": -0.1}, "--mixup must be 0 or more"),
        ({"mixup": float("nan")}, "--mixup must be 0 or more"),
        ({"ema": 1.0}, r"--ema must be in \(0, 1\), not 1.0"),
        ({"clip_norm": 0.0}, "--clip-norm must be a positive number"),
        ({"accumulate": 0}, "--accumulate must be a whole number, 1 or more"),
        ({"accumulate": 7}, "--batch-size 60 is not a multiple of --accumulate 7"),
        ({"score_size": 0}, "--score-size must be a whole number, 1 or more"),
        ({"recover": -1}, "--recover must be a whole number, 0 or more"),
        ({"recover_factor": 1.5}, r"--recover-factor must be in \(0, 1\)"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**(BASE | options))


def test_batches_for_scores_have_a_size_of_their_own():
    """The first images of the first epoch's order, whatever the batches they come in."""
    usual = Engine(Experiment(**BASE, score_batches=2), DATA, 0).score_batches()
    assert [len(labels) for _, labels in usual] == [60, 60]
    other = Engine(Experiment(**BASE, score_batches=4, score_size=25), DATA, 0).score_batches()
    assert [len(labels) for _, labels in other] == [25] * 4
    for which in (0, 1):
        whole, parts = (torch.cat([batch[which] for batch in batches]) for batches in (usual, other))
        assert torch.equal(whole[:100], parts)
    with pytest.raises(ValueError, match="--score-size 1201 is more than the 1,200 training images"):
        Engine(Experiment(**BASE, score_size=1201), DATA, 0)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_compiled_model_trains_and_counts_dead_neurons_like_the_model_itself(accumulate):
    found = []
    for compiled in (False, True):
        config = Experiment(**BASE, compile=compiled, accumulate=accumulate)
        torch.manual_seed(0)
        model = create("lenet-300-100", in_channels=1, image_size=8)
        engine = Engine(config, DATA, 0)
        monitor = DNRMonitor(engine.called(model), every=3)
        training = engine.training(model, 0, 0, monitor, half_dead(model))
        with monitor:
            training.run_epoch(lambda step: None)
        found.append((monitor.report("train"), training.last_loss))
    (first, loss), (second, compiled_loss) = found
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert first.passes == second.passes == 7 * accumulate  # of 20 steps every third
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        assert layer.samples == second.layers[name].samples == 7 * 60
        assert layer.total == pytest.approx(second.layers[name].total, abs=1e-3)
        assert layer.static == pytest.approx(second.layers[name].static, abs=0.02)
    assert 0 < first.total < 1
