"""Numbers that make no activation are refused by name; limits that make one are taken."""

import math
from collections.abc import Callable

import pytest
import torch

from ap import activations
from ap.activations import RESCU, SmeLU, Swish, functional


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmeLU(math.inf), "beta must be 0 or more and finite"),
        (lambda: functional.gsmelu(torch.zeros(1), math.nan), "alpha must be 0 or more"),
        (lambda: Swish(math.nan), "beta must be finite"),
        (lambda: functional.swish(torch.zeros(1), math.nan), "beta must be a number"),
        (lambda: RESCU(t=math.inf), "t must be finite"),
        (lambda: Swish(learnable=True, num_parameters=0), "num_parameters must be 1"),
        (lambda: SmeLU(learnable=True, num_parameters=-3), "num_parameters must be 1"),
        (lambda: RESCU(cdf=lambda t: 1 - t, integral=lambda t: t - t * t / 2), "cdf must go from 0 at 0"),
        (lambda: RESCU(cdf=lambda t: t, integral=lambda t: t), "integral is not that of cdf"),
        (lambda: RESCU(cdf=lambda t: t), "together"),
    ],
)
def test_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_swish_with_an_infinite_beta_is_a_rectifier() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert functional.swish(x, math.inf).tolist() == [0.0, 0.0, 3.0]
    assert functional.swish(x, -math.inf).tolist() == [-2.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["gsmelu", "rescu"])
def test_dead_range_of_learnable_parameters_heeds_eps(name: str) -> None:
    fixed = activations.dead_range(activations.create(name), 0.05)
    learned = activations.dead_range(activations.create(name, learnable=True), 0.05)
    channels = activations.dead_range(activations.create(name, learnable=True, num_parameters=2), 0.05)
    assert fixed.high > -0.5  # a little further right than where the value is exactly 0
    assert learned.high == pytest.approx(fixed.high, abs=1e-6)
    assert channels.high.tolist() == pytest.approx([fixed.high] * 2, abs=1e-6)
