"""Step 0: what a run does. Flags, a YAML file, a recipe and the hardware decide, the strongest first."""

import argparse
import copy
import difflib
import importlib.util
import itertools
import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .checks import HELP, UNFIT, check_settings, check_torchvision, check_training
from .console import stop
from .environment import bear_lack_of_locks, keep_caches, meeting, plain_paths, use_own_cores
from .options import EXAMPLE, TRAINING, WORDS, Settings

SMALL = 8  # images per step: fewer need no lower rate
PASS = 32  # images per forward pass without CUDA: more are no faster, but may fill the memory
USAGE = "usage: python finetune_vit.py [--config FILE] [--SETTING VALUE ...]"


class Parser(HfArgumentParser):
    """Settings and TrainingArguments as flags. Its help lists ours, not the 120 that are inherited."""

    def error(self, message: str) -> NoReturn:
        stop(message, HELP)

    def shown_default(self, name: str) -> str:
        default = self.get_default(name)
        return "" if default in (None, "") else f" (default: {default})"

    def format_help(self) -> str:
        rows = [(f.name, f.metadata["metavar"], f.metadata["help"]) for f in fields(Settings) if f.init]
        rows += [(name, value, text) for name, (_, text, value) in TRAINING.items() if text]
        rows = [
            f"  --{name} {value}".ljust(37) + text + self.shown_default(name)
            for name, value, text in sorted(rows)
        ]
        rows.insert(0, "  --config FILE".ljust(37) + "YAML file of settings; flags override it.")
        more = "Every other field of transformers.TrainingArguments is a flag under its own name."
        return "\n".join([USAGE, "", *rows, "", more, ""])


def read_settings(arguments: list[str], recipes: dict[str, dict]) -> tuple[Settings, TrainingArguments]:
    """Parse flags such as ["--config", "data/sample.yaml", "--seed", "1"]. Raises SystemExit on a mistake.

    From weak to strong: what suits the hardware, the recipe, the YAML file after --config, the flags. A
    recipe that is named by a flag also overrides the file, so that recipes can be compared on it.
    """
    parser = Parser((Settings, TrainingArguments), allow_abbrev=False)
    parser.add_argument("--config")
    usual = {name: default for name, (default, _, _) in TRAINING.items()}
    parser.set_defaults(do_train=None, **usual | recipes["default"])  # so that `--do_train false` is seen
    first, _ = parser.parse_known_args(arguments)
    given = config_flags(Path(first.config).expanduser(), known_names()) if first.config else {}
    if any(word.split("=")[0] == "--recipe" for word in arguments):
        overridden = choose_recipe(first.recipe, recipes)
        given = {name: words for name, words in given.items() if name not in overridden}
    flags = [*itertools.chain(*given.values()), *arguments]
    first, unknown = parser.parse_known_args(flags)
    recipe = choose_recipe(first.recipe, recipes)
    if unknown:
        name = unknown[0].split("=")[0]
        stop(f"unknown argument {name}", nearest(name, known_names()))
    refuse_unfit(first, parser)
    check_torchvision()
    parser.set_defaults(**suit_hardware(first) | recipe | {"learning_rate": None, "split_by": None})
    try:
        with meeting():
            settings, training, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
            prepare_training(settings, training, recipe)
    except Exception as problem:  # of many kinds: the checks of TrainingArguments
        stop(problem, HELP)
    settings.arguments = without_token(arguments)
    plain_paths(settings, training)
    check_settings(settings, training)
    keep_caches(settings)  # before the Trainer is tried, which imports `datasets`
    check_training(training)
    bear_lack_of_locks()
    use_own_cores()
    return settings, training


def known_names() -> set[str]:
    """Return the names of all settings."""
    return {f.name for f in (*fields(Settings), *fields(TrainingArguments)) if f.init}


def config_flags(path: Path, known: set[str]) -> dict[str, list[str]]:
    """Turn a YAML file into {setting: flags}, so that both are checked alike. Raises SystemExit."""
    example = "give a YAML file with lines such as 'num_train_epochs: 3'"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as problem:
        stop(f"cannot read --config {path}: {problem}", example)
    if not isinstance(content, dict):
        stop(f"--config {path} holds no settings", example)
    flags = {}
    for key, value in content.items():
        if key not in known:
            stop(f"unknown setting '{key}' in {path}", nearest(str(key), known).replace("mean --", "mean "))
        if isinstance(value, list):
            flags[key] = [f"--{key}", *map(str, value)]
        elif value is not None:
            flags[key] = [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]
    return flags


def nearest(name: str, known: set[str]) -> str:
    """Return a hint at the setting that was meant; no hint is better than a wrong one."""
    name = name.strip("-").replace("-", "_").lower()
    if name in EXAMPLE:
        return EXAMPLE[name]
    matches = [WORDS[name]] if name in WORDS else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean --{matches[0]}?" if matches else HELP


def choose_recipe(name: str, recipes: dict[str, dict]) -> dict[str, Any]:
    if name not in recipes:
        stop(f"argument --recipe: invalid choice: {name!r}", f"choose one of {', '.join(recipes)}")
    return recipes[name]


def refuse_unfit(given: argparse.Namespace, parser: Parser) -> None:
    """Stop at what would change the scores, before TrainingArguments acts on a DeepSpeed file."""
    for name in UNFIT:
        if (getattr(given, name) or None) != (parser.get_default(name) or None):
            stop(f"--{name} would change what is evaluated, or what a run can go on from", "leave it out")
    if given.do_train is False or (not given.do_train and (given.do_eval or given.do_predict)):
        remedy = "to train, add --do_train; to evaluate only, --num_train_epochs 0 --linear_probe false"
        stop("--do_train false, or --do_eval or --do_predict alone, ask for no training", remedy)


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

    `torch.cuda.is_bf16_supported` says yes on a T4, which only emulates it: so ask for the capability.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    # torch has no public test for these two instruction sets
    if device_type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def without_token(arguments: list[str]) -> list[str]:
    """Return the arguments without --hub_token and its value."""
    kept, skip = [], False
    for word in arguments:
        named = re.match("--hub[_-]token(=|$)", word)
        if not (named or skip):
            kept.append(word)
        skip = bool(named) and "=" not in word
    return kept


def prepare_training(settings: Settings, training: TrainingArguments, recipe: dict[str, Any]) -> None:
    """Set what is the same in every run, and the recipe's learning rate and split, if none is given.

    A split that the data have is stronger than the recipe's, so it is known only later which one counts.
    """
    if training.hub_token:  # where the Hub's client finds it, and no file of ours will hold it
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    training.remove_unused_columns = False  # the collator makes the model's inputs
    if str(training.resume_from_checkpoint).lower() == "true":  # as for the Trainer: the newest
        training.resume_from_checkpoint = None
    training.logging_nan_inf_filter = False  # a loss that is not finite must be seen
    if training.learning_rate is None:
        training.learning_rate = recipe["learning_rate"]
        settings.rate_for = recipe["per_device_train_batch_size"]
    settings.split_otherwise = recipe.get("split_by", settings.split_otherwise)


def images_per_step(training: TrainingArguments) -> int:
    """Return the number of images per update of the weights: all devices, all accumulated batches."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def for_trainer(training: TrainingArguments, images: int, settings: Settings) -> TrainingArguments:
    """Return a copy with the images per step, and the learning rate, for so many training images.

    What a model learns from few images depends on the number of its steps. So a step takes the largest power
    of two that leaves at least `min_steps`, but no more than was asked for. A recipe's learning rate follows
    the square root of their number (Malladi et al. 2022, arXiv 2205.10287), down to 8. Our own callbacks keep
    the checkpoints and draw the bars, so the Trainer's are off.
    """
    training, batch = copy.copy(training), training.per_device_train_batch_size
    training.save_total_limit, training.disable_tqdm = None, True
    each = batch * training.gradient_accumulation_steps  # per device and step
    if settings.min_steps and training.max_steps <= 0 < training.num_train_epochs:
        most = int(images * training.num_train_epochs / settings.min_steps)
        most = max(1, most // (images_per_step(training) // each))
        if (fewer := 2 ** (most.bit_length() - 1)) < each:
            each, batch = fewer, min(fewer, 2 ** (batch.bit_length() - 1))
    if training.device.type != "cuda" and batch % PASS == 0:
        batch = PASS
    training.per_device_train_batch_size, training.gradient_accumulation_steps = batch, each // batch
    if settings.rate_for:
        rate = training.learning_rate * math.sqrt(max(images_per_step(training), SMALL) / settings.rate_for)
        training.learning_rate = float(f"{rate:.3g}")
    return training
