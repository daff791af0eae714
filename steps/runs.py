"""Step 11: finished runs, and the test images that all of them share."""

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .console import listed, stop
from .environment import same_value
from .files import nfc, printable, probability_columns, read_json, read_table
from .paired import Answers
from .scores import label_numbers

SAME_SPLIT = "give the report/split.csv of one as --metadata of the other, so that they have the same split"
UNFIT = "run its command again; if an earlier version made it, train it anew in another --output_dir"


@dataclass
class Run:
    """A finished run: its name in the comparison, its folder, and what it recorded there."""

    name: str
    folder: Path

    @cached_property
    def record(self) -> dict:
        return read_json(self.folder / "settings.json", ["settings", "training", "data"], UNFIT)

    @cached_property
    def results(self) -> dict:
        return read_json(self.report / "metrics.json", ["test", "per_class", "made", "speed"], UNFIT)

    @cached_property
    def split(self) -> pd.DataFrame:
        """Return label, split and group of every image, by its name."""
        return by_name(read_table(self.report / "split.csv", ["file", "label", "split", "group"], UNFIT))

    @cached_property
    def predictions(self) -> pd.DataFrame:
        return read_table(self.report / "predictions.csv", ["file", "split", "label", *self.columns], UNFIT)

    @cached_property
    def tested(self) -> pd.DataFrame:
        """Return file, label, prediction and probabilities of the test images, by name."""
        return by_name(self.predictions[self.predictions["split"] == "test"])

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def classes(self) -> list[str]:
        return [*self.results["per_class"]]

    @property
    def columns(self) -> list[str]:
        return ["prediction", *probability_columns(self.classes)]

    def check(self) -> None:
        """Raise SystemExit if the run is unfinished, damaged, or chose its epoch on its test images."""
        for file in ("settings.json", "report/split.csv", "report/predictions.csv", "report/metrics.json"):
            if not (self.folder / file).exists():
                stop(f"{self.folder} holds no finished run: there is no {file}", "run its command to its end")
        table = self.tested
        known = table[["label", "prediction"]].isin(self.classes).all(axis=None)
        chances, unique = table[self.columns[1:]], table.index.is_unique
        numbers = all(kind.kind in "if" for kind in chances.dtypes)  # a column may be 0 or 1 throughout
        numbers = numbers and ((chances >= 0) & (chances <= 1)).all(axis=None)
        if not (len(table) and known and numbers and unique and table.index.isin(self.split.index).all()):
            stop(f"{self.report / 'predictions.csv'} does not fit the files beside it", UNFIT)
        chosen = self.predictions.loc[self.predictions["split"] == "validation", "file"]
        if chosen.isin(table["file"]).any() and self.results["made"] != "evaluated":
            problem = f"{self.name} chose its epoch or temperature on its own test images"
            stop(problem, "train it with a --validation_size above 0")
        if learned := self.record.get("earlier", {}).get("learned"):
            problem = f"{self.name} goes on from a model that learned from {learned:,} of its test images"
            stop(problem, "compare runs whose test images no model has seen")


def by_name(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with the names of its files as index: in one Unicode form, unless two are then alike."""
    names = table["file"].map(nfc)
    return table.set_axis(names.where(~names.duplicated(keep=False), table["file"]))


def find_runs(folders: list[str]) -> list[Run]:
    """Return the runs in these folders, named by the ends of the paths, as long as it takes to differ."""
    if len(folders) < 2:
        stop("--compare needs two runs or more", "give their output folders: --compare RUN_A RUN_B")
    for folder in folders:
        if not os.path.isdir(folder):
            stop(f"--compare {folder} is not a folder", "give the --output_dir of a finished run")
    for one, other in permutations(folders, 2):
        if same_value(one, other):
            stop(f"--compare names one run twice: {one}, {other}", "give another run")
    parts, length = [Path(folder).resolve().parts for folder in folders], 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    names = [printable("/".join(path[-length:])).strip("/") for path in parts]
    return [Run(name, Path(folder)) for name, folder in zip(names, folders, strict=True)]


def shared_images(runs: list[Run]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return file, label and group, int from 0, of the test images of all runs, by name, and counts.

    Raises SystemExit if there is none, a run has learned from one of another's, or their classes differ.
    """
    for run, other in permutations(runs, 2):
        if alone := set(run.classes) - set(other.classes):
            problem = f"{run.name} knows classes that {other.name} does not: {listed(sorted(alone), 3)}"
            stop(problem, "compare runs with the same classes")
        learned = run.split.index[run.split["split"] != "test"]
        if len(both := learned.intersection(other.tested.index)):
            problem = f"{run.name} trained or validated on {len(both):,} of the test images of {other.name}"
            stop(f"{problem}, such as {both[0]}", SAME_SPLIT)
    first = runs[0].tested
    present = np.all([first.index.isin(run.tested.index) for run in runs], axis=0)
    labels = [run.tested["label"].reindex(first.index) == first["label"] for run in runs]
    same = present & np.all(labels, axis=0)
    groups, shared = join_groups(runs), first.loc[same, ["file", "label"]]
    if not len(shared):
        names = " and ".join(run.name for run in runs)
        stop(f"{names} share no test image of the same name and label", SAME_SPLIT)
    shared["group"] = np.unique(groups[shared.index], return_inverse=True)[1]
    everything = set().union(*(run.tested.index for run in runs))
    untested = [name for name in runs[0].classes if name not in set(shared["label"])]
    counts = {"untested_classes": untested, "images": len(shared), "groups": int(shared["group"].max() + 1)}
    counts |= {"other_label": int((present & ~same).sum())}
    counts |= {"not_in_all": len(everything) - int(present.sum())}
    learned = {run.name: groups[run.split.index[run.split["split"] != "test"]] for run in runs}
    near = {name: int(groups[shared.index].isin(those).sum()) for name, those in learned.items()}
    return shared, counts | {"near_learned": near, "same_data": same_data(runs)}


def join_groups(runs: list[Run]) -> pd.Series:
    """Return the group, int, of every image by name: what the groups of any run connect."""
    tables = [run.split["group"].astype(str).radd(f"{place} ") for place, run in enumerate(runs)]
    links = pd.concat(tables)
    image, names = pd.factorize(links.index)
    group, of_runs = pd.factorize(links)
    ends, n = (image, len(names) + group), len(names) + len(of_runs)
    graph = coo_array((np.ones(len(image)), ends), shape=(n, n))
    return pd.Series(connected_components(graph, directed=False)[1][: len(names)], names)


def same_data(runs: list[Run]) -> bool:
    """Say whether all runs recorded the same archive or the same files, not only the same names."""
    records = [run.record["data"] for run in runs]
    return any(
        len({record.get(key) for record in records}) == 1 and records[0].get(key)
        for key in ("archive_sha256", "files_sha256")
    )


def answers_of(run: Run, names: pd.Index, classes: list[str]) -> Answers:
    """Return what a run answered to the images of these names."""
    table = run.tested.loc[names]
    probabilities = table[probability_columns(classes)].to_numpy(float)
    return Answers(label_numbers(table["prediction"], classes), probabilities)
