"""Step 5: no group on two sides, every class on each with its share, the same split everywhere."""

import hashlib
import logging
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from steps.duplicates import Scenes, count_pairs, group_images
from steps.files import lookup
from steps.options import Settings
from steps.split import SPLITS, cut_folds, deal, kept_whole, show_splits, split_images, split_rule
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
    assert pd.Series(kept_whole(groups, "random")).is_unique
    assert (kept_whole(groups, "near-duplicates") == groups).all()


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
    assert "train should hold 45% of each class (groups are kept whole), but holds: a 75%" in caplog.text
    assert "few images" not in caplog.text


def test_three_images_of_a_class_are_said_to_be_few_and_not_in_large_groups(tmp_path, caplog):
    """One line names twelve of the hundred classes."""
    names = [f"species {number:03}" for number in range(100)]
    features = Features({"file": Value("string"), "label": ClassLabel(names=names)})
    labels = np.repeat(np.arange(100), 3)
    files = [f"{row:03}.jpg" for row in range(len(labels))]
    images = Dataset.from_dict({"file": files, "label": labels}, features=features)
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        split_images(images, alone(images), work_in(tmp_path, Settings()))
    [line] = caplog.messages
    start = "warning: train should hold 70% of each class (too few images), but holds: "
    assert line.startswith(start + "species 000 33%, species 001 33%, ")
    assert line.endswith("species 011 33% and 88 more") and len(line) < 400


def test_split_csv_records_every_image_and_is_taken_again(images, tmp_path):
    path, scenes = tmp_path / "report" / "split.csv", grouped(images, np.arange(347) // 3)
    splits = split_images(images, scenes, work_in(tmp_path, Settings()))
    table = pd.read_csv(path)
    assert list(table.columns) == ["file", "label", "split", "group"]
    assert len(table) == 347 and table["group"].tolist() == scenes.groups.tolist()
    assert (table.groupby("group")["split"].nunique() == 1).all()
    assert (table["label"] == table["file"].str[0]).all()
    again = split_images(images, scenes, work_in(tmp_path, Settings(), seed=7))  # the record wins over a seed
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


def given(images, split_of):
    """The images with a column split: split_of(file, row) for each file."""
    return images.add_column("split", [split_of(file, row) for row, file in enumerate(images["file"])])


def test_a_given_split_is_taken_unless_another_rule_is_asked_for(images, tmp_path):
    named = given(images, lambda file, row: SPLITS[row % 3])
    splits = split_images(named, alone(images), work_in(tmp_path / "given", Settings()))
    assert splits["test"]["file"][:] == images["file"][2::3]
    assert splits.num_rows == {"train": 116, "validation": 116, "test": 115}
    for rule in ("near-duplicates", "random"):
        own = split_images(named, alone(images), work_in(tmp_path / rule, Settings(split_by=rule)))
        assert own.num_rows == {"train": 243, "validation": 52, "test": 52}
    settings = Settings(cross_validate=3)
    settings.split_otherwise, fours = "random", pd.Series(np.arange(347) // 4, images["file"][:])
    splits = split_images(named, Scenes(NO_PAIRS, fours), work := work_in(tmp_path / "recipe", settings))
    assert splits["test"]["file"][:] == images["file"][2::3]
    for fold in cut_folds(splits, fours, work):  # a recipe's random split is not for these data
        assert not {*fours[fold["test"]["file"][:]]} & {*fours[fold["train"]["file"][:]]}
    # asked for by flags, else by a recipe
    rules = [(None, "near-duplicates"), ("random", "near-duplicates"), (None, "random")]
    assert [split_rule(named, *rule) for rule in rules] == ["given", "random", "given"]
    assert [split_rule(images, *rule) for rule in rules] == ["near-duplicates", "random", "random"]


def test_a_given_split_without_validation_takes_it_from_train_in_whole_groups(images, tmp_path, caplog):
    named = given(images, lambda file, row: "test" if row % 5 == 0 else "train")
    scenes = grouped(images, np.arange(347) // 10)  # each group is on both sides of the given split
    with caplog.at_level(logging.INFO, "finetune_vit"):
        splits = split_images(named, scenes, work_in(tmp_path, Settings(validation_size=0.25)))
    assert splits["test"]["file"][:] == images["file"][::5]
    assert "no validation images: 25% of the training images, in whole groups" in caplog.text
    sides = {scenes.groups[file]: set() for file in images["file"]}
    for name in ("train", "validation"):
        for file in splits[name]["file"]:
            sides[scenes.groups[file]].add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert abs(len(splits["validation"]) - 0.25 * 277) <= 16
    work = work_in(tmp_path / "none", Settings(validation_size=0.0))
    assert split_images(named, scenes, work).num_rows == {"train": 277, "validation": 70, "test": 70}


def test_a_given_split_without_test_tests_on_its_validation_images_and_says_so(images, tmp_path, caplog):
    named = given(images, lambda file, row: "validation" if row % 5 == 0 else "train")
    splits = split_images(named, alone(images), work_in(tmp_path, Settings()))
    assert splits["test"]["file"][:] == images["file"][::5]
    assert "has no test images: its validation images are the test" in caplog.text
    assert len(splits["validation"]) == pytest.approx(0.15 * 277, abs=2)
    assert not set(splits["validation"]["file"]) & set(splits["test"]["file"])


@pytest.mark.parametrize(
    "split_of, message",
    [
        (lambda file, row: "test" if file[0] == "c" else SPLITS[row % 3], "no train images of c"),
        (lambda file, row: ("validation", "test")[row % 2], "the given split has no training images"),
    ],
)
def test_split_that_cannot_teach_is_refused(images, tmp_path, split_of, message):
    work = work_in(tmp_path, Settings())
    with pytest.raises(SystemExit, match=message):
        split_images(given(images, split_of), alone(images), work)
    assert not (work.report / "split.csv").exists()


def test_patients_on_two_sides_are_counted_and_said(images, tmp_path, caplog):
    patients = [f"p{row // 4}" if row < 300 else "" for row in range(347)]
    known = images.add_column("group", patients)
    pairs = pd.DataFrame([(known["file"][0], known["file"][299], 0.0, "a", "b")], columns=NO_PAIRS.columns)
    scenes = Scenes(pairs, group_images(known["file"][:], pairs, patients))
    assert scenes.groups.nunique() == 74 + 47  # 75 patients, two joined by a pair; the others are alone
    random = split_images(known, scenes, work_in(tmp_path / "random", RANDOM))
    sides = pd.concat([pd.Series(name, part["group"][:]) for name, part in random.items()])
    sides = sides[sides.index != ""].groupby(level=0).agg(set)
    divided = sum("test" in names and len(names) > 1 for names in sides)
    counts = count_pairs(scenes, random)
    assert (
        counts["patients"] == 75
        and counts["scenes"] == 346
        and divided > 20
        and counts["images_without_patient"] == 47
    )
    assert counts["patients_across_test"] == divided
    with caplog.at_level(logging.INFO, "finetune_vit"):
        show_splits(random, scenes)
    assert "75 patients or given groups, 346 scenes; those that share images form a group" in caplog.text
    assert f"optimistic: {divided} patients are both in the test and outside it" in caplog.text
    whole = split_images(known, scenes, work_in(tmp_path / "whole", Settings()))
    assert count_pairs(scenes, whole)["patients_across_test"] == 0


@pytest.mark.parametrize("classes, lines", [(2, 2), (23, 23), (200, 40)])
def test_the_table_of_many_classes_holds_the_rarest(capsys, classes, lines):
    """Class n has n % 9 + 3 images."""
    names = [f"dyed-resection-margins-{n:04}" for n in range(classes)]
    labels = np.repeat(np.arange(classes), np.arange(classes) % 9 + 3)
    features = Features({"file": Value("string"), "label": ClassLabel(names=names)})
    rows = {"file": [f"{row}.jpg" for row in range(len(labels))], "label": labels}
    part = Dataset.from_dict(rows, features=features)
    show_splits(DatasetDict(dict.fromkeys(("train", "validation", "test"), part)), alone(part))
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("dyed")]
    assert len(shown) == lines and shown[0] == [names[0], "3", "3", "3"]
    counts = [*np.bincount(labels)]
    assert [int(row[1]) for row in shown] == (sorted(counts)[:lines] if classes > lines else counts)


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
    named = given(images, lambda file, row: "train" if file[0] == "c" else SPLITS[row % 3])
    split_images(named, alone(images), work_in(tmp_path, Settings()))
    assert "no validation images of c" in caplog.text and "no test images of c" in caplog.text


def test_fewer_groups_than_splits_are_one_error_line(images, tmp_path):
    letters = [file[0] for file in images["file"]]
    groups = [letter if letter == "c" else row for row, letter in enumerate(letters)]
    scenes = grouped(images, pd.factorize(pd.Series(groups, dtype=object))[0])
    work = work_in(tmp_path, Settings())
    with pytest.raises(SystemExit, match="too few groups of images in c: each class needs 3; add other"):
        split_images(images, scenes, work)
    assert not (work.report / "split.csv").exists()


@pytest.mark.parametrize("split_by", ["near-duplicates", "random"])
def test_more_folds_than_a_class_has_groups_are_noticed_before_training(images, tmp_path, split_by):
    small = images.select([*range(300), *range(300, 304)])
    work = work_in(tmp_path, Settings(cross_validate=5, split_by=split_by))
    with pytest.raises(SystemExit, match="--cross_validate 5, but only 4 groups of images of c; give fewer"):
        split_images(small, alone(small), work)


@pytest.mark.parametrize(
    "problem, message",
    [
        ("a class of two", "too few readable images of c"),
        ("two groups", "too few groups of images in c"),
        ("two groups, five folds", "--cross_validate 5, but only 2 groups of images of c"),
        ("not taught", "no train images of c"),
    ],
)
def test_what_is_refused_leaves_no_split_and_the_mended_run_goes_on(images, tmp_path, problem, message):
    """Each error of `make_split` and `check_split`; a split.csv would decide the next run."""
    wrong, settings, scenes = images, Settings(), alone(images)
    if problem == "a class of two":
        wrong = images.select(range(302))
        scenes = alone(wrong)
    elif problem.startswith("two groups"):
        settings = Settings(cross_validate=5 if "folds" in problem else 0)
        scenes = grouped(images, [min(row, 301) for row in range(347)])
    else:
        wrong = given(images, lambda file, row: "test" if file[0] == "c" else SPLITS[row % 3])
    work = work_in(tmp_path, settings)
    with pytest.raises(SystemExit, match=message):
        split_images(wrong, scenes, work)
    assert not list(tmp_path.rglob("*split.csv"))
    mended = given(images, lambda file, row: SPLITS[row % 3])
    splits = split_images(mended, alone(images), work_in(tmp_path, Settings()))
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


def test_folds_keep_patients_whole_even_where_a_split_is_given(images, tmp_path):
    groups = np.arange(347) // 3
    named = given(images, lambda file, row: SPLITS[row % 3])  # which divides every group
    work = work_in(tmp_path, Settings(cross_validate=4))
    scenes = grouped(images, groups)
    parts = cut_folds(split_images(named, scenes, work), scenes.groups, work)
    for part in parts:
        role = pd.Series({file: name for name in SPLITS for file in part[name]["file"]})
        assert role.groupby(scenes.groups).nunique().max() == 1


def test_folds_do_not_depend_on_the_split_and_follow_the_seed(images, tmp_path):
    scenes, settings = grouped(images, np.arange(347) // 2), Settings(cross_validate=5)
    tested = []
    for name, seed in (("one", 42), ("two", 42), ("three", 7)):
        work = work_in(tmp_path / name, settings, seed)
        if name == "two":  # as another run has divided them
            work.report.mkdir(parents=True)
            other = given(images, lambda file, row: SPLITS[row % 3]).to_pandas()[["file", "split"]]
            other.to_csv(work.report / "split.csv", index=False)
        splits = split_images(images, scenes, work)
        tested.append([fold["test"]["file"][:] for fold in cut_folds(splits, scenes.groups, work)])
    assert tested[0] == tested[1] != tested[2]


@pytest.mark.parametrize("parts", [3, 4, 5])
def test_as_many_groups_as_parts_fill_every_part(parts):
    """Equal groups with both classes, as folders of three patients: the shares alone would leave one out."""
    groups = np.repeat(np.arange(parts), 12)
    labels = np.tile([0, 1], 6 * parts)
    shares = [0.7, *[0.3 / (parts - 1)] * (parts - 1)]
    for seed in range(20):
        part = deal(labels, groups, shares, seed)
        assert all(set(labels[part == number]) == {0, 1} for number in range(parts))


def test_an_image_that_can_be_read_only_now_is_not_forgotten(images, tmp_path):
    """Its split was made without it: made anew before anything is trained, refused afterwards."""
    work, some = work_in(tmp_path, RANDOM), images.select(range(1, len(images)))
    split_images(some, alone(some), work)
    with pytest.raises(SystemExit, match="puts a/000.jpg into no split; run the same command again"):
        split_images(images, alone(images), work)
    assert sum(map(len, split_images(images, alone(images), work).values())) == len(images)
    (work.report / "split.csv").write_text(
        (work.report / "split.csv").read_text().replace(",test,", ",Test,")
    )
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit, match="and 49 more into no split; use another --output_dir"):
        split_images(images, alone(images), work)


def test_two_files_of_one_name_in_two_unicode_forms_keep_their_own_split():
    values = pd.Series({"\u00e9.png": "train", "e\u0301.png": "test", "\u00fc.png": "validation"})
    assert lookup(values, ["e\u0301.png", "\u00e9.png", "u\u0308.png", "x.png"]).tolist() == [
        "test", "train", "validation", "",
    ]  # fmt: skip
