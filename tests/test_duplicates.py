"""Step 5: near-duplicates are found, and only they; what a chain of them connects is one scene."""

import hashlib
import io
import time

import numpy as np
import pandas as pd
import pytest
from conftest import load_images
from PIL import Image, ImageEnhance
from transformers import ViTImageProcessor

from steps.duplicates import NEAR, find_pairs, find_scenes, group_images, near_pairs, thumbnails
from steps.preprocess import prepare_pixels


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


def test_distance_is_the_smallest_of_nine_correlations(planted):
    """Against numpy.corrcoef on cells cut out by hand."""
    views = thumbnails(planted[0].select(range(30)), planted[1])
    found = near_pairs(views, views).set_index(["a", "b"])["distance"]

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
    pairs = near_pairs(views, views)
    assert time.perf_counter() - start < 60  # about 3 on two idle cores
    assert len(pairs) == 4000 and (pairs["b"] - pairs["a"] == 4000).all()


def test_a_long_video_is_one_group_but_not_a_million_pairs():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (28, 28, 3))
    views = np.clip(frame + rng.integers(-9, 10, (1500, 28, 28, 3)), 0, 255).astype(np.uint8)
    pairs = near_pairs(views, views)
    assert pairs.groupby("a").size().max() == 100 and len(pairs) < 150_000
    every = 1 - np.corrcoef([view[2:26, 2:26].reshape(8, 3, 8, 3, 3).mean((1, 3)).ravel() for view in views])
    assert every.max() < NEAR  # all of 1.1 million pairs are near
    pairs = pairs.assign(file_a=pairs["a"].map(str), file_b=pairs["b"].map(str))
    assert group_images([str(row) for row in range(1500)], pairs).nunique() == 1


def test_flat_images_are_no_pair_and_raise_no_warning(recwarn):
    views = np.full((3, 28, 28, 3), 7, np.uint8)
    assert near_pairs(views, views).empty and not recwarn.list


def test_runaway_chain_is_cut_where_it_is_weakest():
    """600 images: 200 frames in a chain, near in tens, farther apart between the tens."""
    files = [f"a/{row:03}.jpg" for row in range(600)]
    far = [0.035 if row % 10 == 0 else 0.005 for row in range(1, 200)]
    pairs = pd.DataFrame({"file_a": files[:199], "file_b": files[1:200], "distance": far})
    groups = group_images(files, pairs)
    assert groups[:200].nunique() == 20 and groups.nunique() == 420
    assert group_images(files, pairs[:50]).nunique() == 600 - 50  # 51 images are no runaway: 60 would be
