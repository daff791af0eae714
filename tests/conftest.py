"""Small images, a tiny ViT and a way to run the script, for all tests. Nothing here needs a network."""

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as cores in each worker would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from draw_sample import save_processor
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SAMPLE = ("--config", "data/sample.yaml")
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A ViT of 5,000 random float16 weights that takes 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=7,
    )  # fmt: skip
    torch.manual_seed(0)  # the same weights in every run, or a test would pass by luck
    ViTForImageClassification(config).half().save_pretrained(folder)
    save_processor(folder, 32)
    return folder


def draw(colour, rng, size=(40, 36)):
    """Noise around a colour: easy to tell apart, no two alike."""
    noise = rng.normal(0, 40, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def make_images(tmp_path):
    """Return a function that fills a folder with `count` JPEGs a class and returns the folder."""

    def make(name="images", count=12, classes=tuple(COLOURS)):
        rng = np.random.default_rng(0)
        for index, label in enumerate(classes):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(count):
                draw(list(COLOURS.values())[index % 3], rng).save(folder / f"{i:03}.jpg", quality=90)
        return tmp_path / name

    return make


def run_script(*flags, launcher=()):
    """Run finetune_vit.py as a user would; return the completed process with its output as text."""
    command = [sys.executable, *launcher, "finetune_vit.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run on the sample, to look at, not to change: its folders, output and seconds."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*SAMPLE, "--data_root", folder / "data", "--output_dir", folder / "model"]
    start = time.perf_counter()
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    return {"flags": flags, "model": folder / "model", "data": folder / "data", "done": done,
            "seconds": time.perf_counter() - start}  # fmt: skip
