"""Step 6: a model that takes uint8 pixels, varies and normalises them on the device."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import BaseImageProcessor, PreTrainedModel

from .architectures import HEAD, MEAN_LOSS, UNUSED, has_class_names
from .console import log, stop


def draw_head(model: PreTrainedModel, loading: dict[str, Any], checkpoint: str, seed: int) -> bool:
    """Make a random head from `seed` unless the checkpoint has one with the same classes in the same order.

    Returns whether it is new. `loading` says what `from_pretrained` did not find: SystemExit if that was more
    than the head, or the head of a finished model.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    drawn = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    names, unnamed = config.id2label, not has_class_names(config)
    bare = unnamed and "classifier.weight" in loading["missing_keys"]
    known = names == model.config.id2label and not bare
    if unnamed and not known and "classifier.weight" not in drawn:
        what = f"the {len(names)} classes of the head in {checkpoint} have no names, so a new head is made"
        remedy = "to keep the old one, name them in order in id2label of its config.json"
        log.warning("warning: %s; %s", what, remedy)
    if lacking := sorted(name for name in drawn if known or not name.startswith(HEAD)):
        text = f"the weights in {checkpoint} are not those of its config.json: {lacking[0]} is missing"
        stop(f"{text} or of another size", "use another --model_name_or_path")
    if not known:
        transformers.set_seed(seed)
        spread = getattr(model.config, "initializer_range", 0.02)  # SigLIP has none
        torch.nn.init.trunc_normal_(model.classifier.weight, std=spread)
        torch.nn.init.zeros_(model.classifier.bias)
        model.config.calibration_temperature = 1.0  # or another head's would stay
    head = "its own" if known else "a new"
    log.info("%s: %.1f million parameters, %s head", checkpoint, model.num_parameters() / 1e6, head)
    transformers.logging.set_verbosity_warning()  # from here on its warnings matter
    return not known


def prepare_training(model: PreTrainedModel, freeze_backbone: bool) -> None:
    """Freeze all but the head or, without `freeze_backbone`, only what no logit depends on."""
    for name, weights in model.named_parameters():
        unused = any(part in name for part in UNUSED)  # or processes would wait for its gradient
        weights.requires_grad_(name.startswith("classifier.") or not (freeze_backbone or unused))
    if model.config.model_type in MEAN_LOSS:  # or the Trainer would add up the losses of accumulated steps
        model.accepts_loss_kwargs = False


def normalise_on_device(model: PreTrainedModel, processor: BaseImageProcessor, kinds: str = "") -> None:
    """Let `model` turn uint8 pixels into what `processor` would make of them; floats pass unchanged.

    While the model trains, `augment` varies them first, by `kinds`.
    """
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    for name, value in (("pixel_mean", mean), ("pixel_std", std)):  # in grey levels; moved with it, not saved
        model.register_buffer(name, torch.tensor(value).view(1, -1, 1, 1) / scale, persistent=False)

    def normalise(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = kwargs["pixel_values"]
        if pixels.dtype == torch.uint8:  # models would take them as they are and learn little
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
