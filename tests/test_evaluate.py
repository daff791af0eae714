"""Step 8: the numbers, checked by hand and against the predictions they come from."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from scipy.stats import beta, bootstrap
from sklearn import metrics
from transformers import ViTImageProcessor

from finetune_vit import (
    METRICS,
    build_trainer,
    calculate,
    calibration,
    calibration_error,
    classification_metric,
)
from finetune_vit import cover_shortcuts, intervals, load_model, predict, read_settings, score, score_classes
from finetune_vit import summarise, temper

# true a: 3 right, 1 called b; true b: 2 right, 1 called a, 1 called c; true c: 2 right
TRUTH = list("aaaabbbbcc")
GUESS = list("aaabbbaccc")
TABLE = pd.DataFrame({"file": range(10), "label": TRUTH, "prediction": GUESS})
TABLE = pd.concat([TABLE, (pd.get_dummies(TABLE["prediction"]) * 0.7 + 0.1)], axis=1)
ALONE = pd.Series(range(10), range(10))  # every image its own group


def test_scores_worked_out_by_hand():
    scores = score(TABLE, ALONE, ["a", "b", "c"])
    assert scores["accuracy"]["value"] == pytest.approx(0.7)
    precision, recall = np.array([3 / 4, 2 / 3, 2 / 3]), np.array([3 / 4, 2 / 4, 2 / 2])
    f1 = 2 * precision * recall / (precision + recall)
    for average, weight in (("macro", np.array([1, 1, 1]) / 3), ("weighted", np.array([4, 4, 2]) / 10)):
        assert scores[f"{average}_precision"]["value"] == pytest.approx(precision @ weight)
        assert scores[f"{average}_recall"]["value"] == pytest.approx(recall @ weight)
        assert scores[f"{average}_f1"]["value"] == pytest.approx(f1 @ weight)
    # Gorodkin 2004: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)); c 7, s 10, p 4 3 3, t 4 4 2
    assert scores["mcc"]["value"] == pytest.approx((70 - 34) / ((100 - 34) * (100 - 36)) ** 0.5)
    assert scores["ece"]["value"] == pytest.approx(0.8 - 0.7)  # all probabilities are 0.8
    assert list(scores) == [*METRICS, "ece"] and all(
        set(row) == {"value", "low", "high"} for row in scores.values()
    )


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
    found = calculate(labels, probabilities[rows])
    assert {name: found[name] for name in METRICS} == pytest.approx(expected)


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


def test_intervals_are_scipys_bootstrap_where_every_image_is_a_group():
    right = np.random.default_rng(2).random(400) < 0.9
    ours = intervals(lambda rows: {"accuracy": right[rows].mean()}, np.arange(400))["accuracy"]
    theirs = bootstrap(
        (right,), np.mean, method="percentile", n_resamples=20_000, random_state=0
    ).confidence_interval
    assert ours["value"] == right.mean()
    assert ours["low"] == pytest.approx(theirs.low, abs=0.005)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.005)


def test_groups_widen_the_interval_as_theory_says():
    """Ten equal frames a group are one observation: sqrt(10) times the width of 1,000 separate images."""
    right = np.repeat(np.random.default_rng(3).random(100) < 0.8, 10)
    width = {}
    for name, groups in (("images", np.arange(1000)), ("groups", np.repeat(np.arange(100), 10))):
        ends = intervals(lambda rows: {"accuracy": right[rows].mean()}, groups)["accuracy"]
        width[name] = ends["high"] - ends["low"]
    assert width["groups"] / width["images"] == pytest.approx(10**0.5, rel=0.15)


@pytest.mark.parametrize("groups", [5, 30])
def test_a_perfect_score_is_not_certain(groups):
    ends = intervals(lambda rows: {"all": 1.0, "none": 0.0}, np.arange(90) % groups)
    assert ends["all"] == {"value": 1, "low": pytest.approx(beta.ppf(0.025, groups, 1)), "high": 1}
    assert ends["none"] == {"value": 0, "low": 0, "high": pytest.approx(beta.ppf(0.975, 1, groups))}


def test_intervals_are_the_same_at_every_run():
    assert score(TABLE, ALONE, ["a", "b", "c"]) == score(TABLE, ALONE, ["a", "b", "c"])


def test_classes_worked_out_by_hand():
    classes = score_classes(TABLE, ALONE, ["a", "b", "c", "never"])
    ends = {"recall_low": pytest.approx(0.25, abs=0.01), "recall_high": 1, "groups": 4}
    assert (
        classes["a"]
        == {"precision": 3 / 4, "recall": 3 / 4, "specificity": 5 / 6, "f1": 3 / 4, "n": 4} | ends
    )
    assert classes["b"]["specificity"] == pytest.approx(5 / 6)
    ends = {"recall_low": pytest.approx(beta.ppf(0.025, 2, 1)), "recall_high": 1, "groups": 2}
    row = {
        "precision": pytest.approx(2 / 3),
        "recall": 1.0,
        "specificity": 7 / 8,
        "f1": pytest.approx(4 / 5),
        "n": 2,
    }
    assert classes["c"] == row | ends
    assert classes["never"] == {"precision": 0, "recall": 0, "specificity": 1, "f1": 0, "n": 0}
    assert list(classes["a"])[:5] == ["precision", "recall", "specificity", "f1", "n"]
    assert type(classes["a"]["n"]) is int


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
    result = calibration(labels, after, 2.0)
    before = torch.tensor(logits * 2).softmax(-1).numpy()
    assert result["temperature"] == 2 and result["ece_after"] < 0.02 < 0.08 < result["ece_before"]
    assert result["ece_before"] == pytest.approx(calibration_error(before.max(1), before.argmax(1) == labels))
    certain = np.argsort(after.max(1))[500:]
    expected = (after.argmax(1) == labels)[certain].mean()
    assert result["accuracy_at_90_percent_coverage"] == pytest.approx(expected)


def test_metric_needs_no_network_and_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = classification_metric()
    for _ in range(2):
        assert metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"] == pytest.approx(2 / 3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def splits():
    names = ["a", "001", "NA"]  # as hard to keep in a CSV file as class names get
    types = {"file": Value("string"), "label": ClassLabel(names=names), "pixel_values": Value("binary")}
    rows = {"file": [f"x/{i}.jpg" for i in range(6)], "label": [0, 1, 2] * 2, "pixel_values": [b""] * 6}
    part = Dataset.from_dict(rows, features=Features(types))
    return DatasetDict(train=part, validation=part, test=part)


class Stand:
    """What `predict` needs of a Trainer; counts how often each split is read."""

    def __init__(self, output_dir):
        self.args, self.reads = SimpleNamespace(output_dir=str(output_dir)), []
        self.state = SimpleNamespace(log_history=[{"train_images": 30, "train_seconds": 2.0}] * 2)

    def predict(self, inputs, metric_key_prefix):
        self.reads.append(metric_key_prefix)
        logits = torch.eye(3)[[0, 1, 1] * 2].numpy() * 3
        return SimpleNamespace(predictions=logits, label_ids=np.array(inputs["label"]), metrics={})

    def save_metrics(self, name, metrics):
        pass


def test_each_split_is_predicted_once(tmp_path, splits):
    path, trainer = tmp_path / "predictions.csv", Stand(tmp_path)
    first = predict(trainer, splits, ("validation", "test"), path)
    again = predict(trainer, splits, ("validation", "test"), path)
    assert trainer.reads == ["validation", "test"]
    assert predict(trainer, splits, ("validation", "test", "train"), path)["split"].nunique() == 3
    assert trainer.reads == ["validation", "test", "train"]
    for table in (first, again):
        assert list(table.columns) == ["file", "split", "label", "prediction", "a", "001", "NA"]
        assert table["label"].tolist() == ["a", "001", "NA"] * 4
        assert table["prediction"].tolist() == ["a", "001", "001"] * 4
    probabilities = again.iloc[:, 4:].to_numpy(float)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert probabilities[0, 0] == pytest.approx(np.exp(3) / (np.exp(3) + 2), rel=1e-6)


@pytest.mark.parametrize("damage", ["rows lost", "rows twice", "a file of another set"])
def test_predictions_that_are_not_of_these_images_are_made_again(tmp_path, splits, damage):
    path = tmp_path / "predictions.csv"
    first = predict(Stand(tmp_path), splits, ("validation", "test"), path)
    rows, trainer = first.to_csv(index=False).splitlines(), Stand(tmp_path)
    rows = {"rows lost": rows[:-2], "rows twice": rows + rows[-1:]}.get(damage, [*rows[:-1], "y" + rows[-1]])
    path.write_text("\n".join(rows))
    again = predict(trainer, splits, ("validation", "test"), path)
    assert trainer.reads == ["test"]
    pd.testing.assert_frame_equal(again, first)
    pd.testing.assert_frame_equal(predict(trainer, splits, ("validation", "test"), path), first)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "cannot read .*predictions.csv: No columns"), (b"\xff\xfe\x00", "cannot read"),
     (b"file,split,label,prediction,a,001\n", "has no column NA"), (b'a\n"b', "cannot read")],
)  # fmt: skip
def test_a_damaged_table_is_one_line_with_the_way_out(tmp_path, splits, content, message):
    (tmp_path / "predictions.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=f"{message}.*; delete it, and it is made again") as stopped:
        predict(Stand(tmp_path), splits, ("validation", "test"), tmp_path / "predictions.csv")
    assert "\n" not in str(stopped.value)


@pytest.fixture
def measured(tmp_path, tiny_vit):
    """A trainer with an untrained model, splits of 12 black images with one grey corner, and their groups."""
    pixels = np.zeros((12, 3, 32, 32), np.uint8)
    for row in range(12):  # the class is where the corner is
        y, x = [(0, 0), (28, 0), (28, 28)][row % 3]
        pixels[row, :, y : y + 4, x : x + 4] = 200 + row
    types = {
        "file": Value("string"),
        "label": ClassLabel(names=["a", "b", "c"]),
        "pixel_values": Value("binary"),
    }
    files = [f"x/{row}.jpg" for row in range(12)]
    rows = {"file": files, "label": [0, 1, 2] * 4, "pixel_values": [picture.tobytes() for picture in pixels]}
    part = Dataset.from_dict(rows, features=Features(types))
    splits = DatasetDict(train=part, validation=part, test=part)
    splits["train"] = part.map(lambda row: row, cache_file_name=str(tmp_path / "pixels.arrow"))
    processor = ViTImageProcessor.from_pretrained(tiny_vit)
    flags = ["--data_dir", str(tiny_vit), "--output_dir", str(tmp_path / "model"), "--report_to", "none"]
    settings, training = read_settings([*flags, "--bf16", "false"])
    model = load_model(str(tiny_vit), ["a", "b", "c"], processor, 0)
    trainer = build_trainer(model, splits, processor, settings, training)
    return trainer, splits, pd.Series(np.arange(12) // 2, files)


def test_shortcuts_are_painted_black_and_nothing_else(measured):
    trainer, splits, _ = measured
    seen = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].clone()), with_kwargs=True
    )
    handles = len(trainer.model._forward_pre_hooks)
    table = cover_shortcuts(trainer, splits["test"])
    hook.remove()
    assert list(table) == ["lower left corner", "lower right corner", "border, one eighth"]
    assert len(trainer.model._forward_pre_hooks) == handles - 1  # what was hooked in is gone again
    black = -trainer.model.pixel_mean / trainer.model.pixel_std
    left, right, border = ((part != black).any(1) for part in seen)
    whole = torch.zeros(12, 32, 32, dtype=bool)
    for row, (y, x) in enumerate([(0, 0), (28, 0), (28, 28)] * 4):
        whole[row, y : y + 4, x : x + 4] = True
    assert not border.any()
    assert left.any((1, 2)).tolist() == [True, False, True] * 4
    assert right.any((1, 2)).tolist() == [True, True, False] * 4
    assert torch.equal(left[::3], whole[::3]) and torch.equal(right[1::3], whole[1::3])
    assert torch.equal(left[2::3], whole[2::3]) and torch.equal(right[::3], whole[::3])
    for scores in table.values():
        assert set(scores) == {"accuracy", "macro_f1"} and 0 <= scores["accuracy"] <= 1


def test_metrics_json_has_the_documented_shape(tmp_path, measured):
    trainer, splits, groups = measured
    folder = tmp_path / "model"
    record = {"settings": {"split_by": "random"}, "training": {"seed": 42}}
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(record))
    (tmp_path / "pixels.json").write_text('{"images_per_second": 240.0}')
    trainer.state.log_history = [{"train_images": 30, "train_seconds": 2.0}] * 2
    pairs = pd.DataFrame({"file_a": ["x/0.jpg"], "file_b": ["x/1.jpg"], "label_a": ["a"], "label_b": ["b"]})
    path = folder / "report" / "metrics.json"
    predictions = predict(trainer, splits, ("validation", "test"), folder / "report" / "predictions.csv")
    results = summarise(predictions, pairs, groups, splits, trainer, path)
    assert json.loads(path.read_text()) == results
    right = (predictions["label"] == predictions["prediction"])[predictions["split"] == "test"]
    assert results["test"]["accuracy"]["value"] == pytest.approx(right.mean())
    assert set(results["test"]["ece"]) == {"value", "low", "high"}
    assert set(results["per_class"]) == {"a", "b", "c"} and "train" not in results
    assert results["split"] == {
        "by": "random", "train": 12, "validation": 12, "test": 12, "groups": 6, "near_duplicate_pairs": 1,
        "pairs_across_splits": 0, "pairs_across_test": 0, "conflicting_label_pairs": 1,
        "classes": dict.fromkeys(("train", "validation", "test"), {"a": 4, "b": 4, "c": 4}),
    }  # fmt: skip
    assert results["calibration"]["temperature"] == 1 and len(results["shortcuts"]) == 4
    speed = results["speed"]
    assert speed["train_images_per_second"] == 15 and speed["prepare_images_per_second"] == 240
    assert speed["evaluate_images_per_second"] > 0 and speed["peak_memory_bytes"] > 1e8
    assert results["settings"]["seed"] == 42 and "torch" in results["versions"]
    path.write_text(json.dumps(results | {"mark": "found again"}))
    assert summarise(predictions, pairs, groups, splits, trainer, path)["mark"] == "found again"
