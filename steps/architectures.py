"""Step 1: the types of checkpoints that work, what differs between them, and whether one can be used."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .console import log, stop
from .files import read_json

# `model_type` in config.json. All of these end in one linear layer, `classifier`, and none needs torchvision.
TYPES = "vit deit dinov2 dinov2_with_registers beit swin swinv2 convnext convnextv2 siglip".split()
# The processor of a checkpoint that has none.
PROCESSORS = dict.fromkeys(("vit", "swin", "swinv2"), "ViT") | {"deit": "DeiT", "beit": "Beit"}
PROCESSORS |= dict.fromkeys(("dinov2", "dinov2_with_registers"), "Bit") | {"siglip": "Siglip"}
PROCESSORS |= dict.fromkeys(("convnext", "convnextv2"), "ConvNext")
# They take images of any size; the others take the one that they were made for.
ANY_SIZE = ("dinov2", "dinov2_with_registers", "convnext", "convnextv2")
# Transformers cannot compute their activations again to save memory.
NO_CHECKPOINTING = ("convnext", "convnextv2")
# Their loss is the mean of one batch and ignores the Trainer's count over accumulated batches.
MEAN_LOSS = ("beit", "swinv2", "siglip")
# What a checkpoint for other tasks may lack: BEiT's norm in front of the head is for classification alone.
HEAD = ("classifier.", "beit.pooler.")
# What no logit depends on: for masked images, and SigLIP's summary for comparing images with texts.
UNUSED = (".mask_token", "vision_model.head.")


def check_checkpoint(name: str) -> PreTrainedConfig:
    """Fetch a checkpoint, try its processor, return its configuration.

    Raises whatever is wrong with it, before it fetches the weights if they would be of no use. SystemExit, if
    there is something better to do about it than to look for another one.
    """
    transformers.logging.set_verbosity_error()  # or a new head is reported as a mismatch
    transformers.logging.disable_progress_bar()  # for reading weights: many lines
    if (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name) and not Path(name).is_dir():
        raise FileNotFoundError("no such folder")  # the Hub would complain about the name of a repository
    content = PreTrainedConfig.get_config_dict(name)[0]
    kind = content.get("model_type")
    if kind not in TYPES:
        refuse_other_kinds(name, content)
        raise ValueError(f"its model_type is {kind}, not one of {', '.join(TYPES)}")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    channels = vision_of(config).num_channels
    if channels != 3:
        what = f"cannot use {name}: its {kind} takes {channels}-channel images, not RGB"
        stop(what, "use another --model_name_or_path: `pipeline` makes every image RGB")
    source = processor_of(name)
    if source != name and hasattr(config, "calibration_temperature"):
        raise ValueError("it was made by this script, and its preprocessor_config.json is gone")
    shape, sides = pixel_shape(AutoImageProcessor.from_pretrained(source)), sides_of(config)
    if source != name:
        text = "%s has no preprocessor_config.json: taking the defaults of %sImageProcessor at %s x %s pixels"
        log.warning(text, name, PROCESSORS[kind], *shape[1:])
    if shape[1] != shape[2] or (shape[1:] != sides and kind not in ANY_SIZE):
        raise ValueError(f"its processor makes {shape} pixels, but its {kind} takes {sides}")
    labels = config.id2label
    if [*labels] != [*range(len(labels))] or {*map(type, labels.values())} != {str}:
        raise ValueError('id2label of its config.json must name every class: {"0": "...", "1": "..."}')
    open_weights(name)
    return config


def finder(name: str) -> Callable[[str], str | None]:
    """Return a function that fetches a file of a checkpoint and returns its path; None if there is none."""
    # no public option tells a file that is not there from a network that is not there
    return functools.partial(cached_file, name, _raise_exceptions_for_missing_entries=False)


def refuse_other_kinds(name: str, content: dict) -> None:
    """Raise SystemExit if a checkpoint is no model of transformers; `content` is its config.json."""
    if adapter := finder(name)("adapter_config.json"):
        base = read_json(Path(adapter)).get("base_model_name_or_path")
        what = f"cannot use {name}: it is a PEFT adapter of {base}, not a whole model"
        remedy = "load both with peft, call merge_and_unload() and save_pretrained(FOLDER), and give FOLDER"
        stop(what, remedy)
    if "architecture" in content:  # transformers calls some of them timm_wrapper
        what = f"cannot use {name}: it is a model of timm, {content['architecture']}, not of transformers"
        stop(what, f"use a checkpoint of transformers: one of {', '.join(TYPES)}")


def vision_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that is about images: SigLIP has one for texts, too."""
    return getattr(config, "vision_config", config)


def has_class_names(config: PreTrainedConfig) -> bool:
    """Say whether the classes have names of their own; a body without a head has LABEL_0 and LABEL_1."""
    return not all(re.fullmatch(r"LABEL_\d+", label) for label in config.id2label.values())


def sides_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the height and width that the model was made for, in pixels: a number or a pair."""
    size = vision_of(config).image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def processor_of(name: str) -> str:
    """Return where the processor of a checkpoint is: with it or, if it has none, in a temporary folder.

    That one has the defaults of its type, all sizes scaled so that it makes what the model was made for.
    """
    find = finder(name)
    if find("preprocessor_config.json") or find("processor_config.json"):
        return name
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    folder = tempfile.mkdtemp(prefix="processor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kind, path = config.model_type, Path(folder, "preprocessor_config.json")
    numbers = {"image_processor_type": f"{PROCESSORS[kind]}ImageProcessor"}
    path.write_text(json.dumps(numbers))
    if kind not in ANY_SIZE:
        processor = AutoImageProcessor.from_pretrained(folder)
        scale, sizes = sides_of(config)[0] / pixel_shape(processor)[1], processor.to_dict()
        for part in ("size", "crop_size"):
            scaled = {side: round(n * scale) for side, n in (sizes.get(part) or {}).items() if n}
            numbers |= {part: scaled} if scaled else {}
        path.write_text(json.dumps(numbers))
    return folder


def open_weights(name: str) -> None:
    """Fetch the weights and read their table of contents.

    Raises OSError, ValueError, SafetensorError; SystemExit if they are pickles, or were not fetched.
    """
    find = finder(name)
    weights, index = find("model.safetensors"), None
    if not weights and not (index := find("model.safetensors.index.json")):
        refuse_pickle(name)
        raise ValueError("it has no model.safetensors")
    parts = sorted(set(read_json(Path(index))["weight_map"].values())) if index else ["model.safetensors"]
    for part in parts:
        path = find(part)
        if not path:
            raise ValueError(f"{part} is missing")
        with open(path, "rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                what = f"cannot use {name}: its {part} is a pointer of Git LFS, not the weights"
                stop(what, "fetch them in that folder: git lfs install && git lfs pull")
        with safetensors.safe_open(path, "pt"):
            pass


def refuse_pickle(name: str) -> None:
    """Raise SystemExit with the command that converts them, if the weights are pickles."""
    find = finder(name)
    refuse_other_kinds(name, {})
    if find("pytorch_model.bin") or find("pytorch_model.bin.index.json"):
        folder, parts = f"{Path(name).name}-safetensors", ["AutoModelForImageClassification"]
        parts += ["AutoImageProcessor"] if processor_of(name) == name else []
        code = f"import transformers as t; [kind.from_pretrained({name!r}).save_pretrained({folder!r}) "
        code += f"for kind in ({', '.join(f't.{part}' for part in parts)},)]"
        what = f"cannot use {name}: its weights are a pickle, which can run code"
        stop(what, f'if you trust it, convert it and use {folder}: python -c "{code}"')


def pixel_shape(processor: BaseImageProcessor) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the processor makes of an image, by trying it."""
    return tuple(processor(PIL.Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[1:])


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the blocks that an image passes one after another; of Swin and ConvNeXt, the stages."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
