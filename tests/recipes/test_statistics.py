import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recipes.statistics import detectable, holm, mean_of, paired


def test_importing_it_does_not_take_the_second_that_scipy_stats_does():
    code = "import sys, recipes.statistics; print('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_mean_and_interval_by_hand():
    # 2, 4, 6: mean 4, deviation 2, t(0.975, 2) = 4.302653
    found = mean_of([2, 4, 6])
    assert found.mean == 4
    assert found.half_width == pytest.approx(4.302652729911275 * 2 / math.sqrt(3))
    assert mean_of([5.0]).half_width is None


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=3, max_size=12).filter(
        lambda pairs: np.std([a - b for a, b in pairs]) > 1e-3
    )
)
def test_paired_against_scipy(pairs):
    arm, base = zip(*pairs, strict=True)
    found = paired(arm, base, margin=0.3)
    expected = stats.ttest_rel(arm, base)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.difference - found.half_width == pytest.approx(interval.low, abs=1e-9)
    assert found.difference + found.half_width == pytest.approx(interval.high, abs=1e-9)
    # Equivalent at 5 % exactly when the 90 % interval lies within the margin.
    ninety = expected.confidence_interval(0.90)
    assert found.equivalent == (ninety.low > -0.3 and ninety.high < 0.3)


def test_identical_pairs_are_identical():
    found = paired([0.5, 0.6], [0.5, 0.6], margin=0.01)
    assert (found.difference, found.half_width, found.p, found.equivalent) == (0, 0, 1, True)
    shifted = paired([0.75, 0.5], [0.5, 0.25], margin=0.01)
    assert (shifted.difference, shifted.p, shifted.half_width, shifted.equivalent) == (0.25, None, None, None)
    assert paired([1.0], [0.5], margin=0.1).half_width is None


@pytest.mark.parametrize("n", [3, 5, 10])
def test_detectable_difference_by_simulation(n):
    rng = np.random.default_rng(0)
    draws = rng.normal(detectable(n), 1.0, size=(20_000, n))
    seen = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors of the simulation


def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03]) == [0.03, 0.04, 0.04]
    assert holm([0.6, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []
