"""Step 3: what the folders say of the images in them: their label, their split, their patient."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NoReturn

import pandas as pd

from .columns import COLUMN_WORDS, SPLIT_WORDS, TABLES, plain
from .console import listed, log, stop
from .files import nfc, visible
from .suspects import IMAGE_WORDS, looks_like, masks_beside

ACCEPTED = (
    "CLASS/image, CLASS/PATIENT/image, PATIENT/CLASS/image, each of them also in train/, validation/, test/"
)
TABLE = "name the label of each image in a table: --metadata FILE.csv"


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
    log.info("accepted: %s; or %s", ACCEPTED, TABLE)
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
            refuse(problem, f"sort them into class folders, or {TABLE}", files, folder)
        problem = f"{len(loose)} of the images lie beside the class folders, such as {loose[0]}"
        refuse(problem, "move them away", files, folder)
    check_classes(paths, files, folder, asked=group_by is not None)
    how = group_by or choose_level(paths, files, folder)
    level = 1 if how == "parent" else 0
    for file, path in paths.items():
        if len(path) <= level:
            refuse(f"{file} is in no folder below {path[0]}", "give another --group_by", files, folder)
    say_how(how, paths, bool(splits))
    if how == "folder" and looks_like_ids({path[0] for path in paths.values()}):
        text = "warning: the classes are then %s: if these are patients, give --group_by parent"
        log.warning(text, ", ".join(sorted({path[0] for path in paths.values()})[:3]))
    label = [path[level] for path in paths.values()]
    patient = {"parent": 0, "folder": 1, "none": None}[how]
    known = [patient is not None and len(path) > patient for path in paths.values()]
    group = [path[patient] if here else "" for path, here in zip(paths.values(), known, strict=True)]
    split = [splits[file.split("/")[0]] if splits else "" for file in files]
    return pd.DataFrame({"file": files, "label": label, "split": split, "group": [*map(nfc, group)]})


def check_classes(paths: dict[str, list[str]], files: list[str], folder: Path, *, asked: bool) -> None:
    """Raise SystemExit where folders are named like splits, parts or masks, not like classes.

    If the user has `asked` for this reading, only warn. Also warn of files that look like masks of others.
    """
    tops, below = {path[0] for path in paths.values()}, {path[1] for path in paths.values() if len(path) > 1}
    tables = sorted(entry.name for entry in visible(folder) if entry.suffix.lower() in TABLES)
    table = TABLE.replace("FILE.csv", tables[0]) if tables else TABLE
    kind, names = looks_like(tops), sorted(tops)
    if not kind and looks_like(below) == "masks":
        kind, names = "masks", sorted(below)
    if kind == "parts" and {name.casefold() for name in below} - IMAGE_WORDS:
        kind = ""  # choose_level knows more
    first = listed(names, 3)
    problem, remedy = f"the folders {first} look like {kind} of a data set, not like classes", table
    if kind == "splits" and below:
        remedy = "rename them to train, validation, test"
    elif kind == "masks":
        problem = f"some of the folders {first} look like masks, not classes"
        remedy = f"move the masks away; without class folders, {table}"
    elif not kind and tables and len(tops) == 1 and not below:
        kind, problem = "one", f"all images lie in one folder, {first}, beside {tables[0]}"
    if kind and asked:
        log.warning("warning: %s", problem)
    elif kind:
        classes = "" if kind == "one" else "; if they are classes, give --group_by none"
        refuse(problem, remedy + classes, files, folder)
    if of := masks_beside(files):
        text = (
            "warning: %s images look like masks, such as %s (of %s); move them away, or the model learns them"
        )
        log.warning(text, len(of), *min(of.items()))


def read_around(files: list[str], group_by: str | None, labels: set[str]) -> pd.DataFrame:
    """Return what folders say where a table gives the `labels`: columns file, split, folder, group.

    `folder` is the first one, within a split. With a `group_by` of "folder" or "parent", the group is the
    first folder that is not called like a class.
    """
    splits, rows = read_splits(files) or {}, []
    for file in files:
        path = nfc(file).split("/")[:-1]
        split = splits.get(path[0], "") if path else ""
        path = path[1:] if split else path
        others = [name for name in path[:2] if name not in labels] if group_by in ("folder", "parent") else []
        rows.append((file, split, path[0] if path else "", others[0] if others else ""))
    return pd.DataFrame(rows, columns=["file", "split", "folder", "group"])


def say_how(how: str, paths: dict[str, list[str]], splits: bool) -> None:
    """Log how folders are read, unless they are class folders and no more."""
    if splits or how != "none" or any(len(path) > 1 for path in paths.values()):
        words = {"none": "CLASS", "folder": "CLASS/PATIENT", "parent": "PATIENT/CLASS"}[how]
        log.info("understood as %s%s/image", "SPLIT/" if splits else "", words)
    deep = {"/".join(path[:2]) for path in paths.values() if len(set(path)) > 1}  # and not cat/cat
    if how == "none" and deep:
        text = "warning: %s folders lie in the class folders, such as %s: if they are patients, "
        log.warning(text + "give --group_by folder", len(deep), min(deep))


def find_splits(files: list[str], folder: Path) -> dict[str, str] | None:
    """Return {first folder: its split} if they hold class folders; else train and test may be classes."""
    splits, loose = read_splits(files), [file for file in files if file.count("/") < 2]
    if splits and not loose:
        return splits
    if splits and len(loose) == len(files) and len(splits) > 1:
        text = "warning: the classes are called %s: if these are splits, %s"
        log.warning(text, ", ".join(sorted(splits)), TABLE)
    tops = {file.split("/")[0] for file in set(files) - set(loose)}
    named = sorted(top for top in tops if top.casefold() in SPLIT_WORDS)
    if named and (splits or len(named) > 1):
        strange = min(loose or [file for file in files if file.split("/")[0] not in named])
        problem = f"{', '.join(named)} look like splits that hold class folders, but {strange} does not fit"
        remedy = f"move such images away, or give --data_dir {folder / named[0]} to use only that"
        refuse(problem, remedy, files, folder)
    return None


def looks_like_ids(names: Collection[str]) -> bool:
    """Say whether names are those of patients: p1, case_07; or at least 20 of any word and a number."""
    shapes = {re.sub(r"\d+", "0", name) for name in names}
    words = ["p", "pt", "pat", "s", "sub", "subj", "id", *COLUMN_WORDS["group"].split()]
    known = len(shapes) == 1 and plain(min(shapes)).rstrip("0") in words
    return len(shapes) == 1 and "0" in min(shapes) and (known or len(names) >= 20)


def choose_level(paths: dict[str, list[str]], files: list[str], folder: Path) -> str:
    """Return "none" if the first folder is the label, "parent" if the second is. SystemExit if unclear.

    The second is, if the first ones look like the IDs of patients and the same few names return in them.
    """
    inside = defaultdict(set)
    for path in paths.values():  # of cat/cat/1.jpg the first folder counts
        inside[path[0]].add("" if len(path) == 1 or path[1] == path[0] else path[1])
    tops, below = inside.keys(), set().union(*inside.values())
    for top, names in inside.items():
        shared = names & tops
        if len(shared) > 1 or (shared and shared == names):
            problem = f"{top} in {folder} holds folders with the same names as those beside it"
            refuse(problem, f"delete the copy, or give --data_dir {folder / top}", files, folder)
    below -= {""}
    if not below or len(tops) < 2:
        return "none"
    remedy = "say how to read them: --group_by none (CLASS), folder (CLASS/PATIENT), parent (PATIENT/CLASS)"
    deeper = [top for top, names in inside.items() if "" not in names]
    if deeper and {""} in inside.values():
        problem = f"some images lie directly in a folder of {folder}, others deeper, as in {deeper[0]}"
        refuse(problem, remedy, files, folder)
    crossed = sum(len(names - {""}) for names in inside.values()) >= 2 * len(below)
    patients_first = looks_like_ids(tops)
    if len(below) < 2 or (not crossed and not (patients_first and len(below) <= len(tops))):
        return "none"
    classes = not looks_like_ids(below) and not all(name.casefold() in SPLIT_WORDS for name in below)
    if patients_first and crossed and len(deeper) == len(tops) and classes:
        return "parent"
    if patients_first or not looks_like_ids(below):
        either = f"{min(tops)} or {min(below)} may be a class"
        refuse(f"the folders in {folder} can be read in two ways: {either}", remedy, files, folder)
    return "none"


def refuse_empty(files: list[str], folder: Path, inside: Iterable[str], left_out: dict[str, str]) -> None:
    """Raise SystemExit if a class folder, in `folder` or in the folders `inside` it, holds no image.

    `left_out`, {file: why}, says what such a folder does hold.
    """
    for name in inside:
        start = f"{name}/" if name else ""
        filled = {file.removeprefix(start).split("/")[0] for file in files if file.startswith(start)}
        empty = {entry.name for entry in visible(folder / name) if entry.is_dir()} - filled
        if empty:
            only = folder / name / min(filled) if len(filled) == 1 else None
            deeper = only and any(entry.is_dir() for entry in visible(only))
            remedy = f"give --data_dir {only}" if deeper else "fill or delete these folders"
            places = tuple(f"{start}{name}/" for name in empty)
            if reasons := {reason for file, reason in left_out.items() if file.startswith(places)}:
                remedy = f"found there instead: {listed(sorted(reasons), 3)}"
            stop(f"no images in {listed(sorted(empty))}", remedy)
