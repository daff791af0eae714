"""Two processes started by torchrun: one download, one report, the results of one process."""

import json
import re

import pandas as pd
import pytest
from conftest import run_script


def run_two(*flags):
    """Run the script in two processes, as `torchrun --nproc_per_node 2 finetune_vit.py ...` does."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return run_script(*flags, launcher=torchrun)


def losses(done):
    lines = re.findall(
        r"^epoch \d+ of \d+: training loss ([\d.]+), validation loss ([\d.]+)", done.stdout, re.M
    )
    return [float(value) for line in lines for value in line]


def test_two_processes_train_as_one_does(tmp_path, archive, tiny_vit):
    """The same 8 images per step, so the same model, but for the last, uneven step of each epoch."""
    flags = [
        "--data_url", archive, "--model_name_or_path", tiny_vit, "--num_train_epochs", "4",
        "--learning_rate", "5e-3", "--report_to", "none", "--augment", "", "--min_steps", "0",
        "--bf16", "false",  # its rounding would be the larger difference
    ]  # fmt: skip
    more = ["--per_device_train_batch_size", "8", "--data_root", tmp_path / "data-1"]
    one = run_script(*flags, *more, "--output_dir", tmp_path / "one")
    flags += ["--per_device_train_batch_size", "4", "--data_root", tmp_path / "data-2"]
    two = run_two(*flags, "--output_dir", tmp_path / "two")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert len(losses(one)) == 8 and losses(two) == pytest.approx(losses(one), rel=0.15)
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=0.05)
    for text in ("unpacking", "36 images", "saved the model", "test accuracy", "model and model card"):
        assert one.stdout.count(text) == two.stdout.count(text) == 1, text
    results = [
        json.loads((tmp_path / name / "report" / "metrics.json").read_text()) for name in ("one", "two")
    ]
    first, second = (result["test"]["accuracy"]["value"] for result in results)
    assert first > 0.6 and second == pytest.approx(first, abs=0.2)
    assert results[1]["settings"]["learning_rate"] == results[0]["settings"]["learning_rate"]
    assert results[1]["versions"]["device"].endswith("2 processes")
    splits = [(tmp_path / name / "report" / "split.csv").read_text() for name in ("one", "two")]
    assert splits[0] == splits[1]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".part")]
    again = run_two(*flags, "--output_dir", tmp_path / "two")
    assert again.returncode == 0 and again.stdout.count("found the finished model") == 1


def test_two_processes_share_folds_and_images_from_elsewhere(tmp_path, make_images, tiny_vit):
    images, elsewhere = make_images(count=12), make_images("elsewhere", count=20)
    flags = [
        "--data_dir", images, "--data_root", tmp_path / "data", "--output_dir", tmp_path / "model",
        "--model_name_or_path", tiny_vit, "--num_train_epochs", "1", "--report_to", "none",
        "--cross_validate", "3", "--external_dir", elsewhere,
    ]  # fmt: skip
    done = run_two(*flags)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    table = pd.read_csv(tmp_path / "model" / "report" / "cross_validation.csv")
    assert len(table) == table["file"].nunique() == 36 and results["cross_validation"]["folds"] == 3
    left_out = results["external"]["near_duplicates_left_out"]  # the first of the blue ones repeat our own
    assert left_out >= 8 and results["external"]["images"] + left_out == 60


def test_a_mistake_is_said_once(tmp_path):
    done = run_two("--data_url", "no.zip", "--output_dir", tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: --data_url no.zip is not a file") == 1
