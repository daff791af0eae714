"""Step 8: numbers from labels and probabilities, with 95 % intervals over groups."""

from dataclasses import replace

import datasets
import evaluate
import numpy as np
import pandas as pd
import scipy.optimize
import scipy.special
from sklearn.metrics import multilabel_confusion_matrix, precision_recall_fscore_support
from transformers import EvalPrediction

from .counts import count, score_guesses, scores_of
from .files import probability_columns
from .intervals import LEAST, basis_of, interval, mean_parts, share_interval
from .options import SHOWN

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


def losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each image, float64 (n,), in nats: what log loss is the mean of."""
    return -np.log(probabilities[np.arange(len(labels)), labels].clip(LEAST))


def score(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {"value", "low", "high"} of METRICS, ece and log_loss.

    `labels` and `groups` are (n,), `probabilities` (n, classes).
    """
    guesses, confidence = probabilities.argmax(1), probabilities.max(1)
    group = np.unique(groups, return_inverse=True)[1]
    found = score_guesses(labels, guesses, group, probabilities.shape[1])
    found["ece"] = true_calibration_error(confidence, guesses == labels, group)
    mean_loss = mean_parts(losses(labels, probabilities), group)
    basis = basis_of(np.ones(len(labels)), group)
    basis = replace(basis, effective_images=1 / LEAST)  # no limit: a loss is no share
    worst = -np.log(probabilities.min(1).clip(LEAST)).mean() if basis.groups > 1 else -np.log(LEAST)
    return found | {"log_loss": interval(*mean_loss, basis, (0.0, worst))}


def truth_of(predictions: pd.DataFrame, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, int (n,), and the probabilities, float64 (n, classes), of a table of predictions."""
    probabilities = predictions[probability_columns(class_names)]
    return label_numbers(predictions["label"], class_names), probabilities.to_numpy(float)


def label_numbers(labels: pd.Series, class_names: list[str]) -> np.ndarray:
    """Return the number of each label (n,), int: its place in `class_names`."""
    return labels.map({name: label for label, name in enumerate(class_names)}).to_numpy()


def score_classes(
    predictions: pd.DataFrame, groups: pd.Series, class_names: list[str], ranks: dict
) -> dict[str, dict]:
    """Return {class: {"precision", "recall" (sensitivity), "specificity", "f1", "n"}} of one split.

    Classes with images also have the 95 % interval of their recall, "recall_low" and "recall_high", and
    "groups", the number of groups that it rests on; and, where there are others, "auroc" and
    "average_precision" with theirs, which are in `ranks`, what `discriminate` returns.
    """
    pair = predictions["label"], predictions["prediction"]
    (tn, fp), _ = multilabel_confusion_matrix(*pair, labels=class_names).transpose(1, 2, 0)
    rows = precision_recall_fscore_support(*pair, labels=class_names, zero_division=0)
    table = pd.DataFrame(rows, ["precision", "recall", "f1", "n"], class_names).T.astype({"n": int})
    table.insert(2, "specificity", tn / np.maximum(tn + fp, 1))
    result, labels = table.to_dict(orient="index"), label_numbers(pair[0], class_names)
    group, hits = groups[predictions["file"]].to_numpy(), (pair[0] == pair[1]).to_numpy()
    for label in np.unique(labels).tolist():
        mine, row = labels == label, result[class_names[label]]
        found = {"recall": share_interval(hits[mine], group[mine])} | ranks.get(label, {})
        for name, ends in found.items():
            row |= {name: ends["value"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
        row["groups"] = len(np.unique(group[mine]))
    return result


def worst_classes(per_class: dict[str, dict]) -> list[str]:
    """Return the classes that a table or picture has room for: all, or the worst by recall, worst first.

    Of the same recall, those first whose interval ends lowest. `per_class` is of `score_classes`; where there
    is no room for all, classes without images are left out.
    """
    if len(per_class) <= SHOWN:
        return [*per_class]
    tested = [name for name, row in per_class.items() if row["n"]]
    tested.sort(key=lambda name: (per_class[name]["recall"], per_class[name]["recall_high"]))
    return tested[:SHOWN]


def confusions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return which classes are taken for which: label, prediction, images, share of the label's images.

    The most frequent first, of equally frequent ones those with the larger share.
    """
    pairs = predictions.groupby(["label", "prediction"]).size().rename("images").reset_index()
    pairs["share"] = pairs["images"] / pairs.groupby("label")["images"].transform("sum")
    wrong = pairs[pairs["label"] != pairs["prediction"]]
    return wrong.sort_values(["images", "share"], ascending=False, kind="stable")


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of arrays (n,), as measured: chance adds to it."""
    bins = np.ceil(confidence * BINS).astype(int)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(right))


def clustering(rest: np.ndarray, bins: np.ndarray, group: np.ndarray) -> float:
    """Return how many times as much `rest` varies within `bins` since images of a group are alike: 1 or more.

    Arrays (n,). `rest` has a mean of 0 in each bin.
    """
    together = np.zeros((BINS + 1, group.max() + 1))
    np.add.at(together, (bins, group), rest)
    images = np.bincount(bins, minlength=BINS + 1)
    groups = np.bincount(np.unique(np.column_stack([bins, group]), axis=0)[:, 0], minlength=BINS + 1)
    alone, several = np.bincount(bins, rest**2, BINS + 1), groups > 1  # one group in a bin tells nothing
    of_groups = ((together**2).sum(1) * groups / (groups - 1).clip(1))[several].sum()
    of_images = (alone * images / (images - 1).clip(1))[several].sum()
    return float(max(1.0, of_groups / max(of_images, LEAST)))


def true_calibration_error(confidence: np.ndarray, right: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return {"value", "low", "high"} of the expected calibration error without what chance adds to it.

    Arrays (n,). By chance alone a calibrated model's ECE is measured as 0.1 on 72 images, and a bootstrap
    adds as much again. So a true error is assumed, spread over the bins like the measured one. Right answers
    are drawn from it (Bröcker and Smith 2007, doi 10.1175/WAF993.1), as much correlated in groups as here.
    With `value`, `low` and `high` the measured error is the median, the 97.5th and the 2.5th percentile of
    draws: for `low` of draws that also move all bins together, and more so where groups are few; for `high`
    also of draws without groups.
    """
    measured, n = calibration_error(confidence, right), len(right)
    group, gap = np.unique(groups, return_inverse=True)[1], right - confidence
    bins, basis = np.ceil(confidence * BINS).astype(int), basis_of(np.ones(n), group)
    total, size = np.bincount(bins, gap, BINS + 1), np.bincount(bins, minlength=BINS + 1).clip(1)
    slope = total / size / max(measured, LEAST)
    within = clustering(gap - (total / size)[bins], bins, group)
    most = max(within, clustering(gap - gap.mean(), np.zeros(n, int), group))
    most *= (scipy.special.stdtrit(max(basis.groups - 1, 1), 0.975) / scipy.special.stdtrit(n, 0.975)) ** 2
    noise = np.random.RandomState(0).normal(size=(1000, BINS + 1))

    def excess(error: float, share: float, together: float) -> float:
        chance = (confidence + error * slope[bins]).clip(0, 1)  # of being right
        spread = np.sqrt(together * np.bincount(bins, chance * (1 - chance), BINS + 1))
        drawn = np.abs(error * total / max(measured, LEAST) + spread * noise).sum(1) / n
        return np.quantile(drawn, share) - measured

    def solve(*how: float) -> float:
        if excess(0.0, *how) >= 0 or excess(1.0, *how) <= 0:
            return float(excess(0.0, *how) < 0)
        return scipy.optimize.brentq(excess, 0, 1, how, xtol=1e-6)

    value, low = solve(0.5, within), solve(0.975, most)
    high = max(solve(0.025, within), solve(0.025, 1.0))
    unseen = 1 - 0.025 ** (1 / basis.effective_groups)  # what as many groups may never show
    low, high = (min(low, value), max(high, value, unseen)) if basis.groups > 1 else (0.0, 1.0)
    return {"value": value, "low": low, "high": high}


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


def calibration(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, temperature: float
) -> dict[str, float]:
    """Return what the temperature changed, and the accuracy on the nine tenths that are most certain."""
    before, right = temper(probabilities, 1 / temperature), probabilities.argmax(1) == labels
    certain = np.argsort(-probabilities.max(1), kind="stable")[: round(0.9 * len(labels))]
    return {
        "temperature": temperature,
        "ece_before": true_calibration_error(before.max(1), right, groups)["value"],
        "ece_after": true_calibration_error(probabilities.max(1), right, groups)["value"],
        "accuracy_at_90_percent_coverage": float(right[certain].mean()),
    }
