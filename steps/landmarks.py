"""Step 5: a second look at two pictures that may show one scene: do they share details, placed alike?"""

import functools
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

cv2.setNumThreads(1)  # pictures go through in threads of our own
SIDE = 224  # pictures are looked at in this size
MOST = 160  # landmarks of a picture
ENOUGH = 8  # landmarks that two pictures of one scene share
NARROW = 12  # landmarks that spread less than this, in pixels across or down, may be text


@dataclass
class Landmarks:
    """The details of a picture: points, float32 (n, 2); SIFT descriptors, uint8 (n, 128).

    A match must be nearer than the squared distance `limit`, float32 (n,): see `limit_of`.
    """

    points: np.ndarray
    descriptors: np.ndarray
    limit: np.ndarray | None = None


def find_landmarks(picture: np.ndarray) -> Landmarks:
    """Return the MOST strongest landmarks of a picture, uint8 (height, width, 3).

    Only details of a few pixels count: a picture enlarged from 8 x 8 pixels, or a bare outline, has none.
    """
    grey, side = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), min(picture.shape[:2])
    how = cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC
    sift = cv2.SIFT_create(nfeatures=300, contrastThreshold=0.01)
    points, marks = sift.detectAndCompute(cv2.resize(grey, (SIDE, SIDE), interpolation=how), None)
    small = [row for row, point in enumerate(points) if point.size <= 6 * max(1, SIDE / side)]
    small = sorted(small, key=lambda row: -points[row].response)[:MOST]
    found = np.array([points[row].pt for row in small], np.float32).reshape(-1, 2)
    return Landmarks(found, (marks[small] if small else np.empty((0, 128))).astype(np.uint8))


class StoredLandmarks(Sequence):
    """The landmarks of many pictures, in a file: 20 kB each, too much for the memory in a million.

    The file has no name in its folder and leaves with the process, however that ends.
    """

    record = np.dtype([("point", np.float32, 2), ("descriptor", np.uint8, 128)])

    def __init__(self, folder: Path) -> None:
        """Start without pictures; the file is on the disk of the folder."""
        self.file, self.starts = tempfile.TemporaryFile(dir=folder), [0]

    def append(self, found: Landmarks) -> None:
        """Add the landmarks of the next picture, before any is read."""
        records = np.empty(len(found.points), self.record)
        records["point"], records["descriptor"] = found.points, found.descriptors
        self.file.write(records.tobytes())
        self.starts.append(self.starts[-1] + len(records))

    @functools.cached_property
    def records(self) -> np.ndarray:
        """The landmarks of all pictures, one after another."""
        self.file.flush()
        return np.memmap(self.file, self.record, "c") if self.starts[-1] else np.empty(0, self.record)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Landmarks:
        records = self.records[self.starts[row] : self.starts[row + 1]]
        return Landmarks(records["point"], records["descriptor"])


@dataclass
class Crowd:
    """The descriptors of several pictures, float32 (m, 128), and their squared lengths (m,).

    Those of picture k stand between `starts[k]` and `starts[k + 1]`.
    """

    descriptors: np.ndarray
    lengths: np.ndarray
    starts: list[int]

    @classmethod
    def of(cls, pictures: Sequence[Landmarks]) -> "Crowd":
        """Put pictures together."""
        descriptors = np.concatenate([one.descriptors for one in pictures]).astype(np.float32)
        starts = np.cumsum([0, *(len(one.descriptors) for one in pictures)])
        return cls(descriptors, np.einsum("ij,ij->i", descriptors, descriptors), starts.tolist())


def some_of(others: Sequence[Landmarks]) -> Crowd:
    """Return some 48 of the pictures, for `limit_of`."""
    rows = np.unique(np.linspace(0, len(others) - 1, 48).round().astype(int))
    return Crowd.of([others[row] for row in rows])


def limit_of(mine: Landmarks, some: Crowd) -> np.ndarray:
    """Return the limit of each landmark of `mine`, from how near the pictures of `some` come to it.

    Ribs, borders and burnt-in text match in many pictures and prove nothing. The fourth nearest picture sets
    the limit: the nearest three may be `mine` itself and two copies of it.
    """
    apart, parts = distances(mine, some), itertools.pairwise(some.starts)
    nearest = np.array([apart[:, start:end].min(1, initial=2.0**17) for start, end in parts])
    fourth = min(3, len(nearest) - 1)
    return np.float32(0.75) * np.partition(nearest, fourth, axis=0)[fourth]


def distances(mine: Landmarks, others: Crowd) -> np.ndarray:
    """Return the squared distances of descriptors, float32 (n, m): exact."""
    descriptors = mine.descriptors.astype(np.float32)
    apart = (-2 * descriptors) @ others.descriptors.T
    apart += np.einsum("ij,ij->i", descriptors, descriptors)[:, None]
    apart += others.lengths
    return apart


def count_shared(a: Landmarks, b: Landmarks, apart: np.ndarray, still: bool) -> int:
    """Return how many landmarks of `a` are in `b`, too: shifted, turned and scaled alike; 0 if not ENOUGH.

    `apart` has their `distances`. Text and borders stay in place while the scene moves. So landmarks that
    have not moved count only if `still`, or if a third of all landmarks match. In frames of other sizes text
    moves, too: landmarks in one narrow strip never count.
    """
    if min(apart.shape) < ENOUGH:
        return 0
    there, rows = apart.argmin(1), np.arange(len(apart))
    nearest = apart[rows, there]
    rows = rows[(nearest < a.limit) & (nearest < b.limit[there])]
    if len(rows) < ENOUGH:  # so most pairs end
        return 0
    rows = rows[apart[:, there[rows]].argmin(0) == rows]
    if not still and len(rows) <= len(apart) / 3:
        rows = rows[np.abs(a.points[rows] - b.points[there[rows]]).max(1) > 2]
    if len(rows) < ENOUGH:
        return 0
    _, fits = cv2.estimateAffinePartial2D(
        a.points[rows], b.points[there[rows]], ransacReprojThreshold=5, maxIters=500
    )
    fits = rows[fits[:, 0] > 0]
    if len(fits) < ENOUGH:
        return 0
    wide = min(a.points[fits].std(0).min(), b.points[there[fits]].std(0).min()) >= NARROW
    return len(fits) if wide else 0
