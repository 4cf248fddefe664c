"""Ranking within rows, against sorting row by row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ap.ranking import lowest_per_row


def by_sorting(scores, eligible, quotas):
    chosen = torch.zeros_like(eligible)
    for row, quota in enumerate(quotas.tolist()):
        order = [column for column in range(scores.shape[1]) if eligible[row, column]]
        order.sort(key=lambda column: (scores[row, column].item(), column))
        chosen[row, order[:quota]] = True
    return chosen


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 8), st.integers(1, 14)),
    values=st.sampled_from([2, 4, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_rows_with_ties_infinities_and_dead_elements(shape, values, dtype, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, shape, generator=generator).to(dtype)
    scores[scores == 0] = -torch.inf
    scores[scores == 1] = torch.inf
    eligible = torch.rand(shape, generator=generator) < share
    scores = torch.where(eligible, scores, torch.nan)  # what may not be chosen is never looked at
    room = eligible.sum(1)
    quotas = (torch.rand(shape[0], generator=generator) * (room + 1)).long().minimum(room)
    assert torch.equal(lowest_per_row(scores, eligible, quotas), by_sorting(scores, eligible, quotas))
