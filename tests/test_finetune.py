"""Step 7: training learns, goes on where it stopped, and ends with the best epoch."""

import errno
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import RidgeClassifierCV
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import finetune_vit
from finetune_vit import (
    build_trainer,
    fine_tune,
    images_a_step,
    fit_head,
    fit_temperature,
    keep_readable,
    layer_groups,
    load_images,
    load_model,
    prepare_pixels,
    read_settings,
    split_images,
    weighted_loss,
)


@pytest.fixture
def start(tmp_path, make_images, tiny_vit):
    """Return a function that gives a trainer, ready to train into a folder, and its settings."""
    folder, cache = make_images(count=20), tmp_path / "cache"
    processor = ViTImageProcessor.from_pretrained(tiny_vit)
    images = keep_readable(prepare_pixels(load_images(folder), folder, processor, cache))

    def build(name, *flags, checkpoint=tiny_vit):
        settings, training = read_settings([
            "--data_dir", str(folder), "--output_dir", str(tmp_path / name), "--learning_rate", "5e-3",
            "--num_train_epochs", "4", "--bf16", "false", "--report_to", "none",
            "--per_device_train_batch_size", "16", "--min_steps", "0", *flags,
        ])  # fmt: skip
        groups = pd.Series(range(len(images)), images["file"][:])
        splits = split_images(images, groups, settings, training.seed, tmp_path / name / "split.csv")
        model = load_model(str(checkpoint), ["blue", "green", "red"], processor, training.seed)
        return build_trainer(model, splits, processor, settings, training), settings, training

    return build


def weights(folder):
    return ViTForImageClassification.from_pretrained(folder).state_dict()


def uncalibrated(folder):
    """The weights before the head was divided by the temperature."""
    model = ViTForImageClassification.from_pretrained(folder)
    head = [name for name in model.state_dict() if name.startswith("classifier.")]
    assert len(head) == 2
    factor = dict.fromkeys(head, model.config.calibration_temperature)
    return {name: value * factor.get(name, 1.0) for name, value in model.state_dict().items()}


def test_training_learns_and_leaves_a_whole_model(tmp_path, start, capsys):
    trainer, settings, training = start("model")
    fine_tune(trainer, settings, training)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "trainer_state.json"} <= names
    assert "all_results.json" in names
    assert not [name for name in names if name.startswith(".part") or name.endswith(".bin")]
    assert len([name for name in names if name.startswith("checkpoint-")]) <= 2
    history = trainer.state.log_history
    assert [entry["train_images"] for entry in history if "train_images" in entry] == [42] * 4
    assert max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry) >= 0.8
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 4 and lines[0].startswith("epoch 1 of 4: training loss ") and "macro F1" in lines[3]


def test_without_validation_the_last_epoch_counts(tmp_path, start, capsys):
    flags = "--eval_strategy no --load_best_model_at_end false --num_train_epochs 2".split()
    trainer, settings, training = start("model", *flags)
    fine_tune(trainer, settings, training)
    last, saved = weights(tmp_path / "model" / "checkpoint-6"), uncalibrated(tmp_path / "model")
    assert all(torch.allclose(saved[name], last[name], rtol=1e-6) for name in saved)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and "validation" not in lines[0]


def test_the_best_epoch_is_restored(tmp_path, start):
    # the highest loss is the first epoch's: so the best epoch is not the last, which is there anyway
    highest = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    trainer, settings, training = start("model", *highest)
    fine_tune(trainer, settings, training)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    last, best = (weights(tmp_path / "model" / name) for name in ("checkpoint-12", "checkpoint-3"))
    saved, whole = uncalibrated(tmp_path / "model"), weights(tmp_path / "model")
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(saved[name], best[name], rtol=1e-6) and torch.equal(value.cpu(), whole[name])
        assert not torch.equal(best[name], last[name])


@pytest.mark.parametrize(
    "flags, images, halves",
    [
        (
            ["--gradient_accumulation_steps", "2"], 32,
            "--per_device_train_batch_size 8 --gradient_accumulation_steps 4",
        ),
        (["--min_steps", "20"], 8, "--per_device_train_batch_size 4 --gradient_accumulation_steps 4"),
        (["--min_steps", "999"], 1, ""),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line_that_halves_it(start, monkeypatch, flags, images, halves):
    trainer, settings, training = start("model", *flags)

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, "training_step", run_out)
    half = f"{halves} need half of it and train the same"
    line = f"CUDA out of memory; {half if halves else '--gradient_checkpointing true needs less'}"
    with pytest.raises(SystemExit, match=f"error: {line}$"):
        fine_tune(trainer, settings, training)
    advised = start("halves", *flags, *halves.split())[0].args  # it makes the same steps
    assert images_a_step(advised) == images_a_step(trainer.args) == images
    assert advised.per_device_train_batch_size == max(1, trainer.args.per_device_train_batch_size // 2)


def log_loss(logits, labels):
    return torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()


def test_the_head_is_calibrated_on_the_validation_images(tmp_path, start):
    highest = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    trainer, settings, training = start("model", *highest, "--learning_rate", "1e-3")  # too unsure by far
    fine_tune(trainer, settings, training)
    outputs = trainer.predict(trainer.eval_dataset)
    temperature = json.loads((tmp_path / "model" / "config.json").read_text())["calibration_temperature"]
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    after = log_loss(outputs.predictions, outputs.label_ids)
    assert after < before and temperature != pytest.approx(1, abs=0.01)
    assert log_loss(outputs.predictions * temperature, outputs.label_ids) == pytest.approx(before, rel=1e-4)
    # what it was fitted on has nothing left to gain: the temperature of the calibrated logits is 1
    assert fit_temperature(outputs.predictions, outputs.label_ids) == pytest.approx(1, abs=0.01)


def test_temperature_of_logits_that_are_too_sure_by_a_known_factor():
    """Labels drawn from softmax(logits): the same logits times 3 need the temperature 3."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 4))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    for factor in (0.5, 1, 3):
        assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.03)


def test_temperature_without_a_mistake_stays_finite():
    assert 0.05 < fit_temperature(np.eye(3)[[0, 1, 2] * 5] * 4, np.array([0, 1, 2] * 5)) < 1.5


class StopAt(TrainerCallback):
    """Stands for a disconnect in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(tmp_path, start, caplog):
    fine_tune(*start("whole"))
    trainer, settings, training = start("cut")
    trainer.add_callback(StopAt(8))  # 3 steps an epoch
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with caplog.at_level("INFO", "finetune_vit"):
        trainer, settings, training = start("cut")
        fine_tune(trainer, settings, training)
    assert "checkpoint-6" in caplog.text
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    speeds = [entry for entry in trainer.state.log_history if "train_images" in entry]
    assert len(speeds) == 4


def test_rates_fall_layer_by_layer_and_no_weight_is_forgotten(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    args = TrainingArguments(str(tmp_path), learning_rate=1.0, weight_decay=0.1, report_to="none")
    groups = layer_groups(Trainer(model, args), 0.5)
    of = {id(weights): group for group in groups for weights in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, weights in model.named_parameters():
        number = re.search(r"\.(\d)\.", name)
        below_the_head = 3 - int(number[1]) if number else 4 if "embeddings" in name else 0
        assert of[id(weights)]["lr"] == 0.5**below_the_head, name
        plain = "norm" in name or name.endswith("bias")
        assert of[id(weights)]["weight_decay"] == (0 if plain else 0.1), name


def test_layer_decay_holds_through_the_schedule(start):
    cosine = ["--lr_scheduler_type", "cosine", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    trainer, *_ = start("model", "--layer_decay", "0.5", *cosine)
    trainer.create_optimizer_and_scheduler(num_training_steps=12)
    expected = np.array([1e-3, 5e-4, 2.5e-4])  # head, the one layer, embeddings
    for step in range(12):
        rates = sorted({group["lr"] for group in trainer.optimizer.param_groups}, reverse=True)
        assert rates == pytest.approx(expected * (1 + np.cos(np.pi * step / 12)) / 2)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


@pytest.mark.parametrize("augment, axes", [("", None), ("flip", (3,)), ("flip,turn", (2, 3))])
@pytest.mark.parametrize("classes", [2, 3])
def test_linear_probe_is_ridge_regression_on_the_class_tokens(start, classes, augment, axes):
    trainer, settings, _ = start("model", "--linear_probe", "--augment", augment)
    if classes == 2:
        data = trainer.train_dataset
        trainer.train_dataset = data.select(np.flatnonzero(np.array(data["label"]) < 2))
        trainer.model.classifier, trainer.model.config.num_labels = torch.nn.Linear(16, 2), 2
    fit_head(trainer, settings)
    model, tokens = trainer.model.eval(), []
    rows = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    with model.classifier.register_forward_pre_hook(lambda module, args: tokens.append(args[0])):
        for pixels in [rows["pixel_values"], *([rows["pixel_values"].flip(axes)] if axes else [])]:
            with torch.no_grad():
                logits = model(pixel_values=pixels).logits
    tokens, labels = torch.cat(tokens).double().numpy(), np.tile(rows["labels"], len(tokens))
    assert len(labels) == 14 * classes * (2 if axes else 1)  # all images, in each view
    probe = RidgeClassifierCV(np.logspace(0, 4, 9), class_weight="balanced")
    answers = probe.fit(tokens / tokens.std(), labels).decision_function(tokens / tokens.std())
    answers = np.stack([-answers, answers], axis=1) if classes == 2 else answers
    assert logits.numpy() == pytest.approx(answers[-len(logits) :] / 2, abs=1e-3)
    assert (answers.argmax(1) == labels).mean() > 0.8


def test_a_run_with_a_linear_probe_goes_on_to_the_bit_and_fits_it_once(tmp_path, start, caplog):
    flags = ["--linear_probe", "--layer_decay", "0.7", "--augment", "flip,turn"]
    fine_tune(*start("whole", *flags))
    trainer, settings, training = start("cut", *flags)
    trainer.add_callback(StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    caplog.clear()
    with caplog.at_level("INFO", "finetune_vit"):
        fine_tune(*start("cut", *flags))
    assert "checkpoint-6" in caplog.text and "linear probe" not in caplog.text
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_frozen_backbone_stays_as_it_is_and_the_head_learns(tmp_path, start):
    trainer, settings, training = start("model", "--freeze_backbone", "--layer_decay", "0.5")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    fine_tune(trainer, settings, training)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith("classifier."), name


def test_class_weights_count_classes_alike_and_batches_by_their_images(start):
    trainer, *_ = start("model", "--class_weights")
    images = trainer.train_dataset.select([0, 1, 2, 3, 14, 15, 28])  # 4, 2 and 1 of the classes
    assert np.bincount(images["label"]).tolist() == [4, 2, 1]
    loss, logits = weighted_loss(images, 0.0), torch.randn(7, 3)
    labels = torch.tensor(images["label"][:])
    weights = torch.tensor([7 / 12, 7 / 6, 7 / 3])
    expected = torch.nn.functional.cross_entropy(logits, labels, weights, reduction="none")
    assert weights[labels].mean().item() == pytest.approx(1)
    assert loss(SimpleNamespace(logits=logits), labels).item() == pytest.approx(expected.mean().item())
    halves = [loss(SimpleNamespace(logits=logits[rows]), labels[rows], 7) for rows in (slice(3), slice(3, 7))]
    assert sum(halves).item() == pytest.approx(expected.mean().item())


QUARTERS = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]


@pytest.mark.parametrize(
    "flags, images",
    [
        ([], 16),  # start asks for no number of steps
        (["--per_device_train_batch_size", "64"], 64),
        (["--min_steps", "12"], 8),  # 42 images, 4 epochs: 14 a step would do
        (["--min_steps", "999"], 1),
        (["--min_steps", "30", *QUARTERS], 4),
        (["--min_steps", "999", *QUARTERS], 1),
        (["--min_steps", "999", "--max_steps", "3"], 16),
    ],
)
def test_few_images_make_more_steps_at_the_same_cost_and_rate(start, flags, images):
    trainer, _, training = start("model", *flags)
    assert len(trainer.train_dataset) == 42 and images_a_step(trainer.args) == images
    assert images_a_step(training) in (16, 64)  # as given: cross-validation starts from these again
    assert trainer.args.learning_rate == training.learning_rate == 5e-3
    assert trainer.args.per_device_train_batch_size <= training.per_device_train_batch_size


def test_more_steps_see_each_image_once_an_epoch(start):
    trainer, settings, training = start("model", "--min_steps", "80", "--num_train_epochs", "2")
    fine_tune(trainer, settings, training)
    assert trainer.state.global_step == 84
    epochs = [entry for entry in trainer.state.log_history if "train_images" in entry]
    assert [entry["train_images"] for entry in epochs] == [42, 42]


def test_class_weights_train_the_same_in_halves(tmp_path, start):
    same = ["--class_weights", "--num_train_epochs", "1", "--max_grad_norm", "0", "--optim", "sgd"]
    fine_tune(*start("one", *same, "--per_device_train_batch_size", "14"))
    halves = ["--per_device_train_batch_size", "7", "--gradient_accumulation_steps", "2"]
    fine_tune(*start("halves", *same, *halves))
    one, other = uncalibrated(tmp_path / "one"), uncalibrated(tmp_path / "halves")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_a_finished_model_is_not_trained_again(tmp_path, start, monkeypatch):
    fine_tune(*start("model"))
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    trainer, settings, training = start("model")
    monkeypatch.setattr(trainer, "train", None)
    fine_tune(trainer, settings, training)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4


def test_zero_epochs_save_the_model_as_it_is(tmp_path, start, monkeypatch):
    trainer, settings, training = start("model", "--num_train_epochs", "0", "--linear_probe", "false")
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer, "train", None)
    fine_tune(trainer, settings, training)
    saved = weights(tmp_path / "model")
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["log_history"] == []


def test_zero_epochs_with_a_linear_probe_fit_and_calibrate_a_new_head_alone(tmp_path, start):
    trainer, settings, training = start("probe", "--recipe", "fast", "--num_train_epochs", "0")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    fine_tune(trainer, settings, training)
    saved = weights(tmp_path / "probe")
    changed = {name for name, value in saved.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    state = json.loads((tmp_path / "probe" / "trainer_state.json").read_text())
    assert [*state["log_history"][0]] == ["ridge_strength"] and len(state["log_history"]) == 1
    outputs = trainer.predict(trainer.eval_dataset)
    assert (outputs.predictions.argmax(1) == outputs.label_ids).mean() > 0.6
    assert finetune_vit.fit_temperature(outputs.predictions, outputs.label_ids) == pytest.approx(1, abs=1e-3)
    again = start("again", "--recipe", "fast", "--num_train_epochs", "0", checkpoint=tmp_path / "probe")
    fine_tune(*again)  # a model that knows the classes is only evaluated
    assert same_weights(tmp_path / "probe", tmp_path / "again") and not again[0].state.log_history


@pytest.mark.parametrize("logging", ["epoch", "no"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, start, logging):
    flags = f"--learning_rate 1e6 --max_grad_norm 0 --warmup_steps 0 --logging_strategy {logging}".split()
    trainer, settings, training = start("model", *flags)
    with pytest.raises(SystemExit, match="the loss is (nan|inf) at step .*; lower --learning_rate"):
        fine_tune(trainer, settings, training)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_model_that_could_not_be_saved_whole_is_not_there(tmp_path, start, monkeypatch):
    trainer, settings, training = start("model", "--num_train_epochs", "0")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(finetune_vit.os, "replace", fail)
        fine_tune(trainer, settings, training)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    fine_tune(trainer, settings, training)
    assert len(weights(tmp_path / "model")) == len(trainer.model.state_dict())


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def total_losses(folder):
    """Training loss and steps of all epochs together, each entry of the log weighted by its steps."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries, total, done = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry], 0, 0
    for step, loss in entries:
        total, done = total + loss * (step - done), step
    return total, done


class SignalAt(TrainerCallback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, step, kind):
        self.step, self.kind = step, kind

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.kind)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 6])  # 3 steps an epoch
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(tmp_path, start, caplog, kind, step):
    caplog.set_level("INFO", "finetune_vit")
    fine_tune(*start("whole"))
    trainer, settings, training = start("cut")
    trainer.add_callback(SignalAt(step, kind))
    handler = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    assert signal.getsignal(kind) is handler and f"saved checkpoint-{step}" in caplog.text
    assert (tmp_path / "cut" / f"checkpoint-{step}" / "files.json").exists()
    fine_tune(*start("cut"))
    assert f"from {tmp_path}/cut/checkpoint-{step}" in caplog.text  # not one step is repeated
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (total_losses(tmp_path / name) for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, abs=1e-3)  # the log forgets no step


def cut_file(checkpoint):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(checkpoint):
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": (cut_file, "optimizer.pt is missing or damaged"),
    "bit": (flip_a_bit, "model.safetensors is missing or damaged"),
    "zeros": (
        lambda c: (c / "rng_state.pth").write_bytes(bytes(2000)),
        "rng_state.pth is missing or damaged",
    ),
    "missing": (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing or damaged"),
    "unfinished": (lambda c: (c / "files.json").unlink(), "not finished, or not made by this script"),
    "no list": (lambda c: (c / "files.json").write_text("null"), "not finished, or not made by this script"),
    "short list": (lambda c: (c / "files.json").write_text("{}"), "not finished, or not made by this script"),
    "empty list": (lambda c: (c / "files.json").write_text(""), "not finished, or not made by this script"),
    "pickle": (lambda c: (c / "pytorch_model.bin").write_bytes(b"x"), "a pickle, which can run code"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, start, caplog, name):
    damage, reason = DAMAGES[name]
    caplog.set_level("INFO", "finetune_vit")
    fine_tune(*start("whole"))
    trainer, settings, training = start("cut", "--save_total_limit", "3")
    trainer.add_callback(StopAt(11))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    damage(tmp_path / "cut" / "checkpoint-9")
    content = {path.name: path.read_bytes() for path in (tmp_path / "cut" / "checkpoint-9").iterdir()}
    fine_tune(*start("cut", "--save_total_limit", "3"))
    assert "checkpoint-9 cannot be used: " in caplog.text and reason in caplog.text
    assert "now called damaged-checkpoint-9" in caplog.text and "cut/checkpoint-6" in caplog.text
    aside = tmp_path / "cut" / "damaged-checkpoint-9"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_without_the_best_checkpoint_the_run_does_not_end_with_another_one(tmp_path, start, caplog):
    """The Trainer would only warn, and end with the last epoch's weights."""
    flags = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # the first epoch is the best
    fine_tune(*start("whole", *flags))
    trainer, settings, training = start("cut", *flags)
    trainer.add_callback(StopAt(11))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    assert {path.name for path in (tmp_path / "cut").glob("*-*")} == {"checkpoint-3", "checkpoint-9"}
    cut_file(tmp_path / "cut" / "checkpoint-3")
    with caplog.at_level("INFO", "finetune_vit"):
        fine_tune(*start("cut", *flags))
    assert "from the start" in caplog.text
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_moved_run_folder_keeps_its_best_epoch(tmp_path, start):
    flags = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]
    fine_tune(*start("whole", *flags))
    trainer, settings, training = start("before", *flags)
    trainer.add_callback(StopAt(11))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(trainer, settings, training)
    (tmp_path / "before").rename(tmp_path / "after")
    fine_tune(*start("after", *flags))
    assert same_weights(tmp_path / "whole", tmp_path / "after")


def test_a_clock_that_goes_backwards_deletes_no_new_checkpoint(tmp_path, start):
    class BackInTime(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            stamp = 2_000_000_000 - 1000 * state.global_step
            os.utime(tmp_path / "model" / f"checkpoint-{state.global_step}", (stamp, stamp))

    trainer, settings, training = start("model")
    trainer.add_callback(BackInTime())
    fine_tune(trainer, settings, training)
    kept = {path.name for path in (tmp_path / "model").glob("checkpoint-*")}
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert kept == {"checkpoint-12", best} or (best == "checkpoint-12" and kept == {best, "checkpoint-9"})
    assert training.save_total_limit == 2


@pytest.mark.parametrize("steps", ["0", "84"])
def test_a_checkpoint_goes_only_after_a_newer_one_is_listed(tmp_path, start, steps):
    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # saved, not listed yet: a kill now may damage it
            found = {
                int(path.parent.name[11:]) for path in (tmp_path / "model").glob("checkpoint-*/files.json")
            }
            seen.append((state.global_step, found))

    first_is_best, seen = ["--metric_for_best_model", "loss", "--greater_is_better", "true"], []
    trainer, settings, training = start("model", "--min_steps", steps, *first_is_best)
    trainer.add_callback(Look())
    fine_tune(trainer, settings, training)
    assert len(seen) == 4
    assert all(before in found for (before, _), (_, found) in zip(seen, seen[1:], strict=False))
    assert {int(path.name[11:]) for path in (tmp_path / "model").glob("checkpoint-*")} == {
        seen[0][0],
        seen[3][0],
    }
    assert trainer.args.save_total_limit == 2


def test_a_drive_that_fails_while_a_checkpoint_is_written_is_waited_for(tmp_path, start, monkeypatch):
    fine_tune(*start("whole"))
    trainer, settings, training = start("model")
    save, failures, waits = torch.save, iter([1, 0, 1, 1] + [0] * 99), []

    def fail_at_times(*args, **kwargs):
        if next(failures):
            raise OSError(errno.EIO, "Input/output error")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_at_times)
    monkeypatch.setattr(finetune_vit.time, "sleep", waits.append)
    fine_tune(trainer, settings, training)
    assert waits == [1, 1, 2] or waits == [1, 2, 4]
    assert same_weights(tmp_path / "whole", tmp_path / "model")


def test_a_checkpoint_that_was_asked_for_must_be_whole(tmp_path, start):
    fine_tune(*start("whole"))
    asked = tmp_path / "whole" / "checkpoint-12"
    (asked / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SystemExit, match="checkpoint-12: pytorch_model.bin is a pickle.*; leave it out"):
        fine_tune(*start("other", "--resume_from_checkpoint", str(asked)))
    assert asked.exists()


def test_a_disk_without_room_for_checkpoints_is_noticed_before_training(start, monkeypatch):
    trainer, settings, training = start("model")
    monkeypatch.setattr(finetune_vit.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    monkeypatch.setattr(trainer, "train", None)
    with pytest.raises(SystemExit, match="has 0 MB free, but"):
        fine_tune(trainer, settings, training)
