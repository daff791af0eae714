"""Step 11: by how much two models differ on the same images, with 95 % intervals over groups."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

from .intervals import LEAST
from .counts import count, scores_of

# ECE is not compared: what chance adds to it differs between models. Log loss covers calibration.
COMPARED = ["accuracy", "macro_f1", "mcc", "macro_recall", "macro_precision", "macro_auroc", "log_loss"]
MOST = {"mcc": 2.0, "log_loss": -np.log(LEAST)}  # by which two models can differ; others: 1


@dataclass
class Answers:
    """What one model says of images: a predicted class, int (n,), and probabilities, float64 (n, classes)."""

    guesses: np.ndarray
    probabilities: np.ndarray


@dataclass
class Images:
    """Images to compare models on: class and group of each, int (n,), from 0; the number of classes."""

    labels: np.ndarray
    group: np.ndarray
    classes: int

    @property
    def groups(self) -> int:
        return self.group.max() + 1

    def groups_of_classes(self) -> np.ndarray:
        """Return in how many groups each class that has images occurs, int (classes with images,)."""
        pairs = np.unique(np.column_stack([self.labels, self.group]), axis=0)
        return np.unique(pairs[:, 0], return_counts=True)[1]


def leave_out(values: np.ndarray) -> np.ndarray:
    """Return the sum of `values` (groups, ...) over groups, then the sums without each (1 + groups, ...)."""
    return np.concatenate([values.sum(0)[None], values.sum(0) - values])


def macro_auroc(images: Images, probabilities: np.ndarray) -> np.ndarray:
    """Return the macro AUROC of all images, then without each group: float64 (1 + groups,).

    A class against the rest: the share of pairs, one image of each, that are ranked rightly. Ranks say
    how many pairs an image is part of, among all images and within its group (DeLong et al. 1988, for groups
    Obuchowski 1997): nothing is sorted again for each group. nan where there are no pairs.
    """
    own = images.labels[:, None] == np.arange(images.classes)
    table = pd.DataFrame(probabilities)

    def below(by: np.ndarray) -> np.ndarray:
        """Return how many images of the other side rank below each, among those alike in `by`."""
        parts = [table.where(side).groupby(by).rank() for side in (own, ~own)]
        return (table.groupby(by).rank() - parts[0].fillna(parts[1])).to_numpy()

    def by_group(values: np.ndarray) -> np.ndarray:
        return pd.DataFrame(values).groupby(images.group).sum().to_numpy(float)

    everywhere, inside = below(np.zeros(len(own))), below(images.group)
    won = np.where(own, everywhere, own.sum(0) - everywhere)  # pairs, as one of the class or of the rest
    every = np.where(own, everywhere, 0).sum(0)
    left = every - by_group(won - np.where(own, inside, 0))  # pairs within the group were subtracted twice
    left, pairs = np.vstack([every, left]), leave_out(by_group(own)) * leave_out(by_group(~own))
    shares = np.divide(left, pairs, out=np.full_like(left, np.nan), where=pairs > 0)
    has_pairs = (pairs > 0).sum(1)
    return np.divide(np.nansum(shares, 1), has_pairs, out=np.full(len(left), np.nan), where=has_pairs > 0)


def score_without(images: Images, answers: Answers) -> pd.DataFrame:
    """Return COMPARED: a row of all images, then one without each group (1 + groups rows)."""
    counts = count(images.labels, answers.guesses, images.group, images.classes)
    with np.errstate(invalid="ignore"):  # without the only group there is nothing
        table = scores_of(*map(leave_out, counts))
    rows = np.arange(len(images.labels))
    losses = -np.log(answers.probabilities[rows, images.labels].clip(LEAST))
    sizes = leave_out(np.bincount(images.group)).clip(1)
    table["log_loss"] = leave_out(np.bincount(images.group, losses)) / sizes
    table["macro_auroc"] = macro_auroc(images, answers.probabilities)
    return table[COMPARED]


def jackknife(values: np.ndarray, unseen: float, most: float) -> dict[str, float]:
    """Return {"value", "low", "high"} of a difference, 95 %, from `values`: its own, then without each group.

    The delete-one-group jackknife with Student's t (Bell and McCaffrey 2002; CV3 of MacKinnon, Nielsen and
    Webb 2023). Models that differ in few groups, or none, may still differ elsewhere: so one more group is
    counted (Agresti and Min 2005 add an image). Its effect is the mean of those seen and of `unseen`, that of
    a group in which only one model is right. Without `unseen`, t has as many degrees of freedom as groups
    carry the variance. One group says nothing of others: the interval is then from -most to most.
    """
    value, groups = values[0], len(values) - 1
    if groups == 1 or np.isnan(values).any():
        return {"value": float(value), "low": -most, "high": most}
    squares = (values[1:] - value) ** 2 * (groups - 1) / groups
    carriers = squares.sum() ** 2 / max((squares**2).sum(), LEAST**4)  # 1: all of it is one group's
    more = (squares.sum() + unseen**2) / (carriers + 1)
    freedom = groups - 1 if unseen else np.clip(carriers, 1, groups - 1)
    reach = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum() + more)
    ends = np.clip([value - reach, value + reach], -most, most)
    return {"value": float(value), "low": float(ends[0]), "high": float(ends[1])}


def compare_scores(images: Images, first: pd.DataFrame, other: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return {metric: {"value", "low", "high"}} of other - first, of COMPARED; less log loss is better.

    `first` and `other` are what `score_without` returned. A macro score rests on the groups of each
    class: one with few of them widens `unseen`.
    """
    differences, each = other - first, images.groups_of_classes()
    unseen = dict.fromkeys(COMPARED, np.sqrt((1 / each**2).mean()) / len(each))
    unseen |= {"accuracy": 1 / images.groups, "log_loss": 0.0}
    unseen["mcc"] *= len(each) / max(len(each) - 1, 1)
    defined = differences.columns[differences.iloc[0].notna()]  # one class alone has no AUROC
    return {
        name: jackknife(differences[name].to_numpy(), unseen[name], MOST.get(name, 1.0)) for name in defined
    }


def compare_recalls(images: Images, first: Answers, other: Answers) -> dict[int, dict]:
    """Return {class: {"value", "low", "high", "n", "groups"}} of the difference in recall."""
    gains = right(images, other) - right(images, first)
    result = {}
    for label in np.unique(images.labels):
        rows = images.labels == label
        group = np.unique(images.group[rows], return_inverse=True)[1]
        gain, n = np.bincount(group, gains[rows]), np.bincount(group)
        values = leave_out(gain) / leave_out(n).clip(1)
        result[int(label)] = jackknife(values, 1 / len(n), 1.0) | {"n": int(n.sum()), "groups": len(n)}
    return result


def right(images: Images, answers: Answers) -> np.ndarray:
    """Return whether each image is classified correctly, int (n,)."""
    return (answers.guesses == images.labels).astype(int)


def mcnemar(images: Images, first: Answers, other: Answers) -> dict[str, float]:
    """Return how many images only one model gets right, and p of McNemar's exact test, each by itself."""
    gains = right(images, other) - right(images, first)
    worse, better = int((gains < 0).sum()), int((gains > 0).sum())
    p = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {"only_first_right": worse, "only_other_right": better, "p": float(p)}


def swap_test(images: Images, first: Answers, other: Answers) -> float:
    """Return p for equal accuracy: the models may be swapped in any group, not in any image. Exact.

    Under that hypothesis what a group gains has either sign, with even chances; the sum of all groups has the
    distribution computed here. Where every group is one image, this is McNemar's test.
    """
    gains = right(images, other) - right(images, first)
    steps = np.abs(np.bincount(images.group, gains)).astype(int)
    chances, total = np.ones(1), steps.sum()
    for step in steps[steps > 0]:
        chances = (np.append(chances, np.zeros(2 * step)) + np.append(np.zeros(2 * step), chances)) / 2
    sums = np.arange(-total, total + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(gains.sum())].sum()))
