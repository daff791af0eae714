"""Step 3: what a table says of the images: their label, their split, their patient."""

import codecs
import io
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from .archives import HIDDEN
from .columns import SPLIT_WORDS, choose_columns, find_columns
from .console import log, stop
from .options import Settings

KINDS = (".csv", ".tsv", ".jsonl", ".parquet")  # imagefolder's metadata.* has these, too


def read_any(path: Path) -> pd.DataFrame:
    """Return a table as text, "" where nothing is: CSV with comma, semicolon or tab, JSON lines, Parquet.

    Raises SystemExit if it cannot be read.
    """
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix.lower() == ".jsonl":
            table = pd.read_json(path, lines=True, dtype=False)
        else:
            text = decode(path.read_bytes(), path)
            separator = max(",;\t", key=text.partition("\n")[0].count)
            options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True}
            table = pd.read_csv(io.StringIO(text), sep=separator, index_col=False, **options)
    except Exception as problem:  # of many kinds: those of pandas, PyArrow, the file system
        stop(f"cannot read {path}: {problem}", "give a table as CSV, with a line of column names")
    table = table.rename(columns=str).rename(columns=str.strip)
    for name in table:
        known = table[name].map(lambda value: value is not None and value == value)  # nan is not itself
        table[name] = table[name].where(known, "").map(lambda value: str(value).strip())
    return table


def decode(content: bytes, path: Path) -> str:
    """Return the text of a CSV file: in UTF-8, UTF-16 or, as Excel may write it in Turkey, cp1254."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        log.warning("warning: %s is not in UTF-8: read as cp1254", path)
        return content.decode("cp1254")


def find_tables(folder: Path, settings: Settings) -> list[Path]:
    """Return the table that was asked for, else the metadata files of an imagefolder, if any.

    Raises SystemExit if there is no table where one was asked for.
    """
    if settings.metadata:
        name = Path(settings.metadata)  # in an archive, it lies beside the class folders
        for path in (name, folder / name, folder.parent / name):
            if path.is_file():
                return [path]
        stop(f"--metadata {name} is not a file, here or in {folder}", "give the path of a CSV file")
    found = [path for pattern in ("metadata.*", "*/metadata.*") for path in folder.glob(pattern)]
    found = [path for path in found if path.suffix in KINDS and not path.parent.name.startswith(HIDDEN)]
    asked = [name for name, value in vars(settings).items() if name.endswith("_column_name") and value]
    if asked and not found:
        stop(f"--{asked[0]} names a column, but there is no table", "give one with --metadata FILE.csv")
    return sorted(found)


def read_rows(
    path: Path, files: list[str], folder: Path, settings: Settings
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return what a table says of `files`, str relative to `folder`, and {what is left out: why}.

    Columns: file, and those of label, split, group that the table has; all str. A row that is left out is
    called by its line. Raises SystemExit where it cannot be understood.
    """
    table, trusted = read_any(path), settings.metadata is not None
    columns = {"label": choose_columns("label", [*table], settings)}
    others = [name for name in table if name not in columns["label"]]
    columns |= {role: choose_columns(role, others, settings) for role in ("split", "group")}
    columns = {role: names for role, names in columns.items() if names}
    images = choose_columns("image", [*table], settings)
    images = images if settings.image_column_name else find_columns("image", table)
    known, place = index_files(files), path.absolute()
    place = place.relative_to(folder) if place.is_relative_to(folder) else place
    found = {name: table[name].map(lambda text: match(text, known, place, trusted)) for name in images}
    if not images or not columns:
        if not trusted:
            log.info("%s says nothing of labels, splits or patients: not used", path)
            return pd.DataFrame(), {}
        role, what = ("label", "labels, splits or patients") if images else ("image", "images")
        remedy = f"its columns are {', '.join(table)}: say which it is with --{role}_column_name"
        stop(f"no column of {path} is known to hold the {what}", remedy)
    image = max(images, key=lambda name: (found[name] != "").sum())
    if not (found[image] != "").any():
        example = f"for example {table[image].iloc[0]!r}" if len(table) else "it has no rows"
        stop(f"no row of {path} names an image in {folder}: {example}", f"it should be like {files[0]}")
    understood = ", ".join(
        f"{role}: {' '.join(names)}" for role, names in {"image": [image], **columns}.items()
    )
    log.info("understood the columns of %s as %s", path, understood)
    rows = pd.DataFrame({"file": found[image], "line": range(2, len(table) + 2), "named": table[image]})
    for role, names in columns.items():
        rows[role] = table[names[0]] if len(names) == 1 else one_hot(table[names], path)
    return settle(rows, list(columns), path)


def one_hot(table: pd.DataFrame, path: Path) -> pd.Series:
    """Return the name of the column that holds a 1, "" if none does. SystemExit if several do."""
    ones = table.replace({"True": "1"}).apply(pd.to_numeric, errors="coerce") > 0.5
    if (several := ones.sum(axis=1) > 1).any():
        line = several.idxmax() + 2
        stop(
            f"line {line} of {path} names several classes",
            "give each image one: multi-label is not supported",
        )
    return ones.idxmax(axis=1).where(ones.any(axis=1), "")


def settle(rows: pd.DataFrame, roles: list[str], path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return one row per image, columns file and `roles`, and {what is left out: why}; see `read_rows`."""
    if "label" in rows and (several := rows["label"].str.contains(r"\||^\[", regex=True)).any():
        row = rows[several].iloc[0]
        problem = f"line {row['line']} of {path} gives {row['named']} several classes: {row['label']}"
        stop(problem, "give each image one label: multi-label is not supported")
    if "split" in rows:
        words = rows["split"].str.casefold()
        if unknown := sorted(set(rows["split"][~words.isin([*SPLIT_WORDS, ""])])):
            stop(f"{path} has unknown splits: {', '.join(unknown[:5])}", f"use {', '.join(SPLIT_WORDS)}")
        rows["split"] = words.map(SPLIT_WORDS | {"": ""})
    left_out = {}
    for row in rows[rows["file"] == ""].itertuples():
        left_out[f"{path.name}, line {row.line}: {row.named}"] = "rows without an image"
    rows = rows[rows["file"] != ""]
    differ = rows.drop_duplicates(["file", *roles])["file"]
    for file in differ[differ.duplicated()]:
        left_out[file] = f"images with rows that differ in {path.name}"
    rows = rows[~rows["file"].isin(left_out)]
    for row in rows[rows["file"].duplicated()].itertuples():
        left_out[f"{path.name}, line {row.line}: {row.named}"] = "second rows for an image"
    rows = rows.drop_duplicates("file")
    if "group" in roles and (unknown := (rows["group"] == "").sum()):
        log.warning("warning: %s has no patient for %s images: each counts as a patient", path, unknown)
    for role in {"label", "split"} & set(roles):
        left_out |= dict.fromkeys(rows["file"][rows[role] == ""], f"images without a {role} in {path.name}")
    return rows[~rows["file"].isin(left_out)][["file", *roles]], left_out


def index_files(files: Iterable[str]) -> dict[str, str]:
    """Return {"/" + whole path: file} and {end of the path, with or without ending: file}.

    An end that several files share means "".
    """
    known = {}
    for file in files:
        parts = unicodedata.normalize("NFC", file).split("/")
        known["/" + "/".join(parts)] = file
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            for key in {end, re.sub(r"(?<=[^/])\.[^./]*$", "", end)}:
                known[key] = file if known.get(key, file) == file else ""
    return known


def match(name: str, known: dict[str, str], table: Path, trusted: bool) -> str:
    """Return the image that `name` in a table means, "" where none or several fit.

    `known`: see `index_files`. The name may lack folders or its ending, or have more folders in front, as on
    another machine. Nothing is opened by such a name. `table`: its path, relative if it lies among the
    images. SystemExit for a name that leads out of the folder; only a `trusted` table may have absolute ones.
    """
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    absolute = name.startswith("/") or re.match("[A-Za-z]:/", name)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "://" in name or (absolute and not trusted):
        stop(f"{table} names {name}, which leads out of its folder", "give names of images in the folder")
    base = [] if table.is_absolute() else table.parts[:-1]
    wholes = ["/" + "/".join([*base, *parts]), "/".join(parts)]
    wholes += ["/" + "/".join(parts[start:]) for start in range(1, len(parts))]
    return next((known[key] for key in wholes if key in known), "")
