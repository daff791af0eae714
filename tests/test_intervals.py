"""Step 8: intervals, against formulas that are written out, and what must hold for each of them."""

import numpy as np
import pytest
from scipy.stats import beta, t

from steps.intervals import Basis, basis_of, macro_weights, interval, share_interval


def korn_graubard(right, group):
    """The interval of a share as Korn and Graubard write it, with numbers of scipy.stats."""
    n, share, groups = len(right), right.mean(), len(set(group))
    parts = [(right - share)[group == name].sum() / n for name in sorted(set(group))]
    variance = groups * np.var(parts, ddof=1)
    effective = min(n, share * (1 - share) / variance)
    effective *= (t.ppf(0.975, n - 1) / t.ppf(0.975, groups - 1)) ** 2
    hits = effective * share
    return beta.ppf(0.025, hits, effective - hits + 1), beta.ppf(0.975, hits + 1, effective - hits)


@pytest.mark.parametrize("groups, alike", [(8, 0.0), (8, 1.0), (60, 0.5), (300, 0.0)])
def test_a_share_has_the_interval_of_korn_and_graubard(groups, alike):
    rng = np.random.default_rng(groups)
    group = np.repeat(np.arange(groups), 5)
    right = np.where(
        rng.random(5 * groups) < alike, rng.random(groups)[group] < 0.6, rng.random(5 * groups) < 0.6
    )
    ends = share_interval(right, group)
    assert ends == {"value": right.mean(), "low": pytest.approx(ends["low"]), "high": ends["high"]}
    assert (ends["low"], ends["high"]) == pytest.approx(korn_graubard(right, group))


def test_of_one_image_per_group_it_is_that_of_clopper_and_pearson():
    """But for n - 1 instead of n in the variance."""
    right = np.arange(400) < 330
    ends = share_interval(right, np.arange(400))
    assert (ends["low"], ends["high"]) == pytest.approx(
        (beta.ppf(0.025, 330, 71), beta.ppf(0.975, 331, 70)), abs=1e-4
    )


@pytest.mark.parametrize("groups", [2, 5, 30])
def test_a_perfect_score_counts_groups_and_a_mistake_makes_no_score_more_certain(groups):
    group = np.repeat(np.arange(groups), 20)
    perfect = share_interval(np.full(20 * groups, True), group)
    assert perfect == {"value": 1, "low": pytest.approx(beta.ppf(0.025, groups, 1)), "high": 1}
    nothing = share_interval(np.full(20 * groups, False), group)
    assert nothing == {"value": 0, "low": 0, "high": pytest.approx(beta.ppf(0.975, 1, groups))}
    right = np.arange(20 * groups) > 0
    assert share_interval(right, group)["low"] <= perfect["low"]
    assert share_interval(~right, group)["high"] >= nothing["high"]


def test_every_interval_holds_its_value_and_ends_where_the_score_ends():
    rng = np.random.default_rng(0)
    for _ in range(300):
        ends = sorted(rng.normal(size=2))
        value = rng.choice([*ends, rng.uniform(*ends)])
        parts = rng.normal(scale=10 ** rng.uniform(-9, 3), size=rng.integers(1, 9))
        found = interval(value, parts, basis_of(rng.random(40), rng.integers(0, len(parts), 40)), tuple(ends))
        assert ends[0] - 1e-12 <= found["low"] <= found["value"] == value <= found["high"] <= ends[1] + 1e-12


def test_one_group_leaves_everything_open():
    assert interval(0.7, np.zeros(1), Basis(50.0, 1.0, 1)) == {"value": 0.7, "low": 0, "high": 1}
    assert interval(0.7, np.zeros(1), Basis(50.0, 1.0, 1), (-1.0, 1.0))["low"] == -1


def test_the_basis_counts_large_groups_and_rare_classes():
    """Kish: half of the images in one group leave fewer than four; a macro score counts classes."""
    group = np.append(np.zeros(30, int), np.arange(1, 31))
    basis = basis_of(np.ones(60), group)
    assert (basis.effective_images, basis.groups) == (60, 31)
    assert basis.effective_groups == pytest.approx(60**2 / (30**2 + 30))
    labels = np.repeat([0, 1], [35, 2])
    assert np.bincount(labels, macro_weights(labels)) == pytest.approx([1, 1])
    basis = basis_of(macro_weights(labels), np.arange(37))
    assert basis.effective_images == pytest.approx(4 / (1 / 35 + 1 / 2))
