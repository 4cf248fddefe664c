"""The ranking against a sort of everything, which is slow and obviously right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap import ranking
from ap.ranking import apportion, lowest, lowest_per_row


def by_sorting(scores, eligible, k):
    """The k lowest by a stable sort of all eligible scores put end to end in row-major order."""
    values = np.concatenate([scores[n].double().contiguous().numpy().ravel() for n in eligible])
    allowed = np.concatenate([eligible[n].contiguous().numpy().ravel() for n in eligible])
    positions = np.flatnonzero(allowed)
    chosen = np.zeros(len(values), dtype=bool)
    chosen[positions[np.argsort(values[positions], kind="stable")[:k]]] = True
    return chosen


def flat(selection):
    return np.concatenate([s.contiguous().numpy().ravel() for s in selection.values()])


@st.composite
def layers(draw):
    """A few layers of odd shapes, strides and dtypes, with many ties, infinities and ineligible elements."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "constant", "infinite", "tiny range"]))
    scores, eligible = {}, {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        value = torch.randn(shape, generator=generator)
        if kind == "ties":
            value = value.round()
        elif kind == "constant":
            value = torch.zeros(shape)
        elif kind == "infinite":
            value = torch.where(value > 0.5, math.inf, torch.where(value < -1, -math.inf, value))
        elif kind == "tiny range":
            value = 1 + value * 1e-7
        value = value.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
        if len(shape) == 4:
            value = value.to(memory_format=torch.channels_last)
        elif len(shape) == 2:
            value = value.t()
        scores[f"layer{i}"] = value
        eligible[f"layer{i}"] = torch.rand(value.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    size = sum(int(e.sum()) for e in eligible.values())
    return scores, eligible, draw(st.integers(0, size))


@given(layers(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_selects_what_a_stable_sort_selects(case, small):
    scores, eligible, k = case
    sizes = (ranking.CHUNK, ranking.SAMPLE, ranking.COLLECT)
    if small:  # many chunks, poor guesses, no room to collect: every branch of the search
        ranking.CHUNK, ranking.SAMPLE, ranking.COLLECT = 5, 3, 4
    try:
        chosen = lowest(scores, eligible, k)
    finally:
        ranking.CHUNK, ranking.SAMPLE, ranking.COLLECT = sizes
    assert list(chosen) == list(eligible)
    np.testing.assert_array_equal(flat(chosen), by_sorting(scores, eligible, k))


@given(layers())
@settings(max_examples=100, deadline=None)
def test_reused_masks_become_the_same_selection(case):
    scores, eligible, k = case
    before = {name: mask.clone() for name, mask in eligible.items()}
    expected = lowest(scores, eligible, k)
    assert all(torch.equal(eligible[name], before[name]) for name in eligible)  # untouched unless they may be reused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK", 5)  # many chunks, each read before it is written
        reused = lowest(scores, eligible, k, reuse=True)
    assert list(reused) == list(eligible)
    assert (flat(reused) == flat(expected)).all()
    for name, mask in eligible.items():
        if mask.is_contiguous():
            assert reused[name].data_ptr() == mask.data_ptr()


def test_large_layers_with_few_distinct_values():
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.randint(0, 3, (1200, 1100), generator=generator).float() for n in "ab"}
    eligible = {n: torch.rand(1200, 1100, generator=generator) < 0.9 for n in "ab"}
    k = 1_000_000
    np.testing.assert_array_equal(flat(lowest(scores, eligible, k)), by_sorting(scores, eligible, k))


def test_sorted_input_does_not_mislead_the_sample():
    scores = {"a": torch.arange(3_000_000.0).view(1000, 3000), "b": -torch.arange(2_000_000.0)}
    eligible = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    chosen = lowest(scores, eligible, 2_000_123)
    assert bool(chosen["b"].all())
    assert int(chosen["a"].sum()) == 123
    assert bool(chosen["a"].view(-1)[:123].all())


def test_ties_go_by_position_across_layers():
    ones = {n: torch.ones(2, 2) for n in "abc"}
    everything = {n: torch.ones(2, 2, dtype=torch.bool) for n in "abc"}
    chosen = lowest(ones, everything, 6)
    assert [s.view(-1).tolist() for s in chosen.values()] == [[True] * 4, [True, True, False, False], [False] * 4]


@pytest.mark.parametrize("size", [3, 2_500_000])
def test_nan_names_the_layer(size):
    scores = {"fine": torch.ones(size), "conv2.weight": torch.ones(size)}
    scores["conv2.weight"][size // 2] = math.nan
    eligible = {n: torch.ones(size, dtype=torch.bool) for n in scores}
    with pytest.raises(ValueError, match=r"conv2\.weight: scores contain NaN"):
        lowest(scores, eligible, 2)
    eligible["conv2.weight"][size // 2] = False  # a dead weight's score may be anything
    assert sum(int(s.sum()) for s in lowest(scores, eligible, 2).values()) == 2


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.ones(3), ValueError, "a: scores of shape"),
        (torch.ones(2, dtype=torch.int64), TypeError, "a: scores must be floating point"),
    ],
)
def test_unfit_scores_are_named(scores, error, message):
    with pytest.raises(error, match=message):
        lowest({"a": scores}, {"a": torch.ones(2, dtype=torch.bool)}, 1)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.floats(0, 1))
def test_apportion_is_exact_fair_and_within_reach(sizes, share):
    whole = sum(sizes)
    total = round(share * whole)
    parts = apportion(total, sizes)
    assert parts.sum() == total
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        if whole:
            assert abs(part - total * size / whole) < 1


def test_apportion_by_hand():
    assert apportion(3, [4, 4, 2]).tolist() == [1, 1, 1]  # 1.2, 1.2, 0.6
    assert apportion(1, [1, 1, 1]).tolist() == [1, 0, 0]  # equal remainders: the first
    assert apportion(2**40, [2**40, 2**40]).tolist() == [2**39, 2**39]  # products beyond 64 bits
    with pytest.raises(ValueError, match="cannot split 4 over parts that hold 3"):
        apportion(4, [3])


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31))
@settings(deadline=None)
def test_rows_against_a_sort(rows, columns, seed):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(0, 4, (rows, columns)).astype(np.float32))
    scores[scores == 3] = math.inf
    eligible = torch.from_numpy(rng.random((rows, columns)) < 0.7)
    quotas = torch.tensor([rng.integers(0, int(e.sum()) + 1) for e in eligible])
    chosen = lowest_per_row(scores, eligible, quotas)
    for r in range(rows):
        row = by_sorting({"r": scores[r]}, {"r": eligible[r]}, int(quotas[r]))
        np.testing.assert_array_equal(chosen[r].numpy(), row)
