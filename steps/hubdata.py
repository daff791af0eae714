"""Step 2: a data set of the Hub becomes a folder of images and a table, its splits kept."""

import glob
import hashlib
import io
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import huggingface_hub as hub
import pandas as pd
import PIL.Image
from datasets import ClassLabel, DatasetBuilder, Features, Image, IterableDataset, Value, load_dataset_builder

from .columns import SPLIT_WORDS, choose_columns
from .console import bars_wanted, disk_failed, first_line, hidden_cause, log, may_pass, progress, retry, stop
from .files import atomic, need_space, read_json, remove, write_json, write_table
from .options import Settings


def fetch_dataset(settings: Settings) -> tuple[Path, dict[str, str]]:
    """Return the folder of the images of `dataset_name`, with metadata.csv, and their url and revision.

    It is written into `data_root`; if it is there, the Hub is not asked. The configuration, revision and
    columns that are asked for are in its name, as 8 digits. The table has the columns file_name, label and,
    where they are known, split and group; a column that a setting names keeps its name. Raises SystemExit.
    """
    name, endings = settings.dataset_name, ("_config_name", "_revision", "_column_name")
    asked = [value for key, value in sorted(vars(settings).items()) if key.endswith(endings)]
    digits = f"--{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}" if any(asked) else ""
    folder = Path(settings.data_root, name.replace("/", "--") + digits).resolve()
    if folder.exists():
        origin = read_json(folder / ".archive.json", ["url", "revision"])
        if not origin:
            stop(f"{folder} is there, but was not made from {name}", "move it, or use another --data_root")
        log.info("found %s, revision %s, in %s", name, origin["revision"][:8], folder)
        return folder, origin
    cache = Path(settings.data_root, "cache", "hub", name.replace("/", "--")).resolve()
    try:
        builder, info = open_dataset(settings, cache)
        splits = name_splits([*map(str, builder.config.data_files)], settings)
        features = next(iter(builder.as_streaming_dataset().values())).features  # reads no image
        columns = choose_all(features or Features(), any(splits.values()), settings)
        download(builder, info, cache)
        parts = [(splits[split], rows) for split, rows in builder.as_streaming_dataset().items()]
        origin = {"url": f"{hub.constants.ENDPOINT}/datasets/{name}", "revision": info.sha}
        with atomic(folder) as part:
            part.mkdir()
            write_table(part / "metadata.csv", write_images(parts, columns, part, cache))
            write_json(part / ".archive.json", origin)
    except Exception as problem:  # of many kinds: those of HTTP, of the Hub, of `datasets`, of Arrow
        if disk_failed(problem):
            raise
        refuse(problem, settings)
    remove(cache)
    return folder, origin


def open_dataset(settings: Settings, cache: Path) -> tuple[DatasetBuilder, hub.DatasetInfo]:
    """Return what `datasets` and the Hub know of the data set. Raises whatever is wrong with it."""
    name = settings.dataset_name
    hub.auth_check(name, repo_type="dataset")  # tells a gated data set from one that is not there
    info = hub.dataset_info(name, revision=settings.dataset_revision, files_metadata=True)
    log.info("reading the data set %s, revision %s", name, info.sha[:8])
    options = {"revision": info.sha, "cache_dir": str(cache)}  # this revision, even if a new one comes now
    return load_dataset_builder(name, settings.dataset_config_name, **options), info


def name_splits(names: list[str], settings: Settings) -> dict[str, str]:
    """Return {split: ours, or "" if a column says it or there is one only}. SystemExit if one is unknown."""
    if settings.split_column_name or len(names) == 1:
        return dict.fromkeys(names, "")
    if any(name.casefold() not in SPLIT_WORDS for name in names):
        remedy = f"known are {', '.join(SPLIT_WORDS)}; a column may say it: --split_column_name"
        stop(f"{settings.dataset_name} has the splits {', '.join(names)}", remedy)
    return {name: SPLIT_WORDS[name.casefold()] for name in names}


def choose_all(features: Features, has_splits: bool, settings: Settings) -> dict[str, str]:
    """Return {column of the data set: column of metadata.csv}, that of the images first.

    `has_splits`: no column needs to say the split. Raises SystemExit where this cannot be understood.
    """
    name, asked = settings.dataset_name, settings.image_column_name
    listed = f"its columns are {', '.join(features) or 'not known'}"
    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    images = choose_columns("image", list(features), settings) if asked else images  # it may hold bytes
    if not images:
        stop(f"{name} has no column of images", f"choose another data set or --image_column_name; {listed}")
    if len(images) > 1:
        stop(f"{name} has images in {', '.join(images)}", f"say which: --image_column_name {images[0]}")
    texts = [column for column, kind in features.items() if isinstance(kind, (Value, ClassLabel))]
    classes = [column for column in texts if isinstance(features[column], ClassLabel)]
    labels = choose_columns("label", list(features), settings) or (classes if len(classes) == 1 else [])
    if not labels:
        stop(f"no column of {name} is known to hold the labels", f"say which: --label_column_name; {listed}")
    if nested := [column for column in labels if column not in texts]:
        remedy = f"multi-label is not supported: choose another --label_column_name; {listed}"
        stop(f"{nested[0]} of {name} holds a {type(features[nested[0]]).__name__}, not one label", remedy)
    texts = [column for column in texts if column not in labels]
    found = {"label": labels, "split": [] if has_splits else choose_columns("split", texts, settings)}
    found["group"] = choose_columns("group", texts, settings)
    understood = [f"{role}: {' '.join(columns)}" for role, columns in found.items() if columns]
    log.info("understood the columns of %s as image: %s, %s", name, images[0], ", ".join(understood))
    headings = {images[0]: asked or "file_name"}
    for role, columns in found.items():
        own = getattr(settings, f"{role}_column_name")
        headings |= {column: column if own else role for column in columns}
    return headings


def download(builder: DatasetBuilder, info: hub.DatasetInfo, folder: Path) -> None:
    """Download the data set's files into `folder`, unless they are there, and let the builder read these.

    `datasets` itself would keep its downloads for ever, somewhere else. Raises SystemExit.
    """
    base, known = f"hf://datasets/{builder.repo_id}@{info.sha}/", builder.config.data_files
    splits = {split: [url.removeprefix(base) for url in urls] for split, urls in known.items()}
    wanted, sizes = set().union(*splits.values()), {file.rfilename: file.size or 0 for file in info.siblings}
    if elsewhere := sorted(wanted - sizes.keys()):  # a URL, or a local folder with the data set's name
        stop(f"{builder.repo_id} has files elsewhere: {elsewhere[0]}", "download them, and give --data_dir")
    size = sum(map(sizes.get, wanted))
    log.info("downloading %s files, %.1f MB", f"{len(wanted):,}", size / 1e6)
    folder.mkdir(parents=True, exist_ok=True)
    need_space(folder, 2 * size)  # until the images are written
    others = sizes.keys() - wanted
    few, kind = min((others, "ignore_patterns"), (wanted, "allow_patterns"), key=lambda pair: len(pair[0]))
    options = {kind: [glob.escape(file) for file in few], "local_dir": folder}  # each is tried on every file
    if not bars_wanted():
        hub.utils.disable_progress_bars()

    def fetch() -> None:
        hub.snapshot_download(builder.repo_id, repo_type="dataset", revision=info.sha, **options)
        if lacking := [file for file in wanted if not (folder / file).is_file()]:
            raise ConnectionError(f"{len(lacking)} files did not arrive")

    retry(fetch, when=may_pass)
    local = {split: [str(folder / file) for file in files] for split, files in splits.items()}
    builder.config.data_files = local


def write_images(
    parts: list[tuple[str, IterableDataset]], headings: dict[str, str], folder: Path, around: Path
) -> pd.DataFrame:
    """Write the images of `parts`, (split, rows), into `folder`; return their table.

    `headings`: see `choose_all`. `around`: see `image_of`. Raises SystemExit if there is no image.
    """
    (image, heading), *others = headings.items()
    table, lacking = [], 0
    for split, rows in parts:
        place, kinds = split or "images", rows.features
        (folder / place).mkdir(exist_ok=True)
        rows = rows.decode(False).select_columns(list(headings))  # the bytes, as they are
        for row in progress(rows, desc=f"writing {place}", unit=" images"):
            content, ending = image_of(row[image], around)
            if content:
                file = f"{place}/{len(table):06}{ending}"
                (folder / file).write_bytes(content)
                texts = {name: text_of(row[column], kinds[column]) for column, name in others}
                table.append({heading: file} | texts | ({"split": split} if split else {}))
            lacking += not content
    if not table:
        stop(f"there is no image in the column {image}", "choose another data set or --image_column_name")
    table = pd.DataFrame(table)
    if unlabelled := (table[others[0][1]] == "").sum():
        log.warning("warning: %s of %s images have no label", unlabelled, len(table))
    if lacking:
        log.warning("warning: %s rows have no image: left out", lacking)
    return table


def image_of(value: Any, around: Path) -> tuple[bytes, str]:
    """Return an image's bytes and the ending of a name for its file; (b"", "") if there is none.

    `value`: bytes, or a dict with bytes, or with the path of a file in the folder `around`, maybe in a zip
    archive there. Nothing else is opened: a table could name any file of this machine.
    """
    value = value if isinstance(value, dict) else {"bytes": value}
    content, path = value.get("bytes"), value.get("path") or ""
    inner, *outer = path.split("::")  # zip://class/image.jpg::/folder/images.zip
    safe = not outer or (len(outer) == 1 and inner.startswith("zip://"))
    if content is None and safe and Path([inner, *outer][-1]).resolve().is_relative_to(around):
        with suppress(FileNotFoundError), fsspec.open(path) as file:
            content = file.read()
    return (content, ending_of(content, inner)) if content and isinstance(content, bytes) else (b"", "")


def ending_of(content: bytes, path: str) -> str:
    """Return how the name of an image file should end: as its content says, else as `path` does."""
    kind = None
    with suppress(Exception):  # of many kinds: step 4 names such files
        kind = PIL.Image.open(io.BytesIO(content)).format
    endings = [ending for ending, known in PIL.Image.registered_extensions().items() if known == kind]
    if endings:
        return ".jpg" if kind == "JPEG" else endings[0]  # and not .jfif
    return match[0].lower() if (match := re.search(r"\.\w{1,8}$", path)) else ".jpg"


def text_of(value: Any, kind: Value | ClassLabel) -> str:
    """Return a label, split or patient as text, "" if it is not known."""
    if value is None or value != value:  # nan is not itself
        return ""
    if isinstance(kind, ClassLabel):
        return kind.int2str(value) if value >= 0 else ""  # -1: the labels of a test set that is kept secret
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def refuse(problem: BaseException, settings: Settings) -> NoReturn:
    """Raise SystemExit with what is wrong with the data set, or with the way to it."""
    name, login = settings.dataset_name, "run `hf auth login`, or set HF_TOKEN"
    text = str(problem := hidden_cause(problem)).partition("\nExample")[0]  # the rest is code
    if isinstance(problem, hub.errors.GatedRepoError):
        stop(f"{name} is gated", f"ask for access at {hub.constants.ENDPOINT}/datasets/{name}, then {login}")
    if isinstance(problem, hub.errors.RepositoryNotFoundError):
        stop(f"the Hub shows us no data set {name}", f"check --dataset_name; if it is private, {login}")
    if isinstance(problem, hub.errors.RevisionNotFoundError):
        stop(f"{name} has no revision {settings.dataset_revision}", "give a branch, a tag or a commit")
    if "Invalid credentials" in text:
        stop("the Hub does not know the token that it was given", login)
    if "configs:" in text or "BuilderConfig" in text:
        stop(f"{name}: {text}", "give one of these as --dataset_config_name")
    if "scripts are no longer supported" in text:
        remedy = "try what the Hub has made of it: --dataset_revision refs/convert/parquet"
        stop(f"{name} is read by a script of its own, which could do anything", remedy)
    stop(f"cannot read {name}: {first_line(problem)}", "check the network, or fetch it and give --data_dir")
