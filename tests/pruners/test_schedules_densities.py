"""Rounds, gradual schedules and densities per layer."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruners
from ap.masks import Masks
from pruners.densities import kept
from pruners.schedules import CURVES, cubic, removed_by


def mlp(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def test_cubic_is_zhu_and_gupta():
    """s_t = s_f + (s_i − s_f)(1 − t / (n Δt))³ with s_i = 0."""
    for t in range(11):
        sparsity = 0.9 - 0.9 * (1 - t / 10) ** 3
        assert cubic(t / 10, 0.1) == pytest.approx(1 - sparsity)


@pytest.mark.parametrize("curve", CURVES)
@given(alive=st.integers(1, 10**6), share=st.floats(0.001, 0.999), steps=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_curves_are_monotone_and_end_exactly(curve, alive, share, steps):
    gone = round(share * alive)
    path = [removed_by(CURVES[curve], step / steps, alive, gone) for step in range(steps + 1)]
    assert path[0] == 0
    assert path[-1] == gone
    assert path == sorted(path)


def test_gradual_within_one_training_run():
    model = mlp(20, 30, 10)
    masks = Masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer)
    gradual = pruners.Gradual(pruners.create("magnitude"), model, masks, amount=0.8, start=5, steps=20, every=4)
    gone, path = 0, []
    for step in range(1, 31):
        optimizer.zero_grad()
        F.mse_loss(model(torch.ones(4, 20)), torch.zeros(4, 10)).backward()
        optimizer.step()
        gone += gradual.step(step)
        path.append(masks.total - masks.alive)
        assert gone == path[-1]
        assert all((masks.weight(n)[~masks[n]] == 0).all() for n in masks)
    expected = {5: 0, 9: 0.8 * (1 - (1 - 4 / 20) ** 3), 17: 0.8 * (1 - (1 - 12 / 20) ** 3), 25: 0.8, 30: 0.8}
    for step, share in expected.items():
        assert path[step - 1] == round(share * masks.total)
    assert path[9] == path[8]  # only every fourth step


def test_gradual_goes_on_after_a_restart():
    def steps(gradual, which):
        return [gradual.step(step) for step in which]

    model = mlp(10, 20, 10)
    masks = Masks(model)
    whole = steps(pruners.Gradual(pruners.create("magnitude"), model, masks, amount=0.5, steps=10), range(1, 11))
    model = mlp(10, 20, 10)
    masks = Masks(model)
    first = pruners.Gradual(pruners.create("magnitude"), model, masks, amount=0.5, steps=10)
    begun = steps(first, range(1, 5))
    second = pruners.Gradual(pruners.create("magnitude"), model, masks, amount=0.1, steps=10)
    second.load_state_dict(first.state_dict())
    assert begun + steps(second, range(5, 11)) == whole


def test_gradual_refuses_what_makes_no_sense():
    model = mlp(4, 4)
    masks = Masks(model)
    with pytest.raises(ValueError, match="unknown curve 'cubik'; close: cubic"):
        pruners.Gradual("magnitude", model, masks, amount=0.5, steps=4, curve="cubik")
    with pytest.raises(ValueError, match="at least 1"):
        pruners.Gradual("magnitude", model, masks, amount=0.5, steps=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        pruners.Gradual("magnitude", model, masks, amount=1.0, steps=4)


def test_rounds_are_new_scores_at_exponential_densities():
    densities = []

    def watch(model, masks):
        densities.append(masks.density)
        return {name: masks.weight(name).detach().abs() for name in masks}

    model = mlp(100, 100)
    masks = Masks(model)
    assert pruners.create(watch, rounds=4).prune(model, masks, amount=0.9) == 9000
    assert densities == pytest.approx([0.1 ** (k / 4) for k in range(4)], abs=1e-4)


def test_uniform_density_after_uneven_pruning():
    model = mlp(10, 100, 10)
    masks = Masks(model)
    masks.prune({"0.weight": torch.zeros(100, 10), "1.weight": torch.ones(10, 100)}, count=300)
    pruners.create("magnitude", density="uniform").prune(model, masks, amount=0.5)
    assert masks.layer_alive() == {"0.weight": 425, "1.weight": 425}


def test_erk_by_hand():
    """Raw densities (20 + 10) / 200 and (20 + 100) / 2000 and their common factor."""
    model = mlp(10, 20, 100)
    masks = Masks(model)
    pruners.create("random", density="erk").prune(model, masks, amount=0.9)
    keep = masks.total - round(0.9 * masks.total)
    scale = keep / (30 + 120)
    assert masks.layer_alive() == {"0.weight": round(30 * scale), "1.weight": round(120 * scale)}


def test_erk_fills_small_layers_first_and_the_magnitudes_within_a_layer_decide():
    model = mlp(2, 2, 200, 200)
    masks = Masks(model)
    before = {name: masks.weight(name).detach().abs().clone() for name in masks}
    pruners.create("magnitude", density="erk").prune(model, masks, amount=0.5)
    assert masks.layer_density()["0.weight"] == 1.0
    for name in masks:
        if not masks[name].all():
            assert before[name][masks[name]].min() >= before[name][~masks[name]].max()


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    density=st.sampled_from(["uniform", "erk"]),
    share=st.floats(0.0, 1.0),
    floor=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_kept_is_exact_within_limits_and_respects_the_floor(sizes, density, share, floor, seed):
    masks = Masks(mlp(*sizes), floor=floor)
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a small layer may be emptied here
        masks.remove({name: torch.rand(masks[name].shape, generator=generator) < 0.3 for name in masks})
    alive = masks.layer_alive()
    floors = {name: min(floor, n) for name, n in alive.items()}
    keep = max(round(share * masks.alive), sum(floors.values()))
    result = kept(masks, density, keep)
    assert sum(result.values()) == keep
    assert all(floors[name] <= result[name] <= alive[name] for name in alive)
