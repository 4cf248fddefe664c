"""Every file that is written says which version of its format it has."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from ap import AP, Masks
from ap.compat.loggers import CSVWriter
from ap.watch import Watcher
from recipes import pool
from recipes.cli import main
from recipes.storage import FolderError

RUN = ["run", "quickstart", "--seeds", "1", "--cycles", "1", "--epochs", "1", "--ap", "lite", "--workers", "1"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment, its comparison, a report of dead neurons, and a watched training."""
    out = tmp_path_factory.mktemp("written")
    assert main([*RUN, "--out", str(out / "experiment")]) == 0
    pool.Pool([out / "experiment"]).save(out / "pool")
    assert main(["dnr", "cnn", "--json", str(out / "dnr.json"), "--images", "50"]) == 0
    watcher = Watcher(out / "watched", every=1)
    watcher.start()
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    watcher.finish()
    with_writer = CSVWriter(out / "scalars.csv")
    with_writer.add_scalar("a", 1.0, 1)
    with_writer.close()
    return out


def test_json(written: Path) -> None:
    files = sorted(written.rglob("*.json"))
    assert {"experiment.json", "config.json", "done.json", "summary.json", "dnr.json"} <= {path.name for path in files}
    assert [str(path) for path in files if json.loads(path.read_text()).get("schema") != 1] == []


def test_rows(written: Path) -> None:
    rows = [json.loads(line) for path in written.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert [row["schema"] for row in rows] == [1, 1]


def test_csv(written: Path) -> None:
    files = sorted(written.rglob("*.csv"))
    assert len(files) == 3
    for path in files:
        assert {row["schema"] for row in csv.DictReader(path.read_text().splitlines())} == {"1"}, path


def test_states() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    plugin = AP(model)
    plugin.mark_start()
    assert Masks(model).state_dict()["schema"] == plugin.state_dict()["schema"] == 1
    with pytest.raises(ValueError, match="not an AP state of schema 1"):
        plugin.load_state_dict(plugin.state_dict() | {"schema": 2})


def test_packed_data(tmp_path: Path) -> None:
    from PIL import Image

    from recipes.data import load

    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), 20 * number).save(tmp_path / "images" / split / label / f"{number}.png")
    load("folder", tmp_path / "images", val=0.25)
    (pack,) = tmp_path.rglob("*.safetensors")
    with pack.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert json.loads(file.read(length))["__metadata__"]["format"]


def test_rows_of_another_version_are_refused(written: Path, tmp_path: Path) -> None:
    from recipes.experiment import check_rows

    row = {"schema": 2, "cycle": 0, "alive": 10}
    with pytest.raises(FolderError, match=r"line 1: written by another version \(schema 2\)"):
        check_rows(tmp_path / "metrics.jsonl", [row])


def test_published_results() -> None:
    docs = Path(__file__).parents[2] / "docs"
    files = sorted(docs.glob("studies/*.json")) + sorted(docs.glob("results/*.json"))
    assert files
    assert [path.name for path in files if not json.loads(path.read_text()).get("schema")] == []
