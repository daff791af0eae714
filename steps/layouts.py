"""Step 3: what the folders say of the images in them: their label, their split, their patient."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NoReturn

import pandas as pd

from .archives import visible
from .columns import SPLIT_WORDS
from .console import log, stop

ACCEPTED = (
    "CLASS/image, CLASS/PATIENT/image, PATIENT/CLASS/image, each of them also in train/, validation/, test/"
)
TABLE = "or name the label of each image in a table: --metadata FILE.csv"


def refuse(problem: str, remedy: str, files: list[str], folder: Path) -> NoReturn:
    """Show what was found in `folder`, at most 8 lines, and what is accepted; then raise SystemExit."""
    tree = defaultdict(lambda: [0, set()])
    for file in files:
        top, *inside = file.split("/")
        count_and_names = tree[f"{top}/" if inside else "(no folder)"]
        count_and_names[0] += 1
        count_and_names[1] |= set(inside[:-1][:1])
    log.info("found in %s:", folder)
    for name, (count, inside) in sorted(tree.items())[: 7 if len(tree) == 7 else 6]:
        more = ", ".join(sorted(inside)[:4]) + (" …" if len(inside) > 4 else "")
        log.info("  %s images: %s%s", name, count, f"; folders: {more}" if inside else "")
    if len(tree) > 7:
        log.info("  … and %s more", len(tree) - 6)
    log.info("accepted: %s; %s", ACCEPTED, TABLE)
    stop(problem, remedy)


def read_splits(files: list[str]) -> dict[str, str] | None:
    """Return {first folder: its split} if all first folders are called train, test and so on, else None."""
    tops = {file.split("/")[0] for file in files if "/" in file}
    splits = {top: SPLIT_WORDS[top.casefold()] for top in tops if top.casefold() in SPLIT_WORDS}
    return splits if splits.keys() == tops and all("/" in file for file in files) else None


def read_folders(files: list[str], folder: Path, group_by: str | None) -> pd.DataFrame:
    """Return what the folders of `files`, str relative to `folder`, say: columns file, label, split, group.

    All str, "" where nothing is known. `group_by` is the setting: "folder" if the folders in a class are
    patients, "parent" if those around the classes are, "none" if neither, None to see for itself. Raises
    SystemExit where the folders can be read in two ways, or in none.
    """
    paths, splits = {file: file.split("/")[:-1] for file in files}, find_splits(files, folder)
    if splits:
        paths = {file: path[1:] for file, path in paths.items()}
    if loose := [file for file, path in paths.items() if not path]:
        if len(loose) == len(files):
            problem = f"the images in {folder} have no class folders"
            refuse(problem, f"sort them into such, {TABLE}", files, folder)
        problem = f"{len(loose)} of the images lie beside the class folders, such as {loose[0]}"
        refuse(problem, "move them away", files, folder)
    how = group_by or choose_level(paths, files, folder)
    level = 1 if how == "parent" else 0
    for file, path in paths.items():
        if len(path) <= level:
            refuse(f"{file} is in no folder below {path[0]}", "give another --group_by", files, folder)
    other = {"parent": 0, "folder": 1}.get(how)
    label = [path[level] for path in paths.values()]
    group = ["" if other is None else "".join(path[other : other + 1]) for path in paths.values()]
    split = [splits[file.split("/")[0]] if splits else "" for file in files]
    if splits or how != "none" or any(len(path) > 1 for path in paths.values()):
        words = {"none": "CLASS", "folder": "CLASS/PATIENT", "parent": "PATIENT/CLASS"}[how]
        log.info("understood as %s%s/image", "SPLIT/" if splits else "", words)
    if how == "none" and (deep := {"/".join(path[:2]) for path in paths.values() if len(set(path)) > 1}):
        text = "%s folders lie in the class folders, such as %s: if they are patients, give --group_by folder"
        log.info(text, len(deep), min(deep))
    return pd.DataFrame({"file": files, "label": label, "split": split, "group": group})


def find_splits(files: list[str], folder: Path) -> dict[str, str] | None:
    """Return {first folder: its split} if class folders lie in them; train and test may be classes, too."""
    nested = [file for file in files if file.count("/") > 1]
    splits = read_splits(files)
    tops = {file.split("/")[0] for file in nested}
    if splits and len(nested) == len(files):
        return splits
    if splits and not nested and len(splits) > 1:
        log.warning(
            "warning: the classes are called %s: if these are splits, %s",
            ", ".join(sorted(splits)),
            TABLE[3:],
        )
    named = sorted(top for top in tops if top.casefold() in SPLIT_WORDS)
    if named and (splits or len(named) > 1):
        others = sorted(
            {file.split("/")[0] for file in files if file not in set(nested)} | (tops - set(named))
        )
        problem = f"{', '.join(named)} hold class folders, as splits do, but {', '.join(others)} does not"
        remedy = f"move it away, or give --data_dir {folder / named[0]} to use only that"
        refuse(problem, remedy, files, folder)
    return None


def looks_like_ids(names: Collection[str]) -> bool:
    """Say whether names are a word and a number, as those of patients are: p1, case_07; or many numbers."""
    shapes = {re.sub(r"\d+", "0", name) for name in names}
    return len(shapes) == 1 and "0" in min(shapes) and (shapes != {"0"} or len(names) >= 10)


def choose_level(paths: dict[str, list[str]], files: list[str], folder: Path) -> str:
    """Return "none" if the first folder is the label, "parent" if the second is. SystemExit if unclear."""
    inside = defaultdict(set)
    for path in paths.values():
        inside[path[0]].add("" if len(path) == 1 or path[1] == path[0] else path[1])
    tops, below = inside.keys(), set().union(*inside.values())
    for top, names in inside.items():
        if len(names & tops) > 1 or (names & tops and len(names) == len(names & tops)):
            remedy = f"delete one of the two, or give --data_dir {folder / top}"
            refuse(f"{top} in {folder} holds folders called like those beside it", remedy, files, folder)
    if below == {""} or len(tops) < 2:
        return "none"
    nested = [top for top, names in inside.items() if "" not in names]
    remedy = (
        "say which are the classes: --group_by none (the first folders), folder (the first; those in them "
    )
    remedy += "are patients) or parent (the second; the first are patients)"
    if 0 < len(nested) < len(tops) and [top for top, names in inside.items() if names == {""}]:
        problem = f"some images in {folder} lie in a first folder, others deeper, in {nested[0]}"
        refuse(problem, remedy, files, folder)
    crossed = sum(map(len, inside.values())) >= 2 * len(below)
    patients_first = looks_like_ids(tops)
    if "" in below or len(below) < 2 or (not crossed and not (patients_first and len(below) <= len(tops))):
        return "none"
    if patients_first == looks_like_ids(below) or (patients_first and not crossed):
        problem = (
            f"the folders in {folder} can be read in two ways: {min(tops)} or {min(below)} may be a class"
        )
        refuse(problem, remedy, files, folder)
    return "parent" if patients_first else "none"


def refuse_empty(files: list[str], folder: Path, inside: Iterable[str] = ("",)) -> None:
    """Raise SystemExit if a class folder, in `folder` or in the folders `inside` it, holds no image."""
    for name in inside:
        filled = {file.removeprefix(f"{name}/").split("/")[0] for file in files if file.startswith(name)}
        empty = {entry.name for entry in visible(folder / name) if entry.is_dir()} - filled
        if empty:
            stop(f"no images in {', '.join(sorted(empty))}", "fill or delete these folders")
