"""Step 1: the types of checkpoints that work, what differs between them, and whether one can be used."""

import functools
from pathlib import Path

import PIL.Image
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

# `model_type` in config.json. All of these end in one linear layer, `classifier`, and none needs torchvision.
TYPES = "vit deit dinov2 dinov2_with_registers beit swin swinv2 convnext convnextv2 siglip".split()
# They take images of any size; the others take the one that they were made for.
ANY_SIZE = ("dinov2", "dinov2_with_registers", "convnext", "convnextv2")
# Transformers cannot compute their activations again to save memory.
NO_CHECKPOINTING = ("convnext", "convnextv2")
# Their head reads a class token that attends to the whole image: there is attention to show.
CLASS_TOKEN = ("vit", "deit", "dinov2", "dinov2_with_registers")
# Their loss is the mean of one batch and ignores the Trainer's count over accumulated batches.
MEAN_LOSS = ("beit", "swinv2", "siglip")
# What a checkpoint for other tasks may lack: BEiT's norm in front of the head is for classification alone.
HEAD = ("classifier.", "beit.pooler.")
# What no logit depends on: for masked images, and SigLIP's summary for comparing images with texts.
UNUSED = (".mask_token", "vision_model.head.")


def check_checkpoint(name: str) -> PreTrainedConfig:
    """Fetch a checkpoint, try its processor, return its configuration.

    Raises whatever is wrong with it, before it fetches the weights if they would be of no use.
    """
    transformers.logging.set_verbosity_error()  # or a new head is reported as a mismatch
    transformers.logging.disable_progress_bar()  # for reading weights: many lines
    if (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name) and not Path(name).is_dir():
        raise FileNotFoundError("no such folder")  # the Hub would complain about the name of a repository
    kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind not in TYPES:
        raise ValueError(f"its model_type is {kind}, not one of {', '.join(TYPES)}")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    vision = getattr(config, "vision_config", config)  # SigLIP has one for texts, too
    shape, size = pixel_shape(AutoImageProcessor.from_pretrained(name)), vision.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    fits = shape[1:] == sides or kind in ANY_SIZE
    if shape[0] != vision.num_channels or shape[1] != shape[2] or not fits:
        raise ValueError(f"its processor makes {shape} pixels, but its {kind} takes {sides}")
    open_weights(name)
    return config


def open_weights(name: str) -> None:
    """Fetch the weights and read their table of contents. Raises OSError, ValueError, SafetensorError."""
    # no public option tells a file that is not there from a network that is not there
    find = functools.partial(cached_file, name, _raise_exceptions_for_missing_entries=False)
    if weights := find("model.safetensors"):
        with safetensors.safe_open(weights, "pt"):
            return
    if not find("model.safetensors.index.json"):
        raise ValueError("it has no model.safetensors; other formats are pickles, and a pickle can run code")


def pixel_shape(processor: BaseImageProcessor) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the processor makes of an image, by trying it."""
    return tuple(processor(PIL.Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[1:])


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the blocks that an image passes one after another; of Swin and ConvNeXt, the stages."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
