"""Every setting of our own, our defaults for the Trainer's, and the words that people use for them."""

from dataclasses import dataclass, field
from typing import Any

KVASIR_URL = "https://datasets.simula.no/downloads/kvasir/kvasir-dataset-v2.zip"
VIT_BASE = "google/vit-base-patch16-224-in21k"
AUGMENTATIONS = ("flip", "turn", "crop", "colour")
METRICS = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
METRICS += ("weighted_precision", "weighted_recall", "weighted_f1", "mcc")
SHOWN = 40  # classes in a table or picture; of more, the ones that matter most


def setting(default: Any, help: str, metavar: str = "") -> Any:
    """Return a field of `Settings`: its default, its line in --help, the name of its value there."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass
class Settings:
    """Where the images come from, which model to start from, how to split, what to report."""

    data_url: str = setting(KVASIR_URL, "Archive (zip or tar) of labelled images: URL or path.", "URL")
    data_sha256: str | None = setting(None, "SHA-256 that the archive must have, in hex.", "HEX")
    data_dir: str | None = setting(None, "Folder of labelled images; replaces data_url.", "FOLDER")
    dataset_name: str | None = setting(None, "Data set on the Hub; replaces data_url.", "OWNER/NAME")
    dataset_config_name: str | None = setting(
        None, "Configuration of the data set, if it has several.", "NAME"
    )
    dataset_revision: str | None = setting(None, "Its branch, tag or commit; default: the newest.", "NAME")
    metadata: str | None = setting(None, "CSV or TSV table with a row per image.", "FILE")
    image_column_name: str | None = setting(None, "Image column of the table, or of the data set.", "NAME")
    label_column_name: list[str] | None = setting(
        None, "Label column, or one 0/1 column per class.", "NAME ..."
    )
    split_column_name: str | None = setting(None, "Column of the splits.", "NAME")
    group_column_name: str | None = setting(None, "Column of the patients, cases or videos.", "NAME")
    group_by: str | None = setting(None, "folder: CLASS/PATIENT, parent: PATIENT/CLASS, or none.", "HOW")
    data_root: str = setting("data", "Folder for archives, unpacked images and caches.", "FOLDER")
    endoscopy: bool = setting(False, "Endoscopic images: the card explains their overlays.")
    model_name_or_path: str = setting(VIT_BASE, "Pretrained model: name on the Hub, or folder.", "MODEL")
    recipe: str = setting("default", "default, tutorial, fast or best; other flags override it.", "NAME")
    test_size: float = setting(0.15, "Share of the images (0 to 1) kept for the test.", "SHARE")
    validation_size: float = setting(
        0.15, "Share that chooses the epoch; 0: the test images do, and flatter the score.", "SHARE"
    )
    split_by: str | None = setting(None, "near-duplicates, random; default: yours, else the recipe's.", "HOW")
    augment: str = setting("", "Vary training images by any of flip,turn,crop,colour.", "KINDS")
    linear_probe: bool = setting(False, "Fit the head to the pretrained features first.", "BOOL")
    layer_decay: float = setting(1.0, "Each layer's learning rate, as a share of the next one's.", "SHARE")
    min_steps: int = setting(0, "Least number of steps: few images, fewer per step.", "N")
    freeze_backbone: bool = setting(False, "Train the head alone: much less memory and time.")
    class_weights: bool = setting(False, "Weight the loss so that all classes count the same.", "BOOL")
    evaluate_train: bool = setting(False, "Report the metrics on the training images, too.")
    cross_validate: int = setting(0, "Train K more models on K folds; report mean and spread.", "K")
    external_dir: str | None = setting(None, "Labelled images from elsewhere, to test on.", "FOLDER")
    hub_space_id: str | None = setting(None, "With --push_to_hub: Space for the model's page.", "ID")
    compare: list[str] | None = setting(None, "Do not train: compare the output_dir of runs.", "RUN ...")
    predict: list[str] | None = setting(None, "Do not train: classify images, folders, archives.", "PATH ...")
    predictions_file: str | None = setting(None, "CSV file for the answers of --predict.", "FILE")
    demo: bool = setting(False, "Do not train: open a web page to try the model.")
    demo_share: bool = setting(False, "With --demo: also make a public link.")
    arguments: list[str] = field(default_factory=list, init=False)  # as given, without the token
    rate_for: int = field(default=0, init=False)  # images per step of the recipe's rate; 0: a rate was given
    split_otherwise: str = field(default="near-duplicates", init=False)  # the recipe's, if no split is given


TRAINING = {  # fields of TrainingArguments: our default, help, name of the value; no help: not listed
    "output_dir": ("model", "Folder for the model, its checkpoints, card and report.", "FOLDER"),
    "num_train_epochs": (None, "Passes over the training images; 0: at most fit a new head.", "N"),
    "learning_rate": (None, "Peak learning rate; default: the recipe's, by images per step.", "RATE"),
    "warmup_steps": (None, "Warm-up: a share of all steps if below 1, else steps.", "N"),
    "weight_decay": (None, "Weight decay of AdamW; none for biases and norms.", "RATE"),
    "per_device_train_batch_size": (None, "Images per step on each device, at most.", "N"),
    "per_device_eval_batch_size": (64, "Images per evaluation step on each device.", "N"),
    "seed": (42, "Seed of the split, the new head and the order of the images.", "N"),
    "bf16": (None, "bfloat16 mixed precision; default: where it is fast.", "BOOL"),
    "fp16": (None, "float16 mixed precision; default: on GPUs before Ampere.", "BOOL"),
    "eval_strategy": ("epoch", "When to evaluate on the validation images.", "epoch|steps|no"),
    "save_strategy": ("epoch", "When to save a checkpoint.", "epoch|steps|no"),
    "logging_strategy": ("epoch", "When to log the training loss.", "epoch|steps|no"),
    "save_total_limit": (2, "Checkpoints to keep, the best one among them.", "N"),
    "load_best_model_at_end": (True, "End with the best epoch instead of the last one.", "BOOL"),
    "metric_for_best_model": ("macro_f1", "Validation metric that chooses the epoch.", "METRIC"),
    "report_to": (None, "Loggers, or none; default: tensorboard, if installed.", "TOOL ..."),
    "push_to_hub": (False, "Publish model and card on the Hub; never an image.", "BOOL"),
    "hub_model_id": (None, "The model's name on the Hub; default: output_dir's.", "OWNER/NAME"),
    "hub_private_repo": (None, "Keep the model private on the Hub.", "BOOL"),
    "resume_from_checkpoint": (None, "Checkpoint to go on from; default: the newest.", "FOLDER"),
    "disable_tqdm": (False, "No progress bars.", "BOOL"),
    "ddp_find_unused_parameters": (False, "", ""),  # what gets no gradient is frozen
    "ddp_timeout": (4 * 3600, "", ""),  # seconds: the other processes wait for the download
}
PATHS = "data_url data_dir data_root model_name_or_path metadata external_dir".split()  # files, folders
EXAMPLE = {  # flags of transformers' run_image_classification.py without a counterpart here: what to do
    "overwrite_output_dir": "leave it out; to begin anew give another --output_dir, or delete this one",
    "overwrite_cache": "leave it out: pixels are prepared again wherever the images have changed",
    "validation_dir": "give the folder that holds train and validation as --data_dir",
    "max_train_samples": "give a smaller --data_dir, or try --config data/sample.yaml",
    "max_eval_samples": "give a smaller --test_size",
    "cache_dir": "set the environment variable HF_HOME, or --data_root for archives and pixels",
    "model_revision": "fetch it (hf download NAME --revision REVISION) and give its folder",
    "image_processor_name": "leave it out: the checkpoint's own is taken",
    "config_name": "leave it out: the checkpoint's own is taken",
    "model_type": "leave it out: --model_name_or_path says which",
    "ignore_mismatched_sizes": "leave it out: a head for other classes is always replaced",
    "trust_remote_code": "leave it out: no code from the Hub is run",
}
WORDS = {  # what people write: the setting that does it
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "model": "model_name_or_path", "model_name": "model_name_or_path", "checkpoint": "model_name_or_path",
    "image_size": "model_name_or_path", "train_dir": "data_dir", "data": "data_dir", "images": "data_dir",
    "data_path": "data_dir", "dataset": "dataset_name", "test_dir": "external_dir", "split": "split_by",
    "patients": "group_column_name", "groups": "group_column_name", "csv": "metadata", "labels": "metadata",
    "val_size": "validation_size", "folds": "cross_validate",
    "output": "output_dir", "out": "output_dir", "resume": "resume_from_checkpoint", "wd": "weight_decay",
    "warmup_ratio": "warmup_steps", "augmentation": "augment", "evaluation_strategy": "eval_strategy",
    "random_state": "seed", "logging_dir": "report_to", "train_val_split": "validation_size",
    "token": "hub_token", "use_auth_token": "hub_token", "push_to_hub_model_id": "hub_model_id",
    "no_cuda": "use_cpu",
}  # fmt: skip
