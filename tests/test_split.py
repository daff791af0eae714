"""Step 5: no group on two sides, every class on each with its share, the same split everywhere."""

import hashlib
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from steps.duplicates import Scenes, count_pairs
from steps.options import Settings
from steps.split import SPLITS, cut_folds, deal, kept_whole, show_splits, split_by_file, split_images
from steps.workspace import Workspace


COUNTS = {"a": 200, "b": 100, "c": 47}


@pytest.fixture
def images():
    labels = [i for i, n in enumerate(COUNTS.values()) for _ in range(n)]
    files = [f"{'abc'[label]}/{row:03}.jpg" for row, label in enumerate(labels)]
    features = Features({"file": Value("string"), "label": ClassLabel(names=list(COUNTS))})
    return Dataset.from_dict({"file": files, "label": labels}, features=features)


NO_PAIRS = pd.DataFrame({name: [] for name in ("file_a", "file_b", "distance", "label_a", "label_b")})


RANDOM = Settings(split_by="random")


def alone(images):
    """Every image a scene of its own."""
    return grouped(images, range(len(images)))


def grouped(images, groups):
    """Scenes without near-duplicates, but with these groups."""
    return Scenes(NO_PAIRS, pd.Series(groups, images["file"][:]))


def work_in(folder, settings, seed=42):
    """The workspace of a run in `folder`."""
    return Workspace(settings, SimpleNamespace(seed=seed, output_dir=str(folder)), folder)


def test_shares_are_kept_in_every_class(images, tmp_path):
    splits = split_images(images, alone(images), work_in(tmp_path, RANDOM))
    assert {name: len(part) for name, part in splits.items()} == {"train": 243, "validation": 52, "test": 52}
    for label, n in enumerate(COUNTS.values()):
        for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
            assert abs(splits[name]["label"][:].count(label) - share * n) <= 1
    files = [file for name in SPLITS for file in splits[name]["file"]]
    assert sorted(files) == images["file"][:]  # each image exactly once


def test_no_group_straddles_and_shares_hold_over_fifty_seeds():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(900), rng.choice([1, 1, 1, 2, 3, 8, 20], 900))
        labels = (groups % 5 + (rng.random(len(groups)) < 0.03)) % 5  # some groups have two labels
        order = rng.permutation(len(groups))
        groups, labels = groups[order], labels[order]
        for shares in ((0.7, 0.15, 0.15), (0.5, 0.3, 0.2), [0.2] * 5):
            part = deal(labels, groups, shares, seed)
            table = pd.DataFrame({"group": groups, "label": labels, "part": part})
            assert (table.groupby("group")["part"].nunique() == 1).all()
            found = pd.crosstab(table["label"], table["part"], normalize="index")
            assert np.abs(found - np.array(shares)).to_numpy().max() < 0.02


def test_split_is_the_same_everywhere_and_follows_the_seed():
    labels, groups = np.repeat([0, 1, 2], [200, 100, 47]), np.arange(347) // 2
    digest = hashlib.sha256(deal(labels, groups, (0.7, 0.15, 0.15), 42).astype("u1").tobytes()).hexdigest()
    assert digest.startswith("c70a719bd8eb8c28")
    one, other = (deal(labels, groups, (0.7, 0.15, 0.15), seed) for seed in (1, 2))
    assert (one != other).any()


def test_random_split_divides_groups_and_the_other_does_not(images):
    groups = pd.Series(np.arange(len(images)) // 4, images["file"][:])
    assert pd.Series(kept_whole(groups, RANDOM)).is_unique
    assert (kept_whole(groups, Settings()) == groups).all()


def test_straddling_pairs_are_counted_and_said(images, tmp_path, caplog):
    files, groups = images["file"][:], pd.Series(np.arange(347) // 2, images["file"][:])
    rows = [(files[i], files[i + 1], 0.01, files[i][0], files[i + 1][0]) for i in range(0, 346, 2)]
    pairs = pd.DataFrame(rows, columns=NO_PAIRS.columns)
    scenes, work = Scenes(pairs, groups), work_in(tmp_path / "random", RANDOM)
    random = split_images(images, scenes, work)
    split = pd.read_csv(work.report / "split.csv").set_index("file")["split"]
    straddling = sum(split[a] != split[b] for a, b, *_ in rows)
    assert straddling > 50
    tested = sum((split[a] == "test") != (split[b] == "test") for a, b, *_ in rows)
    assert count_pairs(scenes, random) == {
        "groups": 174, "near_duplicate_pairs": 173, "conflicting_label_pairs": 0,
        "pairs_across_splits": straddling, "pairs_across_test": tested,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, "finetune_vit"):
        show_splits(random, scenes)
    assert f"{straddling} of them on two sides" in caplog.text
    assert f"optimistic: {tested} pairs join a test image" in caplog.text and 0 < tested < straddling
    caplog.clear()
    whole = split_images(images, scenes, work_in(tmp_path / "whole", Settings()))
    assert count_pairs(scenes, whole)["pairs_across_splits"] == 0
    with caplog.at_level(logging.INFO, "finetune_vit"):
        show_splits(whole, scenes)
    assert "optimistic" not in caplog.text


def test_groups_too_large_for_the_shares_are_a_warning(images, tmp_path, caplog):
    scenes = grouped(images, [0] * 150 + list(range(1, 198)))  # 150 of 200 images of class a
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        split_images(images, scenes, work_in(tmp_path, Settings(test_size=0.4)))
    assert "groups are too large" in caplog.text and "a 75%" in caplog.text


def test_split_csv_records_every_image_and_is_taken_again(images, tmp_path):
    path, scenes = tmp_path / "report" / "split.csv", grouped(images, np.arange(347) // 3)
    splits = split_images(images, scenes, work_in(tmp_path, Settings()))
    table = pd.read_csv(path)
    assert list(table.columns) == ["file", "label", "split", "group"]
    assert len(table) == 347 and table["group"].tolist() == scenes.groups.tolist()
    assert (table.groupby("group")["split"].nunique() == 1).all()
    assert (table["label"] == table["file"].str[0]).all()
    for again in (
        split_images(images, scenes, work_in(tmp_path, Settings(), seed=7)),  # the record wins over a seed
        split_images(images, scenes, work_in(tmp_path / "other", Settings(split_by=str(path)), seed=7)),
    ):
        assert all(again[name]["file"][:] == splits[name]["file"][:] for name in SPLITS)


def test_without_validation_images_the_test_images_choose_and_that_is_said(images, tmp_path, caplog):
    settings, path = Settings(split_by="random", validation_size=0.0), tmp_path / "report" / "split.csv"
    for seed in (42, 7):  # the second time it is read again
        splits = split_images(images, alone(images), work_in(tmp_path, settings, seed))
        assert splits.num_rows == {"train": 295, "validation": 52, "test": 52}
        assert splits["validation"]["file"][:] == splits["test"]["file"][:]
        assert not set(splits["train"]["file"]) & set(splits["test"]["file"])
    assert caplog.text.count("the test images choose the epoch") == 2
    assert pd.read_csv(path)["split"].value_counts().to_dict() == {"train": 295, "test": 52}


def test_csv_file_decides(images, tmp_path, caplog):
    files = images["file"][:]
    chosen = ["train", "validation", "test"] * 115  # the last two images are not named
    pd.DataFrame({"file": files[:345][::-1], "split": chosen[::-1]}).to_csv(tmp_path / "my.csv", index=False)
    work = work_in(tmp_path, Settings(split_by=str(tmp_path / "my.csv")))
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        splits = split_images(images, alone(images), work)
    assert splits["test"]["file"][:] == files[2:345:3]
    assert "2 images" in caplog.text and len(pd.read_csv(work.report / "split.csv")) == 345


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,split\na,train\n", "has no column file; give a CSV file with columns file, split"),
        ("", "cannot read .*; give a CSV file with columns file, split"),
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
    work = work_in(tmp_path, Settings(split_by=str(tmp_path / "my.csv")))
    with pytest.raises(SystemExit, match=message):
        split_images(images, alone(images), work)
    assert not (work.report / "split.csv").exists()


def test_small_classes_are_taught_and_tested():
    labels = np.repeat([0, 1, 2], [3, 4, 1000])
    part = deal(labels, np.arange(1007), (0.7, 0.15, 0.15), 42)
    assert [sorted(part[labels == label]) for label in (0, 1)] == [[0, 1, 2], [0, 0, 1, 2]]
    assert [int((part[labels == 2] == name).sum()) for name in (0, 1, 2)] == [700, 150, 150]


@pytest.mark.parametrize("count", [1, 2])
def test_too_small_a_class_is_one_error_line(images, tmp_path, count):
    few = images.select([*range(300), *range(300, 300 + count)])
    with pytest.raises(SystemExit, match="too few readable images of c"):
        split_images(few, alone(few), work_in(tmp_path, Settings()))


def test_a_class_that_no_score_counts_is_named(images, tmp_path, caplog):
    split = ["train" if file[0] == "c" else SPLITS[row % 3] for row, file in enumerate(images["file"])]
    pd.DataFrame({"file": images["file"][:], "split": split}).to_csv(tmp_path / "my.csv", index=False)
    work = work_in(tmp_path, Settings(split_by=str(tmp_path / "my.csv")))
    split_images(images, alone(images), work)
    assert "no validation images of c" in caplog.text and "no test images of c" in caplog.text


def test_fewer_groups_than_splits_are_one_error_line(images, tmp_path):
    letters = [file[0] for file in images["file"]]
    groups = [letter if letter == "c" else row for row, letter in enumerate(letters)]
    scenes = grouped(images, pd.factorize(pd.Series(groups, dtype=object))[0])
    work = work_in(tmp_path, Settings())
    with pytest.raises(
        SystemExit, match="too few groups of near-duplicates in c: each class needs 3; add other"
    ):
        split_images(images, scenes, work)
    assert not (work.report / "split.csv").exists()


def test_a_changed_csv_file_is_not_silently_ignored(images, tmp_path):
    table = pd.DataFrame({"file": images["file"][:], "split": [SPLITS[i % 3] for i in range(len(images))]})
    work = work_in(tmp_path, Settings(split_by=str(tmp_path / "my.csv")))
    table.to_csv(tmp_path / "my.csv", index=False)
    split_images(images, alone(images), work)
    table[::-1].to_csv(tmp_path / "my.csv", index=False)  # the same, in another order
    split_images(images, alone(images), work)
    table.loc[0, "split"] = "test"
    table.to_csv(tmp_path / "my.csv", index=False)
    (work.output_dir / "checkpoint-3").mkdir()  # until then it may be mended, see test_workspace
    with pytest.raises(SystemExit, match="my.csv has changed since .*split.csv was made from it"):
        split_images(images, alone(images), work)


@pytest.mark.parametrize("split_by", ["near-duplicates", "random"])
def test_more_folds_than_a_class_has_groups_are_noticed_before_training(images, tmp_path, split_by):
    small = images.select([*range(300), *range(300, 304)])
    work = work_in(tmp_path, Settings(cross_validate=5, split_by=split_by))
    with pytest.raises(SystemExit, match="--cross_validate 5, but only 4 groups of images of c; give fewer"):
        split_images(small, alone(small), work)


def write_split(path, images, split_of):
    """Write a CSV file for --split_by: split_of(file, row) for each file."""
    split = [split_of(file, row) for row, file in enumerate(images["file"])]
    pd.DataFrame({"file": images["file"][:], "split": split}).to_csv(path, index=False)


@pytest.mark.parametrize(
    "problem, message",
    [
        ("a class of two", "too few readable images of c"),
        ("two groups", "too few groups of near-duplicates in c"),
        ("two groups, five folds", "--cross_validate 5, but only 2 groups of images of c"),
        ("no column", "has no column file"),
        ("twice", "1 files twice"),
        ("unknown split", r"unknown splits \['training'\]"),
        ("absent file", "1 absent or unreadable files"),
        ("not taught", "no train images of c"),
        ("not tested", "no test images of a, b, c"),
    ],
)
def test_what_is_refused_leaves_no_split_and_the_mended_run_goes_on(images, tmp_path, problem, message):
    """Each error of `choose_split` and `check_split`; a split.csv would decide the next run."""
    mine = tmp_path / "my.csv"
    given, settings, scenes = images, Settings(split_by=str(mine)), alone(images)
    if problem == "a class of two":
        given, settings = images.select(range(302)), Settings()
        scenes = alone(given)
    elif problem.startswith("two groups"):
        settings = Settings(cross_validate=5 if "folds" in problem else 0)
        scenes = grouped(images, [min(row, 301) for row in range(347)])
    elif problem == "not taught":
        write_split(mine, images, lambda file, row: "test" if file[0] == "c" else SPLITS[row % 3])
    elif problem == "not tested":
        write_split(mine, images, lambda file, row: SPLITS[row % 2])
    else:
        lines = {
            "no column": "name,split\na/000.jpg,train", "absent file": "file,split\nno/such.jpg,test",
            "twice": "file,split\na/000.jpg,train\na/000.jpg,test",
            "unknown split": "file,split\na/000.jpg,training",
        }  # fmt: skip
        mine.write_text(lines[problem])
    work = work_in(tmp_path, settings)
    with pytest.raises(SystemExit, match=message):
        split_images(given, scenes, work)
    assert not list(tmp_path.rglob("*split.csv"))
    write_split(mine, images, lambda file, row: SPLITS[row % 3])
    work = work_in(tmp_path, Settings(split_by=str(mine)))
    splits = split_images(images, alone(images), work)
    assert all(splits[name]["file"][:] == images["file"][number::3] for number, name in enumerate(SPLITS))
    assert (work.report / "split.csv").exists()


@pytest.mark.parametrize("folds", [3, 5])
@pytest.mark.parametrize("split_by", ["near-duplicates", "random"])
def test_folds_test_every_image_once_and_the_next_fold_validates(images, tmp_path, split_by, folds):
    groups = np.random.default_rng(0).permutation(347) // 4  # many groups have two classes
    settings = Settings(split_by=split_by, cross_validate=folds)
    scenes, work = grouped(images, groups), work_in(tmp_path, settings)
    splits = split_images(images, scenes, work)
    parts = cut_folds(splits, scenes.groups, work)
    assert len(parts) == folds and all(list(part) == list(SPLITS) for part in parts)
    assert sorted(file for part in parts for file in part["test"]["file"]) == images["file"][:]
    label = dict(zip(images["file"], images["label"], strict=True))
    divided = 0
    for fold, part in enumerate(parts):
        role = {file: name for name in SPLITS for file in part[name]["file"]}
        assert sorted(role) == images["file"][:] and len(role) == sum(part.num_rows.values())  # one role each
        assert all(label[row["file"]] == row["label"] for rows in part.values() for row in rows)
        assert part["validation"]["file"][:] == parts[(fold + 1) % folds]["test"]["file"][:]
        divided += pd.Series(role).groupby(scenes.groups).nunique().gt(1).sum()
        for number, n in enumerate(COUNTS.values()):  # every class has its share of every fold
            assert part["test"]["label"][:].count(number) == pytest.approx(n / folds, abs=0.02 * n + 1)
    assert (divided == 0) == (split_by == "near-duplicates")


def test_folds_do_not_depend_on_the_split_and_follow_the_seed(images, tmp_path):
    scenes, settings = grouped(images, np.arange(347) // 2), Settings(cross_validate=5)
    tested = []
    for name, seed in (("one", 42), ("two", 42), ("three", 7)):
        work = work_in(tmp_path / name, settings, seed)
        if name == "two":  # as another run has divided them
            write_split(tmp_path / "my.csv", images, lambda file, row: SPLITS[row % 3])
            work.report.mkdir(parents=True)
            (tmp_path / "my.csv").rename(work.report / "split.csv")
        splits = split_images(images, scenes, work)
        tested.append([fold["test"]["file"][:] for fold in cut_folds(splits, scenes.groups, work)])
    assert tested[0] == tested[1] != tested[2]
