"""Step 9: pictures that show what they should, and a card that the Hub understands and the run supports."""

import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from finetune_vit import (
    METRICS,
    attention_rollout,
    command_of,
    draw_class_bars,
    draw_confusion_matrix,
    draw_conflicts,
    draw_examples,
    draw_reliability,
    draw_training_curves,
    read_settings,
    write_report,
)

NAMES = ["dyed-lifted-polyps", "esophagitis", "polyps"]
HISTORY = [
    entry
    for epoch in (1.0, 2.0, 3.0)
    for entry in (
        {"epoch": epoch, "loss": 1 / epoch},
        {"epoch": epoch, "eval_loss": 1.1 / epoch, "eval_accuracy": 1 - 0.3 / epoch, "eval_macro_f1": 0.7},
    )
]
SHAPE = (3, 32, 32)


def predict_by_chance(names, n=60, right=0.7):
    """A table of test predictions, each class about as often, `right` of them right."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(len(names)), n)
    guesses = probabilities.argmax(1)
    labels = np.where(rng.random(n) < right, guesses, rng.integers(0, len(names), n))
    table = {"file": [f"x/{row}.jpg" for row in range(n)], "split": "test"}
    table |= {"label": np.array(names)[labels], "prediction": np.array(names)[guesses]}
    return pd.concat([pd.DataFrame(table), pd.DataFrame(probabilities, columns=names)], axis=1)


def pictures(n=60):
    pixels = np.random.default_rng(0).integers(0, 256, (n, *SHAPE), dtype=np.uint8)
    files = [f"x/{row}.jpg" for row in range(n)]
    return Dataset.from_dict(
        {"file": files, "pixel_values": [picture.tobytes() for picture in pixels]}
    ), pixels


@pytest.fixture
def results(tmp_path):
    score = {"value": 0.8765, "low": 0.8123, "high": 0.9321}
    row = {"precision": 0.9, "recall": 0.8, "recall_low": 0.7, "recall_high": 0.85, "specificity": 0.95,
           "f1": 0.85, "n": 10, "groups": 6}  # fmt: skip
    part = dict.fromkeys([*METRICS, "ece"], score) | {
        "accuracy": {"value": 0.9123, "low": 0.88, "high": 0.94}
    }
    settings, training = read_settings(["--output_dir", str(tmp_path), "--learning_rate", "3e-5"])
    split = {"by": "near-duplicates", "train": 140, "validation": 30, "test": 30, "groups": 150}
    split |= {
        "near_duplicate_pairs": 60,
        "pairs_across_splits": 0,
        "pairs_across_test": 0,
        "conflicting_label_pairs": 7,
    }
    split["classes"] = dict.fromkeys(("train", "validation", "test"), dict.fromkeys(NAMES, 21))
    calibration = {"temperature": 1.234, "ece_before": 0.0987, "ece_after": 0.0456}
    return {
        "made": "fine-tuned", "test": part,
        "validation": part, "per_class": dict.fromkeys(NAMES, row), "split": split,
        "calibration": calibration | {"accuracy_at_90_percent_coverage": 0.9777},
        "shortcuts": {"nothing": {"accuracy": 0.9123, "macro_f1": 0.87}},
        "speed": {"train_images_per_second": 12.34, "train_seconds": 567.0, "evaluate_images_per_second": 89},
        "settings": vars(settings) | training.to_dict(),
        "versions": {"torch": "2.13.0", "device": "a test machine"},
    }  # fmt: skip


@pytest.fixture
def report(tmp_path, tiny_vit, results):
    """Return a function that writes the report into tmp_path and returns the card."""
    model = ViTForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        processing_class=ViTImageProcessor.from_pretrained(tiny_vit),
        model=FloatModel(model), state=SimpleNamespace(log_history=HISTORY),
    )  # fmt: skip
    conflict = {
        "file_a": ["x/1.jpg"],
        "file_b": ["x/2.jpg"],
        "distance": [0.01],
        "label_a": ["a"],
        "label_b": ["b"],
    }

    def write(results=results, folder="my-images", predictions=None, history=HISTORY, pairs=conflict):
        trainer.state.log_history = history
        predictions = predict_by_chance(NAMES) if predictions is None else predictions
        write_report(results, predictions, pd.DataFrame(pairs), pictures()[0], trainer, tmp_path / folder)
        return ModelCard.load(tmp_path / "README.md")

    return write


def FloatModel(model):
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"pixel_values": kwargs["pixel_values"] / 255.0}),
        with_kwargs=True,
    )
    return model


@pytest.mark.parametrize("folder, kvasir", [("kvasir-dataset-v2", True), ("my-images", False)])
def test_card_is_complete_and_carries_the_terms(tmp_path, report, folder, kvasir):
    card = report(folder=folder)
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.base_model == "google/vit-base-patch16-224-in21k"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"accuracy": 0.9123, "f1": 0.8765, "matthews_correlation": 0.8765}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert (card.data.license == "other") is kvasir
    assert ("no commercial use" in card.text) is kvasir and ("Pogorelov" in card.text) is kvasir
    for part in (
        "Not a medical device", "0.912 (0.880 to 0.940)", "150 groups of 200 images", "10 %, its accuracy on",
        "divided by the temperature 1.234", "| expected calibration error (15 bins) | 0.099 | 0.046 |",
        "| nothing | 0.912 | 0.870 |", "12.3 training images/s", "567 s of training", "a test machine",
        "Of 60 near-identical pairs, 0 are on two sides", "7 carry two different labels",
        "| esophagitis | 0.900 | 0.800 (0.700 to 0.850) | 0.950 | 0.850 | 10 (6) |", "others is 0.978",
        "| polyps | 21 | 21 | 21 |", "| total | 140 | 30 | 30 |",
        "not tested on images from elsewhere",
        f"python finetune_vit.py --output_dir={tmp_path} --learning_rate=3e-05",
    ):  # fmt: skip
        assert part in card.text, part
    assert "{" not in card.text.split("```bash")[0] and "None" not in card.text
    shown = re.findall(r"]\(report/(.+?)\)", card.text)
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn - set(shown) == {"mistakes.png", "attention.png", "label_conflicts.png"}  # of the images
    assert set(shown) < drawn and len(shown) == 4


def test_model_that_came_from_a_folder_is_no_name_on_the_hub(report, results):
    results["settings"]["model_name_or_path"] = "vit-of-mine"  # what is left of /home/me/vit-of-mine
    card = report()
    assert card.data.base_model is None and "Fine-tuned from `vit-of-mine`" in card.text
    assert "see Calibration\n```\n\n## Intended use" in card.text


def test_command_of_a_run_gives_its_settings_again(tmp_path):
    flags = [
        "--data_dir", str(tmp_path), "--split_by", "random", "--report_to", "none", "--learning_rate", "1e-4",
        "--bf16", "false", "--lr_scheduler_type", "cosine_with_min_lr", "--output_dir", "a folder",
        "--lr_scheduler_kwargs", '{"min_lr": 1e-6}', "--hub_token", "hf_secret",
    ]  # fmt: skip
    settings, training = read_settings(flags)
    command = command_of(json.loads(json.dumps(vars(settings) | training.to_dict())))
    assert "hf_secret" not in command
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "finetune_vit.py") and len(words) < 15
    again, training_again = read_settings(words)
    assert again == settings
    assert training_again.to_dict() == training.to_dict()


def test_card_says_when_a_random_split_flatters(report, results):
    results["split"] |= {"by": "random", "pairs_across_splits": 29, "pairs_across_test": 18}
    text = " ".join(report().text.split())
    assert (
        "The results are optimistic" in text and "29 are on two sides of the split, 18 of them with" in text
    )
    assert "a group is not divided" not in text


def test_card_of_a_given_split_that_divides_pairs(report, results):
    results["split"] |= {"by": "my.csv", "pairs_across_splits": 29, "pairs_across_test": 18}
    text = " ".join(report().text.split())
    assert "18 of them with one test image, which flatters the results" in text


def test_card_of_a_class_without_test_images(report, results):
    zero = {"precision": 0, "recall": 0, "specificity": 0.95, "f1": 0, "n": 0}
    results["per_class"] = results["per_class"] | {"polyps": zero}
    assert "| polyps | – | – | 0.950 | – | 0 |" in report().text


def test_card_tells_what_was_measured_elsewhere(report, results):
    scores = {
        "accuracy": {"value": 0.7, "low": 0.6, "high": 0.8},
        "macro_f1": {"value": 0.5, "low": 0.4, "high": 0.6},
    }
    results["external"] = {"folder": "other-clinic", "images": 90, "near_duplicates_left_out": 10,
                           "per_class": {"polyps": {}}} | scores  # fmt: skip
    results["cross_validation"] = {"folds": 5, "accuracy": {"mean": 0.9, "sd": 0.02},
                                   "macro_f1": {"mean": 0.85, "sd": 0.03}}  # fmt: skip
    text = " ".join(report().text.split())
    row = "| `other-clinic` (polyps) | 90 | 10 | 0.700 (0.600 to 0.800) | 0.500 (0.400 to 0.600) |"
    assert row in text and "not tested on images from elsewhere" not in text
    assert "--cross_validate=5 --external_dir=other-clinic" in text
    assert "5 more models" in text and "accuracy 0.900 ± 0.020, macro F1 0.850 ± 0.030" in text


def test_an_edited_card_is_left_alone_and_an_untouched_one_follows_the_results(tmp_path, report, results):
    card = tmp_path / "README.md"
    report()
    results["split"]["conflicting_label_pairs"] = 8
    assert "8 carry two different labels" in report().text
    card.write_text(card.read_text() + "mended by hand")
    results["split"]["conflicting_label_pairs"] = 9
    assert report().text.endswith("mended by hand")
    assert "9 carry two" in (tmp_path / "report" / "model_card.md").read_text()


def test_nothing_is_drawn_twice(tmp_path, report):
    report()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()}
    report()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "report").iterdir()} == before


def test_a_card_of_the_users_own_is_never_replaced(tmp_path, report):
    (tmp_path / "README.md").write_text("my own")
    assert report().text == "my own"


@pytest.mark.parametrize(
    "made, says, chosen",
    [
        ("fine-tuned", "Fine-tuned from", "images chose the epoch and the temperature"),
        ("probed", "to the unchanged features of", "images chose the temperature"),
        ("evaluated", "as it was, evaluated", "This run learned nothing"),
    ],
)
def test_card_says_what_was_learned(report, results, made, says, chosen):
    card = report(results | {"made": made})
    assert f"# vit-base-patch16-224-in21k {made} on my-images" in card.text
    assert says in card.text and chosen in card.text
    assert ("divided by the temperature" in card.text) is (made != "evaluated")


def test_no_picture_without_something_to_show(tmp_path, report, results):
    card = report(
        results | {"made": "evaluated"}, predictions=predict_by_chance(NAMES, right=1),
        history=[{"ridge_strength": 10.0}], pairs={"label_a": [], "label_b": []},
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert names == {"attention.png", "confusion_matrix.png", "per_class.png", "reliability.png"}
    assert "training_curves" not in card.text and "--num_train_epochs 0" in card.text


def boxes(figure):
    """Bounding boxes, in pixels, of all texts of a figure, with what they say."""
    figure.draw_without_rendering()
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    labels = [text for legend in legends for text in legend.get_texts()]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            labels += [axis.label, *(label for place, label in ticks if low <= place <= high)]
        labels += [*axes.texts, axes.title]
    return [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]


def assert_legible(figure):
    """Nothing is cut off, and no two texts overlap but the slanted class names."""
    found = boxes(figure)
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, text
    upright = [(text, box) for text, box in found if not text.startswith("a-rather-long-class")]
    for i, (text, box) in enumerate(upright):
        for other, its in upright[i + 1 :]:
            apart = (
                min(box.x1, its.x1) - max(box.x0, its.x0) < 1 or min(box.y1, its.y1) - max(box.y0, its.y0) < 1
            )
            assert apart, (text, other)


def long_names(classes):
    return [f"a-rather-long-class-{i}" for i in range(classes)]


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_confusion_matrix_is_right_and_legible(classes):
    names = long_names(classes)
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes)) + np.diag([1234] * classes)
    pairs = np.repeat(np.argwhere(counts >= 0), counts.ravel(), axis=0)
    table = pd.DataFrame(np.array(names)[pairs], columns=["label", "prediction"])
    figure = draw_confusion_matrix(table, names)
    shown = {tuple(map(round, text.get_position()[::-1])): text.get_text() for text in figure.axes[0].texts}
    share = counts / counts.sum(1, keepdims=True)
    percent = {(r, c): f"\n{share[r, c]:.0%}" if classes <= 12 else "" for r, c in np.argwhere(counts)}
    assert shown == {(r, c): f"{counts[r, c]:,}{percent[r, c]}" for r, c in np.argwhere(counts)}
    assert_legible(figure)
    cell = figure.axes[0].get_window_extent().width / classes
    assert all(label.get_window_extent().width < cell for label in figure.axes[0].texts)


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_class_bars_show_recall_interval_and_precision(classes):
    rng = np.random.default_rng(0)
    rows = {}
    for name in long_names(classes):
        low, recall, high, precision = *np.sort(rng.random(3)), rng.random()
        rows[name] = {
            "precision": precision,
            "recall": recall,
            "recall_low": low,
            "recall_high": high,
            "n": 7,
        }
    figure = draw_class_bars(rows | {"never tested": {"recall": 0, "precision": 0, "n": 0}})
    axes = figure.axes[0]
    bars = [bar.get_width() for bar in axes.patches][::-1]
    assert bars == pytest.approx([row["recall"] for row in rows.values()])
    segments = [segment[:, 0] for segment in axes.collections[0].get_segments()][::-1]
    assert np.allclose(segments, [(row["recall_low"], row["recall_high"]) for row in rows.values()])
    assert_legible(figure)


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_reliability_shows_shares_by_probability_and_accuracy_by_coverage(classes):
    table = predict_by_chance(long_names(classes), n=500)
    labels = table["label"].map({name: label for label, name in enumerate(long_names(classes))}).to_numpy()
    probabilities = table[long_names(classes)].to_numpy()
    figure = draw_reliability(labels, probabilities, 1.5)
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    after = next(line for line in figure.axes[0].lines if line.get_label().startswith("after"))
    for x, y in zip(*after.get_data(), strict=True):
        inside = np.ceil(confidence * 15) == np.ceil(x * 15)
        assert x == pytest.approx(confidence[inside].mean()) and y == pytest.approx(right[inside].mean())
    x, y = figure.axes[1].lines[0].get_data()
    assert y[-1] == pytest.approx(right.mean()) and x[-1] == 1
    assert y[249] == pytest.approx(right[np.argsort(-confidence)[:250]].mean())
    assert_legible(figure)


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_galleries_show_the_pictures_and_say_what_they_are(tiny_vit, classes):
    names, (images, pixels) = long_names(classes), pictures()
    table = predict_by_chance(names)[:12]
    model = FloatModel(ViTForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32))
    figure = draw_examples(table, names, images, model, SHAPE)
    for row, axes in enumerate(figure.axes[: len(table)]):
        shown = axes.images[0].get_array()
        assert (shown[:, :32] == pixels[row].transpose(1, 2, 0)).all() and shown.shape == (32, 68, 3)
        assert (shown[:, 36:] != shown[:, :32]).any()
        certain = f"{table[names].iloc[row].max():.0%}"
        caption = f"true: {table['label'].iloc[row]}\npredicted: {table['prediction'].iloc[row]}, {certain}"
        assert axes.get_title() == caption
    assert_legible(figure)


def test_conflicts_stand_side_by_side():
    images, pixels = pictures()
    pairs = {"file_a": ["x/3.jpg", "x/9.jpg"], "file_b": ["x/7.jpg", "x/1.jpg"], "distance": [0.0012, 0.03],
             "label_a": ["polyps", "b"], "label_b": ["esophagitis", "a"]}  # fmt: skip
    figure = draw_conflicts(pd.DataFrame(pairs), images, SHAPE)
    first = figure.axes[0].images[0].get_array()
    assert (first[:, :32] == pixels[3].transpose(1, 2, 0)).all() and (
        first[:, 36:] == pixels[7].transpose(1, 2, 0)
    ).all()
    assert figure.axes[0].get_title() == "polyps | esophagitis\ndistance 0.001"
    assert_legible(figure)


def test_attention_rollout_against_the_papers_loop(tiny_vit):
    """The rows of the paper's loop in NumPy, patch by patch."""
    model = ViTForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32)
    kind = model.config._attn_implementation
    pixels = torch.rand(2, 3, 32, 32)
    maps = attention_rollout(model, pixels)
    assert maps.shape == (2, 32, 32) and maps.min() == 0 and maps.max() == 1
    assert model.config._attn_implementation == kind
    model.set_attn_implementation("eager")
    attention = model(pixel_values=pixels, output_attentions=True).attentions
    for picture in range(2):
        flow = np.eye(17)
        for layer in attention:
            flow = (layer[picture].mean(0).detach().numpy() / 2 + np.eye(17) / 2) @ flow
        grid = torch.tensor(flow[0, 1:]).view(1, 1, 4, 4)
        smooth = torch.nn.functional.interpolate(grid, (32, 32), mode="bilinear")[0, 0]
        assert np.corrcoef(smooth.ravel(), maps[picture].ravel())[0, 1] > 0.98


def test_curves_show_what_was_logged():
    figure = draw_training_curves(HISTORY)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert list(lines["training loss"].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(lines["validation accuracy"].get_xdata()) == [1, 2, 3]
    assert set(lines) == {"training loss", "validation loss", "validation accuracy", "validation macro F1"}
    assert_legible(figure)


def test_pictures_on_disk_are_large_enough(tmp_path, report):
    report()
    for path in (tmp_path / "report").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 900 and len(image.convert("RGB").getcolors(1 << 24)) > 50, path.name
