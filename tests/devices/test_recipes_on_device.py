"""The engine on a pretended GPU: data that stay there, steps that never wait, and the CPU's results."""

import pytest
import torch
from pretend import OnGPU, never_waiting, pretended  # noqa: F401
from torch import nn

from ap import AP, DNRMonitor, Masks
from recipes import experiment
from recipes import training as trainings
from recipes.config import Experiment
from recipes.data import load
from recipes.dnr_command import Resident
from recipes.effective import effective
from recipes.engine import Engine, Stopped
from recipes.models import create
from recipes.step import CapturedStep
from recipes.storage import read_rows

pytestmark = pytest.mark.usefixtures("pretended")
DATA = load("digits")


class Captured(CapturedStep):
    """Its graphs are functions, in which nothing may wait for the device, nor anything come from the host."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw, capture=lambda make: make)
        self._rate = self._rate.double()  # which a CPU's fused Adam reads as it is; a GPU's reads float32

    def __call__(self, inputs, rate):
        self.count = self.monitor is not None and self.monitor._passes["train"] % self.monitor.every == 0
        if self.count in self._replays:
            with never_waiting():
                return super().__call__(inputs, rate)
        return super().__call__(inputs, rate)

    def _prepared(self, count):
        replay = super()._prepared(count)

        def again():
            with self._counting(count), never_waiting(capturing=True):
                replay()

        return again


OPTIONS = {
    "sgd": {},
    "adam, prelu": {"optimizer": "adam", "lr": 1e-3, "activation": "prelu"},
    "eager": {"step": "eager", "activation": "helu", "clip_norm": 0.5},
    "in parts, averaged, clipped": {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5, "monitor_every": 1},
    "augmented": {"augment": "crop-flip", "cutout": 3, "mixup": 0.4, "label_smoothing": 0.1},
    "resized": {"augment": "resized-crop", "mixup": 0.4},
    "streamed": {"augment": "crop-flip", "stream": "yes"},
    "streamed, mixed": {"mixup": 0.4, "stream": "yes"},
}


def trained(device, monkeypatch, **options):
    config = Experiment(
        **({"batch_size": 200, "epochs": 1, "schedule": "cosine", "precision": "float32", "probe": 100} | options),
        device=device,
    )
    engine = Engine(config, DATA, seed=1)
    assert engine.captured is (device == "cuda" and config.step == "auto")
    monkeypatch.setattr(trainings, "CapturedStep", Captured)
    torch.manual_seed(0)
    body = create("cnn", in_channels=1, image_size=8, activation=config.activation)
    model = engine.prepare(nn.Sequential(body, nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 10)))
    plugin = AP(Masks(model))
    with torch.no_grad():
        body.fc1.weight[:, :3] = 0.0  # alive, and zero when training begins
    plugin.mark_start()
    masks = plugin.masks
    masks.prune({name: masks.weight(name).detach().abs() for name in masks}, amount=0.3)
    monitor = DNRMonitor(engine.called(model), every=config.monitor_every)
    with monitor:
        training = engine.training(model, 0, 0, monitor, masks, "train", lambda: plugin.followed)
        while not training.done:
            training.run_epoch(lambda step: None)
        report = monitor.report("train")
        training.load_state_dict(training.state_dict())
        training.finish()
    zero = [tensor.cpu().clone() for tensor in plugin.followed]
    plugin.detach()
    measured = [*engine.evaluate(model, engine.test_set), *engine.evaluate(model, engine.val_set)]
    hidden = effective(model, masks, (1, 8, 8))
    return (
        {name: value.cpu() for name, value in model.state_dict().items()},
        zero,
        [(d.name, d.samples, d.total, d.static) for d in report.layers.values()],
        [training.last_loss, *measured],
        (hidden.density, hidden.macs),
        engine,
        model,
    )


@pytest.mark.parametrize("which", OPTIONS)
def test_training_is_the_cpus(which, monkeypatch):
    cpu = trained("cpu", monkeypatch, **OPTIONS[which])
    gpu = trained("cuda", monkeypatch, **OPTIONS[which])
    assert all(isinstance(p, OnGPU) for p in gpu[-1].parameters())
    for name, value in cpu[0].items():
        torch.testing.assert_close(gpu[0][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(cpu[1], gpu[1], strict=True))
    for a, b in zip(cpu[2], gpu[2], strict=True):
        assert a[:2] == b[:2]
        assert a[2:] == pytest.approx(b[2:], abs=2e-3)
    assert cpu[3] == pytest.approx(gpu[3], abs=3e-3)
    assert cpu[4] == gpu[4]


def test_batches_for_pruners_and_probes_are_on_the_device():
    engine = Engine(Experiment(batch_size=100, device="cuda", probe=100, score_batches=2), DATA, seed=0)
    for x, y in [*engine.score_batches(), *engine.probe_batches()]:
        assert isinstance(x, OnGPU)
        assert isinstance(y, OnGPU)
    assert not engine.half  # this GPU is one from before bfloat16
    plan = engine.train_set.epoch(0, 0)
    with never_waiting():
        engine.train_set.batch(plan, 0, 100)
    assert isinstance(Resident(DATA.test, DATA, torch.device("cuda")).images, OnGPU)


@pytest.mark.parametrize("arm", ["lite:gentle-waking", "pro"])
def test_a_whole_run_with_its_files_and_a_stop_in_the_middle(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "CapturedStep", Captured)
    found = []
    for device in ("cpu", "cuda"):
        config = Experiment(
            ap=("none", arm),
            pruner="taylor",
            cycles=1,
            epochs=2,
            batch_size=200,
            lr=0.02,
            precision="float32",
            rewind="3it",
            recover=1,
            monitor_every=3,
            probe=100,
            seeds=1,
            device=device,
            score_batches=2,
        )
        (job,) = (job for job in experiment.jobs(config) if str(job.arm) == arm)
        asked = iter(range(1000))
        with pytest.raises(Stopped):
            experiment.run(
                config, tmp_path / device, job, experiment.say_nothing, lambda asked=asked: next(asked) == 16
            )
        experiment.run(config, tmp_path / device, job, experiment.say_nothing, lambda: False)
        found.append(read_rows(tmp_path / device / "metrics.jsonl"))
    assert len(found[0]) == len(found[1]) == 2
    for mine, theirs in zip(*found, strict=True):
        assert mine["alive"] == theirs["alive"]
        for key in ("accuracy", "val_accuracy", "dnr_total", "effective_density"):
            assert mine[key] == pytest.approx(theirs[key], abs=0.02)
