"""Step 7: whole checkpoints, from which a run resumes bit for bit, and a whole model."""

import functools
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from .console import MAIN, close_screen, log, retry, stop
from .files import atomic, need_space, read_json, remove, sha256_of, write_json

NEEDED = {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}  # to resume


class SafeCheckpoints(TrainerCallback):
    """Give each checkpoint a list of its files' checksums; only then delete older ones, by their step.

    The Trainer goes by the clock, which may be put back, and does not check that a checkpoint is whole.
    """

    def __init__(self, training: TrainingArguments) -> None:
        self.output_dir, self.keep = Path(training.output_dir), training.save_total_limit

    def on_train_begin(self, args, state, control, **kwargs):
        weights = kwargs["model"].num_parameters() * 4  # bytes; AdamW adds two moments of that size
        lacking = 3 - min(len(checkpoints_in(self.output_dir)), 2)  # the best, the newest, its successor
        need_space(self.output_dir, weights * (1 + 3 * lacking))
        if state.best_global_step:  # where it is now: the folder may have been moved
            state.best_model_checkpoint = str(self.output_dir / f"checkpoint-{state.best_global_step}")

    def on_save(self, args, state, control, **kwargs):
        if MAIN:
            steps = state.global_step, state.best_global_step
            newest, best = (self.output_dir / f"checkpoint-{step}" for step in steps)
            write_json(newest / "files.json", retry(checksums, newest))
            found = checkpoints_in(self.output_dir)
            spare = [path for path in found if path not in (newest, best)]
            for path in spare[: max(len(found) - self.keep, 0)] if self.keep else ():
                shutil.rmtree(path)


class StopOnSignal(TrainerCallback):
    """Once `caught` is true, save a checkpoint after this step and end the training."""

    caught = False

    def note(self, kind: int, frame: Any) -> None:
        self.caught = True
        if kind == getattr(signal, "SIGHUP", None):
            close_screen()
        signal.signal(kind, signal.default_int_handler)  # a second one stops at once
        log.info("stopping after this step, to save it")

    def on_step_end(self, args, state, control, **kwargs):
        if self.caught:
            control.should_training_stop = True
            control.should_save |= state.epoch % 1 > 0 or args.save_strategy != "epoch"
            control.should_log |= state.epoch % 1 > 0 and args.logging_strategy != "no"  # else unlogged

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.caught and state.epoch % 1:  # do not judge half an epoch
            control.should_evaluate = control.should_save = control.should_log = False


def patch_saving(trainer: Trainer) -> None:
    """Make the Trainer save what it can read again, and retry where a network drive fails for a while.

    It reads a checkpoint by the model's own names, but `save_pretrained` writes those of older releases:
    resuming and restoring the best epoch would skip most weights (transformers issue 43701). There is no
    public hook for saving a checkpoint again.
    """
    model = trainer.model
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    if trainer.args.world_size == 1:  # one of several processes may not retry alone
        trainer._save_checkpoint = functools.partial(retry, trainer._save_checkpoint)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the folders checkpoint-STEP, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint, except those that others may still be writing."""
    others = ("files.json", ".", "rng_state_")
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(others)]
    return {path.name: sha256_of(path) for path in files}


def damage_of(checkpoint: Path) -> str:
    """Say what is wrong with a checkpoint, or with that of the best epoch before it; "" if nothing."""
    if (checkpoint / "pytorch_model.bin").exists():
        return "pytorch_model.bin is a pickle, which can run code"
    listed, found = {}, checksums(checkpoint)
    with suppress(OSError, ValueError):
        listed = json.loads((checkpoint / "files.json").read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or not NEEDED <= listed.keys():
        return "it was not finished, or not made by this script"
    if wrong := [name for name in listed if listed[name] != found.get(name)]:
        return f"{wrong[0]} is missing or damaged"
    step = read_json(checkpoint / "trainer_state.json").get("best_global_step")
    best = checkpoint.with_name(f"checkpoint-{step}")
    return damage_of(best) if step and best != checkpoint else ""


def newest_checkpoint(training: TrainingArguments) -> str | None:
    """Return the checkpoint that was asked for, else the newest whole one, if any.

    Newer ones that are damaged are set aside. Raises SystemExit if the one that was asked for is damaged.
    """
    if asked := training.resume_from_checkpoint:
        if damage := damage_of(Path(asked)):
            stop(f"cannot resume from {asked}: {damage}", "leave it out: the newest is then used")
        return asked
    with training.main_process_first(local=False):
        for checkpoint in reversed(checkpoints_in(Path(training.output_dir))):
            if not (damage := damage_of(checkpoint)):
                return str(checkpoint)
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            if MAIN:
                remove(aside)
                os.replace(checkpoint, aside)
            log.warning("warning: %s cannot be used: %s; now called %s", checkpoint.name, damage, aside.name)
    return None


def save_finished(trainer: Trainer) -> None:
    """Save state, processor and model under temporary names, then rename them, the weights last.

    A model that is there is therefore whole, and this step done.
    """
    output_dir, state = Path(trainer.args.output_dir), trainer.state
    if state.best_model_checkpoint:  # this file is published: no path of this machine
        state.best_model_checkpoint = Path(state.best_model_checkpoint).name
    with atomic(output_dir / "trainer_state.json") as part:
        state.save_to_json(str(part))
    if MAIN:
        retry(save_model, trainer, output_dir)
        log.info("saved the model in %s", output_dir)
    trainer.accelerator.wait_for_everyone()  # or another process reads the state before it has its name


def save_model(trainer: Trainer, folder: Path) -> None:
    """Write the model and its processor, the weights last."""
    part = folder / ".part-model"
    trainer.model.save_pretrained(part, save_original_format=True)
    trainer.processing_class.save_pretrained(part)
    for file in sorted(part.iterdir(), key=lambda file: file.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    part.rmdir()
