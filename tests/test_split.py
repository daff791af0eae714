"""Step 5: no image on two sides, every class on each, the same on every machine."""

import hashlib
import logging

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from finetune_vit import SPLITS, Settings, split_by_file, split_images, split_randomly

COUNTS = {"a": 200, "b": 100, "c": 47}


@pytest.fixture
def images():
    labels = [i for i, n in enumerate(COUNTS.values()) for _ in range(n)]
    files = [f"{'abc'[label]}/{row:03}.jpg" for row, label in enumerate(labels)]
    features = Features({"file": Value("string"), "label": ClassLabel(names=list(COUNTS))})
    return Dataset.from_dict({"file": files, "label": labels}, features=features)


def test_shares_are_kept_in_every_class(images, tmp_path):
    splits = split_images(images, Settings(), 42, tmp_path / "split.csv")
    assert {name: len(part) for name, part in splits.items()} == {"train": 243, "validation": 52, "test": 52}
    for label, n in enumerate(COUNTS.values()):
        for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
            assert abs(splits[name]["label"][:].count(label) - share * n) <= 1
    files = [file for name in SPLITS for file in splits[name]["file"]]
    assert sorted(files) == images["file"][:]  # each image exactly once


def test_split_is_the_same_everywhere_and_follows_the_seed():
    labels = np.repeat([0, 1, 2], [200, 100, 47])
    digest = hashlib.sha256(",".join(split_randomly(labels, 0.15, 0.15, 42)).encode()).hexdigest()
    assert digest.startswith("c710ad234473b3ac")
    assert (split_randomly(labels, 0.15, 0.15, 1) != split_randomly(labels, 0.15, 0.15, 2)).any()


def test_split_csv_records_every_image_and_is_taken_again(images, tmp_path):
    path = tmp_path / "report" / "split.csv"
    splits = split_images(images, Settings(), 42, path)
    table = pd.read_csv(path)
    assert list(table.columns) == ["file", "label", "split", "group"]
    assert len(table) == 347 and table["group"].is_unique
    assert (table["label"] == table["file"].str[0]).all()
    for again in (
        split_images(images, Settings(), 7, path),  # the record wins over another seed
        split_images(images, Settings(split_by=str(path)), 7, tmp_path / "other.csv"),
    ):
        assert all(again[name]["file"][:] == splits[name]["file"][:] for name in SPLITS)


def test_csv_file_decides(images, tmp_path, caplog):
    files = images["file"][:]
    chosen = ["train", "validation", "test"] * 115  # the last two images are not named
    pd.DataFrame({"file": files[:345][::-1], "split": chosen[::-1]}).to_csv(tmp_path / "my.csv", index=False)
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        splits = split_images(images, Settings(split_by=str(tmp_path / "my.csv")), 42, tmp_path / "split.csv")
    assert splits["test"]["file"][:] == files[2:345:3]
    assert "2 images" in caplog.text and len(pd.read_csv(tmp_path / "split.csv")) == 345


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,split\na,train\n", "cannot read a split"),
        ("", "cannot read a split"),
        ("file,split\na/000.jpg,train\na/000.jpg,test\n", "1 files twice"),
        ("file,split\na/000.jpg,training\n", r"unknown splits \['training'\]"),
        ("file,split\na/000.jpg,train\nno/such.jpg,test\n", "1 absent or unreadable files: no/such.jpg"),
    ],
)
def test_bad_csv_file_is_one_error_line(images, tmp_path, text, message):
    (tmp_path / "my.csv").write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        split_by_file(images["file"][:], tmp_path / "my.csv")
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"c": "test"}, "no train images of c"),
        ({"a": "train", "b": "train", "c": "train"}, "no validation images"),
    ],
)
def test_split_that_cannot_teach_or_test_is_refused(images, tmp_path, chosen, message):
    split = [chosen.get(file[0], SPLITS[row % 3]) for row, file in enumerate(images["file"])]
    pd.DataFrame({"file": images["file"][:], "split": split}).to_csv(tmp_path / "my.csv", index=False)
    with pytest.raises(SystemExit, match=message):
        split_images(images, Settings(split_by=str(tmp_path / "my.csv")), 42, tmp_path / "split.csv")
    assert not (tmp_path / "split.csv").exists()


def test_small_classes_are_taught_and_tested():
    labels = np.repeat([0, 1, 2], [3, 4, 1000])
    split = split_randomly(labels, 0.15, 0.15, 42)
    assert [sorted(split[labels == label]) for label in (0, 1)] == [
        ["test", "train", "validation"],
        ["test", "train", "train", "validation"],
    ]
    assert [int((split[labels == 2] == name).sum()) for name in SPLITS] == [700, 150, 150]


def test_a_class_that_no_score_counts_is_named(images, tmp_path, caplog):
    split = ["train" if file[0] == "c" else SPLITS[row % 3] for row, file in enumerate(images["file"])]
    pd.DataFrame({"file": images["file"][:], "split": split}).to_csv(tmp_path / "my.csv", index=False)
    split_images(images, Settings(split_by=str(tmp_path / "my.csv")), 42, tmp_path / "split.csv")
    assert "no validation images of c" in caplog.text and "no test images of c" in caplog.text
