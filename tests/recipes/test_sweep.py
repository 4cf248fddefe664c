"""Sweeps: what they expand to, and tasks that run at the same time."""

import json
import shlex
import subprocess
import sys

import pytest

from recipes import experiment, sweep
from recipes.cli import main
from recipes.config import Experiment
from recipes.storage import FolderError, read_rows

SHORT = ["--cycles", "1", "--epochs", "1", "--monitor-every", "0", "--threads", "1"]


def rows(out):
    return {
        path.parent.name: [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(path)]
        for path in sorted(out.glob("*/metrics.jsonl"))
    }


def test_every_combination_in_a_folder_of_its_own(tmp_path):
    values = {"pruner": ("magnitude", "lamp"), "activation": (None, "smelu"), "model": ("cnn", "lenet-300-100")}
    grid = sweep.experiments(Experiment(seeds=2), values, tmp_path)
    assert len(grid) == 8
    config = grid[tmp_path / "lenet-300-100-digits-lamp-smelu"]
    assert (config.model, config.pruner, config.activation) == ("lenet-300-100", "lamp", "smelu")
    assert grid[tmp_path / "cnn-digits-magnitude-relu"].activation == "relu"  # the model's own, said outright
    tasks = sweep.tasks(grid)
    assert len(tasks) == 8 * 2 * 2
    assert [task.job.seed for task in tasks] == [0] * 16 + [1] * 16
    assert len({task.name for task in tasks}) == 32


def test_more_seeds_keep_the_numbers_and_more_values_the_folders(tmp_path):
    values = {"pruner": ("magnitude", "lamp"), "rate": (0.02,)}
    few = sweep.tasks(sweep.experiments(Experiment(seeds=2), values, tmp_path))
    more = sweep.tasks(sweep.experiments(Experiment(seeds=3), values, tmp_path))
    assert [task.name for task in few] == [task.name for task in more][: len(few)]
    wider = sweep.experiments(Experiment(seeds=2), values | {"rate": (0.02, 0.04)}, tmp_path)
    assert {task.folder for task in few} < set(wider)
    assert tmp_path / "cnn-digits-lamp-relu-rate-0.04" in wider


def test_folders_of_images_and_factories_make_good_names(tmp_path):
    values = {"model": ("torchvision.models:alexnet",), "data": (str(tmp_path / "my photos"),)}
    (folder,) = sweep.experiments(Experiment(), values, tmp_path)
    assert folder.name == "torchvision.models-alexnet-my-photos-magnitude-own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "sweep needs a preset first"),
        (["quickstart", "--pruner", "magnitude", "lapm"], "unknown pruner 'lapm'; close: lamp"),
        (["quickstart", "--pruner", "lamp", "lamp"], "two experiments of the sweep would be cnn-digits-lamp-relu"),
        (["quickstart", "--pruner"], "--pruner: give at least one value"),
        (["quickstart", "--pruner", "lamp", "nm", "--ap", "none", "pro"], "cnn-digits-nm-relu: "),
        (["quickstart", "--seeds", "1", "--run", "2"], "--run must be 0 to 1, not 2"),
    ],
)
def test_bad_input(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_tasks_of_one_experiment_at_the_same_time(tmp_path, capsys):
    """Listed commands, run beside each other, end with what one process alone gets."""
    out, alone = tmp_path / "sweep", tmp_path / "alone"
    options = ["quickstart", *SHORT, "--seeds", "1", "--ap", "none", "lite", "--pruner", "lamp", "--out", str(out)]
    assert main(["sweep", *options, "--list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [line.partition("  # ")[2] for line in lines] == [
        "cnn-digits-lamp-relu/none-seed0, to do",
        "cnn-digits-lamp-relu/lite-seed0, to do",
    ]
    commands = [[sys.executable, *shlex.split(line, comments=True)[1:]] for line in lines]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    folder = out / "cnn-digits-lamp-relu"
    assert json.loads((folder / "summary.json").read_text())["experiment"]["pruner"] == "lamp"
    assert main(["run", *options[:-2], "--activation", "relu", "--out", str(alone), "--quiet"]) == 0
    assert rows(folder) == rows(alone)
    capsys.readouterr()
    assert main(["sweep", *options, "--list"]) == 0
    assert capsys.readouterr().out.count(", done") == 2
    # The whole sweep finds nothing left to do, and so does its resumption.
    stamp = (folder / "lite-seed0/metrics.jsonl").stat().st_mtime_ns
    assert main(["sweep", *options]) == 0
    assert main(["resume", str(out)]) == 0
    assert (folder / "lite-seed0/metrics.jsonl").stat().st_mtime_ns == stamp


def test_folders(tmp_path):
    with pytest.raises(FolderError, match="not the folder of an experiment or a sweep"):
        sweep.folders(tmp_path)
    experiment.prepare(Experiment(), tmp_path / "a")
    assert sweep.folders(tmp_path) == [tmp_path / "a"] == sweep.folders(tmp_path / "a")
