"""Step 4: every file is decoded once; its pixels stay uint8, at the model's own size, in an Arrow file."""

import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.ExifTags
import PIL.Image
import simplejpeg
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from joblib import cpu_count
from transformers import BaseImageProcessor
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import load_image

from . import image_formats
from .architectures import pixel_shape
from .console import bars_wanted, log, retry, show_images, stop
from .environment import in_turn
from .files import may_use, need_space, printable, read_table, remove, write_json, write_table
from .image_formats import DEEP, LOCKED, NO_WINDOW, frames_of, is_huffman, judge, judge_content
from .image_formats import readable_endings, sample_bits
from .load import summary
from .rows import REPEATED, WITHOUT_IMAGE

# Their processors do no more than resize, crop at the centre, rescale and normalise.
PLAIN = [f"{name}ImageProcessor" for name in ("Beit", "Bit", "DeiT", "Siglip", "ViT")]

MOST_PIXELS = 50_000_000  # of an image that is to be enlarged
# Packages that decode or resize; the last ones help pydicom.
DECODERS = """pillow simplejpeg torch transformers pillow-heif pydicom pylibjpeg pylibjpeg-libjpeg
pylibjpeg-openjpeg pylibjpeg-rle python-gdcm pyjpegls""".split()


def prepare_pixels(images: Dataset, folder: Path, processor: BaseImageProcessor, cache: Path) -> Dataset:
    """Return `images` with their pixels, from the cache unless files, labels or processor have changed.

    New columns: `mode`, str, the file's mode in Pillow; `error`, str, why it could not be read, else empty;
    `pixel_values`, bytes of a uint8 array (channels, height, width), null where it could not be read.
    """
    path = cache / f"pixels-{cache_key(images, folder, processor)}.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    found = is_whole(path)
    with nullcontext() if found else in_turn(cache):  # another run may be making the same
        found, start = found or is_whole(path), time.perf_counter()
        if not found:
            for rest in (path, *cache.glob("tmp*")):  # what runs that were killed have left
                remove(rest)
            need_space(cache, len(images) * math.prod(pixel_shape(processor)))
        if bars_wanted():
            datasets.enable_progress_bars()
        new = {"mode": Value("string"), "error": Value("string"), "pixel_values": Value("binary")}
        pixels = images.map(
            functools.partial(decode_files, folder=folder, processor=processor),
            input_columns="file",
            batched=True,
            batch_size=256,
            writer_batch_size=256,
            desc="prepare",
            features=Features(images.features | new),
            new_fingerprint=path.stem.split("-")[1],
            cache_file_name=str(path),  # `datasets` renames tmp... to this once it is whole
        )
        if not found:
            speed = len(images) / (time.perf_counter() - start)
            write_json(path.with_suffix(".json"), {"images_per_second": speed})
    return pixels


def cache_key(images: Dataset, folder: Path, processor: BaseImageProcessor) -> str:
    """Return 16 hex digits of all that decides the pixels: files, labels, processor, code, versions."""
    files = images["file"][:]
    sizes = [(status.st_size, status.st_mtime_ns) for status in (os.stat(folder / file) for file in files)]
    locked = [file for file in files if not may_use(folder / file)]
    code = [inspect.getsource(step) for step in (decode_file, read_rgb, resize, image_formats)]
    for name in DECODERS:
        with suppress(importlib.metadata.PackageNotFoundError):  # some are optional
            code.append(f"{name} {importlib.metadata.version(name)}")
    state = str(folder), sizes, locked, images.to_dict(), processor.to_json_string(), code
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def is_whole(path: Path) -> bool:
    """Say whether there is an Arrow file that can be read to its end."""
    try:
        return path.exists() and len(Dataset.from_file(str(path))) > 0
    except (OSError, ValueError):  # pyarrow's
        log.warning("warning: %s is damaged and will be made again", path)
        return False


def decode_files(files: list[str], folder: Path, processor: BaseImageProcessor) -> dict[str, list]:
    """Return {column: values} of `files`, decoded in threads: decoders release Python's lock."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # per image: the images go to all cores
    try:
        with ThreadPoolExecutor(cpu_count()) as pool:
            rows = list(pool.map(lambda file: decode_file(folder / file, processor), files))
    finally:
        torch.set_num_threads(threads)
    return {name: [row[name] for row in rows] for name in rows[0]}


def decode_file(path: Path, processor: BaseImageProcessor) -> dict[str, str | bytes | None]:
    """Return the mode, error and pixels of one file, see `prepare_pixels`.

    Raises OSError only where the disk fails: that says nothing about the image, so no cache must keep it.
    """
    failed = {"mode": "", "pixel_values": None}
    if reason := judge(str(path), readable_endings()):
        return failed | {"error": reason}
    try:
        content = io.BytesIO(retry(path.read_bytes))
    except PermissionError:
        return failed | {"error": LOCKED}
    try:
        with PIL.Image.open(content) as image:
            if sample_bits(image, content.getvalue()) > 8:
                return failed | {"error": NO_WINDOW if image.format == "DICOM" else DEEP}
            first = ", the first of several frames" if frames_of(image) > 1 else ""
            pixels = resize(read_rgb(image, content), processor)
            return {"mode": image.mode + first, "error": "", "pixel_values": pixels.numpy().tobytes()}
    except PIL.Image.DecompressionBombError:
        return failed | {"error": "more than 178 million pixels: scale it down"}
    except Exception as problem:  # on damaged files a decoder may raise anything
        text = re.sub(" <_io.*>", "", str(problem))  # an address in memory says nothing
        known = judge_content(content.getvalue()[:1024], "", str(path))  # HEIC that is called .jpg, perhaps
        return failed | {"error": known or f"{type(problem).__name__}: {text}"}


def read_rgb(image: PIL.Image.Image, content: io.BytesIO) -> np.ndarray:
    """Return an image upright and in RGB, uint8 (height, width, 3), as `load_image` of `pipeline` does.

    Plain JPEGs take a shorter road to the same pixels. If it fails, Pillow decides whether they are damaged.
    """
    upright = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1
    if image.format == "JPEG" and image.mode == "RGB" and upright and is_huffman(content.getvalue()):
        with suppress(ValueError):
            return simplejpeg.decode_jpeg(content.getbuffer())
    return np.array(load_image(image))


def resize(rgb: np.ndarray, processor: BaseImageProcessor) -> torch.Tensor:
    """Return what `processor` makes of `rgb` before it rescales, uint8 (channels, height, width).

    Plain shrinking, and the crop at the centre, are done as the processor's torchvision back end does them,
    but without torchvision. The Pillow back end takes three times as long and differs by one grey level in
    two values in a thousand.
    """
    numbers, modes = processor.to_dict(), {2: "bilinear", 3: "bicubic"}
    size = tuple(numbers["size"].get(name) or np.inf for name in ("height", "width"))
    if numbers["size"].keys() == {"shortest_edge"}:
        size = get_resize_output_image_size(rgb, *numbers["size"].values(), False, None, "channels_last")
    if np.inf > size[0] * size[1] > MOST_PIXELS:  # 12,000 x 1 would become 256 x 3,072,000
        raise ValueError(f"a strip of {rgb.shape[1]} x {rgb.shape[0]} pixels")
    crop = size
    if numbers.get("do_center_crop"):
        crop = numbers["crop_size"]["height"], numbers["crop_size"]["width"]
    mode = modes.get(numbers.get("resample")) if numbers.get("do_resize") else None
    shrinks = all(part <= new <= old for part, new, old in zip(crop, size, rgb.shape[:2], strict=True))
    plain = numbers["image_processor_type"].removesuffix("Fast") in PLAIN
    if not mode or not shrinks or not plain:
        image, kept = PIL.Image.fromarray(rgb), {"do_rescale": False, "do_normalize": False}
        return processor(image, return_tensors="pt", **kept)["pixel_values"][0]
    image = F.interpolate(torch.from_numpy(rgb).permute(2, 0, 1)[None], size, mode=mode, antialias=True)[0]
    top, left = ((new - part) // 2 for part, new in zip(crop, size, strict=True))
    return image[:, top : top + crop[0], left : left + crop[1]]


def keep_readable(images: Dataset, left_out: dict[str, str], path: Path) -> Dataset:
    """Return the images that could be read; the CSV file `path` (file, reason) names what is left out.

    That is also what step 3 has `left_out`, {file: reason}. Raises SystemExit if nothing remains.
    """
    errors = np.array(images["error"][:], dtype=object)
    files = images["file"][:]
    left_out = left_out | {files[row]: errors[row] for row in np.flatnonzero(errors != "")}
    if left_out:
        names = [*map(printable, left_out)]
        table = pd.DataFrame({"file": names, "reason": list(left_out.values())})
        if not path.exists() or not read_table(path, table).equals(table):
            write_table(path, table)
        if (errors != "").all():
            stop(f"none of the images can be read: {summary(left_out.values())}", f"see {path}")
        rows = sum(reason in (WITHOUT_IMAGE, REPEATED) for reason in left_out.values())
        count, total = len(left_out) - rows, len(left_out) - rows + int((errors == "").sum())
        what = f"{count} of {total} files" + (f" and {rows} rows" if rows else "")
        log.warning("%s left out: %s; see %s", what, summary(left_out.values()), path)
    elif path.exists():
        remove(path)
    for mode, count in Counter(images["mode"][:]).items():
        if mode not in ("RGB", ""):
            log.info("converted to RGB: %s of mode %s", count, mode)
    return images.select(np.flatnonzero(errors == "")).remove_columns(["mode", "error"])


def pixels_of(files: Iterable[str], images: Dataset, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the prepared pixels of `files`, uint8 (n, height, width, channels)."""
    row = {file: row for row, file in enumerate(images["file"][:])}
    pixels = images.select([row[file] for file in files])["pixel_values"][:]
    return np.frombuffer(b"".join(pixels), np.uint8).reshape(-1, *shape).transpose(0, 2, 3, 1)


def show_examples(images: Dataset, folder: Path, shape: tuple[int, int, int]) -> None:
    """Show, in a notebook, an image of each class: the file, and what the model gets of it."""
    rows = images.select(np.unique(images["label"][:], return_index=True)[1][:12])
    files, names = rows["file"][:], images.features["label"].names
    originals = (np.array(load_image(str(folder / file))) for file in files)
    show_images("the files", originals, names)
    show_images(f"what the model gets: {shape}", pixels_of(files, rows, shape), names)


class Collator:
    """Join rows of the cache into `pixel_values`, uint8 (n, *shape), and `labels`, int64 (n,)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pixels = torch.frombuffer(bytearray().join(row["pixel_values"] for row in rows), dtype=torch.uint8)
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": pixels.view(-1, *self.shape), "labels": labels}
