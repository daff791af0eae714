# %% [markdown]
# # Fine-tune a Vision Transformer on endoscopy images, or on your own
#
# From an archive on a web server to a fine-tuned `ViTForImageClassification`, an honest score and a model
# card. Read this as a notebook, or run it as a script:
#
# | command | what it trains on |
# |---|---|
# | `python finetune_vit.py` | Kvasir v2: endoscopy, 8 classes of 1,000 images, 2.3 GB; use a GPU |
# | `python finetune_vit.py --data_dir FOLDER` | your images, in class folders or with a table |
# | `python finetune_vit.py --config data/sample.yaml` | 480 computer-drawn images; no GPU, no network |
#
# This file shows what each step asks of the Hugging Face libraries. The folder `steps` makes every step
# robust. Slow steps leave their results on disk and find them there the next time: after a disconnect, run
# everything again. On the sample the test accuracy is 0.917 (95 % interval 0.826 to 0.969, n = 72, seed 42).

# %%
import os
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/finetune_vit"
NOTEBOOK = "ipykernel" in sys.modules
if NOTEBOOK and Path("../steps").exists():  # opened in data/
    os.chdir("..")
elif NOTEBOOK and not Path("steps").exists():  # Colab has the notebook alone: fetch the rest
    commands = [] if Path("finetune_vit").exists() else [f"git clone -q {REPOSITORY}"]
    commands.append(f'"{sys.executable}" -m pip install -q -r finetune_vit/requirements.txt')
    for command in commands:
        if os.system(command):
            sys.exit(f"error: failed: {command}; check REPOSITORY and the network")
    os.chdir("finetune_vit")
elif not NOTEBOOK and not Path(__file__).with_name("steps").exists():
    sys.exit(f"error: the folder steps is missing beside {__file__}; fetch all of it: git clone {REPOSITORY}")
if NOTEBOOK:
    sys.path.insert(0, os.getcwd())

# %% [markdown]
# ## 0 · Settings
#
# A recipe holds the settings that decide how well the model learns; the README compares the four. All others
# are ours (`Settings` in `steps/options.py`) or the Trainer's own
# [`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer). Each is a flag, a key
# of the YAML file after `--config` and, in a notebook, an entry of `ARGUMENTS` below.

# %%
RECIPES = {
    "default": {
        "num_train_epochs": 4.0,
        "per_device_train_batch_size": 64,  # the most per step
        "min_steps": 150,  # with fewer images: 32, 16, ..., 1 per step, to reach it
        "learning_rate": 4e-5,  # at its peak, with 64 images per step; 2e-5 with 16, 1.41e-5 with 8 or fewer
        "layer_decay": 1.0,  # 0.85: every layer learns at 0.85 times the rate of the layer above it
        "lr_scheduler_type": "linear",  # from the peak down to 0
        "warmup_steps": 0.2,  # share of all steps, to rise to the peak
        "weight_decay": 0.01,
        "linear_probe": True,  # fit the head to the pretrained features before training all layers
        "class_weights": False,  # True: every class counts the same, however many images it has
        "augment": "flip",  # mirror one image in two; where images have no right way up, try flip,turn
    },
    "tutorial": {  # the blog post that this project grew from
        "num_train_epochs": 5.0,
        "per_device_train_batch_size": 16,
        "min_steps": 0,
        "learning_rate": 2e-5,
        "layer_decay": 1.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 500,  # of the 2,125 steps that Kvasir v2 takes
        "weight_decay": 0.01,
        "linear_probe": False,
        "class_weights": False,
        "augment": "",
        "split_by": "random",  # if your data have no split of their own
        "validation_size": 0.0,  # the test images choose the epoch, which flatters the score
        "metric_for_best_model": "accuracy",
    },
}
RECIPES["fast"] = RECIPES["default"] | {"num_train_epochs": 0.0}  # the fitted head alone
RECIPES["best"] = RECIPES["default"] | {"num_train_epochs": 15.0, "min_steps": 560}  # for few images

# %%
from steps.console import MAIN, listed, log, start_logging

start_logging()  # first: from here on, a script's mistakes and Ctrl-C end in one line

from steps.settings import for_trainer, read_settings

ARGUMENTS = [] if NOTEBOOK else sys.argv[1:]  # in a notebook write flags here: ["--num_train_epochs", "3"]
settings, training = read_settings(ARGUMENTS, RECIPES)
if settings.predict or settings.demo or settings.compare:  # only use finished models: see step 11
    from steps.use import use_model

    use_model(settings, training)
    sys.exit()

# %% [markdown]
# ## 1 · Workspace
#
# `--output_dir` belongs to one run. Its `settings.json` records how the run was made; once something has been
# trained, settings that would change the result are refused. On Colab the folder lies on Google Drive. What
# could fail late is tried now: reading the checkpoint and, to publish, writing to the Hub.

# %%
from steps.publish import open_hub
from steps.workspace import choose_checkpoint, open_workspace

work = open_workspace(settings, training)
checkpoint = choose_checkpoint(work)  # this run's finished model, else the pretrained one
hub = open_hub(work)  # the model's name on the Hub; "" without --push_to_hub

# %% [markdown]
# ## 2 · Download
#
# The archive is downloaded once and unpacked once. A download that was cut off goes on where it stopped.
# `--dataset_name` fetches a data set of the Hub instead. With `--data_dir` there is nothing to do.

# %%
from steps.download import fetch_images

with training.main_process_first(local=False):  # under torchrun the others wait, then find its result
    image_folder, origin = fetch_images(work)  # origin: URL and SHA-256, or revision on the Hub

# %% [markdown]
# ## 3 · Load
#
# Whatever you have becomes one table: file, label and, where known, split and patient (column `group`). The
# README shows what is understood. `datasets` lists the files as an *imagefolder*; nothing is decoded yet.

# %%
from datasets import load_dataset
from steps.load import attach_labels, find_images, load_external, paths_of, record_data

with training.main_process_first(local=False):
    table, left_out = find_images(image_folder, settings)
    images = load_dataset(
        "imagefolder",
        data_files=paths_of(table, image_folder),
        split="train",  # what `datasets` calls all of them; step 5 makes the real splits
        drop_labels=True,  # it knows only the folder that a file lies in: the labels are in our table
        cache_dir=str(work.cache),
    )
    images = attach_labels(images, table, image_folder)
    record_data(images, image_folder, origin, work)
    class_names = images.features["label"].names
    if settings.external_dir:
        load_external(class_names, work)  # find a mistake there now, not after hours
log.info("%s images in %s classes: %s", f"{len(images):,}", f"{len(class_names):,}", listed(class_names))

# %% [markdown]
# ## 4 · Preprocess
#
# The checkpoint's processor, here a `ViTImageProcessor`, knows how it wants its images: size, mean, standard
# deviation. Each file is decoded and resized once, by `Dataset.map` on all cores, and kept as uint8: a
# quarter of float32. Normalising waits for the GPU. Files that cannot be read are named and left out.

# %%
from transformers import AutoImageProcessor
from steps.architectures import pixel_shape, processor_of
from steps.preprocess import keep_readable, prepare_pixels, show_examples

processor = AutoImageProcessor.from_pretrained(processor_of(checkpoint))  # its own, or its type's
shape = pixel_shape(processor)  # (channels, height, width)
with training.main_process_first(local=False):
    images = prepare_pixels(images, image_folder, processor, work.cache)
    images = keep_readable(images, left_out, work.report / "left_out.csv")
show_examples(images, image_folder, shape)

# %% [markdown]
# ## 5 · Split
#
# The model learns from the training images, the validation images choose its best epoch, and the test images
# score it at the end. Frames of one examination can be nearly the same picture. If training has one and the
# test another, the score measures memory. So near-duplicates are found first: what a chain of them connects
# is a *scene*. A *group* is a patient with all scenes that show them, or a scene if no patient is known; no
# group is divided. On 1,126 real endoscopy images a random split gives an accuracy of 0.963; a split by whole
# scenes, with the same classifier, 0.898. A split that you give is kept.

# %%
from steps.duplicates import find_scenes
from steps.split import show_splits, split_images

with training.main_process_first(local=False):
    scenes = find_scenes(images, shape, work.report / "near_duplicates.csv")
    splits = split_images(images, scenes, work)
show_splits(splits, scenes)

# %% [markdown]
# ## 6 · Model
#
# The pretrained model, here a `ViTForImageClassification`, mostly has a head for other classes, or none:
# then `draw_head` makes a random one. This is a function because `--cross_validate` makes more models.

# %%
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel
from steps.model import draw_head, normalise_on_device, prepare_training


def make_model(checkpoint: str) -> tuple[PreTrainedModel, bool]:
    """Return the model and whether its head is new."""
    model, loading = AutoModelForImageClassification.from_pretrained(
        checkpoint,
        architectures=[],  # one head: some DeiT were made with two
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
        dtype=torch.float32,  # even if the checkpoint has 16 bits: those would lose small updates
        ignore_mismatched_sizes=True,  # its head may have other classes
        use_safetensors=True,  # other formats can run code
        output_loading_info=True,
    )
    normalise_on_device(model, processor, settings.augment)  # and vary the images while training
    prepare_training(model, settings.freeze_backbone)
    return model, draw_head(model, loading, checkpoint, training.seed)  # and check that nothing is missing


# %% [markdown]
# ## 7 · Fine-tune
#
# First the head alone is fitted to the pretrained features: a random head would pull them towards its own
# noise. Then the `Trainer` tunes all layers. After every epoch it evaluates on the validation images and
# saves a checkpoint, from which a run that was cut off goes on. Last, the head is divided by one number, the
# *temperature*, to bring the probabilities closer to the truth. Once the model is there, nothing is done.

# %%
from datasets import DatasetDict
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from steps.checkpoints import SafeCheckpoints, newest_checkpoint, patch_saving, save_finished
from steps.finetune import EpochLog, calibrate, fit_head, guarded, layerwise_optimizer, save_metrics
from steps.finetune import weighted_loss
from steps.preprocess import Collator
from steps.scores import compute_metrics


def fine_tune(checkpoint: str, splits: DatasetDict, training: TrainingArguments) -> Trainer:
    """Return a Trainer with the model of `training.output_dir`: new, resumed or found there."""
    model, new_head = make_model(checkpoint)
    inputs = splits.select_columns(["pixel_values", "label"])
    args = for_trainer(training, len(inputs["train"]), settings)  # images per step and learning rate
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=inputs["train"],
        eval_dataset=inputs["validation"],
        data_collator=Collator(shape),
        compute_metrics=compute_metrics,
        compute_loss_func=weighted_loss(inputs["train"], training) if settings.class_weights else None,
        optimizer_cls_and_kwargs=layerwise_optimizer(model, args, settings.layer_decay),
        processing_class=processor,
        callbacks=[SafeCheckpoints(training), EpochLog(training)],
    )
    trainer.remove_callback(PrinterCallback)  # prints raw numbers; EpochLog prints a line per epoch
    patch_saving(trainer)  # so that checkpoints can be read again, and a network drive may fail for a moment
    if not Path(training.output_dir, "model.safetensors").exists():
        resume = newest_checkpoint(training)
        probe = settings.linear_probe and new_head
        if probe and not resume:
            fit_head(trainer, settings.augment)
        if training.num_train_epochs > 0:
            with guarded(trainer, training):  # handles Ctrl-C and too little memory
                outcome = trainer.train(resume_from_checkpoint=resume)
            save_metrics(trainer, "train", outcome.metrics)
        if probe or training.num_train_epochs > 0:
            calibrate(trainer)
        save_finished(trainer)
    trainer.state = TrainerState.load_from_json(f"{training.output_dir}/trainer_state.json")
    return trainer


trainer = fine_tune(checkpoint, splits, training)

# %% [markdown]
# ## 8 · Evaluate
#
# `trainer.predict` gives a logit per class. Their softmax gives the probabilities in `predictions.csv`, from
# which the scores are computed. The 95 % intervals are over groups: ten frames of one polyp are not ten
# polyps. Specificity is the share of other classes' images that are not taken for the class. ECE (expected
# calibration error) is how far, on average, the probabilities are from the share of right answers. Then parts
# of the test images are painted black, to see whether the model reads burnt-in text instead of tissue.

# %%
from steps.evaluation import predict, show_results, summarise
from steps.validation import cross_validate, evaluate_external

names = ["validation", "test", "train"] if settings.evaluate_train else ["validation", "test"]
predictions = predict(trainer, splits, names, work.report / "predictions.csv")
results = summarise(predictions, splits, scenes, trainer)
show_results(results)

# %% [markdown]
# One test set from one clinic is one sample. `--cross_validate K` trains K more models and tests each on
# another part of the images. `--external_dir FOLDER` tests this model on images from somewhere else.

# %%
if settings.cross_validate:
    results["cross_validation"] = cross_validate(fine_tune, splits, scenes, work)
if settings.external_dir:
    results["external"] = evaluate_external(splits, trainer, work)

# %% [markdown]
# ## 9 · Report
#
# `report/index.html` is the page to open: scores, figures, test images, the most confident mistakes beside
# what speaks for the wrong answer, labels in doubt. The model card is written from the run's own files;
# the Hub shows it as the model's page. A card that you have edited stays as it is.

# %%
from steps.figures import charts
from steps.galleries import galleries
from steps.label_issues import find_label_issues
from steps.page import write_page
from steps.report import make_space, write_report

if MAIN:  # under torchrun one process writes
    results["label_issues"] = find_label_issues(predictions, scenes, work)
    figures = charts(results, predictions, trainer.state.log_history)
    figures |= galleries(predictions, scenes, images, trainer)  # show images: never published
    write_report(results, figures, work)
    write_page(results, predictions, images, work)
    make_space(work.report / "space", class_names, hub, training.hub_revision)  # the model's web page

# %% [markdown]
# ## 10 · Publish
#
# With `--push_to_hub` one commit takes the model, its card, charts and numbers to the Hub, but none of your
# images. The model is then downloaded and classifies test images, and a second commit says in the card
# whether it answers as it did here.

# %%
from steps.publish import publish

if hub:
    publish(hub, predictions, image_folder, work)

# %% [markdown]
# ## 11 · Use
#
# The model needs nothing from this repository: `pipeline` decodes, resizes, normalises and sorts. `--predict
# PATH ...` classifies files, folders and archives, and `--demo` opens a web page to drop an image on.
# `--compare RUN_A RUN_B` says how much two models differ on the same test images, with intervals.

# %%
from steps.use import show_commands
from transformers import pipeline

if MAIN:
    classifier = pipeline("image-classification", str(work.output_dir), device=training.device)
    for file in splits["test"]["file"][:4]:
        best, second = classifier(str(image_folder / file), top_k=2)
        log.info("%s: %s, %.0f %%; or %s", file, best["label"], 100 * best["score"], second["label"])
    show_commands(training.output_dir)
