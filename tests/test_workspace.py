"""Step 1: one folder, one run; the checkpoint is looked at before anything long starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from draw_sample import save_processor

from finetune_vit import choose_checkpoint, claim, keep_on_drive, open_workspace, read_settings


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


@pytest.fixture
def begun(tmp_path, flags):
    """The flags of a run that has a result."""
    output_dir = open_workspace(*read_settings(flags))
    (output_dir / "report").mkdir()
    (output_dir / "report" / "split.csv").touch()
    return flags


@pytest.mark.parametrize(
    "change, named",
    [
        (["--learning_rate", "1e-4"], "learning_rate was 2e-05, is 0.0001"),
        (["--seed", "1"], "seed was 42, is 1"),
        (["--test_size", "0.2"], "test_size was 0.15, is 0.2"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--num_train_epochs", "6"], "num_train_epochs was 4.0, is 6.0"),
        (["--augment", "flip"], "augment was flip,turn, is flip"),
        (["--per_device_train_batch_size", "32", "--learning_rate", "2e-5"], "images_a_step was 8, is 32"),
    ],
)
def test_other_settings_are_refused_by_name(begun, change, named):
    with pytest.raises(SystemExit, match=named):
        open_workspace(*read_settings([*begun, *change]))


def test_settings_may_be_mended_until_there_is_a_result(tmp_path, flags):
    for seed in ("1", "2"):
        open_workspace(*read_settings([*flags, "--seed", seed]))
    assert json.loads((tmp_path / "model" / "settings.json").read_text())["training"]["seed"] == 2


@pytest.mark.parametrize(
    "change",
    [
        ["--evaluate_train"], ["--data_root", "elsewhere"], ["--bf16", "false"], ["--save_total_limit", "5"],
        ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
        ["--per_device_eval_batch_size", "8"], ["--disable_tqdm", "true"], ["--hub_model_id", "me/model"],
    ],
)  # fmt: skip
def test_what_does_not_decide_the_result_may_change(tmp_path, begun, change):
    assert open_workspace(*read_settings([*begun, *change])) == tmp_path / "model"


def test_a_model_of_someone_else_is_not_touched(tmp_path, flags):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(SystemExit, match="model.safetensors, but no settings.json"):
        open_workspace(*read_settings(flags))
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.safetensors"]


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


def test_finished_model_is_preferred(tmp_path, flags, tiny_vit):
    settings, training = read_settings(flags)
    output_dir = open_workspace(settings, training)
    assert choose_checkpoint(settings, output_dir) == str(tiny_vit)
    shutil.copytree(tiny_vit, output_dir, dirs_exist_ok=True)
    (output_dir / "trainer_state.json").write_text("{}")
    assert choose_checkpoint(settings, output_dir) == str(output_dir)


@pytest.mark.parametrize(
    "config, size, message",
    [
        ({"model_type": "resnet"}, 32, "is a resnet, not a ViT"),
        ({"model_type": "deit"}, 32, "is a deit, not a ViT"),
        ({"model_type": "vit", "image_size": 64}, 32, "for a 64-pixel ViT"),
        ({"model_type": "no_such_thing"}, 32, "cannot use"),
        ({}, 32, "cannot use"),
        (None, None, "cannot use"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_error_line(tmp_path, flags, config, size, message):
    checkpoint = tmp_path / "checkpoint"
    if config is not None:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(json.dumps(config))
        save_processor(checkpoint, size)
    settings, _ = read_settings([*flags, "--model_name_or_path", str(checkpoint)])
    with pytest.raises(SystemExit, match=message) as stopped:
        choose_checkpoint(settings, tmp_path / "model")
    assert "\n" not in str(stopped.value)


def broken(folder, name, content):
    shutil.copytree(folder, name)
    for file, text in content.items():
        (name / file).unlink(missing_ok=True)
        if text is not None:
            (name / file).write_bytes(text)
    return name


BROKEN = {
    "no weights": {"model.safetensors": None},
    "a pickle": {"model.safetensors": None, "pytorch_model.bin": b"x"},
    "cut weights": {"model.safetensors": b"\x10\0\0\0\0\0\0\0{}"},
    "empty weights": {"model.safetensors": b""},
    "garbled config": {"config.json": b"{"},
    "config of another kind": {"config.json": b"[1]"},
    "no processor": {"preprocessor_config.json": None},
    "garbled processor": {"preprocessor_config.json": b"{"},
    "processor without size": {"preprocessor_config.json": b'{"size": 7.5}'},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_checkpoint_is_one_error_line_before_anything_else(tmp_path, flags, tiny_vit, name):
    folder = broken(tiny_vit, tmp_path / "broken", BROKEN[name])
    settings, _ = read_settings([*flags, "--model_name_or_path", str(folder)])
    with pytest.raises(SystemExit, match=r"^error: cannot use .*/broken: .+; check --model_name") as stopped:
        choose_checkpoint(settings, tmp_path / "model")
    assert "\n" not in str(stopped.value)
    if name == "a pickle":
        assert "a pickle can run code" in str(stopped.value)


@pytest.mark.parametrize("name", [*BROKEN, "no state"])
def test_a_damaged_finished_model_is_named_with_the_way_out(tmp_path, flags, tiny_vit, name):
    shutil.copytree(tiny_vit, tmp_path / "model")
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    change = BROKEN.get(name, {"trainer_state.json": None})
    folder = broken(tmp_path / "model", tmp_path / "other", change)
    settings, _ = read_settings(flags)
    if "model.safetensors" in change and change["model.safetensors"] is None:
        assert choose_checkpoint(settings, folder) == str(tiny_vit)  # it was not finished
    else:
        with pytest.raises(SystemExit, match="; delete its model.safetensors to make it again from the last"):
            choose_checkpoint(settings, folder)


def test_a_missing_network_is_one_line_that_says_so(tmp_path, flags, monkeypatch):
    settings, _ = read_settings([*flags, "--model_name_or_path", "someone/vit-that-is-not-here"])
    with pytest.raises(
        SystemExit, match="cannot use someone/vit.*; check --model_name_or_path and the network"
    ):
        choose_checkpoint(settings, tmp_path / "model")


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
    code = "import sys, pathlib, finetune_vit; finetune_vit.claim(pathlib.Path(sys.argv[1]))"
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
