"""Mistakes in the settings, found before any long work starts; each ends in one line."""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainingArguments

from .console import TOKEN, first_line, stop
from .options import AUGMENTATIONS, KVASIR_URL, METRICS, PATHS, Settings

HELP = "see python finetune_vit.py --help"
REQUIRED = (
    "accelerate cleanlab cv2 datasets evaluate matplotlib scipy simplejpeg sklearn threadpoolctl".split()
)
UNREAD = (".7z", ".rar", ".zst", ".tzst")  # archives that need another program
NO_TEXT = "[\0\ud800-\udfff]"  # what a text cannot hold: a null byte, or what is not UTF-8
RANGES = {  # numbers of TrainingArguments by (least, most)
    (0, 1e6): "num_train_epochs learning_rate weight_decay max_grad_norm eval_delay",
    (0, 1e9): "warmup_steps",
    (-1, 1e9): "max_steps",
    (0, 1): "label_smoothing_factor",
    (0, 2**32 - 1): "seed data_seed",
    (1, 1e6): """gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size
    eval_accumulation_steps save_total_limit dataloader_prefetch_factor""",
    (1e-9, 1e9): "eval_steps save_steps logging_steps",
}
# These would change the scores, or keep an interrupted run from going on exactly.
UNFIT = """dataloader_drop_last prediction_loss_only batch_eval_metrics eval_do_concat_batches label_names
save_only_model ignore_data_skip enable_jit_checkpoint use_liger_kernel fsdp deepspeed""".split()


def is_url(location: str) -> bool:
    """Say whether an archive is to be downloaded."""
    return location.lower().startswith(("http://", "https://"))


def local_path(location: str) -> Path:
    """Return the path of an archive on this machine, which may be a file:// URL."""
    if location.lower().startswith("file:"):
        location = urllib.request.url2pathname(urllib.parse.urlparse(location).path)
    return Path(location)


def archive_name(location: str) -> tuple[str, str]:
    """Return the file name of an archive, and the name of the folder to unpack it into.

    A name without an ending is as good: the content decides. Raises SystemExit if there is no name.
    """
    try:
        url = urllib.parse.urlparse(
            location if is_url(location) else local_path(location).absolute().as_uri()
        )
        url.netloc.encode("idna")
        if is_url(location) and (url.port == 0 or not url.hostname):  # reading the port checks it, too
            raise ValueError("it names no server")
    except ValueError as problem:
        stop(f"--data_url is no URL: {problem}", "give a URL or the path of an archive")
    if "@" in url.netloc:
        stop("--data_url holds a user name or password", "fetch the file by other means and give its path")
    name = Path(urllib.parse.unquote(url.path)).name
    endings = [ending for _, endings, _ in shutil.get_unpack_formats() for ending in endings]
    stems = [name[: -len(ending)] for ending in endings if name.lower().endswith(ending)]
    if not stems and name.lower().endswith(UNREAD):
        remedy = "unpack it with another program and give the folder as --data_dir"
        stop(f"{location} is not a zip or tar archive", remedy)
    stem = min(stems, key=len, default=name)
    if not stem.strip(".") or re.search(NO_TEXT, name):
        stop(f"{location} names no archive", "give the URL or the path of one")
    if stem == "cache":
        stop(f"{location} would be unpacked where the pixels are cached", "rename it")
    return name if stems else f"{name}.archive", stem


def check_settings(settings: Settings, training: TrainingArguments) -> None:
    """Find what would fail later. Raises SystemExit."""
    rows = paths(settings, training.output_dir), shares(settings), combinations(settings, training)
    for fails, problem, remedy in itertools.chain(*rows):  # one by one: later rows rely on earlier ones
        if fails:
            stop(problem, remedy)
    if settings.data_dir is None:
        archive_name(settings.data_url)


def paths(settings: Settings, output_dir: str) -> Iterator[tuple]:
    """Yield (fails, problem, remedy): folders and files that are missing or misplaced."""
    for name in PATHS:
        value = getattr(settings, name)
        empty = value is not None and (not value.strip() or re.search(NO_TEXT, value))
        yield empty, f"--{name} is empty or no text", "give a value or leave it out"
    empty = not output_dir.strip() or re.search(NO_TEXT, output_dir)
    yield empty, "--output_dir is empty or no text", "give a folder or leave it out"
    for name in ("data_dir", "external_dir"):
        value = getattr(settings, name)
        absent = value is not None and not os.path.isdir(value)
        yield absent, f"--{name} {value} is not a folder", "give one that holds a folder for each class"
    for name, folder in (("output_dir", output_dir), ("data_root", settings.data_root)):
        around = Path(folder, "_").resolve().parents
        inside = settings.data_dir is not None and Path(settings.data_dir).resolve() in around
        problem = f"--{name} {folder} lies in --data_dir, as if it were a class"
        yield inside, problem, "choose one outside of it"
    url, table = settings.data_url, settings.metadata
    absent = settings.data_dir is None and not is_url(url) and not os.path.isfile(local_path(url))
    yield absent, f"--data_url {url} is not a file", "give a URL or the path of an archive"
    places = [Path(folder, table or "") for folder in ("", settings.data_dir) if folder is not None]
    absent = table is not None and settings.data_dir and not any(map(os.path.isfile, places))
    yield absent, f"--metadata {table} is not a file", "give the path of a CSV file"
    for path in settings.predict or ():
        there = os.path.isfile(path) or os.path.isdir(path)
        yield not there, f"--predict {path} is not there", "give images, folders or archives"
    table = settings.predictions_file
    yield table and os.path.exists(table), f"--predictions_file {table} exists", "give another name"


def shares(settings: Settings) -> Iterator[tuple]:
    """Yield (fails, problem, remedy): numbers out of their range; written so that nan fails as well."""
    sizes = settings.test_size, settings.validation_size
    bad = not (sizes[0] > 0 and sizes[1] >= 0 and sum(sizes) < 1)
    remedy = "give a test_size above 0 and a sum less than 1"
    yield bad, f"test_size and validation_size are {sizes}", remedy
    folds, remedy = settings.cross_validate, "give 3 or more: the folds train, validate and test in turn"
    yield folds not in (0, *range(3, 1000)), f"--cross_validate is {folds}", remedy
    steps, decay = settings.min_steps, settings.layer_decay
    yield not 0 <= steps <= 1e9, f"--min_steps is {steps}", "give a number of steps; 0 asks for none"
    yield not 0 < decay <= 1, f"--layer_decay is {decay}", "give a share above 0, up to 1 (no decay)"
    rule, remedy = (
        settings.split_by,
        "give near-duplicates or random; a table with a column split is --metadata",
    )
    yield rule not in (None, "near-duplicates", "random"), f"--split_by does not know {rule}", remedy
    how, remedy = settings.group_by, "give folder (CLASS/PATIENT), parent (PATIENT/CLASS) or none"
    yield how not in (None, "folder", "parent", "none"), f"--group_by does not know {how}", remedy
    digits = settings.data_sha256
    bad = digits is not None and not re.fullmatch("[0-9a-fA-F]{64}", digits)
    yield bad, f"--data_sha256 {digits} is no SHA-256", "give 64 hexadecimal digits"
    for kind in sorted(set(settings.augment.split(",")) - {"", *AUGMENTATIONS}):
        yield True, f"--augment does not know {kind}", f"give any of {','.join(AUGMENTATIONS)}"


def combinations(settings: Settings, training: TrainingArguments) -> Iterator[tuple]:
    """Yield (fails, problem, remedy): settings that do not go together, and what is not installed."""
    both = settings.data_sha256 is not None and settings.data_dir is not None
    yield both, "--data_sha256 is for an archive, not for --data_dir", "leave one of them out"
    yield from of_dataset(settings)
    lacking = settings.cross_validate and not settings.validation_size  # or test images count twice
    yield lacking, "--cross_validate needs validation images", "give a --validation_size above 0"
    for package in REQUIRED:
        lacking = not importlib.util.find_spec(package)
        yield lacking, f"the package {package} is not installed", "pip install -r requirements.txt"
    lacking = settings.demo and not importlib.util.find_spec("gradio")
    yield lacking, "--demo needs Gradio", "pip install gradio"
    both = settings.compare and (settings.predict or settings.demo)
    yield both, "--compare reads finished runs, --predict and --demo use one", "give one of these"
    alone = settings.demo_share and not settings.demo
    yield alone, "--demo_share needs --demo", "add --demo"
    alone = settings.predictions_file and not settings.predict
    yield alone, "--predictions_file names the table of --predict", "add --predict"
    alone = settings.hub_space_id and not training.push_to_hub
    yield alone, "--hub_space_id publishes the page of a model that is published", "add --push_to_hub"
    told = re.search(TOKEN, json.dumps([dataclasses.asdict(settings), training.to_dict()]))
    yield told, "a token of the Hub stands where it would be written down", "give it with --hub_token"


def of_dataset(settings: Settings) -> Iterator[tuple]:
    """Yield (fails, problem, remedy): settings of a data set of the Hub, and others beside it."""
    name = settings.dataset_name
    for other in ("data_dir", "data_url", "data_sha256", "metadata"):
        given = name is not None and getattr(settings, other) not in (None, KVASIR_URL)
        yield given, f"--dataset_name and --{other} are two sources", "leave one of them out"
    both = name is not None and settings.group_by is not None
    yield both, "--group_by is for folders, not for a data set of the Hub", "give --group_column_name"
    for part in ("dataset_config_name", "dataset_revision"):
        alone = name is None and getattr(settings, part) is not None
        yield alone, f"--{part} is for a data set of the Hub", "add --dataset_name"
    try:
        validate_repo_id("none" if name is None else name)
    except HFValidationError:
        yield True, f"--dataset_name {name} cannot be a name on the Hub", "give OWNER/NAME"


def check_torchvision() -> None:
    """Raise SystemExit if torchvision is there and cannot be imported: transformers would hide why."""
    try:
        if importlib.util.find_spec("torchvision"):
            importlib.import_module("torchvision")
    except Exception as problem:  # of many kinds: what it calls in torch is not there
        version = importlib.metadata.version("torchvision")
        found = f"torchvision {version} does not fit torch {torch.__version__}"
        remedy = "pip uninstall torchvision (it is not needed here), or pip install -U torch torchvision"
        stop(f"{found}: {first_line(problem)}", remedy)


def check_training(training: TrainingArguments) -> None:
    """Find what the Trainer would find late, or never. Raises SystemExit."""
    for (low, high), names in RANGES.items():
        for name in names.split():
            value = getattr(training, name)
            if value is not None and not low <= value <= high:  # nan fails as well
                stop(f"--{name} is {value}", f"give {low:g} to {high:g}")
    workers, metric = training.dataloader_num_workers, training.metric_for_best_model
    asked, pushes = training.resume_from_checkpoint, training.hub_strategy != "every_save"
    known = ("loss", *METRICS)
    remedy = "leave it out: the pixels are prepared, and worker processes only slow it down"
    rows = [
        (workers, f"--dataloader_num_workers is {workers}", remedy),
        (pushes or training.hub_always_push, "--hub_strategy and --hub_always_push have no effect",
         "leave them out: what is finished is pushed"),
        (training.fp16 and training.use_cpu, "--fp16 needs a GPU", "leave it out, or use --bf16"),
        (asked is not None and asked.lower() == "false",
         f"--resume_from_checkpoint {asked}: a run goes on where it stopped",
         "to begin anew give another --output_dir, or delete this one"),
        (asked is not None and not os.path.isdir(asked),
         f"--resume_from_checkpoint {asked} is not a folder", "leave it out: the newest is then used"),
        (metric is not None and metric.removeprefix("eval_") not in known,
         f"unknown --metric_for_best_model {metric}", f"use one of {', '.join(known)}"),
    ]  # fmt: skip
    loggers = transformers.integrations.get_available_reporting_integrations()
    missing = sorted(set(training.report_to) - set(loggers))
    names = " ".join(missing)
    rows.append((missing, f"--report_to finds no {names}", f"pip install {names}, or --report_to none"))
    for fails, problem, remedy in rows:
        if fails:
            stop(problem, remedy)
    try_optimizer(training)


def try_optimizer(training: TrainingArguments) -> None:
    """Try optimiser and schedule now: the Trainer makes them late. Raises SystemExit."""
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(training)
        options |= {"lr": training.learning_rate or 1e-5, "weight_decay": training.weight_decay}
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        more = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs or {}}
        transformers.get_scheduler(training.lr_scheduler_type, optimizer, 1, 9, **more)
        if training.torch_compile:
            torch.compile(len, backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    except Exception as problem:  # of many kinds
        stop(f"the optimizer refuses these settings: {problem}", HELP)
