"""Small real experiments on the embedded digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes import experiment
from recipes.cli import main
from recipes.config import Arm, Experiment, Job
from recipes.experiment import jobs
from recipes.report import Report, baseline_of, of_folder
from recipes.storage import FolderError, locked, read_rows

SMALL = ["--cycles", "2", "--epochs", "2", "--seeds", "1", "--monitor-every", "5"]


def metrics(out):
    """All rows, without the durations, which no two runs share."""
    return {
        path.parent.name: [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_rows(path)]
        for path in sorted(Path(out).glob("*/metrics.jsonl"))
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment that ran through: every variant, one seed."""
    out = tmp_path_factory.mktemp("experiment") / "run"
    arms = ["none", "lite", "pro", "pro:pruner", "lite:random-negative"]
    assert main(["run", "quickstart", *SMALL, "--ap", *arms, "--out", str(out), "--quiet"]) == 0
    return out


def test_arms_are_paired_and_equally_dense(finished):
    rows = metrics(finished)
    assert len(rows) == 5
    dense = {json.dumps(r[0]) for r in rows.values()}
    assert len(dense) == 1  # the dense training is the same to the last bit in every arm
    for arm in rows.values():
        assert [row["alive"] for row in arm] == [row["alive"] for row in rows["none-seed0"]]
        assert [row["cycle"] for row in arm] == [0, 1, 2]
    assert [row["trainings"] for row in rows["pro-seed0"]] == [0, 2, 4]


def test_rows_say_what_they_must(finished):
    for rows in metrics(finished).values():
        for row in rows:
            for key in (
                "accuracy",
                "val_accuracy",
                "dnr_total",
                "dnr_static",
                "dnr_dynamic",
                "effective_density",
                "density",
            ):
                assert 0 <= row[key] <= 1, key
            assert row["dnr_total"] == pytest.approx(row["dnr_static"] + row["dnr_dynamic"])
            assert row["effective_density"] <= row["density"]
            assert 0 < row["macs"] <= row["dense_macs"]
            assert 0 < row["negative_share"] < 1
    row = metrics(finished)["lite-seed0"][1]
    assert 0 <= row["overlap_smallest_negative"] <= 1
    assert 0 <= row["overlap_pruner"] <= 1


def test_files_are_there_and_readable(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["schema"] == 1
    assert len(summary["cells"]) == 15
    assert json.loads((finished / "experiment.json").read_text())["experiment"]["cycles"] == 2
    for name in ("comparison.png", "layers.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "lite-seed0/config.json").read_text())["arm"] == "lite"
    assert not list(finished.rglob("*.part"))


def test_report_is_a_table_that_pandas_reads(finished):
    pandas = pytest.importorskip("pandas")
    report = of_folder(finished)
    frame = pandas.DataFrame(report.records())
    assert set(frame["arm"]) == {"none", "lite", "pro", "pro:pruner", "lite:random-negative"}
    assert frame.loc[(frame.arm == "pro"), "baseline"].tolist() == ["pro:pruner"] * 3
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 106  # 100, and 6 for the arm whose name is longer than the column
    assert sum("lite:random-negative " in line for line in lines) == 3  # whole: several begin alike
    sentences = report.sentence().splitlines()
    assert [line.partition(":")[0] for line in sentences[:1]] == ["lite against none"]
    assert len(sentences) == 4
    assert all(line.endswith("single seed, which shows nothing.") for line in sentences)


def test_tensorboard_has_the_tags(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "lite-seed0/tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"dnr/train/model/total", "dnr/eval/model/dynamic", "trained/accuracy", "loss/train"} <= tags
    assert any(tag.startswith("dnr/train/") and "/model/" not in tag and tag.endswith("/static") for tag in tags)
    assert events.Tags()["images"]


def test_running_again_and_resuming_a_finished_one_change_nothing(finished, capsys):
    before = metrics(finished)
    stamp = (finished / "lite-seed0/metrics.jsonl").stat().st_mtime_ns
    assert main(["resume", str(finished), "--quiet"]) == 0
    assert "plots:" in capsys.readouterr().out
    assert metrics(finished) == before
    assert (finished / "lite-seed0/metrics.jsonl").stat().st_mtime_ns == stamp


def test_another_configuration_is_refused(finished, capsys):
    assert main(["run", "quickstart", *SMALL, "--lr", "0.3", "--out", str(finished)]) == 2
    error = capsys.readouterr().err
    assert "holds another experiment" in error
    assert "lr 0.05 there, 0.3 here" in error
    assert len(error.strip().splitlines()) == 1


def test_an_experiment_of_which_nothing_has_begun_gives_way_to_any_other(tmp_path, capsys):
    out, missing = tmp_path / "run", tmp_path / "nothing-here"
    wanted = ["run", "quickstart", *SMALL, "--ap", "none", "--cycles", "0", "--out", str(out), "--quiet"]
    assert main([*wanted, "--data", "mnist", "--data-root", str(missing)]) == 2
    assert "mnist" in capsys.readouterr().err
    assert main(wanted) == 0
    assert experiment.load(out).data == "digits"


def test_more_seeds_and_arms_continue_an_experiment_and_fewer_do_not(finished, tmp_path, capsys):
    out = tmp_path / "run"
    short = ["--cycles", "1", "--epochs", "1", "--out", str(out), "--quiet"]
    assert main(["run", "quickstart", *short, "--seeds", "1", "--ap", "none"]) == 0
    before = metrics(out)
    stamp = (out / "none-seed0/metrics.jsonl").stat().st_mtime_ns
    assert main(["run", "quickstart", *short, "--seeds", "2", "--ap", "none", "lite"]) == 0
    after = metrics(out)
    assert set(after) == {"none-seed0", "none-seed1", "lite-seed0", "lite-seed1"}
    assert after["none-seed0"] == before["none-seed0"]
    assert (out / "none-seed0/metrics.jsonl").stat().st_mtime_ns == stamp
    assert experiment.load(out).seeds == 2
    capsys.readouterr()
    assert main(["run", "quickstart", *short, "--seeds", "1", "--ap", "none", "lite"]) == 2
    assert "seeds 2 there, 1 here" in capsys.readouterr().err
    assert main(["run", "quickstart", *short, "--seeds", "3", "--ap", "none", "lite", "--lr", "0.3"]) == 2
    assert "lr 0.05 there, 0.3 here" in capsys.readouterr().err


def test_fewer_training_images(tmp_path, capsys):
    whole = experiment.load_data(Experiment())
    assert len(experiment.load_data(Experiment(val=150)).val) == 150
    assert len(experiment.load_data(Experiment(val=0.5)).val) == 700
    with pytest.raises(ValueError, match="--val must be a share"):
        Experiment(val=1.5)
    data = experiment.load_data(Experiment(train_images=100))
    assert len(data.train) == 100
    assert len(data.val) == len(whole.val) == 200
    assert min(data.train.labels.bincount(minlength=10)) >= 9  # a tenth each, as in the whole set, to within one
    assert main(["run", "quickstart", "--train-images", "5000", "--dry-run", "--out", str(tmp_path / "run")]) == 2
    assert "--train-images must be 1 to 1,200, not 5,000" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["run", "quickstart", *SMALL, "--out", str(tmp_path)]) == 2
    assert "is not the folder of an experiment" in capsys.readouterr().err.replace("not empty, and not", "is not")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def start(out, *options):
    command = [sys.executable, "-m", "recipes", "run", "quickstart", *SMALL, "--ap", "none", "pro", "--out", str(out)]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def expected_rows(finished):
    return {name: rows for name, rows in metrics(finished).items() if name in ("none-seed0", "pro-seed0")}


@pytest.mark.parametrize("after_s", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_numbers(finished, tmp_path, after_s):
    out = tmp_path / "run"
    process = start(out)
    wait_for(lambda: list(out.glob("*/checkpoints/*.json")), process)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (out / "summary.json").exists()
    assert main(["resume", str(out), "--quiet"]) == 0
    assert metrics(out) == expected_rows(finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(finished, tmp_path, seed):
    import random

    out = tmp_path / "run"
    for _ in range(3):
        process = start(out)
        time.sleep(random.Random(seed).uniform(0.5, 12))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    process = start(out)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert metrics(out) == expected_rows(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_cleanly_and_says_how_to_go_on(finished, tmp_path, number):
    out = tmp_path / "run"
    process = start(out)
    wait_for(lambda: list(out.glob("*/checkpoints/*.json")), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("it was over before the signal came")
    assert process.returncode == 130
    assert f"python -m recipes resume {out}" in error
    assert "Traceback" not in error
    assert main(["resume", str(out), "--quiet"]) == 0
    assert metrics(out) == expected_rows(finished)


def test_ctrl_c_while_the_processes_begin_is_no_traceback(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "recipes", "run", "quickstart", *SMALL, "--ap", "none", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def children():
        found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "spawn_main"], capture_output=True, check=False)
        return found.stdout.split()

    wait_for(children, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "Broken" not in error


def test_runs_side_by_side_are_those_of_one_at_a_time(tmp_path):
    options = ["--ap", "none", "lite", "--cycles", "1", "--epochs", "1", "--seeds", "1", "--threads", "1", "--quiet"]
    for workers in ("1", "2"):
        out = str(tmp_path / workers)
        assert main(["run", "quickstart", *options, "--workers", workers, "--out", out]) == 0
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2")


def test_captured_steps_are_refused_where_there_is_no_gpu(tmp_path, capsys):
    options = ["--step", "captured", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["run", "quickstart", *options]) == 2
    assert "--step captured needs a GPU" in capsys.readouterr().err


def test_a_second_process_on_the_same_folder_is_refused(finished, capsys):
    with locked(finished):
        assert main(["resume", str(finished)]) == 2
    assert f"in use by another process (pid {os.getpid()})" in capsys.readouterr().err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "none-seed0/done.json").unlink()
    newest = max(out.glob("none-seed0/checkpoints/*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    assert main(["resume", str(out)]) == 0
    error = capsys.readouterr().err
    assert f"{newest.name} is damaged" in error
    assert "none-seed0: cycle 2" in error  # trained again from the checkpoint before
    assert metrics(out) == metrics(finished)


def wait_for(condition, process, patience=300.0):
    end = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_divergence_stops_the_run_and_keeps_what_was_computed(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(["run", "quickstart", *SMALL, "--ap", "none", "--lr", "1e18", "--schedule", "constant", "--out", str(out)])
        == 1
    )
    error = capsys.readouterr().err
    assert "the loss is not finite at step" in error
    assert "learning rate 1e+18" in error
    assert "Traceback" not in error
    assert (out / "none-seed0/config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "unknown command 'rum'; close: run"),
        (["run"], "run needs a preset first"),
        (["run", "quikstart"], "unknown preset 'quikstart'; close: quickstart"),
        (["run", "quickstart", "--amount", "1.5"], "--amount must be in (0, 1), not 1.5"),
        (["run", "quickstart", "--rate", "0.5"], "must be below amount"),
        (["run", "quickstart", "--pruner", "lapm"], "unknown pruner 'lapm'; close: lamp"),
        (["run", "quickstart", "--activation", "rellu"], "unknown activation 'rellu'; close: "),
        (["run", "quickstart", "--ap", "lit"], "unknown variant 'lit'; close: lite"),
        (["run", "quickstart", "--ap", "lite:leest-moved"], "unknown criterion 'leest-moved'; close: least-moved"),
        (["run", "quickstart", "--model", "resnet21"], "unknown model 'resnet21'; close: resnet"),
        (["run", "quickstart", "--data", "cifar"], "unknown data set 'cifar'; close: cifar10"),
        (["run", "quickstart", "--model", "no.such:factory"], "no.such"),
        (["run", "quickstart", "--seeds", "0"], "--seeds must be a whole number, 1 or more, not 0"),
        (["resume", "/nowhere/at/all"], "is missing"),
        (["compare"], "compare needs the folder"),
        (["dnr", "resnet20", "--images", "0"], "--images must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_missing_data_says_which_files_to_put_where(tmp_path, capsys):
    arguments = ["run", "resnet20-cifar10", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cifar-10-batches-py" in error
    assert str(tmp_path) in error


def test_dry_run_and_list_tell_the_cost(capsys, tmp_path):
    assert main(["run", "quickstart", "--dry-run", "--out", str(tmp_path / "x")]) == 0
    assert "54 trainings, 12,960 steps" in capsys.readouterr().out  # 1,200 images make 24 steps; 540 epochs
    assert not (tmp_path / "x").exists()
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "quickstart" in printed
    assert "lamp" in printed


def test_dnr_of_a_model(capsys, tmp_path):
    arguments = ["dnr", "cnn", "--images", "50", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(arguments) == 0
    assert "dead-neuron rates" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert 0 < found["total"] < 1
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_dnr_of_a_run_and_of_any_model_of_torchvisions(finished, capsys, tmp_path):
    assert main(["dnr", str(finished / "lite-seed0"), "--split", "val", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    # On the very images that the run counted on, its last row's rate comes out again.
    assert found["total"] == pytest.approx(metrics(finished)["lite-seed0"][-1]["dnr_total"], abs=1e-12)
    assert (found["images"], found["cycle"], found["data"]) == (200, 2, "digits")
    assert main(["dnr", str(finished / "lite-seed0"), "--activation", "gelu"]) == 2
    assert "is a run: its weights, activation and data are its own" in capsys.readouterr().err
    assert main(["dnr", "torchvision/resnet999"]) == 2
    assert "has no 'resnet999': did you mean resnet" in capsys.readouterr().err


def test_own_model_and_fine_tuning_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    import torch

    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, in_channels, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, 32), nn.ReLU(),\n"
        "                         nn.Linear(32, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    import mynet

    torch.manual_seed(3)
    torch.save(mynet.build(10, 1, 8).state_dict(), tmp_path / "w.pt")
    out = tmp_path / "run"
    arguments = ["run", "quickstart", *SMALL, "--model", "mynet:build", "--weights", str(tmp_path / "w.pt")]
    arguments += [
        "--rewind",
        "none",
        "--finetune-epochs",
        "1",
        "--finetune-lr",
        "0.01",
        "--ap",
        "lite",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    rows = metrics(out)["lite-seed0"]
    assert len(rows) == 3
    assert rows[0]["total"] == 64 * 32 + 320


def test_jobs_and_baselines():
    config = Experiment(ap=("none", "lite"), seeds=2)
    assert jobs(config)[:2] == [Job(Arm.parse("none"), 0), Job(Arm.parse("lite"), 0)]
    assert baseline_of("pro:random", ["none", "pro:random", "pro:pruner"]) == "pro:pruner"
    assert baseline_of("none", ["none"]) is None
    with pytest.raises(FolderError, match="no trained network"):
        Report(config, {})
    with pytest.raises(FolderError, match="is missing"):
        experiment.load(Path("/nowhere"))


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_a_file_where_a_folder_should_be_is_named(out, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    assert main(["run", "quickstart", "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.strip() == (
        f"error: {tmp_path / out} cannot be made: it, or something above it, is a file"
    )
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_folder_with_spaces_is_quoted_in_the_command_that_goes_on(finished, tmp_path, capsys):
    out = tmp_path / "výsledky a b"
    shutil.copytree(finished, out)
    assert main(["resume", str(out)]) == 0
    assert f"tensorboard --logdir '{out}'" in capsys.readouterr().out
    (out / "none-seed0/done.json").unlink()
    assert main(["dnr", str(out / "none-seed0")]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"python -m recipes resume '{out}'")
