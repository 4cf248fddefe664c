"""Runs that take turns in one process end as they would alone."""

import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref
from dataclasses import replace

import pytest
import torch

from ap import AP
from recipes import experiment, workers
from recipes.config import Experiment
from recipes.hearing import heard
from recipes.storage import Checkpoints, read_rows
from recipes.turns import Turns

CPU = torch.device("cpu")
# Everything that draws: initial weights, data order, crops, rrelu's slopes, the pruner and the criterion.
DRAWING = Experiment(
    ap=("none", "lite:random", "pro"),
    pruner="random",
    model="cnn",
    width=0.25,
    activation="rrelu",
    augment="crop-flip",
    cycles=1,
    epochs=2,
    batch_size=200,
    lr=0.02,
    seeds=2,
    probe=100,
    threads=1,
    device="cpu",
    monitor_every=2,
)


class Box:
    """In the place of a queue between processes."""

    def __init__(self):
        self.events = []

    def put(self, event):
        self.events.append(event)


def worked(out, config, side_by_side, monkeypatch, stop=None, device=CPU):
    box = Box()
    monkeypatch.setitem(workers._worker, "queue", box)
    monkeypatch.setitem(workers._worker, "stop", stop or threading.Event())
    do = functools.partial(experiment._do, config, out)
    experiment.prepare(config, out)
    left = [job for job in experiment.jobs(config) if not experiment.is_done(out, job)]
    return workers.work(do, left, device, side_by_side), box.events


def results(out, config):
    found = {}
    for job in experiment.jobs(config):
        rows = [{k: v for k, v in row.items() if k != "train_s"} for row in read_rows(out / job.name / "metrics.jsonl")]
        state = Checkpoints(out / job.name / "checkpoints").latest()
        found[job] = rows, state["model"], state["loop"]["masks"]["bits"]
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for job, (rows, model, bits) in first.items():
        assert rows == second[job][0], job.name
        assert all(torch.equal(value, second[job][1][name]) for name, value in model.items()), job.name
        assert all(torch.equal(value, second[job][2][name]) for name, value in bits.items()), job.name


def test_runs_in_turn_end_bit_for_bit_as_alone_also_when_they_are_stopped(tmp_path, monkeypatch):
    failures, _ = worked(tmp_path / "alone", DRAWING, 1, monkeypatch)
    assert failures == []
    stop, count = threading.Event(), [0]
    original = Turns.pass_on

    def pass_on(self):
        count[0] += 1
        if count[0] == 25:
            stop.set()
        original(self)

    monkeypatch.setattr(Turns, "pass_on", pass_on)
    failures, events = worked(tmp_path / "turns", DRAWING, 4, monkeypatch, stop)
    assert failures == []
    assert {event["job"] for event in events if event["event"] == "stopped"}  # and some had not begun
    assert len(list(tmp_path.glob("turns/*/config.json"))) == 4
    failures, events = worked(tmp_path / "turns", DRAWING, 4, monkeypatch)
    assert failures == []
    assert_same(results(tmp_path / "alone", DRAWING), results(tmp_path / "turns", DRAWING))
    told = [event["job"] for event in events if event["event"] == "epoch"]
    assert told != sorted(told)  # they really took turns


def test_without_exchanging_random_numbers_they_would_differ(tmp_path, monkeypatch):
    """That the test above can fail."""
    worked(tmp_path / "alone", DRAWING, 1, monkeypatch)
    monkeypatch.setattr(Turns, "_draw_from", lambda self, states: None)
    worked(tmp_path / "turns", DRAWING, 4, monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(results(tmp_path / "alone", DRAWING), results(tmp_path / "turns", DRAWING))


def test_a_run_that_fails_leaves_the_others_alone_and_each_hears_its_own_warnings(tmp_path, monkeypatch):
    original, thread_of = experiment.run, {}

    def run(config, folder, job, say, stopped):
        if str(job.arm) == "pro":
            stopped()
            raise RuntimeError("out of something")
        thread_of[job.name] = threading.get_ident()
        original(config, folder, job, say, stopped)

    monkeypatch.setattr(experiment, "run", run)
    mark = AP.mark_start

    def mark_start(self):
        warnings.warn(f"of thread {threading.get_ident()}", stacklevel=1)
        mark(self)

    monkeypatch.setattr(AP, "mark_start", mark_start)
    failures, events = worked(tmp_path, DRAWING, 2, monkeypatch)
    assert failures == [f"pro-seed{seed}: RuntimeError: out of something" for seed in (0, 1)]
    done = {event["job"] for event in events if event["event"] == "done"}
    assert done == {"none-seed0", "none-seed1", "lite-random-seed0", "lite-random-seed1"}
    heard_by = {event["job"]: event["why"] for event in events if event["event"] == "warning"}
    assert heard_by == {job: f"of thread {thread}" for job, thread in thread_of.items()}
    assert len(set(thread_of.values())) == 2


def test_a_turn_that_cannot_begin_is_no_success(tmp_path, monkeypatch):
    """As where a GPU has no memory left for a stream."""

    def stream(self):
        raise RuntimeError("no stream")

    monkeypatch.setattr(Turns, "_stream", stream)
    with pytest.raises(RuntimeError, match="no stream"):
        worked(tmp_path, DRAWING, 2, monkeypatch)


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_what_a_run_held_is_gone_before_the_next(tmp_path, monkeypatch, side_by_side):
    held = []

    class Model:
        def __init__(self):
            self.itself = self

    def run(config, folder, job, say, stopped):
        assert all(reference() is None for reference in held)
        model = Model()
        held.append(weakref.ref(model))
        if job.seed:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(experiment, "run", run)
    gc.disable()
    try:
        failures, _ = worked(tmp_path, DRAWING, side_by_side, monkeypatch)
    finally:
        gc.enable()
    assert {failure.partition(": ")[2] for failure in failures} == {"RuntimeError: out of memory"}
    assert len(held) == 6


def test_warnings_from_before_a_run_trains_are_the_runs_too(tmp_path, monkeypatch):
    """Beside runs that are heard, nobody else would hear them."""
    original = experiment.build

    def build(config, data, seed):
        warnings.warn(f"weights of {seed}", stacklevel=1)
        return original(config, data, seed)

    monkeypatch.setattr(experiment, "build", build)
    config = replace(DRAWING, ap=("none",), cycles=0, epochs=1)
    failures, events = worked(tmp_path, config, 2, monkeypatch)
    assert failures == []
    said = {(event["job"], event["why"]) for event in events if event["event"] == "warning"}
    assert said == {(f"none-seed{seed}", f"weights of {seed}") for seed in (0, 1)}


def test_a_signal_may_come_while_one_asks_whether_to_stop():
    """In a process of its own, since with a lock in the flag it would never end."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=interrupted_asking, args=(workers.Flag(context),))
    child.start()
    child.join(20)
    child.kill()
    assert child.exitcode == 0


def interrupted_asking(flag):
    signal.signal(signal.SIGALRM, lambda *_: flag.is_set() or flag.set())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        flag.is_set()
    os._exit(not flag.is_set())


def test_warnings_of_two_threads_at_once():
    said, both = {0: [], 1: []}, threading.Barrier(2)

    def talk(me):
        with heard(said[me].append):
            both.wait()
            for _ in range(3):
                warnings.warn(f"by {me}", stacklevel=1)
                warnings.warn("not for users", DeprecationWarning, stacklevel=1)
            both.wait()

    threads = [threading.Thread(target=talk, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {0: ["by 0"], 1: ["by 1"]}
    with pytest.warns(UserWarning, match="afterwards"):
        warnings.warn("afterwards", stacklevel=1)


def test_an_experiment_for_a_gpu_is_done_in_turn_in_one_process(tmp_path, monkeypatch):
    """The whole path with the pool's process; only the device is not what it says."""
    asked = []

    class Device:
        type = "cuda"

        def __reduce__(self):
            return torch.device, ("cpu",)

    monkeypatch.setattr(experiment, "device_of", lambda name: asked.append(name) or Device())
    config = Experiment(cycles=1, epochs=1, batch_size=300, seeds=2, ap=("none", "lite"), width=0.25, probe=100)
    monkeypatch.setattr(experiment, "rehearse", lambda *given: None)
    experiment.prepare(config, tmp_path)
    events = []
    processes = set()

    def say(event):
        events.append(event)
        processes.update(child.pid for child in multiprocessing.active_children())

    with pytest.raises(ValueError, match="--workers 11: at most 10 runs go side by side on a GPU"):
        experiment.execute(config, tmp_path, say, 1, workers=11)
    experiment.execute(config, tmp_path, say, 1, workers=3)
    assert asked
    assert len(processes) <= 2  # one, and maybe a resource tracker
    assert [event["event"] for event in events].count("done") == 4
    assert all(experiment.is_done(tmp_path, job) for job in experiment.jobs(config))
    first = [event["job"] for event in events if event["event"] == "row" and event["cycle"] == 0]
    assert len(first) == 4


def test_turns_go_round_and_a_late_one_joins_them():
    turns, said = Turns(CPU), []

    def count(name, steps):
        with turns.taken():
            for _ in range(steps):
                said.append(name)
                turns.pass_on()

    def begun(name, steps, waiting):
        thread = threading.Thread(target=count, args=(name, steps))
        thread.start()
        end = time.monotonic() + 10
        while turns.waiting < waiting:
            assert time.monotonic() < end
        return thread

    with turns.taken():
        threads = [begun("a", 3, 1), begun("b", 1, 2)]
        turns.pass_on()
        assert said == ["a", "b"]
        threads.append(begun("c", 2, 3))
    for thread in threads:
        thread.join()
    assert said[:2] == ["a", "b"]
    assert sorted(said[2:]) == ["a", "a", "c", "c"]
    assert turns.waiting == 0
    with turns.taken():  # and it is free again
        turns.pass_on()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_runs_in_turn_on_a_gpu(tmp_path, monkeypatch):
    config = replace(DRAWING, device="cuda", precision="float32", deterministic=True, pruner="lamp")
    failures, _ = worked(tmp_path / "alone", config, 1, monkeypatch, device=torch.device("cuda"))
    assert failures == []
    failures, _ = worked(tmp_path / "turns", config, 6, monkeypatch, device=torch.device("cuda"))
    assert failures == []
    alone, turns = results(tmp_path / "alone", config), results(tmp_path / "turns", config)
    for job, (rows, model, _) in alone.items():
        assert [row["alive"] for row in rows] == [row["alive"] for row in turns[job][0]]
        assert rows[-1]["accuracy"] == pytest.approx(turns[job][0][-1]["accuracy"], abs=0.05)
        for name, value in model.items():
            torch.testing.assert_close(turns[job][1][name], value, rtol=0.1, atol=0.05, msg=f"{job.name} {name}")


def test_no_memory_and_a_broken_gpu_are_told_apart(tmp_path, monkeypatch):
    raised = {"none": torch.OutOfMemoryError("CUDA out of memory.\nadvice"), "pro": RuntimeError("only this one")}

    def run(config, folder, job, say, stopped):
        if str(job.arm) in raised:
            raise raised[str(job.arm)]

    monkeypatch.setattr(experiment, "run", run)
    config = replace(DRAWING, seeds=1)
    failures, _ = worked(tmp_path / "one", config, 3, monkeypatch)
    assert "none-seed0: CUDA out of memory. Fewer --workers need less, and so does a smaller --batch-size" in failures
    assert "pro-seed0: RuntimeError: only this one" in failures

    class Broken(RuntimeError):
        """As torch.AcceleratorError, which has to be made by torch."""

    monkeypatch.setattr(workers, "_BROKEN", (Broken,))
    raised["none"] = Broken("device-side assert")
    with pytest.raises(Broken):
        worked(tmp_path / "two", config, 3, monkeypatch)
