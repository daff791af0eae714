"""Step 5: train, validation and test, by whole groups and with the same shares of every class."""

from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from .console import listed, log, show, stop
from .duplicates import Scenes, count_pairs
from .earlier import find_earlier, record_earlier
from .files import lookup, read_table, write_table
from .load import count_classes
from .options import SHOWN, Settings
from .workspace import Workspace, forget_split, is_trained

SPLITS = ("train", "validation", "test")


def split_images(images: Dataset, scenes: Scenes, work: Workspace) -> DatasetDict:
    """Return the train, validation and test rows of `images`, recorded in report/split.csv.

    A split that is already recorded there is used again. Raises SystemExit where no split is possible.
    """
    settings, files, path = work.settings, images["file"][:], work.report / "split.csv"
    shares = shares_of(settings)
    if path.exists():
        split = lookup(read_table(path, ["file", "split"]).set_index("file")["split"], files)
        check_complete(split, files, work)
    else:
        split = make_split(images, scenes, work)
    check_split(images, split, shares)
    if split_rule(images, settings.split_by, settings.split_otherwise) == "near-duplicates":
        warn_of_shares(images, split, scenes.groups, shares)
    if not path.exists():
        names = np.array(images.features["label"].names)
        table = {"file": files, "label": names[images["label"][:]], "split": split}
        write_table(path, pd.DataFrame(table | {"group": scenes.groups.to_numpy()}))
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not len(rows["validation"]):
        log.warning("warning: the test images choose the epoch and the temperature, which flatters the score")
        rows["validation"] = rows["test"]
    return DatasetDict({name: images.select(rows[name]) for name in SPLITS})


def check_complete(split: np.ndarray, files: list[str], work: Workspace) -> None:
    """Raise SystemExit where the recorded `split` (n,) lacks images: those that can be read only now."""
    if len(absent := np.array(files, dtype=object)[~np.isin(split, SPLITS)]):
        remedy = f"use another --output_dir, or delete {work.output_dir}"
        if not is_trained(work.output_dir):
            forget_split(work)
            remedy = "run the same command again: the split is made anew"
        stop(f"{work.report / 'split.csv'} puts {listed(absent, 3)} into no split", remedy)


def shares_of(settings: Settings) -> dict[str, float]:
    """Return {split: its share of the images}, without a split that gets none."""
    sizes = 1 - settings.test_size - settings.validation_size, settings.validation_size, settings.test_size
    return {name: size for name, size in zip(SPLITS, sizes, strict=True) if size}


def split_rule(images: Dataset, split_by: str | None, otherwise: str) -> str:
    """Return what was asked for, else "given" where the data have a split, else what the recipe says."""
    return split_by or ("given" if "split" in images.column_names else otherwise)


def make_split(images: Dataset, scenes: Scenes, work: Workspace) -> np.ndarray:
    """Return the name of each image's split (n,): as given, as an earlier model had it, or dealt out."""
    settings, shares = work.settings, shares_of(work.settings)
    rule = split_rule(images, settings.split_by, settings.split_otherwise)
    labels, names = np.array(images["label"][:]), images.features["label"].names
    whole = kept_whole(scenes.groups, rule)
    fewest, scarce = min((len(set(whole[labels == label])), name) for label, name in enumerate(names))
    if fewest < settings.cross_validate:
        few = f"but only {fewest} groups of images of {scarce}"
        remedy = "give fewer folds: each tests every class"
        stop(f"--cross_validate {settings.cross_validate}, {few}", remedy)
    files, earlier = images["file"][:], find_earlier(work)
    before = lookup(earlier, files) if earlier is not None else np.array([])
    if rule == "given":
        split = complete(np.array(images["split"][:], dtype=object), labels, whole, work)
    elif (before != "").any():
        log.info("the split of %s is kept, and new images are added", settings.model_name_or_path)
        split = extend(before, labels, whole, work)
    else:
        total = np.bincount(labels, minlength=len(names))
        if min(total) < len(shares):
            remedy = f"each class needs {len(shares)}, one for each split"
            stop(f"too few readable images of {names[total.argmin()]}", remedy)
        if fewest < len(shares):
            remedy = "add other images, or decide yourself: --metadata FILE.csv with columns file, split"
            stop(f"too few groups of images in {scarce}: each class needs {len(shares)}", remedy)
        split = deal_out(labels, whole, work)
    record_earlier(earlier, pd.Series(split, files), work)
    return split


def complete(split: np.ndarray, labels: np.ndarray, groups: np.ndarray, work: Workspace) -> np.ndarray:
    """Return a given split (n,), completed.

    Without test images, validation becomes the test; without validation, a part of train does. Raises
    SystemExit without training images.
    """
    if "train" not in split:
        stop("the given split has no training images", "name some, or give --split_by near-duplicates")
    if "test" not in split:
        log.warning("warning: the given split has no test images: its validation images are the test")
        split[split == "validation"] = "test"
    share, train = work.settings.validation_size, np.flatnonzero(split == "train")
    if "validation" not in split and share:
        text = "the given split has no validation images: %.0f%% of the training images, in whole groups"
        log.info(text, 100 * share)
        part = deal(labels[train], groups[train], [1 - share, share], work.training.seed)
        lost = ~np.isin(labels[train], labels[train][part == 0])  # of classes with one group
        part[np.isin(groups[train], groups[train][lost])] = 0
        split[train[part == 1]] = "validation"
    return split


def extend(earlier: np.ndarray, labels: np.ndarray, groups: np.ndarray, work: Workspace) -> np.ndarray:
    """Return the split of an earlier model with its new images, where `earlier` is "", dealt out (n,).

    A new image that shares a group with earlier ones goes to their side; if those are on several sides, to
    training: the model may have learned it.
    """
    split = earlier.copy()
    for name in ("test", "validation", "train"):
        split[(earlier == "") & np.isin(groups, groups[earlier == name])] = name
    new = np.flatnonzero(split == "")
    if len(new):
        split[new] = deal_out(labels[new], groups[new], work)
    return split


def deal_out(labels: np.ndarray, groups: np.ndarray, work: Workspace) -> np.ndarray:
    """Return the name of each image's split (n,), dealt out by the shares and the seed of the run."""
    shares = shares_of(work.settings)
    return np.array([*shares], dtype=object)[deal(labels, groups, [*shares.values()], work.training.seed)]


def check_split(images: Dataset, split: np.ndarray, shares: dict[str, float]) -> None:
    """Raise SystemExit where a class cannot be learned or nothing is tested; warn where it is not tested."""
    labels, names = np.array(images["label"][:]), images.features["label"].names
    for name in shares:
        counts = np.bincount(labels[split == name], minlength=len(names))
        absent = listed(np.array(names)[counts == 0])
        if absent and (name == "train" or not counts.any()):
            stop(f"no {name} images of {absent}", "change the split's sizes or its table")
        if absent:
            log.warning("warning: no %s images of %s: no %s score counts them", name, absent, name)


def warn_of_shares(images: Dataset, split: np.ndarray, groups: pd.Series, shares: dict[str, float]) -> None:
    """Warn where a split has another share of a class than was asked for, and say what keeps it from it."""
    labels, names = np.array(images["label"][:]), images.features["label"].names
    total = np.bincount(labels, minlength=len(names))
    in_groups = np.bincount(labels, groups.groupby(groups).transform("size") > 1, len(names)) > 0
    for name, size in shares.items():
        counts = np.bincount(labels[split == name], minlength=len(names))
        far = np.abs(counts - size * total) > np.maximum(0.02 * total, 1)
        for those, reason in ((in_groups, "groups are kept whole"), (~in_groups, "too few images")):
            if held := [f"{names[i]} {counts[i] / total[i]:.0%}" for i in np.flatnonzero(far & those)]:
                text = "warning: %s should hold %.0f%% of each class (%s), but holds: %s"
                log.warning(text, name, 100 * size, reason, listed(held))


def kept_whole(groups: pd.Series, rule: str) -> np.ndarray:
    """Return what a split must not divide: the groups, or for a random split each image by itself (n,)."""
    return np.arange(len(groups)) if rule == "random" else groups.to_numpy()


def deal(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Return the part, 0 to len(shares) - 1, of each image (n,): whole groups, `shares` of every class.

    Groups are dealt out by size, large ones first, in an order drawn from `seed`; each goes where it least
    raises Pearson's chi-squared against the shares, but no part stays without a class as long as there are
    groups of it for all. scikit-learn's StratifiedGroupKFold knows no shares.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    wanted = np.maximum(np.outer(shares, counts.sum(0)), 1)  # at least one image of each class in each part
    held, part, left = np.zeros_like(wanted), np.empty(len(counts), int), (counts > 0).sum(0)
    order = np.random.RandomState(seed).permutation(len(counts))  # the same in every release of NumPy
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")]:
        cost = (counts[group] * (counts[group] + 2 * held) / wanted).sum(1)
        lacking = (held == 0) & (counts[group] > 0)
        if (must := (lacking & (lacking.sum(0) >= left)).any(1)).any():  # its classes' last chance there
            cost[~must] = np.inf
        part[group] = cost.argmin()
        held[part[group]] += counts[group]
        left -= counts[group] > 0
    return part[groups]


def cut_folds(splits: DatasetDict, groups: pd.Series, work: Workspace) -> list[DatasetDict]:
    """Return a division of all images per fold: fold k tests, fold k + 1 validates, the others train."""
    images = datasets.concatenate_datasets([splits[name] for name in SPLITS])
    images, folds = images.select(np.argsort(images["file"][:])), work.settings.cross_validate
    rule = split_rule(images, work.settings.split_by, work.settings.split_otherwise)
    whole = kept_whole(groups[images["file"][:]], rule)
    part = deal(np.array(images["label"][:]), whole, [1 / folds] * folds, work.training.seed)
    roles = (
        np.select([part == fold, part == (fold + 1) % folds], ["test", "validation"], "train")
        for fold in range(folds)
    )
    return [
        DatasetDict({name: images.select(np.flatnonzero(role == name)) for name in SPLITS}) for role in roles
    ]


def rarest_classes(counts: pd.DataFrame | dict[str, dict[str, int]]) -> list[str]:
    """Return the classes that a table has room for: all, or those with the fewest images, rarest first.

    `counts` has the images of each class, a column or dictionary per split.
    """
    total = pd.DataFrame(counts).sum(axis=1)
    return [*total.index] if len(total) <= SHOWN else [*total.sort_values(kind="stable").index[:SHOWN]]


def show_splits(splits: DatasetDict, scenes: Scenes) -> None:
    """Show the images of each class in each split; warn of what flatters the score, or says nothing."""
    table = pd.DataFrame({name: count_classes(part) for name, part in splits.items()})
    rarest = rarest_classes(table)
    title = f"rarest of {len(table):,} classes (split.csv: all)" if len(rarest) < len(table) else None
    show(pd.concat([table.loc[rarest], table.sum().to_frame("total").T]).rename_axis(title))
    counts = count_pairs(scenes, splits)
    if "patients" in counts:
        text = (
            "%(patients)s patients or given groups, %(scenes)s scenes; those that share images form a group"
        )
        log.info(text, counts)
    if counts.get("patients_across_test"):
        text = "warning: the score will be optimistic: %s patients are both in the test and outside it"
        log.warning(text, counts["patients_across_test"])
    text = "%(groups)s groups; %(near_duplicate_pairs)s near-duplicate pairs, %(pairs_across_splits)s of them"
    log.info(text + " on two sides, %(conflicting_label_pairs)s with different labels", counts)
    if counts["pairs_across_test"]:
        text = "warning: the score will be optimistic: %s pairs join a test image to one that is not"
        log.warning(text, counts["pairs_across_test"])
    if scenes.groups[splits["test"]["file"][:]].nunique() == 1:
        text = (
            "warning: all test images are of one group (patient or scene): the score says nothing of others"
        )
        log.warning(text)
