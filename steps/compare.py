"""Step 11: finished runs compared, in words, numbers and a picture."""

import copy
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from transformers import TrainingArguments

from .console import log, show, stop
from .environment import can_write, same_value
from .figures import BLUE, MOST
from .files import atomic, probability_columns, write_json, write_table
from .lettering import explain, fonts_for, letter
from .options import TRAINING, Settings
from .paired import Images, compare_recalls, compare_scores, mcnemar, score_without, swap_test
from .report import public
from .runs import Run, answers_of, find_runs, number, share
from .workspace import DRIVE, MAY_DIFFER, keep_on_drive


def compare_runs(settings: Settings, training: TrainingArguments) -> None:
    """Do what --compare asks: compare the first run with each of the others, and write what is found."""
    runs = find_runs([locate(folder, settings, training) for folder in settings.compare])
    folder = choose_folder(runs, settings, training)
    for run in runs:
        run.check()
    shared, counts = share(runs)
    classes = runs[0].classes
    images = Images(number(shared["label"], classes), shared["group"].to_numpy(), len(classes))
    answers = [answers_of(run, shared.index, classes) for run in runs]
    scores = [score_without(images, one) for one in answers]
    found = {"runs": [describe(*pair) for pair in zip(runs, scores, strict=True)]}
    found |= {"settings": differing_settings(runs)} | counts | {"comparisons": []}
    for place in range(1, len(runs)):
        pair = images, answers[0], answers[place]
        recalls = compare_recalls(*pair)
        one = {"first": runs[0].name, "other": runs[place].name}
        one |= {"differences": compare_scores(images, scores[0], scores[place])}
        one |= {"recalls": {classes[label]: recall for label, recall in recalls.items()}}
        one |= {"mcnemar": mcnemar(*pair), "groups": {"p": swap_test(*pair)}}
        found["comparisons"].append(one | {"verdict": verdict(one, counts)})
    found["notes"] = notes(found)
    write(found, differing_images(runs, shared), folder)
    tell(found, folder)


def locate(folder: str, settings: Settings, training: TrainingArguments) -> str:
    """Return the folder of a run: as given or, on Colab, of this name on Drive."""
    if Path(folder).is_dir():
        return folder
    moved = copy.copy(training)
    moved.output_dir = folder
    keep_on_drive(settings, moved, DRIVE)
    return moved.output_dir


def choose_folder(runs: list[Run], settings: Settings, training: TrainingArguments) -> Path:
    """Return the folder to write into: as given, else one named after the runs. Raises SystemExit."""
    if training.output_dir == TRAINING["output_dir"][0]:  # none was given
        names = "-".join(run.name.replace("/", "-") for run in runs)
        training.output_dir = f"comparison-{names}"[:200]
    keep_on_drive(settings, training, DRIVE)
    folder = Path(training.output_dir)
    if any((folder / name).exists() for name in ("settings.json", "model.safetensors")):
        stop(f"--output_dir {folder} holds a run", "choose another: it is for the comparison")
    if not can_write(folder):
        stop(f"cannot write into {folder}", "choose another --output_dir")
    return folder


def describe(run: Run, scores: pd.DataFrame) -> dict[str, Any]:
    """Return how a run was made, and its scores on the shared images."""
    return {
        "name": run.name,
        "made": run.results["made"],
        "recipe": run.record["settings"]["recipe"],
        "model": public(run.record["settings"]["model_name_or_path"]),
        "seed": run.record["training"]["seed"],
        "train_seconds": run.results["speed"]["train_seconds"],
        "scores": scores.iloc[0].dropna().to_dict(),
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
    return (
        f"{better} is better by {abs(value):.3f} in macro F1 (95 % interval {ends[0]:.3f} to {ends[1]:.3f})"
    )


def notes(found: dict) -> list[str]:
    """Return what a reader must know about the numbers, as sentences."""
    images, groups, several = found["images"], found["groups"], len(found["comparisons"])
    lines = ["this holds for these trained models: another seed makes another model, so train each with a few"
             " seeds before you prefer its settings"]  # fmt: skip
    if groups < images:
        lines.append(f"McNemar's test takes {images:,} images for independent, but they are of {groups:,}"
                     " groups (patients, scenes): believe the interval and the test over groups")  # fmt: skip
    if groups == 1:
        lines.append("all images are of one group: nothing can be told of others")
    if several > 1:
        lines.append(
            f"of {several} comparisons, some may seem to differ by chance: each errs once in 20 times"
        )
    if not found["same_data"]:
        lines.append("the runs' data are not recorded as the same: images are matched by name and label")
    for count, text in (
        (found["other_label"], "have another label in another run and are left out"),
        (found["not_in_all"], "were not tested by all runs and are left out"),
    ):
        lines += [f"{count:,} test images {text}"] if count else []
    for name, count in found["near_learned"].items():
        if count:
            what = f"{count:,} of the images are of groups that {name} has learned other images of"
            lines.append(f"{what}: its score is optimistic")
    return lines


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


def tell(found: dict, folder: Path) -> None:
    """Show scores and differences, and say in words what they mean."""
    show(pd.DataFrame({run["name"]: run["scores"] for run in found["runs"]}).round(3))
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
    classes = max(min(len(one["recalls"]), MOST) for one in comparisons)
    height = 1.6 + max(2.6, 0.26 * classes)
    figure = Figure(figsize=(10, height * len(comparisons)), layout="constrained")
    shown = letter([*comparisons[0]["recalls"]])
    rows = figure.subfigures(len(comparisons), 1, squeeze=False)[:, 0]
    for row, one in zip(rows, comparisons, strict=True):
        draw_comparison(row, one, shown)
    explain(figure, shown, shown)
    return figure


def draw_comparison(figure: SubFigure, one: dict, shown: dict[str, str]) -> None:
    """Draw one comparison. Log loss has an axis of its own, turned so that better is to the right."""
    title = f"{one['other']} minus {one['first']}, 95 % intervals; right of the line {one['other']} is better"
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize=10)
    axes = figure.subplot_mosaic([["scores", "recalls"], ["loss", "recalls"]], height_ratios=[5, 1])
    scores = pd.DataFrame(one["differences"]).T
    loss = -scores.loc[["log_loss"], ["value", "high", "low"]].set_axis(["value", "low", "high"], axis=1)
    words = {name: name.replace("_", " ").replace("f1", "F1") for name in scores.index}
    words |= {"mcc": "MCC", "macro_auroc": "macro AUROC"}
    draw_differences(axes["scores"], scores.drop("log_loss").rename(words), "difference in score")
    draw_differences(axes["loss"], loss.rename(words), "log loss is less by")
    recalls = pd.DataFrame(one["recalls"]).T
    largest = np.sort((-recalls["value"].abs()).to_numpy().argsort(kind="stable")[:MOST])
    only = f"; {MOST} of {len(recalls):,} classes, that differ most" if len(recalls) > MOST else ""
    recalls = recalls.iloc[largest].astype({"n": int, "groups": int})
    recalls.index = [f"{shown[row.Index]} ({row.n}, {row.groups})" for row in recalls.itertuples()]
    draw_differences(axes["recalls"], recalls, f"difference in recall; in brackets: images, groups{only}")


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
    axes.grid(axis="x", alpha=0.3)
