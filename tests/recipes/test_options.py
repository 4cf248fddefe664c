"""A misspelled option is one line, wherever it stands."""

from __future__ import annotations

import pytest

from recipes import cli


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


def test_values_that_begin_with_a_minus_and_underscores_are_no_unknown_options(capsys) -> None:
    assert cli.main(["run", "quickstart", "--first_seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --first-seed must be a whole number, 0 or more, not -1")
