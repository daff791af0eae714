"""Small images, a tiny ViT and a way to run the script, for all tests. Nothing here needs a network."""

import atexit
import functools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as cores in each worker would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import filelock
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from draw_sample import save_processor
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from story import RECIPES, REPOSITORY, ROOT, build_trainer, make_work, read_settings, story  # noqa: F401

from steps.architectures import pixel_shape
from steps.download import fetch_images
from steps.duplicates import Scenes
from steps.files import probability_columns
from steps.image_formats import readable_endings, register
from steps.load import load_folder
from steps.options import Settings
from steps.preprocess import keep_readable, prepare_pixels
from steps.split import split_images
from steps.workspace import Workspace, choose_checkpoint


def load_images(folder, settings=None):
    """The table of the images in `folder`, as step 3 makes it."""
    with tempfile.TemporaryDirectory() as cache:
        images, _ = load_folder(Path(folder), settings or Settings(), Path(cache))
        return images.from_dict(images.to_dict(), features=images.features)  # nothing is left in the cache


def locate_images(settings):
    """The folder that step 2 returns; the archive is kept in data_root, as it is everywhere but on Colab."""
    return fetch_images(Workspace(settings, None, Path(settings.data_root)))[0]


def left_over(root):
    """The names of what lies in `root`, without hidden entries."""
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


SAMPLE = ("--config", "data/sample.yaml")
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


# From the slowest on; the second and third have no need of the sample, which the first one makes.
SLOW = "script faults scale publish use page notebook checkpoints recipe finetune settings download".split()


def pytest_collection_modifyitems(items):
    """Put the slowest files first: xdist hands out whole files, and a slow one must not be the last."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(SLOW)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))  # stable


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


def draw_images(root, count, classes=tuple(COLOURS)):
    """Fill a folder with `count` JPEGs per class and return it."""
    rng = np.random.default_rng(0)
    for index, label in enumerate(classes):
        folder = root / label
        folder.mkdir(parents=True)
        for i in range(count):
            draw(list(COLOURS.values())[index % 3], rng).save(folder / f"{i:03}.jpg", quality=90)
    return root


@pytest.fixture
def make_images(tmp_path):
    """Return a function that fills a folder with `count` JPEGs per class and returns the folder."""
    return lambda name="images", count=12, classes=tuple(COLOURS): draw_images(
        tmp_path / name, count, classes
    )


@pytest.fixture
def fresh_endings():
    """Let the endings that Pillow reads be found anew, by a test that changes Pillow and after it."""
    readable_endings.cache_clear()
    yield
    readable_endings.cache_clear()


@pytest.fixture
def bare_pillow(monkeypatch, fresh_endings):
    """Pillow as it is where neither pydicom nor pillow-heif is installed."""
    register()  # or it would come back
    for kind in ("DICOM", "HEIF"):
        monkeypatch.delitem(PIL.Image.OPEN, kind, raising=False)
    monkeypatch.setattr(PIL.Image, "ID", [kind for kind in PIL.Image.ID if kind in PIL.Image.OPEN])


class Training:
    """Step 7 of the script on prepared images: its own code, with a hook on the Trainer that it builds."""

    def __init__(self, work, processor, images, scenes, hook):
        self.work, self.settings, self.training = work, work.settings, work.training
        self.checkpoint, self.hook = choose_checkpoint(work), hook
        self.splits = split_images(images, scenes, work)
        self.values = {
            "settings": self.settings, "training": self.training, "processor": processor,
            "shape": pixel_shape(processor), "class_names": images.features["label"].names,
        }  # fmt: skip
        self.names = story(**self.values)

    def fine_tune(self):
        """Return the Trainer after the script's own `fine_tune`."""

        class Trainer(transformers.Trainer):
            def __init__(trainer, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.hook(trainer)

        self.names["Trainer"] = Trainer
        return self.names["fine_tune"](self.checkpoint, self.splits, self.training)

    def build(self):
        """Return the Trainer as `fine_tune` builds it, untrained."""
        return build_trainer(self.checkpoint, self.splits, **self.values)


@pytest.fixture(scope="session")
def start_in(tmp_path_factory, tiny_vit):
    """Return a function that gives a `Training` into a folder, on 20 images per class, each its own scene.

    `hook` is called with the Trainer, once that is built.
    """
    root = tmp_path_factory.mktemp("prepared")
    folder, processor = draw_images(root / "images", 20), ViTImageProcessor.from_pretrained(tiny_vit)
    images = prepare_pixels(load_images(folder), folder, processor, root / "cache")
    images = keep_readable(images, {}, root / "left_out.csv")
    pairs = pd.DataFrame(columns=["file_a", "file_b", "distance", "label_a", "label_b"])
    scenes = Scenes(pairs, pd.Series(range(len(images)), images["file"][:]))

    def make(output_dir, *flags, checkpoint=tiny_vit, hook=lambda trainer: None):
        work = make_work([
            "--data_dir", folder, "--output_dir", output_dir, "--learning_rate", "5e-3",
            "--num_train_epochs", "4", "--bf16", "false", "--report_to", "none",
            "--per_device_train_batch_size", "16", "--min_steps", "0",
            "--model_name_or_path", checkpoint, *flags,
        ])  # fmt: skip
        return Training(work, processor, images, scenes, hook)

    return make


@pytest.fixture
def start(tmp_path, start_in):
    """Return `start_in` for a folder of this name in `tmp_path`."""
    return lambda name, *flags, **options: start_in(tmp_path / name, *flags, **options)


def weights(folder):
    """The weights of a saved model, by name."""
    return ViTForImageClassification.from_pretrained(folder).state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def uncalibrated(folder):
    """The weights before the head was divided by the temperature."""
    model = ViTForImageClassification.from_pretrained(folder)
    head = [name for name in model.state_dict() if name.startswith("classifier.")]
    assert len(head) == 2
    factor = dict.fromkeys(head, model.config.calibration_temperature)
    return {name: value * factor.get(name, 1.0) for name, value in model.state_dict().items()}


@pytest.fixture
def archive(tmp_path, make_images):
    """A zip of three class folders in one root folder, as Kvasir's is."""
    make_images("wrapped/endoscopy")
    return shutil.make_archive(tmp_path / "endoscopy", "zip", tmp_path / "wrapped")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited between attempts, without waiting them."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def right_flags(tmp_path):
    """Flags that are right as they stand, so that a test can add one that is wrong."""
    (tmp_path / "images").mkdir()
    return ["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "model")]


# Starts runs without their seconds of imports: a fresh process that has imported the rooms, and so all that
# they import, and forks for each line of flags. A process that never used torch's threads may be forked.
SERVER = """
import importlib, json, os, pkgutil, resource, runpy, sys
import steps
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, pipeline
for room in pkgutil.iter_modules(steps.__path__):
    importlib.import_module(f"steps.{room.name}")
for line in sys.stdin:
    folder, flags, *outputs, largest_file = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        script = os.path.abspath("finetune_vit.py")
        os.chdir(folder)
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def start_server():
    """Start a process that runs the script for those who `ask`; it ends once its input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes)


def ask(server, flags, stdout, stderr, largest_file=resource.RLIM_INFINITY, cwd=ROOT):
    """Let the server run the script in `cwd`; return the process. The server's next line is its status.

    With `largest_file`, in bytes, the run meets a disk that fills up.
    """
    words = str(cwd), [str(flag) for flag in flags], str(stdout), str(stderr), largest_file
    server.stdin.write(json.dumps(words) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def own_server():
    server = start_server()
    atexit.register(server.stdin.close)
    return server


def run_script(*flags, launcher=None, cwd=ROOT):
    """Run finetune_vit.py as a user would; return the completed process with its output as text.

    With a `launcher`, words before the script's name, in a process that has imported nothing.
    """
    if launcher is not None:
        command = [sys.executable, *launcher, "finetune_vit.py", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        ask(own_server(), flags, *outputs, cwd=cwd)
        status = os.waitstatus_to_exitcode(int(own_server().stdout.readline()))
        return subprocess.CompletedProcess(flags, status, *(path.read_text() for path in outputs))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run on the sample, to look at, not to change: folders, output, seconds and CPU seconds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run"
    flags = [*SAMPLE, "--data_root", folder / "data", "--output_dir", folder / "model"]
    with filelock.FileLock(f"{folder}.lock"):  # the workers of xdist share it
        if not (folder / "done.pickle").exists():
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = run_script(*flags, launcher=())
            assert done.returncode == 0, done.stderr
            seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            took = {"seconds": seconds, "cpu_seconds": cpu_seconds}
            (folder / "done.pickle").write_bytes(pickle.dumps({"done": done} | took))
    found = {"model": folder / "model", "data": folder / "data", "flags": flags}
    return found | pickle.loads((folder / "done.pickle").read_bytes())


def predict_by_chance(names, n=60, right=0.7):
    """A table of test predictions, each class about as often, `right` of them right."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(len(names)), n)
    guesses = probabilities.argmax(1)
    labels = np.where(rng.random(n) < right, guesses, rng.integers(0, len(names), n))
    table = {"file": [f"x/{row}.jpg" for row in range(n)], "split": "test"}
    table |= {"label": np.array(names)[labels], "prediction": np.array(names)[guesses]}
    return pd.concat(
        [pd.DataFrame(table), pd.DataFrame(probabilities, columns=probability_columns(names))], axis=1
    )


def draw_pixels(names, n=60):
    """A table of prepared images of noise for `predict_by_chance`, and their pixels (n, 3, 32, 32)."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    rows = {"file": [f"x/{row}.jpg" for row in range(n)], "label": [row % len(names) for row in range(n)]}
    kinds = {"file": Value("string"), "label": ClassLabel(names=names), "pixel_values": Value("binary")}
    rows["pixel_values"] = [picture.tobytes() for picture in pixels]
    return Dataset.from_dict(rows, features=Features(kinds)), pixels
