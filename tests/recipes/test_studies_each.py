"""Each study, at a size that takes seconds: what must come out at any size does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import recipes.studies.calculus as calculus
from ap import activations
from recipes import studies
from recipes.studies import conv_filter, images, intervals, quadrature, relu_classifier, reproducibility
from recipes.studies.dnr import ARMS, mlp
from recipes.studies.init import variances
from recipes.studies.lockstep import Plan, prune, values
from recipes.studies.xor import success


def test_xor_one_prelu_always_succeeds_and_a_bias_spoils_it() -> None:
    rates = (0.01, 0.1, 1.0)
    assert bool(success("PReLU", rates, 100, 300, seed=0).all())
    assert 0.35 < float(success("PReLU with bias", rates, 100, 300, seed=0).double().mean()) < 0.75
    assert float(success("ReLU", rates, 100, 300, seed=0).double().mean()) == 0
    assert float(success("PReLU", (0.01, 0.1), 100, 300, seed=0, zero_one=True).double().mean()) < 0.75


def test_conv_filter_steps_fall_with_closeness_and_zero_is_stationary() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    starts = 0.1 * nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    medians = []
    for closeness in (0.0, 0.5, 1.0):
        z = conv_filter.close_patches(conv_filter.INPUTS["Gaussian"], closeness, 800, 8, 8, generator)
        torch.testing.assert_close(z.norm(dim=2), torch.full((800, 8), math.sqrt(8)))
        medians.append(conv_filter._median(conv_filter.descend(z, teacher, starts, lambda step: 0.5)))
    assert medians[0] > 1.5 * medians[1] > 2 * medians[2]
    assert conv_filter.descend(z, teacher, torch.zeros(1, 8), lambda step: 0.5, limit=50) == [None]
    assert conv_filter._median([3, None, 1]) == 3
    assert conv_filter._median([None, None, 1]) == math.inf


def test_init_the_signal_halves_at_every_relu_without_its_gain() -> None:
    name = "relu"
    plain = variances(name, 30, 256, 8, 1.0, seed=0)
    assert -math.log2(plain[-1] / plain[0]) == pytest.approx(30, abs=2)
    kept = variances(name, 30, 256, 8, math.sqrt(2), seed=0)
    assert 0.5 < kept[-1] / kept[0] < 2
    assert quadrature.gain(activations.create("gelu")) == pytest.approx(1.53353, abs=1e-5)
    assert quadrature.gain(activations.create("silu")) == pytest.approx(1.67653, abs=1e-5)
    assert quadrature.exponent(nn.ReLU()) == pytest.approx(1, abs=1e-6)
    assert quadrature.exponent(nn.GELU()) > 1.1 > 1 > quadrature.exponent(nn.Tanh())


def test_calculus_knows_gelus_constants() -> None:
    found = calculus.analyse(calculus.FUNCTIONS["gelu"])
    assert found.minimum.value == pytest.approx(-0.169971, abs=1e-6)
    assert found.stationary == pytest.approx((-0.751792,), abs=1e-6)
    assert found.inflection == pytest.approx((-math.sqrt(2), math.sqrt(2)), abs=1e-9)
    assert (found.slope_low.value, found.slope_high.value) == pytest.approx((-0.128904, 1.128904), abs=1e-6)
    # The true bounds, at x = ±√2, lie within the stated error.
    at = math.sqrt(2)
    truth = 0.5 * math.erfc(-at / math.sqrt(2)) + at * math.exp(-at * at / 2) / math.sqrt(2 * math.pi)
    assert 0 <= truth - found.lipschitz <= found.slope_high.error
    assert calculus.analyse(calculus.FUNCTIONS["relu"]).curvature is None
    assert calculus.analyse(calculus.FUNCTIONS["smelu"]).curvature.value == pytest.approx(1)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [n for n in calculus.FUNCTIONS if n in activations.names()])
def test_calculus_and_the_activations_are_the_same_functions(name: str) -> None:
    function = calculus.FUNCTIONS[name]
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64) + 1e-4
    edges = [-math.inf, *function.breaks, math.inf]
    y = torch.zeros_like(x)
    for low, high, formula in zip(edges[:-1], edges[1:], function.formulas, strict=True):
        inside = (x >= low) & (x < high)
        y[inside] = formula(x[inside])
    torch.testing.assert_close(activations.create(name).double()(x), y, rtol=1e-9, atol=1e-9)


def test_relu_classifier_losses_by_hand() -> None:
    o, y = torch.tensor([[3.0, 1.0, -2.0], [-1.0, 2.0, 0.0]]), torch.tensor([0, 0])
    assert relu_classifier.normalised(o, y).tolist() == pytest.approx([-math.log(3 / 4), -math.log(1e-7)], rel=1e-4)
    assert relu_classifier.literal(o / 4, y)[0].item() == pytest.approx(-math.log(3 / 4))
    relu_softmax = -math.log(math.exp(3) / (math.exp(3) + math.exp(1) + 1))
    assert relu_classifier.softmax_of_relu(o, y)[0].item() == pytest.approx(relu_softmax, rel=1e-5)
    dead = o.clone().requires_grad_()
    relu_classifier.normalised(dead, y)[1].backward()
    assert dead.grad is not None
    assert bool((dead.grad == 0).all())  # a dead true-class score teaches nothing


def test_prediction_differences_by_hand() -> None:
    p = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]])
    absolute, relative, disagreement = reproducibility.differences(p, torch.tensor([0, 1]))
    assert absolute.tolist() == pytest.approx([0.2, 0.0], abs=1e-6)  # (0.3 + 0.3 + 0) / 3
    assert relative.tolist() == pytest.approx([0.2 / 0.6, 0.0], abs=1e-6)
    assert disagreement.tolist() == pytest.approx([2 / 3, 0.0])  # 2 of 3 pairs


def test_lockstep_arms_have_equal_density_and_share_the_dense_network() -> None:
    data = images.load("digits", 400)
    seeds, plan = [0, 1], Plan(steps=40, cycles=2, amount=0.5, share=0.1)
    rows = prune(mlp(data, (20, 10), norm=False), ARMS[:3], seeds, data, plan)
    assert len(rows) == 3 * 2 * 3
    for cycle, density in ((0, 1.0), (1, 0.5), (2, 0.25)):
        found = {d for arm in ARMS[:3] for d in values(rows, "density", arm=arm.name, cycle=cycle)}
        assert len(found) == 1
        assert found.pop() == pytest.approx(density, abs=2e-3)
    dense = [values(rows, "accuracy", arm=arm.name, cycle=0) for arm in ARMS[:3]]
    assert dense[0] == dense[1] == dense[2]
    none, ap = (values(rows, "total", arm=a, cycle=1) for a in ("none", "AP"))
    assert none != ap
    assert all(0 <= row["static"] <= row["total"] <= 1 for row in rows)


SMALL = {
    "relu-classifier": {"steps": 20, "seeds": 2},
    "reproducibility": {"tasks": ("noise",), "steps": 20, "train": 200},
    "swish-depth": {"depths": (2, 4), "seeds": 2, "steps": 20},
    "helu": {"seeds": 2, "steps": 20, "rounds": 3, "cycles": 1},
    "activations": {"names": ("relu", "sigmoid"), "steps": 2},
    "init": {"names": ("relu", "tanh"), "depth": 4, "width": 64, "steps": 10, "seeds": 2},
    "dnr": {"seeds": 2, "steps": 20, "cycles": 1},
    "conv-filter": {"starts": 2, "inputs": 100, "limit": 50},
    "gelu": {"step": 1e-2},
    "xor": {"trials": 5, "epochs": 5},
}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_study_runs_from_its_options_to_its_page(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    outcome = studies.run(name, quick=True, out=tmp_path, **SMALL[name])  # type: ignore[arg-type]
    assert outcome.verdicts
    assert outcome.tables
    assert all(len(row) == len(table.columns) for table in outcome.tables for row in table.rows)
    assert outcome.verdicts[0].claim in (tmp_path / "page.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_verdicts_turn_with_the_numbers() -> None:
    """The same study says the opposite when its numbers are turned round."""
    outcome = studies.run("xor", trials=30, epochs=300)
    turned = {**outcome.data, "successes": {**outcome.data["successes"]}}
    turned["successes"]["PReLU"], turned["successes"]["ReLU"] = [0] * 7, [30] * 7
    kind = type(studies.create("xor"))
    assert kind.verdicts(turned)[0].outcome != kind.verdicts(outcome.data)[0].outcome


def test_helu_really_trains_with_its_own_gradient_in_a_stack() -> None:
    outcome = studies.run("helu", quick=True, alphas=(0.0, 1.0), seeds=2, steps=30, rounds=3, cycles=1)
    rows = outcome.data["rows"]
    relu, zero, one = (
        [row["total"] for row in rows[kind] if row["cycle"] == 0] for kind in ("relu", "helu 0", "helu 1")
    )
    assert relu == zero  # α = 0 is ReLU
    assert relu != one


def test_bootstrap_of_groups_and_samples() -> None:
    low, high = intervals.bootstrap((4, 50), lambda g, n: float(g.mean() + n.mean()), draws=200)
    assert low < 1.5 + 24.5 < high
