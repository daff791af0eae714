"""How many pairs of a folder's images are called near-duplicates, and how many of them rightly?

    python tests/benchmarks/copies.py FOLDER [--scenes FILE.csv]

prints the pairs that steps/copies.py finds in all images below FOLDER, at 224 pixels, and the groups that
they connect. FILE.csv has columns file (its name) and sequence: then precision, the share of neighbours of a
sequence that end in one group, and grouped pairs of two sequences. Copies named NAME_aug_KIND.jpg beside
NAME.jpg are counted, too. CPU seconds and the peak of memory are printed with each.

    python tests/benchmarks/copies.py --draw 100000

times only the comparison of cells, which grows faster than the number of pictures, on drawn cells: smooth
fields of 50 kinds, one in ten a copy of another, mirrored or turned.
"""

import argparse
import itertools
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import scipy.fft
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from steps.copies import Views, compare_cells, look_at, near_pairs
from steps.duplicates import group_images


def read_pixels(path: Path) -> bytes:
    picture = PIL.Image.open(path).convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1).tobytes()


def draw_cells(count: int) -> np.ndarray:
    """Return colour cells of drawn pictures, uint16 (count, 8, 8, 3)."""
    rng, frequency = np.random.default_rng(0), np.arange(8)
    fall = 1 / (1 + frequency[:, None] + frequency)[..., None] ** 1.5
    kinds, cells = rng.normal(0, 1, (50, 8, 8, 3)) * fall, np.empty((count, 8, 8, 3), np.uint16)
    for start in range(0, count, 10_000):
        part = cells[start : start + 10_000]
        waves = kinds[rng.integers(50, size=len(part))] + rng.normal(0, 1, part.shape) * fall
        part[:] = (1150 + 500 * scipy.fft.idctn(waves, axes=(1, 2), norm="ortho")).clip(0, 2295)
    for row in rng.permutation(count)[: count // 10]:
        copy = cells[rng.integers(count)][:, :: rng.choice([1, -1])]
        cells[row] = np.rot90(copy, rng.integers(4)) + rng.integers(0, 20, copy.shape).astype(np.uint16)
    return cells


def tell_cost(what: str, start: float) -> None:
    """Print the CPU seconds since `start`, and the largest memory that the process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.process_time() - start:.1f} CPU seconds, peak {peak:.2f} GB")


def judge(pairs: pd.DataFrame, groups: np.ndarray, scenes: np.ndarray) -> dict[str, str]:
    """Return the precision of pairs, the share of neighbours in one group, and wrongly grouped pairs.

    `groups` and `scenes` (n,) are what was found and what is true of images in the order of their names.
    """
    rows = itertools.pairwise(range(len(scenes)))
    near = [groups[a] == groups[b] for a, b in rows if scenes[a] == scenes[b]]
    grouped = np.triu(groups[:, None] == groups, 1)
    wrong = (grouped & (scenes[:, None] != scenes)).sum()
    right = scenes[pairs["a"]] == scenes[pairs["b"]]
    return {
        "precision": f"{right.mean():.3f}" if len(right) else "–",
        "neighbours in one group": f"{np.mean(near):.2f}",
        "wrong": f"{wrong} of {grouped.sum()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--scenes", type=Path)
    parser.add_argument("--draw", type=int)
    args = parser.parse_args()
    if args.draw:
        views, start = Views(draw_cells(args.draw), []), time.process_time()
        copies, again = compare_cells(views, views)
        tell_cost(f"{args.draw} drawn, {len(copies)} copies, {len(again)} pairs to look at again", start)
        return
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix in (".jpg", ".png"))
    images, start = Dataset.from_dict({"pixel_values": [*map(read_pixels, paths)]}), time.process_time()
    views = look_at(images, (3, 224, 224))
    tell_cost("look", start)
    start, files = time.process_time(), [str(path) for path in paths]
    pairs = near_pairs(views, views)
    tell_cost("compare", start)
    named = pairs.assign(file_a=[files[row] for row in pairs["a"]], file_b=[files[row] for row in pairs["b"]])
    groups = group_images(files, named).to_numpy()
    count, largest = len(set(groups)), max(np.bincount(groups))
    print(f"{len(files)} images, {len(pairs)} pairs, {count} groups, largest {largest}")
    stems = np.array([path.stem.split("_aug_")[0] for path in paths])
    if any("_aug_" in file for file in files):
        own = (stems[pairs["a"]] == stems[pairs["b"]]).sum()
        print(f"{own} of {len(files) - len(set(stems))} copies found")
    if args.scenes:
        table = pd.read_csv(args.scenes).set_index("file")["sequence"]
        print(judge(pairs, groups, table[[path.name for path in paths]].to_numpy()))


if __name__ == "__main__":
    main()
