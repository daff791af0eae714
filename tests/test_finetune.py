"""Step 7: training learns, says how it goes, and ends with the best epoch."""

import copy
import io
import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same_weights, uncalibrated, weights
from sklearn.linear_model import RidgeClassifierCV
from transformers import (
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from steps.finetune import chosen_epoch, fit_head, layerwise_optimizer, weighted_loss
from steps.scores import fit_temperature
from steps.settings import for_trainer, images_per_step

FIRST_IS_BEST = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # the loss only falls


def epoch_lines(text):
    return [line for line in text.splitlines() if line.startswith("epoch ")]


def test_training_learns_and_leaves_a_whole_model(tmp_path, start, capsys):
    trainer = start("model").fine_tune()
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "trainer_state.json"} <= names
    results = {
        name: json.loads((tmp_path / "model" / f"{name}_results.json").read_text())
        for name in ("all", "train")
    }
    assert results["train"]["train_loss"] > 0 and results["all"] == results["train"]
    assert not [name for name in names if name.startswith(".part") or name.endswith(".bin")]
    assert len([name for name in names if name.startswith("checkpoint-")]) <= 2
    history = trainer.state.log_history
    assert [entry["train_images"] for entry in history if "train_images" in entry] == [42] * 4
    assert max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry) >= 0.8
    lines = epoch_lines(capsys.readouterr().out)
    assert len(lines) == 4 and lines[0].startswith("epoch 1 of 4: training loss ") and "macro F1" in lines[3]


def test_without_validation_the_last_epoch_counts(tmp_path, start, capsys):
    flags = "--eval_strategy no --load_best_model_at_end false --num_train_epochs 2".split()
    start("model", *flags).fine_tune()
    last, saved = weights(tmp_path / "model" / "checkpoint-6"), uncalibrated(tmp_path / "model")
    assert all(torch.allclose(saved[name], last[name], rtol=1e-6) for name in saved)
    lines = epoch_lines(capsys.readouterr().out)
    assert len(lines) == 2 and "validation" not in lines[0]


def test_the_best_epoch_is_restored(tmp_path, start):
    # the highest loss is the first epoch's: so the best epoch is not the last, which is there anyway
    trainer = start("model", *FIRST_IS_BEST).fine_tune()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    last, best = (weights(tmp_path / "model" / name) for name in ("checkpoint-12", "checkpoint-3"))
    saved, whole = uncalibrated(tmp_path / "model"), weights(tmp_path / "model")
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(saved[name], best[name], rtol=1e-6) and torch.equal(value.cpu(), whole[name])
        assert not torch.equal(best[name], last[name])


@pytest.mark.parametrize(
    "flags, epoch, epochs",
    [
        (FIRST_IS_BEST, 1, 4),
        (["--metric_for_best_model", "loss", "--num_train_epochs", "3"], 3, 3),  # the lowest loss
        ([*FIRST_IS_BEST, "--load_best_model_at_end", "false"], 4, 4),
        (["--load_best_model_at_end", "false", "--linear_probe", "false", "--eval_strategy", "no"], 4, 4),
    ],
)
def test_the_log_names_the_epoch_that_was_taken(tmp_path, start, caplog, flags, epoch, epochs):
    caplog.set_level("INFO", "finetune_vit")
    trainer = start("model", *flags).fine_tune()
    assert re.findall("kept the weights of (.*)", caplog.text) == [f"epoch {epoch} of {epochs}"]
    assert chosen_epoch(trainer.args, trainer.state) == epoch
    taken, saved = weights(tmp_path / "model" / f"checkpoint-{3 * epoch}"), uncalibrated(tmp_path / "model")
    assert all(torch.allclose(saved[name], taken[name], rtol=1e-6) for name in saved)


def test_the_chosen_epoch_of_a_log_that_was_read_again():
    """Entries without a step are our own: the linear probe's and each epoch's speed."""
    history = [{"ridge_strength": 1.0}]
    for epoch in (1.0, 2.0, 3.0):
        history.append({"epoch": epoch, "train_images": 42, "train_seconds": 1.0})
        history += [{"epoch": epoch, "step": 3 * int(epoch), name: 0.5} for name in ("loss", "eval_loss")]
    state = TrainerState(epoch=3.0, global_step=9, best_global_step=6, log_history=history)
    assert chosen_epoch(SimpleNamespace(load_best_model_at_end=True), state) == 2
    assert chosen_epoch(SimpleNamespace(load_best_model_at_end=False), state) == 3


def log_loss(logits, labels):
    return torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()


def test_the_head_is_calibrated_on_the_validation_images(tmp_path, start):
    trainer = start("model", *FIRST_IS_BEST, "--learning_rate", "1e-3").fine_tune()  # too unsure by far
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


def test_rates_fall_layer_by_layer_and_no_weight_is_forgotten(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    args = TrainingArguments(str(tmp_path), learning_rate=1.0, weight_decay=0.1, report_to="none")
    kind, options = layerwise_optimizer(model, args, 0.5)
    groups = options["params"]
    assert kind is torch.optim.AdamW and layerwise_optimizer(model, args, 1.0) is None
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d)\.", name)
        below_the_head = 3 - int(number[1]) if number else 4 if "embeddings" in name else 0
        assert of[id(parameter)]["lr"] == 0.5**below_the_head, name
        plain = "norm" in name or name.endswith("bias")
        assert of[id(parameter)]["weight_decay"] == (0 if plain else 0.1), name


def test_layer_decay_holds_through_the_schedule(start):
    cosine = ["--lr_scheduler_type", "cosine", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    trainer = start("model", "--layer_decay", "0.5", *cosine).build()
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
    run = start("model", "--linear_probe", "--augment", augment)
    trainer = run.build()
    if classes == 2:
        data = trainer.train_dataset
        trainer.train_dataset = data.select(np.flatnonzero(np.array(data["label"]) < 2))
        trainer.model.classifier, trainer.model.config.num_labels = torch.nn.Linear(16, 2), 2
    fit_head(trainer, run.settings.augment)
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


class Keep:
    """As a hook on a Trainer, copies its model's weights before they are trained."""

    def __call__(self, trainer):
        self.weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_frozen_backbone_stays_as_it_is_and_the_head_learns(start):
    before = Keep()
    trainer = start("model", "--freeze_backbone", "--layer_decay", "0.5", hook=before).fine_tune()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before.weights[name]) is not name.startswith("classifier."), name


def test_class_weights_count_classes_alike_and_batches_by_their_images(start):
    trainer = start("model", "--class_weights").build()
    images = trainer.train_dataset.select([0, 1, 2, 3, 14, 15, 28])  # 4, 2 and 1 of the classes
    assert np.bincount(images["label"]).tolist() == [4, 2, 1]
    loss, logits = weighted_loss(images, trainer.args), torch.randn(7, 3)
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
        (["--min_steps", "12"], 8),  # 42 images, 4 epochs: 14 per step would do
        (["--min_steps", "999"], 1),
        (["--min_steps", "30", *QUARTERS], 4),
        (["--min_steps", "999", *QUARTERS], 1),
        (["--min_steps", "999", "--max_steps", "3"], 16),
    ],
)
def test_few_images_make_more_steps_at_the_same_cost_and_rate(start, flags, images):
    run = start("model", *flags)
    trainer, training = run.build(), run.training
    assert len(trainer.train_dataset) == 42 and images_per_step(trainer.args) == images
    assert images_per_step(training) in (16, 64)  # as given: cross-validation starts from these again
    assert trainer.args.learning_rate == training.learning_rate == 5e-3
    assert trainer.args.per_device_train_batch_size <= training.per_device_train_batch_size


@pytest.mark.parametrize("flags", [[], ["--min_steps", "30", *QUARTERS]])
def test_the_arguments_that_were_given_stay_as_they_were(start, flags):
    run = start("model", "--num_train_epochs", "1", "--save_total_limit", "2", *flags)
    given, before, values = run.training, copy.deepcopy(vars(run.training)), run.training.to_dict()
    changed = for_trainer(given, 42, run.settings)
    assert changed is not given and (changed.save_total_limit, changed.disable_tqdm) == (None, True)
    assert given.to_dict() == values and vars(given).keys() == before.keys()
    assert (given.save_total_limit, given.disable_tqdm) == (2, False)
    run.fine_tune()
    assert given.to_dict() == values
    assert given.per_device_train_batch_size == before["per_device_train_batch_size"]


def test_more_steps_see_each_image_once_per_epoch(start):
    trainer = start("model", "--min_steps", "80", "--num_train_epochs", "2").fine_tune()
    assert trainer.state.global_step == 84
    epochs = [entry for entry in trainer.state.log_history if "train_images" in entry]
    assert [entry["train_images"] for entry in epochs] == [42, 42]


def test_class_weights_train_the_same_in_halves(tmp_path, start):
    same = ["--class_weights", "--num_train_epochs", "1", "--max_grad_norm", "0", "--optim", "sgd"]
    same += ["--augment", ""]  # halves would draw other turns
    start("one", *same, "--per_device_train_batch_size", "14").fine_tune()
    halves = ["--per_device_train_batch_size", "7", "--gradient_accumulation_steps", "2"]
    start("halves", *same, *halves).fine_tune()
    one, other = uncalibrated(tmp_path / "one"), uncalibrated(tmp_path / "halves")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_zero_epochs_save_the_model_as_it_is(tmp_path, start, monkeypatch):
    before = Keep()

    def hook(trainer):
        before(trainer)
        monkeypatch.setattr(trainer, "train", None)

    start("model", "--num_train_epochs", "0", "--linear_probe", "false", hook=hook).fine_tune()
    saved = weights(tmp_path / "model")
    assert all(torch.equal(saved[name], value) for name, value in before.weights.items())
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["log_history"] == []


def test_zero_epochs_with_a_linear_probe_fit_and_calibrate_a_new_head_alone(tmp_path, start):
    before, flags = Keep(), ["--recipe", "fast", "--num_train_epochs", "0"]
    trainer = start("probe", *flags, hook=before).fine_tune()
    saved = weights(tmp_path / "probe")
    changed = {name for name, value in saved.items() if not torch.equal(value, before.weights[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    state = json.loads((tmp_path / "probe" / "trainer_state.json").read_text())
    assert [*state["log_history"][0]] == ["ridge_strength"] and len(state["log_history"]) == 1
    outputs = trainer.predict(trainer.eval_dataset)
    assert (outputs.predictions.argmax(1) == outputs.label_ids).mean() > 0.6
    assert fit_temperature(outputs.predictions, outputs.label_ids) == pytest.approx(1, abs=1e-3)
    again = start("again", *flags, checkpoint=tmp_path / "probe").fine_tune()
    # a model that knows the classes is only evaluated
    assert same_weights(tmp_path / "probe", tmp_path / "again") and not again.state.log_history


@pytest.mark.parametrize("logging", ["epoch", "no"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, start, logging):
    flags = f"--learning_rate 1e6 --max_grad_norm 0 --warmup_steps 0 --logging_strategy {logging}".split()
    with pytest.raises(SystemExit, match="the loss is (nan|inf) at step .*; lower --learning_rate"):
        start("model", *flags).fine_tune()
    assert not (tmp_path / "model" / "model.safetensors").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Slow(TrainerCallback):
    """Gives the bar, which is drawn ten times per second at most, time to be seen."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.11)


@pytest.fixture
def written_to(start, capsys, monkeypatch):
    """Return a function that trains 2 epochs of 3 steps and gives what standard error and output got."""

    def train(stream, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            run = start("model", "--num_train_epochs", "2", *flags, hook=lambda t: t.add_callback(Slow()))
            run.fine_tune()
        return stream.getvalue(), capsys.readouterr().out

    return train


def test_a_terminal_shows_bars_with_the_time_left_and_keeps_a_line_per_epoch(written_to):
    err, out = written_to(Terminal())
    assert re.search(r"\rtrain: +\d+%\|.*\| [1-6]/6 \[\d\d:\d\d<\d\d:\d\d, .*steps", err)  # passed < left
    assert re.search(r"\revaluate: +\d+%\|.*\| \d/1 ", err)
    assert err.endswith("\r")  # the last bar is wiped: nothing of it stays
    assert len(epoch_lines(out)) == 2 and "\r" not in out and "train:" not in out


QUIET = ["--disable_tqdm", "true"]


@pytest.mark.parametrize("stream, flags", [(io.StringIO, []), (Terminal, QUIET), (io.StringIO, QUIET)])
def test_a_file_has_no_bars_and_neither_has_disable_tqdm(written_to, stream, flags):
    err, out = written_to(stream(), "--linear_probe", "false", *flags)
    assert err == ""
    lines = epoch_lines(out)
    assert len(lines) == 2 and lines[1].startswith("epoch 2 of 2: training loss ") and "images/s" in lines[1]
