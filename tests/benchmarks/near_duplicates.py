"""Which near-duplicates does each method find, what do its groups look like, what does the split then cost?

    pip install imagehash
    python tests/benchmarks/near_duplicates.py --data_url IMAGES.zip --model_name_or_path CHECKPOINT

takes the flags of finetune_vit.py and prints a table: pairs, pairs with two labels, groups, the largest
group, recall (of pairs whose class tokens have a cosine of 0.99 or more), accuracy and macro F1 of a
logistic regression on the class tokens over 5 grouped folds, mean and standard deviation of 4 seeds.

Where the scene of each frame is known, the table says instead how many pairs are of one scene, how many
neighbours of a scene end in one group, and how many grouped pairs are of two scenes:

    ... --metadata TABLE.csv --group_column_name sequence
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import torch
from datasets import Dataset
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from copies import judge
from story import make_work

from steps.architectures import check_checkpoint, pixel_shape
from steps.copies import NEAR, look_at, near_pairs
from steps.download import fetch_images
from steps.load import as_dataset, find_images
from steps.preprocess import keep_readable, pixels_of, prepare_pixels
from steps.use import load_classifier
from steps.workspace import Workspace


def class_tokens(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Return the class tokens, float32 (n, width), of length 1."""
    tokens = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        for start in tqdm(range(0, len(pixels), 32), desc="class tokens"):
            model(pixel_values=torch.from_numpy(pixels[start : start + 32]))
    return torch.nn.functional.normalize(torch.cat(tokens), dim=-1).numpy()


def read_images(work: Workspace) -> tuple[Dataset, tuple[int, int, int], np.ndarray]:
    """Return the prepared images of a run, the shape of their pixels, and their class tokens."""
    name = work.settings.model_name_or_path
    check_checkpoint(name)
    folder, _ = fetch_images(work)
    model, processor = load_classifier(name)
    table, left_out = find_images(folder, work.settings)
    listed = as_dataset(table, sorted(set(table["label"])))  # of one class, perhaps: frames without labels
    images = prepare_pixels(listed, folder, processor, work.cache)
    images, shape = keep_readable(images, left_out, work.report / "left_out.csv"), pixel_shape(processor)
    pixels = pixels_of(images["file"], images, shape)
    return images, shape, class_tokens(model, pixels.transpose(0, 3, 1, 2).copy())


def connected(distance: np.ndarray, threshold: float) -> np.ndarray:
    return connected_components(coo_array(distance <= threshold), directed=False)[1]


def average(distance: np.ndarray, threshold: float) -> np.ndarray:
    condensed = squareform(distance, checks=False)
    return fcluster(linkage(condensed, "average"), threshold, "distance")


def probe(tokens: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> dict[str, str]:
    """Return accuracy and macro F1 of a logistic regression over grouped folds, mean and spread of seeds."""
    accuracies, scores = [], []
    for seed in range(4):
        guesses = np.empty_like(labels)
        for train, test in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(
            tokens, labels, groups
        ):
            classify = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
            guesses[test] = classify.fit(tokens[train], labels[train]).predict(tokens[test])
        accuracies.append((guesses == labels).mean())
        scores.append(f1_score(labels, guesses, average="macro"))
    columns = {"accuracy": accuracies, "macro F1": scores}
    return {name: f"{np.mean(values):.3f} ± {np.std(values):.3f}" for name, values in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _, flags = parser.parse_known_args()
    import imagehash  # no package of ours: the help is there without it

    temporary = tempfile.TemporaryDirectory()
    work = make_work([*flags, "--output_dir", temporary.name])
    images, shape, tokens = read_images(work)
    labels, n = np.array(images["label"]), len(images)
    scenes = np.array(images["group"]) if "group" in images.column_names else None
    pixels = pixels_of(images["file"], images, shape)

    cosine = 1 - (tokens @ tokens.T).clip(-1, 1)
    bits = np.stack([imagehash.phash(PIL.Image.fromarray(picture)).hash.ravel() for picture in pixels])
    phash = (bits[:, None] != bits).sum(-1)

    views, ours = look_at(images, shape), np.ones((n, n))
    pairs = near_pairs(views, views)
    ours[pairs["a"], pairs["b"]] = ours[pairs["b"], pairs["a"]] = pairs["distance"]

    methods = {"random split": (ours, -1, connected)}
    methods |= {f"pHash <= {bits} of 64 bits, connected": (phash, bits, connected) for bits in (4, 6, 8)}
    methods |= {
        f"class token, cosine >= {1 - d:.2f}, connected": (cosine, d, connected) for d in (0.01, 0.02)
    }
    methods["class token, cosine >= 0.98, average linkage"] = (cosine, 0.02, average)
    methods |= {f"ours, {part} of NEAR, connected": (ours, part * NEAR, connected) for part in (0.5, 1)}
    alike, rows = np.triu(cosine <= 0.01, 1), {}
    for name, (distance, threshold, link) in tqdm(methods.items(), desc="methods"):
        distance = np.where(np.eye(n, dtype=bool), 0, distance)
        near, groups = np.triu(distance <= threshold, 1), link(distance, threshold)
        a, b = np.nonzero(near)
        _, sizes = np.unique(groups, return_counts=True)
        rows[name] = {
            "pairs": len(a), "two labels": (labels[a] != labels[b]).sum(), "groups": len(sizes),
            "largest": sizes.max(), "recall": f"{near[alike].mean():.2f}",
        }  # fmt: skip
        if scenes is None:
            rows[name] |= probe(tokens, labels, groups)
        else:
            rows[name] |= judge(pd.DataFrame({"a": a, "b": b}), groups, scenes)
    print(pd.DataFrame(rows).T.to_string())


if __name__ == "__main__":
    main()
