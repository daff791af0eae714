"""Step 8: numbers from labels and probabilities, with 95 % intervals over groups."""

import datasets
import evaluate
import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
from sklearn.metrics import multilabel_confusion_matrix, precision_recall_fscore_support
from transformers import EvalPrediction

from .files import probability_columns
from .options import METRICS

BINS = 15  # of the expected calibration error, equally wide: Guo et al. 2017, arXiv 1706.04599


class Classification(evaluate.Metric):
    """METRICS as a metric of `evaluate`. Local, because `evaluate.load` would run code from the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        features = datasets.Features({"predictions": label, "references": label})
        return evaluate.MetricInfo(description="METRICS", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        rows = np.array(references), np.array(predictions), np.zeros(len(references), int)
        return scores_of(*count(*rows, classes=max(*predictions, *references) + 1)).iloc[0].to_dict()


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Score logits (n, classes) against labels (n,), for the Trainer."""
    metric = Classification(keep_in_memory=True)
    return metric.compute(predictions=outputs.predictions.argmax(-1), references=outputs.label_ids)


def count(labels: np.ndarray, guesses: np.ndarray, group: np.ndarray, classes: int) -> list:
    """Return how often each class is hit, true and guessed per group: three arrays (groups, classes)."""
    places = (group, np.where(guesses == labels, labels, classes)), (group, labels), (group, guesses)
    tables = [np.zeros((group.max() + 1, classes + 1)) for _ in places]
    for table, place in zip(tables, places, strict=True):
        np.add.at(table, place, 1)
    return [table[:, :classes] for table in tables]


def scores_of(hits: np.ndarray, true: np.ndarray, guessed: np.ndarray) -> pd.DataFrame:
    """Return METRICS, as scikit-learn defines them, a row per draw, from counts (draws, classes)."""
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
    spread = np.sqrt((n**2 - (true**2).sum(1)) * (n**2 - (guessed**2).sum(1)))
    covariance = n * hits.sum(1) - (true * guessed).sum(1)
    table["mcc"] = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    return pd.DataFrame(table)[[*METRICS]]


def score(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {"value", "low", "high"} for each of METRICS and ece; labels (n,), probabilities (n, classes).

    What a group adds to the counts and to the bins of the calibration error is counted once. A draw is then a
    sum over groups, and all draws are one matrix product.
    """
    guesses, confidence = probabilities.argmax(1), probabilities.max(1)
    group = np.unique(groups, return_inverse=True)[1]
    counts = count(labels, guesses, group, probabilities.shape[1])
    gaps = np.zeros((group.max() + 1, BINS + 1))
    np.add.at(gaps, (group, np.ceil(confidence * BINS).astype(int)), (guesses == labels) - confidence)

    def totals(times: np.ndarray) -> pd.DataFrame:
        drawn = [times @ table for table in counts]
        return scores_of(*drawn).assign(ece=np.abs(times @ gaps).sum(1) / drawn[1].sum(1))

    return intervals(totals, len(gaps))


def intervals(totals, groups: int) -> dict[str, dict[str, float]]:
    """Return {"value", "low", "high"} for each column of totals(times), times (draws, groups).

    `times` says how often each group was drawn. Percentile bootstrap over groups (Field and Welsh 2007),
    1,000 draws. Where its low end is 1, or its high end 0, it has no width: the other end is then the limit
    of Clopper and Pearson for as many groups. One group has no interval: it is all that is possible.
    """
    draw = np.random.RandomState(0).randint
    drawn = [np.bincount(draw(groups, size=groups), minlength=groups) for _ in range(1000)]
    low, high = totals(np.array(drawn, float)).quantile([0.025, 0.975]).to_numpy()
    sure = 0.025 ** (1 / groups)
    low, high = np.where(low == 1, sure, low), np.where(high == 0, 1 - sure, high)
    value = totals(np.ones((1, groups))).iloc[0]
    if groups == 1:  # it says nothing of others
        low, high = np.where(value.index == "mcc", -1.0, 0.0), np.ones(len(value))
    return pd.DataFrame({"value": value, "low": low, "high": high}).to_dict("index")


def truth_of(predictions: pd.DataFrame, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, int (n,), and the probabilities, float64 (n, classes), of a table of predictions."""
    number = {name: label for label, name in enumerate(class_names)}
    probabilities = predictions[probability_columns(class_names)]
    return predictions["label"].map(number).to_numpy(), probabilities.to_numpy(float)


def score_classes(predictions: pd.DataFrame, groups: pd.Series, class_names: list[str]) -> dict[str, dict]:
    """Return {class: {"precision", "recall" (sensitivity), "specificity", "f1", "n"}} of one split.

    Classes with images also have the 95 % interval of their recall, "recall_low" and "recall_high", and
    "groups", the number of groups that it rests on.
    """
    pair = predictions["label"], predictions["prediction"]
    (tn, fp), _ = multilabel_confusion_matrix(*pair, labels=class_names).transpose(1, 2, 0)
    rows = precision_recall_fscore_support(*pair, labels=class_names, zero_division=0)
    table = pd.DataFrame(rows, ["precision", "recall", "f1", "n"], class_names).T.astype({"n": int})
    table.insert(2, "specificity", tn / np.maximum(tn + fp, 1))
    result = table.to_dict(orient="index")
    for name, part in predictions.groupby("label"):
        group = np.unique(groups[part["file"]], return_inverse=True)[1]
        hits, n = np.bincount(group, part["prediction"] == name), np.bincount(group)

        def recall(times: np.ndarray, hits: np.ndarray = hits, n: np.ndarray = n) -> pd.DataFrame:
            return pd.DataFrame({"recall": times @ hits / (times @ n)})

        ends = intervals(recall, len(n))["recall"]
        result[name] |= {"recall_low": ends["low"], "recall_high": ends["high"], "groups": len(n)}
    return result


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of arrays (n,)."""
    bins = np.ceil(confidence * BINS).astype(int)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(right))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return what logits (n, classes) must be divided by for the least cross-entropy with labels (n,).

    The labels are smoothed by 1 / (n + 2), after Platt 1999: without a single mistake it would run to 0.
    """
    n, classes = logits.shape
    wanted = np.full((n, classes), 1 / (n + 2) / classes)
    wanted[np.arange(n), labels] += 1 - 1 / (n + 2)

    def loss(log_temperature: float) -> float:
        cooler = logits.astype(float) / np.exp(log_temperature)
        return -(wanted * scipy.special.log_softmax(cooler, axis=1)).sum()

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(logits / temperature), (n, classes), for probabilities that are softmax(logits)."""
    return scipy.special.softmax(np.log(probabilities.clip(1e-38)) / temperature, axis=1)


def calibration(labels: np.ndarray, probabilities: np.ndarray, temperature: float) -> dict[str, float]:
    """Return what the temperature changed, and the accuracy on the nine tenths that are most certain."""
    before, right = temper(probabilities, 1 / temperature), probabilities.argmax(1) == labels
    certain = np.argsort(-probabilities.max(1), kind="stable")[: round(0.9 * len(labels))]
    return {
        "temperature": temperature,
        "ece_before": calibration_error(before.max(1), right),
        "ece_after": calibration_error(probabilities.max(1), right),
        "accuracy_at_90_percent_coverage": float(right[certain].mean()),
    }
