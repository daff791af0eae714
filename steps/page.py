"""Step 9: one page to look at, in a file that needs no network and no other file."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import simplejpeg
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.metrics import confusion_matrix
from transformers import AutoImageProcessor

from .architectures import pixel_shape, processor_of
from .console import log
from .duplicates import conflicting
from .files import lookup, probability_columns, read_table, sha256_of, write_text
from .load import KVASIR
from .options import SHOWN
from .report import TEMPLATES, command_of, settings_shown
from .scores import confusions, label_numbers
from .workspace import Workspace

MOST = 10_000  # test images with a thumbnail
MOST_BYTES = 38_000_000  # of the test images' thumbnails; as text in the page they take a third more
FEW, LARGE, SMALL = 2_000, 192, 96  # up to so many images the longer side has LARGE pixels, else SMALL
LISTED = 100  # rows of the other lists; the CSV files beside the page have all
STATIC = 24  # test images that are there without JavaScript, too
CHARTS = {  # they show no image
    "per_class.png": "Recall and precision of each class",
    "roc.png": "ROC curves",
    "precision_recall.png": "Precision-recall curves",
    "reliability.png": "Reliability, and accuracy by coverage",
    "training_curves.png": "Training curves",
}
GALLERIES = {
    "mistakes.png": "The most confident mistakes, in orange what speaks for the wrong answer",
    "attribution.png": "Right answers, one per class, up to 12; in orange what speaks for them",
}
ISSUES = "file split label proposed p_label p_proposed why".split()  # columns of label_issues.csv


def write_page(results: dict, predictions: pd.DataFrame, images: Dataset, work: Workspace) -> None:
    """Write report/index.html and, without images and names of files, report/public.html.

    A page that was made from the same results, tables and pictures stays as it is.
    """
    results = {name: value for name, value in results.items() if name != "published"}  # comes after the page
    key, report = key_of(results, predictions, work.report), work.report
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    stale = [name for name in ("index.html", "public.html") if not was_made_from(report / name, key)]
    shared = results | content_of(results, predictions, report) | {"key": key} if stale else {}
    for name in stale:
        private = name == "index.html"
        content = shared | {"pictures": pictures(CHARTS | (GALLERIES if private else {}), report)}
        content |= images_shown(predictions, images, work) if private else {}
        page = templates.get_template("page.html").render(content | {"private": private})
        write_text(report / name, page)
    log.info("one page to look at: %s", report / "index.html")


def was_made_from(path: Path, key: str) -> bool:
    """Say whether there is a page that was made from what `key_of` gives this key."""
    if not path.exists():
        return False
    with path.open(encoding="utf-8", errors="replace") as page:  # it may be damaged
        return f'"made-from" content="{key}"' in page.read(1000)


def key_of(results: dict, predictions: pd.DataFrame, report: Path) -> str:
    """Return 16 hex digits of all that decides the pages. The images themselves are named in `results`."""
    digest = hashlib.sha256(json.dumps(results, sort_keys=True).encode())
    digest.update(pd.util.hash_pandas_object(predictions).to_numpy().tobytes())
    code = [Path(__file__), *TEMPLATES.glob("page*")]
    files = [*code, *report.glob("*.csv"), *report.glob("*.png")]
    digest.update("".join(sorted(path.name + sha256_of(path) for path in files)).encode())
    return digest.hexdigest()[:16]


def tests_of(predictions: pd.DataFrame, class_names: Iterable[str]) -> pd.DataFrame:
    """Return the test images with their `probability`, that of the predicted class, and whether `right`."""
    tested = predictions[predictions["split"] == "test"]
    certain = tested[probability_columns(class_names)].max(axis=1)
    columns = tested[["file", "label", "prediction"]]
    return columns.assign(probability=certain, right=tested["label"] == tested["prediction"])


def content_of(results: dict, predictions: pd.DataFrame, report: Path) -> dict:
    """Return what the template needs beside `results`, without images and names of files."""
    names = list(results["per_class"])
    tested, base = tests_of(predictions, names), Path(results["settings"]["model_name_or_path"]).name
    data = KVASIR["name"] if results["data"]["kvasir"] else results["data"]["name"]
    certain = tested.sort_values("probability", ascending=False, kind="stable")
    many, wrong = len(names) > SHOWN, confusions(tested)
    counts = [] if many else confusion_matrix(tested["label"], tested["prediction"], labels=names).tolist()
    return {
        "title": f"{base} {results['made']} on {data}",
        "names": names,
        "matrix": counts,
        "confusions": wrong[:LISTED].to_dict("records"),
        "more_confusions": max(0, len(wrong) - LISTED),
        "by_confidence": {
            "probability": certain["probability"].round(6).tolist(),
            "right": certain["right"].astype(int).tolist(),
        },
        "command": command_of(results),
        "settings_shown": settings_shown(results),
        "tables": sorted(path.name for path in report.glob("*.csv")),
    }


def pictures(captions: dict[str, str], report: Path) -> list[dict[str, str]]:
    """Return name, caption and data of those pictures of the report that are there."""
    return [
        {"name": name, "caption": caption, "data": base64.b64encode((report / name).read_bytes()).decode()}
        for name, caption in captions.items()
        if (report / name).exists()
    ]


def images_shown(predictions: pd.DataFrame, images: Dataset, work: Workspace) -> dict:
    """Return what the template needs to show images: test images, label conflicts, label issues."""
    names, report = images.features["label"].names, work.report
    split = read_table(report / "split.csv", ["file", "split", "group"]).set_index("file")
    tested = tests_of(predictions, names)
    doubt = np.where(tested["right"], tested["probability"], -tested["probability"])
    tested = tested.iloc[np.argsort(doubt, kind="stable")]  # confident mistakes first, then unsure answers
    rows = {
        "files": tested["file"].tolist(),
        "labels": label_numbers(tested["label"], names).tolist(),
        "predictions": label_numbers(tested["prediction"], names).tolist(),
        "probabilities": tested["probability"].round(4).tolist(),
        "groups": [int(group) for group in lookup(split["group"], tested["file"])],
    }
    known = set(images["file"][:])
    pairs = read_table(report / "near_duplicates.csv", ["file_a", "file_b", "label_a", "label_b"])
    pairs = conflicting(pairs[pairs["file_a"].isin(known) & pairs["file_b"].isin(known)])
    issues = read_table(report / "label_issues.csv", ISSUES)
    few = {side: lookup(split["split"], pairs[f"file_{side}"][:LISTED]) for side in "ab"}
    shape = pixel_shape(AutoImageProcessor.from_pretrained(processor_of(str(work.output_dir))))
    others = dict.fromkeys([*pairs["file_a"][:LISTED], *pairs["file_b"][:LISTED], *issues["file"][:LISTED]])
    return {
        "rows": rows,
        "thumbnails": [*thumbnails(rows["files"][:MOST], images, shape)],
        "shown": dict(zip(others, thumbnails([*others], images, shape), strict=True)),
        "conflicts": pairs[:LISTED].assign(split_a=few["a"], split_b=few["b"]).to_dict("records"),
        "more_conflicts": max(0, len(pairs) - LISTED),
        "issues": issues[:LISTED].to_dict("records"),
        "more_issues": max(0, len(issues) - LISTED),
        "static": STATIC,
    }


def thumbnails(files: list[str], images: Dataset, shape: tuple[int, int, int]) -> Iterator[str]:
    """Yield a small JPEG of each of `files`, in base64, from their prepared pixels, until MOST_BYTES."""
    place = {file: row for row, file in enumerate(images["file"][:])}
    rows, spent = images.select([place[file] for file in files]), 0
    scale = min(1.0, (LARGE if len(files) <= FEW else SMALL) / max(shape[1:]))
    size = [max(1, round(scale * side)) for side in shape[1:]]
    for batch in rows.select_columns("pixel_values").iter(256):
        pixels = torch.frombuffer(bytearray().join(batch["pixel_values"]), dtype=torch.uint8)
        pixels = F.interpolate(pixels.view(-1, *shape), size, mode="bilinear", antialias=True)
        for picture in pixels.permute(0, 2, 3, 1).contiguous().numpy():
            jpeg = simplejpeg.encode_jpeg(picture, quality=85, colorsubsampling="420")
            spent += len(jpeg)
            if spent > MOST_BYTES:
                return
            yield base64.b64encode(jpeg).decode()
