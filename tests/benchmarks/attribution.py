"""Does a map of what decides an answer find what decides it?

    python tests/benchmarks/attribution.py CHECKPOINT --images 100

Drawn images: tissue of any tint in a black frame, half of them with a white patch that says nothing. The
colour of one more patch, somewhere, decides the class; a fifth class has none, or a model could take one
colour for granted. The checkpoint is trained until it answers nearly all of them. For each way to make a map:
the share of new images with such a patch, answered right, in which the map's maximum lies within the patch,
the share in which it lies on something black, and the seconds per image.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.architectures import blocks_of, pixel_shape
from steps.attribution import attribute, blur
from steps.model import normalise_on_device

COLOURS = np.array([(60, 90, 220), (60, 200, 80), (230, 220, 60), (220, 60, 200)])  # of the four classes


def draw(count, size, rng):
    """Return pixels, uint8 (count, 3, size, size), labels (count,) and where the patch is, bool masks."""
    y, x = np.mgrid[:size, :size]
    pixels, labels = np.empty((count, size, size, 3)), rng.integers(0, len(COLOURS) + 1, count)
    places = np.zeros((count, size, size), bool)
    for image, label, place in zip(pixels, labels, places, strict=True):
        coarse = torch.tensor(rng.normal(0, 25, (1, 3, 7, 7)))
        waves = F.interpolate(coarse, (size, size), mode="bicubic")[0].permute(1, 2, 0).numpy()
        image[:] = rng.uniform((150, 60, 50), (230, 140, 110)) + waves + rng.normal(0, 6, image.shape)
        if rng.random() < 0.5:
            image[place_patch(size, rng)] = 245
        if label < len(COLOURS):
            place[place_patch(size, rng)] = True
            image[place] = COLOURS[label] + rng.normal(0, 10, 3)
        dark = np.abs(x - size / 2) + np.abs(y - size / 2) > rng.uniform(0.65, 0.8) * size  # black corners
        dark |= (y > rng.uniform(0.65, 1) * size) & (x < rng.uniform(0, 0.35) * size)
        image[dark & ~place] = rng.normal(4, 2)
    return (
        torch.tensor(pixels.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2),
        torch.tensor(labels),
        places,
    )


def place_patch(size, rng):
    """Return where a square patch lies: its rows, its columns."""
    side = int(rng.uniform(1 / 7, 1 / 4) * size)
    top, left = rng.integers(0, size - side, 2)
    return slice(top, top + side), slice(left, left + side)


def train(model, size, rng, options):
    """Train until ten batches in a row are answered right."""
    optimizer, streak = torch.optim.AdamW(model.parameters(), options.rate), 0
    for step in range(options.steps):
        pixels, labels, _ = draw(16, size, rng)
        logits = model.train()(pixel_values=pixels).logits
        F.cross_entropy(logits, labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()
        streak = streak + 1 if (logits.argmax(1) == labels).all() else 0
        if streak == 10:
            break
    print(f"{step + 1} steps of training", flush=True)


def rollout(model, pixels, guesses):
    """Abnar and Zuidema 2020, arXiv 2005.00928: what this project showed before."""
    layers = model(pixel_values=pixels, output_attentions=True).attentions
    itself = flow = torch.eye(layers[0].shape[-1])
    for layer in layers:
        flow = (layer.mean(1) + itself) / 2 @ flow
    return tokens_to_map(flow[:, 0])


def weighted_attention(model, pixels, guesses):
    """Chefer, Gur and Wolf 2021, arXiv 2103.15679: each attention times its gradient."""
    outputs = model(pixel_values=pixels, output_attentions=True)
    chosen = outputs.logits.gather(1, guesses[:, None]).sum()
    relevance = torch.eye(outputs.attentions[0].shape[-1])
    for layer, gradient in zip(
        outputs.attentions, torch.autograd.grad(chosen, outputs.attentions), strict=True
    ):
        relevance = relevance + (layer * gradient).clamp(min=0).mean(1) @ relevance
    return tokens_to_map(relevance[:, 0])


def of_last_block(model, pixels, guesses):
    """Return gradient times tokens where the last block reads them: Grad-CAM, arXiv 1610.02391, per token."""
    kept = []
    with blocks_of(model)[-1].register_forward_pre_hook(lambda module, args: kept.append(args[0])):
        chosen = model(pixel_values=pixels).logits.gather(1, guesses[:, None]).sum()
    return tokens_to_map((torch.autograd.grad(chosen, kept)[0] * kept[0]).sum(2))


def occlusion(model, pixels, guesses):
    """Zeiler and Fergus 2014, arXiv 1311.2901: a blurred window, a quarter of the side, at 7 x 7 places."""
    size, side, maps = pixels.shape[-1], pixels.shape[-1] // 4, []
    starts = [round(place * (size - side) / 6) for place in range(7)]
    windows = torch.zeros(49, 1, size, size, dtype=torch.bool)
    for window, (top, left) in zip(windows, [(y, x) for y in starts for x in starts], strict=True):
        window[:, top : top + side, left : left + side] = True
    for image, guess in zip(pixels, guesses, strict=True):
        covered = torch.where(windows, blur(image[None].float()).to(torch.uint8), image)
        with torch.no_grad():
            logits = torch.cat([model(pixel_values=part).logits for part in covered.split(7)])
        others = torch.arange(logits.shape[1]) != guess
        odds = logits[:, guess] - logits[:, others].logsumexp(1)
        maps.append(-(windows[:, 0] * odds[:, None, None]).sum(0) / windows.sum((0, 1)))
    return F.adaptive_avg_pool2d(torch.stack(maps), 16)


def tokens_to_map(values):
    side = math.isqrt(values.shape[1])  # the class token stands first
    return values[:, -(side**2) :].unflatten(1, (side, side))


METHODS = {
    "attention rollout": rollout,
    "gradient-weighted attention": weighted_attention,
    "gradient times tokens of the last block": of_last_block,
    "occlusion, 7 x 7 blurred windows": occlusion,
    "integrated gradients (steps/attribution.py)": lambda model, pixels, guesses: attribute(model, pixels),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-5, help="of AdamW")
    parser.add_argument("--steps", type=int, default=300, help="of 16 images, at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    processor = AutoImageProcessor.from_pretrained(options.checkpoint)
    model = AutoModelForImageClassification.from_pretrained(
        options.checkpoint, num_labels=len(COLOURS) + 1, ignore_mismatched_sizes=True, dtype=torch.float32,
        attn_implementation="eager",
    )  # fmt: skip
    normalise_on_device(model, processor)
    size = pixel_shape(processor)[1]
    train(model, size, rng, options)
    pixels, labels, places = draw(options.images, size, rng)
    with torch.no_grad():
        guesses = torch.cat([model.eval()(pixel_values=part).logits.argmax(1) for part in pixels.split(8)])
    right = guesses == labels
    print(f"{right.sum()} of {len(labels)} images answered right")
    right &= labels < len(COLOURS)
    pixels, guesses, places, rows = pixels[right], guesses[right], places[right], {}
    for name, method in METHODS.items():
        start = time.perf_counter()
        parts = zip(pixels.split(8), guesses.split(8), strict=True)
        maps = torch.cat([method(model, *part).detach() for part in parts])
        seconds = (time.perf_counter() - start) / len(pixels)
        tops = F.interpolate(maps[:, None], (size, size), mode="bilinear").flatten(1).argmax(1)
        seen = np.arange(len(pixels)), tops.numpy()
        black = pixels.amax(1).flatten(1).numpy()[seen] < 20
        found = places.reshape(len(pixels), -1)[seen]
        rows[name] = {"found": found.mean(), "on black": black.mean(), "seconds per image": seconds}
        print(pd.DataFrame({name: rows[name]}).T.round(3).to_string(header=len(rows) == 1), flush=True)


if __name__ == "__main__":
    main()
