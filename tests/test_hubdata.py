"""Step 2: data sets of a Hub on this machine, read by the real clients, in one process for all cases."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from conftest import COLOURS, ROOT, draw, left_over, locate_images, read_settings
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hub_server import READER, Fault, HubServer

from steps.hubdata import ending_of, fetch_dataset, text_of
from steps.load import find_images
from steps.options import Settings

DRIVER = """
import json, os, sys
from steps.console import start_logging
start_logging()
import huggingface_hub as hub
from steps.hubdata import fetch_dataset
from steps.options import Settings
for name, case in json.load(sys.stdin).items():
    hub.hf_api.api.endpoint = case.pop("endpoint", hub.constants.ENDPOINT)
    os.environ["HF_TOKEN"] = case.pop("token", "")
    try:
        answer = str(fetch_dataset(Settings(**case))[0])
    except SystemExit as stopped:
        answer = str(stopped)
    print(f"\\nCASE {name}\\n{answer}", flush=True)
"""
IMAGE, TEXT, NUMBER = Image(), Value("string"), Value("int64")
CONFIGS = b"""---
configs:
- config_name: large
  data_files: large.parquet
- config_name: small
  data_files: small.parquet
---
"""
SPLITS = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: one.parquet
  - split: extra
    path: one.parquet
---
"""


def picture(number, kind="JPEG"):
    """The bytes of a small image; each number gives another one."""
    content = io.BytesIO()
    draw(list(COLOURS.values())[number % 3], np.random.default_rng(number)).save(content, kind)
    return content.getvalue()


def parquet(**columns):
    """The bytes of a parquet file of {name: (kind, values)}. An image is bytes, or a path that stays one."""
    kinds = Features({name: kind for name, (kind, _) in columns.items()})
    table = Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=kinds)
    pyarrow.parquet.write_table(table.with_format("arrow")[:], content := io.BytesIO())
    return content.getvalue()


def zipped(files):
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def draw_datasets(secret):
    """{data set: its files}; `secret` is the path of an image outside of them."""
    jpegs, pngs = [picture(n) for n in range(4)], [picture(n, "PNG") for n in (5, 6)]
    classes, patient = ClassLabel(names=["cat", "dog"]), "Patient ID"
    train = {"image": (IMAGE, [*jpegs, b"broken"]), "label": (classes, [0, 1, 0, 1, 0])}
    train = parquet(**train, **{patient: (NUMBER, [7, 7, 8, 9, None])})
    test = parquet(image=(IMAGE, pngs), label=(classes, [1, -1]), **{patient: (NUMBER, [10, 11])})
    one = {"image": (IMAGE, jpegs[:2]), "label": (TEXT, ["a", "b"])}
    texts = {"img": (IMAGE, jpegs), "diagnosis": (TEXT, ["a ", "b", "a", None])}
    texts |= {
        "site": (TEXT, list("xyxy")),
        "case": (TEXT, ["01", "02", "03", "04"]),
        "Subset": (TEXT, ["Train", "val", "test", "test"]),
    }
    folders = {
        f"{split}/{name}/{n}.jpg": jpegs[n] for split in ("train", "test") for name in "ab" for n in (0, 1)
    }
    table = {"metadata.csv": b"file_name,dx,patient\nx/1.jpg,nevus,p1\nx/2.jpg,melanoma,p2\n"}
    table |= {"x/1.jpg": jpegs[1], "x/2.jpg": jpegs[2]}
    paths = [jpegs[0], str(secret), f"zip://x::{secret}", None]
    raw = {"scan": (Value("binary"), jpegs[:3]), "is_a": (NUMBER, [1, 0, 0]), "is_b": (NUMBER, [0, 1, 0])}
    two = {"left": (IMAGE, jpegs), "right": (IMAGE, jpegs[::-1]), "label": (TEXT, list("abab"))}
    one_file = {"one.parquet": parquet(**one)}
    return {
        "classes": {"data/train-00000-of-00001.parquet": train, "data/test-00000-of-00001.parquet": test},
        "texts": {"texts.parquet": parquet(**texts)},
        "numbers": {"numbers.parquet": parquet(image=(IMAGE, paths), grade=(NUMBER, [0, 1, 2, 3]))},
        "raw": {"raw.parquet": parquet(**raw)},
        "folders": folders,
        "table": table,
        "zip": {"images.zip": zipped(table)},
        "two": {"two.parquet": parquet(**two)},
        "configs": {"README.md": CONFIGS, "large.parquet": parquet(**texts), "small.parquet": parquet(**one)},
        "none": {"none.parquet": parquet(text=(TEXT, ["a"]), label=(TEXT, ["b"]))},
        "unlabelled": {"one.parquet": parquet(image=(IMAGE, jpegs[:1]), name=(TEXT, ["x"]))},
        "many": {"many.parquet": parquet(image=(IMAGE, jpegs[:1]), labels=(List(NUMBER), [[1, 2]]))},
        "extra": {"README.md": SPLITS, "one.parquet": parquet(**one, fold=(TEXT, ["train", "test"]))},
        "script": {"script.py": b"import os"} | one_file,
        "private": one_file,
        "gated": one_file,
    }


CASES = {
    **{name: {} for name in ("classes", "texts", "numbers", "folders", "table", "zip")},
    "raw": {"image_column_name": "scan", "label_column_name": ["is_a", "is_b"]},
    "named": {"name": "texts", "label_column_name": ["site"], "image_column_name": "img"},
    "right": {"name": "two", "image_column_name": "right"},
    "small": {"name": "configs", "dataset_config_name": "small"},
    "v1": {"name": "texts", "dataset_revision": "v1"},
    "by column": {"name": "extra", "split_column_name": "fold"},
    "allowed": {"name": "private", "token": READER},
}
LOGIN = "run `hf auth login`, or set HF_TOKEN"
CONFIG_NAMES = r"\['large', 'small'\]; give one of these as --dataset_config_name"
FAILS = {
    "absent": (
        {},
        f"the Hub shows us no data set me/absent; check --dataset_name; if it is private, {LOGIN}",
    ),
    "private": (
        {},
        f"the Hub shows us no data set me/private; check --dataset_name; if it is private, {LOGIN}",
    ),
    "wrong token": (
        {"name": "private", "token": "hf_" + "x" * 34},
        f"the Hub does not know the token .*; {LOGIN}",
    ),
    "gated": (
        {"token": READER},
        f"me/gated is gated; ask for access at http.*/datasets/me/gated, then {LOGIN}",
    ),
    "v9": (
        {"name": "texts", "dataset_revision": "v9"},
        "me/texts has no revision v9; give a branch, a tag or a commit",
    ),
    "configs": ({}, f"me/configs: Config name is missing.*{CONFIG_NAMES}"),
    "no config": ({"name": "configs", "dataset_config_name": "x"}, f"'x' not found.*{CONFIG_NAMES}"),
    "none": ({}, "me/none has no column of images; choose another.*its columns are text, label"),
    "two": ({}, "me/two has images in left, right; say which: --image_column_name left"),
    "not there": (
        {"name": "two", "image_column_name": "x"},
        "no column x; give --image_column_name one of left, ",
    ),
    "no image": (
        {"name": "two", "image_column_name": "label"},
        "there is no image in the column label; choose",
    ),
    "unlabelled": (
        {},
        "no column of me/unlabelled is known to hold the labels; say which: --label_column_name",
    ),
    "many": ({}, "labels of me/many holds a List, not one label; multi-label is not supported"),
    "extra": ({}, "me/extra has the splits train, extra; known are train, .*--split_column_name"),
    "script": (
        {},
        "me/script is read by a script of its own.*; try .*--dataset_revision refs/convert/parquet",
    ),
    "no network": (
        {"name": "texts", "endpoint": "http://127.0.0.1:9"},
        "cannot read me/texts: .*; check the network",
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (what came back, the log lines)}; "root": the folder that holds a data_root for each case."""
    root = tmp_path_factory.mktemp("hub")
    (root / "secret.jpg").write_bytes(picture(99))
    cases = {name: dict(flags) for name, flags in CASES.items()}
    cases |= {name: dict(flags) for name, (flags, _) in FAILS.items()}
    for name, flags in cases.items():
        flags |= {"dataset_name": f"me/{flags.pop('name', name)}", "data_root": str(root / name)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with HubServer() as hub:
        for name, files in draw_datasets(root / "secret.jpg").items():
            repo = hub.create(f"me/{name}", "dataset")
            repo.commit("main", files, "images")
            repo.private, repo.gated = name == "private", name == "gated"
        repo = hub.repos["dataset", "me/texts"]
        repo.branches["v1"] = repo.branches["main"]
        repo.commit("v1", {"texts.parquet": hub.files("me/private", "dataset")["one.parquet"]}, "earlier")
        hub.faults = [Fault("GET", "folders/resolve/.*/train/a/0.jpg", cut=500)]
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_XET": "1"}
        options = {"capture_output": True, "text": True, "timeout": 120, "env": environment, "cwd": ROOT}
        done = subprocess.run([sys.executable, "-c", DRIVER], input=json.dumps(cases), **options)
        assert done.returncode == 0, done.stderr
        assert hub.faults[0].times == 0
    assert done.stderr == ""
    found = re.split(r"\nCASE (.+)\n(.+)\n", done.stdout)
    logs, names, texts = found[:-1:3], found[1::3], found[2::3]
    return {"root": root} | {name: (text, log) for name, text, log in zip(names, texts, logs, strict=True)}


def table_of(answers, case):
    """The metadata.csv that a case made, as text; the files that it names are there, and nothing else is."""
    folder = Path(answers[case][0])
    assert folder.is_dir(), answers[case]
    table = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    assert files == sorted(table.iloc[:, 0])
    assert (
        left_over(folder.parent) == ["cache", folder.name]
        and left_over(folder.parent / "cache" / "hub") == []
    )
    return table


def contents(answers, case):
    return [(Path(answers[case][0]) / file).read_bytes() for file in table_of(answers, case).iloc[:, 0]]


@pytest.mark.parametrize("case", FAILS)
def test_what_cannot_be_is_one_error_line(answers, case):
    line, message = answers[case][0], FAILS[case][1]
    assert re.fullmatch(r"error: .+; .+", line) and re.search(message, line), line
    assert not list((answers["root"] / case).glob("*me--*"))


def test_images_are_kept_byte_by_byte_with_their_classes_splits_and_patients(answers):
    table = table_of(answers, "classes")
    assert table.columns.tolist() == ["file_name", "label", "group", "split"]
    assert table["file_name"].tolist()[3:6] == ["train/000003.jpg", "train/000004.jpg", "test/000005.png"]
    assert table["label"].tolist() == ["cat", "dog", "cat", "dog", "cat", "dog", ""]
    assert table["group"].tolist() == ["7", "7", "8", "9", "", "10", "11"]
    assert table["split"].tolist() == ["train"] * 5 + ["test"] * 2
    pngs = [picture(number, "PNG") for number in (5, 6)]
    assert contents(answers, "classes") == [*map(picture, range(4)), b"broken", *pngs]
    assert "as image: image, label: label, group: Patient ID" in answers["classes"][1]
    assert "1 of 7 images have no label" in answers["classes"][1]


def test_folders_on_the_hub_become_a_folder_here_though_a_download_is_cut(answers):
    table = table_of(answers, "folders")
    assert table["label"].tolist() == ["a", "a", "b", "b"] * 2
    assert table["split"].tolist() == ["train"] * 4 + ["test"] * 4
    assert contents(answers, "folders") == [picture(number) for number in (0, 1)] * 4


@pytest.mark.parametrize("case", ["table", "zip"])
def test_a_metadata_file_on_the_hub_is_understood(answers, case):
    rows = [["images/000000.jpg", "nevus", "p1"], ["images/000001.jpg", "melanoma", "p2"]]
    assert table_of(answers, case).to_numpy().tolist() == rows
    assert contents(answers, case) == [picture(1), picture(2)]


def test_labels_may_be_text_or_numbers_and_a_column_may_say_the_split(answers):
    table = table_of(answers, "texts")
    assert table.columns.tolist() == ["file_name", "label", "split", "group"]
    assert table["label"].tolist() == ["a", "b", "a", ""] and table["group"].tolist() == [
        "01",
        "02",
        "03",
        "04",
    ]
    assert table["split"].tolist() == ["Train", "val", "test", "test"]
    assert table_of(answers, "by column")["fold"].tolist() == ["train", "test"] * 2
    assert table_of(answers, "small").columns.tolist() == ["file_name", "label"]  # one split says nothing


def test_a_path_in_a_table_opens_nothing_outside_of_the_data_set(answers):
    assert table_of(answers, "numbers").to_numpy().tolist() == [["images/000000.jpg", "0"]]
    assert "3 rows have no image: left out" in answers["numbers"][1]


def test_columns_that_were_asked_for_keep_their_names(answers):
    assert table_of(answers, "raw").columns.tolist() == ["scan", "is_a", "is_b"]
    assert table_of(answers, "raw").to_numpy()[:, 1:].tolist() == [["1", "0"], ["0", "1"], ["0", "0"]]
    assert table_of(answers, "right").columns.tolist() == ["right", "label"]
    assert contents(answers, "right") == [picture(number) for number in (3, 2, 1, 0)]


def test_revisions_configurations_and_columns_never_share_a_folder(answers):
    names = {case: Path(answers[case][0]).name for case in ("texts", "named", "v1", "small")}
    assert names["texts"] == "me--texts" and len(set(names.values())) == 4
    assert re.fullmatch("me--texts--[0-9a-f]{8}", names["v1"]) and len(table_of(answers, "v1")) == 2
    assert len(table_of(answers, "allowed")) == 2


LABELS = {
    "classes": "cat cat cat dog dog dog", "folders": "a a a a b b b b", "texts": "a a b", "raw": "is_a is_b",
    "named": "x x y y", "right": "a a b b", "by column": "a a b b", "table": "melanoma nevus",
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_step_3_reads_what_step_2_wrote(answers, case):
    """With the same settings, though these may name columns of the data set."""
    flags = {name: value for name, value in CASES[case].items() if name != "name"}
    table, left_out = find_images(Path(answers[case][0]), Settings(**flags))
    assert sorted(table["label"]) == LABELS[case].split()
    assert set(left_out.values()) <= {"images without a label"}
    assert ("split" in table) == (case in ("classes", "folders", "texts", "named", "by column"))
    assert ("group" in table) == (case in ("classes", "texts", "named", "table"))


def test_a_second_run_does_not_ask_the_hub(answers):
    """The client of this process is offline."""
    flags = {"dataset_name": "me/texts", "data_root": str(answers["root"] / "texts")}
    folder, origin = fetch_dataset(Settings(**flags))
    assert str(folder) == answers["texts"][0] and locate_images(Settings(**flags)) == folder
    assert re.fullmatch("http://127.0.0.1:.*/datasets/me/texts", origin["url"])
    assert re.fullmatch("[0-9a-f]{40}", origin["revision"])
    with pytest.raises(SystemExit, match="cannot read me/texts: .*offline"):
        fetch_dataset(Settings(**flags, dataset_revision="v1"))


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "me--texts").mkdir()
    with pytest.raises(SystemExit, match="was not made from me/texts; move it, or use another --data_root"):
        fetch_dataset(Settings(dataset_name="me/texts", data_root=str(tmp_path)))


def test_endings_and_texts():
    for kind, ending in {
        "JPEG": ".jpg",
        "PNG": ".png",
        "BMP": ".bmp",
        "TIFF": ".tif",
        "WEBP": ".webp",
    }.items():
        assert ending_of(picture(0, kind), "x.gif") == ending
    for path, ending in {
        "a/b.DCM": ".dcm",
        "": ".jpg",
        "x.": ".jpg",
        "a.b/c": ".jpg",
        "x.\n": ".jpg",
    }.items():
        assert ending_of(b"no image", path) == ending
    kind = ClassLabel(names=["no", "yes"])
    for value, text in {1: "yes", 0: "no", -1: "", None: ""}.items():
        assert text_of(value, kind) == text
    for value, text in [(3, "3"), (3.0, "3"), (0.5, "0.5"), (float("nan"), ""), (" a ", "a"), (True, "True")]:
        assert text_of(value, TEXT) == text


BESIDE = {"data_dir": "steps", "data_url": "data/sample.zip", "data_sha256": "0" * 64, "metadata": "LICENSE"}
REFUSED = [
    *[(["--dataset_name", name], "cannot be a name on the Hub; give OWNER/NAME") for name in ("", "a/b/c", "h://a")],
    *[(["--dataset_name", "a/b", f"--{name}", value], f"and --{name} are two sources; leave one of them out")
      for name, value in BESIDE.items()],
    *[([f"--dataset_{name}", "x"], f"--dataset_{name} is for a data set of the Hub; add --dataset_name")
      for name in ("revision", "config_name")],
]  # fmt: skip


@pytest.mark.parametrize("flags, message", REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_settings_that_do_not_go_together_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        read_settings([*flags, "--output_dir", str(tmp_path / "model")])
    assert message in str(stopped.value)
