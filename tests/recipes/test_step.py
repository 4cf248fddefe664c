"""Steps from static buffers, as a CUDA graph makes them, against steps as Python makes them: equal to the bit.

On a CPU nothing can be captured: there a "graph" calls the very function that would have been captured. So all that is
around it is tested here: buffers, the learning rate in a tensor, the warm-up that is undone, masks, counts, resuming.
"""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

from ap import AP, DNRMonitor, Masks
from recipes import training as trainings
from recipes.config import Experiment
from recipes.data import load
from recipes.engine import Engine
from recipes.models import create
from recipes.step import CapturedStep

DATA = load("digits")


class Replayed(CapturedStep):
    """Its graphs are functions."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw, capture=lambda make: make)
        self._rate = self._rate.double()  # which a CPU's fused Adam reads as it is; a GPU's reads float32

    def _prepared(self, count):
        replay = super()._prepared(count)

        def again():
            with self._counting(count):
                replay()

        return again


class Net(nn.Module):
    """With all that a step changes besides weights: running statistics and random numbers."""

    def __init__(self):
        super().__init__()
        self.body = create("cnn", in_channels=1, image_size=8)
        self.head = nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(10, 10))

    def forward(self, x):
        return self.head(self.body(x))


OPTIONS = {
    "sgd": {},
    "nesterov": {"nesterov": True, "weight_decay": 1e-3},
    "no momentum": {"momentum": 0.0},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    "in parts, averaged, clipped": {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5, "monitor_every": 1},
    "in parts, some of the steps counted": {"accumulate": 4, "monitor_every": 7},
    "augmented": {"augment": "crop-flip", "cutout": 3, "mixup": 0.4, "label_smoothing": 0.1},
}


class Trainer:
    def __init__(self, monkeypatch, replayed, **options):
        config = Experiment(
            **({"epochs": 2, "batch_size": 100, "lr": 0.05, "schedule": "cosine", "warmup": "5it"} | options)
        )
        self.engine = Engine(config, DATA, seed=1)
        if replayed:
            monkeypatch.setattr(trainings, "CapturedStep", Replayed)
            self.engine.captured = True
        torch.manual_seed(0)
        self.model = self.engine.prepare(Net())
        self.masks = Masks(self.model)
        self.masks.hold()
        self.monitor = DNRMonitor(self.model, every=options.get("monitor_every", 4))

    def start(self, cycle=0):
        return self.engine.training(self.model, 0, cycle, self.monitor, self.masks)

    def prune(self):
        self.masks.prune({name: self.masks.weight(name).detach().abs() for name in self.masks}, amount=0.3)

    def found(self, training):
        state = [tensor.clone() for tensor in self.model.state_dict().values()]
        moments = [
            value.clone()
            for parameter in self.model.parameters()
            for key, value in sorted(training.optimizer.state[parameter].items())
            if isinstance(value, torch.Tensor)
        ]
        report = self.monitor.report("train")
        counts = [layer.alive_counts()[0].clone() for layer in report.layers.values()]
        if training._average is not None:
            moments += [tensor.clone() for tensor in training._average.tensors]
        return [*state, *moments, *counts, torch.tensor([report.passes, training.step]), torch.get_rng_state()]


def run(training, stop=None, at=None):
    def after_step(step):
        if at is not None and step in at:
            at[step]()
        if step == stop:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        while not training.done:
            training.run_epoch(after_step)
    return training.last_loss


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replayed_steps_are_the_same_to_the_bit(monkeypatch, options):
    found, losses = [], []
    for replayed in (False, True):
        trainer = Trainer(monkeypatch, replayed, **options)
        with trainer.monitor:
            training = trainer.start()
            losses.append(run(training))
            found.append(trainer.found(training))
    assert_same(*found)
    assert losses[0] == losses[1]
    assert 0 < losses[0] < 3


def test_masks_that_change_between_and_within_trainings_hold_in_replays(monkeypatch):
    found = []
    for replayed in (False, True):
        trainer = Trainer(monkeypatch, replayed)
        with trainer.monitor:
            for cycle in range(3):
                training = trainer.start(cycle)
                run(training, at={7: trainer.prune} if cycle == 1 else None)
                for name in trainer.masks:
                    assert bool((trainer.masks.weight(name)[~trainer.masks[name]] == 0).all())
                found.append(trainer.found(training))
                trainer.prune()
        assert trainer.masks.density == pytest.approx(0.7**4, abs=1e-3)
    for first, second in zip(found[:3], found[3:], strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 12, 20])
def test_a_replayed_training_resumes_to_the_same_bits(monkeypatch, optimizer, stop):
    options = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 1e-3}
    whole = Trainer(monkeypatch, replayed=False, **options)
    training = whole.start()
    run(training)
    first = Trainer(monkeypatch, replayed=True, **options)
    cut = first.start()
    run(cut, stop=stop)
    torch.save(cut.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    again = Trainer(monkeypatch, replayed=True, **options)
    resumed = again.start()
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    run(resumed)
    assert resumed.last_loss == training.last_loss
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("replayed", [True, False])
def test_a_resumed_training_makes_its_steps_in_its_own_way(monkeypatch, replayed):
    """An optimizer's state tells whether it is captured: under torchrun it is not, alone on a GPU it is."""
    before, after = (Trainer(monkeypatch, of, optimizer="adam", lr=1e-3).start() for of in (not replayed, replayed))
    run(before, stop=2)
    after.load_state_dict(before.state_dict())
    assert [group["capturable"] for group in after.optimizer.param_groups] == [replayed]
    run(after, stop=4)


@pytest.mark.parametrize("back", [False, True])
def test_which_weights_have_stayed_at_zero_is_not_changed_by_steps_that_warm_up(monkeypatch, back):
    """Nor after going back to the start, as a training that diverged does."""
    found = []
    for replayed in (False, True):
        trainer = Trainer(monkeypatch, replayed)
        with torch.no_grad():
            trainer.model.head[2].weight.zero_()  # no gradient comes through it in the first step, but in the second
            trainer.model.body.fc1.weight[:, 0] = 0.0
        plugin = AP(trainer.masks)
        plugin.mark_start()
        training = trainer.engine.training(trainer.model, 0, 0, None, trainer.masks, also=lambda p=plugin: p.followed)
        good = copy.deepcopy({"training": training.state_dict(), "plugin": plugin.state_dict()})
        run(training, stop=1)
        if back:
            training.load_state_dict(good["training"])
            plugin.load_state_dict(good["plugin"])
            run(training, stop=1)
        found.append([tensor.clone() for tensor in plugin.followed])
        plugin.detach()
    assert_same(*found)
    assert sum(int(tensor.sum()) for tensor in found[0]) == 64


def test_a_loss_that_is_not_finite_is_noted_with_its_step(monkeypatch):
    trainer = Trainer(monkeypatch, replayed=True)
    training = trainer.start()

    def spoil():
        with torch.no_grad():
            trainer.model.head[2].weight[0, 0] = float("inf")

    run(training, stop=6, at={4: spoil})
    assert int(training._make.bad) == 4


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_nearly_the_whole_step(monkeypatch, parts):
    steps = []
    for number in (1, parts):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        engine = Engine(Experiment(batch_size=80), DATA, 0)
        step = trainings.Step(
            model,
            lambda x, model=model: model(x.double()),
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            engine.train_set.gather,
            lambda outputs, targets: nn.functional.cross_entropy(outputs.double(), targets),
            parts=number,
        )
        plan = engine.train_set.epoch(0, 0)
        for i in range(5):
            step(plan.part(i * 80, (i + 1) * 80), 0.1)
        steps.append([*model.parameters(), step.loss_sum.double()])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # outputs pass through float32
