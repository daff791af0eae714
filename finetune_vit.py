# %% [markdown]
# # Fine-tune a Vision Transformer on endoscopy images, or on your own
#
# From an archive on a web server to a fine-tuned `ViTForImageClassification`, an honest score, a model card.
# `python finetune_vit.py` does it on Kvasir v2 (gastrointestinal endoscopy, 8 classes of 1,000 images),
# `--data_dir FOLDER` on any folder of class folders, `--config data/sample.yaml` offline on a drawn sample.
# Each step leaves its result on disk and finds it there again: after a disconnect, run the same command.
# The sample: test accuracy 0.847, 95 % interval 0.753 to 0.930, n = 72, one seed (42), on 2 CPU cores with
# torch 2.13.0, transformers 5.23.0.

# %%
from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

RECIPES = {  # what each of them is worth: see the README
    "default": {
        "num_train_epochs": 4.0,
        "per_device_train_batch_size": 8,  # images a step; 32 keep a large GPU busier
        "min_steps": 300,  # where 8 images a step make fewer, a step takes 4, 2 or 1
        "learning_rate": 2e-5,  # peak of AdamW, for these images a step
        "layer_decay": 0.85,  # rate of each layer, as a share of that of the next one
        "lr_scheduler_type": "cosine",  # from the peak to 0
        "warmup_steps": 0.3,  # share of the steps
        "weight_decay": 0.05,
        "linear_probe": True,  # the head is fitted to the pretrained features first
        "class_weights": True,  # each class counts the same
        "augment": "flip,turn",  # an endoscope has no upper side
    },
    "tutorial": {  # of the blog post from which this grew; split and choice of the epoch, too
        "num_train_epochs": 5.0,
        "per_device_train_batch_size": 16,
        "min_steps": 0,
        "learning_rate": 2e-5,
        "layer_decay": 1.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 500,  # of the 2,125 steps that Kvasir v2 makes
        "weight_decay": 0.01,
        "linear_probe": False,
        "class_weights": False,
        "augment": "",
        "split_by": "random",
        "validation_size": 0.0,  # the test images choose the epoch, by accuracy
        "metric_for_best_model": "accuracy",
    },
}
RECIPES["fast"] = RECIPES["default"] | {"num_train_epochs": 0.0}  # the fitted head alone, from two passes
RECIPES["best"] = RECIPES["default"] | {"num_train_epochs": 15.0}  # few images gain most

REPOSITORY = "https://github.com/OWNER/finetune_vit"
RUN = __name__ == "__main__"  # true in a script and in a notebook, false on import
NOTEBOOK = "ipykernel" in sys.modules
if RUN and NOTEBOOK:  # it comes alone: fetch what lies beside it, install what is missing; torch stays
    if os.path.exists("../requirements.txt"):
        os.chdir("..")
    elif not os.path.exists("requirements.txt"):
        if not os.path.exists("finetune_vit"):
            subprocess.run(["git", "clone", "-q", REPOSITORY], check=True)
        os.chdir("finetune_vit")
    here = [f"torch=={importlib.metadata.version('torch')}"] if importlib.util.find_spec("torch") else []
    install = [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
    subprocess.run(install + here, check=True)

# %%
import argparse
import copy
import dataclasses
import difflib
import errno
import functools
import glob
import hashlib
import http.client
import inspect
import io
import itertools
import json
import logging
import math
import platform
import re
import runpy
import shlex
import shutil
import signal
import ssl
import stat
import tarfile
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import filelock
import numpy as np
import PIL.ExifTags
import PIL.Image
import simplejpeg
import yaml
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from huggingface_hub import ModelCard
    from matplotlib.figure import Figure
    from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
    from transformers import ViTForImageClassification, ViTImageProcessor

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices on new heads alarm newcomers


class Lazy:
    """A package that is imported when it is first used: neither a mistake nor `--help` waits for torch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.name), name)


datasets, evaluate, hub, transformers = map(Lazy, ("datasets", "evaluate", "huggingface_hub", "transformers"))
matplotlib, plot, pd, scipy = map(Lazy, ("matplotlib", "matplotlib.figure", "pandas", "scipy"))
linear_model, metrics = map(Lazy, ("sklearn.linear_model", "sklearn.metrics"))
safetensors, torch = map(Lazy, ("safetensors", "torch"))
F = Lazy("torch.nn.functional")

MAIN = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that writes and speaks
HIDDEN = (".", "__")  # what names such as .ipynb_checkpoints and __MACOSX begin with
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
SPLITS = ("train", "validation", "test")
AUGMENTATIONS = ("flip", "turn", "crop", "colour")
METRICS = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
METRICS += ("weighted_precision", "weighted_recall", "weighted_f1", "mcc")
# Columns of our tables that are always text.
COLUMNS = "file file_a file_b split label label_a label_b prediction error".split()
TOKEN = r"hf_\w{30,}"  # of the Hub
DAMAGED = "delete it, and it is made again where that is possible"
log = logging.getLogger("finetune_vit")


def stop(problem: object, remedy: str) -> NoReturn:
    """End with one line that a user can act on, no token in it. Raises SystemExit: status 1, no traceback."""
    line = f"error: {' '.join(str(problem).split())}; {remedy}"
    raise SystemExit(re.sub(TOKEN, "hf_...", line) if MAIN else 1)


def file_error(problem: BaseException) -> int | None:
    """Return the errno of a failed file operation, whichever library met it; None for any other problem."""
    if isinstance(problem, OSError):
        return problem.errno
    number = re.search(r"os error (\d+)", str(problem))  # safetensors
    return int(number[1]) if number else errno.ENOSPC if "inline_container" in str(problem) else None


# What a network drive recovers from, and what someone has to mend.
PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE}


def drive_may_recover(problem: BaseException) -> bool:
    return file_error(problem) in PASSING


def patiently(action: Callable, *args: Any, hope: Callable = drive_may_recover, **options: Any) -> Any:
    """Return action(*args, **options); while there is hope after a failure, try again for half a minute."""
    for wait in (1, 2, 4, 8, 16):
        try:
            return action(*args, **options)
        except Exception as problem:
            if not hope(problem):
                raise
            log.warning("warning: %s; trying again in %s s", " ".join(str(problem).split()), wait)
            time.sleep(wait)
    return action(*args, **options)


def end_in_one_line(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    """Say what ended a script; a traceback is left to what no user can mend. For `sys.excepthook`."""
    text = "stopped" if issubclass(kind, KeyboardInterrupt) else f"error: a file cannot be used: {problem}"
    if text != "stopped" and file_error(problem) not in PASSING | LASTING:
        sys.__excepthook__(kind, problem, trace)
    elif MAIN:
        print(f"{text}; run the same command to go on: what is finished is kept", file=sys.stderr)


if RUN and not NOTEBOOK:
    sys.excepthook = end_in_one_line
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: both end in one line


def need_space(folder: Path, size: int) -> None:
    """Raise SystemExit unless the disk of `folder` has `size` bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < size:
        remedy = "free some, or choose a folder on another disk"
        stop(f"{folder} has {free / 1e6:,.0f} MB free, but {size / 1e6:,.0f} MB are needed", remedy)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` only once the block has succeeded.

    Of several processes, which all make the same, only the main one's is kept.
    """
    part = path.with_name(f".part{os.environ.get('RANK', '')}-{path.name}")
    remove(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave the new name without the content
        if MAIN:
            os.replace(part, path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, keys: Iterable[str] = (), remedy: str = DAMAGED) -> dict:
    """Return the content of a JSON file, {} if there is none. Raises SystemExit if it is damaged."""
    with suppress(ValueError, IsADirectoryError):
        content = json.loads(patiently(path.read_bytes)) if path.exists() else {}
        if isinstance(content, dict) and (content.keys() >= set(keys) or not path.exists()):
            return content
    stop(f"{path} is damaged", remedy)


def read_table(path: Path, columns: Iterable[str], remedy: str = DAMAGED) -> pd.DataFrame:
    """Read a CSV file; file and class names stay text, even if they look like numbers or say NA.

    Raises SystemExit if that is not possible, or it lacks one of `columns`.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(COLUMNS, str), keep_default_na=False)
    except (OSError, ValueError) as problem:
        stop(f"cannot read {path}: {problem}", remedy)
    if lacking := [name for name in columns if name not in table]:
        stop(f"{path} has no column {lacking[0]}", remedy)
    return table


def write_table(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Write a CSV file and return it as it will be read again: the same numbers now and later."""
    with whole(path) as part:
        table.to_csv(part, index=False, float_format="%.9g")
        return read_table(part, table)


def write_text(path: Path, text: str) -> None:
    def write() -> None:
        with whole(path) as part:
            part.write_text(text, encoding="utf-8", newline="\n")

    patiently(write)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def show(table: pd.DataFrame) -> None:
    """Show a table: as HTML in a notebook, as text in a terminal."""
    if NOTEBOOK and MAIN:
        from IPython.display import display

        display(table)
    elif MAIN:
        print(f"\n{table.to_string()}\n", flush=True)


def show_images(title: str, pictures: Iterable[np.ndarray], captions: Iterable[str]) -> None:
    """Show pictures, uint8 (height, width, 3), in a notebook; a script has no place for them."""
    if NOTEBOOK and MAIN:
        shown = list(zip(pictures, captions, strict=False))
        figure = plot.Figure(figsize=(10, 0.4 + 2.2 * -(-len(shown) // 4)), layout="constrained")
        figure.suptitle(title)
        for number, (picture, caption) in enumerate(shown, 1):
            axes = figure.add_subplot(-(-len(shown) // 4), 4, number)
            axes.imshow(picture)
            axes.set_title(caption, fontsize=9)
            axes.axis("off")
        figure.savefig(content := io.BytesIO())
        show_picture(content.getvalue())


def show_picture(content: bytes) -> None:
    from IPython.display import Image, display

    display(Image(content, width=800))


# %% [markdown]
# ## 0 · Settings
# What to train on and how. Each field is a flag (`--num_train_epochs 3`), a key of the YAML file given with
# `--config` (flags win) or, in a notebook, an entry of `ARGUMENTS`. `TRAINING` has our defaults for the
# Trainer's own `TrainingArguments`; its other fields work under their own names, too.


# %%
def setting(default: Any, help: str, metavar: str | None = None, **options: Any) -> Any:
    options |= {"metavar": metavar} if metavar else {}
    return field(default=default, metadata={"help": help} | options)


KVASIR_URL = "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip"
VIT_BASE = "google/vit-base-patch16-224-in21k"


@dataclass
class Settings:
    """Where the images come from, which model to start from, how to split."""

    data_url: str = setting(KVASIR_URL, "Archive (zip or tar) of class folders: URL or path.", "URL")
    data_sha256: str | None = setting(None, "SHA-256 that the archive must have, in hex.", "HEX")
    data_dir: str | None = setting(None, "Folder of class folders; used instead of data_url.", "FOLDER")
    data_root: str = setting("data", "Folder for archives, unpacked images and caches.", "FOLDER")
    model_name_or_path: str = setting(VIT_BASE, "Pretrained ViT: name on the Hub, or folder.", "MODEL")
    recipe: str = setting("default", "Values at the top of the script; flags override.", choices=[*RECIPES])
    test_size: float = setting(0.15, "Share of the images (0 to 1) that is kept for the test.", "SHARE")
    validation_size: float = setting(
        0.15, "Share that chooses the best epoch; 0: the test images do, and flatter the score.", "SHARE"
    )
    split_by: str = setting(
        "near-duplicates", "near-duplicates (keeps them together), random, or a CSV file: file, split.", "HOW"
    )
    augment: str = setting("", "Training images vary by any of flip,turn,crop,colour.", "KINDS")
    linear_probe: bool = setting(False, "Begin with a head that is fitted to the pretrained features.")
    layer_decay: float = setting(1.0, "Rate of each layer, as a share of that of the next one.", "SHARE")
    min_steps: int = setting(0, "Steps at least: few images make as many, by fewer images a step.", "N")
    freeze_backbone: bool = setting(False, "Train the head alone: a fraction of the memory and time.")
    class_weights: bool = setting(False, "Weigh the loss so that each class counts the same.")
    evaluate_train: bool = setting(False, "Report the metrics on the training images as well.")
    cross_validate: int = setting(0, "Train K more models on K folds; report mean and spread.", "K")
    external_dir: str | None = setting(None, "Folder of class folders to test on as well.", "FOLDER")
    hub_space_id: str | None = setting(None, "With --push_to_hub: Space of the model's web page.", "ID")
    predict: list[str] | None = setting(None, "Do not train: sort these images, folders, archives.", "PATH")
    demo: bool = setting(False, "Do not train: open a web page that tries the model.")


TRAINING = {  # fields of transformers.TrainingArguments: our default, help, name of the value
    "output_dir": ("model", "Folder for the model, its checkpoints, card and report.", "FOLDER"),
    "num_train_epochs": (None, "Passes over the training images; 0: a new head is fitted at most.", "N"),
    "learning_rate": (None, "Peak rate of AdamW; None: the recipe's, tied to the images a step.", "RATE"),
    "warmup_steps": (None, "Learning-rate warm-up: share of steps if below 1, else steps.", "N"),
    "weight_decay": (None, "Decoupled weight decay of AdamW, but for biases and norms.", "RATE"),
    "per_device_train_batch_size": (None, "Images a training step, on each device, at most.", "N"),
    "per_device_eval_batch_size": (64, "Images an evaluation step, on each device.", "N"),
    "seed": (42, "Seed of the split, the new head and the order of the images.", "N"),
    "bf16": (None, "bfloat16 mixed precision; None: where it is fast.", "BOOL"),
    "fp16": (None, "float16 mixed precision; None: on old GPUs.", "BOOL"),
    "eval_strategy": ("epoch", "When to evaluate on the validation images.", "epoch|steps|no"),
    "save_strategy": ("epoch", "When to save a checkpoint.", "epoch|steps|no"),
    "logging_strategy": ("epoch", "When to log the training loss.", "epoch|steps|no"),
    "save_total_limit": (2, "Checkpoints to keep, the best one among them.", "N"),
    "load_best_model_at_end": (True, "End with the best epoch instead of the last one.", "BOOL"),
    "metric_for_best_model": ("macro_f1", "Validation metric of the best epoch.", "METRIC"),
    "report_to": (None, "Loggers, or none; None: tensorboard, if installed.", "TOOL"),
    "push_to_hub": (False, "Publish the model and its card on the Hub; no image.", "BOOL"),
    "hub_model_id": (None, "Its name there, OWNER/NAME; None: that of output_dir.", "ID"),
    "hub_private_repo": (None, "Whether only you can see it there.", "BOOL"),
    "resume_from_checkpoint": (None, "Checkpoint to go on from; None: the newest.", "FOLDER"),
    "ddp_find_unused_parameters": (False, argparse.SUPPRESS, None),  # a ViT has none
    "ddp_timeout": (4 * 3600, argparse.SUPPRESS, None),  # seconds: other processes wait for the download
}


def suit_hardware(given: argparse.Namespace) -> dict[str, Any]:
    """Return device, precision and loggers, as defaults for the fields of TrainingArguments."""
    cuda = torch.cuda.is_available() and not given.use_cpu
    mps = torch.backends.mps.is_available() and not given.use_cpu
    device_type = "cuda" if cuda else "mps" if mps else "cpu"
    precision = choose_precision(device_type) if given.bf16 is None and given.fp16 is None else "as given"
    return {
        "use_cpu": device_type == "cpu",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "accelerator_config": {"non_blocking": True} if cuda else None,  # no step waits for its pixels
        "tf32": True if cuda and torch.cuda.get_device_capability() >= (8, 0) else None,
        "report_to": "tensorboard" if importlib.util.find_spec("tensorboard") else "none",
    }


def choose_precision(device_type: str) -> str:
    """Return "bf16", "fp16" or "fp32" for "cuda", "mps" or "cpu": the fastest that the hardware has.

    `torch.cuda.is_bf16_supported` says yes where bf16 is only emulated (T4): so look at the capability.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    if device_type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


HELP = "see python finetune_vit.py --help"


def read_settings(arguments: list[str]) -> tuple[Settings, TrainingArguments]:
    """Parse flags such as ["--config", "data/sample.yaml", "--seed", "1"]. Raises SystemExit on a mistake."""
    parser = transformers.HfArgumentParser(
        (Settings, transformers.TrainingArguments),
        allow_abbrev=False,
        usage="python finetune_vit.py [--config FILE] [--SETTING VALUE ...]",
        epilog="Every other field of transformers.TrainingArguments is a flag under its own name, too.",
    )
    known = set(parser._option_string_actions) - {"-h", "--help"}
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it.")
    parser.error = lambda message: stop(message, HELP)
    parser.set_defaults(**{name: default for name, (default, _, _) in TRAINING.items()})
    parser.set_defaults(**RECIPES["default"])
    for action in parser._actions:  # 120 inherited flags, and a second spelling of each, would bury ours
        action.option_strings = action.option_strings[:1]
        if action.dest in TRAINING and not action.option_strings[0].startswith("--no_"):
            _, action.help, action.metavar = TRAINING[action.dest]
        elif action.dest not in {"help", "config", *Settings.__annotations__}:
            action.help = argparse.SUPPRESS

    config = parser.parse_known_args(arguments)[0].config
    if config:
        arguments = config_arguments(Path(config), known) + arguments
    given = parser.parse_known_args(arguments)[0]
    for name in UNFIT:  # now: TrainingArguments would act on a DeepSpeed file, for the whole process
        if (getattr(given, name) or None) != (parser.get_default(name) or None):
            stop(f"--{name} would change what is evaluated, or what a run can go on from", "leave it out")
    recipe = RECIPES[given.recipe]
    parser.set_defaults(**recipe | suit_hardware(given) | {"learning_rate": None})
    try:
        settings, training, _, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as problem:  # of many kinds: the checks of TrainingArguments
        stop(problem, HELP)
    if unknown:
        name = unknown[0].split("=")[0]
        stop(f"unknown argument {name}", nearest(name, known))
    if training.hub_token:  # where the Hub's client finds it, and no file of ours will hold it
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    training.remove_unused_columns = False  # `collate` makes the model's inputs
    training.logging_nan_inf_filter = False  # a loss that is not finite must be seen, and no step wait for it
    check_settings(settings, training.output_dir)
    if settings.hub_space_id and not training.push_to_hub:
        stop("--hub_space_id publishes the page of a model that is published", "add --push_to_hub")
    if re.search(TOKEN, json.dumps([dataclasses.asdict(settings), training.to_dict()])):
        stop("a token of the Hub stands where it would be written down", "give it with --hub_token")
    check_training(training)
    if training.learning_rate is None:  # the square root: Malladi et al. 2022, arXiv 2205.10287
        ratio = images_a_step(training) / recipe["per_device_train_batch_size"]
        training.learning_rate = float(f"{recipe['learning_rate'] * ratio**0.5:.3g}")
    return settings, training


def images_a_step(training: TrainingArguments) -> int:
    """Return the images of one update of the weights: on all devices, in all accumulated batches."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def nearest(name: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {matches[0]}?" if matches else HELP


def config_arguments(path: Path, known: set[str]) -> list[str]:
    """Turn a YAML file into flags, so that both are checked alike. Raises SystemExit."""
    example = "give a YAML file with lines such as 'num_train_epochs: 3'"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as problem:
        stop(f"cannot read --config {path}: {problem}", example)
    if not isinstance(content, dict):
        stop(f"--config {path} holds no settings", example)
    flags = []
    for key, value in content.items():
        if f"--{key}" not in known:
            stop(f"unknown setting '{key}' in {path}", nearest(f"--{key}", known).replace("mean --", "mean "))
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def is_url(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def archive_name(location: str) -> tuple[str, str]:
    """Return the file name of an archive, with and without its ending. Raises SystemExit if it has none."""
    try:
        url = urllib.parse.urlparse(location if is_url(location) else Path(location).absolute().as_uri())
        if is_url(location) and (url.port == 0 or not url.hostname):  # to read the port checks it, too
            raise ValueError("it names no server")
    except ValueError as problem:
        stop(f"--data_url is no URL: {problem}", "give a URL or the path of an archive")
    if "@" in url.netloc:
        stop("--data_url has a password in it", "fetch the file by other means and give its path")
    name = Path(urllib.parse.unquote(url.path)).name
    endings = [ending for _, endings, _ in shutil.get_unpack_formats() for ending in endings]
    stems = [name[: -len(ending)] for ending in endings if name.lower().endswith(ending)]
    if not any(stem.strip(".") for stem in stems):
        stop(f"{location} is not named like an archive", f"give one that ends in {', '.join(endings)}")
    if "cache" in stems:
        stop(f"{location} would be unpacked where the pixels are cached", "rename it")
    return name, min(stems, key=len)


NO_TEXT = "[\0\ud800-\udfff]"  # what a text cannot hold: a null byte, or what is not UTF-8
RANGES = {  # numbers of TrainingArguments by (least, most)
    (0, 1e6): "num_train_epochs learning_rate weight_decay max_grad_norm eval_delay dataloader_num_workers",
    (0, 1e9): "warmup_steps",
    (-1, 1e9): "max_steps",
    (0, 1): "label_smoothing_factor",
    (0, 2**32 - 1): "seed data_seed",
    (1, 1e6): """gradient_accumulation_steps per_device_train_batch_size per_device_eval_batch_size
    eval_accumulation_steps save_total_limit dataloader_prefetch_factor""",
    (1e-9, 1e9): "eval_steps save_steps logging_steps",
}
# Changed, these would change the scores, or a run that was cut off could not go on exactly.
UNFIT = """dataloader_drop_last prediction_loss_only batch_eval_metrics eval_do_concat_batches label_names
save_only_model ignore_data_skip enable_jit_checkpoint use_liger_kernel fsdp deepspeed""".split()


def check_settings(settings: Settings, output_dir: str) -> None:
    """Find, before any long work, what would fail later. Raises SystemExit."""
    for name in ("model_card.md", "app.py", "sample.zip"):
        if not (HERE / "data" / name).is_file():
            stop(f"data/{name} is missing beside finetune_vit.py", f"fetch all of it: git clone {REPOSITORY}")
    sizes = settings.test_size, settings.validation_size
    if not (sizes[0] > 0 and sizes[1] >= 0 and sum(sizes) < 1):  # so written, nan is refused as well
        stop(f"test_size and validation_size are {sizes}", "give shares above 0 that add up to less than 1")
    for name in ("data_url", "data_dir", "data_root", "model_name_or_path", "split_by", "external_dir"):
        value = getattr(settings, name)
        if value is not None and (not value.strip() or re.search(NO_TEXT, value)):
            stop(f"--{name} is empty or no text", "give a value or leave it out")
    if settings.data_dir is not None and not os.path.isdir(settings.data_dir):
        stop(f"--data_dir {settings.data_dir} is not a folder", "give a folder that holds one folder a class")
    for name, folder in (("output_dir", output_dir), ("data_root", settings.data_root)):
        around = Path(folder, "_").resolve().parents
        if settings.data_dir is not None and Path(settings.data_dir).resolve() in around:
            stop(f"--{name} {folder} lies in --data_dir, as if it were a class", "choose one outside of it")
    if settings.data_dir is None and not is_url(settings.data_url) and not os.path.isfile(settings.data_url):
        stop(f"--data_url {settings.data_url} is not a file", "give a URL or the path of an archive")
    if settings.data_dir is None:
        archive_name(settings.data_url)
    if settings.data_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", settings.data_sha256):
        stop(f"--data_sha256 {settings.data_sha256} is no SHA-256", "give 64 hexadecimal digits")
    if settings.data_sha256 is not None and settings.data_dir is not None:
        stop("--data_sha256 is for an archive, not for --data_dir", "leave one of them out")
    if settings.external_dir is not None and not os.path.isdir(settings.external_dir):
        stop(f"--external_dir {settings.external_dir} is not a folder", "give one with one folder a class")
    if settings.split_by not in ("near-duplicates", "random") and not os.path.isfile(settings.split_by):
        stop(f"--split_by {settings.split_by} is not a file", "give near-duplicates, random or a CSV file")
    if settings.cross_validate not in (0, *range(3, 1000)):
        remedy = "give 3 or more: each fold needs images to train, to validate and to test"
        stop(f"--cross_validate is {settings.cross_validate}", remedy)
    if settings.cross_validate and settings.split_by not in ("near-duplicates", "random"):
        stop("--cross_validate cannot make folds from a CSV file", "use --split_by near-duplicates or random")
    if settings.cross_validate and not settings.validation_size:  # the test images would be there twice
        stop("--cross_validate needs validation images", "give a --validation_size above 0")
    for path in settings.predict or ():
        if not os.path.exists(path):
            stop(f"--predict {path} is not there", "give images, folders or archives")
    if settings.demo and not importlib.util.find_spec("gradio"):
        stop("--demo needs Gradio", "pip install gradio")
    if not 0 <= settings.min_steps <= 1e9:
        stop(f"--min_steps is {settings.min_steps}", "give a number of steps; 0 asks for none")
    if not 0 < settings.layer_decay <= 1:
        stop(f"--layer_decay is {settings.layer_decay}", "give a share above 0; 1 is none")
    if wrong := sorted(set(settings.augment.split(",")) - {"", *AUGMENTATIONS}):
        stop(f"--augment does not know {wrong[0]}", f"give any of {','.join(AUGMENTATIONS)}")


def check_training(training: TrainingArguments) -> None:
    """Find, before any long work, what the Trainer would find late, or not. Raises SystemExit."""
    for (low, high), names in RANGES.items():
        for name in names.split():
            value = getattr(training, name)
            if value is not None and not low <= value <= high:  # nan is refused as well
                stop(f"--{name} is {value}", f"give {low:g} to {high:g}")
    if training.hub_strategy != "every_save" or training.hub_always_push:
        remedy = "leave them out: what is finished is pushed"
        stop("--hub_strategy and --hub_always_push have no effect", remedy)
    if not training.output_dir.strip() or re.search(NO_TEXT, training.output_dir):
        stop("--output_dir is empty or no text", "give a folder or leave it out")
    if training.fp16 and training.device.type == "cpu":
        stop("--fp16 needs a GPU", "leave it out, or use --bf16")
    if training.resume_from_checkpoint is not None and not os.path.isdir(training.resume_from_checkpoint):
        stop(f"--resume_from_checkpoint {training.resume_from_checkpoint} is not a folder", "leave it out")
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in ("loss", *METRICS):
        stop(f"unknown --metric_for_best_model {metric}", f"use one of loss, {', '.join(METRICS)}")
    loggers = transformers.integrations.get_available_reporting_integrations()
    if missing := set(training.report_to) - set(loggers):
        names = " ".join(sorted(missing))
        stop(f"--report_to finds no {names}", f"pip install {names}, or --report_to none")
    try:  # what the Trainer makes only after all the preparation
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(training)
        options |= {"lr": training.learning_rate or 1e-5, "weight_decay": training.weight_decay}
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        more = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs or {}}
        transformers.get_scheduler(training.lr_scheduler_type, optimizer, 1, 9, **more)
        if training.torch_compile:
            torch.compile(len, backend=training.torch_compile_backend, mode=training.torch_compile_mode)
    except Exception as problem:
        stop(f"the optimizer refuses these settings: {problem}", HELP)


ARGUMENTS = [] if NOTEBOOK else sys.argv[1:]  # in a notebook write flags here: ["--num_train_epochs", "3"]
if RUN:
    settings, training = read_settings(ARGUMENTS)
TRAIN = RUN and not (settings.predict or settings.demo)  # these use a finished model: see step 11

# %% [markdown]
# ## 1 · Workspace
# The folder `output_dir` belongs to one run. Its `settings.json` says how the run was made, and a run with
# other settings is refused, not mixed in. If it holds a finished model, that is taken; if not, we start from
# the pretrained checkpoint, which is read now, before anything long begins. On Colab, results and archive go
# to Google Drive, which outlives the machine; the many small files stay on the machine, which is fast.

# %%
# These may change between two runs in one folder: where things lie, how they are shown, what computes them.
MAY_DIFFER = """accelerator auto_find bf16 cross_validate data_root dataloader ddp disable do_ evaluate_train
external_dir fp16 gradient_accumulation hub_ include local_rank log output_dir per_device project push
report_to resume run_name save_ tf32 torch_compile trackio use_cpu""".split()


def keep_on_drive(settings: Settings, training: TrainingArguments, drive: Path) -> Path:
    """Return the folder for archives. On Colab that is on Google Drive, and so is a relative `output_dir`.

    `drive` is where Drive is mounted. Raises SystemExit if it is needed and is not.
    """
    output_dir, colab = Path(training.output_dir), False
    with suppress(ModuleNotFoundError):
        colab = importlib.util.find_spec("google.colab") is not None
    if not colab or (output_dir.is_absolute() and not output_dir.is_relative_to(drive)):
        return Path(settings.data_root)
    mount = f"from google.colab import drive; drive.mount('{drive}')"
    if NOTEBOOK:
        importlib.import_module("google.colab.drive").mount(str(drive))
    if not os.path.ismount(drive):  # or all would go to a folder that is lost with the machine
        stop("Google Drive is not mounted", f"run `{mount}` in a cell, or give an absolute --output_dir")
    home = drive / "MyDrive" / "finetune_vit"
    training.output_dir = str(home / output_dir)
    return home


def claim(folder: Path) -> filelock.FileLock:
    """Lock `folder` until this process ends, however it ends. Raises SystemExit if another run has it."""
    lock = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True)  # a cell may be run twice
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if MAIN:
            lock.acquire()
    except filelock.Timeout:
        stop(f"another run is at work in {folder}", "wait for its end, or choose another --output_dir")
    except OSError as problem:
        stop(f"cannot write into {folder}: {problem}", "choose another --output_dir")
    return lock


def start_logging() -> None:
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if MAIN else logging.ERROR)
    logging.raiseExceptions = False  # or a reader that has gone away is reported with a traceback a line
    hub.logging.set_verbosity_error()  # or each attempt to reach the Hub is told twice
    transformers.logging.disable_progress_bar()  # for reading and writing weights: a second, but many lines


def open_workspace(settings: Settings, training: TrainingArguments) -> Path:
    """Return the output folder, new or found again. Raises SystemExit where other results are in the way."""
    output_dir = Path(training.output_dir)
    record = {"settings": dataclasses.asdict(settings), "training": training.to_dict()}
    record |= {"derived": {"images_a_step": images_a_step(training)}, "versions": versions()}
    if "__file__" in globals():
        record["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    path = output_dir / "settings.json"
    kinds = ("checkpoint-*", "report/*", "model.safetensors")
    results = [found.name for kind in kinds for found in output_dir.glob(kind)]
    if results and not path.exists():
        stop(f"{output_dir} holds {results[-1]}, but no settings.json", "choose another --output_dir")
    if results:
        before = read_json(path, ["settings", "training", "derived"], "choose another --output_dir")
        refuse_changes(before, json.loads(json.dumps(record)), output_dir)
        log.info("continuing the run in %s", output_dir)
        if before.get("script_sha256") != record.get("script_sha256"):
            log.warning("warning: %s was begun by another version of this script", output_dir)
        return output_dir
    try:
        write_json(path, record)
    except OSError as problem:
        stop(f"cannot write into {output_dir}: {problem}", "choose another --output_dir")
    return output_dir


def refuse_changes(before: dict, now: dict, output_dir: Path) -> None:
    """Raise SystemExit if a setting that decides the result differs between two records."""
    changed = [
        f"{key} was {before[part][key]}, is {now[part][key]}"
        for part in ("settings", "training", "derived")
        for key in sorted(before[part].keys() & now[part].keys())
        if before[part][key] != now[part][key] and not key.startswith(tuple(MAY_DIFFER))
    ]
    if changed:
        remedy = f"use those, or another --output_dir, or delete {output_dir}"
        stop(f"{output_dir} was made with other settings: {', '.join(changed)}", remedy)


def versions() -> dict[str, str]:
    names = "torch transformers datasets evaluate accelerate scikit-learn huggingface_hub numpy pandas pillow"
    found = {name: importlib.metadata.version(name) for name in names.split()}
    return {"python": platform.python_version()} | found


def choose_checkpoint(settings: Settings, output_dir: Path) -> str:
    """Return the finished model's folder, else the pretrained checkpoint. Raises SystemExit if no ViT."""
    finished = (output_dir / "model.safetensors").exists()
    name = str(output_dir) if finished else settings.model_name_or_path
    log.info("reading the checkpoint %s", name)
    try:
        check_vit(name)
        if finished:
            transformers.TrainerState.load_from_json(output_dir / "trainer_state.json")
    except Exception as problem:  # of any kind, for whatever is damaged in there
        remedy = "check --model_name_or_path and the network, or give a folder"
        if finished:
            remedy = "delete its model.safetensors to make it again from the last checkpoint"
        stop(f"cannot use {name}: {str(problem).strip().splitlines()[0]}", remedy)
    return name


def check_vit(name: str) -> dict[int, str]:
    """Fetch a checkpoint, try its processor, return its id2label. Raises whatever is wrong with it."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    processor = transformers.ViTImageProcessor.from_pretrained(name)
    if config.model_type != "vit":
        raise ValueError(f"it is a {config.model_type}, not a ViT")
    shape, size = pixel_shape(processor), config.image_size
    if shape != (config.num_channels, size, size):
        raise ValueError(f"it prepares {shape} pixels for a {size}-pixel ViT")
    open_weights(name)
    return config.id2label


def open_weights(name: str) -> None:
    """Fetch the weights and read their table of contents. Raises OSError, ValueError, SafetensorError."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    find = functools.partial(transformers.utils.cached_file, name, **optional)
    if weights := find("model.safetensors"):
        with safetensors.safe_open(weights, "pt"):
            return
    if not find("model.safetensors.index.json"):
        raise ValueError("it has no model.safetensors; other formats are pickles, and a pickle can run code")


def open_hub(training: TrainingArguments, settings: Settings) -> str:
    """Return the full name of the model on the Hub, made if need be, once it is sure that it can be pushed.

    Raises SystemExit if not, or if another model has that name.
    """
    training.push_to_hub = False  # the Trainer's own push: unfinished, and without the card
    output_dir, revision = Path(training.output_dir), training.hub_revision
    name, private = training.hub_model_id or output_dir.resolve().name, training.hub_private_repo
    if not hub.get_token():
        stop("--push_to_hub finds no token of the Hub", "run `hf auth login`, or set HF_TOKEN")
    try:
        name = hub.create_repo(name, private=private, exist_ok=True).repo_id
        if revision:
            hub.create_branch(name, branch=revision, exist_ok=True)
        may_write(name, revision)
        found = hub.get_paths_info(name, ["model.safetensors"], revision=revision)
        if settings.hub_space_id:
            space = {"repo_type": "space", "space_sdk": "gradio", "private": private}
            hub.create_repo(settings.hub_space_id, exist_ok=True, **space)
            may_write(settings.hub_space_id, repo_type="space")
    except Exception as problem:  # of many kinds: those of HTTP, of the Hub, of a name
        stop(f"cannot push to {name}: {explain(problem)}", "check the token, the name and the network")
    weights, published = output_dir / "model.safetensors", read_json(output_dir / "report" / "metrics.json")
    ours = published.get("published", {}).get("repo") == name  # an earlier model of this run, perhaps
    ours |= weights.exists() and bool(found) and getattr(found[0].lfs, "sha256", "") == sha256_of(weights)
    if found and not ours:
        remedy = "give another --hub_model_id, or a --hub_revision (branch) for this"
        stop(f"{name} holds another model", remedy)
    return name


def may_write(name: str, revision: str | None = None, repo_type: str = "model") -> None:
    """Raise what the Hub answers if we may not write there. It is asked how a file would be sent, no more."""
    file = hub.CommitOperationAdd("README.md", b"#")
    hub.preupload_lfs_files(name, [file], revision=revision, repo_type=repo_type)


def hidden_cause(problem: BaseException) -> BaseException:
    """Return what went wrong on the way to the Hub, which its client at times hides behind a RuntimeError."""
    return problem.__cause__ or problem if isinstance(problem, RuntimeError) else problem


def explain(problem: BaseException) -> str:
    return str(hidden_cause(problem)) or type(problem).__name__


def pixel_shape(processor: ViTImageProcessor) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the processor makes of an image, by trying it."""
    return tuple(processor(PIL.Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[1:])


if RUN:
    archives = keep_on_drive(settings, training, drive=Path("/content/drive"))
    start_logging()
if TRAIN:
    lock = claim(Path(training.output_dir))
    output_dir = open_workspace(settings, training)
    report = output_dir / "report"
    checkpoint = choose_checkpoint(settings, output_dir)
    on_hub = open_hub(training, settings) if training.push_to_hub and MAIN else None

# %% [markdown]
# ## 2 · Download
# The archive comes once and is unpacked once, each under a temporary name until it is whole. Kvasir v2 has
# 2.3 GB. With `--data_dir` there is nothing to do.


# %%
def locate_images(settings: Settings, archives: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of class folders and what it came from.

    That is `data_dir` and nothing, or the unpacked archive and its url, bytes, mtime_ns and sha256. It is
    downloaded into the folder `archives` and unpacked into `data_root` if need be. Raises SystemExit.
    """
    url, root = settings.data_url, Path(settings.data_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        stop(f"cannot write into {root}: {problem}", "choose another --data_root")
    if settings.data_dir is not None:
        return Path(settings.data_dir).resolve(), {}
    name, stem = archive_name(url)
    archive, folder = archives / name if is_url(url) else Path(url), root / stem
    if folder.is_file():
        stop(f"{folder} is a file, where {name} is to be unpacked", "move it, or use another --data_root")
    with filelock.FileLock(root / ".lock"):  # a second run waits for the first one's download
        if is_url(url) and not folder.exists():
            download(url, archive)
        origin = identify(archive, folder, settings)
        if not folder.exists():
            patiently(unpack, archive, folder, origin)
    return class_root(folder.resolve()), origin


def identify(archive: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """Return url, bytes, mtime_ns and sha256 of `archive`, or what `folder` knows of the one it came from.

    Raises SystemExit if the two disagree, or it is not the archive that `data_sha256` asks for.
    """
    before, now = read_json(folder / ".archive.json", ["sha256"]), {"url": settings.data_url}
    if folder.exists() and not before:  # someone else's
        now = {}
    elif archive.exists():
        status = archive.stat()
        now |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        if now.items() <= before.items():  # the same file: 2 GB need not be read again
            now = before
        else:
            now["sha256"] = patiently(sha256_of, archive)
    elif before.get("url", now["url"]) == now["url"]:
        now = before
    if before and before["sha256"] != now.get("sha256"):
        stop(f"{folder} was unpacked from another archive", f"use another --data_root, or delete {folder}")
    if settings.data_sha256 and settings.data_sha256.lower() != now.get("sha256"):
        remedy = f"delete {archive} and {folder} to start anew, or correct --data_sha256"
        stop(f"the SHA-256 of {archive} is {now.get('sha256', 'not known')}", remedy)
    return now


def download(url: str, archive: Path, timeout: float = 60) -> None:
    """Download `url` to the file `archive`, from where an earlier attempt stopped. Raises SystemExit.

    `timeout`: seconds without a byte. What is there already is kept, if it came from the same URL.
    """
    part, note = (archive.with_name(f".{name}") for name in (f"part-{archive.name}", f"{archive.name}.json"))
    if archive.exists() and read_json(note).get("url", url) != url:
        stop(f"{archive} came from another URL", f"use another --data_root, or delete {archive}")
    if archive.exists():
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    remedy, most, tries = f"run again to go on, or put the file at {archive} by other means", 0, 0
    log.info("downloading %s", url)
    while tries < 6:
        try:
            fetch_rest(url, part, note, timeout)
            break
        except (OSError, ValueError, http.client.HTTPException) as problem:
            size = part.stat().st_size if part.exists() else 0
            most, tries = max(most, size), 1 if size > most else tries + 1
            if tries == 6 or not may_pass(problem):
                stop(f"cannot download {url}: {problem or type(problem).__name__}", remedy)
            asked = str(getattr(problem, "headers", {}).get("Retry-After"))
            wait = min(int(asked) if asked.isdecimal() else 2 ** (tries - 1), 60)
            log.warning("warning: %s; trying again in %s s", problem or type(problem).__name__, wait)
            time.sleep(wait)
    if not (zipfile.is_zipfile(part) or tarfile.is_tarfile(part)):
        remove(part)
        stop(f"what {url} sends is no zip or tar archive", f"put the file at {archive} by other means")
    os.replace(part, archive)
    if url == KVASIR_URL and archive.stat().st_size != KVASIR["bytes"]:
        log.warning("warning: Kvasir v2 had %s bytes, this has %s", KVASIR["bytes"], archive.stat().st_size)


def may_pass(problem: BaseException) -> bool:
    """Say whether a failed download or upload is worth another try."""
    problem = hidden_cause(problem)
    response = getattr(problem, "response", None)  # of the Hub's client
    if status := getattr(problem, "code", None) or getattr(response, "status_code", None):
        return status in (408, 416, 425, 429, 500, 502, 503, 504)
    certificate = isinstance(getattr(problem, "reason", None), ssl.SSLCertVerificationError)
    return not (certificate or isinstance(problem, ValueError) or file_error(problem) in LASTING)


def fetch_rest(url: str, part: Path, note: Path, timeout: float) -> None:
    """Append to `part` what it lacks of `url`; start over where the server has another file, or no ranges.

    `note` keeps what identifies the file: its ETag or date. Raises OSError, ValueError, HTTPException.
    """
    known, start = read_json(note), part.stat().st_size if part.exists() else 0
    start *= known.get("url") == url
    if start and start == known["size"]:
        return
    headers = {"User-Agent": "finetune_vit", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    headers |= {"If-Range": known["validator"]} if start and known["validator"] else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as problem:
        if problem.code == 416:  # there is no such rest: another file
            remove(part)
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the server sends a web page, not an archive")
        start *= response.status == 206
        size = start + int(response.headers.get("Content-Length") or 0)
        tag = response.headers.get("ETag", "W/")
        dated = response.headers.get("Last-Modified")
        validator = dated if tag.startswith("W/") else tag  # a weak tag would not do
        rest = str(response.headers.get("Content-Range")).startswith(f"bytes {start}-")
        if start and not (rest and size == (known["size"] or size)):
            remove(part)
            raise ConnectionError("the server does not send the rest of the same file")
        need_space(part.parent, size - start)
        write_json(note, {"url": url, "size": size if size > start else None, "validator": validator})
        options = {"total": size or None, "initial": start, "unit": "B", "unit_scale": True}
        with part.open("ab" if start else "wb") as file, tqdm(desc=url.split("/")[-1], **options) as bar:
            while block := response.read1(1 << 20):
                bar.update(file.write(block))
    if size > start and part.stat().st_size != size:
        raise ConnectionError(f"{part.stat().st_size:,} of {size:,} bytes came")


def unpack(archive: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Unpack a zip or tar archive into the new `folder`, with a progress bar.

    Raises SystemExit where the archive is damaged or hostile, and OSError.
    """
    log.info("unpacking %s", archive)
    try:
        with whole(folder) as part:
            part.mkdir()
            with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as file:
                is_zip = isinstance(file, zipfile.ZipFile)
                members = list(refuse_hostile(file.infolist() if is_zip else file, archive))
                if not is_zip:
                    check_end(file)
                need_space(part, sum(m.file_size if is_zip else m.size for m in members))
                for member in tqdm(members, desc=archive.name, unit=" files"):
                    file.extract(member, part, **({} if is_zip else {"filter": "data"}))
            write_json(part / ".archive.json", origin)
    except Exception as problem:  # of many kinds, by what is wrong with it
        if file_error(problem) in PASSING | LASTING:
            raise
        stop(f"cannot unpack {archive}: {problem}", "delete it if it is damaged")


def check_end(archive: tarfile.TarFile) -> None:
    """Raise EOFError or OSError unless all of it is there: `tarfile` takes any damaged header for its end."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end, a block of zeros, is missing")
    while archive.fileobj.read(1 << 20):  # to where a compressed file keeps its checksum
        pass


def refuse_hostile(members: Iterable[Any], archive: Path) -> Iterator[zipfile.ZipInfo | tarfile.TarInfo]:
    """Pass on the members of an archive, as long as they are what image archives hold. Raises ValueError."""
    total, seen, most = 0, {}, max(100 * archive.stat().st_size, 1 << 30)  # bytes; JPEGs hardly shrink
    for count, member in enumerate(members, 1):
        if isinstance(member, zipfile.ZipInfo):
            name, size, folder = member.filename, member.file_size, member.is_dir()
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        else:
            name, size, folder = member.name, member.size, member.isdir()
            plain = folder or member.isreg()
        path, total = PurePosixPath(name), total + size
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name.split("/")[0]:
            raise ValueError(f"{name!r} would lead out of its folder")
        if not plain:
            raise ValueError(f"{name!r} is a link or a device")
        if count > 200_000 or total > most:
            raise ValueError(f"{count:,} files of {total:,} bytes and more are no archive of images")
        for part in [path, *path.parents]:  # on disks that take A and a for the same, one would be lost
            before = seen.setdefault(unicodedata.normalize("NFC", str(part)).casefold(), part)
            if before != part or (part is path and before is not part and not folder):
                raise ValueError(f"{str(part)!r} and {str(before)!r} have the same name")
        yield member


def class_root(folder: Path) -> Path:
    """Descend while a folder holds one folder, and that holds folders: so archives wrap class folders."""
    inside = [entry for entry in visible(folder) if entry.is_dir()]
    wrapped = len(inside) == 1 and any(entry.is_dir() for entry in visible(inside[0]))
    return class_root(inside[0]) if wrapped else folder


def visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(HIDDEN)]


if TRAIN:
    with training.main_process_first(local=False):  # under torchrun the others wait, then find its result
        image_folder, origin = locate_images(settings, archives)

# %% [markdown]
# ## 3 · Load
# `datasets` reads the folder as an *imagefolder*: one folder a class, its name the label. Nothing is decoded
# yet. Where folders are nested unevenly, labels go wrong silently: so the names must agree with the folders.

# %%
KVASIR = {  # its terms and citation are in data/model_card.md
    "name": "Kvasir v2",
    "homepage": "https://datasets.simula.no/kvasir/",
    "classes": """dyed-lifted-polyps dyed-resection-margins esophagitis normal-cecum normal-pylorus
    normal-z-line polyps ulcerative-colitis""".split(),
    "images_per_class": 1000,
    "bytes": 2_489_312_085,  # of the archive
}


def record_data(images: Dataset, folder: Path, origin: dict[str, Any], output_dir: Path) -> None:
    """Note in settings.json what is trained on. Raises SystemExit if results there are of other images."""
    sizes = [(folder / file).stat().st_size for file in images["file"]]
    listing = json.dumps([images["file"][:], images["label"][:], sizes]).encode()
    data = {"images": len(images), "files_sha256": hashlib.sha256(listing).hexdigest()}
    data |= {f"archive_{name}": origin[name] for name in ("bytes", "sha256") if name in origin}
    record = read_json(output_dir / "settings.json")
    before = record.get("data", data)
    if before["files_sha256"] != data["files_sha256"]:
        remedy = f"use another --output_dir, or delete {output_dir}"
        stop(f"{output_dir} was made from other images than those in {folder}", remedy)
    if "data" not in record:
        write_json(output_dir / "settings.json", record | {"data": data})


def is_kvasir(folder: Path) -> bool:
    return folder.name == "kvasir-dataset-v2"


def list_images(folder: Path) -> list[str]:
    """Return the paths of all image files below `folder`; leave out, by name, what cannot be one."""
    paths, kinds = [], tuple(datasets.packaged_modules.imagefolder.ImageFolder.EXTENSIONS)
    seen = {os.path.realpath(folder)}  # links may lead in circles
    for root, folders, names in os.walk(folder, followlinks=True):
        found = [name for name in sorted(folders, reverse=True) if not name.startswith(HIDDEN)]
        inside = {os.path.realpath(os.path.join(root, name)): name for name in found}
        folders[:] = [name for path, name in inside.items() if path not in seen]
        seen.update(inside)
        for name in names:
            path = os.path.join(root, name)
            if name.startswith(HIDDEN) or not name.lower().endswith(kinds):
                continue
            if not os.path.isfile(path) or re.search("::|://|[\ud800-\udfff]", path):  # not UTF-8, or a URL
                log.warning("left out, no file or a name that `datasets` cannot take: %r", path)
            else:
                paths.append(path)
    return paths


def load_images(folder: Path) -> Dataset:
    """Return the images of a folder of class folders, ordered by name, not decoded.

    Columns: `file`, str, relative to `folder`, with forward slashes; `label`, ClassLabel of the sorted folder
    names. Raises SystemExit where the two disagree.
    """
    remedy = "give a folder that holds one folder a class"
    paths = list_images(folder)
    if not paths:
        stop(f"no images in {folder}", remedy)
    datasets.disable_progress_bars()  # they would call it a download
    try:  # one split of these files, or a folder called test becomes a split and a metadata file decides
        with tempfile.TemporaryDirectory() as cache:  # a list of names: nothing to keep
            images = datasets.load_dataset(
                "imagefolder", data_files={"train": [glob.escape(path) for path in paths]}, split="train",
                drop_labels=False, cache_dir=cache, keep_in_memory=True,
            )  # fmt: skip
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError) as problem:
        stop(f"cannot load {folder}: {problem}", remedy)
    finally:
        datasets.enable_progress_bars()
    images = images.cast_column("image", datasets.Image(decode=False))
    files = [Path(os.path.relpath(image["path"], folder)).as_posix() for image in images["image"]]
    images = images.remove_columns("image").add_column("file", files).select(np.argsort(files))
    check_classes(images, folder)
    return images


def check_classes(images: Dataset, folder: Path) -> None:
    """Raise SystemExit unless every image lies in the folder of its class, and every folder holds images."""
    names = images.features["label"].names
    for file, label in zip(images["file"], images["label"], strict=True):
        if file.split("/")[0] != names[label]:
            remedy = "give a folder with one folder a class, and a split of your own with --split_by"
            stop(f"{file} in {folder} is not directly in a class folder", remedy)
    empty = {entry.name for entry in visible(folder) if entry.is_dir()} - set(names)
    if empty:
        stop(f"no images in {', '.join(sorted(empty))}", "fill or delete these folders")
    if reserved := sorted(set(names) & set(COLUMNS)):
        stop(f"a class is called {reserved[0]}, as a column of predictions.csv is", "rename its folder")
    if len(names) < 2:
        stop(f"{folder} holds one class only", "give a folder that holds one folder a class")
    counts = count_classes(images)
    expected = dict.fromkeys(KVASIR["classes"], KVASIR["images_per_class"])
    if is_kvasir(folder) and counts != expected:
        missing = {name: n - counts.get(name, 0) for name, n in expected.items() if counts.get(name) != n}
        log.warning("warning: Kvasir v2 has 8 classes of 1,000 images; missing here: %s", missing)


def load_external(settings: Settings, class_names: list[str]) -> Dataset:
    """Return the images in `external_dir` of the classes we know, our labels. Raises SystemExit if none."""
    folder = Path(settings.external_dir).resolve()
    images = load_images(folder)
    names = [images.features["label"].names[label] for label in images["label"]]
    known = {name: label for label, name in enumerate(class_names)}
    if not known.keys() & set(names):
        stop(f"no class folder in {folder} is named like ours", f"ours are {', '.join(class_names)}")
    if unknown := sorted(set(names) - known.keys()):
        log.warning("left out of %s: classes that the model does not know: %s", folder, ", ".join(unknown))
    rows = [(file, known[name]) for file, name in zip(images["file"], names, strict=True) if name in known]
    files, labels = zip(*rows, strict=True)
    features = {"file": datasets.Value("string"), "label": datasets.ClassLabel(names=class_names)}
    content = {"file": files, "label": labels}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def count_classes(images: Dataset) -> dict[str, int]:
    counts = Counter(images["label"])
    return {name: counts[label] for label, name in enumerate(images.features["label"].names)}


if TRAIN:
    with training.main_process_first(local=False):
        images = load_images(image_folder)
        class_names = images.features["label"].names
        record_data(images, image_folder, origin, output_dir)
        external = load_external(settings, class_names) if settings.external_dir else None
    log.info("%s images in %s classes: %s", f"{len(images):,}", len(class_names), ", ".join(class_names))

# %% [markdown]
# ## 4 · Preprocess
# Every file is decoded once, turned upright and to RGB, and resized by the checkpoint's `ViTImageProcessor`.
# The pixels stay uint8 (150,528 bytes an image at 224 pixels), in an Arrow file that is read memory-mapped;
# rescaling and normalising wait until they are on the device. What cannot be read is named and left out. This
# comes before the split, since only what can be read can be split.


# %%
def prepare_pixels(images: Dataset, folder: Path, processor: ViTImageProcessor, cache_dir: Path) -> Dataset:
    """Return `images` with their pixels, from the cache unless files, labels or processor have changed.

    New columns: `mode`, str, the file's mode in Pillow; `error`, str, why it could not be read, else empty;
    `pixel_values`, bytes of a uint8 array (channels, height, width), null where it could not be read.
    """
    stats = [(folder / file).stat() for file in images["file"]]
    sizes = [(s.st_size, s.st_mtime_ns) for s in stats]
    code = [inspect.getsource(step) for step in (decode_file, read_rgb, resize)]
    code += [importlib.metadata.version(name) for name in ("pillow", "simplejpeg", "torch", "transformers")]
    state = str(folder), sizes, images.to_dict(), processor.to_json_string(), code
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    path = cache_dir / f"pixels-{key}.arrow"
    found, start = is_whole(path), time.perf_counter()
    if not found:
        remove(path)
        cache_dir.mkdir(parents=True, exist_ok=True)
        need_space(cache_dir, len(images) * math.prod(pixel_shape(processor)))
    new = {"mode": "string", "error": "string", "pixel_values": "binary"}
    features = images.features | {name: datasets.Value(kind) for name, kind in new.items()}
    pixels = images.map(
        functools.partial(decode_files, folder=folder, processor=processor),
        input_columns="file", batched=True, batch_size=256, writer_batch_size=256, desc="prepare",
        features=datasets.Features(features), new_fingerprint=key,
        cache_file_name=str(path),  # `datasets` renames it to this once it is whole
    )  # fmt: skip
    if not found:
        speed = len(images) / (time.perf_counter() - start)
        write_json(path.with_suffix(".json"), {"images_per_second": speed})
    return pixels


def is_whole(path: Path) -> bool:
    """Say whether there is an Arrow file that can be read to its end."""
    try:
        return path.exists() and len(datasets.Dataset.from_file(str(path))) > 0
    except (OSError, ValueError):  # pyarrow's
        log.warning("warning: %s is damaged and will be made again", path)
        return False


def decode_files(files: list[str], folder: Path, processor: ViTImageProcessor) -> dict[str, list]:
    """Decode on all cores: decoders work outside Python's lock, and threads suit a notebook."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for one image: the images go to all cores
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(lambda file: decode_file(folder / file, processor), files))
    torch.set_num_threads(threads)
    return {name: [row[name] for row in rows] for name in rows[0]}


def decode_file(path: Path, processor: ViTImageProcessor) -> dict[str, str | bytes | None]:
    """Return the mode, error and pixels of one file, see `prepare_pixels`.

    Raises OSError only where the disk fails: that says nothing about the image, so no cache must keep it.
    """
    content = io.BytesIO(patiently(path.read_bytes))
    try:
        with PIL.Image.open(content) as image:
            if image.mode[0] in "IF":
                raise ValueError(
                    "more than 8 bits a pixel: convert it, as `pipeline` would cut it off at 255"
                )
            pixels = resize(read_rgb(image, content), processor)
            return {"mode": image.mode, "error": "", "pixel_values": pixels.numpy().tobytes()}
    except Exception as problem:  # on damaged files a decoder may raise anything
        text = re.sub(" <_io.*>", "", str(problem))  # an address in memory says nothing
        return {"mode": "", "error": f"{type(problem).__name__}: {text}", "pixel_values": None}


def read_rgb(image: PIL.Image.Image, content: io.BytesIO) -> np.ndarray:
    """Return an image upright and in RGB, uint8 (height, width, 3), as `load_image` of `pipeline` does.

    Plain JPEGs take a shorter road to the same pixels; of those that it finds damaged Pillow decides.
    """
    upright = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
    if image.format == "JPEG" and image.mode == "RGB" and upright:
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(content.getbuffer())
    return np.array(transformers.image_utils.load_image(image))


def resize(rgb: np.ndarray, processor: ViTImageProcessor) -> torch.Tensor:
    """Return uint8 (channels, height, width) of what `processor` makes of it before it rescales.

    Shrinking alone is done as its torchvision back end does it, but without torchvision. Its Pillow back end,
    which takes three times as long, rounds two values in a thousand the other way, by one grey level.
    """
    numbers, modes = processor.to_dict(), {2: "bilinear", 3: "bicubic"}
    shape = [numbers["size"].get(name) or np.inf for name in ("height", "width")]
    mode = modes.get(numbers.get("resample")) if numbers.get("do_resize") else None
    if not mode or numbers.get("do_center_crop") or rgb.shape[0] < shape[0] or rgb.shape[1] < shape[1]:
        image, kept = PIL.Image.fromarray(rgb), {"do_rescale": False, "do_normalize": False}
        return processor(image, return_tensors="pt", **kept)["pixel_values"][0]
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    return F.interpolate(image, shape, mode=mode, antialias=True)[0]


def keep_readable(pixels: Dataset) -> Dataset:
    """Leave out, by name, what could not be read."""
    files, errors = pixels["file"][:], np.array(pixels["error"])
    for row in np.flatnonzero(errors != ""):
        log.warning("left out, unreadable: %r (%s)", files[row], errors[row])
    for mode, count in Counter(pixels["mode"]).items():
        if mode not in ("RGB", ""):
            log.info("converted to RGB: %s of mode %s", count, mode)
    return pixels.select(np.flatnonzero(errors == "")).remove_columns(["mode", "error"])


def pixels_of(files: Iterable[str], images: Dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the prepared pixels of `files`, uint8 (n, height, width, channels)."""
    row = {file: row for row, file in enumerate(images["file"])}
    pixels = images.select([row[file] for file in files])["pixel_values"][:]
    return np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *shape).transpose(0, 2, 3, 1)


def show_examples(images: Dataset, folder: Path, shape: tuple[int, int, int]) -> None:
    """Show, in a notebook, an image of each class: the file, and what the model gets of it."""
    rows = images.select(np.unique(images["label"][:], return_index=True)[1][:12])
    files, names = rows["file"][:], images.features["label"].names
    originals = (np.array(transformers.image_utils.load_image(str(folder / file))) for file in files)
    show_images("the files", originals, names)
    show_images(f"what the model gets: {shape}", pixels_of(files, rows, shape), names)


if TRAIN:
    processor = transformers.ViTImageProcessor.from_pretrained(checkpoint)
    with training.main_process_first(local=False):
        pixels = prepare_pixels(images, image_folder, processor, Path(settings.data_root) / "cache")
    readable = keep_readable(pixels)
    show_examples(readable, image_folder, pixel_shape(processor))

# %% [markdown]
# ## 5 · Split
# Train to learn, validation to choose the best epoch, test to be read once, at the end. Frames of one
# examination can be nearly the same picture: on both sides of the line they make the score a test of memory.
# So near-duplicates form groups, and a group stays whole. `near_duplicates.csv` and `split.csv` record them,
# the same on every machine; `split.csv` can itself be given to `--split_by`.

# %%
NEAR = 0.04  # how far apart two frames of one scene may be, see `compare`; the README has the evidence


def find_near_duplicates(images: Dataset, shape: tuple[int, int, int], path: Path) -> pd.DataFrame:
    """Return the pairs of near-duplicates, recorded in the CSV file `path`, or found there.

    Columns: file_a, file_b, distance (see `compare`), label_a, label_b. Near first.
    """
    columns = ["file_a", "file_b", "distance", "label_a", "label_b"]
    if path.exists():
        return read_table(path, columns)
    views = thumbnails(images, shape)
    names = np.array(images.features["label"].names, dtype=object)
    of = pd.DataFrame({"file": images["file"][:], "label": names[images["label"][:]]})
    pairs = compare(views, views).join(of.add_suffix("_a"), on="a").join(of.add_suffix("_b"), on="b")
    return write_table(path, pairs[columns])


def thumbnails(images: Dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images averaged to 28 x 28 pixels, uint8 (n, 28, 28, 3)."""
    views = np.empty((len(images), 28, 28, shape[0]), np.uint8)
    for row, pixels in enumerate(tqdm(images["pixel_values"], desc="look for near-duplicates")):
        view = PIL.Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(shape).transpose(1, 2, 0))
        views[row] = view.resize((28, 28), PIL.Image.Resampling.BOX)
    return views


def compare(first: np.ndarray, second: np.ndarray) -> pd.DataFrame:
    """Return the pairs (a in first, b in second) of thumbnails at most NEAR apart: columns a, b, distance.

    The distance is 1 - the correlation of 8 x 8 colour cells, the smallest of nine shifts by up to 1/28 of
    the picture. Its rim is left out: black borders are alike everywhere. float64 holds all these sums
    exactly, so that their order, and with it the machine, changes nothing. A picture without texture has no
    correlation and no pair. Where first is second, a < b. Of more than 100 partners, as in a video, each `a`
    keeps the nearest. Near first.
    """

    def cells(views: np.ndarray, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        window = views[:, top : top + 24, left : left + 24].reshape(len(views), 8, 3, 8, 3, -1)
        sums = window.sum((2, 4), dtype=np.float64)
        sums = (sums - sums.mean((1, 2), keepdims=True)).reshape(len(views), -1)
        return sums, np.sqrt((sums**2).sum(1))

    (query, length), same, found = cells(first, 2, 2), first is second, []
    shifted = [cells(second, top, left) for top, left in itertools.product((1, 2, 3), repeat=2)]
    for start in range(0, len(query), 128):
        rows, rest = slice(start, start + 128), slice(start * same, None)
        with np.errstate(invalid="ignore"):
            products = (query[rows] @ cell[rest].T / size[rest] for cell, size in shifted)
            distance = 1 - functools.reduce(np.fmax, products) / length[rows, None]
        near = np.triu(distance <= NEAR, 1) if same else distance <= NEAR
        for row in np.flatnonzero(near.sum(1) > 100):
            near[row, np.argsort(np.where(near[row], distance[row], np.inf), kind="stable")[100:]] = False
        a, b = np.nonzero(near)
        pairs = {"a": a + start, "b": b + start * same, "distance": distance[a, b].clip(0).round(6)}
        found.append(pd.DataFrame(pairs))
    return pd.concat(found).sort_values(["distance", "a", "b"], ignore_index=True)


def group_images(files: list[str], pairs: pd.DataFrame) -> pd.Series:
    """Return the group, int, of each of `files` (the index): whatever a chain of near-duplicates connects.

    Chains can run away in large folders: a group of more than a tenth of the images, and more than 50, is
    connected anew at smaller and smaller distances.
    """
    row = {file: row for row, file in enumerate(files)}
    pairs = pairs[pairs["file_a"].isin(row) & pairs["file_b"].isin(row)]
    a, b = (pairs[name].map(row).to_numpy(int) for name in ("file_a", "file_b"))
    keep, distance = np.full(len(pairs), True), pairs["distance"].to_numpy()
    for closer in (0.75, 0.5, 0.25, 0):
        links = scipy.sparse.coo_array((keep[keep], (a[keep], b[keep])), shape=(len(files), len(files)))
        group = scipy.sparse.csgraph.connected_components(links, directed=False)[1]
        large = np.bincount(group)[group] > max(50, len(files) / 10)
        keep &= ~large[a] | (distance <= closer * NEAR)
    return pd.Series(group, files)


def split_images(
    images: Dataset, groups: pd.Series, settings: Settings, seed: int, path: Path
) -> DatasetDict:
    """Return the train, validation and test rows of `images`, recorded in the CSV file `path`.

    A split that is recorded there already is taken again. Raises SystemExit where no split is possible.
    """
    files, labels, names = images["file"][:], np.array(images["label"]), images.features["label"].names
    sizes = 1 - settings.test_size - settings.validation_size, settings.validation_size, settings.test_size
    shares = {name: size for name, size in zip(SPLITS, sizes, strict=True) if size}
    total = np.bincount(labels, minlength=len(names))
    if min(total) < len(SPLITS):
        stop(f"too few readable images of {names[total.argmin()]}", "each class needs 3, one for each split")
    kept_whole = units(groups, settings)
    fewest, scarce = min((len(set(kept_whole[labels == label])), name) for label, name in enumerate(names))
    if fewest < settings.cross_validate:
        text = f"--cross_validate {settings.cross_validate}, but only {fewest} groups of images of {scarce}"
        stop(text, "give fewer folds: each tests every class")
    decided = None if settings.split_by in ("near-duplicates", "random") else Path(settings.split_by)
    if path.exists() or decided:
        split = split_by_file(files, path if path.exists() else decided)
        if path.exists() and decided and (split != split_by_file(files, decided)).any():
            stop(f"{decided} has changed since {path} was made of it", "use another --output_dir")
    else:
        if fewest < len(SPLITS):
            remedy = "add other images, or decide yourself with --split_by FILE.csv"
            stop(f"too few groups of near-duplicates in {scarce}: each class needs 3", remedy)
        split = np.array([*shares], dtype=object)[share_out(labels, kept_whole, [*shares.values()], seed)]
    for name, size in shares.items():
        counts = np.bincount(labels[split == name], minlength=len(names))
        absent = ", ".join(np.array(names)[counts == 0])
        if absent and (name == "train" or not counts.any()):
            stop(f"no {name} images of {absent}", "change the split's sizes or CSV file")
        if absent:
            log.warning("warning: no %s images of %s: no %s score counts them", name, absent, name)
        far = np.abs(counts - size * total) > np.maximum(0.02 * total, 1)
        if far.any() and settings.split_by == "near-duplicates":
            held = ", ".join(f"{names[i]} {counts[i] / total[i]:.0%}" for i in np.flatnonzero(far))
            log.warning("warning: groups are too large for %.0f%% in %s: %s", 100 * size, name, held)
    if not path.exists():
        table = {"file": files, "label": np.array(names)[labels], "split": split, "group": groups.to_numpy()}
        write_table(path, pd.DataFrame(table)[split != ""])
    rows = {name: np.flatnonzero(split == name) for name in SPLITS}
    if not len(rows["validation"]):
        log.warning("warning: the test images choose the epoch and the temperature, which flatters the score")
        rows["validation"] = rows["test"]
    return datasets.DatasetDict({name: images.select(rows[name]) for name in SPLITS})


def units(groups: pd.Series, settings: Settings) -> np.ndarray:
    """Return what a split must keep whole: the groups, or for a random split each image by itself (n,)."""
    return np.arange(len(groups)) if settings.split_by == "random" else groups.to_numpy()


def share_out(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Return the part, 0 to len(shares) - 1, of each image (n,): whole groups, `shares` of every class.

    Groups are dealt out by size, large ones first, in an order drawn from `seed`; each goes where it raises
    Pearson's chi-squared against the shares least. scikit-learn's StratifiedGroupKFold has equal shares only.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((groups.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, labels), 1)
    wanted = np.maximum(np.outer(shares, counts.sum(0)), 1)  # at least one image of each class in each part
    held, part = np.zeros_like(wanted), np.empty(len(counts), int)
    order = np.random.RandomState(seed).permutation(len(counts))  # the same in every release of NumPy
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")]:
        part[group] = (counts[group] * (counts[group] + 2 * held) / wanted).sum(1).argmin()
        held[part[group]] += counts[group]
    return part[groups]


def split_by_file(files: list[str], path: Path) -> np.ndarray:
    """Return what column split of the CSV file `path` says of each file, "" if nothing. Raises SystemExit."""
    table = read_table(path, ["file", "split"], "give a CSV file with columns file, split")
    chosen = dict(zip(table["file"], table["split"], strict=True))
    if len(chosen) != len(table):
        stop(f"{path} names {len(table) - len(chosen)} files twice", "give each file one line")
    if wrong := sorted(set(chosen.values()) - set(SPLITS)):
        stop(f"{path} has unknown splits {wrong}", f"use {', '.join(SPLITS)}")
    if unknown := sorted(chosen.keys() - set(files)):
        stop(f"{path} names {len(unknown)} absent or unreadable files: {unknown[0]} …", "take them out")
    if len(chosen) < len(files):
        log.warning("left out: %s images that %s does not name", len(files) - len(chosen), path)
    return np.array([chosen.get(file, "") for file in files], dtype=object)


def count_pairs(pairs: pd.DataFrame, groups: pd.Series, splits: DatasetDict) -> dict[str, int]:
    """Return how many groups and near-identical pairs there are, across two splits, with two labels."""
    side = {file: name for name, part in splits.items() for file in part["file"]}
    pairs = pairs[pairs["file_a"].isin(side) & pairs["file_b"].isin(side)]
    a, b = pairs["file_a"].map(side), pairs["file_b"].map(side)
    return {
        "groups": groups[list(side)].nunique(),
        "near_duplicate_pairs": len(pairs),
        "pairs_across_splits": int((a != b).sum()),
        "pairs_across_test": int(((a == "test") != (b == "test")).sum()),
        "conflicting_label_pairs": int((pairs["label_a"] != pairs["label_b"]).sum()),
    }


def show_splits(pairs: pd.DataFrame, groups: pd.Series, splits: DatasetDict) -> None:
    table = pd.DataFrame({name: count_classes(part) for name, part in splits.items()})
    show(pd.concat([table, table.sum().to_frame("total").T]))
    counts = count_pairs(pairs, groups, splits)
    text = "%(groups)s groups; %(near_duplicate_pairs)s near-identical pairs, %(pairs_across_splits)s of them"
    log.info(text + " on two sides, %(conflicting_label_pairs)s with different labels", counts)
    if counts["pairs_across_test"]:
        text = "warning: the score will be optimistic: %s pairs join a test image to one that is not"
        log.warning(text, counts["pairs_across_test"])


if TRAIN:
    with training.main_process_first(local=False):
        pairs = find_near_duplicates(readable, pixel_shape(processor), report / "near_duplicates.csv")
        groups = group_images(readable["file"][:], pairs)
        splits = split_images(readable, groups, settings, training.seed, report / "split.csv")
    show_splits(pairs, groups, splits)

# %% [markdown]
# ## 6 · Model
# The pretrained ViT with a new head for our classes. Its weights are float32 whatever the checkpoint holds:
# mixed precision computes in 16 bits, but small updates would vanish in 16-bit weights. A hook rescales and
# normalises the cached uint8 pixels on the device: one place for training and evaluation. While the model
# trains, it also varies each image as `--augment` says.


# %%
def load_model(
    checkpoint: str, class_names: list[str], processor: ViTImageProcessor, seed: int, kinds: str = ""
) -> ViTForImageClassification:
    """Return the checkpoint as a float32 classifier of uint8 `pixel_values` (n, channels, height, width).

    Its head is kept if it was trained on the same classes in the same order, else drawn anew from `seed`.
    `kinds` of augmentation, see `augment`, vary the images while it trains. Raises SystemExit if other
    weights are missing.
    """
    id2label, config = dict(enumerate(class_names)), transformers.AutoConfig.from_pretrained(checkpoint)
    transformers.logging.set_verbosity_error()  # or a new head is reported as a mismatch
    model, found = transformers.ViTForImageClassification.from_pretrained(
        checkpoint,
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    same = config.id2label == id2label
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    if lacking := sorted(name for name in drawn if same or not name.startswith("classifier.")):
        text = f"the weights in {checkpoint} are not those of its config.json: {lacking[0]} is missing"
        stop(f"{text} or of another size", "use another --model_name_or_path")
    if not same:
        transformers.set_seed(seed)
        torch.nn.init.trunc_normal_(model.classifier.weight, std=config.initializer_range)
        torch.nn.init.zeros_(model.classifier.bias)
        model.config.calibration_temperature = 1.0  # or that of another head stays
    model.new_head = not same
    head = "its own" if same else "a new"
    log.info("%s: %.1f million parameters, %s head", checkpoint, model.num_parameters() / 1e6, head)
    normalise_on_device(model, processor, kinds)
    return model


def normalise_on_device(
    model: ViTForImageClassification, processor: ViTImageProcessor, kinds: str = ""
) -> None:
    """Let `model` turn uint8 pixels into what `processor` would make of them; floats pass unchanged."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):  # in grey levels; they move along, unsaved
        model.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1) / scale, persistent=False)

    def normalise(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = kwargs["pixel_values"]
        if pixels.dtype == torch.uint8:  # ViT would take them as they are and learn little
            pixels = augment(pixels, kinds) if module.training and kinds else pixels
            kwargs["pixel_values"] = (pixels - module.pixel_mean) / module.pixel_std
        return args, kwargs

    model.register_forward_pre_hook(normalise, with_kwargs=True)


def augment(pixels: torch.Tensor, kinds: str) -> torch.Tensor:
    """Return the images, float32 (n, channels, size, size) from uint8, each varied by draws of its own.

    flip: mirrored, one in two. turn: by 0 to 3 quarters. crop: a square of 0.8 to 1 of the side, anywhere,
    enlarged. colour: saturation, contrast and brightness, each times 0.8 to 1.2. All on the device, without
    waiting for it; geometry in one step of interpolation, exact where there is no crop.
    """

    def draw(kind: str, low: float, high: float, off: float) -> torch.Tensor:
        values = torch.empty(len(pixels), 1, 1, device=pixels.device)
        return values.uniform_(low, high) if kind in kinds else values.fill_(off)

    mirror, side = 1 - 2 * draw("flip", 0, 2, 0).floor(), draw("crop", 0.8, 1, 1)
    quarter = draw("turn", 0, 4, 0).floor() * (torch.pi / 2)
    left, top = (draw("crop", -1, 1, 0) * (1 - side) for _ in range(2))
    cos, sin = side * quarter.cos(), side * quarter.sin()
    ruler = (2 * torch.arange(pixels.shape[-1], device=pixels.device) + 1) / pixels.shape[-1] - 1
    x, y = mirror * ruler, ruler[:, None]  # affine_grid has a matrix product: coarse in mixed precision
    grid = torch.stack([cos * x - sin * y + left, sin * x + cos * y + top], dim=-1)
    images = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    if "colour" in kinds:
        saturation, contrast, brightness = (draw("colour", 0.8, 1.2, 1)[..., None] for _ in range(3))
        images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast) * brightness
    return images.clamp(0, 255)


if TRAIN:
    model = load_model(checkpoint, class_names, processor, training.seed, settings.augment)

# %% [markdown]
# ## 7 · Fine-tune
# A head is fitted to the pretrained features; then the `Trainer` tunes all layers, in the precision that
# the hardware is fast at. After each epoch it evaluates on the validation images and saves a checkpoint, from
# which a run that was cut off goes on. The best epoch's weights end up where
# `transformers.pipeline("image-classification", output_dir)` finds them. Ctrl-C saves a checkpoint, too. Each
# one lists its files' checksums: a damaged one is set aside.


# %%
def classification_scores(labels: np.ndarray, guesses: np.ndarray) -> dict[str, float]:
    """Return METRICS of int labels (n,) and guesses (n,); a class that neither has does not count.

    As scikit-learn defines them; its functions take 30 times as long, too long for the bootstrap.
    """
    classes, n = max(labels.max(), guesses.max()) + 1, len(labels)
    counts = np.bincount(labels * classes + guesses, minlength=classes**2).reshape(classes, classes)
    hits, true, guessed = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    both = true + guessed
    rows = np.stack([hits / guessed.clip(1), hits / true.clip(1), 2 * hits / both.clip(1)])
    averages = [*rows[:, both > 0].mean(axis=1), *np.average(rows, axis=1, weights=true)]  # macro, weighted
    spread = math.sqrt(n**2 - true @ true) * math.sqrt(n**2 - guessed @ guessed)
    mcc = (n * hits.sum() - true @ guessed) / spread if spread else 0.0
    return dict(zip(METRICS, map(float, (hits.sum() / n, *averages, mcc)), strict=True))


def classification_metric() -> evaluate.Metric:
    """Return METRICS as a metric of `evaluate`. Local, because `evaluate.load` runs code from the Hub."""

    class Classification(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            labels = datasets.Value("int64")
            features = datasets.Features({"predictions": labels, "references": labels})
            return evaluate.MetricInfo(description="METRICS", citation="", features=features)

        def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
            return classification_scores(np.array(references), np.array(predictions))

    return Classification(keep_in_memory=True)


def compute_metrics(outputs: EvalPrediction) -> dict[str, float]:
    """Score logits (n, classes) against labels (n,)."""
    metric = classification_metric()
    return metric.compute(predictions=outputs.predictions.argmax(-1), references=outputs.label_ids)


def collate(rows: list[dict], shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Join rows of the cache into `pixel_values`, uint8 (n, *shape), and `labels`, int64 (n,)."""
    pixels = torch.frombuffer(bytearray().join(row["pixel_values"] for row in rows), dtype=torch.uint8)
    return {"pixel_values": pixels.view(-1, *shape), "labels": torch.tensor([row["label"] for row in rows])}


def epoch_log() -> TrainerCallback:
    """Return what logs a line and the speed of each epoch; it raises SystemExit if a loss is not finite."""

    class EpochLog(transformers.TrainerCallback):
        SHOWN = {"loss": "training loss", "eval_loss": "validation loss"}
        SHOWN |= {"eval_accuracy": "accuracy", "eval_macro_f1": "macro F1"}

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.first_step, self.start = state.global_step, time.perf_counter()

        def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # or the last steps are still under way
            seconds = time.perf_counter() - self.start
            images = (state.global_step - self.first_step) * images_a_step(args)
            images = min(images, len(train_dataloader.dataset))
            state.log_history.append({"epoch": state.epoch, "train_images": images, "train_seconds": seconds})

        def on_log(self, args, state, control, logs=None, **kwargs):
            loss = logs.get("loss", 0.0) + logs.get("eval_loss", 0.0)
            if not np.isfinite(loss):
                stop(f"the loss is {loss} at step {state.global_step}", "lower --learning_rate")
            last = "loss" if args.eval_strategy == "no" else "eval_loss"
            if state.is_world_process_zero and last in logs:
                latest = {name: value for entry in state.log_history for name, value in entry.items()}
                known = {text: latest[name] for name, text in self.SHOWN.items() if name in latest}
                line = ", ".join(f"{text} {value:.3f}" for text, value in known.items())
                if "train_seconds" in latest:
                    line += f"; {latest['train_images'] / latest['train_seconds']:.1f} images/s"
                tqdm.write(f"epoch {state.epoch:g} of {args.num_train_epochs:g}: {line}")

    return EpochLog()


@contextmanager
def safe_checkpoints(trainer: Trainer) -> Iterator[TrainerCallback]:
    """Inside the block each checkpoint lists its content, and Ctrl-C or SIGTERM saves one and ends training.

    Yields the callback that does it; its `stopped` is then true. Only a checkpoint that is listed replaces an
    older one; which is older its step says: the Trainer goes by the clock, which may be put back.
    """
    training = trainer.args  # its own: they may be a copy, see `make_steps`
    output_dir, limit = Path(training.output_dir), training.save_total_limit

    class SafeCheckpoints(transformers.TrainerCallback):
        stopped = False

        def on_train_begin(self, args, state, control, **kwargs):
            if state.best_global_step:  # where it is now: the folder may have been moved
                state.best_model_checkpoint = str(output_dir / f"checkpoint-{state.best_global_step}")

        def on_step_end(self, args, state, control, **kwargs):
            if self.stopped:
                control.should_training_stop = True
                control.should_save |= state.epoch % 1 > 0 or args.save_strategy != "epoch"
                control.should_log |= state.epoch % 1 > 0 and args.logging_strategy != "no"  # or it is lost

        def on_epoch_end(self, args, state, control, **kwargs):
            if self.stopped and state.epoch % 1:  # half an epoch is not to be judged
                control.should_evaluate = control.should_save = control.should_log = False

        def on_save(self, args, state, control, **kwargs):
            if MAIN:
                steps = state.global_step, state.best_global_step
                newest, best = (output_dir / f"checkpoint-{step}" for step in steps)
                write_json(newest / "files.json", patiently(checksums, newest))
                delete_oldest(output_dir, {newest, best}, limit)

    def note(kind: int, frame: Any) -> None:
        guard.stopped = True
        signal.signal(kind, signal.default_int_handler)  # a second one stops at once
        log.info("stopping after this step, to save it")

    guard = SafeCheckpoints()
    alone = training.world_size == 1 and threading.current_thread() is threading.main_thread()
    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM) if alone}
    trainer.add_callback(guard)
    training.save_total_limit = None
    try:
        yield guard
    finally:
        training.save_total_limit = limit
        trainer.remove_callback(guard)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the folders checkpoint-STEP, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def delete_oldest(output_dir: Path, needed: set[Path], limit: int | None) -> None:
    """Delete the oldest checkpoints but the `needed` ones, until there are `limit`, if there is a limit."""
    found = checkpoints_in(output_dir)
    spare = [path for path in found if path not in needed]
    for path in spare[: max(len(found) - limit, 0)] if limit else ():
        shutil.rmtree(path)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint, but of what other processes may still be writing."""
    others = ("files.json", ".", "rng_state_")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(others)]
    return {path.name: sha256_of(path) for path in files}


NEEDED = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}  # to go on from


def damage_of(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint, or with that of the best epoch before it; "" if nothing."""
    if (checkpoint / "pytorch_model.bin").exists():
        return "pytorch_model.bin is a pickle, which can run code"
    listed, found = {}, checksums(checkpoint)
    with suppress(OSError, ValueError):
        listed = json.loads((checkpoint / "files.json").read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or not NEEDED <= listed.keys():
        return "it was not finished, or not made by this script"
    if wrong := [name for name in listed if listed[name] != found.get(name)]:
        return f"{wrong[0]} is missing or damaged"
    step = read_json(checkpoint / "trainer_state.json").get("best_global_step")
    best = checkpoint.with_name(f"checkpoint-{step}")
    return damage_of(best) if step and best != checkpoint else ""


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint, if any; set newer ones that are damaged aside."""
    for checkpoint in reversed(checkpoints_in(output_dir)):
        if not (damage := damage_of(checkpoint)):
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if MAIN:
            remove(aside)
            os.replace(checkpoint, aside)
        log.warning("warning: %s cannot be used: %s; now called %s", checkpoint.name, damage, aside.name)
    return None


def build_trainer(
    model: ViTForImageClassification,
    splits: DatasetDict,
    processor: ViTImageProcessor,
    settings: Settings,
    training: TrainingArguments,
) -> Trainer:
    # The Trainer reads a checkpoint by the model's own names, but save_pretrained writes those of older
    # releases: resuming and restoring the best epoch would skip most weights (transformers issue 43701).
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    transformers.logging.set_verbosity_warning()  # from here on its warnings matter
    inputs = splits.select_columns(["pixel_values", "label"])
    training = make_steps(training, len(inputs["train"]), settings.min_steps)
    model.base_model.requires_grad_(not settings.freeze_backbone)
    trainer = transformers.Trainer(
        model=model,
        args=training,
        train_dataset=inputs["train"],
        eval_dataset=inputs["validation"],
        data_collator=functools.partial(collate, shape=pixel_shape(processor)),
        compute_loss_func=weighted_loss(inputs["train"], training.label_smoothing_factor)
        if settings.class_weights
        else None,
        compute_metrics=compute_metrics,
        processing_class=processor,
        callbacks=[epoch_log()],
    )
    if settings.layer_decay < 1:
        kind, options = trainer.get_optimizer_cls_and_kwargs(training, model)
        groups = layer_groups(trainer, settings.layer_decay)
        trainer.optimizer_cls_and_kwargs = kind, options | {"params": groups}
    if training.world_size == 1:  # of several processes none may do anything twice
        trainer._save_checkpoint = functools.partial(patiently, trainer._save_checkpoint)
    trainer.remove_callback(transformers.PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, transformers.ProgressCallback):
            callback.on_log = lambda *_, **__: None  # the bar without lines of raw numbers
    return trainer


def make_steps(training: TrainingArguments, images: int, least: int) -> TrainingArguments:
    """Return the arguments for at least so many steps: with fewer images a step where that is needed.

    The learning rate stays. What a model learns from few images depends on the number of its steps.
    """
    if not least or training.max_steps > 0:
        return training
    most = max(1, int(images * training.num_train_epochs / least))
    most = 2 ** (most.bit_length() - 1)  # a power of two, as batches are
    if most >= images_a_step(training):
        return training
    training, batch = copy.copy(training), training.per_device_train_batch_size
    most //= images_a_step(training) // (batch * training.gradient_accumulation_steps)  # on each device
    training.per_device_train_batch_size = max(1, min(most, batch))
    training.gradient_accumulation_steps = max(1, most // batch)
    return training


def layer_groups(trainer: Trainer, decay: float) -> list[dict]:
    """Return the parameters that learn as groups for AdamW: rate * decay ** (layers above), weight decay.

    Layer-wise learning-rate decay as in BEiT (Bao et al. 2022, arXiv 2106.08254): the head learns at the full
    rate, the embeddings at the lowest. Biases and norms have no weight decay.
    """
    args, model, groups, depth = trainer.args, trainer.model, {}, 0
    decayed = set(trainer.get_decay_parameter_names(model))
    count = model.config.num_hidden_layers
    (blocks,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    layer = {weights: number for number, block in enumerate(blocks, 1) for weights in block.parameters()}
    for name, weights in model.named_parameters():  # in order: embeddings, blocks, what stands above them
        depth = layer.get(weights, count + 1 if depth else 0)
        rate = args.learning_rate * decay ** (count + 1 - depth)
        group = {"params": [], "lr": rate, "weight_decay": args.weight_decay * (name in decayed)}
        if weights.requires_grad:
            groups.setdefault((depth, name in decayed), group)["params"].append(weights)
    return list(groups.values())


def weighted_loss(images: Dataset, smoothing: float) -> Callable:
    """Return the cross-entropy for the Trainer, each image times n / (classes * images of its class)."""
    counts = torch.bincount(torch.tensor(images["label"][:]), minlength=images.features["label"].num_classes)
    weights = len(images) / len(counts) / counts

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = F.cross_entropy(outputs.logits, labels, reduction="none", label_smoothing=smoothing)
        return (losses * weights.to(losses.device)[labels]).sum() / (num_items_in_batch or len(labels))

    return loss


def fit_head(trainer: Trainer, settings: Settings) -> None:
    """Fit the head to the pretrained features of the training images: class tokens (n, width), in one pass.

    Linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054. A drawn head would first pull the
    features towards its own noise. Ridge regression with classes weighed alike, its strength chosen by
    leaving one out; where images are augmented by turns or flips, half a turn or a mirror counts too.
    """
    model, inputs, gathered = trainer.model.eval(), [], []
    views = [(), (2, 3)] if "turn" in settings.augment else [(), (3,)] if "flip" in settings.augment else [()]
    hook = model.classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0].float()))
    with hook, torch.inference_mode(), trainer.accelerator.autocast():
        for rows in tqdm(trainer.get_eval_dataloader(trainer.train_dataset), desc="linear probe"):
            inputs.clear()
            for axes in views:
                model(pixel_values=rows["pixel_values"].flip(axes))
            parts = torch.stack(inputs, dim=1), rows["labels"]
            gathered.append([part.cpu() for part in trainer.accelerator.gather_for_metrics(parts)])
    tokens, labels = (torch.cat(parts).numpy() for parts in zip(*gathered, strict=True))
    tokens, labels = np.concatenate(tokens.astype(float)), labels.repeat(len(views))
    scale = tokens.std()
    probe = linear_model.RidgeClassifierCV(np.logspace(0, 4, 9), class_weight="balanced")
    probe.fit(tokens / scale, labels)
    weight, bias = np.atleast_2d(probe.coef_) / scale, np.atleast_1d(probe.intercept_)
    if len(weight) == 1:  # two classes share one row
        weight, bias = np.vstack([-weight, weight]), np.hstack([-bias, bias])
    with torch.no_grad():  # halved: a head that is sure of the training images learns little from them
        model.classifier.weight.copy_(torch.from_numpy(weight / 2))
        model.classifier.bias.copy_(torch.from_numpy(bias / 2))
    trainer.state.log_history.append({"ridge_strength": float(probe.alpha_)})


def fine_tune(trainer: Trainer, settings: Settings, training: TrainingArguments) -> None:
    """Train, go on, or find the finished model; leave the best epoch in `trainer.model` and on disk."""
    output_dir = Path(training.output_dir)
    if (output_dir / "model.safetensors").exists():
        trainer.state = transformers.TrainerState.load_from_json(output_dir / "trainer_state.json")
        log.info("found the finished model in %s", output_dir)
        return
    probe = settings.linear_probe and trainer.model.new_head
    if training.num_train_epochs > 0:
        with training.main_process_first(local=False):
            last = find_checkpoint(training)
        if probe and not last:
            fit_head(trainer, settings)
        train(trainer, training, last)
        calibrate(trainer)
    elif probe:
        fit_head(trainer, settings)
        log.info("trained the head alone, as num_train_epochs is 0")
        calibrate(trainer)
    else:
        log.info("no training, as num_train_epochs is 0")
    with whole(output_dir / "trainer_state.json") as part:
        if trainer.state.best_model_checkpoint:  # this file is published: no path of this machine
            trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
        trainer.state.save_to_json(str(part))
    if MAIN:
        patiently(save_model, trainer.model, trainer.processing_class, output_dir)


def find_checkpoint(training: TrainingArguments) -> Path | None:
    """Return the checkpoint to go on from. Raises SystemExit if the one that was asked for is damaged."""
    asked = training.resume_from_checkpoint
    if asked is None:
        return newest_checkpoint(Path(training.output_dir))
    if damage := damage_of(Path(asked)):
        stop(f"cannot resume from {asked}: {damage}", "leave it out: the newest is found by itself")
    return Path(asked)


def train(trainer: Trainer, training: TrainingArguments, last: Path | None) -> None:
    """Train, from the checkpoint `last` if there is one. Raises KeyboardInterrupt, SystemExit."""
    output_dir, size = Path(training.output_dir), trainer.model.num_parameters() * 4  # bytes
    lacking = 3 - min(len(checkpoints_in(output_dir)), 2)  # the best, the newest, the one that replaces it
    need_space(output_dir, size * (1 + 3 * lacking))  # each with two moments of AdamW; and the final weights
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    count, where = images_a_step(trainer.args), f"{training.device} in {precision}"
    log.info("training on %s, images a step: %s, from %s", where, count, last or "the start")
    try:
        with safe_checkpoints(trainer) as guard:
            outcome = trainer.train(resume_from_checkpoint=last and str(last))
    except torch.OutOfMemoryError as problem:
        batch = trainer.args.per_device_train_batch_size // 2
        remedy = "--gradient_checkpointing true needs less"
        if batch:
            steps = training.per_device_train_batch_size * training.gradient_accumulation_steps // batch
            halves = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {steps}"
            remedy = f"{halves} need half of it and train the same"
        stop(str(problem).split(".")[0], remedy)
    if guard.stopped:
        log.info("saved checkpoint-%s", trainer.state.global_step)
        raise KeyboardInterrupt
    save_metrics(trainer, outcome.metrics)


def save_metrics(trainer: Trainer, measured: dict[str, float]) -> None:
    """Add to all_results.json, as `Trainer.save_metrics` does, but never half."""
    path = Path(trainer.args.output_dir) / "all_results.json"
    write_json(path, read_json(path) | measured)


def calibrate(trainer: Trainer) -> None:
    """Divide the head by the temperature that suits the validation images: `pipeline` needs no other step.

    Guo et al. 2017, arXiv 1706.04599. No prediction changes. `config.json` keeps the temperature.
    """
    outputs = trainer.predict(trainer.eval_dataset)
    temperature = fit_temperature(outputs.predictions, outputs.label_ids)
    with torch.no_grad():
        for parameter in trainer.model.classifier.parameters():
            parameter.div_(temperature)
    trainer.model.config.calibration_temperature = temperature


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return what logits (n, classes) must be divided by for the least cross-entropy with labels (n,).

    The labels are smoothed by 1 / (n + 2), after Platt 1999: without a single mistake it would run to 0.
    """
    n, classes = logits.shape
    wanted = np.full((n, classes), 1 / (n + 2) / classes)
    wanted[np.arange(n), labels] += 1 - 1 / (n + 2)

    def loss(log_temperature: float) -> float:
        return -(
            wanted * scipy.special.log_softmax(logits.astype(float) / np.exp(log_temperature), axis=1)
        ).sum()

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def save_model(model: ViTForImageClassification, processor: ViTImageProcessor, folder: Path) -> None:
    """Save under a temporary name, then move the files, the weights last: a model that is there is whole."""
    part = folder / ".part-model"
    model.save_pretrained(part, save_original_format=True)
    processor.save_pretrained(part)
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    part.rmdir()
    log.info("saved the model in %s", folder)


if TRAIN:
    trainer = build_trainer(model, splits, processor, settings, training)
    fine_tune(trainer, settings, training)

# %% [markdown]
# ## 8 · Evaluate
# Now, and only now, the test images are read. The 95 % intervals draw whole groups: ten frames of one polyp
# are one finding. Specificity says how seldom a class is seen where it is not, ECE (expected
# calibration error) how far probabilities are from the share of right answers. `predictions.csv` keeps all.


# %%
def predict(trainer: Trainer, splits: DatasetDict, names: tuple[str, ...], path: Path) -> pd.DataFrame:
    """Return one row an image of the named splits: file, split, label, prediction, one probability a class.

    Splits that the CSV file `path` holds, whole, are read from it; the others are predicted and added to it.
    """
    classes = np.array(splits[names[0]].features["label"].names)
    tables = {}
    if path.exists():
        found = read_table(path, ["file", "split", "label", "prediction", *classes]).groupby(
            "split", sort=False
        )
        files = {name: part["file"][:] for name, part in splits.items()}
        tables = {name: table for name, table in found if table["file"].tolist() == files.get(name)}
    missing = [name for name in names if name not in tables]
    for name in missing:
        inputs = splits[name].select_columns(["pixel_values", "label"])
        outputs = trainer.predict(inputs, metric_key_prefix=name)
        save_metrics(trainer, outputs.metrics)
        probabilities = scipy.special.softmax(outputs.predictions.astype(float), axis=1)
        table = pd.DataFrame({"file": splits[name]["file"][:], "split": name})
        table["label"], table["prediction"] = classes[outputs.label_ids], classes[probabilities.argmax(-1)]
        tables[name] = pd.concat([table, pd.DataFrame(probabilities, columns=classes)], axis=1)
    predictions = pd.concat(tables.values(), ignore_index=True)
    return write_table(path, predictions) if missing else predictions


def truth_of(predictions: pd.DataFrame, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, int (n,), and the probabilities, float64 (n, classes), of a table of predictions."""
    number = {name: label for label, name in enumerate(class_names)}
    return predictions["label"].map(number).to_numpy(), predictions[class_names].to_numpy(float)


def calculate(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return METRICS and ece of labels (n,) and probabilities (n, classes)."""
    guesses = probabilities.argmax(1)
    ece = calibration_error(probabilities.max(1), guesses == labels)
    return classification_scores(labels, guesses) | {"ece": ece}


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error, 15 bins of equal width (Guo et al. 2017), of arrays (n,)."""
    bins = np.ceil(confidence * 15).astype(int)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(right))


def intervals(statistic: Callable[[np.ndarray], dict], groups: np.ndarray) -> dict[str, dict[str, float]]:
    """Return {name: {"value", "low", "high"}}: what `statistic(rows)` names, with 95 % intervals.

    Percentile bootstrap over groups (Field and Welsh 2007), 1,000 draws. Where every draw is 1, or 0, it
    would have no width: the other end is then that of Clopper and Pearson for as many groups.
    """
    rows, group = np.arange(len(groups)), np.unique(groups, return_inverse=True)[1]
    n, random = group.max() + 1, np.random.RandomState(0)
    times = (np.bincount(random.randint(n, size=n), minlength=n) for _ in range(1000))
    ends = pd.DataFrame(statistic(np.repeat(rows, drawn[group])) for drawn in times).quantile([0.025, 0.975])
    result = {}
    for name, value in statistic(rows).items():
        low, high = ends[name]
        low, high = 0.025 ** (1 / n) if low == 1 else low, 1 - 0.025 ** (1 / n) if high == 0 else high
        result[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return result


def score(predictions: pd.DataFrame, groups: pd.Series, class_names: list[str]) -> dict[str, dict]:
    """Return {metric: {"value", "low", "high"}} of one split, for METRICS and ece."""
    labels, probabilities = truth_of(predictions, class_names)
    return intervals(lambda rows: calculate(labels[rows], probabilities[rows]), groups[predictions["file"]])


def score_classes(predictions: pd.DataFrame, groups: pd.Series, class_names: list[str]) -> dict[str, dict]:
    """Return {class: {"precision", "recall" (sensitivity), "specificity", "f1", "n"}} of one split.

    Classes with images also have the 95 % interval of their recall, "recall_low" and "recall_high", and
    "groups", the number of groups that it rests on.
    """
    pair = predictions["label"], predictions["prediction"]
    (tn, fp), _ = metrics.multilabel_confusion_matrix(*pair, labels=class_names).transpose(1, 2, 0)
    rows = metrics.precision_recall_fscore_support(*pair, labels=class_names, zero_division=0)
    table = pd.DataFrame(rows, ["precision", "recall", "f1", "n"], class_names).T.astype({"n": int})
    table.insert(2, "specificity", tn / np.maximum(tn + fp, 1))
    result = table.to_dict(orient="index")
    for name, part in predictions.groupby("label"):
        right = (part["prediction"] == name).to_numpy()
        recall = intervals(lambda rows, right=right: {"": right[rows].mean()}, groups[part["file"]])[""]
        result[name] |= {"recall_low": recall["low"], "recall_high": recall["high"]}
        result[name]["groups"] = groups[part["file"]].nunique()
    return result


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(logits / temperature), (n, classes), for probabilities that are softmax(logits)."""
    return scipy.special.softmax(np.log(probabilities.clip(1e-38)) / temperature, axis=1)


def calibration(labels: np.ndarray, probabilities: np.ndarray, temperature: float) -> dict[str, float]:
    """Return what the temperature changed, and the accuracy on the nine tenths that are most certain."""
    before, right = temper(probabilities, 1 / temperature), probabilities.argmax(1) == labels
    certain = np.argsort(-probabilities.max(1), kind="stable")[: round(0.9 * len(labels))]
    return {
        "temperature": temperature,
        "ece_before": calibration_error(before.max(1), right),
        "ece_after": calibration_error(probabilities.max(1), right),
        "accuracy_at_90_percent_coverage": float(right[certain].mean()),
    }


def cover_shortcuts(trainer: Trainer, test: Dataset) -> dict[str, dict[str, float]]:
    """Return {what is painted black: {"accuracy", "macro_f1"}} of the test images: tissue or overlay?

    The position inset and burnt-in text lie in the lower left corner and along the border; the lower right
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


def summarise(
    predictions: pd.DataFrame, pairs: pd.DataFrame, groups: pd.Series, splits: DatasetDict, trainer: Trainer,
    path: Path,
) -> dict:  # fmt: skip
    """Return the content of the JSON file `path` (metrics.json), found there if it covers the same splits."""
    parts, results = dict(tuple(predictions.groupby("split"))), read_json(path)
    if parts.keys() <= results.keys():
        return results
    class_names = splits["train"].features["label"].names
    record = read_json(path.parents[1] / "settings.json")
    results |= {name: score(parts[name], groups, class_names) for name in reversed(SPLITS) if name in parts}
    results["per_class"] = score_classes(parts["test"], groups, class_names)
    logged = set().union(*trainer.state.log_history)
    made = "fine-tuned" if "epoch" in logged else "probed" if "ridge_strength" in logged else "evaluated"
    results["made"] = made
    temperature = getattr(trainer.model.config, "calibration_temperature", 1.0)
    results["calibration"] = calibration(*truth_of(parts["test"], class_names), temperature)
    uncovered = {name: results["test"][name]["value"] for name in ("accuracy", "macro_f1")}
    results["shortcuts"] = {"nothing": uncovered} | cover_shortcuts(trainer, splits["test"])
    results["split"] = {"by": record["settings"]["split_by"]} | splits.num_rows
    results["split"] |= count_pairs(pairs, groups, splits)
    results["split"]["classes"] = {name: count_classes(part) for name, part in splits.items()}
    results["speed"] = measured_speed(trainer, splits["train"])
    recorded = record["settings"] | record["training"]
    results["settings"] = {name: without_folders(value) for name, value in recorded.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else trainer.args.device.type
    where = f"{device}, {os.cpu_count()} CPU cores, {trainer.args.world_size} processes"
    results["versions"] = versions() | {"device": where.removesuffix(", 1 processes")}
    write_json(path, results)
    return results


def without_folders(value: Any) -> Any:
    """Return of an absolute path its last name: what is published says nothing about this machine."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def measured_speed(trainer: Trainer, pixels: Dataset) -> dict[str, float | None]:
    """Return the images a second of each long step, null if it was not run, and the peak memory in bytes."""
    prepared = read_json(Path(pixels.cache_files[0]["filename"]).with_suffix(".json"))
    evaluated = read_json(Path(trainer.args.output_dir) / "all_results.json")
    epochs = [entry for entry in trainer.state.log_history if "train_seconds" in entry]
    seconds = sum(e["train_seconds"] for e in epochs)
    return {
        "prepare_images_per_second": prepared.get("images_per_second"),
        "train_images_per_second": sum(e["train_images"] for e in epochs) / seconds if epochs else None,
        "train_seconds": seconds if epochs else None,
        "evaluate_images_per_second": evaluated.get("test_samples_per_second"),
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int | None:
    """Return the most memory held so far, in bytes: on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_results(results: dict) -> None:
    scores = pd.DataFrame({name: results[name] for name in SPLITS if name in results})
    show(scores.map(lambda score: round(score["value"], 3)))
    show(pd.DataFrame(results["per_class"]).T.round(3).astype({"n": int, "groups": "Int64"}))
    show(pd.DataFrame(results["shortcuts"]).T.round(3).rename_axis("test images, painted black:"))
    for name in ("accuracy", "macro_f1", "mcc", "ece"):
        interval = "{value:.3f}, 95 % interval {low:.3f} to {high:.3f}".format(**results["test"][name])
        log.info("test %s %s, n = %s", name.replace("_", " "), interval, results["split"]["test"])


if TRAIN:
    evaluated = ("validation", "test", "train") if settings.evaluate_train else ("validation", "test")
    predictions = predict(trainer, splits, evaluated, report / "predictions.csv")
    results = summarise(predictions, pairs, groups, splits, trainer, report / "metrics.json")
    show_results(results)

# %% [markdown]
# ### Elsewhere
# One test set of one clinic is one sample. `--cross_validate K` trains K more models, each tested on another
# fold of the images. `--external_dir FOLDER` tests the model on images from somewhere else, without
# near-duplicates of what it has seen.


# %%
def cross_validate(
    splits: DatasetDict, groups: pd.Series, processor: ViTImageProcessor, settings: Settings,
    training: TrainingArguments,
) -> dict[str, Any]:  # fmt: skip
    """Return {"folds": K, metric: {"mean", "sd"}}; report/cross_validation.csv has every image's prediction.

    Fold k tests, fold k + 1 chooses epoch and temperature, the others train. Of a fold that is done only the
    predictions are kept.
    """
    images = datasets.concatenate_datasets([splits[name] for name in SPLITS])
    images = images.select(np.argsort(images["file"][:]))
    labels, class_names = np.array(images["label"]), images.features["label"].names
    folds, tables, scores, output_dir = settings.cross_validate, [], [], Path(training.output_dir)
    kept_whole = units(groups[images["file"][:]], settings)
    fold_of = share_out(labels, kept_whole, [1 / folds] * folds, training.seed)
    for fold in range(folds):
        options, folder = copy.copy(training), output_dir / f"fold-{fold + 1}-of-{folds}"
        options.output_dir, options.push_to_hub, options.resume_from_checkpoint = str(folder), False, None
        role = np.select([fold_of == fold, fold_of == (fold + 1) % folds], ["test", "validation"], "train")
        parts = datasets.DatasetDict({name: images.select(np.flatnonzero(role == name)) for name in SPLITS})
        if (kept := folder / "predictions.csv").exists():
            table = read_table(kept, ["label", *class_names])
        else:
            log.info("fold %s of %s", fold + 1, folds)
            folder.mkdir(parents=True, exist_ok=True)
            model = load_model(
                settings.model_name_or_path, class_names, processor, training.seed, settings.augment
            )
            trainer = build_trainer(model, parts, processor, settings, options)
            fine_tune(trainer, settings, options)
            table = predict(trainer, parts, ("test",), kept)
        done = [file for file in folder.iterdir() if file != kept and not file.name.startswith(".part")]
        for file in done if MAIN else ():  # what another process is writing is its own to remove
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        tables.append(table.assign(split=f"fold {fold + 1}"))
        scores.append(calculate(*truth_of(tables[-1], class_names)))
    write_table(output_dir / "report" / "cross_validation.csv", pd.concat(tables))
    spread = pd.DataFrame(scores).agg(["mean", "std"]).rename({"std": "sd"}).to_dict()
    for name in ("accuracy", "macro_f1"):
        log.info("%s folds: %s {mean:.3f} ± {sd:.3f}".format(**spread[name]), folds, name)
    return {"folds": folds} | spread


def evaluate_external(
    external: Dataset, splits: DatasetDict, trainer: Trainer, settings: Settings, report: Path
) -> dict[str, Any]:
    """Return the scores on images from elsewhere; external-NAME-KEY.csv in `report` has the predictions."""
    folder, shape = Path(settings.external_dir).resolve(), pixel_shape(trainer.processing_class)
    class_names = external.features["label"].names
    with trainer.args.main_process_first(local=False):
        pixels = prepare_pixels(
            external, folder, trainer.processing_class, Path(settings.data_root) / "cache"
        )
    pixels = keep_readable(pixels)
    name = f"{folder.name}-{Path(pixels.cache_files[0]['filename']).stem[-6:]}"  # a key of its content
    seen = np.concatenate([thumbnails(splits[part], shape) for part in ("train", "validation")])
    twins = compare(thumbnails(pixels, shape), seen)["a"].unique()
    new = pixels.select(np.setdiff1d(np.arange(len(pixels)), twins))
    if not len(new):
        stop(f"{folder} has only near-duplicates of training images", "leave --external_dir out")
    with trainer.args.main_process_first(local=False):
        pairs = find_near_duplicates(new, shape, report / f"near_duplicates-{name}.csv")
    groups = group_images(new["file"][:], pairs)
    predictions = predict(
        trainer, datasets.DatasetDict(external=new), ("external",), report / f"external-{name}.csv"
    )
    scores = score(predictions, groups, class_names)
    text = "accuracy {value:.3f}, 95 %% interval {low:.3f} to {high:.3f}".format(**scores["accuracy"])
    log.info("%s: " + text + ", n = %s, without %s near-duplicates", folder.name, len(new), len(twins))
    per_class = score_classes(predictions, groups, class_names)
    per_class = {name: row for name, row in per_class.items() if row["n"]}
    record = {"folder": folder.name, "images": len(new), "near_duplicates_left_out": len(twins)}
    return record | scores | {"per_class": per_class}


if TRAIN:
    if settings.cross_validate:
        results["cross_validation"] = cross_validate(splits, groups, processor, settings, training)
    if settings.external_dir:
        results["external"] = evaluate_external(external, splits, trainer, settings, report)

# %% [markdown]
# ## 9 · Report
# Pictures of what the numbers say, and the model card, which the Hub shows as the model's page: data, terms,
# split, results, calibration, shortcuts, limits, all from this run's own files. A card that you have edited
# is left alone; `report/model_card.md` is then the new one.

# %%
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart by colour-blind readers (Okabe and Ito)


def draw_confusion_matrix(predictions: pd.DataFrame, class_names: list[str]) -> Figure:
    """Draw the counts of `predictions` and, for up to 12 classes, their share of the true class."""
    counts = metrics.confusion_matrix(predictions["label"], predictions["prediction"], labels=class_names)
    shares, few = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), len(class_names) <= 12
    size = 3.2 + (0.7 if few else 0.36) * len(class_names)
    figure = plot.Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{counts.sum():,} test images")
    for row, column in np.argwhere(counts):
        text = f"{counts[row, column]:,}" + (f"\n{shares[row, column]:.0%}" if few else "")
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=10 if few else 8)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    return figure


def draw_training_curves(log_history: list[dict]) -> Figure:
    """Draw losses and validation scores by epoch."""
    history = pd.DataFrame(log_history).groupby("epoch").first()
    figure = plot.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column, label, style, colour in (
        (left, "loss", "training loss", "s-", ORANGE),
        (left, "eval_loss", "validation loss", "o-", BLUE),
        (right, "eval_accuracy", "validation accuracy", "o-", BLUE),
        (right, "eval_macro_f1", "validation macro F1", "^-", ORANGE),
    ):
        if column in history:
            history[column].dropna().plot(ax=axes, style=style, color=colour, label=label, markersize=4)
            axes.legend()
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.3)
    return figure


def draw_class_bars(per_class: dict[str, dict]) -> Figure:
    """Draw the recall of each class that was tested, with its 95 % interval, and its precision."""
    table = pd.DataFrame({f"{name} ({row['n']})": row for name, row in per_class.items() if row["n"]}).T[::-1]
    figure = plot.Figure(figsize=(8, 1.4 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    reach = table["recall"] - table["recall_low"], table["recall_high"] - table["recall"]
    axes.barh(table.index, table["recall"], color=BLUE, alpha=0.5, label="recall (sensitivity)")
    axes.errorbar(table["recall"], table.index, xerr=reach, fmt="none", color="black", capsize=3,
                  label="its 95 % interval")  # fmt: skip
    axes.plot(table["precision"], table.index, "D", color=ORANGE, markersize=5, label="precision")
    axes.set(xlim=(0, 1.02), xlabel="share; in brackets: test images of the class")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_reliability(labels: np.ndarray, probabilities: np.ndarray, temperature: float) -> Figure:
    """Draw how often the model is right by its probability, before and after the temperature, by coverage."""
    right, confidence = probabilities.argmax(1) == labels, probabilities.max(1)
    figure = plot.Figure(figsize=(9, 4), layout="constrained")
    left, other = figure.subplots(1, 2)
    for name, values, style, colour in (
        ("before", temper(probabilities, 1 / temperature).max(1), "s--", ORANGE),
        (f"after, T = {temperature:.2f}", confidence, "o-", BLUE),
    ):
        bins = pd.DataFrame({"x": values, "y": right}).groupby(np.ceil(values * 15)).mean()
        label = f"{name}: ECE {calibration_error(values, right):.3f}"
        left.plot(bins["x"], bins["y"], style, color=colour, label=label, markersize=5)
    left.axline((0, 0), slope=1, color="grey", linewidth=1)
    left.set(xlabel="probability of the predicted class", ylabel="share of right answers", xlim=(0, 1.02))
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9)
    count, order = np.arange(1, len(labels) + 1), np.argsort(-confidence, kind="stable")
    other.plot(count / len(labels), right[order].cumsum() / count, color=BLUE)
    other.axvline(0.9, color="grey", linewidth=1, linestyle="--")
    other.set(xlabel="share of the images answered, most certain first", ylabel="accuracy on them")
    for axes in (left, other):
        axes.grid(alpha=0.3)
    return figure


def draw_pairs(left: np.ndarray, right: np.ndarray, captions: list[str]) -> Figure:
    """Draw pictures, uint8 (n, height, width, 3), two and two side by side, three pairs a row."""
    figure = plot.Figure(figsize=(10, 2.1 * -(-len(left) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(left) // 3), 3, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, first, second, caption in zip(grid, left, right, captions, strict=False):
        axes.imshow(np.hstack([first, np.full_like(first[:, :4], 255), second]))
        axes.set_title(caption, fontsize=9)
    return figure


def draw_conflicts(pairs: pd.DataFrame, images: Dataset, shape: tuple[int, int, int]) -> Figure:
    """Draw the nearest of `pairs`, near-duplicates with different labels."""
    left, right = (pixels_of(pairs[name], images, shape) for name in ("file_a", "file_b"))
    names = zip(pairs["label_a"], pairs["label_b"], pairs["distance"], strict=True)
    return draw_pairs(left, right, [f"{a} | {b}\ndistance {distance:.3f}" for a, b, distance in names])


def draw_examples(
    predictions: pd.DataFrame, class_names: list[str], images: Dataset, model: ViTForImageClassification,
    shape: tuple[int, int, int],
) -> Figure:  # fmt: skip
    """Draw predicted images, each beside itself with the model's attention over it: yellow is much."""
    pixels = pixels_of(predictions["file"], images, shape)
    maps = attention_rollout(model, torch.tensor(pixels.transpose(0, 3, 1, 2))).numpy()
    seen = (0.4 * pixels + 0.6 * 255 * matplotlib.colormaps["viridis"](maps)[..., :3]).astype(np.uint8)
    columns = predictions["label"], predictions["prediction"], predictions[class_names].max(axis=1)
    captions = [f"true: {true}\npredicted: {guess}, {p:.0%}" for true, guess, p in zip(*columns, strict=True)]
    return draw_pairs(pixels, seen, captions)


def attention_rollout(model: ViTForImageClassification, pixels: torch.Tensor) -> torch.Tensor:
    """Return where the class token looks, float32 (n, height, width), each from 0 to 1.

    Abnar and Zuidema 2020, arXiv 2005.00928: the attention of all layers multiplied, heads averaged, the
    residual counted as half. `pixels` is uint8 (n, channels, height, width).
    """
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the faster ones keep no attention
    try:
        with torch.no_grad():
            layers = model.eval()(pixel_values=pixels.to(model.device), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(kind)
    itself = torch.eye(layers[0].shape[-1], device=model.device)
    flow = functools.reduce(lambda flow, layer: (layer.mean(1) + itself) / 2 @ flow, layers, itself)
    side = round((flow.shape[-1] - 1) ** 0.5)
    maps = flow[:, None, 0, 1:].reshape(-1, 1, side, side)
    maps = F.interpolate(maps, pixels.shape[-2:], mode="bilinear")[:, 0].cpu()
    low, high = maps.flatten(1).quantile(torch.tensor([0.01, 0.99]), dim=1)[..., None, None]
    return ((maps - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)  # single patches can outshine all else


def make_model_card(results: dict, pictures: list[str], image_folder: Path) -> ModelCard:
    """Return the model card, in the Hub's format, with the named `pictures` of `report/`."""
    kvasir = KVASIR if is_kvasir(image_folder) else None
    base = results["settings"]["model_name_or_path"]
    names = {"data": kvasir["name"] if kvasir else image_folder.name, "base": Path(base).name}
    on_the_hub = "/" in base and not Path(base).exists()  # of a folder elsewhere the name alone is left
    shown = {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation"}
    task, where = "image-classification", {"dataset_type": "imagefolder", "dataset_split": "test"}
    eval_results = [
        hub.EvalResult(
            task_type=task, dataset_name=names["data"], **where, metric_type=kind,
            metric_name=name.replace("_", " "), metric_value=round(results["test"][name]["value"], 4),
        )
        for name, kind in shown.items()
    ]  # fmt: skip
    card_data = hub.ModelCardData(
        library_name="transformers", pipeline_tag=task, tags=["vision", "vit"], metrics=list(shown.values()),
        base_model=base if on_the_hub else None, eval_results=eval_results,
        model_name=f"{names['base']} {results['made']} on {names['data']}",
    )  # fmt: skip
    if kvasir:
        card_data.license, card_data.license_name = "other", "kvasir-research-and-education"
        card_data.license_link = kvasir["homepage"]
    template = str(HERE / "data" / "model_card.md")
    later = {"cross_validate": results.get("cross_validation", {}).get("folds", 0)}
    later |= {"external_dir": results.get("external", {}).get("folder")}
    command = command_of(results["settings"] | later)
    more = {"names": names, "kvasir": kvasir, "pictures": pictures, "command": command}
    return hub.ModelCard.from_template(card_data, template, **more, **results)


def command_of(settings: dict) -> str:
    """Return the command line that makes the same model: the settings that are not the defaults."""
    usual, words = read_settings(["--recipe", settings["recipe"]]), ["python", "finetune_vit.py"]
    usual = dataclasses.asdict(usual[0]) | usual[1].to_dict() | {"recipe": "default"}
    for key, value in settings.items():
        if key.startswith(("push", "hub_", "disable_tqdm")):  # taken now; what logging decides
            continue
        if isinstance(value, list) and value != usual[key]:
            words += [f"--{key}", *(value or ["none"])]
        elif value != usual[key] and value is not None:
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return shlex.join(words)


def write_report(
    results: dict, predictions: pd.DataFrame, pairs: pd.DataFrame, images: Dataset, trainer: Trainer,
    image_folder: Path,
) -> None:  # fmt: skip
    """Draw the pictures and write the card, unless they are there; a card that was edited is not replaced."""
    output_dir, class_names = Path(trainer.args.output_dir), list(results["per_class"])
    report, shape = output_dir / "report", pixel_shape(trainer.processing_class)
    tested = predictions[predictions["split"] == "test"]
    tested = tested.iloc[np.argsort(-tested[class_names].max(axis=1), kind="stable")]
    right = tested["label"] == tested["prediction"]
    if results != read_json(report / "metrics.json"):  # with what was measured elsewhere
        write_json(report / "metrics.json", results)
    conflicts = pairs[pairs["label_a"] != pairs["label_b"]]
    history, temperature = trainer.state.log_history, results["calibration"]["temperature"]

    def examples(rows: pd.DataFrame) -> Figure:
        return draw_examples(rows[:12], class_names, images, trainer.model, shape)

    pictures = {  # file name: (whether there is anything to draw, how)
        "training_curves.png": (results["made"] == "fine-tuned", lambda: draw_training_curves(history)),
        "confusion_matrix.png": (True, lambda: draw_confusion_matrix(tested, class_names)),
        "per_class.png": (True, lambda: draw_class_bars(results["per_class"])),
        "reliability.png": (True, lambda: draw_reliability(*truth_of(tested, class_names), temperature)),
        "mistakes.png": (not right.all(), lambda: examples(tested[~right])),
        "attention.png": (right.any(), lambda: examples(tested[right].groupby("label").head(1))),
        "label_conflicts.png": (len(conflicts), lambda: draw_conflicts(conflicts[:12], images, shape)),
    }
    pictures = {name: draw for name, (wanted, draw) in pictures.items() if wanted}
    card = str(make_model_card(results, list(pictures), image_folder))
    made = report / "model_card.md"
    if not made.exists() or made.read_bytes() != card.encode():
        for name, draw in pictures.items():
            with whole(report / name) as part, matplotlib.rc_context({"text.parse_math": False}):
                draw().savefig(part, dpi=150)  # a $ in a class name is no formula
        write_card(card, output_dir)
    for name in pictures if NOTEBOOK else ():
        log.info("%s", report / name)
        show_picture((report / name).read_bytes())
    log.info("model and model card: %s; numbers and pictures: %s", output_dir, report)
    return list(pictures)


def write_card(card: str, output_dir: Path) -> None:
    """Write report/model_card.md and, unless someone has edited it, README.md."""
    made, shown = output_dir / "report" / "model_card.md", output_dir / "README.md"
    if not shown.exists() or (made.exists() and shown.read_bytes() == made.read_bytes()):
        write_text(shown, card)
    write_text(made, card)


def make_space(space: Path, class_names: list[str], model: str = "", revision: str | None = None) -> Path:
    """Write the web page of a model, by default of the folder that `space` is in the report of; return it.

    It shows images of the drawn sample as examples, where that has the model's classes.
    """
    page = (HERE / "data" / "app.py").read_text(encoding="utf-8").replace('MODEL = ""', f"MODEL = {model!r}")
    page = page.replace("REVISION = None", f"REVISION = {revision!r}")
    if (space / "app.py").exists() and (space / "app.py").read_text(encoding="utf-8") == page:
        return space / "app.py"
    with zipfile.ZipFile(HERE / "data" / "sample.zip") as sample:
        files = {PurePosixPath(name).parent.name: name for name in sorted(sample.namelist())}
        for name in files.keys() & set(class_names):
            (space / "examples").mkdir(parents=True, exist_ok=True)
            (space / "examples" / f"{name}.jpg").write_bytes(sample.read(files[name]))
    write_text(space / "requirements.txt", "torch>=2.6\ntransformers>=5\npillow>=10.3\n")  # Gradio is there
    header = {"title": Path(model).name or "Classifier", "sdk": "gradio", "app_file": "app.py"}
    header |= {"models": [model]} if model else {}
    write_text(space / "README.md", f"---\n{yaml.safe_dump(header)}---\n\nMade by `finetune_vit.py`.\n")
    write_text(space / "app.py", page)
    return space / "app.py"


if TRAIN and MAIN:
    pictures = write_report(results, predictions, pairs, readable, trainer, image_folder)
    make_space(report / "space", class_names, on_hub or "", training.hub_revision)

# %% [markdown]
# ## 10 · Publish
# With `--push_to_hub` one commit takes the model, its card, charts and numbers to the Hub, but no image. That
# commit is then downloaded into an empty folder, and `pipeline` is asked about test images: the card says
# whether it answers as this run did. If anything fails, the same command goes on from there.

# %%
PUBLISHED = """config.json preprocessor_config.json model.safetensors README.md all_results.json
trainer_state.json report/metrics.json report/split.csv report/confusion_matrix.png report/per_class.png
report/reliability.png report/training_curves.png""".split()


def publish(
    results: dict, predictions: pd.DataFrame, pictures: list[str], image_folder: Path,
    training: TrainingArguments, name: str,
) -> None:  # fmt: skip
    """Push the finished run to the Hub as `name`, check what the Hub gives back, add that to the card."""
    output_dir = Path(training.output_dir)
    commit = push(output_dir, name, training.hub_revision)
    what = {"repo": name, "revision": training.hub_revision}
    what["weights"] = sha256_of(output_dir / "model.safetensors")
    if not what.items() <= results.get("published", {}).items():
        tested = predictions[predictions["split"] == "test"]
        agreement = read_back(name, commit, tested, image_folder, training)
        results["published"] = what | {"commit": commit} | agreement
        write_json(output_dir / "report" / "metrics.json", results)
        write_card(str(make_model_card(results, pictures, image_folder)), output_dir)
        push(output_dir, name, training.hub_revision)


def push(folder: Path, name: str, revision: str | None = None, **options: Any) -> str:
    """Upload what has changed of PUBLISHED in one commit, return its id. Raises SystemExit if that fails."""
    options = {"allow_patterns": PUBLISHED, "commit_message": "Add what finetune_vit.py made"} | options
    options |= {"repo_id": name, "folder_path": folder, "revision": revision}
    log.info("pushing %s to %s/%s", folder, hub.constants.ENDPOINT, name)
    try:
        return patiently(hub.upload_folder, hope=may_pass, **options).oid
    except Exception as problem:  # of many kinds: those of HTTP, of the Hub, of the card's header
        remedy = f"all is safe in {folder}; run the same command again: only the push is left to do"
        stop(f"cannot push to {name}: {explain(problem)}", remedy)


def read_back(
    name: str, commit: str, tested: pd.DataFrame, image_folder: Path, training: TrainingArguments
) -> dict[str, Any]:
    """Ask the model that the Hub gives back about up to 32 test images; return how far it agrees.

    That is images, agreeing and largest_difference, of any probability. Raises SystemExit if it does not.
    """
    rows = tested.iloc[np.unique(np.linspace(0, len(tested) - 1, 32).astype(int))]
    try:
        with tempfile.TemporaryDirectory() as empty:
            fetch = functools.partial(hub.snapshot_download, name, revision=commit, cache_dir=empty)
            folder = patiently(fetch, hope=may_pass)
            classifier = transformers.pipeline("image-classification", folder, device=training.device)
            answers = classifier([str(image_folder / file) for file in rows["file"]], top_k=1000)
    except Exception as problem:
        text = f"{name} was pushed, but cannot be read back: {explain(problem)}"
        stop(text, "run the same command again to check it")
    answers = pd.DataFrame([{row["label"]: row["score"] for row in answer} for answer in answers], rows.index)
    largest = float((answers - rows[answers.columns]).abs().to_numpy().max())
    agreeing = int((answers.idxmax(axis=1) == rows["prediction"]).sum())
    log.info("read back: %s of %s predictions agree, at most %.4f apart", agreeing, len(rows), largest)
    if largest > 0.05:  # mixed precision makes for 0.01
        stop(f"{name} answers otherwise than this run did: {largest:.3f} apart", "do not use it; report this")
    return {"images": len(rows), "agreeing": agreeing, "largest_difference": largest}


if TRAIN and MAIN and on_hub:
    publish(results, predictions, pictures, image_folder, training, on_hub)
    if settings.hub_space_id:
        push(report / "space", settings.hub_space_id, repo_type="space", allow_patterns=None)

# %% [markdown]
# ## 11 · Use
# `--predict PATH ...` sorts images, folders and archives, `--demo` opens a web page that does. Both take the
# finished model in `output_dir`, or the fine-tuned one that `--model_name_or_path` names, and train nothing.


# %%
def choose_classifier(settings: Settings, output_dir: Path) -> tuple[str, list[str]]:
    """Return the name of a fine-tuned model, and its classes. Raises SystemExit if there is none."""
    record = read_json(output_dir / "settings.json").get("settings", {})
    own = settings.model_name_or_path in (VIT_BASE, record.get("model_name_or_path"))
    name = str(output_dir) if own else settings.model_name_or_path
    if own and not (output_dir / "model.safetensors").exists():
        remedy = "train it first, or give --output_dir or --model_name_or_path"
        stop(f"{output_dir} holds no finished model", remedy)
    log.info("reading the checkpoint %s", name)
    try:
        id2label = check_vit(name)
    except Exception as problem:  # of any kind, for whatever is damaged in there
        stop(f"cannot use {name}: {str(problem).strip().splitlines()[0]}", "check the name and the network")
    if all(re.fullmatch(r"LABEL_\d+", label) for label in id2label.values()):
        stop(f"{name} is not fine-tuned: its classes have no names", "train it first")
    return name, [id2label[label] for label in range(len(id2label))]


@contextmanager
def find_inputs(paths: list[str]) -> Iterator[dict[str, Path]]:
    """Yield {name to show: file} of all images in `paths`. Archives are unpacked until the block ends."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, path in enumerate(map(Path, paths)):
            folder = Path(temporary, str(number), path.stem)
            if path.is_dir():
                found |= {file: Path(file) for file in sorted(list_images(path))}
            elif zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
                unpack(path, folder, {})
                files = sorted(list_images(folder))
                found |= {str(path / os.path.relpath(file, folder)): Path(file) for file in files}
            else:
                found[str(path)] = path
        yield found


def decode_ahead(files: list[Path], processor: ViTImageProcessor, size: int) -> Iterator[list[dict]]:
    """Yield what `decode_file` makes of `files`, `size` at a time, while all cores work on the next ones."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = deque()
        for start in range(0, len(files), size):
            batch = files[start : start + size]
            waiting.append([pool.submit(decode_file, file, processor) for file in batch])
            if len(waiting) > 2:
                yield [row.result() for row in waiting.popleft()]
        while waiting:
            yield [row.result() for row in waiting.popleft()]


def classify(
    inputs: dict[str, Path], model: ViTForImageClassification, processor: ViTImageProcessor,
    training: TrainingArguments,
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Yield tables of file, prediction, one probability a class, and error: why a file cannot be read."""
    names, classes, shape = list(inputs), list(model.config.id2label.values()), pixel_shape(processor)
    half = torch.bfloat16 if training.bf16 else torch.float16
    autocast = torch.autocast(training.device.type, half, enabled=training.bf16 or training.fp16)
    bar = tqdm(total=len(names), desc="predict")
    for rows in decode_ahead(list(inputs.values()), processor, training.eval_batch_size):
        errors = np.array([row["error"] for row in rows], dtype=object)
        table = pd.DataFrame({"file": names[bar.n : bar.n + len(rows)], "prediction": ""})
        table = table.assign(**dict.fromkeys(classes, np.nan), error=errors)
        if len(readable := np.flatnonzero(errors == "")):
            pixels = collate([rows[row] | {"label": 0} for row in readable], shape)["pixel_values"]
            with torch.inference_mode(), autocast:
                logits = model(pixel_values=pixels.to(training.device)).logits
            probabilities = logits.double().softmax(-1).cpu().numpy()
            table.loc[readable, classes] = probabilities
            table.loc[readable, "prediction"] = np.array(classes, dtype=object)[probabilities.argmax(1)]
        for row in np.flatnonzero(errors != ""):
            log.warning("unreadable: %r (%s)", table["file"][row], errors[row])
        bar.update(len(rows))
        yield table
    bar.close()


def show_predictions(table: pd.DataFrame) -> None:
    """Show the two most probable classes of each file that could be read."""
    table = table[table["error"] == ""].set_index("file")
    probabilities = table.drop(columns=["prediction", "error"])
    best = [row.nlargest(2).round(3) for _, row in probabilities.iterrows()]
    rows = [(*(value for pair in row.items() for value in pair),) for row in best]
    if rows:
        show(pd.DataFrame(rows, table.index, ["prediction", "probability", "or else", "with"]))


def predict_files(settings: Settings, training: TrainingArguments, path: Path) -> None:
    """Classify what `--predict` names: up to 20 images on the screen, more into the CSV file `path`."""
    name, class_names = choose_classifier(settings, Path(training.output_dir))
    with find_inputs(settings.predict) as inputs:
        many = len(inputs) > 20
        if not inputs:
            stop(f"no images in {', '.join(settings.predict)}", "give images, folders or archives")
        if many and path.exists():
            stop(f"{path} exists", "move it, or run in another folder")
        processor = transformers.ViTImageProcessor.from_pretrained(name)
        model = load_model(name, class_names, processor, training.seed).to(training.device).eval()
        start, tables = time.perf_counter(), classify(inputs, model, processor, training)
        if many:
            with whole(path) as part:
                for number, table in enumerate(tables):
                    table.to_csv(part, mode="a", header=not number, index=False, float_format="%.9g")
        else:
            show_predictions(pd.concat(tables))
        speed = len(inputs) / (time.perf_counter() - start)
    log.info("%s images, %.1f a second%s", f"{len(inputs):,}", speed, f": {path}" if many else "")


def open_page(settings: Settings, training: TrainingArguments) -> None:
    """Serve the web page of a fine-tuned model, until Ctrl-C."""
    name, class_names = choose_classifier(settings, Path(training.output_dir))
    page = make_space(Path(tempfile.mkdtemp()), class_names, name)  # kept: a notebook goes on meanwhile
    runpy.run_path(str(page))["build_page"](name).launch()


if RUN and MAIN and settings.predict:
    predict_files(settings, training, Path("predictions.csv"))
if RUN and MAIN and settings.demo:
    open_page(settings, training)
