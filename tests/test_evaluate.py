"""Step 8: the numbers, checked by hand and against the predictions they come from."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from finetune_vit import Classification, predict, score, score_classes, summarise

# true a: 3 right, 1 called b; true b: 2 right, 1 called a, 1 called c; true c: 2 right
TRUTH = list("aaaabbbbcc")
GUESS = list("aaabbbaccc")
TABLE = pd.DataFrame({"label": TRUTH, "prediction": GUESS})


def test_scores_worked_out_by_hand():
    scores = score(TABLE, ["a", "b", "c"])
    assert scores["accuracy"]["value"] == pytest.approx(0.7)
    precision, recall = np.array([3 / 4, 2 / 3, 2 / 3]), np.array([3 / 4, 2 / 4, 2 / 2])
    f1 = 2 * precision * recall / (precision + recall)
    for average, weight in (("macro", np.array([1, 1, 1]) / 3), ("weighted", np.array([4, 4, 2]) / 10)):
        assert scores[f"{average}_precision"]["value"] == pytest.approx(precision @ weight)
        assert scores[f"{average}_recall"]["value"] == pytest.approx(recall @ weight)
        assert scores[f"{average}_f1"]["value"] == pytest.approx(f1 @ weight)
    # Gorodkin 2004: (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)); c 7, s 10, p 4 3 3, t 4 4 2
    assert scores["mcc"]["value"] == pytest.approx((70 - 34) / ((100 - 34) * (100 - 36)) ** 0.5)


def test_interval_is_wilsons():
    z, n, p = 1.959964, 10, 0.7
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    accuracy = score(TABLE, ["a", "b", "c"])["accuracy"]
    assert accuracy["low"] == pytest.approx((centre - half) / (1 + z**2 / n), abs=1e-6)
    assert accuracy["high"] == pytest.approx((centre + half) / (1 + z**2 / n), abs=1e-6)


def test_classes_worked_out_by_hand():
    classes = score_classes(TABLE, ["a", "b", "c", "never"])
    assert classes["a"] == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 4, "specificity": 5 / 6, "f1": 3 / 4, "n": 4}
    )
    assert classes["b"]["specificity"] == pytest.approx(5 / 6)
    assert classes["c"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1.0, "specificity": 7 / 8, "f1": 4 / 5, "n": 2}
    )
    assert classes["never"] == {"precision": 0, "recall": 0, "specificity": 1, "f1": 0, "n": 0}
    assert list(classes["a"]) == ["precision", "recall", "specificity", "f1", "n"]
    assert type(classes["a"]["n"]) is int


def test_metric_needs_no_network_and_no_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    metric = Classification(keep_in_memory=True, cache_dir=str(tmp_path))
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


def test_metrics_json_has_the_documented_shape(tmp_path, splits):
    settings = {"settings": {"split_by": "random"}, "training": {"seed": 42}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    splits["train"] = splits["train"].map(lambda row: row, cache_file_name=str(tmp_path / "pixels.arrow"))
    (tmp_path / "pixels.json").write_text('{"images_per_second": 240.0}')
    (tmp_path / "all_results.json").write_text('{"test_samples_per_second": 55.0}')
    path, trainer = tmp_path / "report" / "metrics.json", Stand(tmp_path)
    predictions = predict(trainer, splits, ("validation", "test"), tmp_path / "report" / "predictions.csv")
    results = summarise(predictions, splits, trainer, path)
    assert json.loads(path.read_text()) == results
    assert results["test"]["accuracy"]["value"] == pytest.approx(4 / 6)
    assert set(results["per_class"]) == {"a", "001", "NA"} and "train" not in results
    assert results["split"] == {"by": "random", "train": 6, "validation": 6, "test": 6}
    speed = results["speed"]
    assert speed["train_images_per_second"] == 15 and speed["prepare_images_per_second"] == 240
    assert speed["evaluate_images_per_second"] == 55 and speed["peak_memory_bytes"] > 1e8
    assert results["settings"]["seed"] == 42 and "torch" in results["versions"]
    path.write_text(json.dumps(results | {"mark": "found again"}))
    assert summarise(predictions, splits, trainer, path)["mark"] == "found again"
