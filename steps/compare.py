"""Step 11: finished runs compared, in words, numbers and a picture."""

import copy
import os
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainingArguments

from .console import NOTEBOOK, listed, log, show, show_picture, stop
from .environment import can_write, same_value
from .figures import BLUE
from .files import atomic, probability_columns, write_json, write_table
from .lettering import explain, fonts_for, letter
from .options import SHOWN, TRAINING, Settings
from .paired import Images, compare_recalls, compare_scores, mcnemar, score_parts, swap_test
from .report import public
from .runs import Run, answers_of, find_runs, shared_images
from .scores import label_numbers
from .workspace import DRIVE, MAY_DIFFER, keep_on_drive

SEEDS = "this holds for these trained models; another seed makes another model: train each with a few seeds"
SEEDS += " before you prefer its settings"


def compare_runs(settings: Settings, training: TrainingArguments) -> None:
    """Do what --compare asks: compare the first run with each of the others, and write what is found."""
    runs = find_runs([locate(folder, settings, training) for folder in settings.compare])
    folder = choose_folder(runs, settings, training)
    for run in runs:
        run.check()
    shared, counts = shared_images(runs)
    classes = runs[0].classes
    images = Images(label_numbers(shared["label"], classes), shared["group"].to_numpy(), len(classes))
    answers = [answers_of(run, shared.index, classes) for run in runs]
    scores = [score_parts(images, one)[0] for one in answers]
    found = {"runs": [describe(*pair) for pair in zip(runs, scores, strict=True)]}
    found |= {"settings": differing_settings(runs)} | counts | {"comparisons": []}
    for place in range(1, len(runs)):
        pair = images, answers[0], answers[place]
        recalls = compare_recalls(*pair)
        one = {"first": runs[0].name, "other": runs[place].name}
        one |= {"differences": compare_scores(*pair)}
        one |= {"recalls": {classes[label]: recall for label, recall in recalls.items()}}
        one |= {"mcnemar": mcnemar(*pair), "groups": {"p": swap_test(*pair)}}
        found["comparisons"].append(one | {"verdict": verdict(one, counts)})
    found["notes"] = notes(found)
    write(found, differing_images(runs, shared), folder)
    tell(found, folder)


def locate(folder: str, settings: Settings, training: TrainingArguments) -> str:
    """Return the folder of a run: as given or, on Colab, of this name on Drive."""
    if os.path.isdir(folder):
        return folder
    moved = copy.copy(training)
    moved.output_dir = folder
    keep_on_drive(settings, moved, DRIVE)
    return moved.output_dir


def choose_folder(runs: list[Run], settings: Settings, training: TrainingArguments) -> Path:
    """Return the folder to write into: as given, else one named after the runs. Raises SystemExit."""
    if training.output_dir == TRAINING["output_dir"][0]:  # none was given
        names = "-".join(run.name.replace("/", "-") for run in runs)
        training.output_dir = os.fsencode(f"comparison-{names}")[:200].decode(errors="ignore")
    keep_on_drive(settings, training, DRIVE)
    folder, files = Path(training.output_dir), ("settings.json", "model.safetensors", "metrics.json")
    if any(os.path.exists(folder / name) for name in files):  # the last is in a run's report folder
        stop(f"--output_dir {folder} holds a run", "choose another: it is for the comparison")
    if not can_write(folder):
        stop(f"cannot write into {folder}", "choose another --output_dir")
    return folder


def describe(run: Run, scores: pd.Series) -> dict[str, Any]:
    """Return how a run was made, and its scores on the shared images."""
    return {
        "name": run.name,
        "made": run.results["made"],
        "recipe": run.record["settings"]["recipe"],
        "model": public(run.record["settings"]["model_name_or_path"]),
        "seed": run.record["training"]["seed"],
        "train_seconds": run.results["speed"]["train_seconds"],
        "scores": scores.to_dict(),
    }


def differing_settings(runs: list[Run]) -> dict[str, list]:
    """Return {setting: its value in each run}, for settings that decide the result and are not the same."""
    found = {}
    for part in ("settings", "training", "derived"):
        records = [run.record.get(part, {}) for run in runs]
        for key in sorted(set(records[0]).intersection(*records[1:]) - set(MAY_DIFFER)):
            values = [record[key] for record in records]
            if not all(same_value(values[0], value) for value in values):
                found[key] = [public(value) for value in values]
    return found


def verdict(comparison: dict, counts: dict) -> str:
    """Return in one sentence which of two runs is better, or that this cannot be told."""
    first, other = comparison["first"], comparison["other"]
    value, low, high = comparison["differences"]["macro_f1"].values()
    if low <= 0 <= high:
        told = "no difference in macro F1 can be told from {images:,} images in {groups:,} groups"
        ends = f"{value:+.3f} (95 % interval {low:+.3f} to {high:+.3f})"
        return f"{told.format(**counts)}: {other} minus {first} is {ends}"
    better, ends = (other, (low, high)) if value > 0 else (first, (-high, -low))
    ends = "95 % interval {:.3f} to {:.3f}".format(*ends)
    return f"{better} is better by {abs(value):.3f} in macro F1 ({ends})"


def notes(found: dict) -> list[str]:
    """Return what a reader must know about the numbers, as sentences."""
    images, groups, several = found["images"], found["groups"], len(found["comparisons"])
    alone = f"McNemar's test takes {images:,} images for independent, but they are of {groups:,} groups"
    other = f"{found['other_label']:,} test images have another label in another run and are left out"
    absent = f"{found['not_in_all']:,} test images were not tested by all runs and are left out"
    unseen = f"no score counts {listed(found['untested_classes'])}: the shared images hold none of it"
    rows = [
        (True, SEEDS),
        (groups < images, f"{alone} (patients, scenes): believe the interval and the test over groups"),
        (groups == 1, "all images are of one group: nothing can be told of others"),
        (several > 1, f"each of {several} comparisons errs once in 20 times: some may differ by chance"),
        (not found["same_data"], "the runs recorded different data: images are matched by name and label"),
        (found["untested_classes"], unseen),
        (found["other_label"], other),
        (found["not_in_all"], absent),
    ]
    near = "{:,} images are in groups of which {} has learned other images: its score is optimistic"
    rows += [(count, near.format(count, name)) for name, count in found["near_learned"].items()]
    return [text for holds, text in rows if holds]


def differing_images(runs: list[Run], shared: pd.DataFrame) -> pd.DataFrame:
    """Return the shared images to which the runs answer differently: file, label, group, and each answer.

    The columns of the run fast are prediction_fast and probability_fast, that of its prediction.
    """
    table = shared.copy()
    for run in runs:
        tested = run.tested.loc[shared.index]
        table[f"prediction_{run.name}"] = tested["prediction"]
        table[f"probability_{run.name}"] = tested[probability_columns(run.classes)].max(axis=1)
    answers = table[[f"prediction_{run.name}" for run in runs]]
    return table[answers.nunique(axis=1) > 1]


def write(found: dict, images: pd.DataFrame, folder: Path) -> None:
    """Write differences.csv, comparison.png and, last, comparison.json; each is whole or not there."""
    write_table(folder / "differences.csv", images)
    names = [name for one in found["comparisons"] for name in (one["first"], one["other"], *one["recalls"])]
    style = {"text.parse_math": False, "font.family": fonts_for(names)}
    with atomic(folder / "comparison.png") as part, matplotlib.rc_context(style):
        draw_comparisons(found["comparisons"]).savefig(part, dpi=150)
    write_json(folder / "comparison.json", found)
    if NOTEBOOK:
        show_picture((folder / "comparison.png").read_bytes())


def tell(found: dict, folder: Path) -> None:
    """Show scores and differences, and say in words what they mean."""
    columns = {run["name"]: run["scores"] | {"train_seconds": run["train_seconds"]} for run in found["runs"]}
    show(pd.DataFrame(columns).astype(float).round(3))
    for key, values in found["settings"].items():
        log.info("%s: %s", key, ", ".join(map(str, values)))
    for one in found["comparisons"]:
        title = f"{one['other']} minus {one['first']}"
        show(pd.DataFrame(one["differences"]).T.round(3).rename_axis(title))
        counts = one["mcnemar"]
        text = "only %s is right: %s images; only %s: %s; McNemar's test p = %.3g, test over groups p = %.3g"
        pair = one["first"], counts["only_first_right"], one["other"], counts["only_other_right"]
        log.info(text, *pair, counts["p"], one["groups"]["p"])
    for one in found["comparisons"]:
        log.info("%s", one["verdict"])
    for line in found["notes"]:
        log.info("note: %s", line)
    log.info("numbers, picture and the images that differ: %s", folder)


def draw_comparisons(comparisons: list[dict]) -> Figure:
    """Draw a row for each comparison: differences of the scores, and of the classes' recalls."""
    names = [name for one in comparisons for name in most_different(one["recalls"])]
    height = max(2.6, 0.26 * len(names) / len(comparisons))
    figure = Figure(figsize=(10, (1.6 + height) * len(comparisons)), layout="constrained")
    shown = letter([*comparisons[0]["recalls"]])
    rows = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for row, one in zip(rows, comparisons, strict=True):
        below = height - 3.6  # inches without use, under the scores
        mosaic = [["scores", "recalls"], ["loss", "recalls"], [".", "recalls"]][: 3 if below > 0 else 2]
        ratios = [2.2, 0.4, below][: len(mosaic)]
        draw_comparison(row.subplot_mosaic(mosaic, height_ratios=ratios), one, shown)
        title = (
            f"{one['other']} minus {one['first']}, 95 % intervals",
            f"right of the line {one['other']} is better",
        )
        row.suptitle("\n".join(line for text in title for line in textwrap.wrap(text, 110)), fontsize=10)
    explain(figure, names, shown)
    return figure


def most_different(recalls: dict[str, dict]) -> list[str]:
    """Return the classes, in their order; of more than SHOWN, those whose recalls differ most."""
    sizes = np.array([-abs(recall["value"]) for recall in recalls.values()])
    return [[*recalls][place] for place in np.sort(sizes.argsort(kind="stable")[:SHOWN])]


def draw_comparison(axes: dict[str, Axes], one: dict, shown: dict[str, str]) -> None:
    """Draw one comparison. Log loss has an axis of its own, turned so that better is to the right."""
    scores = pd.DataFrame(one["differences"]).T
    loss = -scores.loc[["log_loss"], ["value", "high", "low"]].set_axis(["value", "low", "high"], axis=1)
    words = {name: name.replace("_", " ").replace("f1", "F1") for name in scores.index}
    words |= {"mcc": "MCC", "macro_auroc": "macro AUROC"}
    draw_differences(axes["scores"], scores.drop("log_loss").rename(words), "difference in score")
    draw_differences(axes["loss"], loss.rename(words), "log loss is less by")
    names, count = most_different(one["recalls"]), len(one["recalls"])
    recalls = pd.DataFrame({name: one["recalls"][name] for name in names}).T
    recalls = recalls.astype({"n": int, "groups": int})
    recalls.index = [f"{shown[row.Index]} ({row.n}, {row.groups})" for row in recalls.itertuples()]
    only = f"\nthe {SHOWN} of {count:,} that differ most" if count > SHOWN else ""
    draw_differences(axes["recalls"], recalls, f"difference in recall\nin brackets: images, groups{only}")


def draw_differences(axes: Axes, table: pd.DataFrame, label: str) -> None:
    """Draw rows of value, low and high around zero; faint where the interval holds zero."""
    table = table[::-1]
    for place, (value, low, high) in enumerate(table[["value", "low", "high"]].to_numpy()):
        sure = 1.0 if low > 0 or high < 0 else 0.45
        reach = np.clip([[value - low], [high - value]], 0, None)  # rounding may pass an end
        axes.errorbar(value, place, xerr=reach, fmt="o", color=BLUE, alpha=sure, capsize=3, markersize=5)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(table)), table.index)
    axes.set(ylim=(-0.6, len(table) - 0.4), xlabel=label)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", alpha=0.3)
