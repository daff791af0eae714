"""Files that are whole or not there, and what is read from them."""

import codecs
import collections
import csv
import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steps import files
from steps.files import (
    atomic, need_space, probability_columns, read_json, read_table, remove, sha256_of, write_json,
    write_table, write_text,
)  # fmt: skip


def test_a_file_that_would_stay_the_same_is_not_touched(tmp_path):
    path = tmp_path / "a.csv"
    for text, touched in (("one", True), ("one", False), ("two", True)):
        before = path.stat().st_ino if path.exists() else None
        write_text(path, text)
        assert path.read_text() == text and (path.stat().st_ino != before) is touched
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_gets_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic(path) as part:
        part.write_text("first")
        assert part.parent == path.parent and part.name == ".part-a.txt" and not path.exists()
    with atomic(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / ".part-a.txt").write_text("of a run that was killed")
    with pytest.raises(KeyboardInterrupt):
        with atomic(path) as part:
            assert not part.exists()
            part.write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_or_not_there_too(tmp_path):
    with pytest.raises(ValueError), atomic(tmp_path / "images") as part:
        part.mkdir()
        (part / "a.jpg").touch()
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with atomic(tmp_path / "images") as part:
        part.mkdir()
        (part / "a.jpg").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "a.jpg"]


def test_of_several_processes_one_keeps_the_file(tmp_path, monkeypatch):
    """Each has a temporary name of its own."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(files, "MAIN", False)
    with atomic(tmp_path / "a.txt") as part:
        part.write_text("of the second process")
        assert part.name == ".part1-a.txt"
    assert list(tmp_path.iterdir()) == []


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_one_line(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(2_000_000))
    need_space(tmp_path, 2_000_000)
    with pytest.raises(SystemExit) as stopped:
        need_space(tmp_path, 1_234_000_000)
    line = f"error: {tmp_path} has 2 MB free, but 1,234 MB are needed; free some, or choose a folder"
    assert stopped.value.code == f"{line} on another disk"


def test_checksum_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_of(tmp_path / "a") == digest


def test_json_comes_back_and_can_be_read_by_people(tmp_path):
    path, content = tmp_path / "a.json", {"name": "Lückenlos", "values": [1, 0.1, None, True]}
    write_json(path, content)
    assert read_json(path) == read_json(path, ["name"]) == content
    assert (
        path.read_bytes().startswith('{\n  "name": "Lückenlos",\n'.encode())
        and path.read_bytes()[-2:] == b"}\n"
    )


def test_no_json_is_empty(tmp_path):
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "a.json", ["name"]) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"other": 1}', b"\xff"])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for options, remedy in (({}, files.DAMAGED), ({"remedy": "choose another"}, "choose another")):
        with pytest.raises(SystemExit) as stopped:
            read_json(path, ["name"], **options)
        assert stopped.value.code == f"error: {path} is damaged; {remedy}"


def test_a_folder_is_no_json(tmp_path):
    with pytest.raises(SystemExit, match="a.json is damaged"):
        (tmp_path / "a.json").mkdir()
        read_json(tmp_path / "a.json")


def test_a_table_is_returned_as_it_will_be_read(tmp_path):
    """Names that look like numbers, or like nothing, stay text; numbers are rounded alike, now and later."""
    names = ["001", "NA", "1e3", "", "a,b", 'a "quoted" name', "null", "True"]
    table = pd.DataFrame({"file": names, "label": names[::-1], "polyps": [1 / 3] * 8, "n": range(8)})
    now = write_table(tmp_path / "a.csv", table)
    later = read_table(tmp_path / "a.csv", ["file", "polyps"])
    pd.testing.assert_frame_equal(now, later, check_exact=True)
    assert now["file"].tolist() == names and now["label"].tolist() == names[::-1]
    assert now["polyps"].tolist() == [0.333333333] * 8 and now["n"].tolist() == [*range(8)]


# Whatever a file system takes: no NUL, no half of a surrogate pair; 255 bytes.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=255)
HARD = [
    "a\rb",
    "a\r\n",
    "\n",
    "\t",
    '"',
    "a,b;c",
    "|",
    "{{x}}",
    "$x$",
    "<b>",
    "=1+1",
    " a ",
    "ü",
    "胃",
    "\ufeff",
    "x" * 255,
]


@settings(max_examples=50, deadline=None)
@example(names=HARD)
@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True))
def test_any_name_comes_back_from_a_table(names):
    """In our own reader, in pandas, and in Python's csv as Excel has it, in cells and in names of columns."""
    columns = probability_columns(names)
    table = pd.DataFrame({"file": names, "label": names[::-1]})
    table = pd.concat([table, pd.DataFrame(np.eye(len(names)), columns=columns)], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        ours, theirs = (
            write_table(path, table),
            pd.read_csv(path, keep_default_na=False, dtype={"file": str, "label": str}),
        )
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, "excel")
        marked = path.read_bytes().startswith(codecs.BOM_UTF8)
    for read in (ours, theirs):
        assert read.columns.tolist() == table.columns.tolist()
        assert read["file"].tolist() == names and read["label"].tolist() == names[::-1]
        assert (read[columns].to_numpy() == np.eye(len(names))).all()
    assert header == table.columns.tolist() and [row[0] for row in rows] == names
    assert marked is not "".join(names).isascii()


def test_any_column_of_text_comes_back(tmp_path):
    table = pd.DataFrame({"patient": ["a\rb", "c"], "n": [1, 2]})
    pd.testing.assert_frame_equal(write_table(tmp_path / "a.csv", table), table, check_dtype=False)


def test_an_ordinary_table_is_written_without_quotes_and_marks(tmp_path):
    write_table(tmp_path / "a.csv", pd.DataFrame({"file": ["a b/1.jpg"], "p_x": [0.5]}))
    assert (tmp_path / "a.csv").read_bytes() == b"file,p_x\na b/1.jpg,0.5\n"


@pytest.mark.parametrize("content, said", [
    (None, "cannot read {}: .*No such file"),
    (b"", "cannot read {}: No columns to parse"),
    (b"file,split\n\xff,train\n", "cannot read {}: 'utf-8' codec"),
    (b"file,fold\na,1\n", "{} has no column split; mend it"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, content, said):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=said.format(path)) as stopped:
        read_table(path, ["file", "split"], "mend it")
    assert stopped.value.code.startswith("error: ") and stopped.value.code.endswith("; mend it")


def test_texts_are_the_same_on_every_system(tmp_path):
    write_text(tmp_path / "a.md", "Türkçe\nline\n")
    assert (tmp_path / "a.md").read_bytes() == "Türkçe\nline\n".encode()


def test_writing_waits_for_a_network_drive(tmp_path, monkeypatch):
    problems, replace = [OSError(errno.EIO, "Input/output error")] * 2, os.replace

    def fail_twice(*paths):
        if problems:
            raise problems.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_twice)
    monkeypatch.setattr("steps.console.time.sleep", lambda seconds: None)
    write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and not problems
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
