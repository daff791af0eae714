"""What only a GPU can show: `pytest tests/test_gpu.py`. Everywhere else these tests are skipped."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SAMPLE, run_script
from draw_sample import save_processor
from transformers import ViTConfig, ViTForImageClassification, pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return [*SAMPLE, "--data_root", tmp_path_factory.mktemp("data"), "--report_to", "none"]


def finish(flags):
    done = run_script(*flags, launcher=())
    assert done.returncode == 0, done.stderr
    return done


def results(folder):
    """The files of the test images, their predictions, and the probabilities (n, classes)."""
    table = pd.read_csv(folder / "report" / "predictions.csv")
    table = table[table["split"] == "test"]
    return table["file"].tolist(), table["prediction"].tolist(), table.iloc[:, 4:].to_numpy()


@pytest.mark.parametrize(
    ("precision", "chosen", "tolerance"),
    [("bf16", [], 0.05), ("fp16", ["--bf16", "false", "--fp16", "true"], 0.01),
     ("fp32", ["--bf16", "false"], 0.01)],
)  # fmt: skip
def test_every_precision_learns_and_agrees_with_the_pipeline(tmp_path, flags, precision, chosen, tolerance):
    """The pipeline computes in float32."""
    done = finish([*flags, "--output_dir", tmp_path / "model", *chosen])
    assert f"training on cuda:0 in {precision}" in done.stdout
    metrics = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    assert torch.cuda.get_device_name() in metrics["versions"]["device"]
    assert 1e7 < metrics["speed"]["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    assert metrics["test"]["accuracy"]["value"] > 0.7  # 0.85 on a CPU; chance has 0.125

    files, predictions, ours = results(tmp_path / "model")
    images = [str(flags[flags.index("--data_root") + 1] / "sample" / "sample" / file) for file in files]
    classify = pipeline("image-classification", str(tmp_path / "model"), device=0, top_k=8)
    rows = [{row["label"]: row["score"] for row in rows} for rows in classify(images)]
    theirs = np.array([[row[name] for name in metrics["per_class"]] for row in rows])
    print(f"{precision}: largest difference from the pipeline {np.abs(ours - theirs).max():.5f}")
    assert np.abs(ours - theirs).max() < tolerance
    sure = np.sort(theirs)[:, -1] - np.sort(theirs)[:, -2] > 2 * tolerance
    best = np.array(list(metrics["per_class"]))[theirs.argmax(1)]
    assert (best == predictions)[sure].all() and sure.mean() > 0.8


def test_a_killed_run_ends_as_a_whole_one(tmp_path, flags):
    flags = [*flags, "--full_determinism", "true", "--num_train_epochs", "10"]
    finish([*flags, "--output_dir", tmp_path / "whole"])
    command = [sys.executable, "finetune_vit.py", *flags, "--output_dir", tmp_path / "killed"]
    process = subprocess.Popen(map(str, command), cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("killed/checkpoint-*/files.json"))) < 1 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = finish([*flags, "--output_dir", tmp_path / "killed"])
    assert re.search("training on cuda:0 .* from .*checkpoint-", done.stdout)
    (files, predictions, one), other = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert (files, predictions) == other[:2]
    print(f"largest difference from the run that was not killed {np.abs(one - other[2]).max():.2g}")
    assert np.array_equal(one, other[2])


@pytest.mark.parametrize(
    ("left", "advice"),
    [
        (5 * 10**9, "--per_device_train_batch_size 64 --gradient_accumulation_steps 2 need half of it"),
        (7 * 10**8, "nvidia-smi shows what else uses the GPU"),  # not enough for the model itself
    ],
)
def test_too_little_memory_is_one_line(tmp_path, flags, left, advice):
    """Another program, this one, holds all but `left` bytes; a ViT-B in batches of 128 needs about 12e9."""
    ViTForImageClassification(ViTConfig()).save_pretrained(tmp_path / "vit")
    save_processor(tmp_path / "vit", 224)
    taken = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
    batch = ["--per_device_train_batch_size", "128", "--min_steps", "0", "--linear_probe", "false"]
    flags = [*flags, "--model_name_or_path", tmp_path / "vit", "--output_dir", tmp_path / "model"]
    done = run_script(*flags, *batch, launcher=())
    del taken
    torch.cuda.empty_cache()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: CUDA out of memory") and advice in last


def test_predict_says_the_same_on_the_gpu_and_on_the_cpu(tmp_path, flags):
    model, folder = tmp_path / "model", flags[flags.index("--data_root") + 1] / "sample" / "sample"
    finish([*flags, "--output_dir", model, "--num_train_epochs", "2"])
    tables = []
    for more in ([], ["--use_cpu", "true", "--bf16", "false"]):
        done = run_script("--output_dir", model, "--predict", folder, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        tables.append(pd.read_csv(tmp_path / "predictions.csv").dropna(subset="prediction"))
        (tmp_path / "predictions.csv").unlink()
    one, other = (table.iloc[:, 2:-1].to_numpy() for table in tables)
    print(f"largest difference between GPU and CPU {np.abs(one - other).max():.5f}")
    assert len(one) > 400 and np.abs(one - other).max() < 0.05
