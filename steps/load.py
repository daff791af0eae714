"""Step 3: folders of images become a table of files and labels."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pandas as pd
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .checks import NO_TEXT, UNREAD
from .console import listed, log, stop
from .files import HIDDEN, below, folded, need_access, nfc, read_json, sha256_of, visible, write_json
from .image_formats import judge, readable_endings
from .layouts import read_around, read_folders, read_splits, refuse_empty
from .options import KVASIR_URL, Settings
from .rows import join_rows, read_rows
from .workspace import SAMPLE, Workspace, forget_split, is_trained

KVASIR = {  # its terms and citation are in templates/model_card.md
    "name": "Kvasir v2",
    "homepage": "https://datasets.simula.no/kvasir/",
    "classes": """dyed-lifted-polyps dyed-resection-margins esophagitis normal-cecum normal-pylorus
    normal-z-line polyps ulcerative-colitis""".split(),
    "images_per_class": 1000,
}
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz")


def fail(problem: OSError) -> NoReturn:
    """Raise: `os.walk` passes over folders that cannot be read."""
    if isinstance(problem, PermissionError):
        need_access(problem.filename)
    raise problem


def list_images(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the paths of all image files below `folder`, and {path: reason} of what is left out.

    Raises SystemExit where a folder may not be read.
    """
    taken, left_out, endings = [], {}, readable_endings()
    seen = {os.path.realpath(folder)}  # links may lead in circles
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        need_access(root)
        found = [name for name in sorted(folders, reverse=True) if not name.startswith(HIDDEN)]
        found.sort(key=lambda name: not os.path.islink(os.path.join(root, name)))  # a real folder wins
        inside = {os.path.realpath(os.path.join(root, name)): name for name in found}
        folders[:] = [name for path, name in inside.items() if path not in seen]
        seen.update(inside)
        for name in names:
            path = os.path.join(root, name)
            if name.startswith(HIDDEN):
                if judge(path, endings) == "" and not name.startswith("._"):  # those are notes of macOS
                    left_out[path] = "hidden files"
                continue
            reason = judge(path, endings)
            if reason is None and name.lower().endswith(UNREAD):
                reason = "archives: unpack them"
            elif reason is None and name.lower().endswith(ARCHIVES):
                reason = "archives: give one as --data_url, or unpack them"
            if reason == "" and not os.path.isfile(path):
                reason = "broken links or special files"
            elif reason == "" and (re.search(f"::|://|{NO_TEXT}", path) or os.path.expandvars(path) != path):
                reason = "names that `datasets` cannot take"  # taken for a URL or variable, or not UTF-8
            if reason:
                left_out[path] = reason
            elif reason is not None:
                taken.append(path)
    return taken, left_out


def find_images(folder: Path, settings: Settings) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the table of the images below `folder`, ordered by name, and {what is left out: why}.

    Columns, all str: `file`, relative to `folder`, with forward slashes; `label`; and, where a table or the
    folders say them, `split` ("train", "validation", "test") and `group` (the patient, "" if unknown). Where
    both say something, the table counts. Raises SystemExit where labels are missing or unclear.
    """
    paths, left_out = list_images(folder)
    left_out = {below(path, folder): reason for path, reason in left_out.items()}
    if not paths:
        found = f"; {len(left_out)} files left out: {summary(left_out.values())}" if left_out else ""
        stop(f"no images in {folder}{found}", "give a folder that holds one folder for each class")
    files = sorted(below(path, folder) for path in paths)
    rows, more = read_rows(files, folder, settings)
    left_out |= more
    named = [file for file in files if file not in more]
    if rows is not None and "label" in rows:
        table = read_around(named, settings.group_by, set(rows["label"]))
    else:
        refuse_empty(files, folder, read_splits(files) or [""], left_out)
        table = read_folders(named, folder, settings.group_by) if named else pd.DataFrame({"file": []})
    if rows is not None:
        table = join_rows(table, rows, left_out)
    if table.empty:
        stop(f"no image of {folder} is left: {summary(left_out.values())}", "correct the table")
    table["label"] = plain_names(table["label"])
    fewest = {"split": 2, "group": 1}  # one split alone is no split
    known = [name for name, n in fewest.items() if name in table and len({*table[name]} - {""}) >= n]
    return table[["file", "label", *known]].reset_index(drop=True), left_out


def plain_names(labels: Iterable[str]) -> list[str]:
    """Return labels in NFC. Raises SystemExit if two differ only in form, case or outer blanks."""
    looks = {}
    for label in sorted(set(labels)):
        look = folded(label).strip()
        if (other := looks.setdefault(look, label)) != label:
            stop(f"the classes {other!r} and {label!r} have the same name", "rename one, or join the two")
    return [nfc(label) for label in labels]


def summary(reasons: Iterable[str]) -> str:
    """Return the three most frequent reasons why files were left out, with counts if there are several."""
    counts = Counter(re.sub(r"^\w+Error: |(?<=\()\d+ ", "", reason) for reason in reasons)
    if len(counts) == 1:
        return next(iter(counts))
    shown = counts.most_common(3)
    if others := counts.total() - sum(count for _, count in shown):
        shown.append(("others", others))
    return ", ".join(f"{reason} ({count})" for reason, count in shown)


def paths_of(table: pd.DataFrame, folder: Path) -> dict[str, DataFilesList]:
    """Return the files of a table as `data_files` of `load_dataset`.

    All are one split: otherwise a folder that is called test would become a split of its own, and a metadata
    file could name files anywhere on the disk. All endings are taken for images: without that, `datasets`
    passes over those that are not in its own list, which is shorter than Pillow's. It is told that these are
    files: it would look each one up as a pattern, in every run anew, for longer than all the rest takes.
    """
    ImageFolder.EXTENSIONS = sorted({os.path.splitext(file)[1].lower() for file in table["file"]})
    datasets.disable_progress_bars()  # they would call it a download
    files = DataFilesList(absolute(table["file"], folder), origin_metadata=[])
    return {"train": files}  # `datasets` keeps their names, no content


def absolute(files: Iterable[str], folder: Path) -> list[str]:
    """Return the absolute paths of files below a folder; links stay as they are."""
    start = os.path.abspath(folder)
    return [os.path.join(start, file) for file in files]


def attach_labels(images: Dataset, table: pd.DataFrame, folder: Path) -> Dataset:
    """Return the table as a `Dataset`, with `label` a ClassLabel of the sorted names.

    `images` is what `load_dataset` made of its files. Raises SystemExit where one is missing.
    """
    images = images.cast_column("image", datasets.Image(decode=False))
    taken = {image["path"] for image in images["image"][:]}
    if lacking := [path for path in absolute(table["file"], folder) if path not in taken]:
        stop(f"`datasets` does not take {below(lacking[0], folder)}", "rename it")
    return as_dataset(table, sorted(set(table["label"])))


def as_dataset(table: pd.DataFrame, names: list[str]) -> Dataset:
    """Return a table of images as a `Dataset`, its labels numbered by their place in `names`."""
    features = Features({name: Value("string") for name in table} | {"label": ClassLabel(names=names)})
    return Dataset.from_dict(table.to_dict("list"), features=features)  # which numbers the labels


def load_folder(folder: Path, settings: Settings, cache: Path) -> tuple[Dataset, dict[str, str]]:
    """Return the images of a folder, and {what is left out: why}: what step 3 of the script does."""
    table, left_out = find_images(folder, settings)
    options = {"data_files": paths_of(table, folder), "cache_dir": str(cache)}
    images = load_dataset("imagefolder", split="train", drop_labels=True, **options)
    return attach_labels(images, table, folder), left_out


def load_external(class_names: list[str], work: Workspace) -> tuple[Dataset, dict[str, str]]:
    """Return the images in `external_dir` of known classes, with our labels, and {what is left out: why}.

    Raises SystemExit if there are none.
    """
    folder = Path(work.settings.external_dir).resolve()
    images, left_out = load_folder(folder, Settings(group_by="none"), work.cache)
    names = images.features["label"].names
    inner = {nfc(file.split("/")[-2]) for file in images["file"][:] if "/" in file}
    if not set(names) & set(class_names) and inner & set(class_names):  # in folders of patients, perhaps
        images, left_out = load_folder(folder, Settings(group_by="parent"), work.cache)
        names = images.features["label"].names
    table = images.to_pandas().assign(label=[names[label] for label in images["label"][:]])
    known = table["label"].isin(class_names)
    if not known.any():
        theirs = f"no class of {folder} is named like ours: {listed(names, 5)}"
        stop(theirs, f"rename them: ours are {listed(class_names)}")
    if unknown := sorted(set(table["label"][~known])):
        log.warning("left out of %s: classes that the model does not know: %s", folder, listed(unknown))
    return as_dataset(table[known], class_names), left_out


def count_classes(images: Dataset) -> dict[str, int]:
    """Return {class: number of its images}."""
    counts = Counter(images["label"][:])
    return {name: counts[label] for label, name in enumerate(images.features["label"].names)}


def record_data(images: Dataset, folder: Path, origin: dict[str, Any], work: Workspace) -> None:
    """Note the images in settings.json. If they changed, forget the split, or stop if a model was trained.

    Raises SystemExit then, and where there is only one class.
    """
    names = images.features["label"].names
    if len(names) == 1:
        inside, remedy = folder / names[0], "give a folder that holds one folder for each class"
        if inside.is_dir() and any(entry.is_dir() for entry in visible(inside)):
            remedy = f"give --data_dir {inside}"
        stop(f"{folder} holds one class only: {names[0]}", remedy)
    sizes = [os.stat(folder / file).st_size for file in images["file"][:]]
    known = [images[name][:] for name in ("split", "group") if name in images.column_names]
    listing = json.dumps([images["file"][:], [names[i] for i in images["label"][:]], sizes, *known]).encode()
    data = {"name": folder.name, "images": len(images), "files_sha256": hashlib.sha256(listing).hexdigest()}
    data |= {f"archive_{name}": origin[name] for name in ("bytes", "sha256") if name in origin}
    if work.settings.dataset_name is not None:
        data |= {"name": work.settings.dataset_name, "revision": origin["revision"]}
    data |= recognise(images, origin, work)
    path = work.output_dir / "settings.json"
    record = read_json(path)
    before = record.get("data", {})
    if before and before["files_sha256"] != data["files_sha256"]:
        if is_trained(work.output_dir):
            made = f"{work.output_dir} was made from other images, labels, splits or patients"
            stop(f"{made} than those in {folder}", f"use another --output_dir, or delete {work.output_dir}")
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
