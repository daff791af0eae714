"""Step 5: which of very many pictures are most alike, without a full comparison of each with each."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

LEADING = 40  # components that a first comparison looks at
BLOCK, CHUNK = 256, 2048  # pictures that are compared with how many at once: the table fits in a cache
SLACK = 1e-5  # what rounding may take from a bound


@dataclass
class Pictures:
    """n pictures as vectors of whole numbers, float32 (n, d), in the order of their first component.

    `length` (n,) is that of each vector, `rows` (n,) its row number. `sketch`, float32 (n, LEADING + 1), has
    the leading components of each vector, divided by its length, and how long the rest of it is.
    """

    whole: np.ndarray
    length: np.ndarray
    rows: np.ndarray
    sketch: np.ndarray


@dataclass
class Wanted:
    """Which pairs: for each picture a the `most` pictures b of highest correlation, `least` or more.

    `allowed` says of row numbers a and b, which broadcast, which pairs count at all.
    """

    most: int
    least: np.float32
    allowed: Callable


def leading_components(whole: np.ndarray) -> np.ndarray:
    """Return directions, float32 (d, LEADING), in which vectors (n, d) differ most, the first one first."""
    whole = whole.astype(float)
    return np.linalg.eigh(whole.T @ whole)[1][:, : -LEADING - 1 : -1].astype(np.float32)


def sketch_pictures(whole: np.ndarray, length: np.ndarray, directions: np.ndarray) -> Pictures:
    """Return vectors (n, d) of a length (n,) as `Pictures`. Vectors of zeros are like no other: left out."""
    leading = whole @ directions / length[:, None]
    rest = np.sqrt((1 - (leading**2).sum(1)).clip(0) + 1e-6)  # never less than it is
    rows = np.argsort(leading[:, 0], kind="stable")
    rows = rows[whole[rows].any(1)]
    return Pictures(whole[rows], length[rows], rows, np.column_stack([leading, rest])[rows])


def most_alike(first: Pictures, second: Pictures, wanted: Wanted) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield row numbers a in first and b in second, and their correlations, for some pictures after others.

    Exact, and of equal correlations those of the lowest b. By the Cauchy-Schwarz inequality a correlation is
    at most the product of two sketches. Only where that could be enough is it worked out in full.
    """
    search = functools.partial(search_block, first=first, second=second, wanted=wanted)
    # Products of a few rows are no faster in threads of their own beside these.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(search, range(0, len(first.rows), BLOCK))


def search_block(start: int, first: Pictures, second: Pictures, wanted: Wanted) -> tuple[np.ndarray, ...]:
    """Return what `most_alike` yields for the pictures of `first` from `start` on."""
    own = slice(start, start + BLOCK)
    whole, length, sketch = first.whole[own], first.length[own, None], first.sketch[own]
    best = Best(first.rows[own], wanted)
    for chunk in nearest_first(sketch[:, 0], second.sketch[:, 0], best):
        bound = sketch @ second.sketch[chunk].T
        hits = np.flatnonzero(bound >= best.floor - np.float32(SLACK))
        a, b = np.divmod(hits, bound.shape[1])
        b += chunk.start
        if len(hits) < bound.size / 50:
            alike = np.einsum("ij,ij->i", whole[a], second.whole[b]) / length[a, 0] / second.length[b]
        else:
            table = whole @ second.whole[chunk].T / length / second.length[chunk]
            if len(hits) == bound.size:  # nothing is known of these pictures yet
                best.raise_floor(table, second.rows[chunk])
            a, b = np.divmod(np.flatnonzero(table >= best.floor), bound.shape[1])
            alike = table[a, b]
            b += chunk.start
        best.add(a, second.rows[b], alike)
    best.sort_out()
    return best.rows[best.a], best.b, best.alike


def nearest_first(first: np.ndarray, second: np.ndarray, best: "Best") -> Iterator[slice]:
    """Yield the parts of `second` that may hold more for `best`, those near `first` before those far away.

    Both have first components, (m,) and (n,), sorted. Two vectors of length 1 are at least as far apart as
    these.
    """
    starts = np.arange(0, len(second), CHUNK)
    ends = np.minimum(starts + CHUNK, len(second))
    gap = np.maximum(second[starts] - first.max(), first.min() - second[ends - 1])
    for part in np.argsort(gap.clip(0), kind="stable"):
        if gap[part] > np.sqrt(2 - 2 * (best.floor.min() - SLACK)):
            return
        yield slice(starts[part], ends[part])


class Best:
    """The best pairs so far of the pictures `rows` (n,): a, a number below n; b, a row number; how alike.

    A pair must reach the `floor`, float32 (n, 1), of its a. Of pairs exactly at the floor only those with a b
    below `last`, int (n,), count: ties go to the lowest b.
    """

    def __init__(self, rows: np.ndarray, wanted: Wanted) -> None:
        """Start without pairs."""
        self.rows, self.wanted, self.fresh = rows, wanted, 0
        self.floor = np.full((len(rows), 1), wanted.least, np.float32)
        self.last = np.full(len(rows), np.iinfo(int).max)
        self.a, self.b, self.alike = np.empty(0, int), np.empty(0, int), np.empty(0, np.float32)

    def raise_floor(self, table: np.ndarray, b: np.ndarray) -> None:
        """Raise the floor by the correlations (n, m) with pictures b (m,). Pairs not allowed become -2."""
        table[~self.wanted.allowed(self.rows[:, None], b)] = -2
        if len(b) > self.wanted.most:
            enough = np.partition(table, -self.wanted.most, axis=1)[:, -self.wanted.most, None]
            self.last[(enough > self.floor)[:, 0]] = np.iinfo(int).max
            self.floor = np.maximum(self.floor, enough)

    def add(self, a: np.ndarray, b: np.ndarray, alike: np.ndarray) -> None:
        """Add the pairs that are good enough, and now and then sort out those that are no longer."""
        floor = self.floor[a, 0]
        good = (alike > floor) | ((alike == floor) & (b < self.last[a]))
        good &= self.wanted.allowed(self.rows[a], b)
        self.a, self.b = np.append(self.a, a[good]), np.append(self.b, b[good])
        self.alike = np.append(self.alike, alike[good])
        self.fresh += good.sum()
        if self.fresh > len(self.rows) * self.wanted.most:
            self.sort_out()

    def sort_out(self) -> None:
        """Keep the best pairs of each picture, and where these are enough, raise the floor to the worst."""
        order = np.lexsort((self.b, -self.alike, self.a))
        a = self.a[order]
        rank = np.arange(len(a)) - np.searchsorted(a, a)
        order, last = order[rank < self.wanted.most], order[rank == self.wanted.most - 1]
        full = self.a[last]
        self.floor[full, 0], self.last[full] = self.alike[last], self.b[last]
        self.a, self.b, self.alike, self.fresh = self.a[order], self.b[order], self.alike[order], 0
