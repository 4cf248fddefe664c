"""One run on two processes, by gloo on one machine."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import pruners
from ap import AP, Masks, criteria
from ap.graph import layer_contexts
from recipes import distributed, experiment, sweep
from recipes.cli import main
from recipes.config import Arm, Experiment, Job
from recipes.data import load
from recipes.engine import Diverged, Engine
from recipes.models import create
from recipes.storage import Checkpoints, read_rows

WORKER = Path(__file__).with_name("torchrun_worker.py")
OPTIONS = [
    *(
        "--model",
        "lenet-300-100",
        "--ap",
        "pro",
        "--pruner",
        "taylor",
        "--cycles",
        "1",
        "--epochs",
        "2",
        "--seeds",
        "1",
    ),
    *("--monitor-every", "1", "--device", "cpu", "--batch-size", "60", "--lr", "0.02"),
    *("--ema", "0.9", "--clip-norm", "2", "--mixup", "0.4", "--cutout", "3", "--accumulate", "3"),
]


def torchrun(out, fault="none", rank=0, number=0, options=OPTIONS, command=("run", "quickstart")):
    place = ["--out", str(out)] if command[0] == "run" else [str(out)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    arguments = [fault, str(rank), str(number), *command, *(options if command[0] == "run" else []), *place]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    return subprocess.Popen(
        [*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finished(process):
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def result(out):
    """Rows without durations, and the last network's weights and masks."""
    (run,) = (path.parent for path in out.glob("*/metrics.jsonl"))
    rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(run / "metrics.jsonl")]
    state = Checkpoints(run / "checkpoints").latest()
    return rows, state["model"], state["loop"]["masks"]["bits"]


def assert_equal(first, second, **tolerance):
    for a, b in zip(first[0], second[0], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value == pytest.approx(b[key], **tolerance) if isinstance(value, float) else value == b[key], key
    for name, mask in first[2].items():
        assert torch.equal(mask, second[2][name]), name
    for name, weight in first[1].items():
        torch.testing.assert_close(weight, second[1][name], rtol=tolerance["rel"], atol=tolerance["abs"])


def test_two_processes_agree_with_one_on_a_network_without_normalisation(tmp_path):
    """With a pruner that sees data, and everything else that a training may do; counts of dead neurons over ranks."""
    status, printed, error = finished(torchrun(tmp_path / "two"))
    assert status == 0, error[-2000:]
    assert main(["run", "quickstart", *OPTIONS, "--threads", "1", "--out", str(tmp_path / "one"), "--quiet"]) == 0
    assert_equal(result(tmp_path / "one"), result(tmp_path / "two"), rel=1e-4, abs=1e-5)
    assert printed.count("tables: ") == 1  # one process speaks, and writes
    assert error.count("cycle 1, density") == 1
    assert (tmp_path / "two/summary.json").exists()
    assert len(list(tmp_path.glob("two/*/tensorboard/events*"))) == len(
        list(tmp_path.glob("one/*/tensorboard/events*"))
    )
    assert scalars(tmp_path / "two") == pytest.approx(scalars(tmp_path / "one"), abs=1e-3)


def scalars(out):
    """The last dead-neuron rate of each layer in training, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(out.glob("*/tensorboard"))))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("dnr/train/")]
    assert len(tags) > 3
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


@pytest.mark.slow
def test_a_run_that_is_stopped_by_a_signal_goes_on_to_the_same_bits(tmp_path):
    assert finished(torchrun(tmp_path / "whole"))[0] == 0
    process = torchrun(tmp_path / "stopped", "slow")
    end = time.monotonic() + 120
    while not list(tmp_path.glob("stopped/*/checkpoints/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, _, error = finished(process)
    assert status != 0
    assert error.count("stopped; go on with: torchrun ... -m recipes resume") == 1
    assert not (tmp_path / "stopped/summary.json").exists()
    status, _, error = finished(torchrun(tmp_path / "stopped", command=["resume"]))
    assert status == 0, error[-2000:]
    assert_equal(result(tmp_path / "stopped"), result(tmp_path / "whole"), rel=0, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_stops_the_others_within_a_minute_and_the_run_resumes(tmp_path, rank):
    assert finished(torchrun(tmp_path / "whole"))[0] == 0
    status, _, error = finished(torchrun(tmp_path / "killed", "kill", rank, 50))  # in the second training
    seconds = time.time() - float((tmp_path / "killed.died").read_text())
    assert status != 0
    assert "SIGKILL" in error
    assert seconds < 60
    status, _, error = finished(torchrun(tmp_path / "killed", command=["resume"]))
    assert status == 0, error[-2000:]
    assert_equal(result(tmp_path / "killed"), result(tmp_path / "whole"), rel=0, abs=0)


@pytest.mark.slow
def test_a_sweep_is_resumed_by_two_processes_also_after_one_died_in_its_second_experiment(tmp_path):
    options = {"cycles": 1, "epochs": 1, "seeds": 1, "batch_size": 60, "lr": 0.02, "threads": 1, "device": "cpu"}
    base = Experiment(model="lenet-300-100", ap=("lite:most-waking",), **options)
    for out in (tmp_path / "one", tmp_path / "two"):
        for folder, config in sweep.experiments(base, {"pruner": ["magnitude", "taylor"]}, out).items():
            experiment.prepare(config, folder)
    assert main(["resume", str(tmp_path / "one"), "--quiet"]) == 0
    assert finished(torchrun(tmp_path / "two", "kill", 1, 50, command=["resume"]))[0] != 0
    first, second = sweep.folders(tmp_path / "two")
    assert (first / "summary.json").exists()
    assert not (second / "summary.json").exists()
    status, printed, error = finished(torchrun(tmp_path / "two", command=["resume"]))
    assert status == 0, error[-2000:]
    assert printed.count("tables: ") == 2
    for folder in (first, second):
        assert_equal(result(tmp_path / "one" / folder.name), result(folder), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_ranks_that_prune_differently_stop_the_run(tmp_path):
    options = [*OPTIONS, "--pruner", "magnitude"]
    status, _, error = finished(torchrun(tmp_path / "run", "scores", 1, options=options))
    assert status != 0
    assert "error: rank 1 has another mask than rank 0 in fc1.weight and 2 more, before the training of cycle" in error


# --- what ranks agree on, without a run ----------------------------------------------------------------------------


MEASURING = [name for name in criteria.names() if criteria.measures(name)]
DRAWN = torch.Generator().manual_seed(1)
HALVES = [torch.rand(size, 8, generator=DRAWN) * torch.rand(8, generator=DRAWN) ** 2 for size in (20, 50)]


def chosen(criterion, batches):
    """What AP would remove from a small network, by a criterion that measures these batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU())
    if distributed.size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    plugin = AP(model, criterion=criterion, batches=batches)
    plugin.mark_start()
    try:
        return dict(plugin.preview(count=30))
    finally:
        plugin.detach()


def connected(rank, store, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}

    found["any"] = [distributed.any_of(rank == 1), distributed.any_of(False)]
    found["gathered"] = distributed.gather(rank * 10)
    try:
        distributed.on_main(lambda: 1 / rank)  # works on rank 1 only
    except ZeroDivisionError as error:
        found["error"] = str(error)
    found["value"] = distributed.on_main(lambda: rank + 5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].running_mean.fill_(rank)
    distributed.share_buffers(model)
    found["buffers"] = float(model[1].running_mean.sum())
    masks = Masks(model)
    distributed.check_masks(masks, "at first")
    if rank == 1:
        masks["2.weight"][0, 0] = False
    try:
        distributed.check_masks(masks, "after something")
    except distributed.Disagreement as error:
        found["masks"] = str(error)

    # Not a number in the images of rank 1 alone: both stop before the step, and both say where.
    data = load("digits")
    engine = Engine(Experiment(model="lenet-300-100", batch_size=60, epochs=1, device="cpu"), data, 0)
    if rank == 1:
        engine.train_set.mean.fill_(float("nan"))
    network = create("lenet-300-100", in_channels=1, image_size=8)
    before = [p.detach().clone() for p in network.parameters()]
    try:
        engine.training(network, 0, 0).run_epoch(lambda step: None)
    except Diverged as error:
        found["diverged"] = str(error)
    found["untouched"] = all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))

    torch.manual_seed(1)
    found["evaluated"] = engine.evaluate(create("lenet-300-100", in_channels=1, image_size=8), engine.test_set)
    try:
        Engine(Experiment(batch_size=63, device="cpu"), data, 0)
    except ValueError as error:
        found["refused"] = str(error)
    found["chosen"] = {criterion: chosen(criterion, [HALVES[rank]]) for criterion in MEASURING}
    found["dropout"] = [engine.training(network, 0, 0) and float(torch.rand(()))]
    torch.save(found, f"{results}.{rank}")
    dist.destroy_process_group()


def test_what_ranks_agree_on(tmp_path):
    mp.spawn(connected, args=(str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    first, second = (torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2))
    assert first["any"] == second["any"] == [True, False]
    assert first["gathered"] == second["gathered"] == [0, 10]
    assert first["error"] == second["error"] == "division by zero"
    assert first["value"] == second["value"] == 5
    assert first["buffers"] == second["buffers"] == 0
    for found in (first, second):
        assert found["masks"].startswith("rank 1 has another mask than rank 0 in 2.weight, after something")
        assert (
            "the loss is not finite at step 0 (epoch 0), learning rate 0.1: flatten is the first layer"
            in found["diverged"]
        )
        assert found["untouched"]
        assert found["refused"] == "--batch-size 63 is not a multiple of 2 processes × --accumulate 1"
    data = load("digits")
    engine = Engine(Experiment(device="cpu"), data, 0)
    torch.manual_seed(1)
    alone = engine.evaluate(create("lenet-300-100", in_channels=1, image_size=8), engine.test_set)
    assert first["evaluated"] == second["evaluated"]
    assert first["evaluated"][0] == alone[0]
    assert first["evaluated"][1] == pytest.approx(alone[1], rel=1e-6)
    assert first["dropout"] != second["dropout"]
    for criterion in MEASURING:
        alone = chosen(criterion, HALVES)
        assert any(not torch.equal(mask, alone[name]) for name, mask in chosen(criterion, HALVES[:1]).items())
        for name, mask in alone.items():
            assert torch.equal(first["chosen"][criterion][name], mask)
            assert torch.equal(second["chosen"][criterion][name], mask)


@pytest.fixture
def as_rank_0(monkeypatch):
    """As torchrun would have started this process; nothing is connected."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list"], "list works in one process: start it without torchrun"),
        (["sweep", "quickstart"], "sweep works in one process"),
        (["run", "quickstart", "--dry-run"], "--dry-run measures one process"),
        (["run", "quickstart", "--workers", "2"], "--workers means nothing under torchrun"),
        (["run", "quickstart", "--sync-batchnorm", "--device", "cpu"], "--sync-batchnorm needs a GPU for each process"),
        (["run", "quickstart", "--device", "cuda:0"], "all processes would use this GPU; say cuda"),
    ],
)
def test_what_cannot_work_under_torchrun_is_refused(as_rank_0, arguments, message, capsys, tmp_path):
    assert main([*arguments, *(["--out", str(tmp_path / "x")] if arguments[0] == "run" else [])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_normalising_over_all_processes_changes_no_name_and_no_mask(monkeypatch):
    data = load("digits")
    torch.manual_seed(0)
    plain = create("resnet20", in_channels=1, image_size=8, width=0.25)
    engine = Engine(Experiment(sync_batchnorm=True, device="cpu"), data, 0)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in engine.prepare(plain).modules())  # one process
    model = copy.deepcopy(plain)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    model = engine.prepare(model)
    norms = [name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)] == norms
    monkeypatch.undo()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    assert layer_contexts(model) == layer_contexts(plain)
    batch = next(engine.test_set.batches(size=20))
    for kind in ("magnitude", "lookahead", "synflow", "taylor"):
        scores = [
            pruners.create(kind).scores(network, Masks(network), [batch], engine.loss_fn) for network in (plain, model)
        ]
        assert list(scores[0]) == list(scores[1])
        assert all(torch.equal(score, scores[1][name]) for name, score in scores[0].items())


def test_each_process_has_its_own_gpu(as_rank_0):
    as_rank_0.setattr(torch.cuda, "is_available", lambda: True)
    as_rank_0.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.local_device("auto") == distributed.local_device("cuda") == "cuda:0"
    assert distributed.local_device("cpu") == "cpu"
    as_rank_0.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 has no GPU for itself, there are 1: --nproc-per-node 1"):
        distributed.local_device("auto")


def test_without_torchrun_nothing_of_it_is_noticed():
    assert not distributed.launched()
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    assert distributed.my_share(60) == slice(0, 60)
    assert experiment.jobs(Experiment(ap=("none",), seeds=1)) == [Job(Arm.parse("none"), 0)]
