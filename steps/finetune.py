"""Step 7: what the Trainer lacks: layer rates, a fitted head, a temperature, a log."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.linear_model import RidgeClassifierCV
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from .architectures import blocks_of
from .checkpoints import StopOnSignal
from .console import MAIN, log, progress, stop, stop_signals
from .files import read_json, write_json
from .scores import fit_temperature
from .settings import images_per_step


class EpochLog(TrainerCallback):
    """Show bars with the time left, a line and the speed of each epoch, and the epoch that was chosen.

    Raises SystemExit if a loss is not finite.
    """

    SHOWN = {"loss": "training loss", "eval_loss": "validation loss"}
    SHOWN |= {"eval_accuracy": "accuracy", "eval_macro_f1": "macro F1"}

    def __init__(self, training: TrainingArguments) -> None:
        self.quiet = {"disable": True} if training.disable_tqdm else {}
        self.bar, self.evaluation = tqdm(disable=True), None

    def on_train_begin(self, args, state, control, **kwargs):
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        start = args.resume_from_checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}"
        where = f"{args.device} in {precision}, images per step: {images_per_step(args)}"
        where += f", learning rate: {args.learning_rate:g}"
        log.info("training on %s, from %s", where, start if state.global_step else "the start")
        bar = {"total": state.max_steps, "initial": state.global_step, "unit": " steps", "leave": False}
        self.bar = progress(desc="train", **bar | self.quiet)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.first_step, self.start = state.global_step, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_epoch_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # or the last steps are still under way
        seconds = time.perf_counter() - self.start
        images = (state.global_step - self.first_step) * images_per_step(args)
        images = min(images, len(kwargs["train_dataloader"].dataset))
        state.log_history.append({"epoch": state.epoch, "train_images": images, "train_seconds": seconds})

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.evaluation is None:
            bar = {"total": len(kwargs["eval_dataloader"]), "unit": " batches", "leave": False}
            self.evaluation = progress(desc="evaluate", **bar | self.quiet)
        self.evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self.evaluation is not None:
            self.evaluation.close()
        self.evaluation = None

    on_predict = on_evaluate

    def on_log(self, args, state, control, **kwargs):
        logs = kwargs["logs"]
        loss = logs.get("loss", 0.0) + logs.get("eval_loss", 0.0)
        if not np.isfinite(loss):
            stop(f"the loss is {loss} at step {state.global_step}", "lower --learning_rate")
        last = "loss" if args.eval_strategy == "no" else "eval_loss"
        if MAIN and last in logs:
            latest = {name: value for entry in state.log_history for name, value in entry.items()}
            known = {text: latest[name] for name, text in self.SHOWN.items() if name in latest}
            line = ", ".join(f"{text} {value:.3f}" for text, value in known.items())
            if "train_seconds" in latest:
                line += f"; {latest['train_images'] / latest['train_seconds']:.1f} images/s"
            tqdm.write(f"epoch {state.epoch:g} of {args.num_train_epochs:g}: {line}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        if not control.should_training_stop or state.global_step == state.max_steps:
            log.info("kept the weights of epoch %g of %g", chosen_epoch(args, state), args.num_train_epochs)


@contextmanager
def guarded(trainer: Trainer, training: TrainingArguments) -> Iterator[None]:
    """While the block trains, Ctrl-C, SIGTERM or SIGHUP saves a checkpoint, then raises KeyboardInterrupt.

    If memory is too small, SystemExit advises on `training`, the arguments as they were given.
    """
    guard = StopOnSignal()
    alone = training.world_size == 1 and threading.current_thread() is threading.main_thread()
    kinds = stop_signals() if alone else ()
    before = {kind: signal.signal(kind, guard.note) for kind in kinds}
    trainer.add_callback(guard)
    try:
        yield
    except torch.OutOfMemoryError as problem:
        remedy = "--gradient_checkpointing true needs less"
        if half := trainer.args.per_device_train_batch_size // 2:
            each = training.per_device_train_batch_size * training.gradient_accumulation_steps
            batch = next(size for size in range(half, 0, -1) if each % size == 0)
            halves = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {each // batch}"
            remedy = f"{halves} need at most half of it and train the same"
        stop(str(problem).split(".")[0], remedy)
    finally:
        trainer.remove_callback(guard)
        epoch_log = trainer.pop_callback(EpochLog)
        epoch_log.bar.close()  # or an error follows on its line
        trainer.add_callback(epoch_log)
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if guard.caught:
        log.info("saved checkpoint-%s", trainer.state.global_step)
        raise KeyboardInterrupt


def chosen_epoch(training: TrainingArguments, state: TrainerState) -> float:
    """Return the epoch whose weights the model has: the best on the validation images, or the last."""
    step = state.best_global_step if training.load_best_model_at_end else None
    epochs = [entry["epoch"] for entry in state.log_history if step and entry.get("step") == step]
    return epochs[0] if epochs else state.epoch


def layerwise_optimizer(
    model: PreTrainedModel, training: TrainingArguments, decay: float
) -> tuple[type, dict[str, Any]] | None:
    """Return the optimizer's class and arguments, with rate * decay ** (layers above) for each layer.

    Where layers form stages, as in Swin and ConvNeXt, a stage counts as a layer.

    Layer-wise learning-rate decay as in BEiT (Bao et al. 2022, arXiv 2106.08254): the head learns at the full
    rate, the embeddings at the lowest. Biases and norms have no weight decay. None, if `decay` is 1.
    """
    if decay == 1:
        return None
    groups, depth = {}, 0
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "norm"]))
    blocks = blocks_of(model)
    layer = {weights: number for number, block in enumerate(blocks, 1) for weights in block.parameters()}
    for name, weights in model.named_parameters():  # in order: embeddings, blocks, what stands above them
        depth = layer.get(weights, len(blocks) + 1 if depth else 0)
        rate = training.learning_rate * decay ** (len(blocks) + 1 - depth)
        plain = name not in decayed
        group = {"params": [], "lr": rate, "weight_decay": 0.0 if plain else training.weight_decay}
        if weights.requires_grad:
            groups.setdefault((depth, plain), group)["params"].append(weights)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    return kind, options | {"params": list(groups.values())}


def weighted_loss(images: Dataset, training: TrainingArguments) -> Callable:
    """Return the cross-entropy for the Trainer, each image times n / (classes * images of its class)."""
    counts = torch.bincount(torch.tensor(images["label"][:]), minlength=images.features["label"].num_classes)
    weights, smoothing = len(images) / len(counts) / counts, training.label_smoothing_factor
    weights = weights.to(training.device)  # once: copying to the GPU, or reading a tensor, waits for it

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = F.cross_entropy(outputs.logits, labels, reduction="none", label_smoothing=smoothing)
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return (losses * weights[labels]).sum() / count

    return loss


def fit_head(trainer: Trainer, augment: str) -> None:
    """Fit the head to the pretrained features of the training images, in one pass.

    Linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054. Ridge regression with classes
    weighted alike, its strength chosen by leave-one-out. If `augment` turns or flips, images turned by half
    or mirrored count, too.
    """
    inputs, labels = head_inputs(trainer, (2, 3) if "turn" in augment else (3,) if "flip" in augment else ())
    scale = inputs.std()
    probe = RidgeClassifierCV(np.logspace(0, 4, 9), class_weight="balanced").fit(inputs / scale, labels)
    weight, bias = np.atleast_2d(probe.coef_) / scale, np.atleast_1d(probe.intercept_)
    if len(weight) == 1:  # two classes share one row
        weight, bias = np.vstack([-weight, weight]), np.hstack([-bias, bias])
    with torch.no_grad():  # halved: a head that is sure of the training images learns little from them
        trainer.model.classifier.weight.copy_(torch.from_numpy(weight / 2))
        trainer.model.classifier.bias.copy_(torch.from_numpy(bias / 2))
    trainer.state.log_history.append({"ridge_strength": float(probe.alpha_)})


def head_inputs(trainer: Trainer, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the head reads, float64 (n * views, width), and the labels, int (n * views,).

    The views of each training image: as it is and, if there are `axes`, flipped along them.
    """
    model, inputs, gathered = trainer.model.eval(), [], []
    views = [(), axes] if axes else [()]
    hook = model.classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0].float()))
    with hook, torch.no_grad(), trainer.accelerator.autocast():  # BEiT keeps a tensor from it for training
        for rows in progress(trainer.get_eval_dataloader(trainer.train_dataset), desc="linear probe"):
            inputs.clear()
            for flipped in views:
                model(pixel_values=rows["pixel_values"].flip(flipped))
            parts = torch.stack(inputs, dim=1), rows["labels"]
            gathered.append([part.cpu() for part in trainer.accelerator.gather_for_metrics(parts)])
    features, labels = (torch.cat(parts).numpy() for parts in zip(*gathered, strict=True))
    return np.concatenate(features.astype(float)), labels.repeat(len(views))


def calibrate(trainer: Trainer) -> None:
    """Divide the head by the temperature that suits the validation images: `pipeline` needs no other step.

    Guo et al. 2017, arXiv 1706.04599. No prediction changes. `config.json` keeps the temperature.
    """
    outputs = trainer.predict(trainer.eval_dataset)
    temperature = fit_temperature(outputs.predictions, outputs.label_ids)
    with torch.no_grad():
        for parameter in trainer.model.classifier.parameters():
            parameter.div_(temperature)
    trainer.model.config.calibration_temperature = temperature


def save_metrics(trainer: Trainer, split: str, measured: dict[str, float]) -> None:
    """Write SPLIT_results.json and all_results.json, as `Trainer.save_metrics`, but never half of a file."""
    for name, before in ((split, {}), ("all", read_json(Path(trainer.args.output_dir, "all_results.json")))):
        write_json(Path(trainer.args.output_dir, f"{name}_results.json"), before | measured)
