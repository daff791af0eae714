"""Step 7: training learns, goes on where it stopped, and ends with the best epoch."""

import json

import pytest
import torch
from transformers import TrainerCallback, ViTForImageClassification, ViTImageProcessor

import finetune_vit
from finetune_vit import (
    build_trainer,
    fine_tune,
    keep_readable,
    load_images,
    load_model,
    prepare_pixels,
    read_settings,
    split_images,
)


@pytest.fixture
def start(tmp_path, make_images, tiny_vit):
    """Return a function that gives a trainer, ready to train into a folder, and its settings."""
    folder, cache = make_images(count=20), tmp_path / "cache"
    processor = ViTImageProcessor.from_pretrained(tiny_vit)
    images = keep_readable(prepare_pixels(load_images(folder, cache), folder, processor, cache))

    def build(name, *flags):
        settings, training = read_settings([
            "--data_dir", str(folder), "--output_dir", str(tmp_path / name), "--learning_rate", "5e-3",
            "--num_train_epochs", "4", "--bf16", "false", "--report_to", "none", *flags,
        ])  # fmt: skip
        splits = split_images(images, settings, training.seed, tmp_path / name / "split.csv")
        model = load_model(str(tiny_vit), ["blue", "green", "red"], processor, training.seed)
        return build_trainer(model, splits, processor, training), training

    return build


def weights(folder):
    return ViTForImageClassification.from_pretrained(folder).state_dict()


def test_training_learns_and_leaves_a_whole_model(tmp_path, start, capsys):
    trainer, training = start("model")
    fine_tune(trainer, training)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "trainer_state.json"} <= names
    assert {"all_results.json", "train_results.json"} <= names
    assert not [name for name in names if name.startswith(".part") or name.endswith(".bin")]
    assert len([name for name in names if name.startswith("checkpoint-")]) <= 2
    history = trainer.state.log_history
    assert [entry["train_images"] for entry in history if "train_images" in entry] == [42] * 4
    assert max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry) >= 0.8
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 4 and lines[0].startswith("epoch 1 of 4: training loss ") and "macro F1" in lines[3]


def test_without_validation_the_last_epoch_counts(tmp_path, start, capsys):
    flags = "--eval_strategy no --load_best_model_at_end false --num_train_epochs 2".split()
    trainer, training = start("model", *flags)
    fine_tune(trainer, training)
    last, saved = weights(tmp_path / "model" / "checkpoint-6"), weights(tmp_path / "model")
    assert all(torch.equal(saved[name], last[name]) for name in saved)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and "validation" not in lines[0]


def test_the_best_epoch_is_restored(tmp_path, start):
    # the highest loss is the first epoch's: so the best epoch is not the last, which is there anyway
    trainer, training = start("model", "--metric_for_best_model", "loss", "--greater_is_better", "true")
    fine_tune(trainer, training)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    folders = ("checkpoint-12", "checkpoint-3", ".")
    last, best, saved = (weights(tmp_path / "model" / name) for name in folders)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved[name], best[name]) and torch.equal(value.cpu(), best[name])
        assert not torch.equal(best[name], last[name])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


class StopAt(TrainerCallback):
    """Stands for a disconnect in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(tmp_path, start, caplog):
    fine_tune(*start("whole"))
    trainer, training = start("cut")
    trainer.add_callback(StopAt(8))  # 3 steps an epoch
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, training)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with caplog.at_level("INFO", "finetune_vit"):
        trainer, training = start("cut")
        fine_tune(trainer, training)
    assert "checkpoint-6" in caplog.text
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    speeds = [entry for entry in trainer.state.log_history if "train_images" in entry]
    assert len(speeds) == 4


def test_a_finished_model_is_not_trained_again(tmp_path, start, monkeypatch):
    fine_tune(*start("model"))
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    trainer, training = start("model")
    monkeypatch.setattr(trainer, "train", None)
    fine_tune(trainer, training)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4


def test_zero_epochs_save_the_model_as_it_is(tmp_path, start, monkeypatch):
    trainer, training = start("model", "--num_train_epochs", "0")
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer, "train", None)
    fine_tune(trainer, training)
    saved = weights(tmp_path / "model")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["log_history"] == []


@pytest.mark.parametrize("logging", ["epoch", "no"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, start, logging):
    flags = f"--learning_rate 1e30 --max_grad_norm 0 --warmup_steps 0 --logging_strategy {logging}".split()
    trainer, training = start("model", *flags)
    with pytest.raises(SystemExit, match="the loss is (nan|inf) at step .*; lower --learning_rate"):
        fine_tune(trainer, training)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_model_that_could_not_be_saved_whole_is_not_there(tmp_path, start, monkeypatch):
    trainer, training = start("model", "--num_train_epochs", "0")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(finetune_vit.os, "replace", fail)
        fine_tune(trainer, training)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    fine_tune(trainer, training)
    assert len(weights(tmp_path / "model")) == len(trainer.model.state_dict())
