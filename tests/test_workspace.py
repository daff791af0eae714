"""Step 1: one folder, one run; the checkpoint is looked at before anything long starts."""

import json
import shutil

import pytest
from draw_sample import save_processor

from finetune_vit import choose_checkpoint, open_workspace, read_settings


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
    assert record["settings"]["test_size"] == 0.15 and record["training"]["num_train_epochs"] == 5
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
        (["--learning_rate", "1e-4"], "learning_rate was 2.83e-05, is 0.0001"),
        (["--seed", "1"], "seed was 42, is 1"),
        (["--test_size", "0.2"], "test_size was 0.15, is 0.2"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--num_train_epochs", "6"], "num_train_epochs was 5.0, is 6.0"),
        (["--augment", "flip"], "augment was , is flip"),
        (["--per_device_train_batch_size", "8", "--learning_rate", "2.83e-5"], "images_a_step was 32, is 8"),
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
        ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"],
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
