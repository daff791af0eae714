"""Step 3: what the rows of tables say of the images: their label, their split, their patient."""

import re
from pathlib import Path
from typing import NoReturn

import pandas as pd

from .columns import SPLIT_WORDS, choose_columns, find_columns, plain
from .console import listed, log, stop
from .files import folded
from .layouts import read_splits
from .options import Settings
from .tables import Table, called_like_folder, find_tables, index_files, match, parts_of

WEAK = "category grade level".split()  # columns that may be labels, but not where folders are classes
NOBODY = ("", "na", "nan", "none", "null", "unknown", "unk", "missing", "anonymous")  # patients that are none
WITHOUT_IMAGE, REPEATED = "rows without an image", "repeated rows for an image"  # why a row is left out
ONES = {"1": 1, "true": 1, "yes": 1, "x": 1, "0": 0, "false": 0, "no": 0, "": 0}


def read_rows(
    files: list[str], folder: Path, settings: Settings
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Return what tables say of `files`, str relative to `folder`, and {what is left out: why}.

    Columns, all str, "" where nothing is: those of label, split, group that a table has; the index is the
    file. None if there is no table. Raises SystemExit where one cannot be understood.
    """
    rows, left_out, covered = None, {}, []
    for table in find_tables(folder, settings):
        below = [file for file in files if file.startswith(table.base)]
        more, reasons = read_one(table, below, folder, settings)
        if more is not None:
            rows = more if rows is None else merge(rows, more, reasons)
            covered, left_out = covered + below, left_out | reasons
    if rows is None:
        return None, {}
    for file in sorted(set(covered) - set(rows.index)):
        left_out.setdefault(file, "images without a row")
    return rows[~rows.index.isin(left_out)], left_out


def merge(rows: pd.DataFrame, more: pd.DataFrame, left_out: dict[str, str]) -> pd.DataFrame:
    """Return what two tables say of images; add to `left_out` those of which they say different things."""
    both = rows.index.intersection(more.index)
    for role in rows.columns.intersection(more.columns):
        one, other = rows.loc[both, role], more.loc[both, role]
        differ = both[(one != other) & (one != "") & (other != "")]
        left_out |= dict.fromkeys(differ, "images of which two tables say different things")
    return rows.where(rows != "").combine_first(more).fillna("")


def read_one(
    table: Table, files: list[str], folder: Path, settings: Settings
) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Return what one table says of `files`, and {what is left out: why}; see `read_rows`.

    A row that is left out is named by its number.
    """
    image, found = choose_image(table, files, folder, settings)
    columns = choose_roles(table, files, settings)
    if not (image and columns):
        if table.asked_for:
            refuse_columns(table, image)
        log.info("%s says nothing of labels, splits or patients: not used", table.name)
        return None, {}
    if not (found != "").any():
        if not table.asked_for and not files:
            return None, {}
        example = table.cells[image].iloc[0] if len(table.cells) else ""
        why = f"for example {example!r}" if example else "no rows"
        if index_files(files, table.base).get("/".join(parts_of(example))) == "":
            why = f"several are called {example}"
        stop(f"no row of {table.name} names one image in {folder}: {why}", f"it should be like {files[0]}")
    roles = {"image": [image]} | columns
    understood = ", ".join(f"{role}: {' '.join(names)}" for role, names in roles.items())
    log.info("understood the columns of %s as %s", table.name, understood)
    rows = pd.DataFrame({"file": found, "number": range(1, len(found) + 1), "named": table.cells[image]})
    for role, names in columns.items():
        rows[role] = table.cells[names[0]] if len(names) == 1 else one_hot(table.cells[names], table.name)
    return settle(rows, list(columns), table.name)


def refuse_columns(table: Table, image: str) -> NoReturn:
    """Raise SystemExit: no column is known to name the images, or none to say something of them."""
    what, flags = "the images", "--image_column_name"
    if image:
        what, flags = "labels, splits or patients", "--label_column_name"
        flags += (
            f" {' '.join(ones)}"
            if len(ones := ones_of(table)) > 1
            else ", --split_... or --group_column_name"
        )
    remedy = f"its columns are {', '.join(table.cells)}: give {flags}"
    stop(f"no column of {table.name} is known to hold {what}", remedy)


def ones_of(table: Table) -> list[str]:
    """Return the columns that hold 0 and 1 and nothing else, as those of one-hot labels do."""
    return [name for name in table.cells if is_binary(table.cells[name])]


def is_binary(column: pd.Series) -> bool:
    """Say whether a column, str, holds 0 and 1 and nothing else."""
    return {value.removesuffix(".0") for value in column.unique()} == {"0", "1"}


def choose_roles(table: Table, files: list[str], settings: Settings) -> dict[str, list[str]]:
    """Return {"label", "split", "group": its columns}, without those that the table lacks."""
    names = [*table.cells]
    labels = choose_columns("label", names, settings)
    if labels and not settings.label_column_name and plain(labels[0]) in WEAK:
        tops = {file.split("/")[0] for file in files if "/" in file}
        if len(tops) > 1 and not read_splits(files):
            text = "warning: folders name the classes, not the column %s: if it does, --label_column_name %s"
            log.warning(text, labels[0], labels[0])
            labels = []
    if len(labels) == 1 and is_binary(table.cells[labels[0]]) and len(ones := ones_of(table)) > 2:
        text = "warning: %s hold 0 and 1, too: if each is a class, name them all after --label_column_name"
        log.warning(text, ", ".join(name for name in ones if name not in labels))
    others = [name for name in names if name not in labels]
    splits = choose_columns("split", others, settings)
    if splits and not settings.split_column_name:
        values = set(table.cells[splits[0]].str.casefold())
        if not values & SPLIT_WORDS.keys():
            log.warning("warning: %s is no split: it holds %s", splits[0], listed(sorted(values), 3))
            splits = []
    columns = {"label": labels, "split": splits, "group": choose_columns("group", others, settings)}
    return {role: names for role, names in columns.items() if names}


def choose_image(table: Table, files: list[str], folder: Path, settings: Settings) -> tuple[str, pd.Series]:
    """Return the column that names most of `files`, "" if there is none, and the file of each of its rows.

    Raises SystemExit where two columns name different images, or a name leads out of the folder.
    """
    names = find_columns("image", table.cells)
    if settings.image_column_name:
        names = choose_columns("image", [*table.cells], settings)
    known = index_files(files, table.base)
    found = {name: table.cells[name].map(lambda text: match(text, known)) for name in names}
    if not found:
        return "", pd.Series(dtype=object)
    best = max(names, key=lambda name: (found[name] != "").sum())
    for name, other in found.items():
        if ((other != found[best]) & (other != "") & (found[best] != "")).any():
            problem = f"the columns {best} and {name} of {table.name} name different images"
            stop(problem, f"say which: --image_column_name {best}")
    check_paths(table, best, found[best], folder)
    return best, found[best]


def check_paths(table: Table, image: str, found: pd.Series, folder: Path) -> None:
    """Raise SystemExit for names that lead out of the folder, or into one that is not here.

    Nothing is opened by these names. But a name that lost its first folders must have lost the same ones as
    all others: a/1.jpg and b/1.jpg are two images.
    """
    lost = set()
    for name, file in zip(table.cells[image], found, strict=True):
        parts, absolute = parts_of(name), re.match("/|[A-Za-z]:", name.replace("\\", "/"))
        if ".." in parts or "://" in name or (absolute and not table.asked_for):
            stop(f"{table.name} names {name}, which leads out of its folder", "name images in the folder")
        if file:
            lost.add("/".join(parts[: len(parts) - file.removeprefix(table.base).count("/") - 1]))
    lost = sorted(lost - {""})
    if len(lost) > 1:
        problem = f"{table.name} names images in {lost[0]} and in {lost[1]}"
        stop(problem, f"give --data_dir a folder that holds both, instead of {folder}")
    if lost:
        words = [folded(word) for word in (lost[0].rpartition("/")[2], folder.name)]
        there, here = (SPLIT_WORDS.get(word) for word in words)
        numbered = len({re.sub(r"\d+", "0", word) for word in words}) == 1 < len({*words})  # case07, case12
        if (there and here and there != here) or numbered:
            stop(f"{table.name} names images in {lost[0]}, not in {folder}", "give that folder as --data_dir")


def one_hot(cells: pd.DataFrame, name: str) -> pd.Series:
    """Return the name of the column that holds a 1, "" if none does. SystemExit if several do."""
    cells = cells.apply(lambda column: column.str.casefold().str.replace(",", "."))
    numbers = cells.replace(ONES).apply(pd.to_numeric, errors="coerce")
    for row in numbers.index[numbers.isna().any(axis=1)]:
        column = numbers.columns[numbers.loc[row].isna()][0]
        stop(f"row {row + 1} of {name} has {cells.loc[row, column]} in column {column}", "give 1 or 0 there")
    for row in numbers.index[(numbers > 0.5).sum(axis=1) > 1]:
        remedy = "give each image one: multi-label is not supported"
        stop(f"row {row + 1} of {name} names several classes", remedy)
    return numbers.idxmax(axis=1).where((numbers > 0.5).any(axis=1), "")


def settle(rows: pd.DataFrame, roles: list[str], name: str) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return one row per image, columns `roles`, and {what is left out: why}; see `read_rows`."""
    for role in {"label", "group"} & set(roles):
        rows[role] = rows[role].str.normalize("NFC")
        whole = rows[role].str.replace(r"^(\d+)\.0+$", r"\1", regex=True)  # integers beside a gap
        rows[role] = rows[role].where(called_like_folder(rows["file"], rows[role]), whole)
    several = rows["label"].str.contains(r"\||^\[", regex=True) if "label" in roles else pd.Series()
    if several.any() and (several := several & ~called_like_folder(rows["file"], rows["label"])).any():
        row = rows[several].iloc[0]
        problem = f"row {row['number']} of {name} gives {row['named']} several classes: {row['label']}"
        stop(problem, "give each image one label: multi-label is not supported")
    if "split" in roles:
        words = rows["split"].str.casefold()
        if unknown := sorted(set(rows["split"][~words.isin([*SPLIT_WORDS, ""])])):
            stop(f"{name} has unknown splits: {', '.join(unknown[:5])}", f"use {', '.join(SPLIT_WORDS)}")
        rows["split"] = words.map(SPLIT_WORDS | {"": ""})
    if "group" in roles:
        rows["group"] = rows["group"].where(~rows["group"].map(plain).isin(NOBODY), "")
        if unknown := (rows["group"][rows["file"] != ""] == "").sum():
            text = "warning: %s has no patient for %s images: only near-duplicates keep those together"
            log.warning(text, name, unknown)
    left_out = {}
    for row in rows[rows["file"] == ""].itertuples():
        left_out[f"{name}, row {row.number}: {row.named}"] = WITHOUT_IMAGE
    rows = rows[rows["file"] != ""]
    differ = rows.drop_duplicates(["file", *roles])["file"]
    left_out |= dict.fromkeys(differ[differ.duplicated()], f"images whose rows in {name} differ")
    rows = rows[~rows["file"].isin(left_out)]
    for row in rows[rows["file"].duplicated()].itertuples():
        left_out[f"{name}, row {row.number}: {row.named}"] = REPEATED
    return rows.drop_duplicates("file").set_index("file")[roles], left_out


def join_rows(table: pd.DataFrame, rows: pd.DataFrame, left_out: dict[str, str]) -> pd.DataFrame:
    """Return what folders say of files with what rows say of them, which counts where both say something.

    Files without a label, without a split where others have one, and those whose folder is another class
    than the row's are left out: they are added to `left_out`.
    """
    table = table.set_index("file")
    if "label" in rows:  # folders say the class, if they are called like those of the rows
        folders, labels = table["folder"].reindex(rows.index), rows["label"]
        against = folders.isin({*labels} - {""}) & (folders != labels) & (labels != "")
        why = "images whose row and folder name different classes"
        left_out |= dict.fromkeys(rows.index[against], why)
        if folders.nunique() > 1 and not set(folders) & {*labels}:
            names = listed(sorted(set(folders.dropna())), 3)
            text = "warning: the labels are those of the table; the folders (%s) are no classes then"
            log.warning(text, names)
    table = rows.where(rows != "").combine_first(table).fillna("")
    for name in ("label", "split"):
        if name in table and (name == "label" or table[name].any()):
            left_out |= dict.fromkeys(table.index[table[name] == ""], f"images without a {name}")
    return table[~table.index.isin(left_out)].sort_index().reset_index()
