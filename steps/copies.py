"""Step 5: which pairs of pictures are near-duplicates: copies of one picture, or two frames of one scene."""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import torch
from datasets import Dataset
from threadpoolctl import threadpool_limits

from .console import progress
from .files import need_space
from .landmarks import (
    ENOUGH,
    MOST,
    Crowd,
    Landmarks,
    StoredLandmarks,
    count_shared,
    distances,
    find_landmarks,
    limit_of,
    some_of,
)
from .nearest import BLOCK, Wanted, leading_components, most_alike, sketch_pictures

NEAR = 0.005  # near-duplicates are at most this far apart: see `near_pairs` and tests/benchmarks


@dataclass
class Views:
    """What is compared of n pictures: colour cells, uint16 (n, 8, 8, 3), and the landmarks of each."""

    cells: np.ndarray
    landmarks: Sequence[Landmarks]


def look_at(images: Dataset, shape: tuple[int, int, int]) -> Views:
    """Return what `near_pairs` compares of the images."""

    def look(pixels: bytes) -> tuple[np.ndarray, Landmarks]:
        picture = np.ascontiguousarray(np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0))
        return cut_cells(picture), find_landmarks(picture)

    # Beside the pixels, whose disk was chosen for much data.
    folders = [Path(file["filename"]).parent for file in images.cache_files]
    folder = folders[0] if folders else Path(tempfile.gettempdir())
    need_space(folder, len(images) * MOST * StoredLandmarks.record.itemsize)
    landmarks = StoredLandmarks(folder)
    cells = np.empty((len(images), 8, 8, 3), np.uint16)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in progress(range(0, len(images), 64), desc="look for near-duplicates"):
            seen = pool.map(look, images[start : start + 64]["pixel_values"])
            for row, (own, found) in enumerate(seen, start):
                cells[row] = own
                landmarks.append(found)
    return Views(cells, landmarks)


def cut_cells(picture: np.ndarray) -> np.ndarray:
    """Return the 8 x 8 colour cells of a picture, uint8 (height, width, 3): sums, uint16 (8, 8, 3).

    The rim, a fourteenth on each side, is left out: black borders are alike everywhere.
    """
    view = np.asarray(PIL.Image.fromarray(picture).resize((28, 28), PIL.Image.Resampling.BOX))
    return view[2:26, 2:26].reshape(8, 3, 8, 3, -1).sum((1, 3), dtype=np.uint16)


def near_pairs(first: Views, second: Views) -> pd.DataFrame:
    """Return the near-duplicates, nearest first: pictures a in first, b in second, `distance` up to NEAR.

    The smaller of two measures counts. By cells, less the mean cells of `second`: 1 - their highest
    correlation over eight mirrorings and quarter turns; at most 100 partners of an `a`, even in a video. By
    landmarks: NEAR * ENOUGH / the number that both share; looked at only in the 20 pictures that are
    most alike. Where first is second, a < b.
    """
    copies, alike = compare_cells(first, second)
    found = [same_colour(first, second), copies, compare_landmarks(first, second, alike)]
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


def compare_cells(first: Views, second: Views) -> tuple[np.ndarray, pd.DataFrame]:
    """Return copies by their cells as (a, b, distance), float64 (k, 3), and the pairs to look at again.

    These have columns a, b, int, and `still`, bool: whether they correlate by 0.9 or more.
    """
    # The mean of few pictures is not yet what all pictures share: only part of it is taken out.
    mean = second.cells.sum(0) / (len(second.cells) + 8)
    directions = leading_components(centre(second.cells[:: len(second.cells) // 10_000 + 1], mean)[0])
    known = sketch_pictures(*centre(second.cells, mean), directions)
    copies = Wanted(100, np.float32(1 - NEAR), np.less if first is second else any_pair)
    upright = Wanted(20, np.float32(-1), np.not_equal if first is second else any_pair)
    nothing = np.empty(0, int), np.empty(0, int), np.empty(0, np.float32)
    found, alike = [nothing], [nothing]
    blocks = -(-(len(first.cells) - len(without_texture(first.cells))) // BLOCK)
    with progress(total=9 * blocks, desc="compare pictures") as bar:
        for way in range(8):
            cells = first.cells[:, :, ::-1] if way > 3 else first.cells
            queries = sketch_pictures(*centre(np.rot90(cells, way, (1, 2)), mean), directions)
            for some in most_alike(queries, known, copies):
                found.append(some)
                bar.update()
            for some in most_alike(queries, known, upright) if way == 0 else ():
                alike.append(some)
                bar.update()
    a, b, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    found = pd.DataFrame({"a": a, "b": b, "distance": 1 - value.astype(float)})
    found = found.sort_values(["a", "distance", "b"]).drop_duplicates(["a", "b"])
    found = found.groupby("a").head(copies.most)
    a, b, value = (np.concatenate(parts) for parts in zip(*alike, strict=True))
    if first is second:  # the other way round is the same pair
        a, b = np.minimum(a, b), np.maximum(a, b)
    alike = pd.DataFrame({"a": a, "b": b, "still": value >= 0.9})
    return found.to_numpy(float), alike.sort_values(["a", "b", "still"]).drop_duplicates()


def any_pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Say that all pairs of pictures count: those of two folders."""
    return np.broadcast_to(True, np.broadcast_shapes(a.shape, b.shape))


def compare_landmarks(first: Views, second: Views, pairs: pd.DataFrame) -> np.ndarray:
    """Return those of the pairs that share landmarks as (a, b, distance), float64 (k, 3).

    `pairs` is what `compare_cells` returns.
    """
    a, b, still = (pairs[name].to_numpy() for name in ("a", "b", "still"))
    ends = np.flatnonzero(np.diff(a, append=-1)) + 1  # of the pairs of one picture a
    some = some_of(second.landmarks)

    def limit(landmarks: Landmarks) -> np.ndarray:
        return limit_of(landmarks, some)

    def share(part: slice) -> list[int]:
        picture = replace(first.landmarks[a[part.start]], limit=mine[a[part.start]])
        partners = [replace(second.landmarks[row], limit=theirs[row]) for row in b[part]]
        crowd = Crowd.of(partners)
        apart, sides = distances(picture, crowd), itertools.starmap(slice, itertools.pairwise(crowd.starts))
        every = zip(partners, sides, still[part], strict=True)
        return [count_shared(picture, other, apart[:, side], quiet) for other, side, quiet in every]

    parts = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
    steps = len(second.landmarks) + (0 if first is second else len(first.landmarks)) + len(parts)
    with threadpool_limits(1, "blas"), progress(total=steps, desc="compare landmarks") as bar:
        theirs = work_off(limit, second.landmarks, bar)
        mine = theirs if first is second else work_off(limit, first.landmarks, bar)
        shared = np.array([*itertools.chain.from_iterable(work_off(share, parts, bar))], int)
    near = shared >= ENOUGH
    return np.column_stack([a, b, NEAR * ENOUGH / shared.clip(1)])[near]


def work_off(function: Callable, items: Sequence, bar: Any) -> list:
    """Return function(item) of each item, from threads.

    A few hundred are handed over at a time: a million that wait would take much memory.
    """
    found = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(items), 512):
            rows = range(start, min(start + 512, len(items)))
            found += pool.map(function, (items[row] for row in rows))
            bar.update(len(rows))
    return found


def centre(cells: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cells without the mean picture, as whole numbers in float32 (n, 192), and their lengths (n,).

    Lengths are about 4000, so that float32 holds all sums of products exactly: neither their order nor the
    machine changes a result. A picture without texture becomes zero and is like no other.
    """
    whole = np.empty((len(cells), mean.size), np.float32)
    for start in range(0, len(cells), 10_000):  # float64 takes much memory
        some = cells[start : start + 10_000]
        apart = some - mean
        apart = (apart - apart.mean((1, 2), keepdims=True)).reshape(len(some), -1)
        apart[without_texture(some)] = 0
        apart *= (4000 / np.linalg.norm(apart, axis=1).clip(1e-6))[:, None]
        whole[start : start + 10_000] = np.rint(apart)
    return whole, np.sqrt(np.einsum("ij,ij->i", whole, whole)).clip(1)
