"""Step 3: folders of images become a table of files and labels."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .archives import HIDDEN, visible
from .console import log, stop
from .files import COLUMNS, read_json, sha256_of, write_json
from .options import KVASIR_URL
from .workspace import SAMPLE, Workspace, forget_split, is_trained

KVASIR = {  # its terms and citation are in templates/model_card.md
    "name": "Kvasir v2",
    "homepage": "https://datasets.simula.no/kvasir/",
    "classes": """dyed-lifted-polyps dyed-resection-margins esophagitis normal-cecum normal-pylorus
    normal-z-line polyps ulcerative-colitis""".split(),
    "images_per_class": 1000,
}
# Endings of images that this Pillow may not read: named when they are left out.
OTHER_IMAGES = """.avif .heic .heif .jxl .mpo .qoi .svg .dcm .dicom .nii .mha .mhd .nrrd .czi .svs .ndpi
.mrxs .vsi .raw .dng .cr2 .cr3 .nef .arw .orf .rw2""".split()


def readable_kinds() -> set[str]:
    """Return the file endings that Pillow reads, and let `datasets` take them all.

    Its own list is older than the Pillow that is installed, and it has no option for another one.
    """
    PIL.Image.init()
    endings = {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    kinds = (endings - {".h5", ".hdf"}) | {".mpo"} | set(ImageFolder.EXTENSIONS)
    ImageFolder.EXTENSIONS = sorted(kinds)
    return kinds


def list_images(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the paths of all image files below `folder`, and {path: reason} of what is left out."""
    taken, left_out, kinds = [], {}, tuple(readable_kinds())
    seen = {os.path.realpath(folder)}  # links may lead in circles
    for root, folders, names in os.walk(folder, followlinks=True):
        found = [name for name in sorted(folders, reverse=True) if not name.startswith(HIDDEN)]
        inside = {os.path.realpath(os.path.join(root, name)): name for name in found}
        folders[:] = [name for path, name in inside.items() if path not in seen]
        seen.update(inside)
        for name in names:
            path, ending = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if name.startswith(HIDDEN):
                continue
            if not name.lower().endswith(kinds):
                if ending in OTHER_IMAGES:
                    left_out[path] = f"{ending} files, which Pillow does not read here"
            elif not os.path.isfile(path):
                left_out[path] = "dead links or not files"
            elif re.search("::|://|[\ud800-\udfff]", path):  # taken for a URL, or not UTF-8
                left_out[path] = "with a name that `datasets` cannot take"
            else:
                taken.append(path)
    return taken, left_out


def find_images(folder: Path) -> dict[str, list[str]]:
    """Return the image files below `folder` as `data_files` of `load_dataset`. Raises SystemExit if none.

    All are one split: otherwise a folder that is called test would become a split of its own, and a
    metadata file could name files anywhere on the disk.
    """
    paths, left_out = list_images(folder)
    if not paths:
        found = f"; {len(left_out)} files left out: {summary(left_out.values())}" if left_out else ""
        stop(f"no images in {folder}{found}", "give a folder that holds one folder for each class")
    datasets.disable_progress_bars()  # they would call it a download
    return {"train": [glob.escape(path) for path in paths]}


def summary(reasons: Iterable[str]) -> str:
    """Return the three most frequent reasons why files were left out, with counts if there are several."""
    counts = Counter(re.sub(r"^\w+Error: |(?<=\()\d+ ", "", reason) for reason in reasons)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))


def check_labels(images: Dataset, folder: Path) -> Dataset:
    """Return the table of an imagefolder, ordered by name, not decoded.

    Columns: `file`, str, relative to `folder`, with forward slashes; `label`, ClassLabel of the sorted folder
    names. Raises SystemExit where they disagree, and on an empty, reserved or only class.
    """
    images = images.cast_column("image", datasets.Image(decode=False))
    files = [Path(os.path.relpath(image["path"], folder)).as_posix() for image in images["image"]]
    images = images.remove_columns("image").add_column("file", files).select(np.argsort(files))
    names = images.features["label"].names
    for file, label in zip(images["file"], images["label"], strict=True):
        if file.split("/")[0] != names[label]:
            remedy = "give a folder with one folder for each class, and a split of your own with --split_by"
            stop(f"{file} in {folder} is not directly in a class folder", remedy)
    empty = {entry.name for entry in visible(folder) if entry.is_dir()} - set(names)
    if empty:
        stop(f"no images in {', '.join(sorted(empty))}", "fill or delete these folders")
    if reserved := sorted(set(names) & set(COLUMNS)):
        stop(f"a class is called {reserved[0]}, like a column of our tables", "rename its folder")
    if len(names) < 2:
        stop(f"{folder} holds one class only", "give a folder that holds one folder for each class")
    return images


def load_folder(folder: Path, cache: Path) -> Dataset:
    """Return the images of another folder: what step 3 of the script does."""
    images = load_dataset(
        "imagefolder", data_files=find_images(folder), split="train", drop_labels=False, cache_dir=str(cache)
    )
    return check_labels(images, folder)


def load_external(class_names: list[str], work: Workspace) -> Dataset:
    """Return the images in `external_dir` of known classes, with our labels. Raises SystemExit if none."""
    folder = Path(work.settings.external_dir).resolve()
    images = load_folder(folder, work.cache)
    names = [images.features["label"].names[label] for label in images["label"]]
    known = {name: label for label, name in enumerate(class_names)}
    if not known.keys() & set(names):
        stop(f"no class folder in {folder} is named like ours", f"ours are {', '.join(class_names)}")
    if unknown := sorted(set(names) - known.keys()):
        log.warning("left out of %s: classes that the model does not know: %s", folder, ", ".join(unknown))
    rows = [(file, known[name]) for file, name in zip(images["file"], names, strict=True) if name in known]
    files, labels = zip(*rows, strict=True)
    features = Features({"file": Value("string"), "label": ClassLabel(names=class_names)})
    return Dataset.from_dict({"file": files, "label": labels}, features=features)


def count_classes(images: Dataset) -> dict[str, int]:
    """Return {class: number of its images}."""
    counts = Counter(images["label"])
    return {name: counts[label] for label, name in enumerate(images.features["label"].names)}


def record_data(images: Dataset, folder: Path, origin: dict[str, Any], work: Workspace) -> None:
    """Note the images in settings.json; if they changed, forget the split; SystemExit if trained."""
    sizes = [(folder / file).stat().st_size for file in images["file"]]
    listing = json.dumps([images["file"][:], images["label"][:], sizes]).encode()
    data = {"name": folder.name, "images": len(images), "files_sha256": hashlib.sha256(listing).hexdigest()}
    data |= {f"archive_{name}": origin[name] for name in ("bytes", "sha256") if name in origin}
    data |= recognise(images, origin, work)
    path = work.output_dir / "settings.json"
    record = read_json(path)
    before = record.get("data", {})
    if before and before["files_sha256"] != data["files_sha256"]:
        if is_trained(work.output_dir):
            remedy = f"use another --output_dir, or delete {work.output_dir}"
            stop(f"{work.output_dir} was made from other images than those in {folder}", remedy)
        forget_split(work)
    if before != data:
        write_json(path, record | {"data": data})


def recognise(images: Dataset, origin: dict[str, Any], work: Workspace) -> dict[str, bool]:
    """Say whether these are Kvasir's images, by the class names and the archive, and whether endoscopic.

    The drawn sample borrows Kvasir's class names: it is known by its archive.
    """
    counts, classes = count_classes(images), KVASIR["classes"]
    named = set(counts) <= set(classes) and len(counts) > 2
    drawn = SAMPLE.exists() and origin.get("sha256") == sha256_of(SAMPLE)
    kvasir = origin.get("url") == KVASIR_URL or (named and not drawn)
    missing = {name: KVASIR["images_per_class"] - counts.get(name, 0) for name in classes}
    missing = {name: n for name, n in missing.items() if n}
    if kvasir and missing:
        log.warning("warning: Kvasir v2 has 8 classes of 1,000 images; missing here: %s", missing)
    return {"kvasir": kvasir, "endoscopy": kvasir or named or work.settings.endoscopy}
