"""Every example runs, as it is, and prints what it says."""

from __future__ import annotations

import difflib
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs an example in an empty folder and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_ap_adds_three_lines_to_a_loop_and_keeps_its_density(run) -> None:
    before, after = ((EXAMPLES / name).read_text().splitlines() for name in ("loop.py", "loop_with_ap.py"))
    changed = difflib.ndiff([line.strip() for line in before], [line.strip() for line in after])
    assert [line for line in changed if line.startswith(("+", "-"))] == [
        "+ from ap import AP",
        "+ plugin = AP(model)",
        "- share = 0.2",
        "+ with plugin.cycle(amount=0.2) as share:",
    ]
    alive, accuracy = {}, {}
    for name in ("loop.py", "loop_with_ap.py"):
        printed = run(name)
        alive[name] = re.findall(r"(\d+) weights alive", printed)
        accuracy[name] = float(re.findall(r"accuracy ([\d.]+)%", printed)[-1])
    assert alive["loop.py"] == alive["loop_with_ap.py"]
    assert len(alive["loop.py"]) == 10
    assert min(accuracy.values()) > 90


def test_torch_prune_ends_with_plain_weights_at_the_exact_density(run) -> None:
    printed = run("with_torch_prune.py")
    assert [int(n) for n in re.findall(r"(\d+) weights alive", printed)] == [6233, 4363, 3054, 2138, 1497]
    assert "weight_orig" not in printed
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[0]) > 85
