"""Step 5: which images are one scene, so that a split can keep them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse
from datasets import Dataset, DatasetDict

from .copies import NEAR, look_at, near_pairs
from .files import read_table, write_table


@dataclass
class Scenes:
    """Near-duplicate pairs, see `find_pairs`, and the group of each image: int, by file."""

    pairs: pd.DataFrame
    groups: pd.Series


def find_scenes(images: Dataset, shape: tuple[int, int, int], path: Path) -> Scenes:
    """Return the pairs and groups of `images`. The CSV file `path` has the pairs, or gets them."""
    pairs, known = find_pairs(images, shape, path), "group" in images.column_names
    return Scenes(pairs, group_images(images["file"][:], pairs, images["group"][:] if known else ()))


def find_pairs(
    images: Dataset, shape: tuple[int, int, int], path: Path, others: Dataset | None = None
) -> pd.DataFrame:
    """Return the pairs of near-duplicates, recorded in the CSV file `path`, or found there.

    Columns: file_a, file_b, distance (see `near_pairs`), label_a, label_b. Nearest first. Both are of
    `images`; with `others`, b is one of these.
    """
    columns = ["file_a", "file_b", "distance", "label_a", "label_b"]
    if path.exists():
        return read_table(path, columns)
    views, a = look_at(images, shape), labelled(images)
    theirs, b = (views, a) if others is None else (look_at(others, shape), labelled(others))
    pairs = near_pairs(views, theirs).join(a.add_suffix("_a"), on="a").join(b.add_suffix("_b"), on="b")
    return write_table(path, pairs[columns])


def labelled(images: Dataset) -> pd.DataFrame:
    """Return the file and the label, str, of each image."""
    names = np.array(images.features["label"].names, dtype=object)
    return pd.DataFrame({"file": images["file"][:], "label": names[images["label"][:]]})


def conflicting(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return those of the pairs, see `find_pairs`, that carry two different labels."""
    return pairs[pairs["label_a"] != pairs["label_b"]]


def group_images(files: list[str], pairs: pd.DataFrame, patients: Sequence[str] = ()) -> pd.Series:
    """Return the group, int, of each of `files` (the index): what a chain of near-duplicates connects.

    The images of a patient belong together, too; `patients` has one of each file, "" where not known. Chains
    can run away, in large folders or where all pictures are alike: a group that is larger than 50 images, a
    tenth of all images and twice the largest patient is connected anew at smaller and smaller distances.
    """
    row = {file: row for row, file in enumerate(files)}
    last = {patient: number for number, patient in enumerate(patients) if patient}
    own = np.array([[number, last[patient]] for number, patient in enumerate(patients) if patient], int)
    pairs = pairs[pairs["file_a"].isin(row) & pairs["file_b"].isin(row)]
    a, b = (pairs[name].map(row).to_numpy(int) for name in ("file_a", "file_b"))
    distance, keep, large = pairs["distance"].to_numpy(), np.full(len(pairs), True), np.full(len(files), True)
    most = max(50, len(files) / 10, 2 * np.bincount(own[:, 1] if len(own) else [0]).max())
    # Patients stay whole without pairs, so that at last only equal thumbnails need to join them.
    for closer in (1, 0.75, 0.5, 0.25, 0) if len(own) else (1, 0.75, 0.5, 0.25):
        keep &= ~large[a] | (distance <= closer * NEAR)
        ends = np.vstack([np.column_stack([a, b])[keep], own.reshape(-1, 2)]).T
        links = scipy.sparse.coo_array((np.ones(ends.shape[1]), ends), shape=(len(files), len(files)))
        group = scipy.sparse.csgraph.connected_components(links, directed=False)[1]
        large = np.bincount(group)[group] > most
    return pd.Series(group, files)


def count_pairs(scenes: Scenes, splits: DatasetDict) -> dict[str, int]:
    """Return the numbers of groups and near-duplicate pairs: all, across splits, with two labels.

    Where patients are known, also of patients, of those both in the test and outside it, of images without
    one, and of scenes.
    """
    side = {file: name for name, part in splits.items() for file in part["file"][:]}
    pairs = scenes.pairs
    pairs = pairs[pairs["file_a"].isin(side) & pairs["file_b"].isin(side)]
    a, b = pairs["file_a"].map(side), pairs["file_b"].map(side)
    patients = {}
    if all("group" in part.column_names for part in splits.values()):
        known = pd.concat([pd.Series(part["group"][:], part["file"][:]) for part in splits.values()])
        known = known[~known.index.duplicated()]  # test images may validate, too
        patient = known[known != ""]
        tested = pd.Series(side)[patient.index].eq("test").groupby(patient).agg(["any", "all"])
        divided = tested["any"] & ~tested["all"]
        patients = {"patients": len(tested), "patients_across_test": int(divided.sum())}
        patients["images_without_patient"] = len(known) - len(patient)
        patients["scenes"] = group_images(list(side), pairs).nunique()
    return patients | {
        "groups": scenes.groups[list(side)].nunique(),
        "near_duplicate_pairs": len(pairs),
        "pairs_across_splits": int((a != b).sum()),
        "pairs_across_test": int(((a == "test") != (b == "test")).sum()),
        "conflicting_label_pairs": len(conflicting(pairs)),
    }
