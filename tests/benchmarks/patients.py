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
from near_duplicates import class_tokens, probe
from story import make_work

from steps.architectures import check_checkpoint, pixel_shape
from steps.download import fetch_images
from steps.duplicates import find_scenes, group_images
from steps.load import load_folder
from steps.preprocess import keep_readable, pixels_of, prepare_pixels
from steps.use import load_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _, flags = parser.parse_known_args()
    temporary = tempfile.TemporaryDirectory()
    work = make_work([*flags, "--output_dir", temporary.name])
    name = work.settings.model_name_or_path
    check_checkpoint(name)
    folder, _ = fetch_images(work)
    model, processor = load_classifier(name)
    listed, left_out = load_folder(folder, work.settings, work.cache)
    images = prepare_pixels(listed, folder, processor, work.cache)
    images = keep_readable(images, left_out, work.report / "left_out.csv")
    shape, files = pixel_shape(processor), images["file"][:]
    tokens = class_tokens(model, pixels_of(files, images, shape).transpose(0, 3, 1, 2).copy())

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
