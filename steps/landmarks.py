"""Step 5: a second look at two pictures that may show one scene: do they share details, placed alike?"""

from dataclasses import dataclass

import cv2
import numpy as np

cv2.setNumThreads(1)  # pictures go through in threads of our own
SIDE = 224  # pictures are looked at in this size
NARROW = 12  # what strays less than this, in pixels across or down, may be lines of text


@dataclass
class Landmarks:
    """The details of a picture: places, float32 (n, 2); SIFT descriptors, float32 (n, 128), whole numbers.

    `limit`, float32 (n,), is the squared distance that is nearer than other pictures have: see `set_limit`.
    """

    places: np.ndarray
    marks: np.ndarray
    limit: np.ndarray | None = None


def find_landmarks(picture: np.ndarray) -> Landmarks:
    """Return the 160 strongest landmarks of a picture, uint8 (height, width, 3).

    Only details of a few pixels count: a picture enlarged from 8 x 8 pixels, or a bare outline, has none.
    """
    grey, large = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), min(picture.shape[:2])
    how = cv2.INTER_AREA if large > SIDE else cv2.INTER_CUBIC
    sift = cv2.SIFT_create(nfeatures=300, contrastThreshold=0.01)
    points, marks = sift.detectAndCompute(cv2.resize(grey, (SIDE, SIDE), interpolation=how), None)
    small = [row for row, point in enumerate(points) if point.size <= 6 * max(1, SIDE / large)]
    small = sorted(small, key=lambda row: -points[row].response)[:160]
    places = np.array([points[row].pt for row in small], np.float32).reshape(-1, 2)
    return Landmarks(places, marks[small] if small else np.empty((0, 128), np.float32))


def set_limit(mine: Landmarks, others: list[Landmarks]) -> None:
    """Set how near the like of a landmark must be, judged by how near some 48 of the `others` come.

    Ribs, borders, and text burnt into each frame have their like in many pictures, and tell none apart. The
    fourth nearest picture decides: `mine` may be among them itself, with two copies.
    """
    rows = np.unique(np.linspace(0, len(others) - 1, 48).round().astype(int))
    nearest = [distances(mine.marks, others[row].marks).min(1, initial=2.0**17) for row in rows]
    mine.limit = np.float32(0.75) * np.sort(nearest, axis=0)[min(3, len(nearest) - 1)]


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return squared distances. Descriptors are whole numbers, so float32 holds all sums exactly."""
    lengths = (first**2).sum(1)[:, None] + (second**2).sum(1)
    return lengths - 2 * (first @ second.T)


def count_shared(a: Landmarks, b: Landmarks, still: bool) -> int:
    """Return how many landmarks of `a` are in `b`, too: shifted, turned and scaled alike.

    Text and borders stay in place while the scene moves: only where `still`,
    or where a third of all landmarks is found again, does what has not moved count.
    Frames of other sizes carry their text elsewhere: what lies in one narrow strip does not count.
    """
    if min(len(a.marks), len(b.marks)) < 4:
        return 0
    apart = distances(a.marks, b.marks)
    there, back, rows = apart.argmin(1), apart.argmin(0), np.arange(len(apart))
    nearest = apart[rows, there]
    moved = np.abs(a.places - b.places[there]).max(1) > 2
    found = (back[there] == rows) & (nearest < a.limit) & (nearest < b.limit[there])
    rows = rows[found & (moved | still | (found.mean() > 1 / 3))]
    if len(rows) < 4:
        return 0
    _, fits = cv2.estimateAffinePartial2D(
        a.places[rows], b.places[there[rows]], ransacReprojThreshold=5, maxIters=500
    )
    fits = rows[fits[:, 0] > 0]
    wide = min(a.places[fits].std(0).min(), b.places[there[fits]].std(0).min()) >= NARROW
    return len(fits) if wide else 0
