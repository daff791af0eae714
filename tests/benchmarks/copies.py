"""How many pairs of a folder's images are called near-duplicates, and how many of them rightly?

    python tests/benchmarks/copies.py FOLDER [--scenes FILE.csv]

prints the pairs that steps/copies.py finds in all images below FOLDER, at 224 pixels, and the groups that
they connect. FILE.csv has columns file (its name) and sequence: then precision, the share of neighbours of a
sequence that end in one group, and grouped pairs of two sequences. Copies named NAME_aug_KIND.jpg beside
NAME.jpg are counted, too.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from steps.copies import look_at, near_pairs
from steps.duplicates import group_images


def read_pixels(path: Path) -> bytes:
    picture = PIL.Image.open(path).convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1).tobytes()


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
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=Path)
    args = parser.parse_args()
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix in (".jpg", ".png"))
    views = look_at(Dataset.from_dict({"pixel_values": [*map(read_pixels, paths)]}), (3, 224, 224))
    pairs, files = near_pairs(views, views), [str(path) for path in paths]
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
