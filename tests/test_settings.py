"""Step 0: the command line, the YAML file, and the mistakes that people make in them."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

import finetune_vit
from finetune_vit import TRAINING, Settings, choose_precision, images_a_step, read_settings


@pytest.fixture
def folder(tmp_path):
    """Flags that are right as they stand, so that a test can add one that is wrong."""
    (tmp_path / "images").mkdir()
    return ["--data_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "model")]


def test_defaults_are_the_tutorials_job():
    settings, training = read_settings([])
    assert settings.data_url == "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip"
    assert settings.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert (settings.test_size, settings.validation_size, settings.split_by) == (
        0.15,
        0.15,
        "near-duplicates",
    )
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (5, 32)
    assert training.output_dir == "model" and training.load_best_model_at_end


def test_yaml_is_read_first_and_flags_win(tmp_path, folder):
    config = tmp_path / "run.yaml"
    text = "learning_rate: 1e-4\nseed: 7\nload_best_model_at_end: false\ndata_root: null\nbf16: false\n"
    config.write_text(text)
    settings, training = read_settings([*folder, "--config", str(config), "--seed", "8"])
    assert training.learning_rate == 1e-4 and training.seed == 8
    assert training.load_best_model_at_end is False and training.bf16 is False
    assert settings.data_root == "data"


def test_any_training_argument_is_a_setting(folder):
    flags = ["--label_smoothing_factor", "0.1", "--report_to", "none", "--fp16", "false"]
    _, training = read_settings([*folder, *flags])
    assert training.label_smoothing_factor == 0.1 and training.report_to == [] and training.fp16 is False


BAD = [
    (["--learning_rat", "1"], "learning_rat.*did you mean --learning_rate"),
    (["--learning_rate", "fast"], "learning_rate.*fast"),
    (["--num_train_epochs", "-1"], "num_train_epochs is -1"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
    (["--num_train_epochs", "nan"], "num_train_epochs is nan"),
    (["--test_size", "nan"], "test_size"),
    (["--learning_rate", "-1"], "learning_rate is -1"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
    (["--seed", "-1"], "seed is -1"),
    (["--dataloader_drop_last"], "dataloader_drop_last would change"),
    (["--prediction_loss_only"], "prediction_loss_only would change"),
    (["--label_names", "foo"], "label_names would change"),
    (["--test_size", "0"], "test_size"),
    (["--test_size", "0.6", "--validation_size", "0.5"], "less than 1"),
    (["--validation_size", "-0.1"], "validation_size"),
    (["--data_dir", "no/such/folder"], "no/such/folder is not a folder"),
    (["--augment", "flip,rotate"], "--augment does not know rotate; give any of flip,turn,crop,colour"),
    (["--split_by", "no.csv"], "no.csv is not a file; give near-duplicates, random"),
    (["--cross_validate", "2"], "cross_validate is 2; give 3 or more"),
    (["--cross_validate", "-5"], "cross_validate is -5"),
    (["--cross_validate", "5", "--split_by", __file__], "cannot make folds from a CSV file"),
    (["--external_dir", "no/such/folder"], "external_dir no/such/folder is not a folder"),
    (["--save_strategy", "sometimes"], "sometimes"),
    (["--save_strategy", "no"], "save"),
    (["--metric_for_best_model", "macro_f2"], "macro_f2; use one of loss, accuracy"),
    (["--resume_from_checkpoint", "no/checkpoint"], "no/checkpoint is not a folder"),
    (["--bf16", "--fp16"], "fp16 and bf16"),
    (["--seed"], "seed.*expected"),
    (["nonsense"], "unknown argument nonsense"),
    (["--config", "no.yaml"], "cannot read --config no.yaml"),
    (["--report_to", "no_such_logger"], "pip install no_such_logger"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_is_one_error_line(folder, flags, message):
    with pytest.raises(SystemExit) as stopped:
        read_settings([*folder, *flags])
    line = str(stopped.value)
    assert re.fullmatch(r"error: .+; .+", line), line
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'.*did you mean learning_rate"),
        ("- seed", "holds no settings"),
        ("seed: [1, 2", "cannot read"),
        ("seed: many", "seed.*many"),
        ("config: other.yaml", "unknown setting 'config'"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_error_line(tmp_path, folder, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message) as stopped:
        read_settings([*folder, "--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(stopped.value)


def test_missing_archive_is_found_at_once():
    with pytest.raises(SystemExit, match="no.zip is not a file"):
        read_settings(["--data_url", "no.zip"])


def test_error_goes_to_standard_error_without_a_traceback():
    done = run_script("--learning_rat", "1")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == "error: unknown argument --learning_rat; did you mean --learning_rate?"


def test_help_explains_our_settings_with_defaults_and_hides_the_rest():
    text = " ".join(run_script("--help").stdout.split())
    for name in [*Settings.__annotations__, *TRAINING]:
        if not name.startswith("ddp_"):
            assert re.search(rf"--{name} .+?\(default: .+?\)", text), name
    assert "--adam_beta1" not in text and "no_load_best" not in text and len(text) < 5000


@pytest.mark.parametrize(
    "device_type, capability, amx, avx512_bf16, expected",
    [
        ("cuda", (7, 5), False, False, "fp16"),  # T4
        ("cuda", (8, 0), False, False, "bf16"),  # A100
        ("cuda", (9, 0), True, True, "bf16"),  # H100
        ("mps", None, False, False, "fp32"),
        ("cpu", None, True, False, "bf16"),
        ("cpu", None, False, True, "bf16"),
        ("cpu", None, False, False, "fp32"),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, device_type, capability, amx, avx512_bf16, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_precision(device_type) == expected


@pytest.mark.parametrize(
    "flags, images, rate",
    [
        ([], 32, 2.83e-5),
        (["--per_device_train_batch_size", "16"], 16, 2e-5),
        (["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8"], 64, 4e-5),
        (["--per_device_train_batch_size", "64", "--learning_rate", "1e-4"], 64, 1e-4),
    ],
)
def test_learning_rate_follows_the_images_a_step(folder, flags, images, rate):
    _, training = read_settings([*folder, *flags])
    assert images_a_step(training) == images
    assert training.learning_rate == rate


def test_import_is_light():
    code = "import sys, finetune_vit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "evaluate", "pandas", "sklearn", "scipy", "matplotlib"}
    assert not heavy & set(done.stdout.split())
    assert "finetune_vit" in done.stdout.split()


def test_import_runs_nothing():
    assert not finetune_vit.RUN and not hasattr(finetune_vit, "settings")
    assert (ROOT / "finetune_vit.py").samefile(finetune_vit.__file__)
