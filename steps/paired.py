"""Step 11: by how much two models differ on the same images, with 95 % intervals over groups."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats
from scipy.special import stdtrit

from .counts import count, scores_of, scores_with
from .discrimination import rank
from .intervals import LEAST, mean_parts
from .scores import losses

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


def score_parts(images: Images, answers: Answers) -> tuple[pd.Series, pd.DataFrame]:
    """Return COMPARED, and what each group adds to the error of each (groups, COMPARED).

    To a score of counts: what changes without the group, times (groups - 1) / groups, as in a jackknife. The
    derivative by the group's weight says too little where a class has few groups. It is what a group adds to
    log loss and macro AUROC; one class alone has no AUROC.
    """
    rows = images.labels, answers.probabilities
    tables = count(images.labels, answers.guesses, images.group, images.classes)
    values = scores_of(*[table.sum(0)[None] for table in tables]).iloc[0]
    with np.errstate(invalid="ignore"):  # without the only group there is nothing
        without = scores_with(tables, -1)
    parts = (values - without) * (images.groups - 1) / images.groups
    values["log_loss"], parts["log_loss"] = mean_parts(losses(*rows), images.group)
    if len(np.unique(images.labels)) > 1:
        of_classes = rank(*rows, images.group)["auroc"]
        values["macro_auroc"], parts["macro_auroc"] = (found.mean(0) for found in of_classes)
    defined = [name for name in COMPARED if name in values]
    return values[defined], parts[defined]


def t_interval(
    difference: tuple[float, np.ndarray], unseen: float, most: float, heavy: bool = False
) -> dict[str, float]:
    """Return {"value", "low", "high"}, 95 %, of a `difference`: its value, what each group adds (groups,).

    The squares of what groups add give the variance, cluster-robust, and t has a degree of freedom less than
    there are groups (Cameron and Miller 2015, doi 10.3368/jhr.50.2.317). Models that differ in few groups, or
    none, may still differ elsewhere: so one more group is counted (Agresti and Min 2005 add half an image to
    each cell of a 2 x 2 table). Its square is the mean of those seen and of `unseen`, that of a group in
    which only one model is right. Where few groups can carry nearly all of a score (`heavy`), t has as many
    degrees of freedom as carry the variance. One group says nothing of others: from -most to most.
    """
    value, parts = difference
    groups = len(parts)
    if groups == 1:
        return {"value": float(value), "low": -most, "high": most}
    squares = parts**2 * groups / (groups - 1)
    carriers = squares.sum() ** 2 / max((squares**2).sum(), LEAST**4)  # 1: all of it is one group's
    more = (squares.sum() + unseen**2) / (carriers + 1)
    freedom = np.clip(carriers, 1, groups - 1) if heavy else groups - 1
    reach = stdtrit(freedom, 0.975) * np.sqrt(squares.sum() + more)
    ends = np.clip([value - reach, value + reach], -most, most)
    return {"value": float(value), "low": float(ends[0]), "high": float(ends[1])}


def cost_of_mistakes(answers: Answers) -> float:
    """Return the log loss that a model expects of its mistakes: its second guess is right, not its first."""
    *_, second, best = np.sort(answers.probabilities, axis=1).T
    return float(np.average(-np.log(second.clip(LEAST)), weights=(1 - best).clip(LEAST)))


def compare_scores(images: Images, first: Answers, other: Answers) -> dict[str, dict[str, float]]:
    """Return {metric: {"value", "low", "high"}} of other - first, of COMPARED; less log loss is better.

    What a group adds to a difference is the difference of what it adds to both scores. A macro score rests on
    the groups of each class: one with few of them widens `unseen`.
    """
    (theirs, before), (values, parts) = (score_parts(images, one) for one in (first, other))
    each = images.groups_of_classes()
    unseen = dict.fromkeys(COMPARED, np.sqrt((1 / each**2).mean()) / len(each))
    unseen["mcc"] *= len(each) / max(len(each) - 1, 1)
    unseen["accuracy"] = 1 / images.groups
    unseen["log_loss"] = np.mean([cost_of_mistakes(one) for one in (first, other)]) / images.groups
    result = {}
    for name in values.index:
        difference = values[name] - theirs[name], (parts[name] - before[name]).to_numpy()
        result[name] = t_interval(difference, unseen[name], MOST.get(name, 1.0), heavy=name == "log_loss")
    return result


def compare_recalls(images: Images, first: Answers, other: Answers) -> dict[int, dict]:
    """Return {class: {"value", "low", "high", "n", "groups"}} of the difference in recall."""
    gains = is_right(images, other) - is_right(images, first)
    result = {}
    for label in np.unique(images.labels):
        rows = images.labels == label
        group = np.unique(images.group[rows], return_inverse=True)[1]
        groups = int(group.max()) + 1
        found = t_interval(mean_parts(gains[rows], group), 1 / groups, 1.0)
        result[int(label)] = found | {"n": len(group), "groups": groups}
    return result


def is_right(images: Images, answers: Answers) -> np.ndarray:
    """Return whether each image is classified correctly, int (n,)."""
    return (answers.guesses == images.labels).astype(int)


def mcnemar(images: Images, first: Answers, other: Answers) -> dict[str, float]:
    """Return how many images only one model gets right, and p of McNemar's exact test, each by itself."""
    gains = is_right(images, other) - is_right(images, first)
    worse, better = int((gains < 0).sum()), int((gains > 0).sum())
    p = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {"only_first_right": worse, "only_other_right": better, "p": float(p)}


def swap_test(images: Images, first: Answers, other: Answers) -> float:
    """Return the exact p for equal accuracy, if models are swapped in whole groups, not in images.

    Under that hypothesis what a group gains has either sign, with even chances; the sum of all groups has the
    distribution computed here. Where every group is one image, this is McNemar's test.
    """
    gains = is_right(images, other) - is_right(images, first)
    steps = np.abs(np.bincount(images.group, gains)).astype(int)
    chances, total = np.ones(1), steps.sum()
    for step in steps[steps > 0]:
        chances = (np.append(chances, np.zeros(2 * step)) + np.append(np.zeros(2 * step), chances)) / 2
    sums = np.arange(-total, total + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(gains.sum())].sum()))
