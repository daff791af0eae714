"""Step 5: which pairs of pictures are near-duplicates: copies of one picture, or two frames of one scene."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import PIL.Image
import torch
from datasets import Dataset
from threadpoolctl import threadpool_limits

from .console import progress
from .landmarks import Landmarks, count_shared, find_landmarks, with_limit

NEAR = 0.005  # near-duplicates are at most this far apart: see `near_pairs` and tests/benchmarks
ENOUGH = 8  # landmarks that two pictures of one scene share


@dataclass
class Views:
    """What is compared of n pictures: colour cells, int64 (n, 8, 8, 3), and the landmarks of each."""

    cells: np.ndarray
    landmarks: list[Landmarks]


def look_at(images: Dataset, shape: tuple[int, int, int]) -> Views:
    """Return what `near_pairs` compares of the images."""

    def look(pixels: bytes) -> tuple[np.ndarray, Landmarks]:
        picture = np.ascontiguousarray(np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0))
        return cut_cells(picture), find_landmarks(picture)

    found = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in progress(range(0, len(images), 64), desc="look for near-duplicates"):
            found += pool.map(look, images[start : start + 64]["pixel_values"])
    return Views(np.stack([cells for cells, _ in found]), [landmarks for _, landmarks in found])


def cut_cells(picture: np.ndarray) -> np.ndarray:
    """Return the 8 x 8 colour cells of a picture, uint8 (height, width, 3): sums, int64 (8, 8, 3).

    The rim, a fourteenth on each side, is left out: black borders are alike everywhere.
    """
    view = np.asarray(PIL.Image.fromarray(picture).resize((28, 28), PIL.Image.Resampling.BOX))
    return view[2:26, 2:26].reshape(8, 3, 8, 3, -1).sum((1, 3), dtype=np.int64)


def near_pairs(first: Views, second: Views) -> pd.DataFrame:
    """Return the near-duplicates, nearest first: pictures a in first, b in second, `distance` up to NEAR.

    The distance is 1 - the correlation of the cells without the mean of `second`, one picture mirrored or
    turned by quarters. Or, if less, NEAR * ENOUGH / the number of landmarks that both share, counted for the
    20 most alike pictures. Where first is second, a < b. By cells, each `a` has at most 100 partners: a video
    has more.
    """
    found = [same_colour(first, second)]
    # Products of a few rows are no faster in threads of their own beside these.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        limited = functools.partial(with_limit, others=second.landmarks)
        theirs = [*pool.map(limited, second.landmarks)]
        mine = theirs if first is second else [*pool.map(limited, first.landmarks)]
        for start, upright, alike in correlations(first, second):
            rows = np.arange(len(upright))
            if first is second:
                alike = np.triu(alike, start + 1)
                upright[rows, start + rows] = -1
            a, b = most_alike(alike, 100)
            near = alike[a, b] >= np.float32(1 - NEAR)
            found.append(np.column_stack([a + start, b, 1 - alike[a, b].astype(float)])[near])
            a, b = most_alike(upright, 20)
            still, a = upright[a, b] >= 0.9, a + start
            if first is second:  # the other way round is the same pair
                a, b, still = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b], still[a != b]
            pairs = [mine[row] for row in a], [theirs[row] for row in b], still
            shared = np.array([*pool.map(count_shared, *pairs)])
            found.append(np.column_stack([a, b, NEAR * ENOUGH / shared.clip(1)])[shared >= ENOUGH])
    pairs = pd.DataFrame(np.concatenate(found), columns=["a", "b", "distance"]).astype({"a": int, "b": int})
    pairs["distance"] = pairs["distance"].clip(0).round(6)
    return pairs.sort_values(["distance", "a", "b"]).drop_duplicates(["a", "b"], ignore_index=True)


def same_colour(first: Views, second: Views) -> np.ndarray:
    """Return pairs at distance 0, float64 (k, 3), of pictures without texture, such as black frames.

    They correlate with nothing. Each is paired with one other of its colour, so that a chain connects all.
    """
    last, pairs = {}, []
    for b in without_texture(second.cells):
        colour = second.cells[b].tobytes()
        pairs += [(last[colour], b, 0)] if first is second and colour in last else []
        last[colour] = b
    if first is not second:
        colours = ((a, first.cells[a].tobytes()) for a in without_texture(first.cells))
        pairs = [(a, last[colour], 0) for a, colour in colours if colour in last]
    return np.array(pairs, float).reshape(-1, 3)


def without_texture(cells: np.ndarray) -> np.ndarray:
    """Return the rows, int, of the pictures of one colour."""
    return np.flatnonzero(np.ptp(cells, axis=(1, 2)).max(1) == 0)


def correlations(first: Views, second: Views) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield a row number of `first`, and how the next 128 pictures correlate with all n of `second`.

    Two arrays, float32 (128 or fewer, n): upright, and the best of the eight ways to mirror and turn them.
    """
    # The mean of few pictures is not yet what all pictures share: only part of it is taken out.
    mean = second.cells.sum(0) / (len(second.cells) + 8)
    known, length = centre(second.cells, mean)
    mirrored = first.cells[:, :, ::-1]
    turned = [np.rot90(way, k, (1, 2)) for way in (first.cells, mirrored) for k in range(4)]
    turned = [centre(cells, mean) for cells in turned]
    for start in range(0, len(first.cells), 128):
        rows = slice(start, start + 128)
        upright, *others = (query[rows] @ known.T / size[rows, None] / length for query, size in turned)
        yield start, upright, functools.reduce(np.maximum, others, upright)


def centre(cells: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells without the mean picture, as whole numbers in float32 (n, 192), and their lengths (n,).

    Lengths are about 4000, so that float32 holds all sums of products exactly: neither their order nor the
    machine changes a result. A picture without texture becomes zero and is like no other.
    """
    apart = cells - mean
    apart = (apart - apart.mean((1, 2), keepdims=True)).reshape(len(cells), -1)
    apart[without_texture(cells)] = 0
    whole = np.rint(apart * (4000 / np.linalg.norm(apart, axis=1).clip(1e-6))[:, None]).astype(np.float32)
    return whole, np.sqrt((whole**2).sum(1)).clip(1)


def most_alike(alike: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns, int, of the `most` highest values in each row of a table (n, m)."""
    columns = np.argpartition(-alike, min(most, alike.shape[1]) - 1)[:, :most]
    return np.repeat(np.arange(len(alike)), columns.shape[1]), columns.ravel()
