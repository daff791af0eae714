"""Do the 95 % intervals hold the truth? Simulated tests, whose truth is known.

    python tests/benchmarks/coverage.py [--repetitions 300] [--processes 2]

prints a table in Markdown: how often the interval of each score holds the truth, in the worst of 12 cells
and in their mean, by the number of groups in the test. The cells are 2 and 8 classes, an accuracy of 0.7, 0.9
and 0.98, answers that are independent, and answers that are correlated within groups (intra-class
correlation 0.5). Rows called bootstrap are the percentile bootstrap over groups, 1,000 draws, for comparison.
A second table has the median width of the intervals.

A group has 1 to 19 images; two thirds are of its main class. The classes are unequally frequent, and each has
an image in the test. The logit of class k is A, if it is the true one, plus noise, in part that of the group.
The probabilities are 1.2 times too sure. The truth is what a test of 15,000 groups measures; that of the ECE
and of the log loss follows from the posterior.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.counts import count, scores_of
from steps.discrimination import discriminate
from steps.intervals import share_interval
from steps.scores import BINS, score

SHARES = {2: [0.6, 0.4], 8: [0.22, 0.18, 0.15, 0.12, 0.1, 0.09, 0.08, 0.06]}  # of the classes
GROUPS = [3, 5, 10, 30, 100]
MAIN, SURE = 2 / 3, 1.2


def draw(groups: int, kind: tuple, rng: np.random.Generator) -> tuple:
    """Return labels, groups (n,), probabilities and their true values (n, classes) of one test.

    `kind` is (classes, A, the share of the noise's variance that a group's images have in common).
    """
    classes, strength, common = kind
    labels = ()
    while len(np.unique(labels)) < classes:
        group = np.repeat(np.arange(groups), rng.integers(1, 20, groups))
        main, other = (rng.choice(classes, size, p=SHARES[classes]) for size in (groups, len(group)))
        labels = np.where(rng.random(len(group)) < MAIN, main[group], other)
    noise = rng.normal(size=(groups, classes))[group], rng.normal(size=(len(group), classes))
    signs = np.sqrt(common) * noise[0] + np.sqrt(1 - common) * noise[1]
    signs[np.arange(len(group)), labels] += strength
    logits = strength * signs + np.log(SHARES[classes])
    said, true = (scipy.special.softmax(factor * logits, axis=1) for factor in (SURE, 1))
    return labels, group, said, true


def correlation(right: np.ndarray, group: np.ndarray) -> float:
    """Return the intra-class correlation of right answers (n,), from the analysis of variance."""
    size, n = np.bincount(group), len(right)
    means = np.bincount(group, right) / size
    between = (size * (means - right.mean()) ** 2).sum() / (len(size) - 1)
    within = ((right - means[group]) ** 2).sum() / (n - len(size))
    return (between - within) / (between + ((n - (size**2).sum() / n) / (len(size) - 1) - 1) * within)


@functools.cache
def settle(classes: int, accuracy: float, wanted: float) -> tuple:
    """Return the kind, see `draw`, of this accuracy and correlation, or of the most correlation there is."""
    common = 0.0
    for _ in range(8 if wanted else 1):
        low, high = 0.0, 8.0
        for _ in range(16):
            kind = classes, (low + high) / 2, common
            labels, group, said, _ = draw(2000, kind, np.random.default_rng(1))
            right = said.argmax(1) == labels
            low, high = (kind[1], high) if right.mean() < accuracy else (low, kind[1])
        common = min(1.0, max(0.0, common + 0.8 * (wanted - correlation(right, group)))) if wanted else 0.0
    return kind


@functools.cache
def truth(kind: tuple) -> dict[str, float]:
    labels, _, said, true = draw(15_000, kind, np.random.default_rng(7))
    rows, guesses, confidence = np.arange(len(labels)), said.argmax(1), said.max(1)
    found = scores_of(*count(labels, guesses, np.zeros(len(labels), int), kind[0])).iloc[0].to_dict()
    gap = np.bincount(np.ceil(confidence * BINS).astype(int), true[rows, guesses] - confidence)
    rank = {"auroc": roc_auc_score, "average precision": average_precision_score}
    values = {name: [f(labels == k, said[:, k]) for k in range(kind[0])] for name, f in rank.items()}
    found |= {f"macro_{name}".replace(" ", "_"): np.mean(value) for name, value in values.items()}
    found |= {f"{name} of a class": value[-1] for name, value in values.items()}
    found["recall of a class"] = (guesses[labels == kind[0] - 1] == kind[0] - 1).mean()
    log_loss = -(true * np.log(said)).sum(1).mean()
    return found | {"ece": np.abs(gap).sum() / len(labels), "log_loss": log_loss}


def measure(labels: np.ndarray, group: np.ndarray, said: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the intervals of one test."""
    last, guesses = labels.max(), said.argmax(1)
    ranks, mine = discriminate(labels, said, group), labels == last
    found = score(labels, said, group) | ranks["macro"]
    found["recall of a class"] = share_interval(guesses[mine] == last, group[mine])
    found |= {f"{name.replace('_', ' ')} of a class": ends for name, ends in ranks[last].items()}
    return found


def bootstrap(labels: np.ndarray, group: np.ndarray, said: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the percentile intervals, 1,000 draws of groups, of one test."""
    tables = count(labels, said.argmax(1), np.unique(group, return_inverse=True)[1], said.shape[1])
    groups = len(tables[0])
    times = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=1000)
    table = scores_of(*[times @ table for table in tables])[["accuracy", "macro_f1", "mcc"]]
    ends = table.quantile([0.025, 0.975]).set_axis(["low", "high"]).add_prefix("bootstrap: ")
    return ends.to_dict()


def simulate(cell: tuple) -> pd.DataFrame:
    """Return a row per test and score of one cell, (classes, accuracy, correlation, groups, repetitions)."""
    *what, groups, repetitions = cell
    kind, rows = settle(*what), []
    true, rng = (
        truth(kind),
        np.random.default_rng([groups, what[0], round(100 * what[1]), round(10 * what[2])]),
    )
    for _ in range(repetitions):
        labels, group, said, _ = draw(groups, kind, rng)
        test = labels, group, said
        for name, ends in (measure(*test) | bootstrap(*test)).items():
            value = true[name.removeprefix("bootstrap: ")]
            rows.append([name, ends["low"] <= value <= ends["high"], ends["high"] - ends["low"]])
    table = pd.DataFrame(rows, columns=["score", "holds", "width"]).groupby("score", sort=False)
    return table.agg({"holds": "mean", "width": "median"}).reset_index().assign(groups=groups, cell=str(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300, help="simulated tests per cell")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="print every cell, too")
    flags = parser.parse_args()
    kinds = itertools.product(SHARES, (0.7, 0.9, 0.98), (0.0, 0.5))
    cells = [(*kind, groups, flags.repetitions) for kind in kinds for groups in GROUPS]
    with multiprocessing.Pool(flags.processes) as pool:
        table = pd.concat(pool.map(simulate, cells, chunksize=len(GROUPS)))
    table["score"] = table["score"].str.replace("_", " ").str.replace("auroc", "AUROC")
    if flags.all:
        print(table.pivot_table("holds", ["score", "cell"], "groups", sort=False).round(2).to_string())
    cells = table.groupby(["score", "groups"], sort=False)
    text = (100 * cells["holds"].min()).map("{:.0f}".format) + (100 * cells["holds"].mean()).map(
        " ({:.0f})".format
    )
    for title, column in (
        ("groups: holds the truth, % (mean)", text),
        ("groups: width", cells["width"].median()),
    ):
        print(f"\n| {title} |", " | ".join(map(str, GROUPS)), "|\n|---" + "|---" * len(GROUPS) + "|")
        for name, row in column.unstack(sort=False).iterrows():
            print(f"| {name} |", " | ".join(row.map(lambda x: x if isinstance(x, str) else f"{x:.2f}")), "|")


if __name__ == "__main__":
    main()
