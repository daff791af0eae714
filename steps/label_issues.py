"""Step 9: labels in doubt, by the model, asked of images that it has not learned, and by near-duplicates."""

from typing import Any

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues as confident_learning

from .console import log
from .duplicates import Scenes, conflicting
from .files import PREFIX, read_table, remove, write_table
from .workspace import Workspace

SURE = "confident learning"  # how `why` begins in its rows


def find_label_issues(predictions: pd.DataFrame, scenes: Scenes, work: Workspace) -> dict[str, Any]:
    """Write report/label_issues.csv, the likeliest errors first, see `rank_labels`.

    Returns {"images": looked at, "listed": rows, "confident": of those, by confident learning, "from"}: the
    probabilities are those of the folds, if the run has them, else of the validation and test images. Images
    that the model has learned are looked at only where a near-duplicate has another label.
    """
    path, folds = work.report / "label_issues.csv", work.report / "cross_validation.csv"
    columns, source = [name for name in predictions if name.startswith(PREFIX)], "validation and test"
    if folds.exists():
        predictions, source = read_table(folds, ["file", *columns]), "cross-validation"
    else:  # without validation images the test images stand there twice
        predictions = predictions[predictions["split"] != "train"].drop_duplicates("file", keep="last")
    known = predictions.set_index("file")[columns].rename(columns=lambda name: name.removeprefix(PREFIX))
    differ = conflicting(scenes.pairs)
    looked_at = pd.concat([predictions["file"], differ["file_a"], differ["file_b"]]).unique()
    images = read_table(work.report / "split.csv", ["file", "label", "split"]).set_index("file")
    issues = rank_labels(images.loc[looked_at, ["split", "label"]], known, scenes.pairs)
    before = path.read_bytes() if path.exists() else None
    write_table(path, issues)
    if path.read_bytes() != before:  # the picture is drawn anew
        remove(path.with_suffix(".png"))
    confident = int(issues["why"].str.startswith(SURE).sum())
    text = "labels in doubt, by %s: %s of %s images, %s of them by confident learning; see %s"
    log.info(text, source, f"{len(issues):,}", f"{len(looked_at):,}", f"{confident:,}", path)
    return {"images": len(looked_at), "listed": len(issues), "confident": confident, "from": source}


def rank_labels(images: pd.DataFrame, known: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the images for which another class is more plausible than their label, the clearest first.

    `images` has split and label by file; `known` has the model's probabilities of some of them, a column per
    class. Columns: file, split, label; proposed, the most plausible other class; p_label and p_proposed, how
    plausible both are, see `weigh`; why. That says "confident learning" if the proposed class is at least as
    plausible as it is on average where it is the label (Northcutt et al. 2021, arXiv 1911.00068). It names a
    near-duplicate with another label, or else says "prediction". An image and its only near-duplicate may be
    a tie: both are listed.
    """
    classes, rows = known.columns, np.arange(len(images))
    labels, plausible = classes.get_indexer(images["label"]), weigh(images, known, pairs)
    sure = confident_learning(labels, plausible, filter_by="confident_learning", n_jobs=1)
    others = plausible.copy()
    others[rows, labels] = -1
    best = others.argmax(1)
    table = images.assign(proposed=classes[best], p_label=plausible[rows, labels])
    table["p_proposed"] = plausible[rows, best]
    twins = describe_twins(table["proposed"], pairs).reindex(images.index, fill_value="")
    tied = (table["p_proposed"] == table["p_label"]) & (twins != "")
    doubted = (table["p_proposed"] > table["p_label"]) | tied
    reasons = zip(np.where(sure, SURE, ""), twins, strict=True)
    table["why"] = ["; ".join(filter(None, reason)) or "prediction" for reason in reasons]
    order = {"by": ["p_label", "p_proposed"], "ascending": [True, False], "kind": "stable"}
    return table[doubted].round(6).sort_values(**order).reset_index(names="file")


def weigh(images: pd.DataFrame, known: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray:
    """Return how plausible each class is for each image, float64 (n, classes), rows summing to 1: votes.

    The model has one vote, divided by its probabilities, and every near-duplicate has one for its label. For
    an image that the model has learned, the image's own label stands in. See `rank_labels`.
    """
    votes = np.eye(len(known.columns))[known.columns.get_indexer(images["label"])]
    votes[images.index.get_indexer(known.index)] = known
    links = both_ways(pairs)
    links = links[links["file"].isin(images.index)]
    place = images.index.get_indexer(links["file"]), known.columns.get_indexer(links["label"])
    np.add.at(votes, place, 1)
    return votes / votes.sum(axis=1, keepdims=True)


def describe_twins(proposed: pd.Series, pairs: pd.DataFrame) -> pd.Series:
    """Return what to say, by file, of a near-duplicate with another label, if possible the proposed one."""
    links = both_ways(pairs)
    links = links[links["label"] != links["own"]]
    other = (links["file"].map(proposed) != links["label"]).to_numpy()
    links = links.iloc[np.argsort(other, kind="stable")].drop_duplicates("file").set_index("file")
    return "near-duplicate of " + links["other"] + ", labelled " + links["label"]


def both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return each pair twice, nearest first: a file, its own label, the other file, and that one's label."""
    names, a, b = ["file", "own", "other", "label"], ["file_a", "label_a"], ["file_b", "label_b"]
    links = [pairs[one + two].set_axis(names, axis=1) for one, two in ((a, b), (b, a))]
    return pd.concat(links).sort_index(kind="stable")
