"""Step 5: train, validation and test, by whole groups and with the same shares of every class."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from .console import log, show, stop
from .duplicates import Scenes, count_pairs
from .files import read_table, remove, write_table
from .load import count_classes
from .options import Settings
from .workspace import Workspace, is_trained

SPLITS = ("train", "validation", "test")


def split_images(images: Dataset, scenes: Scenes, work: Workspace) -> DatasetDict:
    """Return the train, validation and test rows of `images`, recorded in report/split.csv.

    A split that is already recorded there is used again. Raises SystemExit where no split is possible.
    """
    path, settings = work.report / "split.csv", work.settings
    sizes = 1 - settings.test_size - settings.validation_size, settings.validation_size, settings.test_size
    shares = {name: size for name, size in zip(SPLITS, sizes, strict=True) if size}
    split = choose_split(images, scenes.groups, shares, work)
    check_split(images, split, shares, settings.split_by)
    if not path.exists():
        names = np.array(images.features["label"].names)
        table = {"file": images["file"][:], "label": names[images["label"][:]], "split": split}
        write_table(path, pd.DataFrame(table | {"group": scenes.groups.to_numpy()})[split != ""])
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not len(rows["validation"]):
        log.warning("warning: the test images choose the epoch and the temperature, which flatters the score")
        rows["validation"] = rows["test"]
    return DatasetDict({name: images.select(rows[name]) for name in SPLITS})


def choose_split(images: Dataset, groups: pd.Series, shares: dict[str, float], work: Workspace) -> np.ndarray:
    """Return the name of each image's split (n,), "" for none: as recorded, as given, or dealt out."""
    path, settings, files = work.report / "split.csv", work.settings, images["file"][:]
    labels, names = np.array(images["label"]), images.features["label"].names
    total = np.bincount(labels, minlength=len(names))
    if min(total) < len(shares):
        remedy = f"each class needs {len(shares)}, one for each split"
        stop(f"too few readable images of {names[total.argmin()]}", remedy)
    whole = kept_whole(groups, settings)
    fewest, scarce = min((len(set(whole[labels == label])), name) for label, name in enumerate(names))
    if fewest < settings.cross_validate:
        text = f"--cross_validate {settings.cross_validate}, but only {fewest} groups of images of {scarce}"
        stop(text, "give fewer folds: each tests every class")
    given = settings.split_file
    split = split_by_file(files, path) if path.exists() else None
    if given:
        wanted = split_by_file(files, given)
        if split is not None and (split != wanted).any():
            if is_trained(work.output_dir):
                stop(f"{given} has changed since {path} was made from it", "use another --output_dir")
            remove(path)
        return wanted
    if split is not None:
        return split
    if fewest < len(shares):
        remedy = "add other images, or decide yourself with --split_by FILE.csv"
        stop(f"too few groups of near-duplicates in {scarce}: each class needs {len(shares)}", remedy)
    return np.array([*shares], dtype=object)[deal(labels, whole, [*shares.values()], work.training.seed)]


def check_split(images: Dataset, split: np.ndarray, shares: dict[str, float], split_by: str) -> None:
    """Raise SystemExit where a class cannot be learned or nothing is tested; warn where shares are off."""
    labels, names = np.array(images["label"]), images.features["label"].names
    total = np.bincount(labels, minlength=len(names))
    for name, size in shares.items():
        counts = np.bincount(labels[split == name], minlength=len(names))
        absent = ", ".join(np.array(names)[counts == 0])
        if absent and (name == "train" or not counts.any()):
            stop(f"no {name} images of {absent}", "change the split's sizes or CSV file")
        if absent:
            log.warning("warning: no %s images of %s: no %s score counts them", name, absent, name)
        far = np.abs(counts - size * total) > np.maximum(0.02 * total, 1)
        if far.any() and split_by == "near-duplicates":
            held = ", ".join(f"{names[i]} {counts[i] / total[i]:.0%}" for i in np.flatnonzero(far))
            log.warning("warning: groups are too large for %.0f%% in %s: %s", 100 * size, name, held)


def kept_whole(groups: pd.Series, settings: Settings) -> np.ndarray:
    """Return what a split must not divide: the groups, or for a random split each image by itself (n,)."""
    return np.arange(len(groups)) if settings.split_by == "random" else groups.to_numpy()


def deal(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Return the part, 0 to len(shares) - 1, of each image (n,): whole groups, `shares` of every class.

    Groups are dealt out by size, large ones first, in an order drawn from `seed`; each goes where it least
    raises Pearson's chi-squared against the shares. scikit-learn's StratifiedGroupKFold knows no shares.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    wanted = np.maximum(np.outer(shares, counts.sum(0)), 1)  # at least one image of each class in each part
    held, part = np.zeros_like(wanted), np.empty(len(counts), int)
    order = np.random.RandomState(seed).permutation(len(counts))  # the same in every release of NumPy
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")]:
        part[group] = (counts[group] * (counts[group] + 2 * held) / wanted).sum(1).argmin()
        held[part[group]] += counts[group]
    return part[groups]


def split_by_file(files: list[str], path: Path) -> np.ndarray:
    """Return the split of each file (n,) in the CSV file `path`, "" if it has none. Raises SystemExit."""
    table = read_table(path, ["file", "split"], "give a CSV file with columns file, split")
    chosen = dict(zip(table["file"], table["split"], strict=True))
    if len(chosen) != len(table):
        stop(f"{path} names {len(table) - len(chosen)} files twice", "give each file one line")
    if wrong := sorted(set(chosen.values()) - set(SPLITS)):
        stop(f"{path} has unknown splits {wrong}", f"use {', '.join(SPLITS)}")
    if unknown := sorted(chosen.keys() - set(files)):
        stop(f"{path} names {len(unknown)} absent or unreadable files: {unknown[0]} …", "take them out")
    if len(chosen) < len(files):
        log.warning("left out: %s images that %s does not name", len(files) - len(chosen), path)
    return np.array([chosen.get(file, "") for file in files], dtype=object)


def cut_folds(splits: DatasetDict, groups: pd.Series, work: Workspace) -> list[DatasetDict]:
    """Return a division of all images per fold: fold k tests, fold k + 1 validates, the others train."""
    images = datasets.concatenate_datasets([splits[name] for name in SPLITS])
    images, folds = images.select(np.argsort(images["file"][:])), work.settings.cross_validate
    whole = kept_whole(groups[images["file"][:]], work.settings)
    part = deal(np.array(images["label"]), whole, [1 / folds] * folds, work.training.seed)
    roles = (
        np.select([part == fold, part == (fold + 1) % folds], ["test", "validation"], "train")
        for fold in range(folds)
    )
    return [
        DatasetDict({name: images.select(np.flatnonzero(role == name)) for name in SPLITS}) for role in roles
    ]


def show_splits(splits: DatasetDict, scenes: Scenes) -> None:
    """Show the images of each class in each split; warn of near-identical pairs that flatter the score."""
    table = pd.DataFrame({name: count_classes(part) for name, part in splits.items()})
    show(pd.concat([table, table.sum().to_frame("total").T]))
    counts = count_pairs(scenes, splits)
    text = "%(groups)s groups; %(near_duplicate_pairs)s near-identical pairs, %(pairs_across_splits)s of them"
    log.info(text + " on two sides, %(conflicting_label_pairs)s with different labels", counts)
    if counts["pairs_across_test"]:
        text = "warning: the score will be optimistic: %s pairs join a test image to one that is not"
        log.warning(text, counts["pairs_across_test"])
