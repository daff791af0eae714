"""Step 5: what an earlier model has learned: a run that goes on from it must not be tested on that."""

from pathlib import Path

import pandas as pd

from .architectures import finder
from .console import log, stop
from .files import nfc, read_json, read_table, write_json
from .workspace import Workspace


def find_earlier(work: Workspace) -> pd.Series | None:
    """Return the split, by file, of the model of ours that this run starts from; None for other checkpoints.

    Raises SystemExit for `--cross_validate`: its folds would be tested on what the model has learned.
    """
    name = work.settings.model_name_or_path
    config = fetch(name, "config.json")
    if not (config and "calibration_temperature" in read_json(config)):
        return None
    if work.settings.cross_validate:
        problem = f"--cross_validate would test {name} on images that it may have learned"
        stop(problem, "give the checkpoint that it was made from")
    if not (found := fetch(name, "report/split.csv")):
        log.warning("warning: %s has no report/split.csv: it may have learned some of the test images", name)
        return pd.Series(dtype=object)
    remedy = "restore it: without it the test may hold images that the model has learned"
    return read_table(found, ["file", "split"], remedy).set_index("file")["split"]


def fetch(name: str, file: str) -> Path | None:
    """Return the path of a file of a model, in its folder or from the Hub; None if it cannot be had."""
    kinds = "connection_errors", "gated_repo"  # there is no public option
    found = finder(name)(file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
    return Path(found) if found else None


def record_earlier(earlier: pd.Series | None, split: pd.Series, work: Workspace) -> None:
    """Note in settings.json how a split, by file, agrees with that of an earlier model.

    kept: images in both; new: in this one only; absent: learned by the model, but not here; learned: test
    images that the model has learned. The last two draw a warning.
    """
    path = work.output_dir / "settings.json"
    record = read_json(path)
    before = record.pop("earlier", None)
    if earlier is not None:
        earlier, split = (part.rename(index=nfc) for part in (earlier, split))
        learned, name = earlier.index[earlier != "test"], work.settings.model_name_or_path
        kept, tested = split.index.isin(earlier.index), split.index[split == "test"]
        counts = {"kept": kept, "new": ~kept, "absent": ~learned.isin(split.index)}
        counts["learned"] = tested.isin(learned)
        record["earlier"] = counts = {key: int(found.sum()) for key, found in counts.items()}
        if counts["absent"]:
            text = "warning: %s images that %s has learned are not here by these names: "
            log.warning(text + "the test may hold them", counts["absent"], name)
        if counts["learned"]:
            text = "warning: %s test images are among those that %s has learned: the score will be optimistic"
            log.warning(text, counts["learned"], name)
    if before != record.get("earlier"):
        write_json(path, record)
