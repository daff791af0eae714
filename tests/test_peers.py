"""Benchmarks against other programs: the folders that they get, their scores, and those that cannot run."""

import argparse
import sys

import pandas as pd
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from peers import PROGRAMS, lay_out, measure, read_answers, score
from peers_run import installed, join, run

SPLIT = pd.DataFrame(
    {
        "file": ["b/x.JPG", "a/x.png", "b/y.jpg", "a/deep/x.png", "b/z.jpg"],
        "label": ["b", "a", "b", "a", "b"],
        "split": ["train", "train", "validation", "test", "test"],
    }
)


def test_the_split_becomes_folders_of_links(tmp_path):
    for file in SPLIT["file"]:
        path = tmp_path / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
    another = SPLIT.assign(split=[*SPLIT["split"][1:], "train"])
    for split in (another, SPLIT):  # nothing is left of the other one
        lay_out(split, tmp_path / "images", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").glob("*/*/*")}
    assert {name: path.read_text() for name, path in found.items()} == {
        "train/001/000000.jpg": "b/x.JPG",
        "train/000/000001.png": "a/x.png",
        "validation/001/000002.jpg": "b/y.jpg",
        "test/000/000003.png": "a/deep/x.png",
        "test/001/000004.jpg": "b/z.jpg",
    }
    assert {path.stat().st_nlink for path in found.values()} == {2}
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["000", "001"]


def test_answers_are_scored_by_number_whatever_their_order(tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("filename,prob_1,prob_0\ntest/001/000004.jpg,0.75,0.25\ntest/000/000003.png,0.5,0.5\n")
    found = score(SPLIT, read_answers(path))
    assert found["accuracy"] == found["macro F1"] == 1
    assert found["log loss"] == pytest.approx(0.4904, abs=1e-4)  # (ln 2 + ln 4/3) / 2
    swapped = score(SPLIT, pd.DataFrame([[0.1, 0.9], [0.1, 0.9]], [3, 4]))
    assert swapped["accuracy"] == 0.5 and swapped["macro F1"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="1 of 2 test images have no answer"):
        score(SPLIT, pd.DataFrame([[0.1, 0.9]], [4]))


def test_seconds_are_told_apart_by_what_a_program_prints(tmp_path):
    code = (
        "import time; x = bytearray(50 << 20); time.sleep(0.3); print('go'); time.sleep(0.6); print('done')"
    )
    found = run([sys.executable, "-uc", code], tmp_path / "log.txt", ("go", "done"))
    assert 0.3 < found["before, s"] and 0.6 <= found["training, s"] and 0 <= found["after, s"]
    answered = run([sys.executable, "-c", "print(1)"], tmp_path / "log.txt")
    assert found["peak bytes"] - answered["peak bytes"] > 40 << 20
    with pytest.raises(RuntimeError, match=r"^it never printed 'done'$"):
        run([sys.executable, "-c", "print('go')"], tmp_path / "log.txt", ("go", "done"))
    both = join(found, answered)
    assert both["after, s"] == found["after, s"] + answered["before, s"]
    assert (tmp_path / "log.txt").read_text() == "go\ndone\n1\ngo\n"
    with pytest.raises(RuntimeError, match=r"^ValueError: no such luck$"):
        run([sys.executable, "-c", "raise ValueError('no such luck')"], tmp_path / "log.txt")


def test_a_program_that_cannot_run_gets_a_row_that_says_why(tmp_path, monkeypatch):
    assert set(installed(sys.executable, ["torch"])) == {"torch"}
    with pytest.raises(RuntimeError, match=r"^not installed: pip install no-such-package$"):
        installed(sys.executable, ["no-such-package", "torch"])
    program = PROGRAMS["timm"]._replace(packages="torch")
    monkeypatch.setitem(PROGRAMS, "timm", program)
    job = argparse.Namespace(program="timm", python=sys.executable, sources=tmp_path, work=tmp_path)
    assert measure(job) == {"state": "not in --sources: train.py, inference.py"}
    job.python = str(tmp_path / "python")
    assert "No such file" in measure(job)["state"]
