"""Step 3: tables of images, as people write them: CSV with any separator, JSON lines, Parquet."""

import codecs
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .columns import TABLES
from .console import log, stop
from .files import HIDDEN, nfc, visible
from .options import Settings


@dataclass
class Table:
    """A table as text, its name in messages, the folder that it is about: "" or with a slash at its end."""

    cells: pd.DataFrame
    name: str
    base: str
    asked_for: bool  # by --metadata; others may have come with an archive


def find_tables(folder: Path, settings: Settings) -> list[Table]:
    """Return the table that was asked for, else the metadata files of an imagefolder, if any.

    Raises SystemExit if there is no table where one was asked for, or it cannot be read.
    """
    found = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}metadata.*")]
    found = sorted(path.relative_to(folder) for path in found if path.suffix.lower() in TABLES)
    found = [path for path in found if not any(part.startswith(HIDDEN) for part in path.parts)]
    if settings.metadata:
        for place in (Path(), folder, *folder.parents):  # in an archive, it lies around the class folders
            if (path := place / settings.metadata).is_file():
                if others := [other for other in found if not path.samefile(folder / other)]:
                    log.warning("warning: not used beside --metadata: %s", others[0])
                return [Table(read_table(path), path.name, "", True)]
        stop(f"--metadata {settings.metadata} is not a file, here or in {folder}", "give the path of a table")
    others = {path.name for path in visible(folder) if path.suffix.lower() in (*TABLES, ".xlsx")}
    for name in sorted(others - set(map(str, found))):
        log.warning("warning: %s is not used: if it tells of the images, give --metadata", name)
    asked = [name for name, value in vars(settings).items() if name.endswith("_column_name") and value]
    if asked and not found:
        stop(f"--{asked[0]} names a column, but there is no table", "give one with --metadata FILE.csv")
    bases = [f"{path.parent.as_posix()}/" if path.parent.parts else "" for path in found]
    cells = [read_table(folder / path) for path in found]
    return [Table(*table, False) for table in zip(cells, map(str, found), bases, strict=True)]


def read_table(path: Path) -> pd.DataFrame:
    """Return a table as text, "" where nothing is. Raises SystemExit if it cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path, dtype_backend="pyarrow")  # an integer beside null stays one
        elif path.suffix.lower() == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()], dtype=object)
        else:
            table = read_csv(path)
    except Exception as problem:  # of many kinds: those of pandas, PyArrow, the file system
        stop(f"cannot read {path}: {problem}", "save it as CSV, with a line of column names")
    table.columns = [str(name).strip() for name in table.columns]
    for name in table.columns[table.columns.duplicated()]:
        stop(f"{path} has two columns {name}", "rename one of them")
    table = table.astype(object).where(table.notna(), "").astype(str)
    return table.apply(lambda column: column.str.strip()).reset_index(drop=True)


def read_csv(path: Path) -> pd.DataFrame:
    """Return a CSV file as it stands. Raises ValueError where a row has more cells than there are names."""
    text = decode(path.read_bytes(), path)
    if "\0" in text:
        raise ValueError("it holds null bytes")
    first, _, rest = text.lstrip("\r\n").partition("\n")
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    if hint := re.fullmatch(r"sep=(.)\s*", first):  # Excel's
        text, separator = rest, hint[1]
    options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "header": None}
    table = pd.read_csv(io.StringIO(text), sep=separator, **options)
    return table[1:].set_axis(table.iloc[0], axis=1)


def decode(content: bytes, path: Path) -> str:
    """Return the text of a CSV file: in UTF-8, UTF-16 or, as Excel may write it in Turkey, cp1254."""
    if content.startswith(b"PK\3\4"):
        raise ValueError("it is an Excel workbook")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        log.warning("warning: %s is not in UTF-8: read as cp1254", path)
        return content.decode("cp1254")


def parts_of(name: str) -> list[str]:
    """Return the folders and the file of a path as people write it, in NFC."""
    parts = nfc(name).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".")]


def index_files(files: Iterable[str], base: str) -> dict[str, str]:
    """Return {"/" + path below `base`: file} and {end of it, with or without ending: file}.

    Keys that several files share give "". Outer blanks and Unicode forms are ignored, as in cells of tables.
    """
    known = {}
    for file in files:
        parts = parts_of(file.removeprefix(base).strip())
        ends = {"/".join(parts[start:]) for start in range(len(parts))}
        for key in {"/" + "/".join(parts)} | ends | {re.sub(r"(?<=[^/])\.[^./]*$", "", end) for end in ends}:
            known[key] = file if known.get(key, file) == file else ""
    return known


def called_like_folder(files: pd.Series, names: pd.Series) -> pd.Series:
    """Say of each file whether it lies in a folder of this name, such as a|b or 1.0; "" lies in none."""
    parts = (parts_of(file)[:-1] for file in files)
    found = [name in folders for name, folders in zip(names, parts, strict=True)]
    return pd.Series(found, names.index, dtype=bool)


def match(name: str, known: dict[str, str]) -> str:
    """Return the image that `name` in a table means, "" where none or several fit; `known`: `index_files`.

    It may be a whole path, lack folders or its ending, or have more folders in front, as on another machine.
    """
    parts = parts_of(name)
    keys = ["/" + "/".join(parts), "/".join(parts)]
    keys += ["/" + "/".join(parts[start:]) for start in range(1, len(parts))]
    return next((known[key] for key in keys if key in known), "")
