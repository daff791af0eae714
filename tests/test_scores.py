"""Step 8: the numbers, checked by hand and against scikit-learn."""

import time

import numpy as np
import pandas as pd
import pytest
import scipy.special
import torch
from scipy.stats import beta
from sklearn import metrics

from steps.options import METRICS
from steps.discrimination import discriminate
from steps.scores import Classification, calibration, calibration_error, score, score_classes
from steps.scores import confusions, temper, true_calibration_error, truth_of, worst_classes

# true a: 3 right, 1 called b; true b: 2 right, 1 called a, 1 called c; true c: 2 right
TRUTH = list("aaaabbbbcc")
GUESS = list("aaabbbaccc")
TABLE = pd.DataFrame({"file": range(10), "label": TRUTH, "prediction": GUESS})
TABLE = pd.concat([TABLE, (pd.get_dummies(TABLE["prediction"], prefix="p") * 0.7 + 0.1)], axis=1)
NAMES = [*METRICS, "ece", "log_loss"]
ALONE = pd.Series(range(10), range(10))  # every image its own group


def test_scores_worked_out_by_hand():
    scores = score(*truth_of(TABLE, ["a", "b", "c"]), ALONE.to_numpy())
    assert scores["accuracy"]["value"] == pytest.approx(0.7)
    precision, recall = np.array([3 / 4, 2 / 3, 2 / 3]), np.array([3 / 4, 2 / 4, 2 / 2])
    f1 = 2 * precision * recall / (precision + recall)
    for average, weight in (("macro", np.array([1, 1, 1]) / 3), ("weighted", np.array([4, 4, 2]) / 10)):
        assert scores[f"{average}_precision"]["value"] == pytest.approx(precision @ weight)
        assert scores[f"{average}_recall"]["value"] == pytest.approx(recall @ weight)
        assert scores[f"{average}_f1"]["value"] == pytest.approx(f1 @ weight)
    # Gorodkin 2004: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)); c 7, s 10, p 4 3 3, t 4 4 2
    assert scores["mcc"]["value"] == pytest.approx((70 - 34) / ((100 - 34) * (100 - 36)) ** 0.5)
    assert 0 == scores["ece"]["low"] < scores["ece"]["value"] < 0.8 - 0.7  # all probabilities are 0.8
    assert scores["log_loss"]["value"] == pytest.approx(-(7 * np.log(0.8) + 3 * np.log(0.1)) / 10)
    assert list(scores) == NAMES and all(set(row) == {"value", "low", "high"} for row in scores.values())


def right_or_wrong(right):
    """Labels and probabilities of two classes: the first is always guessed, and is `right` or not."""
    return np.where(right, 0, 1), np.tile([0.9, 0.1], (len(right), 1))


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("case", ["usual", "a class never occurs", "one guess", "one class", "one image"])
def test_scores_are_scikit_learns(case):
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 5, 300), rng.dirichlet(np.ones(6), 300)
    if case == "a class never occurs":
        labels, probabilities[:, 2] = np.where(labels == 2, 0, labels), 0
    if case in ("one guess", "one class"):
        probabilities[:, 3] = 1
    if case == "one class":
        labels[:] = 3
    rows = slice(1 if case == "one image" else None)
    labels, guesses = labels[rows], probabilities[rows].argmax(1)
    expected = {"accuracy": metrics.accuracy_score(labels, guesses)}
    for average in ("macro", "weighted"):
        values = metrics.precision_recall_fscore_support(labels, guesses, average=average, zero_division=0)
        names = (f"{average}_{name}" for name in ("precision", "recall", "f1"))
        expected |= dict(zip(names, values, strict=False))
    expected["mcc"] = metrics.matthews_corrcoef(labels, guesses)
    found = score(labels, probabilities[rows], np.arange(len(labels)))
    assert {name: found[name]["value"] for name in METRICS} == pytest.approx(expected)


def test_calibration_error_worked_out_by_hand():
    # two bins of fifteenths: (0.6, 0.667]: 3 images at 0.65, 1 right; (0.933, 1]: 2 at 0.95 and 1, 1 right
    confidence, right = np.array([0.65, 0.65, 0.65, 0.95, 1.0]), np.array([1, 0, 0, 1, 0], bool)
    assert calibration_error(confidence, right) == pytest.approx(
        3 / 5 * (0.65 - 1 / 3) + 2 / 5 * (0.975 - 1 / 2)
    )


def test_calibration_error_against_another_implementation():
    """The mean over bins that Guo et al. write, bin by bin."""
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.2, 1, 1000)
    right = rng.random(1000) < confidence**2
    expected = 0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected)


def answers(n, sureness, rng, copies=1):
    """The highest of eight probabilities, `sureness` times too sure, and right answers; then group (n,)."""
    logits = rng.normal(0, 2.5, (n // copies, 8))
    chance, said = (scipy.special.softmax(logits * factor, axis=1) for factor in (1, sureness))
    guess, row = said.argmax(1), np.arange(len(logits))
    parts = said[row, guess], rng.random(len(logits)) < chance[row, guess], row
    return [part.repeat(copies) for part in parts]


@pytest.mark.parametrize(
    "n, copies, sureness, truth",  # the last from 200,000 images
    [(72, 1, 1, 0), (72, 1, 1.5, 0.109), (72, 1, 3, 0.234), (72, 4, 1, 0), (1126, 1, 2, 0.168)],
)
def test_the_interval_of_the_calibration_error_holds_the_truth(n, copies, sureness, truth):
    """Of a calibrated model it begins at 0; copies of an image count as one."""
    rng, rows, measured = np.random.default_rng(2), [], []
    for _ in range(60):
        confidence, right, group = answers(n, sureness, rng, copies)
        rows.append(true_calibration_error(confidence, right, group))
        measured.append(calibration_error(confidence, right))
        assert rows[-1]["low"] <= rows[-1]["value"] <= rows[-1]["high"] <= 1
    table = pd.DataFrame(rows)
    inside = (table["low"] <= truth) & (truth <= table["high"])
    assert inside.mean() >= 0.9  # of 60, where 0.95 is meant
    assert abs(table["value"].median() - truth) < abs(np.median(measured) - truth)
    if not truth:
        assert (table["low"] == 0).mean() > 0.9 and min(measured) > 0.05


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_alike_do_not_make_the_calibration_certain(right):
    """All were sure and right: the other 3.7 in n that may be wrong cannot be excluded."""
    ends = true_calibration_error(np.full(60, 0.9999), np.full(60, right), np.arange(60))
    assert ends["low"] <= ends["value"] <= ends["high"]
    assert ends["high"] == pytest.approx(beta.ppf(0.975, 1, 60)) if right else ends["low"] > 0.9
    exact = true_calibration_error(np.ones(60), np.ones(60, bool), np.arange(60))
    assert exact == {"value": 0, "low": 0, "high": pytest.approx(beta.ppf(0.975, 1, 60))}


def test_groups_widen_the_interval_as_theory_says():
    """Ten equal frames per group are one observation: sqrt(10) times the width of 1,000 separate images."""
    right = np.repeat(np.random.default_rng(3).random(100) < 0.8, 10)
    width = {}
    for name, groups in (("images", np.arange(1000)), ("groups", np.repeat(np.arange(100), 10))):
        ends = score(*right_or_wrong(right), groups)["accuracy"]
        width[name] = ends["high"] - ends["low"]
    assert width["groups"] / width["images"] == pytest.approx(10**0.5, rel=0.15)


@pytest.mark.parametrize("groups", [5, 30])
def test_a_perfect_score_is_not_certain(groups):
    right, limit = np.arange(120) % 2 == 0, beta.ppf(0.025, groups, 1)
    group = np.arange(120) // 2 % groups  # both classes in each
    all_right = score(right.astype(int), np.eye(2)[right.astype(int)], group)
    assert all_right["accuracy"] == {"value": 1, "low": pytest.approx(limit), "high": 1}
    all_wrong = score(right.astype(int), np.eye(2)[(~right).astype(int)], group)
    limit = beta.ppf(0.975, 1, groups)
    assert all_wrong["accuracy"] == {"value": 0, "low": 0, "high": pytest.approx(limit)}


@pytest.mark.parametrize("metric", METRICS)
def test_no_metric_is_certain_of_a_perfect_score(metric):
    """Rounding must not hide it: sqrt(x) * sqrt(x) is not x. All wrong, the MCC is -1 / (classes - 1)."""
    for classes, n in ((2, 60), (3, 60), (8, 80)):
        labels = np.arange(n) % classes
        ends = score(labels, np.eye(classes)[labels], np.arange(n))[metric]
        rest = 1 - beta.ppf(0.025, n, 1)
        rest *= classes / (classes - 1) if metric == "mcc" else 1
        assert ends["value"] == ends["high"] == 1 and ends["low"] <= 1 - rest + 1e-12
        rarest = (1 - beta.ppf(0.025, n // classes, 1)) / classes  # what a class could lack, of the mean
        assert ends["low"] == pytest.approx(1 - max(rest, rarest), abs=0.02)


@pytest.mark.parametrize("metric", ["macro_recall", "macro_f1", "macro_precision", "mcc", "macro_auroc"])
def test_a_macro_score_is_not_more_certain_than_its_rarest_class(metric):
    """All right, but two positives in 37 images: the recall of the positive ones could be 0.158."""
    labels = np.arange(37) >= 35
    truth = labels.astype(int), np.eye(2)[labels.astype(int)], np.arange(37)
    ends = (score(*truth) | discriminate(*truth)["macro"])[metric]
    low = beta.ppf(0.025, 2, 1)
    precision = 35 / (35 + 2 * (1 - low))  # of the others, which get what the rare class loses
    worst = {
        "macro_recall": (1 + low) / 2,
        "macro_f1": (2 * low / (1 + low) + 2 * precision / (1 + precision)) / 2,
        "macro_precision": (1 + precision) / 2,
        "mcc": np.sqrt(low * precision),  # sqrt(TPR + TNR - 1) sqrt(PPV + NPV - 1)
        "macro_auroc": (1 + np.sqrt(low)) / 2,
    }
    assert ends["value"] == ends["high"] == 1 and ends["low"] <= worst[metric] + 1e-9


def test_a_class_of_one_group_leaves_the_macro_score_open():
    """Nothing is known of it: it may be all wrong or, if it is, all right."""
    labels, group = np.repeat([0, 1], [50, 10]), np.append(np.arange(50), [50] * 10)
    for right, ends in ((True, ("low", 0.5)), (False, ("high", 1.0))):
        guesses = np.where(labels == 1, int(right), 0)
        found = score(labels, np.eye(2)[guesses] * 0.8 + 0.1, group)["macro_recall"]
        assert found["value"] == (1 if right else 0.5)
        assert found[ends[0]] <= ends[1] if right else found[ends[0]] == pytest.approx(1)


def test_intervals_are_the_same_at_every_run():
    truth = *truth_of(TABLE, ["a", "b", "c"]), ALONE.to_numpy()
    assert score(*truth) == score(*truth)
    assert list(score(*truth)) == NAMES  # in this order, too


def test_classes_worked_out_by_hand():
    names, table = ["a", "b", "c", "never"], TABLE.assign(p_never=0.0)
    ranks = discriminate(*truth_of(table, names), ALONE.to_numpy())
    classes = score_classes(table, ALONE, names, ranks)
    row = classes["a"]
    assert {name: row[name] for name in ("precision", "recall", "specificity", "f1", "n", "groups")} == {
        "precision": 3 / 4, "recall": 3 / 4, "specificity": 5 / 6, "f1": 3 / 4, "n": 4, "groups": 4,
    }  # fmt: skip
    # 3 of 4, each alone: variance 4/3 * (3/16) / 4 = 1/16, as of 3 images; as many groups: the same t
    assert row["recall_low"] == pytest.approx(beta.ppf(0.025, 3 * 3 / 4, 3 / 4 + 1))
    assert row["recall_high"] == pytest.approx(beta.ppf(0.975, 3 * 3 / 4 + 1, 3 / 4))
    assert classes["b"]["specificity"] == pytest.approx(5 / 6)
    row = classes["c"]
    assert row["precision"] == pytest.approx(2 / 3) and row["f1"] == pytest.approx(4 / 5)
    assert (row["recall"], row["specificity"], row["n"], row["groups"]) == (1, 7 / 8, 2, 2)
    assert row["recall_low"] == pytest.approx(beta.ppf(0.025, 2, 1)) and row["recall_high"] == 1
    assert classes["never"] == {"precision": 0, "recall": 0, "specificity": 1, "f1": 0, "n": 0}
    assert list(classes["a"])[:5] == ["precision", "recall", "specificity", "f1", "n"]
    assert type(classes["a"]["n"]) is int
    ranks = ["auroc", "auroc_low", "auroc_high"]
    ranks += ["average_precision", "average_precision_low", "average_precision_high"]
    assert all(0 <= classes["b"][name] <= 1 for name in ranks)


def test_temperature_is_taken_off_and_put_on_again():
    logits = np.random.default_rng(0).normal(0, 4, (50, 3))
    softmax = torch.tensor(logits).softmax(-1).numpy()
    cooler = torch.tensor(logits / 2.5).softmax(-1).numpy()
    assert np.allclose(temper(softmax, 2.5), cooler) and np.allclose(temper(cooler, 1 / 2.5), softmax)


def test_calibration_before_and_after_and_coverage():
    """Twice as sure as it should be: after the temperature 2 the error is gone; the certain are right."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5000, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    after = torch.tensor(logits).softmax(-1).numpy()
    result = calibration(labels, after, np.arange(5000), 2.0)
    before = torch.tensor(logits * 2).softmax(-1).numpy()
    assert result["temperature"] == 2 and result["ece_after"] < 0.02 < 0.08 < result["ece_before"]
    measured = calibration_error(before.max(1), before.argmax(1) == labels)
    assert measured - 0.005 < result["ece_before"] < measured  # chance adds little to 5,000 images
    assert result["ece_after"] == score(labels, after, np.arange(5000))["ece"]["value"]
    certain = np.argsort(after.max(1))[500:]
    expected = (after.argmax(1) == labels)[certain].mean()
    assert result["accuracy_at_90_percent_coverage"] == pytest.approx(expected)


def test_metric_needs_no_network_and_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = Classification(keep_in_memory=True)
    for _ in range(2):
        assert metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"] == pytest.approx(2 / 3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_group_has_no_interval():
    """It says nothing of others: all that is possible is."""
    result = score(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]), np.zeros(3, int))
    assert result["accuracy"] == {"value": pytest.approx(2 / 3), "low": 0.0, "high": 1.0}
    assert (result["mcc"]["low"], result["mcc"]["high"]) == (-1.0, 1.0)
    assert (result["ece"]["low"], result["ece"]["high"]) == (0.0, 1.0)
    never = metrics.log_loss([1], [[1.0, 0.0]], labels=[0, 1])  # the worst that scikit-learn knows
    assert (result["log_loss"]["low"], result["log_loss"]["high"]) == (0.0, pytest.approx(never))


@pytest.mark.parametrize("classes, shown", [(2, 2), (23, 23), (200, 40), (1000, 40)])
def test_classes_and_confusions_of_a_long_list_are_the_worst(classes, shown):
    """Class n is taken for the next one n % 7 times of 9; the first is not tested."""
    names, labels = [f"class {n:04}" for n in range(classes)], np.repeat(np.arange(1, classes), 9)
    wrong = np.tile(np.arange(9), classes - 1) < labels % 7
    guesses = np.where(wrong, (labels + 1) % classes, labels)
    table = pd.DataFrame({"file": range(len(labels)), "label": np.array(names)[labels]})
    table = table.assign(prediction=np.array(names)[guesses])
    per_class = score_classes(table, pd.Series(table["file"]), names, {})
    worst = worst_classes(per_class)
    recalls = [per_class[name]["recall"] for name in worst]
    assert len(worst) == shown and (worst == names or recalls == sorted(recalls))
    assert recalls[0] == (0 if classes <= shown else pytest.approx(3 / 9))
    pairs = confusions(table)
    assert len(pairs) == sum(np.arange(1, classes) % 7 > 0) and pairs["images"].sum() == wrong.sum()
    assert pairs["share"].iloc[0] == pytest.approx(min(6, classes - 1) / 9)


def test_a_thousand_classes_are_scored_in_a_fraction_of_the_time_of_scikit_learn():
    """Measured: a tenth, with the intervals over groups and what they need."""
    rng = np.random.default_rng(0)
    labels, chances = rng.integers(0, 1000, 1000), rng.dirichlet(np.ones(1000), 1000)
    start, seen = time.process_time(), np.unique(labels)
    ranks = discriminate(labels, chances, np.arange(1000))
    ours, start = time.process_time() - start, time.process_time()
    kinds = {"auroc": metrics.roc_auc_score, "average_precision": metrics.average_precision_score}
    for name, measure in kinds.items():
        values = [measure(labels == label, chances[:, label]) for label in seen[:20]]
        assert [ranks[label][name]["value"] for label in seen[:20]] == pytest.approx(values, abs=1e-12)
    assert ours < (time.process_time() - start) * len(seen) / 20 / 2
