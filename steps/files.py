"""Files that are whole or not there: they are written under a temporary name, then renamed."""

import csv
import filecmp
import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .console import MAIN, retry, stop

HIDDEN = (".", "__MACOSX", "__pycache__")  # what names such as .ipynb_checkpoints begin with
DAMAGED = "delete it, and it is made again where that is possible"
# These columns of our tables are always text.
COLUMNS = "file file_a file_b split label label_a label_b prediction proposed error reason".split()
PREFIX = "p_"  # of the columns of probabilities, so that no class can be called like another column


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` only once the block has succeeded.

    A file that would stay the same is not touched. Under torchrun every process makes the same file, and only
    the main one's is kept.
    """
    part = path.with_name(f".part{os.environ.get('RANK', '')}-{path.name}")
    remove(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave the new name without the content
        if MAIN and not (part.is_file() and path.is_file() and filecmp.cmp(part, path, shallow=False)):
            os.replace(part, path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def visible(folder: Path) -> list[Path]:
    """Return what lies in `folder`, without hidden entries. Raises SystemExit if it may not be read."""
    need_access(folder)
    return [entry for entry in folder.iterdir() if not entry.name.startswith(HIDDEN)]


def below(path: str | Path, folder: Path) -> str:
    """Return a path relative to `folder`, with forward slashes."""
    return Path(os.path.relpath(path, folder)).as_posix()


def printable(name: str | Path) -> str:
    """Return a name as text that can be written in UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def nfc(name: str) -> str:
    """Return a name in the Unicode form to compare: macOS writes ü as two characters, Linux mostly as one."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """Return what a disk that ignores case and Unicode form takes a name for."""
    return nfc(name).casefold()


def may_use(path: str | Path, how: int = os.R_OK) -> bool:
    """Say whether this process may read a file, or use it as the flags `how` of `os.access` say."""
    return os.access(path, how, effective_ids=os.access in os.supports_effective_ids)


def need_access(folder: str | Path) -> None:
    """Raise SystemExit if a folder may not be read."""
    if not may_use(folder, os.R_OK | os.X_OK):
        stop(f"no permission to read the folder {folder}", "ask its owner, or try chmod -R u+rX on it")


def need_space(folder: Path, size: int) -> None:
    """Raise SystemExit unless the disk of `folder` has `size` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < size:
        remedy = "free some, or choose a folder on another disk"
        stop(f"{folder} has {free / 1e6:,.0f} MB free, but {size / 1e6:,.0f} MB are needed", remedy)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, keys: Iterable[str] = (), remedy: str = DAMAGED) -> dict:
    """Return a JSON file's content, {} if there is none. SystemExit if damaged or lacking `keys`."""
    with suppress(ValueError, IsADirectoryError):
        content = json.loads(retry(path.read_bytes)) if path.exists() else {}
        if isinstance(content, dict) and (content.keys() >= set(keys) or not path.exists()):
            return content
    stop(f"{path} is damaged", remedy)


def read_table(path: Path, columns: Iterable[str], remedy: str = DAMAGED) -> pd.DataFrame:
    """Read a CSV file; file and class names stay text, even if they look like numbers or say NA.

    A byte order mark at its beginning, as `csv_options` writes it, is no part of the first name.

    Raises SystemExit if the file cannot be read or lacks one of `columns`.
    """
    try:
        kinds = dict.fromkeys(COLUMNS, str)
        table = pd.read_csv(path, dtype=kinds, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as problem:
        stop(f"cannot read {path}: {problem}", remedy)
    if lacking := [name for name in columns if name not in table]:
        stop(f"{path} has no column {lacking[0]}", remedy)
    return table


def lookup(values: pd.Series, files: Iterable[str]) -> np.ndarray:
    """Return the value, str, of each of `files`, "" where there is none, from `values` by file (n,)."""
    exact = dict(zip(values.index, values, strict=True))
    alike = {nfc(file): value for file, value in exact.items()}
    return np.array([exact.get(file, alike.get(nfc(file), "")) for file in files], dtype=object)


def probability_columns(class_names: Iterable[str]) -> list[str]:
    """Return the names of the columns that hold the probabilities of these classes, in their order."""
    return [PREFIX + name for name in class_names]


def csv_options(texts: Iterable[object]) -> dict[str, Any]:
    """Return how `DataFrame.to_csv` must write a table of these names and texts to be read back as it is.

    Excel takes UTF-8 for another encoding unless it begins with a byte order mark: text that is not ASCII
    gets one. Python's `csv` up to 3.12 does not quote carriage returns: if there is one, all text is quoted.
    """
    text = "".join(map(str, texts))
    quoting = csv.QUOTE_NONNUMERIC if "\r" in text else csv.QUOTE_MINIMAL
    encoding = "utf-8" if text.isascii() else "utf-8-sig"
    return {"index": False, "float_format": "%.9g", "quoting": quoting, "encoding": encoding}


def write_table(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Write a CSV file and return it as it will be read again: the same numbers now and later."""
    with atomic(path) as part:
        texts = table.select_dtypes(exclude="number").to_numpy().ravel()
        table.to_csv(part, **csv_options([*table.columns, *texts]))
        return read_table(part, table)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""

    def write() -> None:
        with atomic(path) as part:
            part.write_text(text, encoding="utf-8", newline="\n")

    retry(write)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, indented by two."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
