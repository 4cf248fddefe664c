"""`python -m ap watch`: the script behaves as it would unwatched, and its models are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert list((tmp_path / "out/Sequential").glob("events.*"))


def test_an_exception_is_the_scripts_own(tmp_path: Path) -> None:
    done = _watch(tmp_path, SCRIPT + "raise KeyError('mine')")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'mine'")
