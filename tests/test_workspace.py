"""Step 1: one folder, one run; the checkpoint is looked at before anything long starts."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import COLOURS, ROOT, load_images, make_work, read_settings
from draw_sample import save_processor
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from steps.architectures import pixel_shape
from steps.duplicates import find_scenes
from steps.load import record_data
from steps.options import Settings
from steps.preprocess import keep_readable, prepare_pixels
from steps.split import split_images
from steps.workspace import MAY_DIFFER, choose_checkpoint, claim, keep_on_drive, open_workspace


@pytest.fixture
def flags(tmp_path, tiny_vit):
    (tmp_path / "images").mkdir()
    return [
        "--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "model"),
        "--model_name_or_path", str(tiny_vit), "--report_to", "none",
    ]  # fmt: skip


def test_settings_are_recorded_without_the_token(tmp_path, flags):
    open_workspace(*read_settings([*flags, "--hub_token", "hf_marked_secret"]))
    text = (tmp_path / "model" / "settings.json").read_text()
    record = json.loads(text)
    assert record["settings"]["test_size"] == 0.15 and record["training"]["num_train_epochs"] == 4
    assert record["versions"]["torch"] and len(record["script_sha256"]) == 64
    assert "hf_marked_secret" not in text


@pytest.fixture(params=["checkpoint-3", "model.safetensors", "fold-1-of-3/predictions.csv"])
def begun(tmp_path, flags, request):
    """The flags of a run that was trained."""
    work = open_workspace(*read_settings(flags))
    work.report.mkdir()
    (work.report / "split.csv").touch()
    (work.output_dir / request.param).mkdir(parents=True)
    return flags


@pytest.mark.parametrize(
    "change, named",
    [
        (
            ["--learning_rate", "1e-4"],
            "settings: learning_rate was 4e-05 with 64 images per step, is 0.0001;",
        ),
        (["--learning_rate", "4e-5"], "settings: learning_rate was 4e-05 with 64 images per step, is 4e-05;"),
        (["--split_by", "random"], "settings: split_by was given or near-duplicates, is random;"),
        (["--seed", "1"], "seed was 42, is 1"),
        (["--test_size", "0.2"], "test_size was 0.15, is 0.2"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--num_train_epochs", "6"], "num_train_epochs was 4.0, is 6.0"),
        (["--augment", "crop"], "augment was flip, is crop"),
        (["--per_device_train_batch_size", "32", "--learning_rate", "2e-5"], "images_per_step was 64, is 32"),
        (["--save_strategy", "best"], "save_strategy was epoch, is best"),
        (["--save_steps", "7"], "save_steps was 500, is 7"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, begun, change, named):
    with pytest.raises(SystemExit, match=named):
        open_workspace(*read_settings([*begun, *change]))
    assert (tmp_path / "model" / "report" / "split.csv").exists()


def test_settings_may_be_mended_until_there_is_a_result(tmp_path, flags):
    for seed in ("1", "2"):
        open_workspace(*read_settings([*flags, "--seed", seed]))
    assert json.loads((tmp_path / "model" / "settings.json").read_text())["training"]["seed"] == 2


@pytest.mark.parametrize(
    "change",
    [
        ["--evaluate_train"], ["--data_root", "elsewhere"], ["--bf16", "false"], ["--save_total_limit", "5"],
        ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "4"],
        ["--per_device_eval_batch_size", "8"], ["--disable_tqdm", "true"], ["--hub_model_id", "me/model"],
    ],
)  # fmt: skip
def test_what_does_not_decide_the_result_may_change(tmp_path, begun, change):
    assert open_workspace(*read_settings([*begun, *change])).output_dir == tmp_path / "model"
    assert (tmp_path / "model" / "report" / "split.csv").exists()


def test_what_may_differ_are_names_of_settings():
    fields = [*dataclasses.fields(Settings), *dataclasses.fields(transformers.TrainingArguments)]
    assert set(MAY_DIFFER) <= {field.name for field in fields} and len(set(MAY_DIFFER)) == len(MAY_DIFFER)
    assert not {"save_strategy", "save_steps"} & set(MAY_DIFFER) and "save_total_limit" in MAY_DIFFER


def begin(flags):
    """Go through steps 1 to 5 of the script; return the workspace."""
    work = open_workspace(*read_settings(flags))
    folder = Path(work.settings.data_dir)
    processor = transformers.ViTImageProcessor.from_pretrained(work.settings.model_name_or_path)
    images = load_images(folder, work.settings)
    record_data(images, folder, {}, work)
    images = prepare_pixels(images, folder, processor, work.cache)
    images = keep_readable(images, {}, work.report / "left_out.csv")
    scenes = find_scenes(images, pixel_shape(processor), work.report / "near_duplicates.csv")
    split_images(images, scenes, work)
    return work


def split_of(work):
    """What split.csv says: {file: split}."""
    table = pd.read_csv(work.report / "split.csv")
    return dict(zip(table["file"], table["split"], strict=True))


def write_split(path, shift=0, name="{}"):
    """Write a split file for `ready`: of each class 4, 1 and 1 images, from number `shift` on; return it."""
    parts = ["train"] * 4 + ["validation", "test"]
    files = [name.format(f"{label}/{i:03}.jpg") for label in COLOURS for i in range(6)]
    split = {file: parts[(row + shift) % 6] for row, file in enumerate(files)}
    pd.DataFrame(split.items(), columns=["file", "split"]).to_csv(path, index=False)
    return split


@pytest.fixture
def ready(tmp_path, flags, make_images):
    """The flags of a run on 6 images per class."""
    (tmp_path / "images").rmdir()
    make_images(count=6)
    return [*flags, "--data_root", str(tmp_path / "data")]


def test_a_changed_seed_or_size_before_training_makes_the_split_anew(tmp_path, ready):
    first = split_of(begin(ready))
    seed = split_of(begin([*ready, "--seed", "1"]))
    assert seed != first and seed.keys() == first.keys()
    size = split_of(begin([*ready, "--seed", "1", "--test_size", "0.5"]))
    assert sum(split == "test" for split in size.values()) == 9
    record = json.loads((tmp_path / "model" / "settings.json").read_text())
    assert record["training"]["seed"] == 1 and record["settings"]["test_size"] == 0.5
    assert record["data"]["images"] == 18
    assert split_of(begin(ready)) == first


def test_what_was_found_before_training_is_kept_if_nothing_changed(ready):
    work = begin(ready)
    files = [work.report / name for name in ("split.csv", "near_duplicates.csv")]
    before = [file.stat().st_mtime_ns for file in files]
    assert begin([*ready, "--evaluate_train", "--disable_tqdm", "true"]).output_dir == work.output_dir
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.parametrize("wrong", ["absent files", "other parts"])
def test_another_split_file_takes_effect_until_something_is_trained(tmp_path, ready, wrong):
    write_split(tmp_path / "wrong.csv", 2, "no-{}" if wrong == "absent files" else "{}")
    right = write_split(tmp_path / "right.csv")
    if wrong == "absent files":
        with pytest.raises(SystemExit, match="no row of .*wrong.csv names one image in"):
            begin([*ready, "--metadata", str(tmp_path / "wrong.csv")])
    else:
        assert split_of(begin([*ready, "--metadata", str(tmp_path / "wrong.csv")])) != right
    work = begin([*ready, "--metadata", str(tmp_path / "right.csv")])
    assert split_of(work) == right
    (work.output_dir / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit, match="no row of|was made from other images, labels, splits or patients"):
        begin([*ready, "--metadata", str(tmp_path / "wrong.csv")])
    assert split_of(work) == right


@pytest.mark.parametrize("form", ["images/", "./images", "../{}/images", "{}/images", "moved"])
def test_the_same_images_are_the_same_run_wherever_they_lie(tmp_path, ready, monkeypatch, form):
    """Their list decides, not the path."""
    monkeypatch.chdir(tmp_path)
    ready[1:4:2] = "images", "model"
    assert ready[::2][:2] == ["--data_dir", "--output_dir"]
    split = split_of(begin(ready))
    Path("model", "checkpoint-3").mkdir()
    if form == "moved":
        os.rename("images", "moved")
    ready[1] = form.format(tmp_path.name if form.startswith("..") else tmp_path)
    assert split_of(begin(ready)) == split
    next(Path(ready[1]).rglob("*.jpg")).unlink()
    with pytest.raises(SystemExit, match="was made from other images, labels, splits or patients than those"):
        begin(ready)


def test_the_same_checkpoint_is_the_same_run_however_it_is_written(tmp_path, begun, tiny_vit, monkeypatch):
    monkeypatch.chdir(tiny_vit.parent)
    for form in (f"./{tiny_vit.name}/", f"../{tiny_vit.parent.name}/{tiny_vit.name}"):
        open_workspace(*read_settings([*begun, "--model_name_or_path", form]))
    shutil.copytree(tiny_vit, tmp_path / "other")
    with pytest.raises(SystemExit, match="model_name_or_path was .*tiny-vit0, is .*other"):
        open_workspace(*read_settings([*begun, "--model_name_or_path", str(tmp_path / "other")]))


def test_a_data_root_that_cannot_be_written_is_found_at_once(tmp_path, flags):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write into .*file/data; choose another --data_root"):
        open_workspace(*read_settings([*flags, "--data_root", str(tmp_path / "file" / "data")]))


def test_a_split_file_may_be_mended_until_something_is_trained(tmp_path, ready):
    ready += ["--metadata", str(tmp_path / "mine.csv")]
    write_split(tmp_path / "mine.csv", 2)
    begin(ready)
    right = write_split(tmp_path / "mine.csv")
    work = begin(ready)
    assert split_of(work) == right
    (work.output_dir / "checkpoint-3").mkdir()
    write_split(tmp_path / "mine.csv", 2)
    with pytest.raises(
        SystemExit, match="made from other images, labels, splits or patients than those in .*; use"
    ):
        begin(ready)
    assert split_of(work) == right


@pytest.mark.parametrize("trained", ["checkpoint-3", "model.safetensors"])
def test_other_images_take_effect_until_something_is_trained(tmp_path, ready, trained):
    begin(ready)
    shutil.copy(tmp_path / "images" / "red" / "000.jpg", tmp_path / "images" / "red" / "new.jpg")
    work = begin(ready)
    assert "red/new.jpg" in split_of(work)
    pairs = pd.read_csv(work.report / "near_duplicates.csv")  # looked for again
    assert ("red/000.jpg", "red/new.jpg") in set(zip(pairs["file_a"], pairs["file_b"], strict=True))
    record = (work.output_dir / "settings.json").read_text()
    assert json.loads(record)["data"]["images"] == 19
    (work.output_dir / trained).mkdir()
    begin(ready)
    (tmp_path / "images" / "red" / "new.jpg").unlink()
    with pytest.raises(
        SystemExit,
        match="made from other images, labels, splits or patients than those in .*; use another --output_dir",
    ):
        begin(ready)
    assert "red/new.jpg" in split_of(work) and (work.output_dir / "settings.json").read_text() == record


def test_a_model_of_someone_else_is_not_touched(tmp_path, flags):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="model.safetensors, but no settings.json"):
        open_workspace(*read_settings(flags))
    assert {file.name for file in (tmp_path / "model").iterdir()} - {".lock"} == {"model.safetensors"}
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("left", ["checkpoint-3/optimizer.pt", "report/metrics.json", "report/split.csv"])
def test_results_without_their_settings_are_not_taken_over(tmp_path, flags, left):
    (tmp_path / "model" / left).parent.mkdir(parents=True)
    (tmp_path / "model" / left).touch()
    with pytest.raises(SystemExit, match="but no settings.json"):
        open_workspace(*read_settings(flags))


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path, flags):
    (tmp_path / "model").write_text("notes")
    with pytest.raises(SystemExit, match="cannot write into"):
        open_workspace(*read_settings(flags))
    assert (tmp_path / "model").read_text() == "notes"


def test_folds_alone_settle_the_settings(tmp_path, flags):
    open_workspace(*read_settings(flags))
    (tmp_path / "model" / "fold-1-of-3" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(SystemExit, match="settings: seed was 42, is 1;"):
        open_workspace(*read_settings([*flags, "--seed", "1"]))


@pytest.mark.parametrize("edited", [False, True])
def test_what_is_said_of_a_model_goes_with_it(flags, caplog, edited):
    work, card = open_workspace(*read_settings(flags)), "---\nmodel-index:\n- 0.999\n"
    lasting = {"split.csv", "near_duplicates.csv", "left_out.csv"}
    of_model = {
        "predictions.csv",
        "metrics.json",
        "external-x-1.csv",
        "learned-x-1.csv",
        "roc.png",
        "index.html",
    }
    work.report.mkdir()
    for name in lasting | of_model:
        (work.report / name).touch()
    (work.report / "model_card.md").write_text(card)
    (work.output_dir / "README.md").write_text(card + "My note.\n" * edited)
    (work.output_dir / "all_results.json").touch()
    (work.output_dir / "README-former-1.md").touch()
    choose_checkpoint(work)
    assert {file.name for file in work.report.iterdir()} == lasting
    left = {file.name for file in work.output_dir.iterdir() if file.suffix in (".md", ".json")}
    assert left == {"settings.json", "README-former-1.md"} | ({"README-former-2.md"} if edited else set())
    assert ("describes a former model" in caplog.text) == edited


def test_finished_model_is_preferred(tmp_path, flags, tiny_vit):
    work = open_workspace(*read_settings(flags))
    assert choose_checkpoint(work) == str(tiny_vit)
    shutil.copytree(tiny_vit, work.output_dir, dirs_exist_ok=True)
    (work.output_dir / "trainer_state.json").write_text("{}")
    assert choose_checkpoint(work) == str(work.output_dir)


@pytest.mark.parametrize(
    "config, size, message",
    [
        ({"model_type": "resnet"}, 32, "its model_type is resnet, not one of vit, deit, .*, siglip; check"),
        ({"model_type": "no_such_thing"}, 32, "its model_type is no_such_thing, not one of vit, "),
        (
            {"architecture": "vit_tiny", "pretrained_cfg": {}},
            32,
            "is a model of timm, vit_tiny, not",
        ),
        (
            {"architecture": "vit_tiny", "num_classes": 9},
            32,
            "is a model of timm, vit_tiny, not of transf",
        ),
        ({}, 32, "its model_type is None, not one of"),
        (
            {"model_type": "vit", "image_size": 64},
            32,
            r"makes \(3, 32, 32\) pixels, but its vit takes \(64, 64\)",
        ),
        ({"model_type": "vit", "image_size": [32, 32]}, 32, "has no model.safetensors"),  # it fits
        (
            {"model_type": "vit", "image_size": 32, "num_channels": 1},
            32,
            r"its vit takes 1-channel images, not RGB; use another --model_name",
        ),
        (None, None, "cannot use"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_error_line(tmp_path, flags, config, size, message):
    checkpoint = tmp_path / "checkpoint"
    if config is not None:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps(config))
        save_processor(checkpoint, size)
    work = make_work([*flags, "--model_name_or_path", checkpoint])
    with pytest.raises(SystemExit, match=message) as stopped:
        choose_checkpoint(work)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["./vit", "../vit", "/vit", "~/vit", "my/own/vit", r"my\vit"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(flags, name):
    with pytest.raises(SystemExit, match=r"^error: cannot use .*vit: no such folder; check --model_name"):
        choose_checkpoint(make_work([*flags, "--model_name_or_path", name]))


def broken(folder, name, content):
    shutil.copytree(folder, name)
    for file, text in content.items():
        (name / file).unlink(missing_ok=True)
        if text is not None:
            (name / file).write_bytes(text)
    return name


BROKEN = {
    "no weights": {"model.safetensors": None},
    "half of the weights": {
        "model.safetensors": None,
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
    },
    "cut weights": {"model.safetensors": b"\x10\0\0\0\0\0\0\0{}"},
    "empty weights": {"model.safetensors": b""},
    "garbled config": {"config.json": b"{"},
    "config of another kind": {"config.json": b"[1]"},
    "garbled processor": {"preprocessor_config.json": b"{"},
    "processor without size": {"preprocessor_config.json": b'{"size": 7.5}'},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_checkpoint_is_one_error_line_before_anything_else(tmp_path, flags, tiny_vit, name):
    folder = broken(tiny_vit, tmp_path / "broken", BROKEN[name])
    work = make_work([*flags, "--model_name_or_path", folder])
    with pytest.raises(SystemExit, match=r"^error: cannot use .*/broken: .+; check --model_name") as stopped:
        choose_checkpoint(work)
    assert "\n" not in str(stopped.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
INDEX = b'{"weight_map": {"a": "model-1.safetensors"}}'
ADAPTER = b'{"peft_type": "LORA", "base_model_name_or_path": "google/vit"}'
OTHER = {  # what it is: the files that make a checkpoint of it, what is said of it
    "a pointer": ({"model.safetensors": POINTER}, "model.safetensors is a pointer of Git LFS.*lfs pull$"),
    "a pointed part": (
        {"model.safetensors": None, "model.safetensors.index.json": INDEX, "model-1.safetensors": POINTER},
        "its model-1.safetensors is a pointer of Git LFS",
    ),
    "an adapter": ({"config.json": None, "adapter_config.json": ADAPTER}, "is a PEFT adapter of google/vit"),
    "an adapter with a config": (
        {"model.safetensors": None, "adapter_config.json": ADAPTER}, "is a PEFT adapter of google/vit, not"
    ),
    "a pickle": (
        {"model.safetensors": None, "pytorch_model.bin": b"x"}, "a pickle, which can run code; .*python -c"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_checkpoint_is_named_as_what_it_is(tmp_path, flags, tiny_vit, kind):
    files, message = OTHER[kind]
    folder = broken(tiny_vit, tmp_path / "other", files)
    with pytest.raises(SystemExit, match=f"^error: cannot use .*/other: .*{message}") as stopped:
        choose_checkpoint(make_work([*flags, "--model_name_or_path", folder]))
    assert "\n" not in str(stopped.value) and "check --model_name" not in str(stopped.value)


def test_the_command_for_a_pickle_converts_it(tmp_path, flags, tiny_vit, monkeypatch):
    """The line's own code is run, and what it makes can be used."""
    monkeypatch.chdir(tmp_path)
    folder = broken(tiny_vit, tmp_path / "old", {})
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        choose_checkpoint(make_work([*flags, "--model_name_or_path", folder]))
    exec(re.search('convert it and use old-safetensors: python -c "(.*)"$', str(stopped.value))[1])
    made = make_work([*flags, "--model_name_or_path", "old-safetensors"])
    assert choose_checkpoint(made) == "old-safetensors"
    before, after = (load_file(path / "model.safetensors") for path in (tiny_vit, Path("old-safetensors")))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    names = tiny_vit, "old-safetensors"
    before, after = (AutoImageProcessor.from_pretrained(name).to_dict() for name in names)
    assert before == after


def test_a_finished_model_without_its_processor_is_damaged(tmp_path, flags, tiny_vit):
    """The defaults of its type may not be what it was trained with."""
    folder = broken(tiny_vit, tmp_path / "model", {"preprocessor_config.json": None})
    config = json.loads((folder / "config.json").read_text()) | {"calibration_temperature": 1.5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match="preprocessor_config.json is gone; delete its model.safetensors"):
        choose_checkpoint(make_work([*flags, "--output_dir", folder]))


@pytest.mark.parametrize("name", [*BROKEN, "no state"])
def test_a_damaged_finished_model_is_named_with_the_way_out(tmp_path, flags, tiny_vit, name):
    shutil.copytree(tiny_vit, tmp_path / "model")
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    change = BROKEN.get(name, {"trainer_state.json": None})
    folder = broken(tmp_path / "model", tmp_path / "other", change)
    work = make_work([*flags, "--output_dir", folder])
    if "model.safetensors" in change and change["model.safetensors"] is None:
        assert choose_checkpoint(work) == str(tiny_vit)  # it was not finished
    else:
        with pytest.raises(SystemExit, match="; delete its model.safetensors to make it again from the last"):
            choose_checkpoint(work)


def test_a_missing_network_is_one_line_that_says_so(flags):
    work = make_work([*flags, "--model_name_or_path", "someone/vit-that-is-not-here"])
    message = "cannot use someone/vit.*; check --model_name_or_path and the network"
    with pytest.raises(SystemExit, match=message):
        choose_checkpoint(work)


@pytest.mark.parametrize("content", ["{", "", "null", '{"settings": {}}'])
def test_garbled_settings_are_one_line(tmp_path, begun, content):
    (tmp_path / "model" / "settings.json").write_text(content)
    with pytest.raises(SystemExit, match="settings.json is damaged; choose another --output_dir"):
        open_workspace(*read_settings(begun))


def test_results_of_another_version_of_the_script_are_pointed_out(tmp_path, begun, caplog):
    path = tmp_path / "model" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"script_sha256": "0" * 64}))
    open_workspace(*read_settings(begun))
    assert "was begun by another version of this script" in caplog.text


def test_one_folder_has_one_run_at_a_time(tmp_path):
    lock = claim(tmp_path / "model")
    assert claim(tmp_path / "model") is lock  # the same cell, run again
    code = "import sys, pathlib, steps.console; steps.console.start_logging(); import steps.workspace"
    code += "; steps.workspace.claim(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1 and other.stderr.startswith("error: another run is at work in")
    lock.release(force=True)
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="cannot write into .*/notes/model: .*; choose another --output_dir"):
        claim(tmp_path / "notes" / "model")


@pytest.mark.parametrize("colab", [False, True])
def test_drive_is_for_colab_only(tmp_path, flags, monkeypatch, colab):
    if colab:
        (tmp_path / "packages" / "google" / "colab").mkdir(parents=True)
        (tmp_path / "packages" / "google" / "colab" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "drive")
    home = tmp_path / "drive" / "MyDrive" / "finetune_vit"
    on_drive, elsewhere = str(tmp_path / "drive" / "x"), str(tmp_path / "x")
    for asked, given in (("model", str(home / "model")), (on_drive, on_drive), (elsewhere, elsewhere)):
        settings, training = read_settings([*flags, "--output_dir", asked])
        archives = keep_on_drive(settings, training, tmp_path / "drive")
        assert archives == (home if colab and asked != elsewhere else Path("data"))
        assert training.output_dir == (given if colab else asked)
