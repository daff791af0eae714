"""Step 11: a finished model classifies images, folders and archives, on the screen, in a table, on a page."""

import os
import runpy
import shlex
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from .architectures import check_checkpoint, has_class_names, pixel_shape, processor_of
from .archive_formats import is_archive
from .archives import unpack
from .compare import compare_runs
from .console import MAIN, first_line, log, progress, show, stop
from .environment import same_value
from .files import PREFIX, atomic, csv_options, printable, probability_columns, read_json
from .image_formats import judge, readable_endings
from .load import list_images, summary
from .model import normalise_on_device
from .options import SHOWN, VIT_BASE, Settings
from .preprocess import Collator, decode_file
from .report import make_space
from .workspace import DRIVE, keep_on_drive


def use_model(settings: Settings, training: TrainingArguments) -> None:
    """Do what --predict, --demo and --compare ask of finished models."""
    if settings.compare:
        if MAIN:
            compare_runs(settings, training)
        return
    keep_on_drive(settings, training, DRIVE)  # moves output_dir there on Colab
    if MAIN and settings.predict:
        predict_files(settings, training)
    if MAIN and settings.demo:
        open_page(settings, training)


def show_commands(output_dir: str) -> None:
    """Say where to look, and how to use the finished model."""
    flags = [] if output_dir == "model" else ["--output_dir", output_dir]
    command = shlex.join(["python", "finetune_vit.py", *flags])
    page = Path(output_dir, "report", "index.html")
    log.info("next: open %s in a browser;  %s --predict PATH ...  or  %s --demo", page, command, command)


def choose_classifier(settings: Settings, output_dir: Path) -> tuple[str, list[str]]:
    """Return the name of a fine-tuned model and its classes, no two alike. SystemExit if there is none."""
    record = read_json(output_dir / "settings.json").get("settings", {})
    made = VIT_BASE, record.get("model_name_or_path")
    own = any(same_value(settings.model_name_or_path, pretrained) for pretrained in made)
    name = str(output_dir) if own else settings.model_name_or_path
    if own and not (output_dir / "model.safetensors").exists():
        remedy = "train it first, or give --output_dir or --model_name_or_path"
        stop(f"{output_dir} holds no finished model", remedy)
    log.info("reading the checkpoint %s", name)
    try:
        config = check_checkpoint(name)
    except Exception as problem:  # of any kind, for whatever is damaged in there
        stop(f"cannot use {name}: {first_line(problem)}", "check the name and the network")
    if not own and not has_class_names(config):
        stop(f"{name} is not fine-tuned: its classes have no names", "train it first")
    return name, classes_of(config)


def classes_of(config: PreTrainedConfig) -> list[str]:
    """Return the classes in the order of a model's outputs, with the output's number where one repeats.

    The 1,000 of ImageNet hold two cranes: these become "crane (134)" and "crane (517)".
    """
    labels = [config.id2label[number] for number in range(len(config.id2label))]
    while len(set(labels)) < len(labels):  # again if a label is called "crane (134)" already
        times = Counter(labels)
        labels = [f"{label} ({n})" if times[label] > 1 else label for n, label in enumerate(labels)]
    return labels


def load_classifier(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a finished model, float32 and ready for uint8 pixels, and its processor."""
    processor = AutoImageProcessor.from_pretrained(processor_of(name))
    model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    normalise_on_device(model, processor)
    return model.eval(), processor


@contextmanager
def find_inputs(paths: list[str]) -> Iterator[dict[str, Path]]:
    """Yield {name to show: file} of all images in `paths`. Archives are unpacked until the block ends.

    That holds every file of `paths` that is no archive, and images that cannot be read: `classify` says why.
    """
    found, left_out, endings = {}, [], readable_endings()
    with tempfile.TemporaryDirectory() as temporary:
        for number, path in enumerate(map(Path, paths)):
            folder = path
            if path.is_file() and (judge(str(path), endings) is not None or not is_archive(path)):
                found[printable(path)] = path
                continue
            if path.is_file():
                folder = Path(temporary, str(number), path.stem)
                unpack(path, folder, {})
            files, more = list_images(folder)
            like_images = {file for file in more if os.path.isfile(file) and judge(file, endings) is not None}
            files = sorted({*files} | like_images)
            if not files:
                log.warning("no images in %s", path)
            found |= {printable(path / os.path.relpath(file, folder)): Path(file) for file in files}
            left_out += [reason for file, reason in more.items() if file not in like_images]
        if left_out:
            log.warning("%s files left out: %s", len(left_out), summary(left_out))
        yield found


def decode_ahead(files: list[Path], processor: BaseImageProcessor, size: int) -> Iterator[list[dict]]:
    """Yield what `decode_file` makes of `files`, `size` at a time, while all cores work on the next ones."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        waiting = deque()
        for start in range(0, len(files), size):
            batch = files[start : start + size]
            waiting.append([pool.submit(decode_file, file, processor) for file in batch])
            if len(waiting) > 2:
                yield [row.result() for row in waiting.popleft()]
        while waiting:
            yield [row.result() for row in waiting.popleft()]


def classify(
    inputs: dict[str, Path], model: PreTrainedModel, processor: BaseImageProcessor,
    training: TrainingArguments,
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Yield tables of file, prediction, a probability per class, and error: why a file cannot be read.

    The column of a class's probability is p_CLASS, as in a run's predictions.csv.
    """
    names, classes = list(inputs), classes_of(model.config)
    collate = Collator(pixel_shape(processor))
    half = torch.bfloat16 if training.bf16 else torch.float16
    autocast = torch.autocast(training.device.type, half, enabled=training.bf16 or training.fp16)
    bar, start, failed = progress(total=len(names), desc="predict"), 0, []
    for rows in decode_ahead(list(inputs.values()), processor, training.eval_batch_size):
        errors = np.array([row["error"] for row in rows], dtype=object)
        table = pd.DataFrame({"file": names[start : start + len(rows)], "prediction": ""})
        table = pd.concat([table, pd.DataFrame(np.nan, table.index, probability_columns(classes))], axis=1)
        table["error"] = errors
        if len(readable := np.flatnonzero(errors == "")):
            pixels = collate([rows[row] | {"label": 0} for row in readable])["pixel_values"]
            with torch.no_grad(), autocast:
                logits = model(pixel_values=pixels.to(training.device)).logits
            probabilities = logits.double().softmax(-1).cpu().numpy()
            table.loc[readable, probability_columns(classes)] = probabilities
            table.loc[readable, "prediction"] = np.array(classes, dtype=object)[probabilities.argmax(1)]
        for row in np.flatnonzero(errors != ""):
            failed.append(errors[row])
            if len(failed) <= 20:
                log.warning("unreadable: %r (%s)", table["file"][row], errors[row])
        start += len(rows)
        bar.update(len(rows))
        yield table
    bar.close()
    if len(failed) > 20:
        log.warning("%s of %s files are unreadable: %s", len(failed), len(names), summary(failed))


def show_predictions(table: pd.DataFrame) -> None:
    """Show the two most probable classes of each file that could be read."""
    table = table[table["error"] == ""].set_index("file")
    probabilities = table.drop(columns=["prediction", "error"])
    probabilities.columns = probabilities.columns.str.removeprefix(PREFIX)
    best = [row.nlargest(2).round(3) for _, row in probabilities.iterrows()]
    rows = [(*(value for pair in row.items() for value in pair),) for row in best]
    if rows:
        show(pd.DataFrame(rows, table.index, ["prediction", "probability", "or else", "its probability"]))


def predict_files(settings: Settings, training: TrainingArguments) -> None:
    """Classify what `--predict` names: up to 20 images on the screen, more into a CSV file."""
    name, class_names = choose_classifier(settings, Path(training.output_dir))
    with find_inputs(settings.predict) as inputs:
        if not inputs:
            stop(f"no images in {', '.join(settings.predict)}", "give images, folders or archives")
        path = Path(settings.predictions_file or "predictions.csv")
        write = len(inputs) > 20 or settings.predictions_file is not None
        if write and path.exists():
            stop(f"{path} exists", "name another file with --predictions_file")
        model, processor = load_classifier(name)
        start, counts, few = time.perf_counter(), pd.Series(dtype=int), []
        tables = classify(inputs, model.to(training.device), processor, training)
        options = csv_options([*inputs, *class_names])
        with atomic(path) if write else nullcontext() as part:
            for number, table in enumerate(tables):
                if write:
                    table.to_csv(part, mode="a", header=not number, **options)
                counts = counts.add(table["prediction"].replace("", np.nan).value_counts(), fill_value=0)
                if len(inputs) <= 20:
                    few.append(table)
        speed = len(inputs) / (time.perf_counter() - start)
    if few:
        show_predictions(pd.concat(few))
    elif len(counts):
        title = f"the most frequent of {len(counts):,} classes" if len(counts) > SHOWN else "prediction"
        table = counts.astype(int).sort_values(ascending=False)[:SHOWN].to_frame("images")
        show(table.rename_axis(title))
    log.info("%s images, %.1f images/s%s", f"{len(inputs):,}", speed, f": {path}" if write else "")


def open_page(settings: Settings, training: TrainingArguments) -> None:
    """Serve the web page of a fine-tuned model, until Ctrl-C. Raises SystemExit if that fails."""
    name, class_names = choose_classifier(settings, Path(training.output_dir))
    page = make_space(Path(tempfile.mkdtemp()), class_names, name)  # kept: a notebook goes on meanwhile
    room = runpy.run_path(str(page))
    room["serve"](room["build_page"](name, names=class_names), settings.demo_share)
