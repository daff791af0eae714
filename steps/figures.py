"""Step 9: charts of what the numbers say; they show no image and may be published."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from .curves import COLOURS, PRECISION_RECALL, ROC, draw_curves
from .lettering import explain, letter
from .options import SHOWN
from .scores import BINS, confusions, temper, truth_of, worst_classes

ENOUGH = 5  # images in a bin of probabilities; the share of fewer is drawn faint
BLUE, ORANGE = COLOURS[:2]


def charts(results: dict, predictions: pd.DataFrame, history: list[dict]) -> dict[str, Callable[[], Figure]]:
    """Return {file name: function that draws the chart}."""
    tested, names = predictions[predictions["split"] == "test"], list(results["per_class"])
    truth = truth_of(tested, names)
    curves = {"training_curves.png": partial(draw_training_curves, history)}
    drawn = (curves if results["made"] == "fine-tuned" else {}) | {
        "confusion_matrix.png": partial(draw_confusions, tested, names),
        "per_class.png": partial(draw_class_bars, results["per_class"]),
        "reliability.png": partial(draw_reliability, *truth, results["calibration"]),
    }
    if "macro_auroc" in results["test"]:
        drawn["roc.png"] = partial(draw_curves, ROC, *truth, results)
        drawn["precision_recall.png"] = partial(draw_curves, PRECISION_RECALL, *truth, results)
    return drawn


def draw_confusions(predictions: pd.DataFrame, class_names: list[str]) -> Figure:
    """Draw which classes are taken for which: a matrix of up to SHOWN, else the most frequent pairs."""
    if len(class_names) > SHOWN:
        return draw_confused_pairs(predictions, class_names)
    return draw_confusion_matrix(predictions, class_names)


def draw_confusion_matrix(predictions: pd.DataFrame, class_names: list[str]) -> Figure:
    """Draw the counts of `predictions` and, for up to 12 classes, their share of the true class."""
    counts = confusion_matrix(predictions["label"], predictions["prediction"], labels=class_names)
    shares, few = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), len(class_names) <= 12
    shown, size = letter(class_names), 3.2 + (0.7 if few else 0.36) * len(class_names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes, names = figure.subplots(), [shown[name] for name in class_names]
    display = ConfusionMatrixDisplay(shares)
    display.plot(ax=axes, cmap="Blues", im_kw={"vmin": 0, "vmax": 1}, colorbar=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{counts.sum():,} test images")
    for place, text in np.ndenumerate(display.text_):
        share = f"\n{shares[place]:.0%}" if few else ""
        text.set(text=f"{counts[place]:,}{share}", fontsize=10 if few else 8)
        if not counts[place]:
            text.remove()
    figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    explain(figure, class_names, shown)
    return figure


def draw_confused_pairs(predictions: pd.DataFrame, class_names: list[str]) -> Figure:
    """Draw the SHOWN most frequent confusions: the share of the true class, and beside it the images."""
    pairs, shown = confusions(predictions), letter(class_names)
    top, wrong = pairs[:SHOWN][::-1], pairs["images"].sum()
    figure = Figure(figsize=(10, 1.2 + 0.24 * max(1, len(top))), layout="constrained")
    axes, rows = figure.subplots(), range(len(top))
    axes.barh(rows, top["share"], color=BLUE, alpha=0.5)
    for row, images in zip(rows, top["images"], strict=True):
        axes.text(0.01, row, f"{images:,}", va="center", fontsize=8)
    names = zip(top["label"], top["prediction"], strict=True)
    axes.set_yticks(rows, [f"{shown[label]} → {shown[guess]}" for label, guess in names], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(top) - 0.4), xlabel="share of the true class; the number: images")
    title = f"true class → predicted: the {len(top)} most frequent of {len(pairs):,} confusions\n"
    title += f"{top['images'].sum():,} of {wrong:,} wrong answers for {len(predictions):,} test images"
    figure.suptitle(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    explain(figure, [*top["label"], *top["prediction"]], shown)
    return figure


def draw_training_curves(log_history: list[dict]) -> Figure:
    """Draw losses and validation scores by epoch; the axes of both begin where a round number stands."""
    history = pd.DataFrame(log_history).groupby("epoch").first()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column, label, style, colour in (
        (left, "loss", "training loss", "s-", ORANGE),
        (left, "eval_loss", "validation loss", "o-", BLUE),
        (right, "eval_accuracy", "validation accuracy", "o-", BLUE),
        (right, "eval_macro_f1", "validation macro F1", "^-", ORANGE),
    ):
        if column in history:
            values = history[column].dropna()
            size = 4 if len(values) > 1 else 8  # a single point has no line beside it
            axes.plot(values.index, values, style, color=colour, label=label, markersize=size, clip_on=False)
            axes.legend()
        axes.set_xlabel("epoch")
        axes.set_xlim(0, history.index.max() * (1 if len(history) > 1 else 2))  # a single point in the middle
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    right.set_ylim(floor_of(right), 1)
    return figure


def floor_of(axes: Axes) -> float:
    """Return the tenth below all values of the lines of some axes, where an axis that ends at 1 may begin."""
    lowest = min((np.min(line.get_ydata()) for line in axes.lines), default=0.0)
    return min(0.9, np.floor(10 * lowest) / 10)


def draw_class_bars(per_class: dict[str, dict]) -> Figure:
    """Draw the recall of each class that was tested, with its 95 % interval, and its precision.

    Of more than SHOWN classes, those of the lowest recall.
    """
    names, shown = [name for name in worst_classes(per_class) if per_class[name]["n"]], letter([*per_class])
    table = pd.DataFrame({name: per_class[name] for name in names}).T[::-1]
    table.index = [f"{shown[name]} ({row['n']:,.0f})" for name, row in table.iterrows()]
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(table)), layout="constrained")
    axes, recall = figure.subplots(), table["recall"]
    axes.barh(table.index, recall, color=BLUE, alpha=0.5, label="recall (sensitivity)")
    reach = recall - table["recall_low"], table["recall_high"] - recall
    bars = {"fmt": "none", "color": "black", "capsize": 3, "label": "its 95 % interval"}
    axes.errorbar(recall, table.index, xerr=reach, clip_on=False, **bars)
    marks = {"color": ORANGE, "markersize": 5, "clip_on": False}
    axes.plot(table["precision"], table.index, "D", label="precision", **marks)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(table) - 0.4), xlabel="share; in brackets: images of the class")
    axes.grid(axis="x", alpha=0.3)
    tested = sum(row["n"] > 0 for row in per_class.values())
    only = f"the {SHOWN} of {tested:,} classes with the lowest recall" if tested > len(names) else None
    figure.legend(loc="outside upper center", ncols=3, title=only)
    explain(figure, names, shown)
    return figure


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, found: dict[str, float]) -> Figure:
    """Draw accuracy by probability, before and after the temperature, and accuracy by coverage.

    `found` is what `scores.calibration` returned: the temperature and the errors that the legend names. Bins
    of fewer than ENOUGH images are faint; how many each holds stands below.
    """
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
    left, other, below = (figure.add_subplot(place) for place in (grid[0, 0], grid[:, 1], grid[1, 0]))
    before = temper(probabilities, 1 / found["temperature"]).max(1)
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, label="as it should be")
    for name, error, values, style, colour in (
        ("before", found["ece_before"], before, "s--", ORANGE),
        (f"after, T = {found['temperature']:.2f}", found["ece_after"], confidence, "o-", BLUE),
    ):
        bins = pd.DataFrame({"x": values, "y": right}).groupby(np.ceil(values * BINS)).agg(["mean", "size"])
        x, y, size = bins["x", "mean"], bins["y", "mean"], bins["x", "size"]
        enough, label = size >= ENOUGH, f"{name}: ECE {error:.3f}"
        marks = {"color": colour, "markersize": 5, "clip_on": False, "in_layout": False}  # it may be empty
        left.plot(x[enough], y[enough], style, label=label, **marks)
        left.plot(x[~enough], y[~enough], style[0], alpha=0.3, **marks)
    draw_counts(below, bins.index, size)
    below.set_xlabel("probability of the predicted class (number of images: after)")
    below.set_ylabel("images", fontsize=8)
    left.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right answers")
    note = f"faint: fewer than {ENOUGH} images"
    left.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, title=note, title_fontsize=8
    )
    count, order = np.arange(1, len(labels) + 1), np.argsort(-confidence, kind="stable")
    other.plot(count / len(labels), right[order].cumsum() / count, color=BLUE, clip_on=False)
    other.set(xlim=(0, 1), ylim=(floor_of(other), 1))
    share = found["accuracy_at_90_percent_coverage"]
    other.axvline(0.9, color="grey", linewidth=1, linestyle="--", label=f"the surest 90 %: {share:.3f}")
    other.set(xlabel="share of the images answered, most certain first", ylabel="accuracy on them")
    other.legend(loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
    for axes in (left, other):
        axes.grid(alpha=0.3)
    return figure


def draw_counts(axes: Axes, bins: pd.Index, counts: pd.Series) -> None:
    """Draw how many images each bin holds, `bins` numbered from 1 to BINS, with the numbers."""
    middles = (bins - 0.5) / BINS
    axes.bar(middles, counts, 0.9 / BINS, color=BLUE, alpha=0.5)
    for x, count in zip(middles, counts, strict=True):
        text = axes.annotate(f"{count:,}", (x, count), (0, 1), textcoords="offset points", ha="center")
        text.set(fontsize=7, in_layout=False)  # or a wide one at the end would squeeze the charts
    axes.set(xlim=(0, 1), ylim=(0, 1.45 * counts.max()), yticks=[])
