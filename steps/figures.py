"""Step 9: pictures of what the numbers say. Charts may be published; galleries show images and stay here."""

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from transformers import Trainer

from .architectures import CLASS_TOKEN, pixel_shape
from .duplicates import Scenes
from .files import probability_columns
from .lettering import explain, letter
from .model import attention_rollout
from .preprocess import pixels_of
from .scores import BINS, temper, truth_of

MOST = 60  # classes that a chart has room to name
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind readers (Okabe and Ito)


def charts(results: dict, predictions: pd.DataFrame, history: list[dict]) -> dict[str, Callable[[], Figure]]:
    """Return {file name: function that draws the chart}."""
    tested, names = predictions[predictions["split"] == "test"], list(results["per_class"])
    truth = truth_of(tested, names)
    curves = {"training_curves.png": partial(draw_training_curves, history)}
    return (curves if results["made"] == "fine-tuned" else {}) | {
        "confusion_matrix.png": partial(draw_confusion_matrix, tested, names),
        "per_class.png": partial(draw_class_bars, results["per_class"]),
        "reliability.png": partial(draw_reliability, *truth, results["calibration"]),
    }


def galleries(
    predictions: pd.DataFrame, scenes: Scenes, images: Dataset, trainer: Trainer
) -> dict[str, Callable[[], Figure]]:
    """Return {file name: function that draws it} for mistakes, attention, label conflicts, if any exist.

    Attention only where the model has a class token that looks at all of the image.
    """
    tested, names = predictions[predictions["split"] == "test"], images.features["label"].names
    tested = tested.iloc[np.argsort(-tested[probability_columns(names)].max(axis=1), kind="stable")]
    right = tested["label"] == tested["prediction"]
    shown = {"mistakes.png": tested[~right]}
    if trainer.model.config.model_type in CLASS_TOKEN:
        shown["attention.png"] = tested[right].groupby("label").head(1)
    drawn = {
        name: partial(draw_examples, rows[:12], names, images, trainer)
        for name, rows in shown.items()
        if len(rows)
    }
    conflicts = scenes.pairs[scenes.pairs["label_a"] != scenes.pairs["label_b"]]
    if len(conflicts):
        drawn["label_conflicts.png"] = partial(draw_conflicts, conflicts[:12], images, trainer)
    return drawn


def draw_confusion_matrix(predictions: pd.DataFrame, class_names: list[str]) -> Figure:
    """Draw the counts of `predictions` and, for up to 12 classes, their share of the true class.

    Of more than MOST classes only colours, and a number here and there.
    """
    counts = confusion_matrix(predictions["label"], predictions["prediction"], labels=class_names)
    shares, few = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), len(class_names) <= 12
    many, shown = len(class_names) > MOST, letter(class_names)
    size = 3.2 + (0.7 if few else 0.36) * min(len(class_names), MOST)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    ticks = range(0, len(class_names), -(-len(class_names) // MOST))
    names = [str(tick) if many else shown[class_names[tick]] for tick in ticks]
    display = ConfusionMatrixDisplay(shares)
    colours = {"vmin": 0, "vmax": 1}
    display.plot(ax=axes, cmap="Blues", im_kw=colours, colorbar=False, include_values=not many)
    axes.set_yticks(ticks, names)
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
    note = ", by its number in config.json" if many else ""
    axes.set(xlabel=f"predicted class{note}", ylabel=f"true class{note}")
    axes.set_title(f"{counts.sum():,} test images")
    for place, text in np.ndenumerate(display.text_) if not many else ():
        share = f"\n{shares[place]:.0%}" if few else ""
        text.set(text=f"{counts[place]:,}{share}", fontsize=10 if few else 8)
        if not counts[place]:
            text.remove()
    figure.colorbar(display.im_, ax=axes, label="share of the true class", shrink=0.8)
    explain(figure, () if many else class_names, shown)
    return figure


def draw_training_curves(log_history: list[dict]) -> Figure:
    """Draw losses and validation scores by epoch."""
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
            history[column].dropna().plot(ax=axes, style=style, color=colour, label=label, markersize=4)
            axes.legend()
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    return figure


def draw_class_bars(per_class: dict[str, dict]) -> Figure:
    """Draw the recall of each class that was tested, with its 95 % interval, and its precision.

    Of more than MOST classes, those of the lowest recall.
    """
    table = pd.DataFrame({name: row for name, row in per_class.items() if row["n"]}).T
    shown = letter([*per_class])
    lowest = np.sort(table["recall"].argsort(kind="stable")[:MOST])
    only = f"; the {MOST} of {len(table):,} classes with the lowest recall" if len(table) > MOST else ""
    table = table.iloc[lowest][::-1]
    names = table.index
    table.index = [f"{shown[name]} ({row['n']:.0f})" for name, row in table.iterrows()]
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(table)), layout="constrained")
    axes, recall = figure.subplots(), table["recall"]
    axes.barh(table.index, recall, color=BLUE, alpha=0.5, label="recall (sensitivity)")
    reach = recall - table["recall_low"], table["recall_high"] - recall
    bars = {"fmt": "none", "color": "black", "capsize": 3, "label": "its 95 % interval"}
    axes.errorbar(recall, table.index, xerr=reach, **bars)
    axes.plot(table["precision"], table.index, "D", color=ORANGE, markersize=5, label="precision")
    axes.set(xlim=(0, 1.02), xlabel=f"share; in brackets: test images of the class{only}")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    explain(figure, names[::-1], shown)
    return figure


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, found: dict[str, float]) -> Figure:
    """Draw accuracy by probability, before and after the temperature, and accuracy by coverage.

    `found` is what `scores.calibration` returned: the temperature and the errors that the legend names.
    """
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, other = figure.subplots(1, 2)
    before = temper(probabilities, 1 / found["temperature"]).max(1)
    for name, error, values, style, colour in (
        ("before", found["ece_before"], before, "s--", ORANGE),
        (f"after, T = {found['temperature']:.2f}", found["ece_after"], confidence, "o-", BLUE),
    ):
        bins = pd.DataFrame({"x": values, "y": right}).groupby(np.ceil(values * BINS)).mean()
        label = f"{name}: ECE {error:.3f}"
        left.plot(bins["x"], bins["y"], style, color=colour, label=label, markersize=5)
    left.axline((0, 0), slope=1, color="grey", linewidth=1)
    left.set(xlabel="probability of the predicted class", ylabel="share of right answers", xlim=(0, 1.02))
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9)
    count, order = np.arange(1, len(labels) + 1), np.argsort(-confidence, kind="stable")
    other.plot(count / len(labels), right[order].cumsum() / count, color=BLUE)
    other.axvline(0.9, color="grey", linewidth=1, linestyle="--")
    other.set(xlabel="share of the images answered, most certain first", ylabel="accuracy on them")
    for axes in (left, other):
        axes.grid(alpha=0.3)
    return figure


def draw_pictures(pictures: np.ndarray, captions: list[str]) -> Figure:
    """Draw pictures, uint8 (n, height, width, 3), three per row."""
    rows = -(-len(pictures) // 3)
    figure = Figure(figsize=(10, 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, picture, caption in zip(grid, pictures, captions, strict=False):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=9)
    return figure


def join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return pictures, uint8 (n, height, width, 3), side by side with a white line between them."""
    return np.concatenate([left, np.full_like(left[:, :, :4], 255), right], axis=2)


def draw_conflicts(pairs: pd.DataFrame, images: Dataset, trainer: Trainer) -> Figure:
    """Draw near-duplicates with different labels."""
    shape = pixel_shape(trainer.processing_class)
    left, right = (pixels_of(pairs[name], images, shape) for name in ("file_a", "file_b"))
    shown = letter(images.features["label"].names)
    rows = zip(pairs["label_a"], pairs["label_b"], pairs["distance"], strict=True)
    captions = [f"{shown[a]} | {shown[b]}\ndistance {near:.3f}" for a, b, near in rows]
    figure = draw_pictures(join(left, right), captions)
    explain(figure, [*pairs["label_a"], *pairs["label_b"]], shown)
    return figure


def draw_examples(
    predictions: pd.DataFrame, class_names: list[str], images: Dataset, trainer: Trainer
) -> Figure:
    """Draw predicted images, where the model has a class token beside its attention: yellow is most."""
    pictures = pixels = pixels_of(predictions["file"], images, pixel_shape(trainer.processing_class))
    if trainer.model.config.model_type in CLASS_TOKEN:
        maps = attention_rollout(trainer.model, torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
        seen = 0.4 * pixels + 0.6 * 255 * matplotlib.colormaps["viridis"](maps)[..., :3]
        pictures = join(pixels, seen.astype(np.uint8))
    certain = predictions[probability_columns(class_names)].max(axis=1)
    columns = predictions["label"], predictions["prediction"], certain
    shown, rows = letter(class_names), zip(*columns, strict=True)
    captions = [f"true: {shown[true]}\npredicted: {shown[guess]}, {p:.0%}" for true, guess, p in rows]
    figure = draw_pictures(pictures, captions)
    explain(figure, [*columns[0], *columns[1]], shown)
    return figure
