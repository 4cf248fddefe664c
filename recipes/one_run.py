"""One run: an arm with a seed, trained, pruned and measured, from where it stands to its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.tensorboard import SummaryWriter

import pruners
from ap import DNRMonitor, Masks, measure_dnr
from ap.compaction import fit_
from ap.cycles import Cycles, Run
from ap.tensorboard import layout, write_pictures, write_report
from recipes import distributed
from recipes.config import SCHEMA, Experiment, Job
from recipes.data import ImageData
from recipes.effective import effective
from recipes.engine import Diverged, Engine, Stopped
from recipes.recovery import Recovery
from recipes.storage import Checkpoints, sha256, state_errors, write_json, write_rows

SAVE_EVERY_S = 20.0  # a checkpoint in the middle of a training, at the end of an epoch, at most this often
Say = Callable[[dict[str, Any]], None]


class OneRun:
    """A run in its folder, which is its own; under torchrun one of the processes writes.

    Args:
        config: the experiment that it belongs to.
        folder: where its checkpoints, metrics and TensorBoard events are.
        job: its arm and seed.
        data: the data set.
        model: at its initial weights.
        say: told of every epoch, trained network and warning.
        stopped: asked after each step whether to save and stop.
    """

    def __init__(
        self,
        config: Experiment,
        folder: Path,
        job: Job,
        data: ImageData,
        model: nn.Module,
        say: Say,
        stopped: Callable[[], bool],
    ) -> None:
        self.config, self.folder, self.job, self.data = config, folder, job, data
        self.say, self.stopped = say, stopped
        self.engine = Engine(config, data, job.seed)
        self.model = self.engine.prepare(model)
        self.loop = Cycles(
            self.model,
            None if job.arm.variant == "solo" else pruners.create(config.pruner),
            cycles=config.cycles,
            amount=config.amount,
            ap=job.arm.variant,
            rate=config.rate,
            criterion=job.arm.criterion,
            where=config.places,
            allocation=config.allocation,
            rewind=config.rewind,
            batches=self.engine.score_batches(),
            loss_fn=self.engine.loss_fn,
            steps_per_epoch=self.engine.steps_per_epoch,
            seed=job.seed,
        )
        self.ask_every = 10 if distributed.size() > 1 and self.engine.device.type == "cuda" else 1
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.unfinished: dict[str, Any] | None = None
        self.recoveries = 0  # in the trainings since the last row
        self.saved_at = 0.0

    def execute(self) -> None:
        """Runs all that is left."""
        is_main = distributed.rank() == 0
        self.writer: Any = SummaryWriter(str(self.folder / "tensorboard")) if is_main else distributed.Silent()
        every = self.config.monitor_every
        self.monitor = DNRMonitor(self.engine.called(self.model), every) if every else None
        try:
            self.go_on()
            self.loop.run(self.train, self.on_phase)
            distributed.on_main(self.finish)
        finally:
            self.writer.close()

    def go_on(self) -> None:
        """Takes up the last checkpoint that is good, if there is one."""
        state = distributed.on_main(self.checkpoints.latest)
        if state is not None:
            with state_errors(self.checkpoints.folder):
                fit_(self.model, state["model"])  # which structured pruning may have made smaller
                self.loop.load_state_dict(state["loop"])
            self.unfinished, self.recoveries = state["training"], state.get("recoveries", 0)

    def on_phase(self, loop: Cycles) -> None:
        """Between trainings: the state is whole."""
        distributed.check_masks(loop.masks, f"before the training of cycle {loop.cycle}")
        self.save(None)
        distributed.on_main(self.write_metrics)

    def write_metrics(self) -> None:
        """The rows so far, each with the version of its format."""
        write_rows(self.folder / "metrics.jsonl", ({"schema": SCHEMA} | row for row in self.loop.history))

    def save(self, training: dict[str, Any] | None) -> None:
        """A checkpoint; by all processes together, of which one writes it."""
        distributed.on_main(lambda: self.checkpoints.save(self.state(training)))
        self.saved_at = time.monotonic()

    def state(self, training: dict[str, Any] | None) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        model = self.model.state_dict()
        return {"model": model, "loop": self.loop.state_dict(), "training": training, "recoveries": self.recoveries}

    def train(self, model: nn.Module, masks: Masks, run: Run) -> dict[str, Any]:
        """One training, then what is measured of the trained network."""
        plugin = run.loop.plugin  # which, going back after a divergence, follows other tensors than before
        training = self.engine.training(
            model, run.start_step, run.cycle, self.monitor, masks, run.phase, lambda: plugin.followed
        )
        recovery = Recovery(self.config, training, run)
        if self.unfinished is not None:
            with state_errors(self.checkpoints.folder):
                training.load_state_dict(self.unfinished)
                if "recovery" in self.unfinished:
                    recovery.load_state_dict(self.unfinished["recovery"])
            self.unfinished = None

        def after_step(step: int) -> None:
            run.reached(step)
            # Between processes, asking costs something.
            if step % self.ask_every == 0 and distributed.any_of(self.stopped()):
                raise Stopped

        try:
            with self.monitor or contextlib.nullcontext():
                while not training.done:
                    recovery.keep()
                    try:
                        loss = training.run_epoch(after_step)
                    except Diverged as error:
                        self.say({"event": "warning", "job": self.job.name, "why": recovery.go_back(error)})
                        if self.monitor is not None:
                            self.monitor.reset()
                        continue
                    self.note(training, run, loss, masks)
                    due = time.monotonic() - self.saved_at > SAVE_EVERY_S
                    if not training.done and distributed.any_of(due):
                        self.save(training.state_dict() | {"recovery": recovery.state_dict()})
        except Stopped:
            self.save(training.state_dict() | {"recovery": recovery.state_dict()})
            raise
        training.finish()
        self.recoveries += recovery.used
        if run.phase == "retrain":
            return {}
        return self.measure(model, masks, run, training)

    def note(self, training: Any, run: Run, loss: float, masks: Masks) -> None:
        """After each epoch: progress, and TensorBoard."""
        step = run.cycle * training.schedule.total + training.step
        self.writer.add_scalar(f"loss/{run.phase}", loss, step)
        total = None
        if self.monitor is not None:
            try:
                total = self.monitor.sync("train").total
                self.monitor.log(self.writer, step, masks.density)
                self.monitor.reset()
            except ValueError:  # nothing in this model can die
                self.monitor = None
        fields = {"cycle": run.cycle, "phase": run.phase, "epoch": training.epoch, "loss": loss, "dnr": total}
        self.say({"event": "epoch", "job": self.job.name, **fields})

    def measure(self, model: nn.Module, masks: Masks, run: Run, training: Any) -> dict[str, Any]:
        """A row: accuracy on the validation and the test images, dead neurons on the probe, what density hides."""
        engine = self.engine
        val = engine.evaluate(model, engine.val_set) if engine.val_set is not None else (None, None)
        test = engine.evaluate(model, engine.test_set)
        row: dict[str, Any] = {
            "accuracy": test[0],
            "val_accuracy": val[0],
            "test_loss": test[1],
            "train_loss": training.last_loss,
        }
        try:
            report = measure_dnr(model, engine.probe_batches())
            row |= {"dnr_total": report.total, "dnr_static": report.static, "dnr_dynamic": report.dynamic}
            write_report(self.writer, report, run.cycle)
            row["dnr_layers"] = {n: [d.total, d.static] for n, d in report.layers.items() if d.can_die}
        except ValueError:
            row |= {"dnr_total": None, "dnr_static": None, "dnr_dynamic": None, "dnr_layers": {}}
        side = self.data.image_size
        hidden = effective(model, masks, (self.data.in_channels, side, side))
        row |= {"effective_density": hidden.density, "macs": hidden.macs, "dense_macs": hidden.dense_macs}
        row |= {"recoveries": self.recoveries, "train_s": training.seconds}
        self.recoveries = 0
        for key in ("accuracy", "val_accuracy", "effective_density"):
            if row[key] is not None:
                self.writer.add_scalar(f"trained/{key}", row[key], run.cycle)
        self.writer.add_scalar("accuracy against density (‰)", test[0], round(1000 * masks.density))
        shown = {"cycle": run.cycle, "accuracy": test[0], "dnr": row["dnr_total"], "density": masks.density}
        self.say({"event": "row", "job": self.job.name, **shown})
        return row

    def finish(self) -> None:
        """The last things: metrics, pictures, hparams, and that it is done."""
        self.write_metrics()
        last = self.loop.history[-1]
        if self.monitor is not None and self.monitor.history:
            write_pictures(self.writer, self.monitor.history, last["cycle"])
        layers = [name for name, _ in last.get("dnr_layers", {}).items()]
        if layers:
            self.writer.add_custom_scalars(layout(layers))
        settings = {k: v for k, v in self.config.to_dict().items() if isinstance(v, (int, float, str, bool))}
        settings |= {"arm": str(self.job.arm), "seed": self.job.seed}
        self.writer.add_hparams(settings, {"trained/last_accuracy": last["accuracy"]}, run_name="hparams")
        done = {"schema": SCHEMA, "rows": len(self.loop.history), "sha256": sha256(self.folder / "metrics.jsonl")}
        write_json(self.folder / "done.json", done)
