"""What does a split cost that knows the patients, beside one by appearance, and a random one?

    python tests/benchmarks/patients.py --data_url IMAGES.zip --metadata TABLE.csv --model_name_or_path MODEL

takes the flags of finetune_vit.py and prints a table: groups, the largest group, accuracy and macro F1 of a
logistic regression on what the head reads, over 5 folds of whole groups, mean and standard deviation of 4
seeds. The last row keeps what the script keeps: patients, joined with the scenes that touch them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from near_duplicates import probe, read_images
from story import make_work

from steps.duplicates import find_scenes, group_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _, flags = parser.parse_known_args()
    temporary = tempfile.TemporaryDirectory()
    work = make_work([*flags, "--output_dir", temporary.name])
    images, shape, tokens = read_images(work)
    files = images["file"][:]
    scenes = find_scenes(images, shape, work.report / "near_duplicates.csv")
    groups = {
        "random": np.arange(len(files)),
        "near-duplicates": group_images(files, scenes.pairs).to_numpy(),
        "patients": pd.factorize(pd.Series(images["group"][:]))[0],
        "patients and near-duplicates": scenes.groups.to_numpy(),
    }
    rows = {}
    for split, group in groups.items():
        counts = np.bincount(group)
        rows[split] = {"groups": (counts > 0).sum(), "largest": counts.max()}
        rows[split] |= probe(tokens, np.array(images["label"]), group)
    print(pd.DataFrame(rows).T.to_string())


if __name__ == "__main__":
    main()
