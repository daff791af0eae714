"""Step 9: pictures that show what they should, and a card that the Hub understands."""

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from finetune_vit import KVASIR, draw_confusion_matrix, draw_training_curves, write_report

NAMES = ["dyed-lifted-polyps", "esophagitis", "polyps"]


@pytest.fixture
def results():
    row = {"precision": 0.9, "recall": 0.8, "specificity": 0.95, "f1": 0.85, "n": 10}
    scores = [f"{a}_{m}" for a in ("macro", "weighted") for m in ("precision", "recall", "f1")]
    part = {name: {"value": 0.8765} for name in [*scores, "mcc"]}
    part["accuracy"] = {"value": 0.9123, "low": 0.88, "high": 0.94}
    settings = dict.fromkeys(
        "num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate warmup_steps "
        "lr_scheduler_type weight_decay optim metric_for_best_model bf16 fp16 seed test_size "
        "validation_size".split(), 1
    )  # fmt: skip
    settings |= {"model_name_or_path": "google/vit-base-patch16-224-in21k", "split_by": "random"}
    return {
        "test": part, "validation": part, "per_class": dict.fromkeys(NAMES, row),
        "split": {"by": "random", "train": 140, "validation": 30, "test": 30}, "speed": {},
        "settings": settings, "versions": {"torch": "2.13.0", "device": "a test"},
    }  # fmt: skip


PREDICTIONS = pd.DataFrame({"split": "test", "label": NAMES * 10, "prediction": NAMES * 9 + NAMES[::-1]})
HISTORY = [
    entry
    for epoch in (1.0, 2.0, 3.0)
    for entry in (
        {"epoch": epoch, "loss": 1 / epoch},
        {"epoch": epoch, "eval_loss": 1.1 / epoch, "eval_accuracy": 1 - 0.3 / epoch, "eval_macro_f1": 0.7},
    )
]


@pytest.mark.parametrize("folder, kvasir", [("kvasir-dataset-v2", True), ("my-images", False)])
def test_card_is_complete_and_carries_the_terms(tmp_path, results, folder, kvasir):
    write_report(results, PREDICTIONS, HISTORY, tmp_path / folder, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.base_model == "google/vit-base-patch16-224-in21k"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"accuracy": 0.9123, "f1": 0.8765, "matthews_correlation": 0.8765}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    assert (card.data.license == "other") is kvasir
    assert (KVASIR["terms"] in card.text) is kvasir and ("Pogorelov" in card.text) is kvasir
    assert "Not a medical device" in card.text and "0.880 to 0.940" in card.text
    assert "| esophagitis | 0.900 | 0.800 | 0.950 | 0.850 | 10 |" in card.text
    assert "{{" not in card.text and "None" not in card.text
    for line in card.text.split("](report/")[1:]:
        assert (tmp_path / "report" / line.split(")")[0]).exists()


def test_card_that_is_there_is_left_alone(tmp_path, results):
    (tmp_path / "README.md").write_text("mended by hand")
    write_report(results, PREDICTIONS, HISTORY, tmp_path, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mended by hand"


def test_no_curves_without_training(tmp_path, results):
    write_report(results, PREDICTIONS, [], tmp_path, tmp_path)
    assert not (tmp_path / "report" / "training_curves.png").exists()
    text = (tmp_path / "README.md").read_text()
    assert "training_curves" not in text and "--num_train_epochs 0" in text


def texts(figure):
    """Bounding boxes, in pixels, of all texts of a figure, with what they say."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    labels += [axes.title, axes.xaxis.label, axes.yaxis.label]
    return [(label.get_text(), label.get_window_extent()) for label in labels]


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_confusion_matrix_is_right_and_nothing_is_cut_off(classes):
    names = [f"a-rather-long-class-{i}" for i in range(classes)]
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes)) + np.diag([1234] * classes)
    pairs = np.repeat(np.argwhere(counts >= 0), counts.ravel(), axis=0)
    table = pd.DataFrame(np.array(names)[pairs], columns=["label", "prediction"])
    figure = draw_confusion_matrix(table, names)
    shown = {tuple(map(round, text.get_position()[::-1])): text.get_text() for text in figure.axes[0].texts}
    assert shown == {(r, c): f"{counts[r, c]:,}" for r, c in np.argwhere(counts)}
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in texts(figure):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    cell = figure.axes[0].get_window_extent().width / classes
    assert all(label.get_window_extent().width < cell for label in figure.axes[0].texts)


def test_curves_show_what_was_logged(tmp_path, results):
    figure = draw_training_curves(HISTORY)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert list(lines["training loss"].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(lines["validation accuracy"].get_xdata()) == [1, 2, 3]
    assert set(lines) == {"training loss", "validation loss", "validation accuracy", "validation macro F1"}
    write_report(results, PREDICTIONS, HISTORY, tmp_path, tmp_path)
    for name in ("training_curves.png", "confusion_matrix.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert min(image.size) >= 500 and len(image.convert("RGB").getcolors(1 << 24)) > 50
