"""Step 5: near-duplicates are found, no group on two sides, every class on each, the same everywhere."""

import hashlib
import io
import logging
import time

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image, ImageEnhance
from transformers import ViTImageProcessor

from finetune_vit import NEAR, SPLITS, Settings, compare, count_pairs, find_near_duplicates, group_images
from finetune_vit import load_images, prepare_pixels, share_out, show_splits, split_by_file, split_images
from finetune_vit import thumbnails, units

COUNTS = {"a": 200, "b": 100, "c": 47}


@pytest.fixture
def images():
    labels = [i for i, n in enumerate(COUNTS.values()) for _ in range(n)]
    files = [f"{'abc'[label]}/{row:03}.jpg" for row, label in enumerate(labels)]
    features = Features({"file": Value("string"), "label": ClassLabel(names=list(COUNTS))})
    return Dataset.from_dict({"file": files, "label": labels}, features=features)


def alone(images):
    """Every image its own group."""
    return pd.Series(range(len(images)), images["file"][:])


NO_PAIRS = pd.DataFrame({name: [] for name in ("file_a", "file_b", "distance", "label_a", "label_b")})
RANDOM = Settings(split_by="random")


def scene(seed, size=(288, 240)):
    """A smooth picture with some detail inside a black border, as an endoscope sees it."""
    rng = np.random.default_rng(seed)
    coarse, fine = rng.integers(40, 200, (6, 7, 3)), rng.integers(0, 40, (30, 36, 3))
    layers = [Image.fromarray(layer.astype(np.uint8)).resize(size, Image.BICUBIC) for layer in (coarse, fine)]
    picture = Image.fromarray(np.asarray(layers[0]) + np.asarray(layers[1]))
    frame = Image.new("RGB", size)
    frame.paste(picture.crop((12, 12, size[0] - 12, size[1] - 12)), (12, 12))
    return frame


def shifted(picture, x, y):
    return picture.transform(picture.size, Image.AFFINE, (1, 0, x, 0, 1, y))


def recoded(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


VARIANTS = {
    "as-it-is": lambda picture: picture,
    "recoded": lambda picture: recoded(picture, 25),
    "half-as-large": lambda picture: picture.resize((144, 120)),
    "other-shape": lambda picture: picture.resize((288, 288)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.6),
    "shifted-right": lambda picture: shifted(picture, -9, 0),  # 3 % of the width
    "shifted-up": lambda picture: shifted(picture, 4, 8),
    "turned": lambda picture: picture.rotate(1.5, Image.BILINEAR),
    "all-at-once": lambda picture: recoded(ImageEnhance.Brightness(shifted(picture, 5, -5)).enhance(1.1), 40),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """40 unrelated scenes, of which 6 come in all variants, as prepared pixels; and their shape."""
    folder = tmp_path_factory.mktemp("planted")
    for number in range(40):
        picture = scene(number)
        for name, change in list(VARIANTS.items())[: None if number < 6 else 1]:
            path = folder / "images" / "ab"[hash_of(name, number) % 2] / f"{number:02}-{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            change(picture).convert("RGB").save(path, quality=90)
    images = load_images(folder / "images")
    processor = ViTImageProcessor(size={"height": 224, "width": 224})
    return prepare_pixels(images, folder / "images", processor, folder / "cache"), (3, 224, 224)


def hash_of(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()[0]


def test_planted_near_duplicates_form_one_group_and_unrelated_images_none(planted, tmp_path):
    images, shape = planted
    pairs = find_near_duplicates(images, shape, tmp_path / "near_duplicates.csv")
    groups = group_images(images["file"][:], pairs)
    numbers = pd.Series([file.split("/")[1][:2] for file in groups.index], groups.index)
    assert groups.groupby(numbers).nunique().max() == 1  # one scene, one group
    assert numbers.groupby(groups).nunique().max() == 1  # one group, one scene
    assert groups.nunique() == 40 and groups.value_counts().iloc[:6].tolist() == [len(VARIANTS)] * 6


def test_pairs_are_recorded_and_read_again(planted, tmp_path):
    images, shape = planted
    path = tmp_path / "near_duplicates.csv"
    pairs = find_near_duplicates(images, shape, path)
    assert list(pairs.columns) == ["file_a", "file_b", "distance", "label_a", "label_b"]
    assert pairs["distance"].is_monotonic_increasing and 0 <= pairs["distance"].min()
    assert pairs["distance"].max() <= NEAR and (pairs["file_a"] < pairs["file_b"]).all()
    assert (pairs["label_a"] == pairs["file_a"].str[0]).all() and (pairs["label_a"] != pairs["label_b"]).any()
    pd.testing.assert_frame_equal(pd.read_csv(path), pairs)
    path.write_text(path.read_text().replace("0-as-it-is", "0-marked"))
    assert find_near_duplicates(images, shape, path)["file_a"].str.contains("marked").any()


def test_distance_is_the_smallest_of_nine_correlations(planted):
    """Against numpy.corrcoef on cells cut out by hand."""
    views = thumbnails(planted[0].select(range(30)), planted[1])
    found = compare(views, views).set_index(["a", "b"])["distance"]

    def cells(view, top, left):
        window = view[top : top + 24, left : left + 24].astype(float)
        cut = [window[y : y + 3, x : x + 3].mean((0, 1)) for y in range(0, 24, 3) for x in range(0, 24, 3)]
        return (np.array(cut) - np.mean(cut, axis=0)).ravel()

    for a in range(30):
        for b in range(a + 1, 30):
            shifts = [(top, left) for top in (1, 2, 3) for left in (1, 2, 3)]
            middle = cells(views[a], 2, 2)
            distance = min(1 - np.corrcoef(middle, cells(views[b], *shift))[0, 1] for shift in shifts)
            assert ((a, b) in found.index) == (distance <= NEAR)
            if distance <= NEAR:
                assert found[a, b] == pytest.approx(distance, abs=1e-6)
    assert len(found) == 32


def test_eight_thousand_images_take_seconds_and_no_square_matrix():
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (8000, 28, 28, 3), dtype=np.uint8)
    views[4000:] = np.clip(views[:4000].astype(int) + rng.integers(-9, 10, views[:4000].shape), 0, 255)
    start = time.perf_counter()
    pairs = compare(views, views)
    assert time.perf_counter() - start < 60  # about 3 on two idle cores
    assert len(pairs) == 4000 and (pairs["b"] - pairs["a"] == 4000).all()


def test_a_long_video_is_one_group_but_not_a_million_pairs():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (28, 28, 3))
    views = np.clip(frame + rng.integers(-9, 10, (1500, 28, 28, 3)), 0, 255).astype(np.uint8)
    pairs = compare(views, views)
    assert pairs.groupby("a").size().max() == 100 and len(pairs) < 150_000
    every = 1 - np.corrcoef([view[2:26, 2:26].reshape(8, 3, 8, 3, 3).mean((1, 3)).ravel() for view in views])
    assert every.max() < NEAR  # all of 1.1 million pairs are near
    pairs = pairs.assign(file_a=pairs["a"].map(str), file_b=pairs["b"].map(str))
    assert group_images([str(row) for row in range(1500)], pairs).nunique() == 1


def test_flat_images_are_no_pair_and_raise_no_warning(recwarn):
    views = np.full((3, 28, 28, 3), 7, np.uint8)
    assert compare(views, views).empty and not recwarn.list


def test_runaway_chain_is_cut_where_it_is_weakest():
    """600 images: 200 frames in a chain, near in tens, farther apart between the tens."""
    files = [f"a/{row:03}.jpg" for row in range(600)]
    far = [0.035 if row % 10 == 0 else 0.005 for row in range(1, 200)]
    pairs = pd.DataFrame({"file_a": files[:199], "file_b": files[1:200], "distance": far})
    groups = group_images(files, pairs)
    assert groups[:200].nunique() == 20 and groups.nunique() == 420
    assert group_images(files, pairs[:50]).nunique() == 600 - 50  # 51 images are no runaway: 60 would be


def test_shares_are_kept_in_every_class(images, tmp_path):
    splits = split_images(images, alone(images), RANDOM, 42, tmp_path / "split.csv")
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
            part = share_out(labels, groups, shares, seed)
            table = pd.DataFrame({"group": groups, "label": labels, "part": part})
            assert (table.groupby("group")["part"].nunique() == 1).all()
            found = pd.crosstab(table["label"], table["part"], normalize="index")
            assert np.abs(found - np.array(shares)).to_numpy().max() < 0.02


def test_split_is_the_same_everywhere_and_follows_the_seed():
    labels, groups = np.repeat([0, 1, 2], [200, 100, 47]), np.arange(347) // 2
    digest = hashlib.sha256(
        share_out(labels, groups, (0.7, 0.15, 0.15), 42).astype("u1").tobytes()
    ).hexdigest()
    assert digest.startswith("c70a719bd8eb8c28")
    one, other = (share_out(labels, groups, (0.7, 0.15, 0.15), seed) for seed in (1, 2))
    assert (one != other).any()


def test_random_split_divides_groups_and_the_other_does_not(images):
    groups = pd.Series(np.arange(len(images)) // 4, images["file"][:])
    assert pd.Series(units(groups, RANDOM)).is_unique
    assert (units(groups, Settings()) == groups).all()


def test_straddling_pairs_are_counted_and_said(images, tmp_path, caplog):
    files, groups = images["file"][:], pd.Series(np.arange(347) // 2, images["file"][:])
    rows = [(files[i], files[i + 1], 0.01, files[i][0], files[i + 1][0]) for i in range(0, 346, 2)]
    pairs = pd.DataFrame(rows, columns=NO_PAIRS.columns)
    random = split_images(images, groups, RANDOM, 42, tmp_path / "random.csv")
    split = pd.read_csv(tmp_path / "random.csv").set_index("file")["split"]
    straddling = sum(split[a] != split[b] for a, b, *_ in rows)
    assert straddling > 50
    tested = sum((split[a] == "test") != (split[b] == "test") for a, b, *_ in rows)
    assert count_pairs(pairs, groups, random) == {
        "groups": 174, "near_duplicate_pairs": 173, "conflicting_label_pairs": 0,
        "pairs_across_splits": straddling, "pairs_across_test": tested,
    }  # fmt: skip
    with caplog.at_level(logging.INFO, "finetune_vit"):
        show_splits(pairs, groups, random)
    assert f"{straddling} of them on two sides" in caplog.text
    assert f"optimistic: {tested} pairs join a test image" in caplog.text and 0 < tested < straddling
    caplog.clear()
    grouped = split_images(images, groups, Settings(), 42, tmp_path / "grouped.csv")
    assert count_pairs(pairs, groups, grouped)["pairs_across_splits"] == 0
    with caplog.at_level(logging.INFO, "finetune_vit"):
        show_splits(pairs, groups, grouped)
    assert "optimistic" not in caplog.text


def test_groups_too_large_for_the_shares_are_a_warning(images, tmp_path, caplog):
    groups = pd.Series([0] * 150 + list(range(1, 198)), images["file"][:])  # 150 of 200 images of class a
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        split_images(images, groups, Settings(test_size=0.4), 42, tmp_path / "split.csv")
    assert "groups are too large" in caplog.text and "a 75%" in caplog.text


def test_split_csv_records_every_image_and_is_taken_again(images, tmp_path):
    path, groups = tmp_path / "report" / "split.csv", pd.Series(np.arange(347) // 3, images["file"][:])
    splits = split_images(images, groups, Settings(), 42, path)
    table = pd.read_csv(path)
    assert list(table.columns) == ["file", "label", "split", "group"]
    assert len(table) == 347 and table["group"].tolist() == groups.tolist()
    assert (table.groupby("group")["split"].nunique() == 1).all()
    assert (table["label"] == table["file"].str[0]).all()
    for again in (
        split_images(images, groups, Settings(), 7, path),  # the record wins over another seed
        split_images(images, groups, Settings(split_by=str(path)), 7, tmp_path / "other.csv"),
    ):
        assert all(again[name]["file"][:] == splits[name]["file"][:] for name in SPLITS)


def test_without_validation_images_the_test_images_choose_and_that_is_said(images, tmp_path, caplog):
    settings, path = Settings(split_by="random", validation_size=0.0), tmp_path / "split.csv"
    for seed in (42, 7):  # the second time it is read again
        splits = split_images(images, alone(images), settings, seed, path)
        assert splits.num_rows == {"train": 295, "validation": 52, "test": 52}
        assert splits["validation"]["file"][:] == splits["test"]["file"][:]
        assert not set(splits["train"]["file"]) & set(splits["test"]["file"])
    assert caplog.text.count("the test images choose the epoch") == 2
    assert pd.read_csv(path)["split"].value_counts().to_dict() == {"train": 295, "test": 52}


def test_csv_file_decides(images, tmp_path, caplog):
    files = images["file"][:]
    chosen = ["train", "validation", "test"] * 115  # the last two images are not named
    pd.DataFrame({"file": files[:345][::-1], "split": chosen[::-1]}).to_csv(tmp_path / "my.csv", index=False)
    mine = Settings(split_by=str(tmp_path / "my.csv"))
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        splits = split_images(images, alone(images), mine, 42, tmp_path / "split.csv")
    assert splits["test"]["file"][:] == files[2:345:3]
    assert "2 images" in caplog.text and len(pd.read_csv(tmp_path / "split.csv")) == 345


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
    mine = Settings(split_by=str(tmp_path / "my.csv"))
    with pytest.raises(SystemExit, match=message):
        split_images(images, alone(images), mine, 42, tmp_path / "split.csv")
    assert not (tmp_path / "split.csv").exists()


def test_small_classes_are_taught_and_tested():
    labels = np.repeat([0, 1, 2], [3, 4, 1000])
    part = share_out(labels, np.arange(1007), (0.7, 0.15, 0.15), 42)
    assert [sorted(part[labels == label]) for label in (0, 1)] == [[0, 1, 2], [0, 0, 1, 2]]
    assert [int((part[labels == 2] == name).sum()) for name in (0, 1, 2)] == [700, 150, 150]


@pytest.mark.parametrize("count", [1, 2])
def test_too_small_a_class_is_one_error_line(images, tmp_path, count):
    few = images.select([*range(300), *range(300, 300 + count)])
    with pytest.raises(SystemExit, match="too few readable images of c"):
        split_images(few, alone(few), Settings(), 42, tmp_path / "split.csv")


def test_a_class_that_no_score_counts_is_named(images, tmp_path, caplog):
    split = ["train" if file[0] == "c" else SPLITS[row % 3] for row, file in enumerate(images["file"])]
    pd.DataFrame({"file": images["file"][:], "split": split}).to_csv(tmp_path / "my.csv", index=False)
    mine = Settings(split_by=str(tmp_path / "my.csv"))
    split_images(images, alone(images), mine, 42, tmp_path / "split.csv")
    assert "no validation images of c" in caplog.text and "no test images of c" in caplog.text


def test_fewer_groups_than_splits_are_one_error_line(images, tmp_path):
    letters = [file[0] for file in images["file"]]
    groups = [letter if letter == "c" else row for row, letter in enumerate(letters)]
    groups = pd.Series(pd.factorize(pd.Series(groups, dtype=object))[0], images["file"][:])
    with pytest.raises(
        SystemExit, match="too few groups of near-duplicates in c: each class needs 3; add other"
    ):
        split_images(images, groups, Settings(), 42, tmp_path / "split.csv")
    assert not (tmp_path / "split.csv").exists()


def test_a_changed_csv_file_is_not_silently_ignored(images, tmp_path):
    table = pd.DataFrame({"file": images["file"][:], "split": [SPLITS[i % 3] for i in range(len(images))]})
    mine, path = Settings(split_by=str(tmp_path / "my.csv")), tmp_path / "split.csv"
    table.to_csv(tmp_path / "my.csv", index=False)
    split_images(images, alone(images), mine, 42, path)
    table[::-1].to_csv(tmp_path / "my.csv", index=False)  # the same, in another order
    split_images(images, alone(images), mine, 42, path)
    table.loc[0, "split"] = "test"
    table.to_csv(tmp_path / "my.csv", index=False)
    with pytest.raises(SystemExit, match="my.csv has changed since .*split.csv was made of it"):
        split_images(images, alone(images), mine, 42, path)


@pytest.mark.parametrize("split_by", ["near-duplicates", "random"])
def test_more_folds_than_a_class_has_groups_are_noticed_before_training(images, tmp_path, split_by):
    small = images.select([*range(300), *range(300, 304)])
    settings = Settings(cross_validate=5, split_by=split_by)
    with pytest.raises(SystemExit, match="--cross_validate 5, but only 4 groups of images of c; give fewer"):
        split_images(small, alone(small), settings, 42, tmp_path / "split.csv")
