"""Several experiments in one comparison, from rows made by hand."""

import csv
import json

import pytest

from recipes import experiment
from recipes.cli import main
from recipes.config import Experiment
from recipes.experiment import jobs
from recipes.pool import Pool
from recipes.report import of_folder
from recipes.statistics import holm
from recipes.storage import FolderError, write_rows


def record(folder, accuracy, **settings):
    """An experiment's folder with two rows a run; `accuracy(arm, seed)` is that of the pruned network."""
    config = Experiment(**{"cycles": 1, "seeds": 3} | settings)
    experiment.prepare(config, folder)
    for job in jobs(config):
        common = {"total": 100, "dnr_total": 0.5, "dnr_static": 0.1, "dnr_dynamic": 0.4, "trainings": 0}
        dense = common | {"cycle": 0, "alive": 100, "density": 1.0, "accuracy": 0.9}
        pruned = common | {"cycle": 1, "alive": 80, "density": 0.8, "accuracy": accuracy(str(job.arm), job.seed)}
        write_rows(folder / job.name / "metrics.jsonl", [dense, pruned])
    return folder


def noisy(gain):
    return lambda arm, seed: 0.8 + 0.01 * seed + (gain + 0.0007 * (seed % 3) if arm != "none" else 0.0)


def test_seeds_of_one_experiment_in_two_folders_are_pooled(tmp_path):
    whole = record(tmp_path / "whole", noisy(0.001), seeds=6)
    parts = [record(tmp_path / f"part{i}", noisy(0.001), seeds=3, first_seed=3 * i) for i in (0, 1)]
    pool = Pool(parts)
    assert len(pool.reports) == 1
    assert pool.reports[0].records() == of_folder(whole).records()
    assert pool.reports[0].cells[-1]["accuracy_difference"].n == 6


def test_arms_in_another_folder_are_paired_with_the_baseline(tmp_path):
    folders = [record(tmp_path / "a", noisy(0.001), ap=("none",)), record(tmp_path / "b", noisy(0.001), ap=("lite",))]
    (report,) = Pool(folders).reports
    assert report.arms == ["none", "lite"]
    assert report.cells[-1]["accuracy_difference"].difference == pytest.approx(0.0017)


def test_a_run_in_two_folders_is_refused(tmp_path):
    folders = [record(tmp_path / name, noisy(0.001)) for name in ("a", "b")]
    with pytest.raises(FolderError, match=r"none-seed0 is both in .*a and in .*b: leave one of them out"):
        Pool(folders)


def test_one_correction_over_all_experiments(tmp_path):
    gains = {"magnitude": 0.004, "lamp": 0.0003, "synflow": 0.001}
    folders = [record(tmp_path / pruner, noisy(gain), pruner=pruner) for pruner, gain in gains.items()]
    pool = Pool(folders)
    assert [report.config.pruner for report in pool.reports] == ["lamp", "magnitude", "synflow"]
    found = [report.cells[-1]["accuracy_difference"] for report in pool.reports]
    assert [d.p_holm for d in found] == holm([d.p for d in found])
    alone = {folder.name: of_folder(folder).cells[-1]["accuracy_difference"].p_holm for folder in folders}
    assert found[1].p_holm == pytest.approx(3 * alone["magnitude"])  # the smallest of three
    assert pool.comparisons == 3
    text = str(pool)
    assert text.index("pruner lamp") < text.index("pruner magnitude") < text.index("pruner synflow")
    assert "all 3 comparisons of accuracy in these 3 experiments" in text
    assert max(map(len, str(pool.reports[0].table()).splitlines())) <= 100


def test_another_setting_is_another_experiment(tmp_path):
    folders = [record(tmp_path / f"lr{lr}", noisy(0.001), lr=lr) for lr in (0.1, 0.2)]
    assert len(Pool(folders).reports) == 2


def test_compare_takes_a_sweep(tmp_path, capsys):
    cells = [("lamp", "relu"), ("lamp", "gelu"), ("magnitude", "relu")]
    for pruner, activation in cells:
        record(tmp_path / f"{pruner}-{activation}", noisy(0.001), pruner=pruner, activation=activation)
    experiment.prepare(Experiment(pruner="synflow"), tmp_path / "not-begun")
    assert main(["compare", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("=== pruner") == 2
    assert "cnn on digits, gelu" in printed.out
    assert "no trained network yet in 1 of 4 experiments" in printed.err
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "summary.json").read_text())["experiments"]) == 3
    with (tmp_path / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3 * 2 * 2
    assert {(row["pruner"], row["activation"]) for row in table} == set(cells)
    folders = [str(tmp_path / f"{pruner}-{activation}") for pruner, activation in cells[1:]]
    assert main(["compare", *folders, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["experiment"]["pruner"] for found in printed] == ["lamp", "magnitude"]


def test_pooled_seeds_are_saved_where_asked(tmp_path, capsys):
    parts = [record(tmp_path / f"part{i}", noisy(0.001), first_seed=3 * i, epochs=1) for i in (0, 1)]
    assert main(["compare", *map(str, parts), "--save", str(tmp_path / "both")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cnn on digits, pruner magnitude, 1 epoch a training\n")
    assert "with 6 seeds" in printed
    assert (tmp_path / "both/summary.md").read_text().count("cnn on digits") == 1
