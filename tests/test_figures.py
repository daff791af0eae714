"""Step 9: pictures that show what they should, at any number of classes, and can be read."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import predict_by_chance
from sklearn.metrics import average_precision_score, roc_auc_score

from steps.figures import (
    draw_class_bars,
    draw_confusions,
    draw_reliability,
    draw_training_curves,
)
from steps.files import probability_columns, write_table
from steps.options import SHOWN
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
CALIBRATION |= {"accuracy_at_90_percent_coverage": 0.9777}


def trainer_of(checkpoint, output_dir=None, doubtful=()):
    """What the galleries need of a Trainer, and the list of `doubtful` files in its report."""
    model, processor = load_classifier(str(checkpoint))
    if output_dir:
        write_issues(output_dir, doubtful)
    args = SimpleNamespace(output_dir=str(output_dir))
    return SimpleNamespace(model=model, processing_class=processor, args=args)


def write_issues(output_dir, files):
    """Write report/label_issues.csv: files of the class a that look like b, less and less so."""
    table = pd.DataFrame({"file": files, "label": "a", "proposed": "b"}, dtype=str)
    table["p_proposed"] = np.linspace(0.95, 0.5, len(table))
    write_table(output_dir / "report" / "label_issues.csv", table)


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


def results_of(table, names):
    """What the charts need of metrics.json, from a table of predictions."""
    per_class = {}
    for name in names:
        true, score = table["label"] == name, table[f"p_{name}"]
        row = {"n": int(true.sum()), "recall": 0.5, "precision": 0.5, "recall_low": 0.4, "recall_high": 0.6}
        areas = {"auroc": roc_auc_score, "average_precision": average_precision_score} if true.any() else {}
        for area, function in areas.items():
            value = function(true, score)
            row |= {area: value, f"{area}_low": 0.9 * value, f"{area}_high": min(1, 1.1 * value)}
        per_class[name] = row
    return {"per_class": per_class, "test": {"macro_auroc": {"value": 0.9}}}


def long_names(classes):
    return [f"a-rather-long-class-{i}" for i in range(classes)]


@pytest.mark.parametrize("classes", [2, 8, 23])
def test_confusion_matrix_is_right_and_legible(classes):
    names = long_names(classes)
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes)) + np.diag([1234] * classes)
    pairs = np.repeat(np.argwhere(counts >= 0), counts.ravel(), axis=0)
    table = pd.DataFrame(np.array(names)[pairs], columns=["label", "prediction"])
    figure = draw_confusions(table, names)
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
    assert names == ["as it should be", "before: ECE 0.123", "after, T = 1.50: ECE 0.046"]
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["the surest 90 %: 0.978"]
    assert all(axes.get_xlim()[1] == 1 for axes in figure.axes) and figure.axes[1].get_ylim()[1] == 1
    assert 0 < figure.axes[1].get_ylim()[0] <= min(y) or min(y) < 0.1  # no lower than it need be
    assert_legible(figure)


def test_bins_of_few_images_are_faint_and_counted():
    sizes = {0.55: 4, 0.75: 5, 0.95: 120}
    confidence = np.repeat([*sizes], [*sizes.values()])
    labels = (np.arange(len(confidence)) % 4 == 0).astype(int)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    figure = draw_reliability(labels, probabilities, CALIBRATION | {"temperature": 1.0})
    left, _, below = figure.axes
    drawn = [(line.get_alpha(), [*np.round(line.get_xdata(), 6)]) for line in left.lines[1:]]
    assert drawn == [(None, [0.75, 0.95]), (0.3, [0.55])] * 2
    assert [text.get_text() for text in below.texts] == ["4", "5", "120"]
    assert "fewer than 5" in left.get_legend().get_title().get_text()
    assert_legible(figure)


@pytest.mark.parametrize("classes", [41, 200, 1000])
def test_of_many_classes_the_most_frequent_confusions_are_drawn(classes):
    """Class n is taken for the next one n % 7 times of 9; the first two are never tested."""
    names, labels = long_names(classes), np.repeat(np.arange(2, classes), 9)
    wrong = np.tile(np.arange(9), classes - 2) < labels % 7
    table = pd.DataFrame({"label": labels, "prediction": np.where(wrong, (labels + 1) % classes, labels)})
    figure = draw_confusions(table.replace(dict(enumerate(names))), names)
    axes, most = figure.axes[0], sorted(range(6, classes, 7), key=lambda label: names[label])
    first = [label.get_text() for label in axes.get_yticklabels()][::-1][: len(most)]
    assert len(axes.patches) == min(SHOWN, sum(np.unique(labels) % 7 > 0))
    assert first == [f"{names[label]} → {names[(label + 1) % classes]}" for label in most][:SHOWN]
    assert axes.patches[-1].get_width() == pytest.approx(6 / 9)
    assert axes.texts[-1].get_text() == "6" and f"of {wrong.sum():,} wrong answers" in figure.get_suptitle()
    assert max(figure.get_size_inches()) < 15
    assert_legible(figure)


def test_many_classes_without_a_mistake_have_a_picture_of_confusions_too():
    names = long_names(41)
    figure = draw_confusions(pd.DataFrame({"label": names, "prediction": names}), names)
    assert "0 of 0 wrong answers for 41 test images" in figure.get_suptitle()


@pytest.mark.parametrize("classes", [41, 1000])
def test_bars_of_many_classes_are_those_of_the_lowest_recall(classes):
    row = {"precision": 0.5, "recall_low": 0.0, "recall_high": 1.0, "n": 7}
    names, shares = long_names(classes), np.random.default_rng(0).random(classes)
    rows = {name: row | {"recall": share} for name, share in zip(names, shares, strict=True)}
    figure = draw_class_bars(rows | {"never tested": {"recall": 0, "precision": 0, "n": 0}})
    lowest = np.argsort(shares)[:SHOWN]
    assert [bar.get_width() for bar in figure.axes[0].patches][::-1] == pytest.approx(shares[lowest])
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()][::-1]
    assert shown == [f"{names[place]} (7)" for place in lowest] and max(figure.get_size_inches()) < 15
    title = figure.legends[0].get_title().get_text()
    assert title == f"the {SHOWN} of {classes:,} classes with the lowest recall"
    assert_legible(figure)


def test_curves_show_what_was_logged():
    figure = draw_training_curves(HISTORY)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert list(lines["training loss"].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(lines["validation accuracy"].get_xdata()) == [1, 2, 3]
    assert set(lines) == {"training loss", "validation loss", "validation accuracy", "validation macro F1"}
    assert_legible(figure)


def test_curves_of_one_epoch_are_readable():
    figure = draw_training_curves(HISTORY[:2])
    assert all(line.get_markersize() == 8 for axes in figure.axes for line in axes.lines)
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 2)] * 2
    assert figure.axes[1].get_ylim() == (pytest.approx(0.7), 1)
    low, high = figure.axes[0].get_ylim()
    assert low == 0 and high > 1.1
    assert_legible(figure)


def test_axes_of_shares_end_at_1():
    entries = [entry | ({"eval_macro_f1": 1.0} if "eval_macro_f1" in entry else {}) for entry in HISTORY]
    assert draw_training_curves(entries).axes[1].get_ylim() == (pytest.approx(0.7), 1)
    row = {"recall": 1.0, "precision": 1.0, "recall_low": 0.9, "recall_high": 1.0, "n": 7}
    figure = draw_class_bars({"a": row, "b": row})
    assert figure.axes[0].get_xlim() == (0, 1)
    assert not any(line.get_clip_on() for line in figure.axes[0].lines)  # a mark at 1 is whole


def test_a_wide_count_or_an_empty_line_does_not_squeeze_the_charts():
    labels, probabilities = np.zeros(10_000, int), np.full((10_000, 50), 0.02)
    figure = draw_reliability(labels, probabilities, CALIBRATION)
    figure.draw_without_rendering()
    left, other, below = (axes.bbox.height for axes in figure.axes)
    assert left > 0.6 * other and left > 2 * below
