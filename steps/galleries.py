"""Step 9: pictures that show images of the data set, so they are never published."""

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from transformers import Trainer

from .architectures import pixel_shape
from .attribution import attribute
from .duplicates import Scenes, conflicting
from .files import probability_columns, read_table
from .lettering import escape, explain, fonts_for, letter, shorten, width_of
from .preprocess import pixels_of

LETTERS = 46  # in a line of a caption
ORANGE = "#FF7800"  # what speaks for an answer, over a grey picture


def galleries(
    predictions: pd.DataFrame, scenes: Scenes, images: Dataset, trainer: Trainer
) -> dict[str, Callable[[], Figure]]:
    """Return {file name: function that draws it}: mistakes, right answers, doubtful and conflicting labels.

    Up to 12 of each. Right answers, one per class, and mistakes stand beside what speaks for them. The
    doubtful labels are the first of report/label_issues.csv.
    """
    tested, names = predictions[predictions["split"] == "test"], images.features["label"].names
    tested = tested.iloc[np.argsort(-tested[probability_columns(names)].max(axis=1), kind="stable")]
    right = tested["label"] == tested["prediction"]
    shown = {"mistakes.png": tested[~right], "attribution.png": tested[right].groupby("label").head(1)}
    drawn = {
        name: partial(draw_examples, rows[:12], names, images, trainer)
        for name, rows in shown.items()
        if len(rows)
    }
    conflicts = conflicting(scenes.pairs)
    if len(conflicts):
        drawn["label_conflicts.png"] = partial(draw_conflicts, conflicts[:12], images, trainer)
    path = Path(trainer.args.output_dir) / "report" / "label_issues.csv"
    issues = read_table(path, ["file", "label", "proposed", "p_proposed"])
    if len(issues):
        drawn["label_issues.png"] = partial(draw_issues, issues[:12], images, trainer)
    return drawn


def draw_pictures(pictures: np.ndarray, captions: list[str]) -> Figure:
    """Draw pictures, uint8 (n, height, width, 3), three per row, below their captions."""
    rows, families = -(-len(pictures) // 3), fonts_for(captions)
    captions = [wrap(caption) for caption in captions]
    lines = max(caption.count("\n") for caption in captions) + 1
    figure = Figure(figsize=(10, (1.7 + 0.17 * lines) * rows), layout="constrained")
    grid = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, picture, caption in zip(grid, pictures, captions, strict=False):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, fontfamily=families)
    return figure


def wrap(caption: str) -> str:
    """Return a caption with no line longer than its picture is wide."""
    lines = []
    for line in caption.split("\n"):
        most = LETTERS * len(line) // max(1, width_of(line))  # fewer, if they are wide
        lines += textwrap.wrap(line, most, drop_whitespace=False, break_on_hyphens=False)
    return "\n".join(lines)


def name_files(files: pd.Series, labels: pd.Series) -> list[str]:
    """Return names to show: without a folder that only repeats the label, long ones without their middle."""
    families = fonts_for(files)
    paths = [PurePosixPath(file) for file in files]
    names = [
        path.name if str(path.parent) == label else str(path)
        for path, label in zip(paths, labels, strict=True)
    ]
    return [shorten(escape(name, families), LETTERS) for name in names]


def join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return pictures, uint8 (n, height, width, 3), side by side with a white line between them."""
    return np.concatenate([left, np.full_like(left[:, :, :4], 255), right], axis=2)


def draw_conflicts(pairs: pd.DataFrame, images: Dataset, trainer: Trainer) -> Figure:
    """Draw near-duplicates with different labels, the file that is named first on the left."""
    shape = pixel_shape(trainer.processing_class)
    left, right = (pixels_of(pairs[name], images, shape) for name in ("file_a", "file_b"))
    shown = letter(images.features["label"].names)
    files = (name_files(pairs[f"file_{side}"], pairs[f"label_{side}"]) for side in "ab")
    rows = zip(*files, pairs["label_a"], pairs["label_b"], pairs["distance"], strict=True)
    captions = [
        f"{a}\n{b}\n{shown[one]} | {shown[two]}\ndistance {near:.3f}" for a, b, one, two, near in rows
    ]
    figure = draw_pictures(join(left, right), captions)
    explain(figure, [*pairs["label_a"], *pairs["label_b"]], shown)
    return figure


def draw_issues(issues: pd.DataFrame, images: Dataset, trainer: Trainer) -> Figure:
    """Draw images whose labels are in doubt, each with its file name, its label and the proposed class."""
    pictures = pixels_of(issues["file"], images, pixel_shape(trainer.processing_class))
    shown, files = letter(images.features["label"].names), name_files(issues["file"], issues["label"])
    rows = zip(files, issues["label"], issues["proposed"], issues["p_proposed"], strict=True)
    captions = [
        f"{file}\nlabel: {shown[label]}\nproposed: {shown[proposed]}, {p:.0%}"
        for file, label, proposed, p in rows
    ]
    figure = draw_pictures(pictures, captions)
    explain(figure, [*issues["label"], *issues["proposed"]], shown)
    return figure


def draw_examples(
    predictions: pd.DataFrame, class_names: list[str], images: Dataset, trainer: Trainer
) -> Figure:
    """Draw predicted images beside the places that speak for the answer."""
    pixels = pixels_of(predictions["file"], images, pixel_shape(trainer.processing_class))
    inputs = torch.tensor(pixels.transpose(0, 3, 1, 2))
    maps = attribute(trainer.model, inputs)
    certain = predictions[probability_columns(class_names)].max(axis=1)
    columns = predictions["label"], predictions["prediction"], certain
    shown, rows = letter(class_names), zip(name_files(predictions["file"], columns[0]), *columns, strict=True)
    captions = [
        f"{file}\nlabel: {shown[true]}\npredicted: {shown[guess]}, {p:.0%}" for file, true, guess, p in rows
    ]
    figure = draw_pictures(join(pixels, overlay(pixels, maps)), captions)
    figure.set_figheight(figure.get_figheight() + 0.5)
    scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("", ["grey", ORANGE]))
    bar = figure.colorbar(scale, ax=figure.axes, location="bottom", shrink=0.3, aspect=30, pad=0.01)
    bar.set_ticks([0, 1], labels=["nothing", "most of this image"], fontsize=8)
    bar.set_label("speaks for the predicted class", fontsize=8, labelpad=-8)
    explain(figure, [*columns[0], *columns[1]], shown)
    return figure


def overlay(pixels: np.ndarray, maps: torch.Tensor) -> np.ndarray:
    """Return grey pictures, uint8 (n, height, width, 3), orange where `maps` (n, cells, cells) is high.

    What speaks against the answer, below 0, stays grey; full orange is the most of each image.
    """
    large = F.interpolate(maps[:, None], pixels.shape[1:3], mode="bilinear")[:, 0].clamp(min=0)
    weight = 0.9 * (large / large.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()[..., None]
    mixed = (1 - weight) * pixels.mean(axis=3, keepdims=True) + weight * 255 * np.array(to_rgb(ORANGE))
    return mixed.astype(np.uint8)
