"""Step 8: 95 % intervals over groups."""

import numpy as np
import pandas as pd

LEAST = np.finfo(float).eps  # scikit-learn's log_loss takes no probability for less
DRAWS = 1000


def resample(groups: int) -> np.ndarray:
    """Return how often each group is drawn, float64 (DRAWS, groups): `groups` times, with repetition."""
    draw = np.random.RandomState(0).randint
    drawn = [np.bincount(draw(groups, size=groups), minlength=groups) for _ in range(DRAWS)]
    return np.array(drawn, float)


def intervals(totals, groups: int) -> dict[str, dict[str, float]]:
    """Return {"value", "low", "high"} for each column of totals(times), times (draws, groups).

    `times` says how often each group was drawn. Percentile bootstrap over groups (Field and Welsh 2007),
    1,000 draws. Where its low end is 1, or its high end 0, it has no width: the other end is then the limit
    of Clopper and Pearson for as many groups. One group has no interval: it is all that is possible.
    """
    low, high = totals(resample(groups)).quantile([0.025, 0.975]).to_numpy()
    sure = 0.025 ** (1 / groups)
    low, high = np.where(low == 1, sure, low), np.where(high == 0, 1 - sure, high)
    value = totals(np.ones((1, groups))).iloc[0]
    if groups == 1:  # it says nothing of others
        low = np.where(value.index == "mcc", -1.0, 0.0)
        high = np.where(value.index == "log_loss", -np.log(LEAST), 1.0)
    return pd.DataFrame({"value": value, "low": low, "high": high}).to_dict("index")
