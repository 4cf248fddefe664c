"""The activation search: formulas, grammar, child networks, controller, and the search itself."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap import activations
from recipes import models, studies
from recipes.studies import images
from recipes.studies.children import Child, train
from recipes.studies.controller import Controller, to_candidate
from recipes.studies.formula import Formula, compile_formula
from recipes.studies.grammar import BINARY, UNARY, Candidate, Grouped, Unit, core_units, sieve, to_formula


def unit(first: str, second: str, binary: str, source: int = 0) -> Unit:
    return Unit(UNARY.index(first), UNARY.index(second), BINARY.index(binary), source)


RELU = (unit("max(u, 0)", "max(u, 0)", "max(u, v)"),)
X = torch.linspace(-3, 3, 13)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("max(x, 0)", torch.relu),
        ("x * sigmoid(x)", torch.nn.functional.silu),
        ("cos(x) - x", lambda x: x.cos() - x),
        ("-x**2 + 3", lambda x: 3 - x * x),
        ("sinc(x) + x", lambda x: torch.where(x == 0, torch.ones_like(x), x.sin() / x) + x),
        ("x / (x - x)", lambda x: x / 0.001),
        ("atan(x)**2 - x", lambda x: x.atan() ** 2 - x),
    ],
)
def test_formulas_compute_what_they_say(text: str, reference) -> None:  # type: ignore[no-untyped-def]
    torch.testing.assert_close(Formula(text)(X), reference(X))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "x.__class__", "(lambda: x)()", "x if x else x", "[x for x in x]", "x**100",
        "x ** x", "eval(x)", "x and x", "'a'", "x := 3", "x[0]", "", "sin(x, x)", "sin(x=x)", "True * x", "x; x", "sin",
        "sinn(x)", "1 + 2", "x + training", "(" * 500 + "x", "x+" * 900 + "x", "x\x00",
    ],
)  # fmt: skip
def test_nothing_else_is_a_formula(text: str) -> None:
    with pytest.raises(ValueError, match="formula"):
        Formula(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_formula_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):  # nothing else may come out of it
        compile_formula(text)


def test_formulas_are_activations_like_any_other() -> None:
    module = activations.create("formula", expression="b0 * x + max(x, sin(b1 * x))")
    assert [name for name, _ in module.named_parameters()] == ["b0", "b1"]
    model = models.create("cnn", 10, 1, 8, "formula", activation_params={"expression": "max(x, tanh(x))"})
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert activations.dead_range(Formula("max(x, 0)")) == (-math.inf, 0.0)
    assert activations.dead_range(Formula("x")) is None
    assert activations.dead_range(Formula("cos(x) - x")) is None


def test_the_grammar_has_6250_core_units_and_rejects_the_useless_ones() -> None:
    everything = list(core_units())
    assert len(set(everything)) == 6250
    found = sieve(everything)
    assert len(found.valid) + sum(found.rejected.values()) == 6250
    constant = [(unit("b", "b", "u * v"),), (unit("u", "u", "u - v"),)]
    assert sieve(constant).rejected["constant"] == 2
    overflow = (unit("exp(u)", "exp(u)", "u + v"), unit("exp(u)", "exp(u)", "u * v"))
    assert sieve([overflow]).rejected["not finite"] == 1
    swapped = [(unit("u", "sin(u)", "u + v"),), (unit("sin(u)", "u", "u + v"),)]
    assert sieve(swapped).rejected["duplicate"] == 1


def test_stacked_candidates_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Controller(2).sample(40).tolist()
    chosen: list[Candidate] = [to_candidate(row) for row in tokens]
    b = torch.rand(len(chosen), 6, generator=generator) + 0.5
    x = X.expand(len(chosen), -1)
    together = Grouped(chosen)(x, b)
    for i, candidate in enumerate(chosen):
        function, names = compile_formula(to_formula(candidate))
        sites = [
            3 * j + k
            for j, u in enumerate(candidate)
            for k, text in enumerate((UNARY[u.first], UNARY[u.second], BINARY[u.binary]))
            if "b" in text.replace("abs", "").replace("sub", "")
        ]
        numbers = {f"b{n}": b[i, site] for n, site in enumerate(sites)}
        assert set(names) <= {"x", *numbers}
        alone = torch.as_tensor(function({"x": X, **numbers})).expand_as(X)
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_children_do_not_disturb_each_other() -> None:
    data = images.load("digits")
    flat = (data.train[0].flatten(1), data.train[1]), (data.val[0].flatten(1), data.val[1])
    bad = (unit("u**3", "exp(u)", "u / v"),)
    child = Child((16,), steps=40)
    alone = train([RELU], [0], child, *flat, 10)
    among = train([bad, RELU, bad], [0, 0, 0], child, *flat, 10)
    assert alone[0] is not None
    assert alone[0] > 60
    assert among[1] == pytest.approx(alone[0], abs=1.0)


def test_the_controller_beats_random_search_on_a_synthetic_reward() -> None:
    """The reward is the share of tokens that are right: equal budgets, three targets."""
    for seed in range(3):
        controller = Controller(2, seed)
        generator = torch.Generator().manual_seed(100 + seed)
        target = torch.tensor([int(torch.randint(0, n, (1,), generator=generator)) for n in controller.choices])
        best = 0.0
        for _ in range(40):
            tokens = controller.sample(32)
            reward = (tokens == target).float().mean(1)
            controller.update(tokens, reward.tolist())
            best = max(best, float(reward.max()))
        draws = [torch.randint(0, n, (40 * 32,), generator=generator) for n in controller.choices]
        by_chance = (torch.stack(draws, 1) == target).float().mean(1)
        assert best > float(by_chance.max())
        assert float(reward.mean()) > 2 * float(by_chance.mean())


def test_a_search_finds_a_usable_winner(tmp_path) -> None:  # type: ignore[no-untyped-def]
    child, large = Child((16,), 40), Child((24, 24), 60)
    small = {"candidates": 40, "child": child, "rounds": 2, "writes": 6, "keep": 4, "seeds": 2}
    outcome = studies.run("activation-search", out=tmp_path, **small, finalists=2, large=large, final_seeds=3)
    data = outcome.data
    assert data["looked_at"] == {"core units": 40, "chains": 12}
    assert data["trained"] + sum(v for k, v in data["rejected"].items() if k != "training not finite") <= 52
    module = activations.create("formula", expression=data["winner"])
    assert bool(torch.isfinite(module(X)).all())
    assert {"ReLU", "Swish", data["winner"]} <= set(data["match"])
    again = studies.run("activation-search", out=tmp_path, **small, finalists=2, large=large, final_seeds=3)
    assert again.data == data
