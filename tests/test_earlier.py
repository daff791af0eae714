"""Step 5: a run that goes on from a model of ours is not tested on what that model has learned."""

import json
import unicodedata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from steps.duplicates import Scenes
from steps.options import Settings
from steps.split import SPLITS, extend, split_images
from steps.workspace import Workspace

COLUMNS = ("file_a", "file_b", "distance", "label_a", "label_b")


def table(names):
    """Images of two classes by the first letter of their names."""
    names = sorted(names)
    features = Features({"file": Value("string"), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict(
        {"file": names, "label": ["ab".index(name[0]) for name in names]}, features=features
    )


def grouped(images, together=()):
    """Every image a group of its own, but those in `together`, tuples of files."""
    groups = pd.Series(range(len(images)), images["file"][:])
    for files in together:
        groups[list(files)] = groups[files[0]]
    return Scenes(pd.DataFrame(columns=COLUMNS), groups)


@pytest.fixture
def earlier(tmp_path):
    """The folder of a finished run of ours on 60 images: 30 per class, in 20, 5 and 5."""
    (tmp_path / "earlier" / "report").mkdir(parents=True)
    (tmp_path / "earlier" / "config.json").write_text('{"calibration_temperature": 1.5}')
    split = {
        f"{letter}/{n:02}": (["train"] * 20 + ["validation"] * 5 + ["test"] * 5)[n]
        for letter in "ab"
        for n in range(30)
    }
    pd.DataFrame(split.items(), columns=["file", "split"]).to_csv(
        tmp_path / "earlier" / "report" / "split.csv", index=False
    )
    return split


@pytest.fixture
def divide(tmp_path):
    """Return a function that splits images, starting from the earlier model: {file: split} and the record."""

    def run(images, together=(), **settings):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        settings = Settings(model_name_or_path=str(tmp_path / "earlier"), **settings)
        work = Workspace(settings, SimpleNamespace(seed=42, output_dir=str(folder)), folder)
        splits = split_images(images, grouped(images, together), work)
        record = folder / "settings.json"
        record = json.loads(record.read_text()) if record.exists() else {}
        return {file: name for name in SPLITS for file in splits[name]["file"]}, record.get("earlier")

    return run


def test_its_split_is_kept_and_only_new_images_are_dealt_out(earlier, divide, caplog):
    new = [f"{letter}/new{n:02}" for letter in "ab" for n in range(40)]
    split, record = divide(table([*earlier, *new]))
    assert {file: split[file] for file in earlier} == earlier
    for letter in "ab":
        counts = pd.Series({file: split[file] for file in new if file[0] == letter}).value_counts()
        assert counts.to_dict() == {"train": 28, "validation": 6, "test": 6}
    assert record == {"kept": 60, "new": 80, "absent": 0, "learned": 0}
    assert not caplog.messages  # no warning


def test_names_of_a_mac_are_those_of_linux(tmp_path, earlier, divide, caplog):
    """The model was trained where ü is one character, and goes on where it is two."""
    names = {file: file.replace("/", "/ü") for file in earlier}
    split = pd.DataFrame([(names[file], name) for file, name in earlier.items()], columns=["file", "split"])
    split.to_csv(tmp_path / "earlier" / "report" / "split.csv", index=False)
    decomposed = {file: unicodedata.normalize("NFD", name) for file, name in names.items()}
    found, record = divide(table(decomposed.values()))
    assert found == {decomposed[file]: name for file, name in earlier.items()}
    assert record == {"kept": 60, "new": 0, "absent": 0, "learned": 0} and not caplog.messages


@pytest.mark.parametrize("rule", ["random", "near-duplicates"])
def test_new_near_duplicates_of_what_it_learned_are_not_tested(earlier, divide, rule):
    pairs = [("a/00", "a/new"), ("a/21", "b/new"), ("b/26", "b/more"), ("a/27", "a/01", "a/both")]
    split, _ = divide(table([*earlier, "a/new", "b/new", "b/more", "a/both"]), pairs, split_by=rule)
    if rule == "near-duplicates":
        assert [split[file] for file in ("a/new", "b/new", "b/more", "a/both")] == [
            "train",
            "validation",
            "test",
            "train",
        ]
    assert {file: split[file] for file in earlier} == earlier  # although a group is divided


def test_learned_images_that_are_not_here_are_counted(earlier, divide, caplog):
    here = [file for file in earlier if file not in ("a/00", "b/01", "a/20", "b/29")]
    _, record = divide(table([*here, "a/new"]))
    assert record == {"kept": 56, "new": 1, "absent": 3, "learned": 0}  # b/29 was a test image
    assert "3 images that" in caplog.text and "has learned are not here by these names" in caplog.text


def test_a_given_split_that_tests_what_was_learned_is_said(earlier, divide, caplog):
    images = table(earlier)
    other = images.add_column("split", [SPLITS[row % 3] for row in range(60)])
    split, record = divide(other)
    learned = sum(split[file] == "test" and earlier[file] != "test" for file in earlier)
    assert record["learned"] == learned == 16
    assert "16 test images are among those that" in caplog.text and "optimistic" in caplog.text


def test_without_a_share_for_validation_no_new_image_validates(earlier, divide):
    new = [f"{letter}/new{n:02}" for letter in "ab" for n in range(40)]
    split, _ = divide(table([*earlier, *new]), validation_size=0.0)
    for letter in "ab":
        counts = pd.Series({file: split[file] for file in new if file[0] == letter}).value_counts()
        assert counts.to_dict() == {"train": 34, "test": 6}


def test_folds_from_it_are_refused(earlier, divide):
    with pytest.raises(
        SystemExit, match="--cross_validate would test .*earlier on images that it may have learned"
    ):
        divide(table(earlier), cross_validate=5)


def test_without_its_report_it_is_said_that_nothing_can_be_checked(tmp_path, earlier, divide, caplog):
    (tmp_path / "earlier" / "report" / "split.csv").unlink()
    split, record = divide(table(earlier))
    assert "has no report/split.csv: it may have learned some of the test images" in caplog.text
    assert record == {"kept": 0, "new": 60, "absent": 0, "learned": 0} and len(split) == 60


def test_another_checkpoint_changes_nothing(tmp_path, earlier, divide):
    (tmp_path / "earlier" / "config.json").write_text("{}")
    split, record = divide(table(earlier))
    assert record is None and split != earlier


def test_shares_of_new_images_hold_for_every_seed():
    labels, groups = np.repeat([0, 1], 300), np.arange(600) // 2
    before = np.array((["train", "validation", "test"] + [""] * 3) * 100, dtype=object)
    work = SimpleNamespace(settings=Settings(), training=SimpleNamespace(seed=0))
    for seed in range(10):
        work.training.seed = seed
        split = extend(before, labels, groups, work)
        assert (split[before != ""] == before[before != ""]).all() and "" not in split
        by_group = pd.DataFrame({"split": split, "new": before == "", "group": groups})
        for _, rows in by_group.groupby("group"):
            old = set(rows["split"][~rows["new"]])
            assert not old or set(rows["split"][rows["new"]]) <= old
