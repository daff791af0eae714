"""Step 1: every type of checkpoint on the list is prepared, probed, trained, frozen, saved and shown."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import Training, draw, draw_images, load_images, make_work, story
from PIL import Image
from test_figures import write_issues
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments, pipeline

from steps.architectures import ANY_SIZE, TYPES, check_checkpoint, pixel_shape, processor_of
from steps.duplicates import Scenes
from steps.evaluation import predict
from steps.galleries import draw_examples, galleries
from steps.finetune import head_inputs, layerwise_optimizer
from steps.options import Settings
from steps.preprocess import pixels_of, prepare_pixels, resize
from steps.use import load_classifier
from steps.workspace import choose_checkpoint

BODY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
BODY |= {"intermediate_size": 32}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
DINO |= {"image_size": 56}  # of its position embeddings; the processor makes 32
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
SWIN |= {"window_size": 4}
STAGES = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "patch_size": 4}
SQUARE = {"size": {"height": 32, "width": 32}}
CENTRE = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
BIT = ("Bit", CENTRE | {"size": {"shortest_edge": 40}})
KINDS = {  # config.json and preprocessor_config.json as checkpoints of the type have them, but tiny
    "vit": (BODY, ("ViT", SQUARE)),
    "deit": (BODY, ("DeiT", CENTRE | {"size": {"height": 40, "width": 40}})),
    "dinov2": (DINO, BIT),
    "dinov2_with_registers": (DINO | {"num_register_tokens": 4}, BIT),
    "beit": (BODY | {"use_relative_position_bias": True, "use_mask_token": True}, ("Beit", SQUARE)),
    "swin": (SWIN, ("ViT", SQUARE | {"resample": 3})),
    "swinv2": (SWIN, ("ViT", SQUARE | {"resample": 3})),
    "convnext": (STAGES, ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875})),
    "convnextv2": (STAGES, ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875})),
    "siglip": ({"vision_config": BODY}, ("Siglip", SQUARE)),
}


def test_each_type_on_the_list_is_tested():
    assert [*KINDS] == TYPES


def write_checkpoint(folder, kind, **changes):
    """Save a checkpoint of this type with random weights; return its folder."""
    config, (processor, numbers) = KINDS[kind]
    config = transformers.AutoConfig.for_model(kind, **config | {"architectures": []} | changes)
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    numbers = numbers | {"image_processor_type": f"{processor}ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_processor_the_defaults_of_its_type_are_taken_and_said(tmp_path, caplog, kind):
    sized = {} if kind in ANY_SIZE or kind == "siglip" else {"image_size": [64, 64]}
    checkpoint = str(write_checkpoint(tmp_path, kind, **sized))
    assert processor_of(checkpoint) == checkpoint
    (tmp_path / "preprocessor_config.json").unlink()
    check_checkpoint(checkpoint)
    processor = AutoImageProcessor.from_pretrained(processor_of(checkpoint))
    assert f"{tmp_path} has no preprocessor_config.json: taking the defaults of " in caplog.text
    default = getattr(transformers, f"{KINDS[kind][1][0]}ImageProcessor")()
    side = {"convnext": 384, "convnextv2": 384, "siglip": 32}.get(kind, 64 if sized else 224)
    assert pixel_shape(processor) == (3, side, side) and f"at {side} x {side} pixels" in caplog.text
    for name in ("image_mean", "image_std", "resample", "do_center_crop"):
        assert getattr(processor, name, None) == getattr(default, name, None), name
    if kind in ANY_SIZE:
        assert processor.to_dict() == default.to_dict()


@pytest.mark.parametrize("size", [(50, 1), (1, 50), (50, 3), (3, 50), (1, 1)])
def test_an_image_as_high_as_it_has_channels_is_not_taken_for_another(tmp_path, size):
    """Columns of one colour stay columns: transformers 5.0 to 5.3 would take rows for channels."""
    rgb = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels = resize(rgb, AutoImageProcessor.from_pretrained(write_checkpoint(tmp_path, "vit")))
    expected = Image.fromarray(rgb).resize((32, 32), Image.Resampling.BILINEAR)
    assert (pixels.permute(1, 2, 0).numpy() == np.array(expected)).all()


PHOTO = {"height": 224, "width": 224}
PROCESSORS = {  # of well-known checkpoints; ConvNeXt crops below 384 pixels
    "vit": ("ViT", {"size": PHOTO, "resample": 2}),
    "deit": ("DeiT", {"size": {"height": 256, "width": 256}, "crop_size": PHOTO, "resample": 3}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}, "crop_size": PHOTO, "resample": 3}),
    "beit": ("Beit", {"size": PHOTO, "do_center_crop": False, "resample": 2}),
    "swin": ("ViT", {"size": PHOTO, "resample": 3}),
    "convnext": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}),
    "convnext-384": ("ConvNext", {"size": {"shortest_edge": 384}, "resample": 3}),
    "siglip": ("Siglip", {"size": PHOTO, "resample": 3}),
}


@pytest.mark.parametrize("size", [(720, 576), (577, 721), (300, 259), (260, 900), (224, 230), (40, 36)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(tmp_path, name, size):
    kind, numbers = PROCESSORS[name]
    numbers = numbers | {"image_processor_type": f"{kind}ImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    photo = draw((90, 140, 200), np.random.default_rng(0), size)
    theirs = processor(photo, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    ours = resize(np.array(photo), processor)
    assert ours.dtype == theirs.dtype == torch.uint8 and ours.shape == theirs.shape == pixel_shape(processor)
    levels = (ours.int() - theirs.int()).abs()
    assert levels.max() <= 1 and levels.float().mean() < 0.02
    short = kind != "ConvNext" and min(size) >= max(
        numbers["size"].values()
    )  # the road without the processor
    try:
        resize(np.array(photo), SimpleNamespace(to_dict=processor.to_dict))
        assert short
    except TypeError:  # it was called
        assert not short


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes of 15 images."""
    return draw_images(tmp_path_factory.mktemp("photos") / "images", 15)


@pytest.fixture(scope="module", params=KINDS)
def run(tmp_path_factory, photos, request):
    """A model of each type after one epoch of the script's own step 7."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(root, request.param)
    processor, table = AutoImageProcessor.from_pretrained(checkpoint), load_images(photos)
    images = prepare_pixels(table, photos, processor, root / "cache").remove_columns(["mode", "error"])
    pairs = pd.DataFrame(columns=["file_a", "file_b", "distance", "label_a", "label_b"])
    scenes = Scenes(pairs, pd.Series(range(len(images)), images["file"][:]))
    flags = ["--data_dir", photos, "--output_dir", root / "model", "--model_name_or_path", checkpoint]
    flags += "--num_train_epochs 1 --bf16 false --report_to none --min_steps 0".split()
    training = Training(make_work(flags), processor, images, scenes, lambda trainer: None)
    trainer = training.fine_tune()
    return SimpleNamespace(**vars(training), trainer=trainer, images=images, scenes=scenes, photos=photos)


def test_pipeline_gives_the_answers_of_the_run(run, tmp_path):
    """The saved model with its saved processor, on files, against the Trainer on prepared pixels."""
    table = predict(run.trainer, run.splits, ["test"], tmp_path / "predictions.csv")
    classifier = pipeline("image-classification", str(run.work.output_dir), device="cpu")
    for _, row in table.iterrows():
        for answer in classifier(str(run.photos / row["file"])):  # a grey level may differ
            assert answer["score"] == pytest.approx(row["p_" + answer["label"]], abs=5e-4), row["file"]


def test_a_finished_run_is_found_and_used_again(run):
    assert choose_checkpoint(run.work) == str(run.work.output_dir)
    assert [*check_checkpoint(str(run.work.output_dir)).id2label.values()] == ["blue", "green", "red"]
    model, processor = load_classifier(str(run.work.output_dir))
    assert processor.to_dict() == run.trainer.processing_class.to_dict()
    states = model.state_dict(), run.trainer.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])


def test_the_probe_reads_what_the_head_reads(run):
    inputs, labels = head_inputs(run.trainer, ())
    head, outputs = run.trainer.model.classifier, run.trainer.predict(run.trainer.train_dataset)
    logits = inputs @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    assert logits == pytest.approx(outputs.predictions, abs=1e-4) and (labels == outputs.label_ids).all()


def test_right_answers_and_mistakes_stand_beside_what_speaks_for_them(run, tmp_path):
    table = predict(run.trainer, run.splits, ["test"], tmp_path / "predictions.csv")
    wrong = table.assign(label=np.roll(table["label"], 1))
    write_issues(run.work.output_dir, [])
    shown = galleries(pd.concat([table, wrong]), run.scenes, run.images, run.trainer)
    assert [*shown] == ["mistakes.png", "attribution.png"]
    pixels = pixels_of(table["file"], run.images, (3, 32, 32))
    picture = draw_examples(table, ["blue", "green", "red"], run.images, run.trainer).axes[0].images[0]
    assert picture.get_array().shape == (32, 68, 3)
    assert (picture.get_array()[:, :32] == pixels[0]).all()


def make(checkpoint, **settings):
    """Return what the script's `make_model` returns for three classes: the model, whether its head is new."""
    values = {"settings": Settings(**settings), "training": SimpleNamespace(seed=1)}
    values |= {"processor": AutoImageProcessor.from_pretrained(checkpoint), "class_names": ["a", "b", "c"]}
    return story(**values)["make_model"](str(checkpoint))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_all_that_the_logits_depend_on_or_the_head_alone(tmp_path, kind):
    """Processes wait for the gradient of all that is not frozen."""
    checkpoint = write_checkpoint(tmp_path, kind)
    model, new_head = make(checkpoint)
    model.train()(pixel_values=torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).logits.square().sum().backward()
    for name, weights in model.named_parameters():
        assert weights.requires_grad is (weights.grad is not None), name
    frozen = [name for name, weights in model.named_parameters() if not weights.requires_grad]
    assert bool(frozen) is (kind in ("dinov2", "dinov2_with_registers", "beit", "siglip"))
    assert new_head and isinstance(model.classifier, torch.nn.Linear)
    probed, _ = make(checkpoint, freeze_backbone=True)
    trained = [name for name, weights in probed.named_parameters() if weights.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_fall_from_block_to_block_or_from_stage_to_stage(tmp_path, kind):
    model, _ = make(write_checkpoint(tmp_path, kind))
    training = TrainingArguments(str(tmp_path), learning_rate=1.0, report_to="none")
    groups = layerwise_optimizer(model, training, 0.5)[1]["params"]
    rates = {weights: group["lr"] for group in groups for weights in group["params"]}
    for name, weights in model.named_parameters():
        if weights.requires_grad:
            number = re.search(r"[.](?:layer|layers|stages)[.](\d)[.]", name)
            depth = int(number[1]) + 1 if number else 0 if "embeddings" in name else 3
            assert rates.pop(weights) == 0.5 ** (3 - depth), name
    assert not rates


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_knows_whether_the_loss_counts_accumulated_images(tmp_path, kind):
    """Or the losses of accumulated steps would be added up."""
    model, _ = make(write_checkpoint(tmp_path, kind))
    rows = {"pixel_values": torch.zeros(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    mean, of_eight = (model.eval()(**rows, **more).loss.item() for more in ({}, {"num_items_in_batch": 8}))
    assert of_eight == pytest.approx(mean / 2 if getattr(model, "accepts_loss_kwargs", True) else mean)


@pytest.mark.parametrize("kind, other", [
    ("deit", "DeiTForImageClassificationWithTeacher"), ("beit", "BeitForMaskedImageModeling"),
    ("dinov2", "Dinov2Model"), ("swin", "SwinForMaskedImageModeling"), ("siglip", "SiglipModel"),
])  # fmt: skip
def test_a_checkpoint_for_another_task_lends_its_body(tmp_path, kind, other):
    write_checkpoint(tmp_path, kind)
    texts = {"text_config": BODY | {"vocab_size": 9, "projection_size": 16}} if kind == "siglip" else {}
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind][0] | texts)
    source = getattr(transformers, other)(config)
    source.save_pretrained(tmp_path)
    check_checkpoint(str(tmp_path))
    model, new_head = make(tmp_path)
    assert new_head and model.classifier.out_features == 3
    body = {name.removeprefix(f"{kind}."): weights for name, weights in source.state_dict().items()}
    for name, weights in model.state_dict().items():
        if not name.startswith(("classifier.", "beit.pooler.")):
            assert torch.equal(weights, body[name.removeprefix(f"{kind}.")]), name


def test_activations_are_not_computed_again_where_the_type_cannot(tmp_path):
    flags = [
        "--model_name_or_path",
        write_checkpoint(tmp_path, "convnext"),
        "--gradient_checkpointing",
        "true",
    ]
    with pytest.raises(SystemExit, match="--gradient_checkpointing is not for a convnext; leave it out"):
        choose_checkpoint(make_work([*flags, "--output_dir", tmp_path / "model", "--report_to", "none"]))
