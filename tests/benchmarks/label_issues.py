"""How many planted wrong labels stand first in report/label_issues.csv?

    python tests/benchmarks/label_issues.py --data_url IMAGES.zip --model_name_or_path CHECKPOINT [--seeds 6]

takes the flags of finetune_vit.py. It gives 5 % of the images another label: any, that of the class they look
most like, or any, but the same one to a whole group. A ridge regression on the class tokens is then fitted as
`--recipe fast` fits a head: once, which leaves validation and test to look at, or in 5 folds of whole groups.
The table has, of the first 50 rows of each ranking, how many were planted and how many of the planted they
are; then the same for all rows, and for those that confident learning marks. Labels that were wrong before
count as false alarms. Means of the seeds; sd is that of the first column.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from scipy.special import softmax
from sklearn.linear_model import RidgeClassifierCV
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from near_duplicates import read_images
from story import make_work

from steps.duplicates import find_scenes
from steps.label_issues import SURE, rank_labels
from steps.scores import fit_temperature
from steps.split import deal

SHARE, FIRST, FOLDS = 0.05, 50, 5


def fit(tokens: np.ndarray, labels: np.ndarray, role: np.ndarray) -> np.ndarray:
    """Return probabilities (n, classes) of all images; role (n,) is 0 for training, 1 for validation."""
    taught, checked = role == 0, role == 1
    head = RidgeClassifierCV(np.logspace(0, 4, 9), class_weight="balanced")
    head.fit(tokens[taught] / tokens[taught].std(), labels[taught])
    logits = head.decision_function(tokens / tokens[taught].std())
    logits = np.column_stack([-logits, logits]) if logits.ndim == 1 else logits
    return softmax(logits / fit_temperature(logits[checked], labels[checked]), axis=1)


def look(tokens: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return probabilities (n, classes), by where they come from; not a number where an image was learned."""
    role = deal(labels, groups, [0.7, 0.15, 0.15], seed)
    once = np.where((role > 0)[:, None], fit(tokens, labels, role), np.nan)
    fold, crossed = deal(labels, groups, [1 / FOLDS] * FOLDS, seed), np.empty_like(once)
    for number in range(FOLDS):
        role = np.select([fold == number, fold == (number + 1) % FOLDS], [2, 1], 0)
        crossed[role == 2] = fit(tokens, labels, role)[role == 2]
    return {"validation and test": once, "5 folds": crossed}


def plant(kind: str, labels: np.ndarray, groups: np.ndarray, clean: np.ndarray, seed: int) -> np.ndarray:
    """Return labels (n,), SHARE of them wrong; `clean` are probabilities (n, classes) from right labels."""
    random, wanted, classes = np.random.RandomState(seed), round(SHARE * len(labels)), labels.max() + 1
    planted = labels.copy()
    if kind == "whole groups":
        for group in random.permutation(np.unique(groups)):
            rows = np.flatnonzero(groups == group)
            if (planted != labels).sum() + len(rows) <= wanted:
                others = np.setdiff1d(np.arange(classes), labels[rows])
                planted[rows] = random.choice(others)
        return planted
    rows = random.choice(len(labels), wanted, replace=False)
    if kind == "any class":
        planted[rows] = (labels[rows] + random.randint(1, classes, wanted)) % classes
    else:
        others = clean[rows].copy()
        others[np.arange(wanted), labels[rows]] = -1
        planted[rows] = others.argmax(1)
    return planted


def rankings(images: pd.DataFrame, known: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {name: the files that are listed, the first first, and whether each is `sure`}."""
    labels = known.columns.get_indexer(images.loc[known.index, "label"])
    values, rows = known.to_numpy(), np.arange(len(known))
    own, others = values[rows, labels], values.copy()
    others[rows, labels] = -1
    options = {"filter_by": "confident_learning", "n_jobs": 1}
    sure = find_label_issues(labels, values, **options)
    table = pd.DataFrame({"file": known.index, "sure": sure})
    doubted, margin = others.max(1) > own, own - others.max(1)
    found = {"any order": table.sample(frac=1, random_state=12345)}
    found["p of the label"] = table[doubted].iloc[np.argsort(own[doubted], kind="stable")]
    found["margin to the best class"] = table[doubted].iloc[np.argsort(margin[doubted], kind="stable")]
    ranked = find_label_issues(labels, values, return_indices_ranked_by="self_confidence", **options)
    found["cleanlab, confident learning"] = table.iloc[ranked]
    differ = pairs[pairs["label_a"] != pairs["label_b"]]
    looked_at = pd.concat([pd.Series(known.index), differ["file_a"], differ["file_b"]]).unique()
    votes = rank_labels(images.loc[looked_at], known, pairs)
    found["votes with near-duplicates (ours)"] = votes.assign(sure=votes["why"].str.startswith(SURE))
    return found


def judge(listed: pd.DataFrame, wrong: set[str]) -> dict[str, float]:
    """Return what share of the rows is wrong, and what share of the wrong they are: first, all, sure."""
    parts, scores = {f"first {FIRST}": listed[:FIRST], "all": listed, "sure": listed[listed["sure"]]}, {}
    for name, part in parts.items():
        hits = part["file"].isin(wrong).sum()
        scores |= {f"{name}: rows": len(part), f"{name}: precision": hits / max(len(part), 1)}
        scores[f"{name}: recall"] = hits / len(wrong)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.replace("%", "%%"))
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--seeds", type=int, default=6)
    options, flags = parser.parse_known_args()
    temporary = tempfile.TemporaryDirectory()
    work = make_work([*flags, "--output_dir", temporary.name])
    images, shape, tokens = read_images(work)
    scenes = find_scenes(images, shape, work.report / "near_duplicates.csv")
    names, files = np.array(images.features["label"].names, dtype=object), images["file"][:]
    true, groups = np.array(images["label"]), scenes.groups.to_numpy()
    clean, rows = look(tokens, true, groups, 42)["5 folds"], []
    print(f"accuracy of the folds, before anything is planted: {(clean.argmax(1) == true).mean():.3f}")
    for seed in tqdm(range(options.seeds), desc="seeds"):
        for kind in ("any class", "most like it", "whole groups"):
            labels = plant(kind, true, groups, clean, seed)
            table = pd.DataFrame({"split": "", "label": names[labels]}, index=files)
            pairs = scenes.pairs.assign(
                label_a=table["label"][scenes.pairs["file_a"]].to_numpy(),
                label_b=table["label"][scenes.pairs["file_b"]].to_numpy(),
            )
            wrong = set(table.index[labels != true])
            for source, values in look(tokens, labels, groups, seed).items():
                known = pd.DataFrame(values, files, names).dropna()
                for name, listed in rankings(table, known, pairs).items():
                    where = {"planted": kind, "looked at": source, "ranking": name}
                    rows.append(where | judge(listed, wrong))
    table = pd.DataFrame(rows).groupby(["planted", "looked at", "ranking"], sort=False)
    spread = table[f"first {FIRST}: precision"].std().rename("sd")
    print(table.mean().join(spread).round(2).to_string())


if __name__ == "__main__":
    main()
