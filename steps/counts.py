"""Step 8: METRICS from how often each class is hit, true and guessed, with 95 % intervals."""

import numpy as np
import pandas as pd

from .intervals import basis_of, macro_weights, interval, share_interval
from .options import METRICS

BLOCK = 1000  # groups at once: their tables of many classes need memory
STEP = 1e-6  # how much more a group counts, to see what it adds to a score


def count(labels: np.ndarray, guesses: np.ndarray, group: np.ndarray, classes: int) -> list:
    """Return how often each class is hit, true and guessed per group: three arrays (groups, classes)."""
    places = (group, np.where(guesses == labels, labels, classes)), (group, labels), (group, guesses)
    tables = [np.zeros((group.max() + 1, classes + 1)) for _ in places]
    for table, place in zip(tables, places, strict=True):
        np.add.at(table, place, 1)
    return [table[:, :classes] for table in tables]


def scores_of(hits: np.ndarray, true: np.ndarray, guessed: np.ndarray) -> pd.DataFrame:
    """Return METRICS, as scikit-learn defines them, a row for each of counts (rows, classes)."""
    n = true.sum(1)
    shares = {
        "precision": hits / guessed.clip(1),
        "recall": hits / true.clip(1),
        "f1": 2 * hits / (true + guessed).clip(1),
    }
    seen = true + guessed > 0  # a class that is neither true nor guessed does not count
    table = {"accuracy": hits.sum(1) / n}
    table |= {f"macro_{name}": (share * seen).sum(1) / seen.sum(1) for name, share in shares.items()}
    table |= {f"weighted_{name}": (share * true).sum(1) / n for name, share in shares.items()}
    spread = np.sqrt(((n**2 - (true**2).sum(1)) * (n**2 - (guessed**2).sum(1))).clip(0))  # clip: rounding
    covariance = n * hits.sum(1) - (true * guessed).sum(1)
    table["mcc"] = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 1e-7 * n**2)
    return pd.DataFrame(table)[[*METRICS]]


def scores_with(tables: list[np.ndarray], more: float) -> pd.DataFrame:
    """Return METRICS, a row per group, if its images weighed `more` more. `tables` are those of `count`."""
    total, blocks = [table.sum(0) for table in tables], []
    for first in range(0, len(tables[0]), BLOCK):
        pairs = zip(total, tables, strict=True)
        blocks.append(scores_of(*[row + more * table[first : first + BLOCK] for row, table in pairs]))
    return pd.concat(blocks, ignore_index=True)


def score_guesses(
    labels: np.ndarray, guesses: np.ndarray, group: np.ndarray, classes: int
) -> dict[str, dict]:
    """Return {"value", "low", "high"} for each of METRICS; `labels`, `guesses` and `group` are int (n,).

    The interval holds what the score would be with the recall of any one class at either end of its own
    interval. So a score is not more certain than its rarest class.
    """
    tables = count(labels, guesses, group, classes)
    total = [table.sum(0) for table in tables]
    values = scores_of(*[row[None] for row in total]).iloc[0]
    parts = (scores_with(tables, STEP) - values) / STEP
    worse, better = scores_at_ends(labels, guesses, group, classes)
    alone, macro = (basis_of(weights, group) for weights in (np.ones(len(labels)), macro_weights(labels)))
    found = {}
    for name in METRICS:
        basis = macro if name == "mcc" or name.startswith("macro") else alone
        lowest = 0.0
        if name == "mcc":  # all wrong, evenly; with one group, the least there is
            others = np.count_nonzero(total[1] + total[2]) - 1
            lowest = -1.0 if basis.groups == 1 else -1 / max(others, 1)
        ends = interval(values[name], parts[name].to_numpy(), basis, (lowest, 1.0))
        low, high = min(ends["low"], worse[name].min()), max(ends["high"], better[name].max())
        found[name] = ends | {"low": float(low), "high": float(high)}
    return found


def scores_at_ends(
    labels: np.ndarray, guesses: np.ndarray, group: np.ndarray, classes: int
) -> list[pd.DataFrame]:
    """Return METRICS, a row per class: as if its recall were at the low end of its interval, or at the high.

    Its mistakes become more or fewer, and stay of the same kinds; where it has none, they would be guesses of
    the largest other class. Arguments as for `score_guesses`.
    """
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, guesses), 1)
    hits, true, guessed = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    kinds = confusion - np.diag(hits)
    spotless, largest = np.flatnonzero(true == hits), np.argsort(-true, kind="stable")[:2]
    kinds[spotless, np.where(spotless == largest[0], largest[-1], largest[0])] = 1
    kinds /= kinds.sum(1, keepdims=True)
    ends = np.zeros((2, classes))
    for label in np.flatnonzero(true):
        mine = labels == label
        recall = share_interval(guesses[mine] == label, group[mine])
        ends[:, label] = recall["low"], recall["high"]
    more = [np.diag(end * true - hits) for end in ends]  # right answers
    rows = np.broadcast_to(true, confusion.shape)
    return [
        scores_of(hits + gain, rows, guessed + gain - gain.sum(1, keepdims=True) * kinds) for gain in more
    ]
