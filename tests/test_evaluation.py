"""Step 8: predictions are made once, and metrics.json says what they are worth."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import read_settings, story
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import ViTImageProcessor

from steps.duplicates import Scenes
from steps.evaluation import cover_shortcuts, measure, predict, show_results, summarise, warnings_of
from steps.files import write_json
from steps.preprocess import Collator
from steps.scores import compute_metrics, truth_of
from steps.settings import for_trainer


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
        self.classes = 3
        self.state = SimpleNamespace(log_history=[{"train_images": 30, "train_seconds": 2.0}] * 2)

    def predict(self, inputs, metric_key_prefix):
        self.reads.append(metric_key_prefix)
        rows = [0, 1, 1] * 2 if self.classes == 3 else [*range(self.classes)]
        logits = torch.eye(self.classes)[rows].numpy() * 3
        return SimpleNamespace(predictions=logits, label_ids=np.array(inputs["label"]), metrics={})


def test_each_split_is_predicted_once(tmp_path, splits):
    path, trainer = tmp_path / "predictions.csv", Stand(tmp_path)
    first = predict(trainer, splits, ("validation", "test"), path)
    again = predict(trainer, splits, ("validation", "test"), path)
    assert trainer.reads == ["eval", "test"]
    assert predict(trainer, splits, ("validation", "test", "train"), path)["split"].nunique() == 3
    assert trainer.reads == ["eval", "test", "eval_train"]
    for table in (first, again):
        assert list(table.columns) == ["file", "split", "label", "prediction", "p_a", "p_001", "p_NA"]
        assert table["label"].tolist() == ["a", "001", "NA"] * 4
        assert table["prediction"].tolist() == ["a", "001", "001"] * 4
    probabilities = again.iloc[:, 4:].to_numpy(float)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert probabilities[0, 0] == pytest.approx(np.exp(3) / (np.exp(3) + 2), rel=1e-6)


def test_no_class_is_called_like_a_column(tmp_path):
    """Its probabilities are in a column with a prefix; and names may hold what ends a line or a cell."""
    names = ["file", "self", "prediction", "label", "split", "error", "p_a", "a", "a\r", "b,\n", '"c"', "ü|"]
    types = Features({"file": Value("string"), "label": ClassLabel(names=names)})
    part = Dataset.from_dict({"file": [f"{name}/1\t\r.jpg" for name in names], "label": names}, types)
    splits = DatasetDict(test=part.add_column("pixel_values", [b""] * len(names)))
    trainer, path = Stand(tmp_path), tmp_path / "predictions.csv"
    trainer.classes = len(names)
    for table in (predict(trainer, splits, ["test"], path), predict(trainer, splits, ["test"], path)):
        assert table.columns[4:].tolist() == [f"p_{name}" for name in names]
        assert table["label"].tolist() == table["prediction"].tolist() == names
        assert table["file"].tolist() == part["file"][:]
        labels, probabilities = truth_of(table, names)
        assert labels.tolist() == probabilities.argmax(1).tolist() == [*range(len(names))]
    assert trainer.reads == ["test"]


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
     (b"file,split,label,prediction,p_a,p_001\n", "has no column p_NA"), (b'a\n"b', "cannot read")],
)  # fmt: skip
def test_a_damaged_table_is_one_line_with_the_way_out(tmp_path, splits, content, message):
    (tmp_path / "predictions.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=f"{message}.*; delete it, and it is made again") as stopped:
        predict(Stand(tmp_path), splits, ("validation", "test"), tmp_path / "predictions.csv")
    assert "\n" not in str(stopped.value)


@pytest.fixture
def measured(tmp_path, tiny_vit):
    """A Trainer with an untrained model, splits of 12 black images with one grey corner, and their scenes."""
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
    flags = ["--data_dir", tiny_vit, "--output_dir", tmp_path / "model", "--report_to", "none"]
    settings, training = read_settings([*flags, "--bf16", "false", "--seed", "0"])
    names = {"settings": settings, "training": training, "processor": processor}
    model, _ = story(**names, class_names=["a", "b", "c"])["make_model"](str(tiny_vit))
    trainer = transformers.Trainer(
        model=model,
        args=for_trainer(training, 12, settings),
        train_dataset=part,
        eval_dataset=part,
        data_collator=Collator((3, 32, 32)),
        compute_metrics=compute_metrics,
        processing_class=processor,
    )
    pairs = pd.DataFrame({"file_a": ["x/0.jpg"], "file_b": ["x/1.jpg"], "label_a": ["a"], "label_b": ["b"]})
    return trainer, splits, Scenes(pairs, pd.Series(np.arange(12) // 2, files))


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
    trainer, splits, scenes = measured
    folder = tmp_path / "model"
    data = {"name": "images", "kvasir": False, "endoscopy": False}
    settings = {"split_by": "random", "split_otherwise": "near-duplicates"}
    record = {"settings": settings, "training": {"seed": 42}, "data": data}
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(record))
    (tmp_path / "pixels.json").write_text('{"images_per_second": 240.0}')
    trainer.state.log_history = [{"train_images": 30, "train_seconds": 2.0}] * 2
    path = folder / "report" / "metrics.json"
    predictions = predict(trainer, splits, ("validation", "test"), folder / "report" / "predictions.csv")
    results = summarise(predictions, splits, scenes, trainer)
    assert json.loads(path.read_text()) == results
    right = (predictions["label"] == predictions["prediction"])[predictions["split"] == "test"]
    assert results["test"]["accuracy"]["value"] == pytest.approx(right.mean())
    assert set(results["test"]["ece"]) == {"value", "low", "high"}
    assert set(results["per_class"]) == {"a", "b", "c"} and "train" not in results
    assert results["split"] == {
        "by": "random", "train": 12, "validation": 12, "test": 12, "groups": 6, "near_duplicate_pairs": 1,
        "pairs_across_splits": 0, "pairs_across_test": 0, "conflicting_label_pairs": 1, "test_groups": 6,
        "classes": dict.fromkeys(("train", "validation", "test"), {"a": 4, "b": 4, "c": 4}),
    }  # fmt: skip
    assert results["most_frequent"] == {"class": "a", "accuracy": pytest.approx(1 / 3)}
    assert results["warnings"] == warnings_of(results) and "operating_points" not in results
    assert set(results["test"]) == set(results["validation"]) > {"macro_auroc", "macro_average_precision"}
    assert results["calibration"]["temperature"] == 1 and len(results["shortcuts"]) == 4
    speed = results["speed"]
    assert speed["train_images_per_second"] == 15 and speed["prepare_images_per_second"] == 240
    assert speed["evaluate_images_per_second"] > 0 and speed["peak_memory_bytes"] > 1e8
    assert results["settings"]["seed"] == 42 and "torch" in results["versions"]
    assert (
        results["data"] == data | {"left_out": 0}
        and results["made"] == "evaluated"
        and "chosen_epoch" not in results
    )
    path.write_text(json.dumps(results | {"mark": "found again"}))
    assert summarise(predictions, splits, scenes, trainer)["mark"] == "found again"
    (picture := path.with_name("roc.png")).touch()
    older = {"split": results["split"] | {"test": 7}, "test": {}, "versions": {"device": "that trained"}}
    path.write_text(json.dumps(results | older))
    again = summarise(predictions, splits, scenes, trainer)  # those were of other images
    assert again["test"] == results["test"] and not picture.exists()
    assert again["versions"] == older["versions"]


def summarised(measured, settings, training, log_history):
    """The content of metrics.json of a run with these settings and this history."""
    trainer, splits, scenes = measured
    folder = Path(trainer.args.output_dir)
    settings = {"split_by": None, "split_otherwise": "near-duplicates"} | settings
    record = {"settings": settings, "training": training, "data": {"name": "images"}}
    write_json(folder / "settings.json", record)
    trainer.state.log_history = log_history
    predictions = predict(trainer, splits, ("validation", "test"), folder / "report" / "predictions.csv")
    summarise(predictions, splits, scenes, trainer)
    return (folder / "report" / "metrics.json").read_text(encoding="utf-8")


def test_metrics_json_holds_no_path_of_this_machine(tmp_path, measured):
    private = tmp_path / "ward 7" / "patients.csv"
    settings = {
        "split_by": None, "split_otherwise": "near-duplicates", "metadata": str(private),
        "data_dir": str(private.parent), "data_root": "~/data",
        "external_dir": "../elsewhere", "predict": None, "test_size": 0.2, "class_weights": True,
        "arguments": ["--metadata", str(private), f"--data_dir={private.parent}", "--seed", "1"],
    }  # fmt: skip
    training = {"output_dir": str(tmp_path / "model"), "seed": 1, "run_name": "mine", "report_to": ["none"]}
    text = summarised(measured, settings, training, [{}])
    results = json.loads(text)
    assert results["split"]["by"] == "near-duplicates"  # the rule where none was asked for
    expected = settings | training | {
        "metadata": "patients.csv", "data_dir": "ward 7", "data_root": "data", "external_dir": "elsewhere",
        "output_dir": "model",
        "arguments": ["--metadata", "patients.csv", "--data_dir=ward 7", "--seed", "1"],
    }  # fmt: skip
    expected |= {"images_per_step": 1, "learning_rate": 1.41e-5}  # by the rule, for 12 images
    assert results["settings"] == expected
    assert str(tmp_path) not in text and str(Path.home()) not in text and ".." not in text and "~" not in text


def test_metrics_json_says_how_the_model_was_made_and_names_the_chosen_epoch(measured):
    trainer = measured[0]
    epochs = [{"epoch": 1.0, "step": 2, "eval_loss": 1.0}, {"epoch": 2.0, "step": 4, "eval_loss": 2.0}]
    path = Path(trainer.args.output_dir) / "report" / "metrics.json"
    trainer.state.epoch, trainer.state.best_global_step = 2.0, 2
    for history, made, chosen in (([{"ridge_strength": 1.0}], "probed", None), (epochs, "fine-tuned", 1.0)):
        results = json.loads(summarised(measured, {"split_by": "random"}, {}, history))
        assert results["made"] == made and results.get("chosen_epoch") == chosen
        path.unlink()
    trainer.args.load_best_model_at_end = False
    results = json.loads(summarised(measured, {"split_by": "random"}, {}, epochs))
    assert results["chosen_epoch"] == 2


def test_two_classes_have_thresholds_and_only_numbers_that_json_has():
    rng, names = np.random.default_rng(0), ["ill", "well"]
    table = pd.DataFrame({"file": range(80), "label": rng.choice(names, 80)})
    table["split"] = np.where(np.arange(80) < 40, "validation", "test")
    table["p_well"] = (0.3 * (table["label"] == "well") + 0.7 * rng.random(80)).round(2)
    table["p_ill"] = 1 - table["p_well"]
    table["prediction"] = np.where(table["p_well"] > 0.5, "well", "ill")
    parts = {name: part for name, part in table.groupby("split")}
    results = measure(parts, Scenes(pd.DataFrame(), pd.Series(np.arange(80) // 2)), names)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    points = results["operating_points"]
    assert points["positive"] == "well" and [point["at"] for point in points["points"]] == [0.9, 0.95] * 2
    assert results["most_frequent"]["accuracy"] == (parts["test"]["label"].value_counts().max() / 40)
    assert results["per_class"]["ill"]["auroc"] == pytest.approx(results["test"]["macro_auroc"]["value"])
    assert results["per_class"]["ill"]["auroc_low"] < results["per_class"]["ill"]["auroc"]


def doubtful(per_class, **split):
    """What `warnings_of` looks at: classes as {name: (images, groups)}; 60 groups, better than chance."""
    rows = {name: {"n": n, "groups": groups} if n else {"n": 0} for name, (n, groups) in per_class.items()}
    accuracy = {"value": 0.9, "low": 0.8, "high": 0.95}
    most = {"class": "many", "accuracy": 0.5}
    split = {"test_groups": 60, "pairs_across_test": 0} | split
    return {"per_class": rows, "split": split, "test": {"accuracy": accuracy}, "most_frequent": most}


def test_numbers_that_rest_on_much_have_no_warning():
    assert warnings_of(doubtful({"a": (10, 10), "b": (50, 20)}, patients=99, patients_across_test=0)) == []


@pytest.mark.parametrize(
    "per_class, split, expected",
    [
        ({"polyps": (2, 1), "b": (30, 10)}, {"patients": 70},
         ["polyps: 2 images of 1 patient decide its recall"]),
        ({"a": (1, 1), "b": (30, 10)}, {}, ["a: 1 image of 1 scene decides its recall"]),
        ({"a": (9, 9), "b": (30, 5)}, {},
         ["b: 30 images of 5 scenes decide its recall", "a: 9 images of 9 scenes decide its recall"]),
        ({"{a}": (0, 0), "b": (30, 10)}, {}, ["no image in the test, so nothing is known of: {a}"]),
        ({**{f"c{i}": (20 + i, 9 - i) for i in range(5)}, "b": (30, 10)}, {},
         ["5 of 6 classes rest on fewer than 10 scenes in the test: c4 (24 images of 5 scenes), "
          "c3 (23 images of 6 scenes), c2 (22 images of 7 scenes) and 2 more"]),
        ({"b": (30, 10)}, {"test_groups": 3, "patients": 9},
         ["the test rests on 3 patients: no interval is reliable"]),
        ({"b": (30, 10)}, {"pairs_across_test": 1},
         ["1 near-duplicate pair with one image in the test and one outside it: the scores are optimistic"]),
        ({"b": (30, 10)}, {"patients": 9, "patients_across_test": 2},
         ["2 patients with images in the test and outside it: the scores are optimistic"]),
    ],
)  # fmt: skip
def test_what_makes_numbers_doubtful_is_said(per_class, split, expected):
    assert warnings_of(doubtful(per_class, **split)) == expected


def test_an_accuracy_that_the_most_frequent_class_reaches_is_said():
    results = doubtful({"b": (30, 10)})
    results["most_frequent"]["accuracy"] = 0.8
    assert warnings_of(results) == ["accuracy 0.900 is not clearly above the 0.800 of always answering many"]
    results["most_frequent"]["accuracy"] = 1.0  # the test has no other class
    assert warnings_of(results) == []


def test_results_are_shown_with_their_warnings(caplog, capsys, measured):
    trainer, splits, _ = measured
    summarised(measured, {"split_by": "random"}, {}, [{}])
    path = Path(trainer.args.output_dir) / "report" / "metrics.json"
    with caplog.at_level("INFO"):
        show_results(json.loads(path.read_text()))
    lines = [line for line in caplog.messages if line.startswith("test accuracy")]
    assert len(lines) == 1 and lines[0].endswith("n = 12; always answering a: 0.333")
    assert any(line.startswith("test ece") and "chance" in line for line in caplog.messages)
    assert "warning: the test rests on 6 scenes: no interval is reliable" in caplog.messages
    assert "auroc" in capsys.readouterr().out
