"""Step 8: 95 % intervals over groups."""

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit

LEAST = np.finfo(float).eps  # probabilities are clipped here, as in scikit-learn's log_loss


@dataclass(frozen=True)
class Basis:
    """What a score rests on: the effective numbers of images and of groups, and the number of groups."""

    effective_images: float
    effective_groups: float
    groups: int


def basis_of(weights: np.ndarray, group: np.ndarray) -> Basis:
    """Return the basis of a score in which images count with `weights` (n,); `group` is int (n,).

    The effective number is that of Kish (1965): a group with half of all weight leaves fewer than four.
    """
    whole = np.bincount(group, weights)
    images, groups = (part.sum() ** 2 / (part**2).sum() for part in (weights, whole))
    return Basis(float(images), float(groups), int(np.count_nonzero(whole)))


def interval(
    value: float, parts: np.ndarray, basis: Basis, ends: tuple[float, float] = (0.0, 1.0)
) -> dict[str, float]:
    """Return {"value", "low", "high"} of a score that lies between `ends`: the value and its 95 % interval.

    `parts` (groups,) is what each group adds to the error of the score: its derivative by the group's weight.
    Their squares give the variance, and so the number of independent images that would tell as much, fewer
    where groups are few (Korn and Graubard 1998). The interval is that of Clopper and Pearson for as many.
    Few groups may show too little variance. So the low end is at most that of a perfect score with one
    observation per group, and the high end at least that of the worst. One group says nothing of others: the
    interval is then all that is possible.
    """
    lowest, highest = ends
    share = min(max((value - lowest) / (highest - lowest), 0.0), 1.0)
    low, high = 0.0, 1.0
    if basis.groups > 1:
        unseen = 1 - 0.025 ** (1 / basis.effective_groups)
        low, high = min(share, 1 - unseen), max(share, unseen)
    if basis.groups > 1 and 1e-9 < share < 1 - 1e-9:  # rounding: sqrt(x) * sqrt(x) is not x
        variance = basis.groups / (basis.groups - 1) * (parts**2).sum() / (highest - lowest) ** 2
        n = share * (1 - share) / max(variance, share * (1 - share) / basis.effective_images)
        alone = stdtrit(max(basis.effective_images - 1, 1), 0.975)  # of as many images, were all independent
        n *= (alone / stdtrit(max(min(basis.effective_groups, basis.groups) - 1, 1), 0.975)) ** 2
        low = min(low, betaincinv(n * share, n * (1 - share) + 1, 0.025))
        high = max(high, betaincinv(n * share + 1, n * (1 - share), 0.975))
    low, high = (float(lowest + (highest - lowest) * end) for end in (low, high))
    return {"value": float(value), "low": min(low, float(value)), "high": max(high, float(value))}


def mean_parts(values: np.ndarray, group: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean of `values` (n,), and what each group adds to its error, float64 (groups,)."""
    mean = values.mean()
    return float(mean), np.bincount(group, values - mean) / len(values)


def share_interval(right: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return the share of `right`, bool (n,), and its interval over `groups` (n,), see `interval`."""
    group = np.unique(groups, return_inverse=True)[1]
    return interval(*mean_parts(right, group), basis_of(np.ones(len(right)), group))


def macro_weights(labels: np.ndarray) -> np.ndarray:
    """Return the weight (n,) of each image in a macro score, in which all classes count the same."""
    return 1 / np.bincount(labels)[labels]
