"""Step 8: more evidence: cross-validation, and external validation on images from elsewhere."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import transformers
from datasets import DatasetDict
from transformers import Trainer

from .architectures import pixel_shape
from .console import MAIN, log, stop
from .duplicates import Scenes, find_pairs, find_scenes
from .evaluation import predict, score_split
from .files import probability_columns, read_table, remove, write_table
from .load import load_external
from .preprocess import keep_readable, prepare_pixels
from .scores import score_classes
from .split import cut_folds
from .workspace import Workspace


def cross_validate(fine_tune: Callable, splits: DatasetDict, scenes: Scenes, work: Workspace) -> dict:
    """Return {"folds": K, metric: {"mean", "sd"}}; report/cross_validation.csv has every image's prediction.

    Fold k tests, fold k + 1 chooses epoch and temperature, the others train. A finished fold keeps only its
    predictions.
    """
    class_names, folds = splits["train"].features["label"].names, work.settings.cross_validate
    tables, scores = [], []
    for fold, parts in enumerate(cut_folds(splits, scenes.groups, work), 1):
        options, folder = copy.copy(work.training), work.output_dir / f"fold-{fold}-of-{folds}"
        options.output_dir, options.resume_from_checkpoint = str(folder), None
        if (kept := folder / "predictions.csv").exists():
            table = read_table(kept, ["file", "label", *probability_columns(class_names)])
        else:
            log.info("fold %s of %s", fold, folds)
            folder.mkdir(parents=True, exist_ok=True)
            transformers.logging.set_verbosity_error()  # or a new head is reported as a mismatch
            begun = (folder / "model.safetensors").exists()  # trained, but cut off before it was scored
            trainer = fine_tune(str(folder) if begun else work.settings.model_name_or_path, parts, options)
            table = predict(trainer, parts, ["test"], kept)
        for file in folder.iterdir() if MAIN else ():
            if file != kept and not file.name.startswith(".part"):  # those are for their writers to remove
                remove(file)
        tables.append(table.assign(split=f"fold {fold}"))
        values, _ = score_split(table, pd.Series(0, table["file"]), class_names)  # no interval is wanted
        scores.append({name: value["value"] for name, value in values.items()})
    write_table(work.report / "cross_validation.csv", pd.concat(tables))
    spread = pd.DataFrame(scores).agg(["mean", "std"]).rename({"std": "sd"}).to_dict()
    for name in ("accuracy", "macro_f1"):
        log.info("%s folds: %s {mean:.3f} ± {sd:.3f}".format(**spread[name]), folds, name)
    return {"folds": folds} | spread


def evaluate_external(splits: DatasetDict, trainer: Trainer, work: Workspace) -> dict[str, Any]:
    """Return the scores on images from elsewhere; external-NAME-KEY.csv in the report has the predictions."""
    class_names, processor = splits["train"].features["label"].names, trainer.processing_class
    folder, shape = Path(work.settings.external_dir).resolve(), pixel_shape(processor)
    with work.training.main_process_first(local=False):
        images, left_out = load_external(class_names, work)
        pixels = prepare_pixels(images, folder, processor, work.cache)
    name = f"{folder.name}-{Path(pixels.cache_files[0]['filename']).stem[-6:]}"  # a key of its content
    pixels = keep_readable(pixels, left_out, work.report / f"left_out-{name}.csv")
    seen = datasets.concatenate_datasets([splits[part] for part in ("train", "validation")])
    with work.training.main_process_first(local=False):
        twins = find_pairs(pixels, shape, work.report / f"learned-{name}.csv", seen)["file_a"].unique()
    new = pixels.select(np.flatnonzero(~np.isin(pixels["file"][:], twins)))
    if not len(new):
        stop(f"{folder} has only near-duplicates of our own images", "leave --external_dir out")
    with work.training.main_process_first(local=False):
        scenes = find_scenes(new, shape, work.report / f"near_duplicates-{name}.csv")
    table = predict(trainer, DatasetDict(external=new), ["external"], work.report / f"external-{name}.csv")
    scores, ranks = score_split(table, scenes.groups, class_names)
    text = "accuracy {value:.3f}, 95 %% interval {low:.3f} to {high:.3f}".format(**scores["accuracy"])
    log.info("%s: " + text + ", n = %s, without %s near-duplicates", folder.name, len(new), len(twins))
    per_class = score_classes(table, scenes.groups, class_names, ranks)
    per_class = {name: row for name, row in per_class.items() if row["n"]}
    record = {"folder": folder.name, "images": len(new), "near_duplicates_left_out": len(twins)}
    return record | scores | {"per_class": per_class}
