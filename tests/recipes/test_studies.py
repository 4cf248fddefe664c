"""What all studies share: trainings as one, intervals, verdicts, journals, pages and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recipes import studies
from recipes.studies import intervals
from recipes.studies.base import NOT_SHOWN, OPPOSITE, REPRODUCED, Journal, Outcome, above, registered
from recipes.studies.intervals import Interval
from recipes.studies.pages import index, page
from recipes.studies.stacked import SGD, Adam, Stack, accuracy, fit, orders

DOCS = Path(__file__).parents[2] / "docs" / "studies"


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    # Double, so that Adam does not blow rounding up where a gradient is nearly zero.
    return nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_stack_trains_each_model_as_if_it_were_alone(kind: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double(), torch.randint(0, 3, (40,))
    seeds, rates = [0, 1, 2], [0.01, 0.02, 0.05]
    stack = Stack([small(seed) for seed in seeds])
    mine = (
        SGD(stack.params, torch.tensor(rates), 0.9, 0.01) if kind == "sgd" else Adam(stack.params, torch.tensor(rates))
    )
    fit(stack, mine, x, y, seeds, steps=12, batch=10)
    stacked = stack.write_back()
    for seed, rate, model in zip(seeds, rates, stacked, strict=True):
        alone = small(seed)
        decayed = [p for p in alone.parameters() if p.dim() > 1]
        rest = [p for p in alone.parameters() if p.dim() <= 1]
        theirs: torch.optim.Optimizer = torch.optim.Adam(alone.parameters(), rate)
        if kind == "sgd":
            groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
            theirs = torch.optim.SGD(groups, rate, momentum=0.9)
        source = orders(40, [seed], 10)
        for _ in range(12):
            index = next(source)[0]
            theirs.zero_grad()
            F.cross_entropy(alone(x[index]), y[index]).backward()
            theirs.step()
        for (name, p), (_, q) in zip(alone.state_dict().items(), model.state_dict().items(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8, msg=f"{name} of seed {seed}")


def test_masks_stay_zero_and_seeds_share_their_order() -> None:
    stack = Stack([small(0), small(0)])
    mask = torch.rand(8, 6) > 0.5
    factors = stack.masks([{"0.weight": mask}, {"0.weight": ~mask}])
    x, y = torch.randn(20, 6).double(), torch.randint(0, 3, (20,))
    fit(stack, SGD(stack.params, 0.1, 0.9), x, y, [3, 3], steps=5, batch=5, masks=factors)
    assert bool((stack.params["0.weight"][0][~mask] == 0).all())
    assert bool((stack.params["0.weight"][1][mask] == 0).all())
    index = next(orders(20, [3, 3, 4], 5))
    assert torch.equal(index[0], index[1])
    assert not torch.equal(index[0], index[2])


def test_a_network_that_is_not_finite_has_no_right_answers() -> None:
    stack = Stack([nn.Linear(2, 2), nn.Linear(2, 2)])
    with torch.no_grad():
        stack.params["weight"][0] = torch.nan
        stack.params["weight"][1] = 0
        stack.params["bias"][1] = torch.tensor([1.0, 0.0])
    assert accuracy(stack, torch.ones(4, 2), torch.tensor([0, 0, 0, 1])) == [0.0, 75.0]


def test_intervals() -> None:
    assert intervals.mean([2.0, 4.0]).mean == 3
    assert intervals.mean([2.0, 4.0]).high == pytest.approx(3 + 12.7062 * 1.0, rel=1e-4)  # t(0.975, 1) · s/√2
    assert intervals.paired([3.0, 5.0], [1.0, 3.0]).low == 2
    assert intervals.share(5, 10).low == pytest.approx(23.66, abs=0.01)  # Wilson's, from its formula
    low, high = intervals.bootstrap(100, lambda i: float(i.mean()), draws=500)
    assert low < 49.5 < high
    assert Interval.from_dict(Interval(1.0, float("nan"), 2.0, 3).to_dict()).n == 3
    with pytest.raises(ValueError, match="equal lengths"):
        intervals.paired([1.0], [1.0, 2.0])


def test_verdicts_follow_the_interval() -> None:
    assert above("c", Interval(1, 0.1, 2, 3), "").outcome == REPRODUCED
    assert above("c", Interval(1, -0.1, 2, 3), "").outcome == NOT_SHOWN
    assert above("c", Interval(-1, -2, -0.1, 3), "").outcome == OPPOSITE
    assert above("c", Interval(1, 0.1, 2, 3), "", bound=0.5).outcome == NOT_SHOWN
    assert above("c", Interval(float("nan"), float("nan"), float("nan"), 1), "").outcome == NOT_SHOWN


def test_a_journal_goes_on_and_refuses_another_configuration(tmp_path: Path) -> None:
    path, calls = tmp_path / "journal.jsonl", []

    def measure(value: int) -> list[int]:
        calls.append(value)
        return [value]

    first = Journal(path, {"a": 1})
    assert first.cell("x", measure, 1) == [1]
    assert first.cell("y", measure, 2) == [2]
    with path.open("a") as file:
        file.write('{"key": "z", "val')  # a kill in the middle of a line
    again = Journal(path, {"a": 1})
    assert again.cell("x", measure, 9) == [1]
    assert again.cell("z", measure, 3) == [3]
    assert calls == [1, 2, 3]
    assert Journal(path, {"a": 1}).cell("z", measure, 9) == [3]
    with pytest.raises(ValueError, match="another configuration"):
        Journal(path, {"a": 2})


def test_a_study_that_was_killed_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"trials": 10, "epochs": 20}
    whole = studies.run("xor", out=tmp_path / "whole", **options)
    cell, done = Journal.cell, 0

    def dies(self: Journal, *args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 3:
            raise KeyboardInterrupt
        return cell(self, *args)

    monkeypatch.setattr(Journal, "cell", dies)
    with pytest.raises(KeyboardInterrupt):
        studies.run("xor", out=tmp_path / "cut", **options)
    monkeypatch.undo()
    assert studies.run("xor", out=tmp_path / "cut", **options).data == whole.data
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["journal.jsonl", "page.md", "plot.png", "result.json", "table.md"]
    stored = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert stored["schema"] == 1
    assert stored["config"]["trials"] == 10
    assert Outcome.from_dict(stored).verdicts == whole.verdicts


def test_unknown_names_list_close_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown study 'xorr'; close: xor \(known: "):
        studies.create("xorr")
    with pytest.raises(ValueError, match="unknown option of the study xor 'trails'; close: trials"):
        studies.create("xor", trails=3)
    with pytest.raises(ValueError, match="schema"):
        Outcome.from_dict({"schema": 99})


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "xor",
        "--quick",
        "--trials",
        "5",
        "--epochs",
        "5",
        "--out",
        str(tmp_path / "o"),
        "--docs",
        str(tmp_path),
    ]
    assert studies.cli(arguments) == 0
    assert "PReLU" in capsys.readouterr().out
    text = (tmp_path / "studies" / "xor.md").read_text()
    assert "python -m recipes study xor --quick --trials 5 --epochs 5 --out DIR" in text
    assert (tmp_path / "images" / "studies" / "xor.png").stat().st_size > 1000
    assert studies.cli(["nothing"]) == 2
    assert "unknown study" in capsys.readouterr().err
    assert studies.cli([]) == 2


def test_some_pages_are_published() -> None:
    published = {path.stem for path in DOCS.glob("*.json")}
    assert published
    assert published <= set(studies.names())


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCS.glob("*.json")))
def test_pages_are_what_their_numbers_say(name: str) -> None:
    """Every published page is generated from the JSON beside it, by the code as it is."""
    stored = json.loads((DOCS / f"{name}.json").read_text())
    outcome = Outcome.from_dict(stored)
    assert (DOCS / f"{name}.md").read_text() == page(outcome, f"../images/studies/{name}.png")
    assert (DOCS.parent / "images" / "studies" / f"{name}.png").exists()
    assert set(stored["config"]) <= set(registered()[name].__dataclass_fields__)
    assert (DOCS / "index.md").read_text() == index(DOCS)


def test_pages_are_written_anew_from_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "xor.json").write_text((DOCS / "xor.json").read_text())
    assert studies.cli(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "studies" / "xor.md").read_text() == (DOCS / "xor.md").read_text()
    assert "XOR" in (tmp_path / "studies" / "index.md").read_text()


def test_an_activation_that_cannot_be_batched_trains_too() -> None:
    torch.manual_seed(0)
    stack = Stack([nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 3)) for _ in range(2)])
    x = torch.randn(30, 6)
    before = stack.params["0.weight"].detach().clone()
    fit(stack, SGD(stack.params, 0.1), x, (x[:, 0] > 0).long(), [0, 1], steps=40, batch=10)
    assert not torch.equal(before[1], stack.params["0.weight"][1])
    assert min(accuracy(stack, x, (x[:, 0] > 0).long())) > 80


def test_clipped_gradients_have_the_norm_that_was_asked_for() -> None:
    start = {"a": torch.tensor([[3.0, 4.0], [0.03, 0.04]], requires_grad=True)}
    optimizer = SGD(start, 1.0, clip=0.5)
    optimizer.step((start["a"] ** 2 / 2).sum())
    torch.testing.assert_close(start["a"].detach()[0], torch.tensor([3.0 - 0.3, 4.0 - 0.4]))
    torch.testing.assert_close(start["a"].detach()[1], torch.zeros(2))
