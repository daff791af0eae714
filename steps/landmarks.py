"""Step 5: a second look at two pictures that may show one scene: do they share details, placed alike?"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

cv2.setNumThreads(1)  # pictures go through in threads of our own
SIDE = 224  # pictures are looked at in this size
NARROW = 12  # landmarks that spread less than this, in pixels across or down, may be text


@dataclass
class Landmarks:
    """The details of a picture: points, float32 (n, 2); SIFT descriptors, uint8 (n, 128).

    A match must be nearer than the squared distance `limit`, float32 (n,): see `with_limit`.
    """

    points: np.ndarray
    descriptors: np.ndarray
    limit: np.ndarray | None = None


def find_landmarks(picture: np.ndarray) -> Landmarks:
    """Return the 160 strongest landmarks of a picture, uint8 (height, width, 3).

    Only details of a few pixels count: a picture enlarged from 8 x 8 pixels, or a bare outline, has none.
    """
    grey, side = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), min(picture.shape[:2])
    how = cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC
    sift = cv2.SIFT_create(nfeatures=300, contrastThreshold=0.01)
    points, marks = sift.detectAndCompute(cv2.resize(grey, (SIDE, SIDE), interpolation=how), None)
    small = [row for row, point in enumerate(points) if point.size <= 6 * max(1, SIDE / side)]
    small = sorted(small, key=lambda row: -points[row].response)[:160]
    found = np.array([points[row].pt for row in small], np.float32).reshape(-1, 2)
    return Landmarks(found, (marks[small] if small else np.empty((0, 128))).astype(np.uint8))


def with_limit(mine: Landmarks, others: list[Landmarks]) -> Landmarks:
    """Return `mine` with the limit of each landmark, from how near some 48 of the `others` come to it.

    Ribs, borders and burnt-in text match in many pictures and prove nothing. The fourth nearest picture sets
    the limit: the nearest three may be `mine` itself and two copies of it.
    """
    rows = np.unique(np.linspace(0, len(others) - 1, 48).round().astype(int))
    others = [others[row].descriptors for row in rows]
    nearest = [distances(mine.descriptors, other).min(1, initial=2.0**17) for other in others]
    return replace(mine, limit=np.float32(0.75) * np.sort(nearest, axis=0)[min(3, len(nearest) - 1)])


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the squared distances, float32 (n, m), of descriptors, uint8 (n, 128) and (m, 128): exact."""
    first, second = first.astype(np.float32), second.astype(np.float32)
    lengths = (first**2).sum(1)[:, None] + (second**2).sum(1)
    return lengths - 2 * (first @ second.T)


def count_shared(a: Landmarks, b: Landmarks, still: bool) -> int:
    """Return how many landmarks of `a` are in `b`, too: shifted, turned and scaled alike.

    Text and borders stay in place while the scene moves. So landmarks that have not moved count only if
    `still`, or if a third of all landmarks match. In frames of other sizes text moves, too: landmarks in one
    narrow strip never count.
    """
    if min(len(a.descriptors), len(b.descriptors)) < 4:
        return 0
    apart = distances(a.descriptors, b.descriptors)
    there, back, rows = apart.argmin(1), apart.argmin(0), np.arange(len(apart))
    nearest = apart[rows, there]
    moved = np.abs(a.points - b.points[there]).max(1) > 2
    found = (back[there] == rows) & (nearest < a.limit) & (nearest < b.limit[there])
    rows = rows[found & (moved | still | (found.mean() > 1 / 3))]
    if len(rows) < 4:
        return 0
    _, fits = cv2.estimateAffinePartial2D(
        a.points[rows], b.points[there[rows]], ransacReprojThreshold=5, maxIters=500
    )
    fits = rows[fits[:, 0] > 0]
    if not len(fits):
        return 0
    wide = min(a.points[fits].std(0).min(), b.points[there[fits]].std(0).min()) >= NARROW
    return len(fits) if wide else 0
