"""Every example runs, as it is, and prints what it says."""

from __future__ import annotations

import difflib
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example in an empty folder and returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_ap_adds_three_lines_to_a_loop_and_keeps_its_density(run: Run) -> None:
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


def test_torch_prune_ends_with_plain_weights_at_the_exact_density(run: Run) -> None:
    printed = run("with_torch_prune.py")
    assert [int(n) for n in re.findall(r"(\d+) weights alive", printed)] == [6233, 4363, 3054, 2138, 1497]
    assert "weight_orig" not in printed
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[0]) > 85


def test_torch_pruning_narrows_the_network_that_ap_follows(run: Run) -> None:
    printed = run("with_torch_pruning.py")
    assert re.findall(r"widths ([\d, ]+);", printed)[-1] == "8, 16, 16, 10"
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[-1]) > 85
    alive, total = (int(n) for n in re.findall(r"(\d+) of (\d+) weights alive", printed)[-1])
    assert 0 < total - alive < 4 * 0.02 * 35744  # what AP removed from the layers that are left


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_reaches_the_density_and_logs_every_epoch(run: Run) -> None:
    printed = run("with_lightning.py")
    assert "2000 of 11900 weights alive" in printed
    assert len(re.findall(r"dead neurons while training", printed)) == 12
    assert float(re.findall(r"accuracy ([\d.]+)%", printed)[-1]) > 90


def test_the_monitor_shows_that_a_learning_rate_kills(run: Run, tmp_path: Path) -> None:
    printed = run("monitor_only.py")
    static = [float(rate) for rate in re.findall(r"^model .* ([\d.]+) % +[\d.]+ %$", printed, re.M)]
    assert len(static) == 3
    assert static[0] < static[1] < static[2]
    assert len(list(tmp_path.glob("runs/monitor/*/events.*"))) == 3


def test_own_parts_go_through_the_loop_at_equal_density(run: Run) -> None:
    from ap import activations, criteria
    from pruners import base

    try:
        printed = run("own_parts.py")
    finally:  # the other tests look at the built-in names
        activations.unregister("soft-relu")
        del base._REGISTRY["relative"], criteria._CRITERIA["least-moved-relatively"]
    densities = re.findall(r"density +([\d.]+)%", printed)
    assert densities[:6] == densities[6:] == ["100.0", "70.0", "49.0", "34.3", "24.0", "16.8"]
    dead = [float(rate) for rate in re.findall(r"dead neurons ([\d.]+)%", printed)]
    assert sum(dead[7:]) < sum(dead[1:6])


def test_two_processes_prune_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "distributed.py")], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for cycle in range(5):
        lines = re.findall(rf"cycle {cycle} rank \d: (\d+ alive, masks \w+), .*, ([\d.]+% on all ranks)", done.stdout)
        assert len(lines) == 2
        assert lines[0] == lines[1]


def test_the_tour_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    stored = [kind(cell) for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [kind(cell) for cell in notebook.cells] == stored  # what readers see on the web is what it does
    printed = "".join(o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream")
    assert re.findall(r"Selection\((\d+) weights", printed) == ["1190"]


def kind(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell shows; what is printed may come in several parts, and warnings are the machine's."""
    shown = [o.output_type for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    return [one for i, one in enumerate(shown) if one != "stream" or shown[i - 1 : i] != ["stream"]]
