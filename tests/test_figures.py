"""Step 9: pictures that show what they should, at any number of classes, and can be read."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import draw_pixels, predict_by_chance
from transformers import ViTForImageClassification

from steps.duplicates import Scenes
from steps.figures import (
    charts,
    draw_class_bars,
    draw_confusion_matrix,
    draw_reliability,
    draw_training_curves,
)
from steps.files import probability_columns
from steps.galleries import draw_conflicts, draw_examples, galleries
from steps.model import attention_rollout
from steps.publish import PUBLISHED
from steps.use import load_classifier

HISTORY = [
    entry
    for epoch in (1.0, 2.0, 3.0)
    for entry in (
        {"epoch": epoch, "loss": 1 / epoch},
        {"epoch": epoch, "eval_loss": 1.1 / epoch, "eval_accuracy": 1 - 0.3 / epoch, "eval_macro_f1": 0.7},
    )
]


CALIBRATION = {"temperature": 1.5, "ece_before": 0.1234, "ece_after": 0.0456}


def trainer_of(checkpoint):
    """What the galleries need of a Trainer."""
    model, processor = load_classifier(str(checkpoint))
    return SimpleNamespace(model=model, processing_class=processor)


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
    probabilities = table[probability_columns(long_names(classes))].to_numpy()
    figure = draw_reliability(labels, probabilities, CALIBRATION)
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    after = next(line for line in figure.axes[0].lines if line.get_label().startswith("after"))
    for x, y in zip(*after.get_data(), strict=True):
        inside = np.ceil(confidence * 15) == np.ceil(x * 15)
        assert x == pytest.approx(confidence[inside].mean()) and y == pytest.approx(right[inside].mean())
    x, y = figure.axes[1].lines[0].get_data()
    assert y[-1] == pytest.approx(right.mean()) and x[-1] == 1
    assert y[249] == pytest.approx(right[np.argsort(-confidence)[:250]].mean())
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["before: ECE 0.123", "after, T = 1.50: ECE 0.046"]
    assert_legible(figure)


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_galleries_show_the_pictures_and_say_what_they_are(tiny_vit, classes):
    names = long_names(classes)
    table, (images, pixels) = predict_by_chance(names)[:12], draw_pixels(names)
    figure = draw_examples(table, names, images, trainer_of(tiny_vit))
    for row, axes in enumerate(figure.axes[: len(table)]):
        shown = axes.images[0].get_array()
        assert (shown[:, :32] == pixels[row].transpose(1, 2, 0)).all() and shown.shape == (32, 68, 3)
        assert (shown[:, 36:] != shown[:, :32]).any()
        certain = f"{table[probability_columns(names)].iloc[row].max():.0%}"
        caption = f"true: {table['label'].iloc[row]}\npredicted: {table['prediction'].iloc[row]}, {certain}"
        assert axes.get_title() == caption
    assert_legible(figure)


def test_conflicts_stand_side_by_side(tiny_vit):
    images, pixels = draw_pixels(["polyps", "esophagitis"])
    pairs = {"file_a": ["x/3.jpg", "x/9.jpg"], "file_b": ["x/7.jpg", "x/1.jpg"], "distance": [0.0012, 0.03],
             "label_a": ["polyps", "esophagitis"], "label_b": ["esophagitis", "polyps"]}  # fmt: skip
    figure = draw_conflicts(pd.DataFrame(pairs), images, trainer_of(tiny_vit))
    first = figure.axes[0].images[0].get_array()
    assert (first[:, :32] == pixels[3].transpose(1, 2, 0)).all()
    assert (first[:, 36:] == pixels[7].transpose(1, 2, 0)).all()
    assert figure.axes[0].get_title() == "polyps | esophagitis\ndistance 0.001"
    assert_legible(figure)


@pytest.mark.parametrize("classes", [61, 1000])
def test_charts_of_many_classes_stay_small_and_show_what_matters(classes):
    names, size = long_names(classes), 2 * classes
    labels = np.repeat(np.arange(classes), 2)
    guesses = np.where(np.arange(size) % 5, labels, (labels + 1) % classes)
    table = pd.DataFrame({"label": np.array(names)[labels], "prediction": np.array(names)[guesses]})
    figure = draw_confusion_matrix(table, names)
    assert max(figure.get_size_inches()) < 30 and not figure.axes[0].texts
    assert (figure.axes[0].images[0].get_array().sum(1) == pytest.approx(1)).all()
    ticks = figure.axes[0].get_yticklabels()
    assert len(ticks) <= 60 and [label.get_text() for label in ticks[:2]] == ["0", str(-(-classes // 60))]
    assert "number in config.json" in figure.axes[0].get_ylabel()

    row = {"precision": 0.5, "recall_low": 0.0, "recall_high": 1.0, "n": 7}
    shares = np.random.default_rng(0).random(classes)
    figure = draw_class_bars(
        {name: row | {"recall": share} for name, share in zip(names, shares, strict=True)}
    )
    lowest = np.sort(np.argsort(shares)[:60])
    assert [bar.get_width() for bar in figure.axes[0].patches][::-1] == pytest.approx(shares[lowest])
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()][::-1]
    assert shown == [f"{names[place]} (7)" for place in lowest] and max(figure.get_size_inches()) < 30
    assert f"the 60 of {classes:,} classes with the lowest recall" in figure.axes[0].get_xlabel()


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


def test_charts_are_published_and_galleries_never(tiny_vit):
    """The galleries show images: the most certain mistakes first, and a right answer per class."""
    names = long_names(3)
    table, (images, _) = predict_by_chance(names), draw_pixels(names)
    trainer = trainer_of(tiny_vit)
    pairs = {"file_a": ["x/1.jpg", "x/3.jpg"], "file_b": ["x/2.jpg", "x/4.jpg"], "distance": [0.01, 0.02],
             "label_a": names[:2], "label_b": [names[0], names[2]]}  # fmt: skip
    scenes = Scenes(pd.DataFrame(pairs), pd.Series(range(60), table["file"]))
    drawn = galleries(table, scenes, images, trainer)
    results = {"per_class": dict.fromkeys(names, {"n": 20}), "calibration": CALIBRATION}
    shown = charts(results | {"made": "fine-tuned"}, table, HISTORY)
    assert {f"report/{name}" for name in shown} == {name for name in PUBLISHED if name.endswith(".png")}
    assert set(drawn) == {"mistakes.png", "attention.png", "label_conflicts.png"}
    assert not set(drawn) & set(shown)

    def titles(name):
        return [title for axes in drawn[name]().axes if (title := axes.get_title())]

    wrong = table[table["label"] != table["prediction"]]
    certain = wrong[probability_columns(names)].max(axis=1).nlargest(12)
    first = wrong.loc[certain.index]
    rows = zip(first["label"], first["prediction"], certain, strict=True)
    assert titles("mistakes.png") == [f"true: {true}\npredicted: {got}, {p:.0%}" for true, got, p in rows]
    assert sorted(title.split()[1] for title in titles("attention.png")) == names
    assert titles("label_conflicts.png") == [f"{names[1]} | {names[2]}\ndistance 0.020"]
