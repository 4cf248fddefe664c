"""What is said while an experiment runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from recipes import progress
from recipes.config import Experiment
from recipes.experiment import jobs
from recipes.progress import Progress


def epoch(job: str, cycle: int, number: int, phase: str = "train") -> dict[str, object]:
    return {"event": "epoch", "job": job, "cycle": cycle, "phase": phase, "epoch": number, "loss": 0.5, "dnr": None}


@pytest.mark.parametrize("arm", ["lite", "pro"])
def test_epochs_before_each_training_are_those_of_the_trainings_in_order(arm: str) -> None:
    config = Experiment(ap=(arm,), cycles=3, epochs=5, rewind="none", finetune_epochs=2)
    phases = ("train", "retrain") if arm == "pro" else ("train",)
    order = [(cycle, phase) for cycle in range(3) for phase in phases] + [(3, "train")]
    done = 0
    for cycle, phase in order:
        assert config.epochs_before(config.arms[0], cycle, phase) == done
        done += 5 if cycle == 0 else 2
    assert config.total_epochs(config.arms[0]) == done


def test_a_resumed_run_counts_what_it_had_and_ends_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    config = Experiment(ap=("none", "pro"), seeds=1, cycles=1, epochs=4)  # 8 and 12 epochs
    shown = Progress(config, jobs(config))
    assert shown.bar.total == 20
    shown(epoch("pro-seed0", 0, 3, "retrain"))  # goes on after 4 + 2 epochs
    assert (shown.bar.n, shown.bar.initial) == (7, 6)  # whose time is not counted
    shown(epoch("pro-seed0", 0, 4, "retrain"))
    for number in range(1, 5):
        shown(epoch("pro-seed0", 1, number))
    for cycle in range(2):
        for number in range(1, 5):
            shown(epoch("none-seed0", cycle, number))
    assert (shown.bar.n, shown.bar.initial) == (20, 6)
    shown(epoch("none-seed0", 1, 3))  # a recovery goes back
    assert shown.bar.n == 19
    shown.close()


def test_elsewhere_long_trainings_speak_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    config = Experiment(ap=("none",), seeds=1, cycles=1, epochs=4)
    shown = Progress(config, jobs(config))
    shown.begin(Path("runs/x"))
    for number, now in enumerate((20.0, 59.0, 61.0, 119.0), 1):  # noqa: B007  (the clock reads it)
        shown(epoch("none-seed0", 0, number))
    assert capsys.readouterr().err.splitlines() == [
        "cnn on digits, none × 1 seed: 1 run in runs/x",
        "none-seed0: cycle 0, epoch 3, loss 0.500",
    ]


def test_what_is_done_already_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = Experiment(ap=("none", "lite"), seeds=2)
    for left, end in ((4, "runs/x"), (1, "runs/x, 3 done"), (0, "runs/x, all done")):
        Progress(config, jobs(config)[:left]).begin(Path("runs/x"))
        assert capsys.readouterr().err == f"cnn on digits, none lite × 2 seeds: 4 runs in {end}\n"
