"""Step 9: wrong labels are ranked first, for a reason that can be checked."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from steps.duplicates import Scenes
from steps.files import probability_columns, read_table, write_table
from steps.label_issues import find_label_issues, weigh

PAIR = ["file_a", "file_b", "distance", "label_a", "label_b"]
COLUMNS = ["file", "split", "label", "proposed", "p_label", "p_proposed", "why"]


def predicted(labels, names, right=0.9):
    """Probabilities (n, classes): `right` for the class at each of `labels`, the rest shared alike."""
    table = np.full((len(names), len(labels)), (1 - right) / (len(names) - 1)).T
    table[np.arange(len(labels)), labels] = right
    return table


class Run:
    """A run's report with images 0.jpg, 1.jpg and so on, and what `find_label_issues` says of them.

    Each of `rows` has a split, a label and its probabilities, None where the model has learned the image.
    `twins` are pairs of row numbers.
    """

    def __init__(self, folder, names, rows, twins=()):
        self.work, self.names = SimpleNamespace(report=Path(folder)), names
        self.files, label = [f"{row}.jpg" for row in range(len(rows))], [row[1] for row in rows]
        parts = {"file": self.files, "label": label, "split": [row[0] for row in rows]}
        self.images = write_table(self.work.report / "split.csv", pd.DataFrame(parts))
        pairs = [
            (self.files[a], self.files[b], 0.001 * n, label[a], label[b]) for n, (a, b) in enumerate(twins)
        ]
        self.scenes = Scenes(pd.DataFrame(pairs, columns=PAIR), None)
        self.predictions = self.table(
            {row: values[2] for row, values in enumerate(rows) if values[2] is not None}
        )

    def table(self, probabilities):
        """A table of predictions, of {row: its probabilities}."""
        rows, values = [*probabilities], np.array([*probabilities.values()]).reshape(-1, len(self.names))
        table = pd.DataFrame(values, columns=probability_columns(self.names))
        return self.images.iloc[rows].reset_index(drop=True).join(table)

    def find(self):
        """Return what goes into metrics.json, and the table."""
        found = find_label_issues(self.predictions, self.scenes, self.work)
        return found, read_table(self.work.report / "label_issues.csv", COLUMNS)


def test_wrong_labels_are_ranked_first(tmp_path):
    names, rng = ["001", "NA", "polyps"], np.random.default_rng(0)
    true = np.arange(90) % 3
    labels, wrong = true.copy(), [4, 30, 41, 77]
    labels[wrong] = (true[wrong] + 1) % 3
    probabilities = 0.8 * predicted(true, names) + 0.2 * rng.dirichlet(np.ones(3), 90)
    probabilities[wrong] = predicted(true[wrong], names, np.array([0.93, 0.94, 0.95, 0.96]))
    rows = [("test", names[label], row) for label, row in zip(labels, probabilities, strict=True)]
    found, table = Run(tmp_path, names, rows).find()
    assert found == {"images": 90, "listed": 4, "confident": 4, "from": "validation and test"}
    assert list(table.columns) == COLUMNS and set(table["file"]) == {f"{row}.jpg" for row in wrong}
    for row in table.itertuples():
        place = int(row.file.removesuffix(".jpg"))
        assert (row.label, row.proposed) == (names[labels[place]], names[true[place]])
        assert row.p_label == pytest.approx(probabilities[place, labels[place]], abs=1e-6)
        assert row.p_proposed == pytest.approx(probabilities[place, true[place]], abs=1e-6)
        assert row.why == "confident learning" and row.split == "test"
    assert table["p_label"].is_monotonic_increasing


def test_the_model_and_each_near_duplicate_have_one_vote(tmp_path):
    """Where the model has learned an image, its own label stands in for the model."""
    rows = [("test", "a", [0.2, 0.7, 0.1]), ("test", "b", [0.0, 1.0, 0.0]), ("test", "a", [1.0, 0.0, 0.0])]
    rows += [("train", "c", None), ("train", "b", None), ("train", "b", None), ("train", "a", None)]
    run = Run(tmp_path, ["a", "b", "c"], rows, [(1, 0), (0, 2), (3, 4), (5, 3)])
    known = run.predictions.set_index("file")[["p_a", "p_b", "p_c"]].set_axis(["a", "b", "c"], axis=1)
    votes = weigh(run.images.set_index("file"), known, run.scenes.pairs)
    expected = [[1.2, 1.7, 0.1], [1, 1, 0], [2, 0, 0], [0, 2, 1], [0, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert votes == pytest.approx(expected / np.sum(expected, axis=1, keepdims=True))
    found, table = run.find()
    assert found["images"] == 6  # the model has learned 6.jpg, and nothing contradicts its label
    assert table["file"].tolist()[:2] == ["3.jpg", "0.jpg"] and table["split"].tolist()[:2] == [
        "train",
        "test",
    ]
    assert table["p_label"].tolist() == [0.333333, 0.4, 0.5, 0.5, 0.5]  # the last are ties
    assert table["why"][0].endswith("near-duplicate of 4.jpg, labelled b")
    assert table["why"][1].endswith("near-duplicate of 1.jpg, labelled b")


def test_confident_learning_asks_for_more_than_the_highest_probability(tmp_path):
    """As in Northcutt et al. 2021: 0.6 is more than 0.4, but images labelled b have 0.8 on average."""
    rows = [("test", "a", [0.9, 0.1]), ("test", "a", [0.4, 0.6]), ("test", "a", [0.15, 0.85])]
    rows += [("test", "b", [0.2, 0.8])] * 3
    found, table = Run(tmp_path, ["a", "b"], rows).find()
    assert table[["file", "why"]].to_numpy().tolist() == [
        ["2.jpg", "confident learning"],
        ["1.jpg", "prediction"],
    ]
    assert found["listed"] == 2 and found["confident"] == 1


THOUSAND = [f"class {number}" for number in range(1000)]
CASES = {  # classes, rows, near-duplicates, the files that are listed
    "no label in doubt": (["a", "b"], [("test", "a", [0.9, 0.1]), ("test", "b", [0.1, 0.9])] * 5, [], []),
    "all alike": (["a", "b"], [("test", "a", [0.5, 0.5]), ("test", "b", [0.5, 0.5])] * 5, [], []),
    "one image": (["a", "b"], [("test", "a", [0.1, 0.9])], [], ["0.jpg"]),
    "a class of two images": (
        ["a", "b"],
        [("test", "a", [0.9, 0.1])] * 9 + [("test", "b", [0.8, 0.2]), ("test", "b", [0.2, 0.8])],
        [],
        ["9.jpg"],
    ),
    "a class without test images": (
        ["a", "b", "c"],
        [("test", "a", [0.9, 0, 0.1])] * 9 + [("test", "c", [0.8, 0, 0.2]), ("train", "b", None)],
        [],
        ["9.jpg"],
    ),
    "two learned images that contradict each other": (
        ["a", "b"],
        [("test", "a", [0.9, 0.1]), ("train", "a", None), ("train", "b", None)],
        [(1, 2)],
        ["1.jpg", "2.jpg"],
    ),
    "the model decides between near-duplicates": (
        ["a", "b"],
        [("test", "a", [0.9, 0.1]), ("test", "b", [0.9, 0.1]), ("test", "a", [0.9, 0.1])],
        [(0, 1), (1, 2), (0, 2)],
        ["1.jpg"],
    ),
    "a thousand classes": (
        THOUSAND,
        [("test", THOUSAND[row], predicted([max(row, 1)], THOUSAND)[0]) for row in range(1000)],
        [],
        ["0.jpg"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_images_are_listed(tmp_path, case):
    names, rows, twins, listed = CASES[case]
    run = Run(tmp_path, names, rows, twins)
    found, table = run.find()
    assert table["file"].tolist() == listed and found["listed"] == len(listed)


def test_images_that_validate_and_test_are_counted_once_and_learned_ones_not(tmp_path):
    run = Run(tmp_path, ["a", "b"], [("test", "a", [0.1, 0.9]), ("test", "b", [0.2, 0.8])])
    test = run.predictions
    run.predictions = pd.concat([test.assign(split=name) for name in ("validation", "test", "train")])
    found, table = run.find()
    assert (
        found["images"] == 2 and table["file"].tolist() == ["0.jpg"] and table["split"].tolist() == ["test"]
    )


def test_the_table_is_made_anew_when_there_are_folds(tmp_path):
    """And its picture with it; run again, both stay as they are."""
    rows = [("test", "a", [0.1, 0.9]), ("test", "b", [0.2, 0.8]), ("train", "a", None), ("train", "b", None)]
    run, picture = Run(tmp_path, ["a", "b"], rows), tmp_path / "label_issues.png"
    before, _ = run.find()
    picture.write_bytes(b"drawn")
    content = (tmp_path / "label_issues.csv").read_bytes()
    assert run.find()[0] == before and picture.exists()
    assert (tmp_path / "label_issues.csv").read_bytes() == content
    folds = run.table({0: [0.9, 0.1], 1: [0.2, 0.8], 2: [0.8, 0.2], 3: [0.9, 0.1]}).assign(split="fold 1")
    write_table(tmp_path / "cross_validation.csv", folds)
    found, table = run.find()
    assert (found["images"], found["from"]) == (4, "cross-validation") and not picture.exists()
    assert table[["file", "split"]].to_numpy().tolist() == [["3.jpg", "train"]]
