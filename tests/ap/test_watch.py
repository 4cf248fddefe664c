"""`python -m ap watch`: the script behaves as it would unwatched, and its models are found."""

from __future__ import annotations

import gc
import json
import runpy
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ap.__main__ import main
from ap.watch import Watcher

WATCHED = Path(__file__).parent / "watched"

SCRIPT = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(6):
    optimizer.zero_grad(); model(torch.randn(16, 4)).square().mean().backward(); optimizer.step()
print(__name__, sys.argv[1:])
"""


def _watch(folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text(text)
    command = [sys.executable, "-m", "ap", "watch", "--every", "1", "--out", str(folder / "out"), str(script)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def test_a_plain_loop_and_its_exit_status(tmp_path: Path) -> None:
    done = _watch(tmp_path, SCRIPT + "sys.exit(7)", "--lr", "3")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "__main__ ['--lr', '3']\n"
    result = json.loads((tmp_path / "out/Sequential/dnr.json").read_text())
    assert result["steps"] == 6
    assert result["report"]["passes"] == 5  # all but the pass before the first step
    assert result["evaluation"] is None
    assert list((tmp_path / "out/Sequential").glob("events.*"))


def test_training_and_evaluation_passes_have_a_table_each(tmp_path: Path) -> None:
    evaluation = "model.eval()\nfor _ in range(2): model(torch.full((3, 4), 9.0))\n"
    done = _watch(tmp_path, SCRIPT + evaluation)
    result = json.loads((tmp_path / "out/Sequential/dnr.json").read_text())
    assert [result[kind]["passes"] for kind in ("report", "evaluation")] == [5, 2]
    assert [result[kind]["layers"]["1"]["samples"] for kind in ("report", "evaluation")] == [80, 6]
    tables = [line for line in done.stderr.splitlines() if line.startswith("dead-neuron rates")]
    assert tables == ["dead-neuron rates, train passes: 5", "dead-neuron rates, eval passes: 2"]


def test_an_exception_is_the_scripts_own(tmp_path: Path) -> None:
    done = _watch(tmp_path, SCRIPT + "raise KeyError('mine')")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'mine'")


def _own_interpreter(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    """What a script changes of the interpreter is put back."""
    monkeypatch.setattr(sys, "argv", list(argv))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a script of watched/ without and with `ap watch`, in this process: what it printed, and the report."""

    def run(script: str, *arguments: str, every: int = 5) -> tuple[str, str, dict[str, Any]]:
        monkeypatch.chdir(tmp_path)
        path = str(WATCHED / script)
        _own_interpreter(monkeypatch, path, *arguments)
        capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        alone = capsys.readouterr().out
        main(["watch", "--every", str(every), "--log-every", "10", "--out", "out", path, *arguments])
        watched = capsys.readouterr().out
        (report,) = tmp_path.glob("out/*/dnr.json")
        return alone, watched, json.loads(report.read_text()) | {"folder": report.parent}

    return run


KINDS = [
    ("plain.py", (), "Sequential", 96, ["1"]),
    ("references.py", ("--model-ema",), "ResNet", 12, ["relu", "layer1.0.relu", "layer1.0.relu:2"]),
    ("timm_model.py", (), "ResNet", 12, ["conv1.2", "act1", "layer1.0.act1"]),
    ("lightning_fit.py", (), "Classifier", 48, ["net.2"]),
]


@pytest.mark.parametrize(("script", "arguments", "name", "steps", "layers"), KINDS, ids=[kind[0] for kind in KINDS])
@pytest.mark.filterwarnings("ignore")  # other people's
def test_scripts_run_unmodified_and_to_the_same_bits(
    both: Callable[..., Any], script: str, arguments: tuple[str, ...], name: str, steps: int, layers: list[str]
) -> None:
    alone, watched, result = both(script, *arguments)
    assert watched == alone != ""
    assert (result["model"], result["steps"]) == (name, steps)
    rates = result["report"]["layers"]
    assert [layer for layer in rates if layer in layers] == layers
    assert all(0 < rates[layer]["total"] < 1 for layer in layers)
    events = EventAccumulator(str(result["folder"])).Reload()
    assert [event.step for event in events.Scalars("dnr/train/model/total")] == [*range(10, steps + 1, 10)] + (
        [steps] if steps % 10 else []
    )


def test_torchrun_with_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    watch = ["-m", "ap", "watch", "--every", "5", "--out", "out", str(WATCHED / "distributed.py")]
    done = subprocess.run([*command, *watch], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(line[:4] for line in done.stdout.splitlines()) == ["0 0 ", "1 1 "]
    assert done.stderr.count("ap watch: watching Sequential") == 1  # rank 0 alone
    result = json.loads((tmp_path / "out/Sequential/dnr.json").read_text())
    assert result["steps"] == 48
    assert list(result["report"]["layers"]) == ["1"]  # not module.1


def _train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    watcher = Watcher(tmp_path, every=1)
    watcher.start()
    yield watcher
    watcher.finish()


def test_two_optimizers_of_one_model_make_one_step(watcher: Watcher) -> None:
    model = _model()
    halves = [torch.optim.SGD(model[at].parameters(), lr=0.1) for at in (0, 2)]
    _train(model, halves, 5)
    (watched,) = watcher.watched
    assert watched.step == 5


def test_a_compiled_model_is_found_without_a_word_about_hooks_that_the_script_never_set(watcher: Watcher) -> None:
    watcher.finish()
    model = torch.compile(_model(), backend="eager")
    with warnings.catch_warnings(record=True, action="always") as caught:
        watcher.start()
        _train(model, [torch.optim.SGD(model.parameters(), lr=0.1)], 3)
        assert not [one for one in warnings.filters if "global hooks" in str(one[1])]  # the one for it is gone again
    assert not [str(one.message) for one in caught if "hooks" in str(one.message)]
    assert [one.name for one in watcher.watched] == ["Sequential"]


def test_a_new_optimizer_a_cycle_goes_on_counting(watcher: Watcher) -> None:
    model = _model()
    kept = []
    for cycle in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept.append(optimizer)  # even where the old ones are not collected
        _train(model, [optimizer], 4)
        assert watcher.watched[0].step == 4 * (cycle + 1) - cycle  # the step in which it takes over
    assert len(watcher.watched) == 1


def test_models_that_are_trained_no_more_are_reported_and_let_go(watcher: Watcher, tmp_path: Path) -> None:
    gone = []
    for _ in range(3):
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _train(model, [optimizer], 6)
        gone.append(weakref.ref(model))
        del model, optimizer
        gc.collect()
    assert [reference() is None for reference in gone] == [True, True, False]
    watcher.finish()
    steps = {path.parent.name: json.loads(path.read_text())["steps"] for path in tmp_path.glob("*/dnr.json")}
    assert steps == {"Sequential": 6, "Sequential-2": 6, "Sequential-3": 6}


def test_a_second_run_into_the_same_folder_leaves_the_first_ones_curve_and_report(tmp_path: Path) -> None:
    for steps in (4, 6):
        watcher = Watcher(tmp_path, every=1, log_every=2)
        watcher.start()
        model = _model()
        _train(model, [torch.optim.SGD(model.parameters(), lr=0.1)], steps)
        watcher.finish()
    for name, steps in (("Sequential", [2, 4]), ("Sequential-2", [2, 4, 6])):
        events = EventAccumulator(str(tmp_path / name)).Reload().Scalars("dnr/train/model/total")
        assert sorted({event.step for event in events}) == steps
        assert json.loads((tmp_path / name / "dnr.json").read_text())["steps"] == steps[-1]


def test_where_nothing_can_be_written_or_watched_the_model_is_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    watcher = Watcher(tmp_path / "file" / "out", every=1)
    watcher.start()
    model, leaky = _model(), nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))
    for one in (model, leaky):
        _train(one, [torch.optim.SGD(one.parameters(), lr=0.1)], 3)
    watcher.finish()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("ap watch: Sequential is not watched: [Errno 20] Not a directory")
    assert second.startswith("ap watch: Sequential is not watched: nothing in this model can die")


def test_what_a_killed_script_logged_is_on_the_disk_within_a_second(tmp_path: Path) -> None:
    body = SCRIPT.replace("range(6)", "range(12)").replace("import sys, torch", "import os, sys, time, torch")
    script = tmp_path / "train.py"
    script.write_text(body + "time.sleep(2); os.kill(os.getpid(), 9)")
    command = [sys.executable, "-m", "ap", "watch", "--every", "1", "--log-every", "5", "--out", str(tmp_path / "out")]
    assert subprocess.run([*command, str(script)], capture_output=True, timeout=120).returncode == -9
    events = EventAccumulator(str(tmp_path / "out/Sequential")).Reload()
    assert [event.step for event in events.Scalars("dnr/train/model/total")] == [5, 10]


def test_the_scripts_annotations_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text("def f(x: int) -> int: return x\nassert f.__annotations__['x'] is int")
    _own_interpreter(monkeypatch, str(script))
    main(["watch", "--out", str(tmp_path / "out"), str(script)])


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("")
    for arguments, message in (
        (["watch"], "watch: error: the following arguments are required: script\n"),
        (["watch", "missing.py"], "watch: error: no such script: missing.py"),
        (["watch", "--every", "0", str(tmp_path / "train.py")], "every must be at least 1, not 0"),
        (["watch", "-m", "missing.module"], "no such module: missing.module"),
        (["watch", "--out", str(tmp_path / "train.py" / "x"), str(tmp_path / "train.py")], "train.py is not a folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
