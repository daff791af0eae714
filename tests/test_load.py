"""Step 3: labels come from folder names, whatever else lies around."""

import json
import logging
import re
import shutil
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from conftest import COLOURS, ROOT, load_images, make_work

from steps.download import fetch_images
from steps.options import Settings
from steps.load import KVASIR, as_dataset, find_images, load_external, record_data


def names(images):
    labels = images.features["label"].names
    return [(file, labels[label]) for file, label in zip(images["file"], images["label"], strict=True)]


def test_files_and_labels(tmp_path, make_images):
    images = load_images(make_images(count=4))
    assert images.features["label"].names == ["blue", "green", "red"]
    assert names(images) == [(f"{c}/{i:03}.jpg", c) for c in ("blue", "green", "red") for i in range(4)]


def test_odd_names_are_loaded(tmp_path, make_images):
    folder = make_images(count=2)
    one = folder / "red" / "000.jpg"
    odd = ["UPPER.JPG", "test.jpeg", "a [1] train *.png", "quote'\".jpg", "ünï.webp", "-- x.jpg"]
    for name in odd:
        shutil.copy(one, folder / "red" / name)
    shutil.copytree(folder / "green", folder / "test")  # imagefolder would make a split of it
    loaded = names(load_images(folder))
    assert {(f"red/{name}", "red") for name in odd} <= set(loaded)
    assert ("test/001.jpg", "test") in loaded and len(loaded) == 6 + len(odd) + 2


def test_files_that_are_no_images_change_nothing(tmp_path, make_images):
    folder = make_images(count=2)
    expected = names(load_images(folder))
    (folder / "metadata.csv").write_text("file_name,caption\nred/000.jpg,a red one\n")
    (folder / "red" / "Thumbs.db").write_bytes(b"x")
    for stray in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(folder / "red", folder / stray)
    assert names(load_images(folder)) == expected


def test_doubled_folders_are_loaded(tmp_path, make_images):
    folder = make_images(count=2)
    for label in ("blue", "green", "red"):
        shutil.move(folder / label, folder / "deep" / label)
        shutil.move(folder / "deep", folder / label)
    assert ("red/red/001.jpg", "red") in names(load_images(folder))


def damage_empty_class(folder):
    (folder / "yellow").mkdir()


def damage_one_class(folder):
    shutil.rmtree(folder / "red")
    shutil.rmtree(folder / "blue")


def damage_no_images(folder):
    for path in folder.glob("*/*.jpg"):
        path.write_text("no image")
        path.rename(path.with_suffix(".txt"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_empty_class, "no images in yellow"),
        (damage_one_class, "one class only"),
        (damage_no_images, "no images"),
    ],
)
def test_folders_that_mislead_are_refused(tmp_path, make_images, damage, message):
    folder = make_images(count=2)
    damage(folder)
    with pytest.raises(SystemExit, match=message) as stopped:
        record_data(load_images(folder), folder, {}, None)
    assert "\n" not in str(stopped.value)


@pytest.fixture
def recorded(tmp_path):
    """Return a function that records the images of a folder, and returns `data` of settings.json."""

    def record(folder, origin=None, flags=(), model="model"):
        work = make_work(["--data_dir", folder, "--output_dir", tmp_path / model, *flags])
        record_data(load_images(folder), Path(folder), origin or {}, work)
        return json.loads((tmp_path / model / "settings.json").read_text())["data"]

    return record


@pytest.mark.parametrize("count, complete", [(1000, True), (2, False)])
def test_kvasir_is_counted(make_images, recorded, caplog, count, complete):
    folder = make_images("kvasir-dataset-v2", 1, KVASIR["classes"])
    jpeg = (folder / "polyps" / "000.jpg").read_bytes()
    for label in KVASIR["classes"]:
        for i in range(count):
            (folder / label / f"{i:03}.jpg").write_bytes(jpeg)
    if not complete:
        shutil.rmtree(folder / "esophagitis")
    with caplog.at_level(logging.WARNING, "finetune_vit"):
        data = recorded(folder)
    assert bool(caplog.messages) is not complete
    assert data["kvasir"] is True and data["endoscopy"] is True
    if not complete:
        assert "'esophagitis': 1000" in caplog.text and "'polyps': 998" in caplog.text


@pytest.mark.parametrize(
    "name, classes, kvasir",
    [
        ("colon", KVASIR["classes"], True),
        ("colon", KVASIR["classes"][2:5], True),
        ("kvasir-dataset-v2", tuple(COLOURS), False),
        ("kvasir-dataset-v2", KVASIR["classes"][:2], False),  # polyps or not: two classes are anyone's
        ("kvasir-dataset-v2", [*KVASIR["classes"], "polyps-2"], False),
        ("kvasir-dataset-v2", [name.upper() for name in KVASIR["classes"]], False),
    ],
)
def test_kvasir_is_known_by_its_classes(make_images, recorded, caplog, name, classes, kvasir):
    data = recorded(make_images(name, 1, classes))
    assert (data["name"], data["kvasir"], data["endoscopy"]) == (name, kvasir, kvasir)
    assert ("Kvasir v2 has 8 classes" in caplog.text) is kvasir


def test_kvasir_is_known_by_its_address(make_images, recorded):
    folder = make_images()
    origin = {"url": "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip", "sha256": "0" * 64}
    data = recorded(folder, origin)
    assert data["kvasir"] is True and data["endoscopy"] is True
    data = recorded(folder, origin | {"url": "https://example.org/kvasir-dataset-v2.zip"}, model="other")
    assert data["kvasir"] is False and data["endoscopy"] is False


@pytest.mark.parametrize("name", ["sample", "kvasir-dataset-v2"])
def test_the_drawn_sample_is_not_kvasir(tmp_path, caplog, name):
    archive = shutil.copy(ROOT / "data" / "sample.zip", tmp_path / f"{name}.zip")
    flags = ["--data_url", archive, "--data_root", tmp_path / "data", "--output_dir", tmp_path / "model"]
    work = make_work(flags)
    folder, origin = fetch_images(work)
    images = load_images(folder)
    assert images.features["label"].names == KVASIR["classes"]  # which it borrows
    record_data(images, folder, origin, work)
    data = json.loads((tmp_path / "model" / "settings.json").read_text())["data"]
    assert data["kvasir"] is False and data["images"] == len(images)
    assert "Kvasir" not in caplog.text


def test_other_images_may_be_called_endoscopic(make_images, recorded):
    folder = make_images()
    assert recorded(folder)["endoscopy"] is False
    data = recorded(folder, flags=["--endoscopy"], model="other")
    assert data["endoscopy"] is True and data["kvasir"] is False


def test_endoscopy_may_be_said_after_a_first_run(make_images, recorded):
    """It is one of the settings that two runs in one folder may differ in, so it must take effect."""
    folder = make_images()
    assert recorded(folder)["endoscopy"] is False
    assert recorded(folder, flags=["--endoscopy"])["endoscopy"] is True


def test_class_folders_may_be_links(tmp_path, make_images):
    folder, real = tmp_path / "linked", make_images(count=3)
    folder.mkdir()
    for name in ("blue", "red"):
        (folder / name).symlink_to(real / name)
    assert names(load_images(folder)) == [(f"{c}/{i:03}.jpg", c) for c in ("blue", "red") for i in range(3)]


def test_a_link_to_itself_ends(tmp_path, make_images):
    folder = make_images(count=2)
    (folder / "red" / "again").symlink_to(folder)
    assert len(load_images(folder)) == 6


def test_links_in_circles_end(tmp_path, make_images):
    """Followed blindly, these would be paths by the million."""
    folder = make_images(count=2)
    (folder / "red" / "deep").mkdir()
    for i in range(8):
        (folder / "red" / "deep" / f"up{i}").symlink_to(folder / "red")
    assert len(load_images(folder)) == 6
    (folder / "yellow").symlink_to(folder / "red")  # one class under two names
    with pytest.raises(SystemExit, match="no images in yellow"):
        load_images(folder)


@pytest.mark.parametrize("name", ["set [1-3]*", "100% {x}", "a b'c", "*"])
def test_folders_with_odd_names_are_loaded(tmp_path, make_images, name):
    assert len(load_images(make_images(name, count=2))) == 6


@pytest.mark.parametrize("trained", ["checkpoint-3", "model.safetensors"])
def test_results_of_other_images_are_not_mixed_in(tmp_path, make_images, recorded, trained):
    folder, model = make_images(count=3), tmp_path / "model"
    origin = {"bytes": 7, "sha256": "0" * 64, "mtime_ns": 1}
    for _ in range(2):
        data = recorded(folder, origin)
    assert data["images"] == 9 and data["archive_sha256"] == "0" * 64 and data["archive_bytes"] == 7
    (model / trained).mkdir()
    assert recorded(folder, origin) == data
    (folder / "red" / "000.jpg").write_bytes(b"other")
    with pytest.raises(
        SystemExit,
        match="made from other images, labels, splits or patients than those in .*; use another --output_dir",
    ):
        recorded(folder)
    assert json.loads((model / "settings.json").read_text())["data"] == data


def test_other_images_before_training_make_the_split_anew(tmp_path, make_images, recorded):
    folder, report = make_images(count=3), tmp_path / "model" / "report"
    before = recorded(folder)
    report.mkdir()
    for name in ("split.csv", "near_duplicates.csv"):
        (report / name).touch()
    recorded(folder)
    assert len([*report.iterdir()]) == 2  # the same images: nothing is made again
    (folder / "red" / "000.jpg").write_bytes(b"other")
    assert recorded(folder)["files_sha256"] != before["files_sha256"]
    assert not [*report.iterdir()]


@pytest.mark.parametrize("ending", [".dcm", ".heic", ".nii", ".svs", ".CR2"])
def test_a_folder_of_other_kinds_of_images_says_which(tmp_path, make_images, bare_pillow, ending):
    folder = make_images(count=2)
    for path in folder.glob("*/*.jpg"):
        path.write_bytes(b"x")
        path.rename(path.with_suffix(ending))
    (folder / "red" / "notes.txt").write_text("no image")
    with pytest.raises(SystemExit, match="^error: no images in .*images; .+; give a folder that") as stopped:
        find_images(folder, Settings())
    line = str(stopped.value)
    named = {".dcm": "DICOM: needs `pip install pydicom`"}
    named |= {".heic": "HEIC: needs `pip install pillow-heif`"}
    says = named.get(ending, f"{ending.lower()}: Pillow cannot read it")
    assert says in line and "txt" not in line
    assert re.search(r"\b6\b", line.split(";")[1]) and "\n" not in line  # how many


def test_images_from_elsewhere_have_known_classes_and_our_labels(tmp_path, make_images, caplog):
    work = make_work(["--external_dir", make_images("elsewhere", 2, ("blue", "purple", "red"))])
    work.settings.data_root = str(tmp_path / "data")
    images, left_out = load_external(["red", "green", "blue"], work)
    assert images["label"][:] == [2, 2, 0, 0] and images.features["label"].names[2] == "blue"
    assert "classes that the model does not know: purple" in caplog.text and not left_out
    with pytest.raises(
        SystemExit, match="no class of .* is named like ours: blue, purple, red; rename them: ours are"
    ):
        load_external(["cat", "dog"], work)


def test_renamed_classes_are_other_data(tmp_path, make_images):
    """Also where their order, and so each label's number, stays the same."""
    folder = make_images(count=2, classes=("a", "b"))
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*.jpg"))]
    digests = set()
    for number, names in enumerate([("a", "b"), ("a", "c")]):
        table = pd.DataFrame({"file": files, "label": [names[file[0] == "b"] for file in files]})
        work = make_work(["--data_dir", folder, "--output_dir", tmp_path / f"model-{number}"])
        record_data(as_dataset(table, [*names]), folder, {}, work)
        digests.add(json.loads((work.output_dir / "settings.json").read_text())["data"]["files_sha256"])
    assert len(digests) == 2


def test_images_from_elsewhere_may_be_of_one_class(tmp_path, make_images):
    work = make_work(["--external_dir", make_images("elsewhere", 2, ["blue"])])
    work.settings.data_root = str(tmp_path / "data")
    assert load_external(["red", "blue"], work)[0]["label"][:] == [1, 1]


def test_images_from_elsewhere_may_lie_in_folders_of_patients(tmp_path, make_images):
    make_images("elsewhere/anna", 2, ("blue", "red"))
    work = make_work(["--external_dir", make_images("elsewhere/bert", 2, ("blue",)).parent])
    work.settings.data_root = str(tmp_path / "data")
    images, _ = load_external(["red", "blue"], work)
    assert images["label"][:] == [1, 1, 0, 0, 1, 1] and images["group"][:] == ["anna"] * 4 + ["bert"] * 2


@pytest.mark.parametrize("patients", [False, True])
def test_images_from_elsewhere_may_come_from_a_mac(tmp_path, make_images, caplog, patients):
    """Which writes ü as two characters in the names of folders."""
    name, place = unicodedata.normalize("NFD", "ülser"), "elsewhere/anna" if patients else "elsewhere"
    make_images(place, 2, (name, "blue"))
    make_images("elsewhere/bert", 2, ["blue"]) if patients else None
    work = make_work(["--external_dir", tmp_path / "elsewhere", "--data_root", tmp_path / "data"])
    images, _ = load_external(["polyp", "ülser"], work)
    assert images["label"][:] == [1, 1] and name in images["file"][0]
    assert "ülser" not in caplog.text


@pytest.mark.parametrize(
    "other", ["ÜLSER", "ülser ", "\tülser", unicodedata.normalize("NFD", "Ülser"), "ülser\r"]
)
def test_classes_whose_names_look_alike_are_one_line(tmp_path, make_images, other):
    folder = make_images(classes=("ülser", other, "polyp"), count=1)
    with pytest.raises(
        SystemExit, match="^error: the classes .* have the same name; rename one, or"
    ) as stopped:
        find_images(folder, Settings())
    assert repr("ülser") in str(stopped.value) and repr(other) in str(stopped.value)


def test_a_folder_too_high_is_named(tmp_path, make_images):
    folder = make_images("pets/pictures", 2)
    with pytest.raises(SystemExit, match="holds one class only: pictures; give --data_dir .*/pets/pictures"):
        record_data(load_images(folder.parent), folder.parent, {}, None)
