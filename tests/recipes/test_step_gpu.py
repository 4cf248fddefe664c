"""Real CUDA graphs against steps as Python makes them, on a CUDA device."""

import os

import pytest
import torch
from torch import nn

from ap import DNRMonitor, Masks
from recipes.config import Experiment
from recipes.data import load
from recipes.engine import Engine
from recipes.models import create
from recipes.step import CapturedStep, Step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DATA = load("digits")
# What cuBLAS wants to be told before anything uses it: modules are imported before the first test runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _deterministic_here_only():
    yield
    torch.use_deterministic_algorithms(False)


class Trainer:
    def __init__(self, step, model="cnn", **options):
        # Rates that float32, in which graphs read them, holds exactly: or rounding might make a pruning choose another.
        fields = {
            "epochs": 2,
            "batch_size": 100,
            "lr": 2**-4,
            "schedule": "steps",
            "milestones": ("9it",),
            "gamma": 0.5,
        }
        fields["precision"] = "float32"
        config = Experiment(step=step, device="cuda", deterministic=True, **(fields | options))
        self.engine = Engine(config, DATA, seed=1)
        torch.manual_seed(0)
        body = create(model, in_channels=1, image_size=8, activation=config.activation)
        self.model = self.engine.prepare(
            nn.Sequential(body, nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 10))
        )
        self.masks = Masks(self.model)
        self.masks.hold()
        self.monitor = DNRMonitor(self.engine.called(self.model), every=4)
        self.dead = []

    def train(self, cycle=0):
        """Trains, prunes in the middle, and returns weights, moments and what the monitor tells."""
        with self.monitor:
            training = self.engine.training(self.model, 0, cycle, self.monitor)
            assert type(training._make) is (CapturedStep if self.engine.captured else Step)
            while not training.done:
                training.run_epoch(lambda step: self.prune() if step == 7 else None)
            report = self.monitor.report("train")
        for name in self.masks:
            assert bool((self.masks.weight(name)[~self.masks[name]] == 0).all())
        state = training.optimizer.state
        moments = [v for p in self.model.parameters() for v in state[p].values() if isinstance(v, torch.Tensor)]
        layers = {name: (layer.samples, layer.total) for name, layer in report.layers.items()}
        return (
            [t.clone() for t in [*self.model.state_dict().values(), *moments]],
            report.passes,
            layers,
            training.last_loss,
        )

    def prune(self):
        self.masks.prune({name: self.masks.weight(name).detach().abs() for name in self.masks}, amount=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"optimizer": "adam", "lr": 2**-10},
        {"optimizer": "adamw", "lr": 2**-10, "weight_decay": 0.1},
        {"augment": "crop-flip", "cutout": 3, "mixup": 0.4},
        {"activation": "prelu"},
        {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5},
        {"model": "resnet20", "precision": "bfloat16"},
        {"compile": True},
    ],
    ids=str,
)
def test_captured_steps_train_the_same_network(options):
    found = []
    for step in ("eager", "captured"):
        trainer = Trainer(step, **options)
        found.append([trainer.train(cycle) for cycle in range(2)])
    tolerance = 0.05 if options.get("precision") == "bfloat16" else 1e-3
    for (first, passes, layers, loss), (second, passes_2, layers_2, loss_2) in zip(*found, strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert passes == passes_2
        assert loss == pytest.approx(loss_2, rel=tolerance)
        assert list(layers) == list(layers_2)
        for name, (samples, total) in layers.items():
            assert layers_2[name][0] == samples
            assert layers_2[name][1] == pytest.approx(total, abs=tolerance)


def test_captured_steps_never_wait():
    trainer = Trainer("captured", epochs=1)
    plan = trainer.engine.train_set.epoch(0, 0)
    with trainer.monitor:
        training = trainer.engine.training(trainer.model, 0, 0, trainer.monitor)
        trainer.model.train()
        parts = [plan.part(i * 100, (i + 1) * 100) for i in range(8)]
        for part in parts[:2]:
            training._make(part, 0.1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for part in parts[2:]:
                training._make(part, 0.05)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert int(training._make.bad) == -1


def test_a_captured_training_resumes(tmp_path):
    whole = Trainer("captured")
    expected = whole.engine.training(whole.model, 0, 0)
    while not expected.done:
        expected.run_epoch(lambda step: None)
    cut = Trainer("captured")
    training = cut.engine.training(cut.model, 0, 0)

    def stop(step):
        if step == 12:
            raise StopIteration

    with pytest.raises(StopIteration):
        training.run_epoch(stop)
    torch.save(training.state_dict(), tmp_path / "state.pt")
    again = Trainer("captured")
    resumed = again.engine.training(again.model, 0, 0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    while not resumed.done:
        resumed.run_epoch(lambda step: None)
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_is_told_with_its_step():
    from recipes.engine import Diverged

    trainer = Trainer("captured")
    training = trainer.engine.training(trainer.model, 0, 0)

    def spoil(step):
        if step == 4:
            with torch.no_grad():
                trainer.model[-1].weight[0, 0] = float("inf")

    with pytest.raises(Diverged, match="step 4"):
        training.run_epoch(spoil)
