"""Step 7: whatever cuts training off, the same command goes on to the bit, from what is whole."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import same_weights, weights
from transformers import TrainerCallback

import steps.checkpoints
import steps.console
from steps.checkpoints import StopOnSignal
from steps.duplicates import Scenes
from steps.evaluation import predict
from steps.settings import images_per_step
from steps.split import cut_folds
from steps.validation import cross_validate

FIRST_IS_BEST = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # the loss only falls


def last(callback):
    """Return a hook on a Trainer that adds a callback."""
    return lambda trainer: trainer.add_callback(callback)


def first(callback):
    """Return a hook on a Trainer that adds a callback which is called before ours."""
    return lambda trainer: trainer.callback_handler.callbacks.insert(0, callback)


@pytest.mark.parametrize(
    "flags, images, halves",
    [
        (
            ["--gradient_accumulation_steps", "2"], 32,
            "--per_device_train_batch_size 8 --gradient_accumulation_steps 4",
        ),
        (["--min_steps", "20"], 8, "--per_device_train_batch_size 4 --gradient_accumulation_steps 4"),
        (["--min_steps", "999"], 1, ""),
        (
            ["--per_device_train_batch_size", "15"], 15,
            "--per_device_train_batch_size 5 --gradient_accumulation_steps 3",
        ),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line_that_halves_it(start, monkeypatch, flags, images, halves):
    trainers = []

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def hook(trainer):
        trainers.append(trainer)
        monkeypatch.setattr(trainer, "training_step", run_out)

    half = f"{halves} need at most half of it and train the same"
    line = f"CUDA out of memory; {half if halves else '--gradient_checkpointing true needs less'}"
    with pytest.raises(SystemExit, match=f"error: {line}$"):
        start("model", *flags, hook=hook).fine_tune()
    advised, args = start("halves", *flags, *halves.split()).build().args, trainers[0].args
    assert images_per_step(advised) == images_per_step(args) == images  # it makes the same steps
    assert advised.per_device_train_batch_size == (int(halves.split()[1]) if halves else 1)
    assert advised.per_device_train_batch_size <= max(1, args.per_device_train_batch_size // 2)


class StopAt(TrainerCallback):
    """Stands for a disconnect in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(start_in, tmp_path_factory):
    """The folder of a run that nothing cut off."""
    folder = tmp_path_factory.mktemp("whole")
    start_in(folder).fine_tune()
    return folder


@pytest.fixture
def cut(start):
    """Return a function that trains into a folder up to a step, then is disconnected; 3 steps per epoch."""

    def train(name, step, *flags):
        with pytest.raises(KeyboardInterrupt):
            start(name, *flags, hook=last(StopAt(step))).fine_tune()

    return train


def test_an_interrupted_run_ends_with_the_same_weights_to_the_bit(tmp_path, start, whole, cut, caplog):
    cut("cut", 8)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with caplog.at_level("INFO", "finetune_vit"):
        trainer = start("cut").fine_tune()
    assert "checkpoint-6" in caplog.text
    assert same_weights(whole, tmp_path / "cut")
    speeds = [entry for entry in trainer.state.log_history if "train_images" in entry]
    assert len(speeds) == 4


def test_a_fold_that_was_cut_off_before_its_predictions_is_scored_by_its_own_model(tmp_path, start):
    training = start("model", "--num_train_epochs", "0", "--linear_probe", "true", "--cross_validate", "3")
    trainer, splits = training.fine_tune(), training.splits
    files = [file for part in splits.values() for file in part["file"][:]]
    scenes = Scenes(pd.DataFrame(), pd.Series(range(len(files)), files))
    parts = cut_folds(splits, scenes.groups, training.work)[0]
    expected = predict(trainer, parts, ["test"], tmp_path / "expected.csv")
    fold = tmp_path / "model" / "fold-1-of-3"
    fold.mkdir()
    for file in [file for file in (tmp_path / "model").iterdir() if file.is_file()]:
        shutil.copy(file, fold)
    cross_validate(training.names["fine_tune"], splits, scenes, training.work)
    found = pd.read_csv(fold / "predictions.csv").set_index("file")["p_red"]
    assert found.to_dict() == pytest.approx(expected.set_index("file")["p_red"].to_dict(), abs=1e-6)


def test_a_run_with_a_linear_probe_goes_on_to_the_bit_and_fits_it_once(tmp_path, start, cut, caplog):
    flags = ["--linear_probe", "--layer_decay", "0.7", "--augment", "flip,turn"]
    start("whole", *flags).fine_tune()
    cut("cut", 8, *flags)
    caplog.clear()
    run, fitted = start("cut", *flags), []
    run.names["fit_head"] = lambda *args: fitted.append(args)
    with caplog.at_level("INFO", "finetune_vit"):
        run.fine_tune()
    assert "checkpoint-6" in caplog.text and "linear probe" not in caplog.text and not fitted
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_model_is_not_trained_again(tmp_path, start, monkeypatch):
    start("model").fine_tune()
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    trainer = start("model", hook=lambda trainer: monkeypatch.setattr(trainer, "train", None)).fine_tune()
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 4


def test_a_model_that_could_not_be_saved_whole_is_not_there(tmp_path, start, monkeypatch):
    run = start("model", "--num_train_epochs", "0")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(steps.checkpoints.os, "replace", fail)
        run.fine_tune()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    trainer = run.fine_tune()
    assert len(weights(tmp_path / "model")) == len(trainer.model.state_dict())


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_the_weights_are_the_last_file_of_a_model_to_be_there(tmp_path, start, monkeypatch, file):
    run, replace = start("model", "--num_train_epochs", "0"), os.replace

    def fail_at(source, target):
        if target == tmp_path / "model" / file:
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(steps.checkpoints.os, "replace", fail_at)
        run.fine_tune()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    run.fine_tune()
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "trainer_state.json"} <= files
    assert not [name for name in files if name.startswith(".part")]


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


# 3 steps per epoch
@pytest.mark.parametrize("kind, step", [
    *((kind, step) for kind in (signal.SIGTERM, signal.SIGINT) for step in (1, 5, 6)), (signal.SIGHUP, 5),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(tmp_path, start, whole, caplog, kind, step):
    caplog.set_level("INFO", "finetune_vit")
    handler = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt):
        start("cut", hook=last(SignalAt(step, kind))).fine_tune()
    assert signal.getsignal(kind) is handler and f"saved checkpoint-{step}" in caplog.text
    assert "kept the weights of epoch" not in caplog.text
    assert (tmp_path / "cut" / f"checkpoint-{step}" / "files.json").exists()
    start("cut").fine_tune()
    assert f"from {tmp_path}/cut/checkpoint-{step}" in caplog.text  # not one step is repeated
    assert same_weights(whole, tmp_path / "cut")
    expected = pytest.approx(total_losses(whole), abs=1e-3)
    assert total_losses(tmp_path / "cut") == expected  # the log forgets no step


class FailAt(TrainerCallback):
    """Notes the handlers of both signals while it trains, and raises a problem in the middle of an epoch."""

    def __init__(self, step, problem):
        self.step, self.problem = step, problem

    def on_step_end(self, args, state, control, **kwargs):
        self.handlers = handlers()
        if state.global_step == self.step:
            raise self.problem


def handlers():
    return [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    "problem, expected",
    [
        (RuntimeError("broken"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory."), SystemExit),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (None, None),
    ],
)
def test_however_training_ends_the_signals_do_what_they_did_before(start, problem, expected):
    before, probe, trainers = handlers(), FailAt(4 if problem else 99, problem), []

    def hook(trainer):
        trainers.append(trainer)
        trainer.add_callback(probe)

    run = start("model", hook=hook)
    if expected:
        with pytest.raises(expected):
            run.fine_tune()
    else:
        run.fine_tune()
    assert handlers() == before
    assert not {*probe.handlers} & {*before}  # while it trained, both were ours
    (trainer,) = trainers
    assert not [found for found in trainer.callback_handler.callbacks if isinstance(found, StopOnSignal)]


def test_a_second_signal_stops_at_once(start, tmp_path):
    class Twice(SignalAt):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control)
            super().on_step_begin(args, state, control)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        start("model", hook=last(Twice(5, signal.SIGINT))).fine_tune()
    assert [path.name for path in (tmp_path / "model").glob("checkpoint-*")] == ["checkpoint-3"]
    assert handlers() == before


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
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path, start, whole, cut, caplog, name
):
    damage, reason = DAMAGES[name]
    caplog.set_level("INFO", "finetune_vit")
    cut("cut", 11, "--save_total_limit", "3")
    damage(tmp_path / "cut" / "checkpoint-9")
    content = {path.name: path.read_bytes() for path in (tmp_path / "cut" / "checkpoint-9").iterdir()}
    start("cut", "--save_total_limit", "3").fine_tune()
    assert "checkpoint-9 cannot be used: " in caplog.text and reason in caplog.text
    assert "now called damaged-checkpoint-9" in caplog.text and "cut/checkpoint-6" in caplog.text
    aside = tmp_path / "cut" / "damaged-checkpoint-9"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    assert same_weights(whole, tmp_path / "cut")


def test_without_the_best_checkpoint_the_run_does_not_end_with_another_one(tmp_path, start, cut, caplog):
    """The Trainer would only warn, and end with the last epoch's weights."""
    start("whole", *FIRST_IS_BEST).fine_tune()
    cut("cut", 11, *FIRST_IS_BEST)
    assert {path.name for path in (tmp_path / "cut").glob("*-*")} == {"checkpoint-3", "checkpoint-9"}
    cut_file(tmp_path / "cut" / "checkpoint-3")
    with caplog.at_level("INFO", "finetune_vit"):
        start("cut", *FIRST_IS_BEST).fine_tune()
    assert "from the start" in caplog.text
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_moved_run_folder_keeps_its_best_epoch(tmp_path, start, cut):
    start("whole", *FIRST_IS_BEST).fine_tune()
    cut("before", 11, *FIRST_IS_BEST)
    (tmp_path / "before").rename(tmp_path / "after")
    start("after", *FIRST_IS_BEST).fine_tune()
    assert same_weights(tmp_path / "whole", tmp_path / "after")


def test_a_clock_that_goes_backwards_deletes_no_new_checkpoint(tmp_path, start):
    class BackInTime(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            stamp = 2_000_000_000 - 1000 * state.global_step
            os.utime(tmp_path / "model" / f"checkpoint-{state.global_step}", (stamp, stamp))

    run = start("model", hook=first(BackInTime()))
    trainer = run.fine_tune()
    kept = {path.name for path in (tmp_path / "model").glob("checkpoint-*")}
    best = f"checkpoint-{trainer.state.best_global_step}"
    assert kept == {"checkpoint-12", best} or (best == "checkpoint-12" and kept == {best, "checkpoint-9"})
    assert run.training.save_total_limit == 2


@pytest.mark.parametrize("steps", ["0", "84"])
def test_a_checkpoint_goes_only_after_a_newer_one_is_listed(tmp_path, start, steps):
    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # saved, not listed yet: a kill now may damage it
            found = {
                int(path.parent.name[11:]) for path in (tmp_path / "model").glob("checkpoint-*/files.json")
            }
            seen.append((state.global_step, found))

    seen = []
    run = start("model", "--min_steps", steps, *FIRST_IS_BEST, hook=first(Look()))
    run.fine_tune()
    assert len(seen) == 4
    assert all(step not in found for step, found in seen)
    assert all(before in found for (before, _), (_, found) in zip(seen, seen[1:], strict=False))
    assert {int(path.name[11:]) for path in (tmp_path / "model").glob("checkpoint-*")} == {
        seen[0][0],
        seen[3][0],
    }
    assert run.training.save_total_limit == 2


def test_a_drive_that_fails_while_a_checkpoint_is_written_is_waited_for(tmp_path, start, whole, monkeypatch):
    save, failures, waits = torch.save, iter([1, 0, 1, 1] + [0] * 99), []

    def fail_at_times(*args, **kwargs):
        if next(failures):
            raise OSError(errno.EIO, "Input/output error")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_at_times)
    monkeypatch.setattr(steps.console.time, "sleep", waits.append)
    start("model").fine_tune()
    assert waits == [1, 1, 2] or waits == [1, 2, 4]
    assert same_weights(whole, tmp_path / "model")


def test_a_checkpoint_that_was_asked_for_must_be_whole(tmp_path, start):
    start("whole").fine_tune()
    asked = tmp_path / "whole" / "checkpoint-12"
    (asked / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SystemExit, match="checkpoint-12: pytorch_model.bin is a pickle.*; leave it out"):
        start("other", "--resume_from_checkpoint", str(asked)).fine_tune()
    assert asked.exists()


def test_a_disk_without_room_for_checkpoints_is_noticed_before_training(start, monkeypatch):
    run = start("model", hook=lambda trainer: monkeypatch.setattr(trainer, "training_step", None))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(SystemExit, match="has 0 MB free, but"):
        run.fine_tune()
