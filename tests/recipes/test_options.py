"""A misspelled option is one line, wherever it stands."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import sys

import pytest

from recipes import cli
from recipes.__main__ import main as console
from recipes.config import Experiment
from recipes.dnr_command import DNR
from recipes.export import ExportConfig
from recipes.sweep_command import Grid, Sweep


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("run quickstart --ap none lite --seedz 3", "unknown option --seedz; close: --seeds, "),
        ("run quickstart --seedz=3", "unknown option --seedz; close: --seeds, "),
        ("run quickstart --no-dry-rum", "unknown option --no-dry-rum; close: --no-dry-run, "),
        ("run quickstart photos", "unexpected argument 'photos'"),
        ("sweep quickstart --pruner lamp --lits", "unknown option --lits; close: --list, "),
        ("resume --workes 2 runs/x", "unknown option --workes; close: --workers"),  # before what is required
        ("resume runs/x -w 2", "unknown option -w"),
        ("resume runs/x --out y", "unknown option --out"),  # its place says what it is, no name
        ("compare runs/x --jsn", "unknown option --jsn; close: --json, "),
        ("dnr cnn --imagesize 8", "unknown option --imagesize; close: --image-size, "),
        ("export runs/x/none-seed0 --format onnx", "unknown option --format; close: --formats"),
        ("study xor --quick --seedz 3", "unknown option --seedz; close: --seed"),
    ],
)
def test_an_unknown_option_is_one_line_with_the_close_ones(words, wanted, capsys) -> None:
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {wanted}")
    assert line.endswith("--help)")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("run quickstart --amount abc", "--amount must be a number, not 'abc'"),
        ("run quickstart --epochs 1.5", "--epochs must be a whole number, not '1.5'"),
        ("run quickstart --epochs", "--epochs needs a value"),
        ("run quickstart --epochs --quiet", "--epochs needs a value"),
        ("run quickstart --workers=two", "--workers must be a whole number, not 'two'"),
        ("run quickstart --ema 0.9.9", "--ema must be a number, not '0.9.9'"),
        ("run quickstart --optimizer sdg", "--optimizer must be sgd, adam or adamw, not 'sdg'; close: sgd"),
        ("sweep quickstart --rate 0.1 x", "--rate must be a number, not 'x'"),
        ("sweep quickstart --run x", "--run must be a whole number, not 'x'"),
        ("export runs/x/none-seed0 --formats onx", "--formats must be safetensors or onnx, not 'onx'; close: onnx"),
        ("run quickstart --workers 0", "--workers must be 1 or more, not 0"),
        ("resume runs/x --workers -1", "--workers must be 1 or more, not -1"),
        ("sweep quickstart --list --run 1", "--list and --run exclude each other"),
        ("resume", "resume needs the folder of an experiment or a sweep"),
        ("resume --quiet", ""),
        ("dnr", "dnr needs a model first: "),
        ("dnr --images 3", ""),
        ("dnr resnet18", "unknown model 'resnet18': torchvision's is torchvision/resnet18"),
        ("dnr cnn --device gpu", "--device must be auto, cpu, cuda or cuda:N, not 'gpu'"),
        ("dnr cnn --device meta", "--device meta cannot be used here: "),
        ("dnr tests/recipes", "tests/recipes is not the folder of a run, such as runs/quickstart/lite-seed0"),
        ("dnr cnn --weights README.md", "README.md cannot be read as weights alone: it is damaged, or torch.save"),
        ("export tests/recipes", "tests/recipes is not the folder of a run, such as runs/quickstart/lite-seed0"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(words, wanted, capsys) -> None:
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {wanted}")
    assert not re.search("─|---", line)  # of tyro's boxes
    assert len(line) < 700


def test_every_command_explains_itself(capsys) -> None:
    for command in cli.COMMANDS:
        with contextlib.suppress(SystemExit):  # which tyro and argparse raise
            cli.main([command, "--help"])
        assert f"python -m recipes {command}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [cli.Run, cli.Resume, cli.Compare, Experiment, Grid, Sweep, DNR, ExportConfig])
def test_an_option_is_explained_in_one_line_of_code(kind) -> None:
    """In --help each line begins a new one, wherever it ends."""
    (made,) = ast.parse(inspect.getsource(kind)).body
    texts = [ast.literal_eval(part.value) for part in made.body if isinstance(part, ast.Expr)][1:]  # not of the class
    assert len(texts) == sum(isinstance(part, ast.AnnAssign) and part.target.id != "experiment" for part in made.body)
    assert [text for text in texts if "\n" in text] == []


def test_values_that_begin_with_a_minus_and_underscores_are_no_unknown_options(capsys) -> None:
    assert cli.main(["run", "quickstart", "--first_seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --first-seed must be a whole number, 0 or more, not -1")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--where conv1,fc9", "fc9"),
        ("--train-images 30", "--batch-size 50 is more than the 30 training images"),
        ("--score-size 5000", "--score-size 5000 is more than the 1,200 training images"),
        ("--pruner nm --ap none --cycles 1", "the pruner nm cannot prune cnn: 2:4 sparsity removes exactly 0.5 of its"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(options, why, tmp_path, capsys):
    arguments = ["run", "quickstart", *options.split(), "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert why in error
    assert list((tmp_path / "run").glob("*/config.json")) == []  # so that the corrected command may use the folder


def test_a_terminal_without_our_letters_gets_question_marks(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert console(["list"]) == 0
    sys.stdout.flush()
    assert b"none lite ? 3 seeds" in written.getvalue()


def test_names_in_another_case_are_close(capsys):
    assert cli.main(["run", "quickstart", "--pruner", "LAMP"]) == 2
    assert "close: lamp" in capsys.readouterr().err
    assert cli.main(["run", "quickstart", "--activation", "SmeLU"]) == 2
    assert "close: smelu" in capsys.readouterr().err
