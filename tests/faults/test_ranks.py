"""Under torchrun a rank dies: the others stop within a minute, and the run goes on to the same end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ranks.py")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    began = time.monotonic()
    run = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=180)
    return run, time.monotonic() - began


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_stops_the_others_and_the_run_goes_on(tmp_path, rank):
    undisturbed, _ = torchrun(tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    killed, seconds = torchrun(tmp_path / "killed", rank, 2)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr
    assert seconds < 60
    assert not list((tmp_path / "killed").glob("end.*"))
    resumed, _ = torchrun(tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout.count("goes on in cycle 2") == 2
    ends = [torch.load(tmp_path / f / f"end.{r}", weights_only=True) for f in ("whole", "killed") for r in (0, 1)]
    assert all(same(end, ends[0]) for end in ends[1:])
    assert [row["cycle"] for row in ends[0][0]] == [0, 1, 2, 3, 4]
