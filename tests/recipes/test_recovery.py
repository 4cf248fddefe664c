"""Back to the last good epoch with a smaller learning rate."""

import math

import pytest
import torch

from ap.cycles import Cycles, Run
from recipes import experiment
from recipes.config import Arm, Experiment, Job
from recipes.data import load
from recipes.engine import Diverged, Engine, Stopped
from recipes.models import create
from recipes.recovery import Recovery
from recipes.storage import Checkpoints, read_rows

DATA = load("digits")
BASE = {"model": "lenet-300-100", "epochs": 3, "batch_size": 60, "lr": 0.05, "device": "cpu", "recover": 2}


def magnitude(model, masks):
    return {name: masks.weight(name).detach().abs() for name in masks}


class Trainer:
    """A training in its loop, as an experiment has it."""

    def __init__(self, rewind="init", **options):
        self.config = Experiment(**(BASE | options))
        self.engine = Engine(self.config, DATA, 0)
        torch.manual_seed(0)
        self.model = create("lenet-300-100", in_channels=1, image_size=8)
        self.loop = Cycles(self.model, magnitude, rewind=rewind, criterion="decay-corrected", steps_per_epoch=20)
        self.loop.plugin.mark_start()
        self.run = Run(self.loop, 0, "train", 0, self.loop.rewind)
        self.training = self.engine.training(self.model, 0, 0, None, self.loop.masks)
        self.recovery = Recovery(self.config, self.training, self.run)
        self.said = []

    def go(self, spoil_at=()):
        """Trains, and makes a weight NaN after these steps, once each."""
        left = list(spoil_at)

        def after_step(step):
            self.run.reached(step)
            if left and step == left[0]:
                del left[0]
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] = math.nan

        while not self.training.done:
            self.recovery.keep()
            try:
                self.training.run_epoch(after_step)
            except Diverged as error:
                self.said.append(self.recovery.go_back(error))
        self.training.finish()
        return self


OPTIONS = {"sgd": {}, "adamw": {"optimizer": "adamw", "lr": 1e-3}, "ema": {"ema": 0.9, "weight_decay": 1e-2}}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("spoil_at", [25, 39, 40])
def test_from_the_epochs_start_everything_is_as_if_it_had_been_trained_so(name, spoil_at):
    """Weights, running means, optimizer, and what the plugin follows; whether a later loss or the weights show it."""
    found = Trainer(**OPTIONS[name]).go(spoil_at=[spoil_at])
    assert found.recovery.used == 1
    expected = Trainer(**OPTIONS[name])
    expected.training.run_epoch(expected.run.reached)
    expected.training.rate_factor = 0.5
    expected.go()
    assert found.training.last_loss == expected.training.last_loss
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    plugins = [t.loop.plugin.state_dict() for t in (found, expected)]
    assert plugins[0]["decay"] == plugins[1]["decay"]
    for key in ("start", "last_zero"):
        assert all(torch.equal(tensor, plugins[1][key][n]) for n, tensor in plugins[0][key].items())


def test_it_says_step_layer_and_rates():
    found = Trainer().go(spoil_at=[25])
    assert found.said == [
        "cycle 0: the loss is not finite at step 25 (epoch 1), learning rate 0.05: the weights of fc1.weight are not "
        "finite. Back to epoch 1 with 0.5 × the learning rate (recovery 1 of 2): this network is no longer trained "
        "like the other arms'"
    ]


def test_twice_from_the_same_epoch_and_no_third_time():
    found = Trainer(recover_factor=0.1).go(spoil_at=[25, 30])
    expected = Trainer()
    expected.training.run_epoch(expected.run.reached)
    expected.training.rate_factor = 0.1 * 0.1
    expected.go()
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(Diverged, match="at step 35"):
        Trainer().go(spoil_at=[25, 30, 35])
    with pytest.raises(Diverged, match="at step 25"):
        Trainer(recover=0).go(spoil_at=[25])


def test_a_snapshot_to_rewind_to_is_of_the_way_that_was_gone_in_the_end():
    found, expected = Trainer(rewind="27it").go(spoil_at=[30]), Trainer(rewind="27it")
    expected.training.run_epoch(expected.run.reached)
    expected.training.rate_factor = 0.5
    expected.go()
    first, second = (t.loop.state_dict()["snapshot"] for t in (found, expected))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    before = Trainer(rewind="20it").go(spoil_at=[30]).loop.state_dict()["snapshot"]  # from before the epoch: it stays
    kept = Trainer(rewind="20it").go().loop.state_dict()["snapshot"]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())


CONFIG = Experiment(
    **(
        BASE
        | {
            "lr": 16.0,
            "recover": 3,
            "recover_factor": 0.01,
            "weight_decay": 0.0,
            "cycles": 2,
            "amount": 0.36,
            "rate": 0.04,
            "threads": 1,
        }
    ),
    ap=("pro",),
)
JOB = Job(Arm.parse("pro"), 0)


def run_until_done(folder, steps=None):
    """The rows and the weights of a run; with `steps`, it is stopped after so many each time, and resumed."""
    events = []
    while True:
        left = [steps]

        def stopped(left=left):
            if left[0] is None:
                return False
            left[0] -= 1
            return left[0] == 0

        try:
            experiment.run(CONFIG, folder, JOB, events.append, stopped)
            break
        except Stopped:
            pass
    rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(folder / "metrics.jsonl")]
    return rows, Checkpoints(folder / "checkpoints").latest()["model"], events


def test_a_rate_that_really_diverges_is_recovered_from_and_resumed_to_the_same_bits(tmp_path):
    rows, weights, events = run_until_done(tmp_path / "whole")
    assert [row["cycle"] for row in rows] == [0, 1, 2]
    assert rows[0]["recoveries"] >= 1
    assert sum(row["recoveries"] for row in rows) == sum("recovery" in event.get("why", "") for event in events)
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert any("learning rate 16: fc" in event.get("why", "") for event in events)
    for steps in (17, 33):  # in the middle of epochs, before and after going back
        again, same, _ = run_until_done(tmp_path / str(steps), steps)
        assert again == rows
        assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())
