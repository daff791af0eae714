"""Step 8: the intervals of METRICS, against a jackknife; test_scores.py has their values."""

import numpy as np
import pytest

from steps.counts import count, score_guesses, scores_of
from steps.options import METRICS


@pytest.mark.parametrize("metric", METRICS)
def test_the_interval_is_as_wide_as_a_jackknife_says(metric):
    """Leave out one group after the other (Tukey 1958): with many groups, 2 * 1.96 standard errors."""
    rng = np.random.default_rng(5)
    labels, group = rng.integers(0, 3, 3000), rng.integers(0, 300, 3000)
    wrong = rng.random(3000) < rng.choice([0.05, 0.6], 300)[group]
    guesses = np.where(wrong, rng.integers(0, 3, 3000), labels)
    tables = count(labels, guesses, group, 3)
    without = scores_of(*[table.sum(0) - table for table in tables])[metric]
    ends = score_guesses(labels, guesses, group, 3)[metric]
    width = 2 * 1.96 * np.sqrt(299 * np.var(without))
    assert ends["high"] - ends["low"] == pytest.approx(width, rel=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("guess", [0, 1])
def test_guesses_that_are_all_the_same_give_finite_intervals(guess):
    labels, group = np.arange(40) % 2, np.arange(40) // 4
    ends = score_guesses(labels, np.full(40, guess), group, 2)["mcc"]
    assert ends["value"] == 0 and -1 <= ends["low"] < 0 < ends["high"] <= 1


def test_many_groups_are_looked_at_in_blocks(monkeypatch):
    rng = np.random.default_rng(1)
    labels, guesses, group = rng.integers(0, 4, 90), rng.integers(0, 4, 90), rng.integers(0, 30, 90)
    whole = score_guesses(labels, guesses, group, 4)
    monkeypatch.setattr("steps.counts.BLOCK", 7)
    assert score_guesses(labels, guesses, group, 4) == whole
