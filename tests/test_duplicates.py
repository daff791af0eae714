"""Step 5: near-duplicates are found, and only they; what a chain of them connects is one scene."""

import hashlib
import io
import time

import numpy as np
import pandas as pd
import pytest
from conftest import load_images
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits
from transformers import ViTImageProcessor

from steps.copies import NEAR, Views, cut_cells, near_pairs
from steps.duplicates import find_pairs, find_scenes, group_images
from steps import nearest
from steps.landmarks import Landmarks, StoredLandmarks, find_landmarks
from steps.preprocess import prepare_pixels


def scene(seed, size=(288, 240)):
    """A picture with some detail inside a black border, as an endoscope sees it."""
    rng = np.random.default_rng(seed)
    coarse, fine = rng.integers(40, 200, (6, 7, 3)), rng.integers(0, 56, (80, 96, 3))
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
    groups = find_scenes(images, shape, tmp_path / "near_duplicates.csv").groups
    numbers = pd.Series([file.split("/")[1][:2] for file in groups.index], groups.index)
    assert groups.groupby(numbers).nunique().max() == 1  # one scene, one group
    assert numbers.groupby(groups).nunique().max() == 1  # one group, one scene
    assert groups.nunique() == 40 and groups.value_counts().iloc[:6].tolist() == [len(VARIANTS)] * 6


def test_pairs_are_recorded_and_read_again(planted, tmp_path):
    images, shape = planted
    path = tmp_path / "near_duplicates.csv"
    pairs = find_pairs(images, shape, path)
    assert list(pairs.columns) == ["file_a", "file_b", "distance", "label_a", "label_b"]
    assert pairs["distance"].is_monotonic_increasing and 0 <= pairs["distance"].min()
    assert pairs["distance"].max() <= NEAR and (pairs["file_a"] < pairs["file_b"]).all()
    assert (pairs["label_a"] == pairs["file_a"].str[0]).all() and (pairs["label_a"] != pairs["label_b"]).any()
    pd.testing.assert_frame_equal(pd.read_csv(path), pairs)
    path.write_text(path.read_text().replace("0-as-it-is", "0-marked"))
    assert find_pairs(images, shape, path)["file_a"].str.contains("marked").any()


def test_pairs_with_other_images_are_recorded_and_read_again(planted, tmp_path):
    """Every pair of two halves of the images, each image of the first half on the left."""
    images, shape = planted
    first, second = (images.select(range(half, len(images), 2)) for half in (0, 1))
    pairs = find_pairs(first, shape, tmp_path / "learned.csv", second)
    assert (
        len(pairs)
        and set(pairs["file_a"]) <= set(first["file"])
        and set(pairs["file_b"]) <= set(second["file"])
    )
    assert (pairs["label_b"] == pairs["file_b"].str[0]).all()
    text = (tmp_path / "learned.csv").read_text().replace("0-", "0-marked-")
    (tmp_path / "learned.csv").write_text(text)
    assert find_pairs(first, shape, tmp_path / "learned.csv", second)["file_a"].str.contains("marked").any()


def textured(seed):
    """A picture, uint8 (224, 224, 3), with details of a few pixels."""
    rng = np.random.default_rng(seed)
    layers = [(7, 60), (28, 40), (75, 60), (112, 40)]
    parts = [
        Image.fromarray(rng.integers(0, most, (size, size, 3), np.uint8)).resize((224, 224), Image.BICUBIC)
        for size, most in layers
    ]
    return np.sum([np.asarray(part) for part in parts], axis=0).clip(0, 255).astype(np.uint8)


def views_of(pictures):
    return Views(np.stack([*map(cut_cells, pictures)]), [*map(find_landmarks, pictures)])


def with_margins(picture):
    frame = np.zeros_like(picture)
    frame[20:204, 20:204] = np.asarray(Image.fromarray(picture).resize((184, 184)))
    return frame


COPIES = {f"{turns} quarters": lambda picture, k=turns: np.rot90(picture, k) for turns in range(4)}
COPIES |= {f"mirrored, {k}": lambda picture, k=k: np.rot90(picture[:, ::-1], k) for k in range(4)} | {
    "crop": lambda picture: np.asarray(Image.fromarray(picture[22:202, 22:202]).resize((224, 224))),
    "margins": with_margins,
    "shifted": lambda picture: np.roll(picture, (9, -14), (0, 1)),
    "turned": lambda picture: np.asarray(Image.fromarray(picture).rotate(6, Image.BILINEAR)),
    "grey": lambda picture: np.asarray(Image.fromarray(picture).convert("L").convert("RGB")),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_and_only_they(name):
    pictures = [textured(seed) for seed in range(12)]
    pictures += [np.ascontiguousarray(COPIES[name](picture)) for picture in pictures[:6]]
    views = views_of(pictures)
    pairs = near_pairs(views, views)
    assert sorted(zip(pairs["a"], pairs["b"], strict=True)) == [(row, row + 12) for row in range(6)]
    assert pairs["distance"].between(0, NEAR).all() and pairs["distance"].is_monotonic_increasing


def test_aligned_pictures_that_are_no_copies_are_no_pairs():
    """Digits of 8 x 8 pixels, enlarged, and one body with its own noise in each picture."""
    digits = load_digits().images[:90] * 15.9
    digits = [np.asarray(Image.fromarray(one.astype(np.uint8)).resize((64, 64), 0)) for one in digits]
    digits = [np.asarray(Image.fromarray(one).resize((224, 224)).convert("RGB")) for one in digits]
    rng, body = np.random.default_rng(0), textured(0).astype(int)
    bodies = [(body + rng.normal(0, 25, body.shape) + textured(k) // 3).clip(0, 255) for k in range(1, 40)]
    for pictures in (digits, [body.astype(np.uint8) for body in bodies]):
        views = views_of(pictures)
        assert near_pairs(views, views).empty


def test_text_burnt_into_frames_makes_no_pair():
    """Where it stands in all frames, and a little aside in some."""
    pictures = [textured(seed) for seed in range(14)]
    for number, picture in enumerate(pictures[:4]):
        picture[30:200, 4 + 3 * number : 26 + 3 * number] = textured(99)[30:200, 4:26]
    views = views_of(pictures)
    assert near_pairs(views, views).empty


def test_images_of_others_are_compared_with_ours_only():
    ours = views_of([textured(seed) for seed in range(8)])
    others = views_of([textured(40), np.ascontiguousarray(textured(3)[:, ::-1]), textured(41), textured(41)])
    pairs = near_pairs(others, ours)
    assert pairs[["a", "b"]].to_numpy().tolist() == [[1, 3]] and pairs["distance"][0] == 0


def bare(cells):
    return Views(
        cells, [Landmarks(np.empty((0, 2), np.float32), np.empty((0, 128), np.float32))] * len(cells)
    )


def test_distance_is_one_minus_the_correlation_without_the_mean_picture():
    """Against numpy.corrcoef, for one noisy copy in each of the eight positions."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 2000, (40, 8, 8, 3))
    for row in range(8):
        copy = cells[row] if row < 4 else cells[row][:, ::-1]
        cells[32 + row] = np.rot90(copy, row) + rng.integers(-30, 31, (8, 8, 3))
    pairs = near_pairs(bare(cells), bare(cells.copy())).set_index(["a", "b"])["distance"]
    mean = cells.sum(0) / 48
    for row in range(8):
        copy = np.rot90(cells[row] if row < 4 else cells[row][:, ::-1], row) - mean
        both = [one - one.mean((0, 1)) for one in (copy, cells[32 + row] - mean)]
        assert pairs[row, 32 + row] == pytest.approx(
            1 - np.corrcoef(both[0].ravel(), both[1].ravel())[0, 1],
            abs=2e-6 + 3e-4 * pairs[row, 32 + row] ** 0.5,
        )


def drawn(kind):
    """Vectors of whole numbers, float32 (900, 192), some of them without texture: all zeros."""
    rng = np.random.default_rng(3)
    strength = 1 / np.arange(1, 193) if kind != "noise" else 1
    vectors = rng.normal(0, 1, (900, 192)) * strength
    if kind == "alike":
        vectors = vectors[0] + 0.05 * vectors
    if kind == "copies":
        vectors[300:] = vectors[rng.integers(0, 300, 600)]
    if kind == "one":
        vectors[1:] = vectors[0]
    vectors[::50] = 0
    return np.rint(4000 * vectors / np.linalg.norm(vectors, axis=1).clip(1e-6)[:, None]).astype(np.float32)


@pytest.mark.parametrize("kind", ["smooth", "noise", "alike", "copies", "one"])
@pytest.mark.parametrize("wanted", [(20, -1, np.not_equal), (100, 0.995, np.less), (5, 0.5, np.not_equal)])
def test_most_alike_are_those_of_a_full_comparison(kind, wanted, monkeypatch):
    """The same values in the same order, and of equal ones those of the lowest number."""
    monkeypatch.setattr(nearest, "CHUNK", 64)  # many parts, as many pictures have
    most, least, allowed = wanted
    whole = drawn(kind)
    length = np.linalg.norm(whole, axis=1).clip(1).astype(np.float32)
    pictures = nearest.sketch_pictures(whole, length, nearest.leading_components(whole))
    found = nearest.most_alike(pictures, pictures, nearest.Wanted(most, np.float32(least), allowed))
    found = np.column_stack([np.concatenate(parts) for parts in zip(*found, strict=True)])
    table, rows = whole @ whole.T / length[:, None] / length, np.arange(900)
    good = allowed(rows[:, None], rows) & (table >= np.float32(least)) & whole.any(1) & whole.any(1)[:, None]
    expected = []
    for a in rows:
        b = np.flatnonzero(good[a])
        b = b[np.lexsort((b, -table[a, b]))][:most]
        expected += [(a, other, table[a, other]) for other in b]
    assert found[np.lexsort((found[:, 1], -found[:, 2], found[:, 0]))].tolist() == [
        list(map(float, row)) for row in expected
    ]


def test_landmarks_in_a_file_are_those_put_in_and_leave_no_file(tmp_path):
    stored = StoredLandmarks(tmp_path)
    pictures = [find_landmarks(textured(0)), find_landmarks(np.zeros((224, 224, 3), np.uint8))]
    for picture in pictures[::-1] + pictures:
        stored.append(picture)
    for row, picture in enumerate(pictures[::-1] + pictures):
        assert np.array_equal(stored[row].points, picture.points)
        assert np.array_equal(stored[row].descriptors, picture.descriptors)
    assert len(stored) == 4 and not [*tmp_path.iterdir()]
    empty = StoredLandmarks(tmp_path)
    empty.append(pictures[1])
    assert len(empty[0].points) == 0


def test_three_thousand_images_take_seconds():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 2000, (3000, 8, 8, 3))
    cells[1500:] = cells[:1500] + rng.integers(-9, 10, (1500, 8, 8, 3))
    views = bare(cells)
    start = time.perf_counter()
    pairs = near_pairs(views, views)
    assert time.perf_counter() - start < 60
    assert len(pairs) == 1500 and (pairs["b"] - pairs["a"] == 1500).all()


def test_a_long_video_is_one_group_but_not_a_million_pairs():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 2000, (1200, 8, 8, 3))
    cells[600:] = cells[0] + rng.integers(-9, 10, (600, 8, 8, 3))
    views = bare(cells)
    pairs = near_pairs(views, views)
    assert pairs.groupby("a").size().max() == 100 and 40_000 < len(pairs) < 60_000
    pairs = pairs.assign(file_a=pairs["a"].map(str), file_b=pairs["b"].map(str), distance=0.0)
    assert group_images([str(row) for row in range(7000)], pairs)[600:1200].nunique() == 1


def test_flat_images_are_pairs_where_they_have_one_colour(recwarn):
    """Black frames are copies of each other; a chain connects them without a pair for every two."""
    flat = bare(np.full((3, 8, 8, 3), 7))
    pairs = near_pairs(flat, flat)
    assert pairs[["a", "b", "distance"]].to_numpy().tolist() == [[0, 1, 0], [1, 2, 0]]
    other = bare(np.full((2, 8, 8, 3), 7) + np.array([0, 1]).reshape(2, 1, 1, 1))
    assert near_pairs(other, other).empty
    assert near_pairs(other, flat)[["a", "b"]].to_numpy().tolist() == [[0, 2]] and not recwarn.list


def test_runaway_chain_is_cut_where_it_is_weakest():
    """600 images: 200 frames in a chain, near in tens, farther apart between the tens."""
    files = [f"a/{row:03}.jpg" for row in range(600)]
    far = [0.9 * NEAR if row % 10 == 0 else 0.1 * NEAR for row in range(1, 200)]
    pairs = pd.DataFrame({"file_a": files[:199], "file_b": files[1:200], "distance": far})
    groups = group_images(files, pairs)
    assert groups[:200].nunique() == 20 and groups.nunique() == 420
    assert group_images(files, pairs[:50]).nunique() == 600 - 50  # 51 images are no runaway: 60 would be
