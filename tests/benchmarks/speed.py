"""How fast each step is, against the tutorial's way, transformers' example and a bare PyTorch loop.

    python tests/benchmarks/speed.py [--data_dir FOLDER] [--model_name_or_path MODEL] [--output FILE.json]
    python tests/benchmarks/speed.py --vit_b --images_per_step 8 16 32 64 128 --steps 40 \
        --parts prepare iterate train profile evaluate predict augment tutorial     (on a GPU)

Runs on the first GPU, else on the CPU. Without a folder of class folders it draws JPEGs of Kvasir's sizes
(about 290 kB each), without a model it takes a ViT-S/16 of random weights. Every figure is the median of
`--repeats` measurements, the ways in turn, with the lowest and the highest. Needs no network; takes about 15
minutes on two cores. Other flags are those of the script, such as --torch_compile true, --optim adamw_torch.

ways: tutorial    Dataset.map to lists of floats, torch.tensor in the collate function, float32
      example     set_transform in two worker processes, with torchvision's transforms where it is installed,
                  else with the image processor
      script      finetune_vit.py
      bare        random tensors that are on the device already, the same model, optimiser and precision
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import simplejpeg
import torch
import transformers
from torch.autograd import DeviceType
from datasets.arrow_writer import ArrowWriter
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from story import ROOT, build_trainer, read_settings

from steps.architectures import pixel_shape
from steps.load import list_images, load_folder
from steps.model import augment
from steps.options import AUGMENTATIONS, Settings
from steps.preprocess import Collator, prepare_pixels
from steps.use import classify
from steps.workspace import versions

KVASIR_SIZES = [(720, 576)] * 4 + [(1280, 1024)] * 3 + [(1920, 1072)]
PARTS = "start prepare iterate train profile evaluate predict augment tutorial memory".split()
figures = defaultdict(list)  # (what, way, unit): measurements


def note(what: str, way: str, unit: str, value: float) -> None:
    figures[what, way, unit].append(value)
    print(f"{what}, {way}: {value:,.4g} {unit}", flush=True)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_photo(folder: Path, classes: int, number: int) -> None:
    """Draw a JPEG of about 290 kB: soft colours and grain."""
    rng = np.random.default_rng(number)
    width, height = KVASIR_SIZES[number % len(KVASIR_SIZES)]
    soft = PIL.Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height))
    grain = rng.standard_normal((height, width, 1), np.float32) * 6e3 / (width * height) ** 0.5
    path = folder / f"class-{number // 8 % classes}" / f"{number}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(simplejpeg.encode_jpeg((soft + grain).clip(0, 255).astype(np.uint8), quality=90))


def draw_photos(folder: Path, count: int, classes: int) -> None:
    """Draw so many JPEGs of Kvasir's sizes on all cores."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(draw_photo, folder, classes), range(count), chunksize=8))


def make_model(name: str | None, folder: Path, base: bool) -> str:
    """Return `name`, or the folder of a new ViT-S/16 of random weights, of a ViT-B/16 if `base`."""
    if name is None:
        name = str(folder / "vit")
        sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536} if not base else {}
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(name)
        transformers.ViTImageProcessor().save_pretrained(name)
    return name


# ---------------------------------------------------------------- preparation


def tutorial_prepare(images: datasets.Dataset, folder: Path, processor, path: Path) -> datasets.Dataset:
    def transform(row: dict) -> dict:
        image = PIL.Image.open(folder / row["file"]).convert("RGB")
        return {"pixel_values": processor(image)["pixel_values"][0]}

    return images.map(transform, cache_file_name=str(path), remove_columns="file")


def measure_preparation(images, folder: Path, processor, work: Path, repeats: int, few: int) -> tuple:
    size = {name: round(side * 8 / 7) for name, side in processor.to_dict()["size"].items() if side}
    larger = type(processor).from_dict(processor.to_dict() | {"size": size})
    prepared = {}
    for i in range(repeats):
        start, path = time.perf_counter(), work / f"tutorial-{i}.arrow"
        slow = tutorial_prepare(images.select(range(few)), folder, processor, path)
        note("prepare", "tutorial", "images/s", few / (time.perf_counter() - start))
        note("cache", "tutorial", "bytes/image", path.stat().st_size / few)
        for way, one in (("script", processor), ("script, 8/7 the side", larger)):
            start = time.perf_counter()
            pixels = prepare_pixels(images, folder, one, work / f"{way}-{i}")
            note("prepare", way, "images/s", len(images) / (time.perf_counter() - start))
            size = Path(pixels.cache_files[0]["filename"]).stat().st_size
            note("cache", way, "bytes/image", size / len(images))
            prepared[way] = pixels
    return slow, *prepared.values(), larger


# ---------------------------------------------------------------- iterating


def tutorial_collate(rows: list[dict]) -> dict:
    pixels = torch.tensor([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


def example_dataset(images: datasets.Dataset, folder: Path, processor) -> datasets.Dataset:
    """Return `images` with the transform of run_image_classification.py, or the processor in its place."""
    if importlib.util.find_spec("torchvision"):
        from torchvision.transforms import (
            Compose,
            Normalize,
            RandomHorizontalFlip,
            RandomResizedCrop,
            ToTensor,
        )

        normalise = Normalize(processor.image_mean, processor.image_std)
        size = pixel_shape(processor)[1:]
        transform = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalise])
    else:

        def transform(image):
            return processor(image, return_tensors="pt")["pixel_values"][0]

    def read(batch: dict) -> dict:
        files = [PIL.Image.open(folder / file).convert("RGB") for file in batch["file"]]
        return {"pixel_values": [transform(file) for file in files], "label": batch["label"]}

    return images.with_transform(read)


def example_collate(rows: list[dict]) -> dict:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


def iterate(loader: DataLoader) -> float:
    """Return the images a second of one epoch."""
    start = time.perf_counter()
    count = sum(len(batch["labels"]) for batch in loader)
    return count / (time.perf_counter() - start)


def measure_iteration(slow, images, folder: Path, processor, trainer, larger, repeats: int) -> None:
    batch = {"batch_size": trainer.args.train_batch_size, "shuffle": True}
    tutorial = DataLoader(slow, collate_fn=tutorial_collate, **batch)
    example = DataLoader(
        example_dataset(images, folder, processor), collate_fn=example_collate, num_workers=2, **batch
    )
    for _ in range(repeats):
        note("iterate", "tutorial", "images/s", iterate(tutorial))
        note("iterate", "example", "images/s", iterate(example))
        note("iterate", "script", "images/s", iterate(trainer.get_train_dataloader()))
        note("iterate", "script, 8/7 the side", "images/s", iterate(larger.get_train_dataloader()))


# ---------------------------------------------------------------- training and evaluating


def random_pixels(count: int, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, device=device)


class BareLoop(transformers.TrainerCallback):
    """After each epoch of the Trainer, times as many steps without it; the first epoch is the warm-up."""

    def __init__(self, trainer: transformers.Trainer, shape: tuple[int, int, int]) -> None:
        self.trainer, self.shape = trainer, shape
        self.what = f"train, {trainer.args.train_batch_size} images per step"

    def prepare(self, args: transformers.TrainingArguments) -> None:
        if args.device.type == "cuda":  # so far the memory holds nothing of the bare loop
            note(self.what, "script", "MB, peak", torch.cuda.max_memory_allocated() / 1e6)
        self.model = copy.deepcopy(self.trainer.model)
        fused = {"fused": True} if "fused" in args.optim else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), args.learning_rate, **fused)
        self.pixels = random_pixels(args.train_batch_size, self.shape, args.device)
        self.labels = torch.zeros(len(self.pixels), dtype=torch.long, device=args.device)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = clock(args.device)

    def on_epoch_end(self, args, state, control, **kwargs):
        seconds = clock(args.device) - self.start
        if state.epoch == 1:
            self.prepare(args)
        steps = round(state.max_steps / args.num_train_epochs)
        self.model.train()
        start = clock(args.device)
        for _ in range(steps):
            with precision(args):
                loss = self.model(pixel_values=self.pixels, labels=self.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        bare = clock(args.device) - start
        if state.epoch > 1:
            images = steps * args.train_batch_size
            note(self.what, "script", "images/s", images / seconds)
            note(self.what, "bare", "images/s", images / bare)
            note(self.what, "script / bare", "ratio", bare / seconds)


class Profile(transformers.TrainerCallback):
    """What PyTorch's profiler says of the last steps of an epoch: is the device waited for, is it busy?"""

    WARM_UP = 10  # steps

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=activities)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.WARM_UP:
            self.start = clock(args.device)
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        seconds, steps = clock(args.device) - self.start, state.global_step - self.WARM_UP
        self.profiler.stop()
        what, events = f"profile, {args.train_batch_size} images per step", self.profiler.key_averages()
        kernels = [event for event in self.profiler.events() if event.device_type == DeviceType.CUDA]
        kernels = [event for event in kernels if not event.is_user_annotation]  # those span many kernels
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        waits = {
            event.key: event.count for event in events if "Synchronize" in event.key or "DtoH" in event.key
        }
        note(what, "script", "share of time the device is busy", busy / seconds)
        note(what, "script", "waits for the device per step", sum(waits.values()) / steps)
        print(f"{what}: {waits} in {steps} steps", flush=True)


def precision(args: transformers.TrainingArguments) -> torch.autocast:
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)


def measure_evaluation(trainer, shape: tuple[int, int, int], repeats: int) -> None:
    args, rows = trainer.args, trainer.eval_dataset
    pixels = random_pixels(args.eval_batch_size, shape, args.device)
    batches = len(rows) // len(pixels)
    assert batches * len(pixels) == len(rows), "whole batches only"
    for i in range(repeats + 1):
        start = clock(args.device)
        trainer.predict(rows)
        seconds = clock(args.device) - start
        with precision(args), torch.no_grad():
            start = clock(args.device)
            for _ in range(batches):
                trainer.model(pixel_values=pixels)
            bare = clock(args.device) - start
        if i:
            note("evaluate", "script", "images/s", len(rows) / seconds)
            note("evaluate", "bare", "images/s", len(rows) / bare)
            note("evaluate", "script / bare", "ratio", bare / seconds)


def measure_prediction(trainer, folder: Path, processor, repeats: int) -> None:
    """Compare --predict, which decodes the files as it goes, with the model alone."""
    args, shape, model = trainer.args, pixel_shape(processor), trainer.model.eval()
    pixels = random_pixels(args.eval_batch_size, shape, args.device)
    files = {path: Path(path) for path in list_images(folder)[0]}
    batches = len(files) // len(pixels)
    files = dict(list(files.items())[: batches * len(pixels)])
    for i in range(repeats + 1):
        start = clock(args.device)
        rows = sum(len(table) for table in classify(files, model, processor, args))
        seconds = clock(args.device) - start
        with precision(args), torch.inference_mode():
            start = clock(args.device)
            for _ in range(batches):
                model(pixel_values=pixels)
            bare = clock(args.device) - start
        if i:
            note("predict", "script", "images/s", rows / seconds)
            note("predict", "bare", "images/s", rows / bare)
            note("predict", "script / bare", "ratio", bare / seconds)


def tutorial_training(slow, checkpoint: str, args, repeats: int) -> Iterator[float]:
    """Yield the images a second of the tutorial's loop: batches of 16, float32, from lists of floats."""
    model = transformers.ViTForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    model = model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5)
    loader = DataLoader(slow, batch_size=16, shuffle=True, collate_fn=tutorial_collate, drop_last=True)
    for i in range(repeats + 1):
        start, images = clock(args.device), 0
        for batch in loader:
            batch = {name: value.to(args.device) for name, value in batch.items()}
            model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            images += len(batch["labels"])
        if i:
            yield images / (clock(args.device) - start)


def measure_augmentation(args, shape: tuple[int, int, int], repeats: int) -> None:
    """Note what all four kinds cost, and what kornia needs for the same where it is installed."""
    pixels = random_pixels(32, shape, args.device)
    ways = {"script": lambda: augment(pixels, ",".join(AUGMENTATIONS))}
    if importlib.util.find_spec("kornia"):
        import kornia.augmentation as kornia

        steps = kornia.AugmentationSequential(
            kornia.RandomHorizontalFlip(),
            kornia.RandomRotation90((0, 3), p=1),
            kornia.RandomResizedCrop(shape[1:], scale=(0.64, 1), ratio=(1, 1), p=1),
            kornia.ColorJiggle(0.2, 0.2, 0.2, 0, p=1),
        )
        ways["kornia"] = lambda: steps(pixels / 255)
    for i in range(repeats + 1):
        for way, vary in ways.items():
            start = clock(args.device)
            vary()
            seconds = clock(args.device) - start
            if i:
                note("augment", way, "ms/image", 1000 * seconds / len(pixels))


# ---------------------------------------------------------------- memory and start-up

FEED = """
import sys
sys.path.insert(0, sys.argv[1])
import datasets, numpy as np
from steps.preprocess import Collator
from torch.utils.data import DataLoader
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
rows = datasets.Dataset.from_file(sys.argv[2])
rows = rows.select(np.arange(int(sys.argv[3]))).select_columns(["pixel_values", "label"])
peak = seen = 0
for i, batch in enumerate(DataLoader(rows, batch_size=64, shuffle=True, collate_fn=Collator((3, 224, 224)))):
    seen += len(batch["labels"])
    if i % 16 == 0:
        peak = max(peak, status("RssAnon"))
assert seen == len(rows)
print(peak, status("VmHWM"))
"""


def measure_memory(work: Path, counts: list[int]) -> None:
    """Note the peak memory of a process that goes through one epoch of so many random images."""
    if not Path("/proc/self/status").exists():
        return
    path, rng = work / "random.arrow", np.random.default_rng(0)
    features = datasets.Features({"label": datasets.Value("int64"), "pixel_values": datasets.Value("binary")})
    with ArrowWriter(features=features, path=str(path), writer_batch_size=256) as writer:
        for _ in range(max(counts)):
            writer.write({"label": 0, "pixel_values": rng.bytes(3 * 224 * 224)})
        writer.finalize()
    for count in counts:
        command = [sys.executable, "-c", FEED, str(ROOT), str(path), str(count)]
        anonymous, resident = subprocess.run(command, check=True, capture_output=True).stdout.split()
        note("memory", f"script, {count:,} images", "MB of its own, peak", int(anonymous) / 1e6)
        note("memory", f"script, {count:,} images", "MB with mapped cache, peak", int(resident) / 1e6)


def measure_start_up(work: Path, repeats: int) -> None:
    run = "finetune_vit.py --config data/sample.yaml --num_train_epochs 1 --report_to none".split()
    run += ["--output_dir", str(work / "sample"), "--data_root", str(work / "data")]
    subprocess.run([sys.executable, *run], cwd=ROOT, check=True, capture_output=True)
    ways = {
        "import torch": ["-c", "import torch"],
        "from transformers import Trainer": ["-c", "from transformers import Trainer"],
        "finetune_vit.py --help": ["finetune_vit.py", "--help"],
        "finished run on the sample, again": run,
    }
    for _ in range(repeats):
        for way, arguments in ways.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            note("start", way, "s", time.perf_counter() - start)


# ---------------------------------------------------------------- all of it


def build(checkpoint: str, pixels, processor, options: list[str], steps: int | None) -> transformers.Trainer:
    """Return the script's own Trainer; both splits are `steps` whole batches of `pixels`.

    Without `steps`, as many batches as 256 images make.
    """
    settings, training = read_settings(options)
    splits = {}
    for name, batch in (("train", training.train_batch_size), ("validation", training.eval_batch_size)):
        count = (steps or max(1, min(len(pixels), 256) // batch)) * batch
        splits[name] = pixels.select(np.arange(count) % len(pixels))
    return build_trainer(
        checkpoint, datasets.DatasetDict(splits), training, settings=settings, processor=processor,
        class_names=pixels.features["label"].names, shape=pixel_shape(processor),
    )  # fmt: skip


def measure(options: argparse.Namespace, work: Path, more: list[str]) -> None:
    checkpoint = make_model(options.model_name_or_path, work, options.vit_b)
    processor = transformers.ViTImageProcessor.from_pretrained(checkpoint)
    folder, parts, repeats = (
        Path(options.data_dir or work / "photos").resolve(),
        options.parts,
        options.repeats,
    )
    if options.data_dir is None:
        draw_photos(folder, 256, 2)
    images, _ = load_folder(folder, Settings(), work / "hub")
    few = min(len(images), 64)
    settings = ["--output_dir", str(work / "model"), "--report_to", "none", "--disable_tqdm", "true"]
    settings += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    settings += ["--data_url", "https://unused/x.zip", "--num_train_epochs", str(repeats + 1)]
    settings += ["--min_steps", "0", *more]

    if "start" in parts:
        measure_start_up(work, repeats)
    datasets.disable_progress_bars()
    slow, fast, larger, processor_of_larger = measure_preparation(
        images, folder, processor, work, repeats if "prepare" in parts else 1, few
    )
    shape = pixel_shape(processor)
    for count in options.images_per_step:
        flags = [*settings, "--per_device_train_batch_size", str(count)]
        if "train" in parts:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            trainer = build(checkpoint, fast, processor, flags, options.steps)
            trainer.add_callback(BareLoop(trainer, shape))
            trainer.train()
        if "profile" in parts:
            profiled = build(checkpoint, fast, processor, [*flags, "--num_train_epochs", "1"], options.steps)
            profiled.add_callback(Profile())
            profiled.train()
    trainer = build(checkpoint, fast, processor, settings, options.steps)
    wide = transformers.Trainer(
        trainer.model, trainer.args, data_collator=Collator(pixel_shape(processor_of_larger)),
        train_dataset=larger.select_columns(["pixel_values", "label"]),
    )  # fmt: skip
    if "iterate" in parts:
        measure_iteration(slow, images, folder, processor, trainer, wide, repeats)
    if "evaluate" in parts:
        measure_evaluation(trainer, shape, repeats)
    if "predict" in parts:
        measure_prediction(trainer, folder, processor, repeats)
    if "augment" in parts:
        measure_augmentation(trainer.args, shape, repeats)
    if "tutorial" in parts:
        for speed in tutorial_training(slow, checkpoint, trainer.args, repeats):
            note("train", "tutorial", "images/s", speed)
    if "memory" in parts:
        measure_memory(work, [1000, options.memory_images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data_dir", help="folder of class folders; default: drawn JPEGs")
    parser.add_argument("--model_name_or_path", help="a ViT; default: a ViT-S/16 of random weights")
    parser.add_argument("--vit_b", action="store_true", help="ViT-B/16 of random weights")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "profile"]
    )
    parser.add_argument("--images_per_step", nargs="+", type=int, default=[8])
    parser.add_argument("--steps", type=int, help="per measurement; default: what 256 images make")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory_images", type=int, default=100_000, help="150 kB of disk each, for a while")
    parser.add_argument("--output", default="speed.json", help="where the figures go")
    options, more = parser.parse_known_args()  # what is left are settings of the script
    with tempfile.TemporaryDirectory() as work:
        measure(options, Path(work), more)
    rows = [
        {"step": what, "way": way, "unit": unit, "median": np.median(values), "low": min(values),
         "high": max(values), "n": len(values)}
        for (what, way, unit), values in figures.items()
    ]  # fmt: skip
    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    header = {"machine": f"{machine}, {os.cpu_count()} CPU cores", "versions": versions()}
    Path(options.output).write_text(
        json.dumps(header | {"command": sys.argv, "figures": rows}, indent=1) + "\n"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.4g}".format))


if __name__ == "__main__":
    main()
