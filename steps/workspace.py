"""Step 1: the folders of a run, its record, and the checkpoint that it starts from."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
from transformers import TrainerState, TrainingArguments

from .architectures import NO_CHECKPOINTING, check_checkpoint
from .console import MAIN, NOTEBOOK, first_line, log, stop
from .environment import can_write, lock_of, same_value
from .files import read_json, remove, write_json
from .options import Settings
from .settings import images_per_step

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "data" / "sample.zip"  # drawn by tests/draw_sample.py, with Kvasir's class names
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
# A run may go on although these differ: where things lie (`record_data` sees whether they are the same
# images, labels, splits and patients), how they are shown, what computes them.
MAY_DIFFER = """accelerator_config arguments auto_find_batch_size bf16 bf16_full_eval cross_validate
data_dir data_root data_url dataloader_in_order dataloader_multiprocessing_context
dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout disable_tqdm do_eval do_predict do_train endoscopy
eval_accumulation_steps evaluate_train external_dir fp16 fp16_full_eval gradient_accumulation_steps
hub_always_push hub_model_id hub_private_repo hub_revision hub_space_id hub_strategy hub_token
include_for_metrics include_num_input_tokens_seen local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_steps logging_strategy metadata output_dir per_device_eval_batch_size
per_device_train_batch_size project push_to_hub rate_for report_to resume_from_checkpoint run_name
save_on_each_node save_total_limit split_otherwise tf32 torch_compile torch_compile_backend
torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
trackio_static_space_id use_cpu""".split()

TRAINED = ["model.safetensors", "checkpoint-*"]  # what training makes
TRAINED += [f"fold-*/{name}" for name in (*TRAINED, "predictions.csv")]
# What a report holds of one model, and finds there again.
OF_A_MODEL = """predictions.csv metrics.json label_issues.csv external-*.csv learned-*.csv
near_duplicates-*.csv model_card.md *.png *.html""".split()


@dataclasses.dataclass
class Workspace:
    """The folders of one run, and the settings that it was asked for."""

    settings: Settings
    training: TrainingArguments
    archives: Path  # of downloads: `data_root`, on Colab a folder on Drive
    lock: filelock.BaseFileLock | None = None  # held until the process ends

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def report(self) -> Path:
        return self.output_dir / "report"

    @property
    def cache(self) -> Path:
        return Path(self.settings.data_root) / "cache"


def open_workspace(settings: Settings, training: TrainingArguments) -> Workspace:
    """Return the folders of the run, new or found again. Raises SystemExit if other results are there."""
    archives = keep_on_drive(settings, training, DRIVE)
    if not can_write(Path(settings.data_root, "cache")):
        stop(f"cannot write into {settings.data_root}", "choose another --data_root")
    output_dir = Path(training.output_dir)
    work = Workspace(settings, training, archives, claim(output_dir))
    now, path = record_of(work), output_dir / "settings.json"
    results = [found.name for kind in ("report/*", *TRAINED) for found in output_dir.glob(kind)]
    if results and not path.exists():
        stop(f"{output_dir} holds {results[-1]}, but no settings.json", "choose another --output_dir")
    keys = ["settings", "training", "derived"]
    before = read_json(path, keys, "choose another --output_dir") if results else {}
    if changed := changes(before, now):
        if is_trained(output_dir):
            remedy = f"use those, or another --output_dir, or delete {output_dir}"
            more = training.num_train_epochs - before["training"]["num_train_epochs"]
            if len(changed) == 1 and more > 0 and (output_dir / "model.safetensors").exists():
                remedy = f"train its model on, with its split: {command_to_go_on(work, more)}"
            stop(f"{output_dir} was made with other settings: {', '.join(changed)}", remedy)
        forget_split(work)
        before = {}
    if before:
        log.info("continuing the run in %s", output_dir)
        if before.get("script_sha256") != now["script_sha256"]:
            log.warning("warning: %s was begun by another version of this script", output_dir)
        return work
    try:
        write_json(path, now)
    except OSError as problem:
        stop(f"cannot write into {output_dir}: {problem}", "choose another --output_dir")
    return work


def command_to_go_on(work: Workspace, epochs: float) -> str:
    """Return the command that trains the finished model for more epochs, in a new folder."""
    more = {"num_train_epochs": f"{epochs:g}", "model_name_or_path": str(work.output_dir)}
    more["output_dir"] = f"{work.output_dir}-more"
    flags = [word for name, value in more.items() for word in (f"--{name}", value)]  # the last ones count
    return shlex.join(["python", "finetune_vit.py", *work.settings.arguments, *flags])


def keep_on_drive(settings: Settings, training: TrainingArguments, drive: Path) -> Path:
    """Return the folder for archives, on Colab on Drive; move a relative `training.output_dir` there, too.

    `drive` is where Drive is mounted. Raises SystemExit if it is needed and is not.
    """
    output_dir, colab = Path(training.output_dir), False
    with suppress(ModuleNotFoundError):
        colab = importlib.util.find_spec("google.colab") is not None
    if not colab or (output_dir.is_absolute() and not output_dir.is_relative_to(drive)):
        return Path(settings.data_root)
    mount = f"from google.colab import drive; drive.mount('{drive}')"
    if NOTEBOOK:
        importlib.import_module("google.colab.drive").mount(str(drive))
    if not os.path.ismount(drive):  # or all would go to a folder that is lost with the machine
        stop("Google Drive is not mounted", f"run `{mount}` in a cell, or give an absolute --output_dir")
    home = drive / "MyDrive" / "finetune_vit"
    training.output_dir = str(home / output_dir)
    return home


def claim(folder: Path) -> filelock.BaseFileLock | None:
    """Lock `folder` until this process ends, however it ends. Raises SystemExit if another run has it.

    Under torchrun only the main process does: the others, testing the disk for locks, would be in its way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_of(folder, timeout=0) if MAIN else None
        if lock:
            lock.acquire()
    except filelock.Timeout:
        stop(f"another run is at work in {folder}", "wait for its end, or choose another --output_dir")
    except OSError as problem:
        stop(f"cannot write into {folder}: {problem}", "choose another --output_dir")
    return lock


def record_of(work: Workspace) -> dict:
    """Return the content of settings.json."""
    code = [HERE.parent / "finetune_vit.py", *sorted(HERE.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code if path.exists()))
    record = {"settings": dataclasses.asdict(work.settings), "training": work.training.to_dict()}
    record |= {"derived": derived(work.settings, work.training), "versions": versions()}
    return json.loads(json.dumps(record | {"script_sha256": digest.hexdigest()}))


def derived(settings: Settings, training: TrainingArguments) -> dict[str, Any]:
    """Return what several settings decide together, under the name of the flag that changes it."""
    rate = f"{training.learning_rate:g}"
    rate += f" with {settings.rate_for} images per step" if settings.rate_for else ""
    split_by = settings.split_by or f"given or {settings.split_otherwise}"
    return {"images_per_step": images_per_step(training), "learning_rate": rate, "split_by": split_by}


def changes(before: dict, now: dict) -> list[str]:
    """Name the settings that decide the result and differ between two records."""
    found = {
        key: f"{key} was {before[part][key]}, is {now[part][key]}"
        for part in ("settings", "training", "derived")
        for key in sorted(before.get(part, {}).keys() & now[part].keys())
        if key not in MAY_DIFFER and not same_value(before[part][key], now[part][key])
    }
    return [*found.values()]


def is_trained(output_dir: Path) -> bool:
    """Say whether the folder holds what training made: its settings are then settled."""
    return any(path for name in TRAINED for path in output_dir.glob(name))


def forget_split(work: Workspace) -> None:
    """Delete what other settings made before anything was trained: it takes seconds to make again."""
    if MAIN:
        for name in ("split.csv", "near_duplicates.csv", "cross_validation.csv"):
            remove(work.report / name)


def forget_model(work: Workspace) -> None:
    """Delete what is said of a model that someone has deleted: it would be taken for the next one's.

    A card that was edited is kept under another name.
    """
    files = [*work.output_dir.glob("*_results.json")]
    files += [path for name in OF_A_MODEL for path in work.report.glob(name)]
    card, made = work.output_dir / "README.md", work.report / "model_card.md"
    if card.exists() and b"model-index:" in (content := card.read_bytes()):
        if made.exists() and made.read_bytes() == content:
            files.append(card)
        else:
            names = (card.with_name(f"README-former-{number}.md") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            log.warning("warning: %s describes a former model; it is now %s", card, aside.name)
            os.replace(card, aside)
    for path in files:
        remove(path)


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that decide the result."""
    names = "torch transformers datasets evaluate accelerate scikit-learn huggingface_hub numpy pandas pillow"
    found = {name: importlib.metadata.version(name) for name in names.split()}
    return {"python": platform.python_version()} | found


def choose_checkpoint(work: Workspace) -> str:
    """Return the finished model's folder, else the pretrained checkpoint. Raises SystemExit if unusable."""
    finished = (work.output_dir / "model.safetensors").exists()
    name = str(work.output_dir) if finished else work.settings.model_name_or_path
    log.info("found the finished model in %s" if finished else "reading the checkpoint %s", name)
    try:
        kind = check_checkpoint(name).model_type
        if finished:
            TrainerState.load_from_json(str(work.output_dir / "trainer_state.json"))
    except Exception as problem:  # of any kind, for whatever is damaged in there
        remedy = "check --model_name_or_path and the network, or give a folder"
        if finished:
            remedy = "delete its model.safetensors to make it again from the last checkpoint"
        stop(f"cannot use {name}: {first_line(problem)}", remedy)
    if MAIN and not finished:
        forget_model(work)
    if work.training.gradient_checkpointing and kind in NO_CHECKPOINTING:
        stop(f"--gradient_checkpointing is not for a {kind}", "leave it out")
    return name
