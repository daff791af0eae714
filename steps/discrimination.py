"""Step 8: how well the probability of a class ranks its images above the others, whatever the threshold."""

from dataclasses import replace

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from .intervals import Basis, basis_of, macro_weights, interval, share_interval

WANTED = (0.9, 0.95)  # of each, specificity and sensitivity: see `operating_points`


def auroc_parts(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return what each image adds to the error of the AUROC, float64 (n,): its derivative by the weights.

    A positive image counts with the share of negatives that it beats, a negative one with the share of
    positives that beat it (DeLong et al. 1988; over groups, Obuchowski 1997). `positive` is bool (n,).
    """
    ranks, beaten = rankdata(scores), np.empty(len(scores))
    beaten[positive] = (ranks[positive] - rankdata(scores[positive])) / (~positive).sum()
    beaten[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / positive.sum()
    return (beaten - beaten[positive].mean()) / np.where(positive, positive.sum(), (~positive).sum())


def average_precision_parts(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return what each image adds to the error of the average precision, float64 (n,), as `auroc_parts`.

    The precision at the score of a positive image depends on all images that score as high: an image adds
    to those of the positive ones below it, and to its own.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of equal scores
    block, right = np.searchsorted(last, np.arange(len(order))), positive[order].astype(float)
    n = last[block] + 1.0
    precision = right.cumsum()[last[block]] / n

    def below(values: np.ndarray) -> np.ndarray:
        return values[::-1].cumsum()[::-1][np.append(0, last + 1)[block]]

    own = right * (precision - precision @ right / right.sum())
    parts = np.empty(len(order))
    parts[order] = own + right * below(right / n) - below(right * precision / n)
    return parts / right.sum()


SCORES = {
    "auroc": (roc_auc_score, auroc_parts),
    "average_precision": (average_precision_score, average_precision_parts),
}


def rank_parts(
    labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUROC or average precision (`name`) of each class with images, against the rest: (classes,).

    And what each group adds to its error, float64 (classes, groups). Two classes or more must have images.
    """
    value_of, parts_of = SCORES[name]
    sides = [(labels == label, probabilities[:, label]) for label in np.unique(labels)]
    parts = [np.bincount(group, parts_of(*side)) for side in sides]
    return np.array([value_of(*side) for side in sides]), np.array(parts)


def discriminate(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> dict:
    """Return {"macro": {"macro_auroc", "macro_average_precision"}, label: {"auroc", "average_precision"}}.

    Each is {"value", "low", "high"}: a class against the rest, and the mean over the classes with images, as
    scikit-learn computes them. Without two such classes there is nothing to tell apart: {"macro": {}}.
    `labels` and `groups` are (n,), `probabilities` (n, classes).
    """
    group, seen = np.unique(groups, return_inverse=True)[1], np.unique(labels).tolist()
    if len(seen) < 2:
        return {"macro": {}}
    found, macro = {label: {} for label in seen}, {}
    whole = basis_of(macro_weights(labels), group)
    for name in SCORES:
        values, parts = rank_parts(labels, probabilities, group, name)
        for label, value, part in zip(seen, values, parts, strict=True):
            found[label][name] = interval(value, part, basis_of_class(labels == label, group, name))
        score = interval(values.mean(), parts.mean(0), by_rank(whole) if name == "auroc" else whole)
        # no more certain than the class of which least is known
        spans = [found[label][name] for label in seen]
        low = min(score["value"] + (span["low"] - span["value"]) / len(seen) for span in spans)
        high = max(score["value"] + (span["high"] - span["value"]) / len(seen) for span in spans)
        macro[f"macro_{name}"] = score | {"low": min(score["low"], low), "high": max(score["high"], high)}
    return {"macro": macro} | found


def basis_of_class(positive: np.ndarray, group: np.ndarray, name: str) -> Basis:
    """Return what a class's AUROC or average precision (`name`) rests on: the side that has fewer groups."""
    sides = [basis_of(side.astype(float), group) for side in (positive, ~positive)]
    scarce = min(sides, key=lambda basis: basis.effective_groups)
    return replace(by_rank(scarce), effective_images=float(len(group))) if name == "auroc" else scarce


def by_rank(basis: Basis) -> Basis:
    """Return the basis of an AUROC: a group that was not seen ranks by chance, which is half a mistake."""
    return replace(basis, effective_groups=2 * basis.effective_groups)


def operating_points(
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    class_names: list[str],
) -> dict:
    """Return {"positive": NAME, "points"}: sensitivity at a wanted specificity, and the reverse; else {}.

    Of two classes the second is the positive one, as for scikit-learn. `validation` and `test` are labels
    (n,) and probabilities (n, 2), `groups` those of the test images. A point is {"wanted", "at", "threshold",
    "sensitivity", "specificity"}. The threshold is the best that keeps what is wanted on the validation
    images; the other two are measured on the test images. An image is called positive from the threshold up.
    """
    if len(class_names) != 2 or any(len(np.unique(labels)) < 2 for labels, _ in (validation, test)):
        return {}
    fpr, tpr, thresholds = roc_curve(validation[0], validation[1][:, 1], drop_intermediate=False)
    # the first threshold lies above all scores and is infinite: JSON has no such number
    thresholds[0] = np.nextafter(thresholds[1], np.inf)
    positive, scores, points = test[0] == 1, test[1][:, 1], []
    for wanted in ("specificity", "sensitivity"):
        for at in WANTED:
            kept = np.argmax(tpr >= at)  # the first: the most specific
            if wanted == "specificity":
                kept = np.argmax(np.where(1 - fpr >= at, tpr, -1))
            called = scores >= thresholds[kept]
            points.append(
                {"wanted": wanted, "at": at, "threshold": float(thresholds[kept])}
                | {
                    "sensitivity": share_interval(called[positive], groups[positive]),
                    "specificity": share_interval(~called[~positive], groups[~positive]),
                }
            )
    return {"positive": class_names[1], "points": points}
