"""Measured answers: plans that can be run, pages that follow from their numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import experiment
from recipes.answers import command, criteria, evidence, pages, plans
from recipes.config import Experiment
from recipes.storage import FolderError

DOCS = Path(__file__).parents[2] / "docs"
TINY = Experiment(
    ap=("none", "lite", "lite:random", "lite:least-moved"),
    model="cnn",
    width=0.25,
    data="digits",
    cycles=3,
    amount=0.4,
    rate=0.1,
    seeds=2,
    epochs=1,
    batch_size=100,
    lr=0.05,
    threads=1,
    monitor_every=5,
)


def test_every_planned_experiment_can_be_run_and_ends_where_twenty_percent_cycles_do() -> None:
    for plan in plans.PLANS.values():
        for config in plan.experiments.values():
            experiment.check(config)
            assert config.rate == pytest.approx(config.amount / 10, abs=5e-3)
            density = (1 - config.amount) ** config.cycles
            assert any(density == pytest.approx(0.8**n, rel=5e-3) for n in range(30))
        for name in plan.reuses:
            assert any(name in other.experiments for other in plans.PLANS.values())


def test_arms_of_a_criteria_experiment_are_all_the_criteria() -> None:
    arms = plans.get("criteria").experiments["criteria-global"].ap
    assert {"none", "lite", "lite:most-waking", "lite:gentle-waking", "lite:random"} <= set(arms)
    assert not any("pruner" in arm or "decay-corrected" in arm for arm in arms)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small experiment really run, in the place of the plan's."""
    out = tmp_path_factory.mktemp("answers")
    plan = replace(plans.get("criteria"), experiments={"criteria-global": TINY})
    assert command._run(plan, out)
    return out


def small(name: str, folder: str) -> plans.Plan:
    return replace(plans.get(name), experiments={folder: TINY}, reuses=())


def test_a_page_is_the_same_from_runs_and_from_its_numbers(runs: Path, tmp_path: Path) -> None:
    plan = small("criteria", "criteria-global")
    found = evidence.gather(plan, runs)
    written = pages.write(plan, found, tmp_path)
    again = json.loads((tmp_path / "results" / "criteria.json").read_text())
    assert pages.page(plan, again) == written.read_text()
    assert "Not run" not in written.read_text()
    assert (tmp_path / "images" / "results" / "criteria.png").stat().st_size > 5000
    picked = criteria.choice(found)
    report = evidence.report_of(found, "criteria-global")
    gains = {
        arm: sum(
            report.by_arm[arm][seed][c]["val_accuracy"] - report.by_arm["none"][seed][c]["val_accuracy"]
            for seed in (0, 1)
            for c in (1, 2, 3)
        )
        for arm in ("lite:random", "lite:least-moved")
    }
    assert f"lite:{picked}" == max(gains, key=lambda arm: gains[arm])


PAGES = [
    ("effect", "headline-mlp"),
    ("dead-neurons", "vit-relu"),
    ("depth", "headline-vgg"),
    ("published", "vit-relu-cifar10-fast"),
]


@pytest.mark.parametrize(("name", "folder"), PAGES)
def test_the_other_pages_too(name: str, folder: str, runs: Path, tmp_path: Path) -> None:
    plan = small(name, folder)
    (tmp_path / folder).symlink_to(runs / "criteria-global")
    found = evidence.gather(plan, tmp_path)
    text = pages.write(plan, found, tmp_path / "docs").read_text()
    assert text.startswith(f"# {plan.question}")
    if name == "dead-neurons":
        steps = found["folders"][folder]["over_steps"]
        assert set(steps) == {"0", "1"}
        assert len(steps["0"]) == 4  # one epoch of each of four trainings
        assert all(0 <= static <= total <= 1 for _, total, static in steps["0"])
    else:
        assert "lite − none" in text


def test_the_page_of_activations_compares_seed_by_seed_and_knows_which_cannot_die(runs: Path, tmp_path: Path) -> None:
    plan = small("activations", "activations-cnn-relu")
    smooth = replace(TINY, ap=("none", "lite"), activation="elu")
    plan.experiments["activations-cnn-elu"] = smooth
    (tmp_path / "activations-cnn-relu").symlink_to(runs / "criteria-global")
    experiment.prepare(smooth, tmp_path / "activations-cnn-elu")
    experiment.execute(smooth, tmp_path / "activations-cnn-elu", lambda event: None, 1)
    found = evidence.gather(plan, tmp_path)
    text = pages.write(plan, found, tmp_path / "docs").read_text()
    arms = {name: found["folders"][f"activations-cnn-{name}"]["arms"] for name in ("relu", "elu")}
    dense = [arms["elu"]["none"][seed][0]["accuracy"] - arms["relu"]["none"][seed][0]["accuracy"] for seed in "01"]
    assert f"{50 * sum(dense):+.2f} ±" in text
    row = next(line for line in text.splitlines() if line.startswith("| elu") and "cannot die" in line)
    effect = [arms["elu"]["lite"][seed][3]["accuracy"] - arms["elu"]["none"][seed][3]["accuracy"] for seed in "01"]
    assert f"{50 * sum(effect):+.2f}" in row
    assert "primary outcome" in text


def test_what_is_missing_is_said_and_what_is_another_experiments_refused(runs: Path) -> None:
    plan = replace(plans.get("criteria"), experiments={"criteria-global": replace(TINY, seeds=3), "confirm-cnn": TINY})
    text = pages.page(plan, evidence.gather(plan, runs))
    assert "**Not run** (of what was planned): criteria-global (4 runs), confirm-cnn." in text
    with pytest.raises(FolderError, match="no finished run"):
        evidence.gather(plan, runs / "nowhere")
    other = replace(plan, experiments={"criteria-global": replace(TINY, lr=0.1)})
    with pytest.raises(FolderError, match="another experiment"):
        evidence.gather(other, runs)


def test_all_plans_without_a_gpu_leave_out_what_needs_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"published": plans.get("published"), "criteria": small("criteria", "criteria-global")}
    monkeypatch.setattr(plans, "PLANS", chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(runs)]) == 0
    printed = capsys.readouterr()
    assert "published: left out, since it needs a GPU" in printed.err
    assert printed.out.startswith(f"# {chosen['criteria'].question}")
    assert {path.name for path in runs.iterdir()} == {"criteria-global"}


def test_what_is_published_stays_where_nothing_was_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page's numbers can be completed by whoever has only some of the runs."""
    plan = replace(plans.get("criteria"), experiments={"criteria-global": TINY, "confirm-cnn": replace(TINY, seeds=3)})
    monkeypatch.setitem(plans.PLANS, "criteria", plan)
    old = evidence.gather(plan, runs)
    other = {**old["folders"].pop("criteria-global"), "missing": 7}
    del other["machine"]  # as older files are
    old["folders"] = {"confirm-cnn": other, "criteria-global": other}
    old["machine"] = {"cpu": "an abacus", "torch": "1", "python": "2"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "criteria.json").write_text(json.dumps(old))
    arguments = ["criteria", "--out", str(runs), "--docs", str(tmp_path)]
    assert command.main([*arguments, "--only", "criteria-global"]) == 0
    new = json.loads((tmp_path / "results" / "criteria.json").read_text())["folders"]
    assert list(new) == ["criteria-global", "confirm-cnn"]
    assert new["criteria-global"]["missing"] == 0
    assert new["confirm-cnn"] == {**other, "machine": old["machine"]}
    assert not (runs / "confirm-cnn").exists()
    text = (tmp_path / "results" / "criteria.md").read_text()
    assert "an abacus, one thread a run, torch 1, Python 2" in text
    assert f"torch {torch.__version__}" in text
    assert "confirm-cnn (7 runs)" in text
    with pytest.raises(ValueError, match=r"unknown experiment 'confirm-cn'; close: confirm-cnn"):
        command.main([*arguments, "--only", "confirm-cn"])
    with pytest.raises(FolderError, match=r"criteria.json is missing: --out RUNS makes it"):
        command.main(["criteria", "--docs", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.md")), ids=lambda path: path.stem)
def test_published_pages_follow_from_their_numbers(path: Path) -> None:
    if path.stem not in plans.names():
        assert path.stem in ("benchmarks", "index")
        return
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert pages.page(plans.get(path.stem), found) == path.read_text(encoding="utf-8")
    if path.stem == "criteria" and "confirm-cnn" in found["folders"]:
        assert criteria.choice(found) == plans.CHOSEN
