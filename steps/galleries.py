"""Step 9: pictures that show images of the data set, so they are never published."""

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import Trainer

from .architectures import CLASS_TOKEN, pixel_shape
from .duplicates import Scenes
from .files import probability_columns
from .lettering import explain, letter
from .model import attention_rollout
from .preprocess import pixels_of


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
