"""Step 8: how well the probability of a class ranks its images above the others, whatever the threshold."""

from dataclasses import replace

import numpy as np
from sklearn.metrics import roc_curve

from .intervals import Basis, basis_of, macro_weights, interval, share_interval

WANTED = (0.9, 0.95)  # of each, specificity and sensitivity: see `operating_points`
BLOCK = 1_000_000  # probabilities that are ranked at once: each takes 100 bytes


def rank(labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray) -> dict[str, tuple]:
    """Return {"auroc" and "average_precision": (values, parts)} of each class with images, against the rest.

    `values` is float64 (classes with images,). `parts` is what each group adds to their error, float64
    (classes with images, groups). `labels` and `group` are int (n,), `probabilities` (n, classes). Two
    classes or more must have images.
    """
    seen, blocks = np.unique(labels), []
    size = max(1, BLOCK // len(labels))
    for some in np.split(seen, range(size, len(seen), size)):
        blocks.append(rank_block(labels == some[:, None], probabilities[:, some].T, group))
    return {
        name: tuple(np.concatenate(found) for found in zip(*(block[name] for block in blocks), strict=True))
        for name in blocks[0]
    }


def rank_block(positive: np.ndarray, scores: np.ndarray, group: np.ndarray) -> dict[str, tuple]:
    """Return what `rank` does, of some classes: `positive`, bool, and `scores` are (classes, n).

    Each row is sorted once. All that matters of an image is how many positive and how many negative ones
    score below it, and how many tie with it.
    """
    rows, order = np.arange(len(scores))[:, None], np.argsort(scores, axis=1)
    scores, positive = scores[rows, order], positive[rows, order]
    first, last = ends_of_ties(scores)
    groups = group.max() + 1
    places, found = (rows * groups + group[order]).ravel(), {}
    for name, parts_of in (("auroc", auroc_parts), ("average_precision", average_precision_parts)):
        values, parts = parts_of(positive, first, last)
        found[name] = values, np.bincount(places, parts.ravel(), len(rows) * groups).reshape(len(rows), -1)
    return found


def ends_of_ties(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the run of equal scores begins and where it ends, at each place of rising rows, int."""
    place, new = np.arange(scores.shape[1]), np.diff(scores, axis=1) != 0
    edge = np.ones((len(scores), 1), bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, new]), place, 0), axis=1)
    last = np.where(np.hstack([new, edge]), place, place[-1])[:, ::-1]
    return first, np.minimum.accumulate(last, axis=1)[:, ::-1]


def auroc_parts(positive: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUROC of each row (rows,), and what each image adds to its error: float64 (rows, n).

    That is its derivative by the image's weight. A positive image counts with the share of negatives that it
    beats, a negative one with the share of positives that beat it (DeLong et al. 1988; over groups,
    Obuchowski 1997). The images are in rising order of their scores; for the others see `ends_of_ties`.
    """
    upto = np.cumsum(positive, axis=1)
    below = np.take_along_axis(upto - positive, first, axis=1)
    equal = np.take_along_axis(upto, last, axis=1) - below
    count = upto[:, -1:]
    others = positive.shape[1] - count
    beaten = np.where(
        positive,
        (first - below + (last - first + 1 - equal) / 2) / others,
        (count - below - equal / 2) / count,
    )
    values = (beaten * positive).sum(1) / count[:, 0]
    return values, (beaten - values[:, None]) / np.where(positive, count, others)


def average_precision_parts(
    positive: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the average precision of each row, and what each image adds to its error, see `auroc_parts`.

    The precision at the score of a positive image depends on all images that score as high: an image adds
    to those of the positive ones below it, and to its own.
    """
    upto = np.cumsum(positive, axis=1)
    count, above = upto[:, -1:], positive.shape[1] - first  # images that score as high or higher
    precision = (count - np.take_along_axis(upto - positive, first, axis=1)) / above
    values = (positive * precision).sum(1) / count[:, 0]
    gained, lost = (np.cumsum(positive * share / above, axis=1) for share in (1, precision))
    parts = positive * (precision - values[:, None] + np.take_along_axis(gained, last, axis=1))
    parts -= np.take_along_axis(lost, last, axis=1)
    return values, parts / count


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
    for name, (values, parts) in rank(labels, probabilities, group).items():
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
