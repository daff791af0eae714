"""Draw data/sample.zip and data/sample-vit, the embedded default: `python tests/draw_sample.py`.

Eight classes with the names of Kvasir v2, drawn by formulas: no real image is in it. As in the real data,
some classes differ by a detail and some frames nearly repeat another; one file is damaged and one is grey.
"""

import io
import json
import uuid
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

DATA = Path(__file__).resolve().parent.parent / "data"
IMAGES, REPEATS = 57, 3  # scenes a class, and how many of them come a second time
WIDTH, HEIGHT = 160, 128
COLOURS = (40, 70, 175), (190, 45, 40), (35, 12, 12), (238, 205, 190)
BLUE, RED, DARK, PALE = (np.array(colour, float) for colour in COLOURS)


def smooth(rng, cells):
    """Noise (HEIGHT, WIDTH) between -1 and 1, as fine as `cells` across the image."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def blend(image, colour, weight):
    """Mix `colour` into `image` where `weight` (HEIGHT, WIDTH) is above 0; in place."""
    weight = np.clip(weight, 0, 1)[..., None]
    image += (colour - image) * weight


def soft(distance, width=0.05):
    """1 inside (negative distance), 0 outside, blurred over `width`."""
    return 1 / (1 + np.exp(np.clip(distance / width * 2, -40, 40)))


def draw_polyp(image, rng, x, y, tint):
    cx, cy, radius = rng.uniform(-0.4, 0.4), rng.uniform(-0.35, 0.35), rng.uniform(0.22, 0.4)
    distance = np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.25)) - radius * (1 + 0.15 * smooth(rng, 5))
    blend(image, tint * 0.45, 0.5 * soft(np.abs(distance) - 0.04))  # the shadow around it
    blend(image, tint * rng.uniform(0.85, 1.1), 0.85 * soft(distance))
    blend(image, PALE, 0.5 * soft(np.hypot(x - cx + radius / 3, y - cy + radius / 3) - radius / 3, 0.15))


def draw_margin(image, rng, x, y):
    """A resected area: flat, pale, with a brown rim and no shading."""
    cx, cy, radius = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.25, 0.42)
    distance = np.hypot(x - cx, y - cy) - radius * (1 + 0.45 * smooth(rng, 6))
    blend(image, np.array([120, 60, 60.0]), 0.7 * soft(np.abs(distance) - 0.03, 0.03))
    blend(image, PALE * rng.uniform(0.85, 1), 0.75 * soft(distance, 0.03))


def draw_z_line(image, rng, x, y, inflamed):
    """Pale oesophagus outside, red stomach inside a wavy line; inflammation runs over it in streaks."""
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    line = rng.uniform(0.35, 0.5) + 0.07 * np.sin(angle * rng.integers(3, 7) + rng.uniform(0, 6))
    blend(image, PALE, 0.6 * soft(line - radius, 0.04))
    blend(image, RED * 0.9, 0.5 * soft(radius - line, 0.04))
    blend(image, DARK, 0.9 * soft(radius - rng.uniform(0.08, 0.16)))
    for _ in range(rng.integers(4, 8) if inflamed else 0):
        off = np.angle(np.exp(1j * (angle - rng.uniform(-np.pi, np.pi))))
        streak = soft(np.abs(off) - rng.uniform(0.06, 0.13), 0.05)
        streak *= soft(radius - line - rng.uniform(0.2, 0.45)) * soft(line - 0.1 - radius)
        blend(image, RED, 0.75 * streak)


def draw_folds(image, rng, x, y):
    for _ in range(rng.integers(2, 4)):
        cx, cy, radius = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.5, 0.9)
        ring = np.hypot(x - cx, y - cy) - radius
        blend(image, np.array([250, 215, 150.0]), 0.6 * soft(np.abs(ring) - 0.05))
        blend(image, DARK, 0.5 * soft(np.abs(ring + 0.12) - 0.04))


def draw_pylorus(image, rng, x, y):
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    hole = rng.uniform(0.1, 0.18)
    blend(image, RED, 0.3 * soft(np.abs(radius - hole - 0.1) - 0.07))
    blend(image, DARK, 0.3 * soft(-np.sin(angle * rng.integers(6, 10)), 0.8) * soft(0.35 - radius, 0.2))
    blend(image, DARK, soft(radius - hole, 0.03))


def draw_colitis(image, rng):
    blend(image, RED, np.full((HEIGHT, WIDTH), rng.uniform(0.3, 0.5)))
    blend(image, RED * 0.6, 1.2 * (smooth(rng, 26) - 0.3))
    blend(image, PALE, 1.5 * (smooth(rng, 32) - 0.5))


def draw_image(kind, rng, shift=(0, 0), light=1.0):
    """Return an image of class `kind`; the same `rng` with another `shift` or `light` repeats the scene."""
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1.25 : 1.25 : WIDTH * 1j]
    zoom, cx, cy = rng.uniform(0.85, 1.15), rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15)
    sx, sy = (x - cx) / zoom, (y - cy) / zoom
    mucosa = np.array([205, 120, 100]) + rng.normal(0, 9, 3)
    if kind == "normal-cecum":
        mucosa += (5, 20, -5)
    image = mucosa + 16 * smooth(rng, 6)[..., None] + 7 * smooth(rng, 24)[..., None]
    if kind.startswith("dyed"):
        blend(image, BLUE, rng.uniform(0.55, 0.75) + 0.35 * smooth(rng, 5))
    if kind == "dyed-lifted-polyps":
        draw_polyp(image, rng, sx, sy, mucosa * 0.6 + BLUE * 0.4)
    elif kind == "dyed-resection-margins":
        draw_margin(image, rng, sx, sy)
    elif kind == "polyps":
        draw_polyp(image, rng, sx, sy, mucosa * (0.95, 0.7, 0.7))
    elif kind in ("normal-z-line", "esophagitis"):
        draw_z_line(image, rng, sx, sy, inflamed=kind == "esophagitis")
    elif kind == "normal-cecum":
        draw_folds(image, rng, sx, sy)
    elif kind == "normal-pylorus":
        draw_pylorus(image, rng, sx, sy)
    else:
        draw_colitis(image, rng)
    for _ in range(rng.integers(0, 4)):  # reflections of the lamp
        spot = np.hypot(x - rng.uniform(-0.8, 0.8), y - rng.uniform(-0.8, 0.8))
        blend(image, 255, soft(spot - 0.03, 0.02))
    image *= rng.uniform(0.85, 1.1) * light * (1.1 - 0.35 * (x**2 + y**2))[..., None]
    image += rng.normal(0, 3, image.shape)
    image *= soft((np.abs(x) / 1.2) ** 6 + np.abs(y) ** 6 - 0.95, 0.05)[..., None]  # the black surround
    pixels = np.roll(np.clip(image, 0, 255).astype(np.uint8), shift, (0, 1))
    return Image.fromarray(pixels)


def encode(image, quality=80):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_zip(path):
    rng = np.random.default_rng(0)
    kinds = """dyed-lifted-polyps dyed-resection-margins esophagitis normal-cecum normal-pylorus
    normal-z-line polyps ulcerative-colitis""".split()
    with zipfile.ZipFile(path, "w") as archive:
        for index, kind in enumerate(kinds):
            for i in range(IMAGES + REPEATS):
                seed = (0, index, i % IMAGES)
                again = {"shift": (1, 2), "light": 1.04} if i >= IMAGES else {}
                image = draw_image(kind, np.random.default_rng(seed), **again)
                if (kind, i) == ("normal-cecum", 5):
                    image = image.convert("L")
                content = encode(image, 75 if again else 80)
                if (kind, i) == ("polyps", 7):
                    content = content[: len(content) // 2]
                name = uuid.UUID(bytes=rng.bytes(16), version=4)
                entry = zipfile.ZipInfo(f"sample/{kind}/{name}.jpg")  # dated 1980: the same bytes every time
                archive.writestr(entry, content)


def write_model(folder):
    """A ViT of half a million random weights in float16 for 64 x 64 pixels."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    ViTForImageClassification(config).half().save_pretrained(folder)
    save_processor(folder, 64)


def save_processor(folder, size, resample=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """Write a preprocessor_config.json such as checkpoints carry."""
    content = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": resample,
        "size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write_zip(DATA / "sample.zip")
    write_model(DATA / "sample-vit")
