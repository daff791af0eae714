"""Step 8: predictions and their scores, on our test images, on other folds, on other folders."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special
import torch
from datasets import Dataset, DatasetDict
from joblib import cpu_count
from transformers import Trainer, TrainingArguments

from .architectures import pixel_shape
from .console import listed, log, show
from .discrimination import discriminate, operating_points
from .duplicates import Scenes, count_pairs
from .files import probability_columns, read_json, read_table, remove, write_json, write_table
from .finetune import chosen_epoch, save_metrics
from .load import count_classes
from .report import public
from .scores import calibration, score, score_classes, truth_of, worst_classes
from .settings import images_per_step
from .split import SPLITS, split_rule
from .workspace import versions

FEW = 10  # groups: a class that rests on fewer is named
# Of a class, on the screen.
COLUMNS = "precision recall recall_low recall_high specificity f1 auroc average_precision n groups".split()


def predict(trainer: Trainer, splits: DatasetDict, names: list[str], path: Path) -> pd.DataFrame:
    """Return for each image of the named splits: file, split, label, prediction, a probability per class.

    The column of a class called polyps is p_polyps, so that a class called file gets none of those columns.
    Splits that the CSV file `path` holds, whole, are read from it; the others are predicted and added to it.
    """
    classes, tables = np.array(splits[names[0]].features["label"].names, dtype=object), {}
    columns = probability_columns(classes)
    if path.exists():
        found = read_table(path, ["file", "split", "label", "prediction", *columns])
        files = {name: part["file"][:] for name, part in splits.items()}
        found = found.groupby("split", sort=False)
        tables = {name: table for name, table in found if table["file"].tolist() == files.get(name)}
    missing = [name for name in names if name not in tables]
    for name in missing:
        inputs = splits[name].select_columns(["pixel_values", "label"])
        prefix = {"validation": "eval", "train": "eval_train"}.get(name, name)  # as the Trainer's own files
        outputs = trainer.predict(inputs, metric_key_prefix=prefix)
        save_metrics(trainer, prefix, outputs.metrics)
        probabilities = scipy.special.softmax(outputs.predictions.astype(float), axis=1)
        table = pd.DataFrame({"file": splits[name]["file"][:], "split": name})
        table["label"], table["prediction"] = classes[outputs.label_ids], classes[probabilities.argmax(-1)]
        tables[name] = pd.concat([table, pd.DataFrame(probabilities, columns=columns)], axis=1)
    predictions = pd.concat(tables.values(), ignore_index=True)
    return write_table(path, predictions) if missing else predictions


def summarise(predictions: pd.DataFrame, splits: DatasetDict, scenes: Scenes, trainer: Trainer) -> dict:
    """Return the content of report/metrics.json, read from there if its splits are as large."""
    output_dir = Path(trainer.args.output_dir)
    path, parts = output_dir / "report" / "metrics.json", dict(tuple(predictions.groupby("split")))
    record, class_names = read_json(output_dir / "settings.json"), splits["train"].features["label"].names
    left_out = path.with_name("left_out.csv")
    count = len(read_table(left_out, ["file", "reason"])) if left_out.exists() else 0
    results = read_json(path) | {"data": record["data"] | {"left_out": count}}
    if parts.keys() <= results.keys() and all(results["split"][name] == len(parts[name]) for name in parts):
        return results
    for picture in path.parent.glob("*.png"):
        remove(picture)
    results |= measure(parts, scenes, class_names)
    logged = set().union(*trainer.state.log_history)
    made = {"epoch": "fine-tuned", "ridge_strength": "probed"}
    results["made"] = next((made[key] for key in made if key in logged), "evaluated")
    if results["made"] == "fine-tuned":
        results["chosen_epoch"] = chosen_epoch(trainer.args, trainer.state)
    temperature = getattr(trainer.model.config, "calibration_temperature", 1.0)
    groups = scenes.groups[parts["test"]["file"]].to_numpy()
    results["calibration"] = calibration(*truth_of(parts["test"], class_names), groups, temperature)
    uncovered = {name: results["test"][name]["value"] for name in ("accuracy", "macro_f1")}
    results["shortcuts"] = {"nothing": uncovered} | cover_shortcuts(trainer, splits["test"])
    asked = record["settings"]["split_by"], record["settings"].get("split_otherwise", "near-duplicates")
    results["split"] = {"by": split_rule(splits["test"], *asked)} | splits.num_rows
    if results["split"]["by"] == "given":
        results["split"]["given"] = {name: sorted(set(part["split"][:])) for name, part in splits.items()}
    results["split"] |= count_pairs(scenes, splits)
    if "earlier" in record:  # the run goes on from a model of ours
        results["split"]["earlier"] = record["earlier"]
    results["split"]["classes"] = {name: count_classes(part) for name, part in splits.items()}
    results["split"]["test_groups"] = len(np.unique(groups))
    results.setdefault("speed", measured_speed(trainer, splits["train"]))
    recorded = record["settings"] | record["training"] | {"learning_rate": trainer.args.learning_rate}
    recorded["images_per_step"] = images_per_step(trainer.args)  # by number of images, see `for_trainer`
    results["settings"] = {name: public(value) for name, value in recorded.items()}
    results["warnings"] = warnings_of(results)
    results.setdefault("versions", versions() | {"device": describe_device(trainer.args)})
    write_json(path, results)
    return results


def measure(parts: dict[str, pd.DataFrame], scenes: Scenes, class_names: list[str]) -> dict:
    """Return the scores of each split and of the test's classes, and for two classes "operating_points".

    "most_frequent" has the accuracy of always answering the most frequent class.
    """
    tables = {name: parts[name] for name in reversed(SPLITS) if name in parts}
    scored = {name: score_split(table, scenes.groups, class_names) for name, table in tables.items()}
    results = {name: scores for name, (scores, _) in scored.items()}
    results["per_class"] = score_classes(parts["test"], scenes.groups, class_names, scored["test"][1])
    most = max(class_names, key=lambda name: results["per_class"][name]["n"])
    share = results["per_class"][most]["n"] / len(parts["test"])
    results["most_frequent"] = {"class": most, "accuracy": share}
    chosen_on, measured_on = (truth_of(parts[name], class_names) for name in ("validation", "test"))
    groups = scenes.groups[parts["test"]["file"]].to_numpy()
    points = operating_points(chosen_on, measured_on, groups, class_names)
    return results | ({"operating_points": points} if points else {})


def warnings_of(results: dict) -> list[str]:
    """Return what makes the numbers doubtful, a sentence each, from the content of metrics.json."""
    split, accuracy = results["split"], results["test"]["accuracy"]
    unit = "patient" if "patients" in split else "scene"
    by_chance = results["most_frequent"]
    sentences = []
    if split["test_groups"] < FEW:
        sentences.append(f"the test rests on {counted(split['test_groups'], unit)}: no interval is reliable")
    sentences += warnings_of_classes(results["per_class"], unit)
    if accuracy["low"] <= by_chance["accuracy"] < 1:  # 1: the test has one class
        text = "accuracy {:.3f} is not clearly above the {:.3f} of always answering {}"
        sentences.append(text.format(accuracy["value"], by_chance["accuracy"], by_chance["class"]))
    if split["pairs_across_test"]:
        pairs = counted(split["pairs_across_test"], "near-duplicate pair")
        sentences.append(f"{pairs} with one image in the test and one outside it: the scores are optimistic")
    if split.get("patients_across_test"):
        patients = counted(split["patients_across_test"], "patient")
        sentences.append(f"{patients} with images in the test and outside it: the scores are optimistic")
    return sentences


def warnings_of_classes(per_class: dict[str, dict], unit: str) -> list[str]:
    """Return which classes rest on fewer than FEW groups, called `unit`, or on none; many in one sentence."""
    tested = {name: row for name, row in per_class.items() if row["n"]}
    absent = [name for name in per_class if name not in tested]
    sentences = [f"no image in the test, so nothing is known of: {listed(absent, 3)}"] if absent else []
    few = [name for name, row in tested.items() if row["groups"] < FEW]
    few.sort(key=lambda name: (tested[name]["groups"], tested[name]["n"]))
    basis = [
        f"{counted(tested[name]['n'], 'image')} of {counted(tested[name]['groups'], unit)}" for name in few
    ]
    if len(few) > 3:
        shown = listed([f"{name} ({what})" for name, what in zip(few, basis, strict=True)], 3)
        text = f"{len(few):,} of {len(per_class):,} classes rest on fewer than {FEW} {unit}s in the test"
        return [*sentences, f"{text}: {shown}"]
    for name, what in zip(few, basis, strict=True):
        sentences.append(f"{name}: {what} {'decides' if tested[name]['n'] == 1 else 'decide'} its recall")
    return sentences


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which has an s unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def describe_device(training: TrainingArguments) -> str:
    """Return what computed: the GPU or cpu, its cores and, if there are several, the processes."""
    kind, processes = training.device.type, training.world_size
    device = torch.cuda.get_device_name() if kind == "cuda" else kind
    return f"{device}, {cpu_count()} CPU cores" + (f", {processes} processes" if processes > 1 else "")


def score_split(predictions: pd.DataFrame, groups: pd.Series, class_names: list[str]) -> tuple[dict, dict]:
    """Return the scores of one split, `score` and the macro ones of `discriminate`, and what that returns."""
    truth = *truth_of(predictions, class_names), groups[predictions["file"]].to_numpy()
    ranks = discriminate(*truth)
    return score(*truth) | ranks["macro"], ranks


def cover_shortcuts(trainer: Trainer, test: Dataset) -> dict[str, dict[str, float]]:
    """Return {what is painted black: {"accuracy", "macro_f1"}} of the test images: tissue or overlay?

    The position inset and burnt-in text lie in the lower left corner and along the border. The lower right
    corner is the control: it costs as much tissue and hides no overlay.
    """
    height, width = pixel_shape(trainer.processing_class)[1:]
    y, x = (torch.arange(height)[:, None] + 0.5) / height, (torch.arange(width) + 0.5) / width
    regions = {
        "lower left corner": (y > 0.65) & (x < 0.36),
        "lower right corner": (y > 0.65) & (x > 0.64),
        "border, one eighth": torch.maximum((x - 0.5).abs(), (y - 0.5).abs()) > 0.375,
    }
    result, inputs = {}, test.select_columns(["pixel_values", "label"])
    for name, region in regions.items():

        def cover(module: torch.nn.Module, args: tuple, kwargs: dict, region: torch.Tensor = region) -> tuple:
            black = region.to(kwargs["pixel_values"].device)
            return args, kwargs | {"pixel_values": kwargs["pixel_values"].masked_fill(black, 0)}

        with trainer.model.register_forward_pre_hook(cover, with_kwargs=True, prepend=True):
            scores = trainer.predict(inputs).metrics
        result[name] = {metric: scores[f"test_{metric}"] for metric in ("accuracy", "macro_f1")}
    return result


def measured_speed(trainer: Trainer, pixels: Dataset) -> dict[str, float | None]:
    """Return the images/s of each long step, None if it was not run, and the peak memory in bytes."""
    prepared = read_json(Path(pixels.cache_files[0]["filename"]).with_suffix(".json"))
    evaluated = read_json(Path(trainer.args.output_dir) / "all_results.json")
    epochs = [entry for entry in trainer.state.log_history if "train_seconds" in entry]
    images, seconds = (sum(entry[name] for entry in epochs) for name in ("train_images", "train_seconds"))
    return {
        "prepare_images_per_second": prepared.get("images_per_second"),
        "train_images_per_second": images / seconds if epochs else None,
        "train_seconds": seconds if epochs else None,
        "evaluate_images_per_second": evaluated.get("test_samples_per_second"),
        "peak_memory_bytes": peak_memory(trainer.args.device.type),
    }


def peak_memory(device_type: str) -> int | None:
    """Return the most memory held so far, in bytes: on the GPU if it was used, else by this process."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_results(results: dict) -> None:
    """Show the scores of each split, of each class, and with parts painted black; then what is doubtful."""
    scores = pd.DataFrame({name: results[name] for name in SPLITS if name in results})
    show(scores.map(lambda score: round(score["value"], 3), na_action="ignore"))
    classes = pd.DataFrame(results["per_class"]).T.round(3).astype({"n": int, "groups": "Int64"})
    worst, columns = worst_classes(results["per_class"]), [name for name in COLUMNS if name in classes]
    title = f"worst of {len(classes):,} classes (metrics.json: all)" if len(worst) < len(classes) else None
    show(classes.loc[worst, columns].rename_axis(title))
    show(pd.DataFrame(results["shortcuts"]).T.round(3).rename_axis("test images, painted black:"))
    notes = {
        "accuracy": "; always answering {class}: {accuracy:.3f}".format(**results["most_frequent"]),
        "ece": "; what chance adds is taken off, often all of it",
    }
    for name in ("accuracy", "macro_f1", "mcc", "macro_auroc", "ece"):
        if name in results["test"]:
            interval = "{value:.3f}, 95 % interval {low:.3f} to {high:.3f}".format(**results["test"][name])
            count = results["split"]["test"]
            log.info("test %s %s, n = %s%s", name.replace("_", " "), interval, count, notes.get(name, ""))
    for sentence in results["warnings"]:
        log.warning("warning: %s", sentence)
