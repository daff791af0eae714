"""Step 6: float32 weights, a head for our classes, pixels normalised in one place."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import story
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTImageProcessor

from steps.model import augment
from steps.options import Settings

NAMES = ["blue", "green", "red"]


@pytest.fixture
def processor(tiny_vit):
    return ViTImageProcessor.from_pretrained(tiny_vit)


def make(checkpoint, processor, names=NAMES, seed=42, augment=""):
    """Return what the script's own `make_model` returns: the model and whether its head is new."""
    values = {"settings": Settings(augment=augment), "training": SimpleNamespace(seed=seed)}
    return story(processor=processor, class_names=names, **values)["make_model"](str(checkpoint))


def load(*args, **options):
    return make(*args, **options)[0]


def test_weights_are_float32_and_the_head_is_ours(tiny_vit, processor):
    model = load(tiny_vit, processor)  # stored in float16, for 7 classes
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    stored = ViTForImageClassification.from_pretrained(tiny_vit, dtype=torch.float32)
    for (name, ours), theirs in zip(model.vit.named_parameters(), stored.vit.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_new_head_follows_the_seed(tiny_vit, processor):
    heads = [load(tiny_vit, processor, seed=seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert 0.005 < heads[0].std() < 0.04


@pytest.mark.parametrize("names, kept", [(NAMES, True), (NAMES[::-1], False), (["a", "b", "c"], False)])
def test_a_head_is_kept_only_for_the_same_classes_in_order(tmp_path, tiny_vit, processor, names, kept):
    model = load(tiny_vit, processor)
    model.save_pretrained(tmp_path)
    again, new_head = make(tmp_path, processor, names, seed=3)
    assert new_head is not kept
    assert torch.equal(again.classifier.weight, model.classifier.weight) is kept


def test_uint8_pixels_give_what_the_processor_gives(tiny_vit, processor):
    model = load(tiny_vit, processor).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    inputs = processor(image, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected, logits = model(pixel_values=inputs).logits, model(pixel_values=pixels).logits
    assert (logits - expected).abs().max() < 1e-5
    assert (model(pixel_values=pixels.float()).logits - expected).abs().max() > 1e-3  # floats pass unchanged


@pytest.mark.parametrize("option", ["do_normalize", "do_rescale"])
def test_steps_that_the_processor_leaves_out_are_left_out(tiny_vit, option):
    processor = ViTImageProcessor.from_pretrained(tiny_vit, **{option: False})
    model = load(tiny_vit, processor)
    seen = []
    model.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = Image.new("RGB", (32, 32), (10, 100, 250))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    model(pixel_values=pixels)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(seen[0], expected.float(), atol=1e-4)


def variants(images, turns=range(4)):
    """All mirrored and turned forms of images, (mirrored, turn, ...)."""
    return torch.stack([
        torch.stack([torch.rot90(form, turn, (2, 3)) for turn in turns]) for form in (images, images.flip(3))
    ])  # fmt: skip


@pytest.mark.parametrize("kinds, mirrored, turns", [("flip", 2, 1), ("turn", 1, 4), ("flip,turn", 2, 4)])
def test_each_image_is_mirrored_and_turned_by_a_draw_of_its_own(kinds, mirrored, turns):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (160, 3, 14, 14), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):  # as when several processes train
        result = augment(images, kinds)
    assert result.dtype == torch.float32 and result.shape == images.shape
    gap = (variants(images.float()) - result).abs().amax((3, 4, 5))  # (mirrored, turn, image)
    assert (gap.flatten(0, 1).min(0).values < 0.05).all()  # of 255 grey levels
    count = (gap < 0.05).sum(2)
    assert (count[:mirrored, :turns] >= 0.6 * 160 / mirrored / turns).all()
    assert count[:mirrored, :turns].sum() == 160


def test_crops_are_squares_of_the_picture_enlarged():
    torch.manual_seed(0)
    ramp = torch.arange(224, dtype=torch.uint8).expand(200, 3, 224, 224)  # a pixel's value is its column
    result = augment(ramp, "crop")
    left, right = result[:, 0, 100, 2], result[:, 0, 100, -3]
    side = (right - left) / (224 - 5)
    assert 0.79 < side.min() < 0.82 and 0.98 < side.max() < 1.01
    assert left.min() < 4 and right.max() > 219 and (result[:, 0, 0] - result[:, 0, -1]).abs().max() < 0.1
    upright = augment(ramp.transpose(2, 3), "crop")
    assert 0.79 < ((upright[:, 0, -3, 9] - upright[:, 0, 2, 9]) / (224 - 5)).min() < 0.82


def test_colours_change_by_a_fifth_at_most():
    torch.manual_seed(0)
    grey = torch.full((300, 3, 8, 8), 100, dtype=torch.uint8)  # no saturation, no contrast: brightness alone
    result = augment(grey, "colour")
    assert (result == result[:, :1, :1, :1]).all()
    level = result[:, 0, 0, 0]
    assert 80 <= level.min() < 82 and 118 < level.max() <= 120 and 99 < level.mean() < 101
    red = torch.tensor([200, 50, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(300, 3, 8, 8)
    result = augment(red, "colour")[:, :, 0, 0]
    ratio = (result[:, 0] - result[:, 1]) / result.mean(1) / (150 / 100)
    assert 0.8 * 0.8 <= ratio.min() < 0.8 and 1.2 < ratio.max() <= 1.2 * 1.2
    assert augment(torch.full_like(grey, 255), "colour").max() == 255


def test_images_vary_while_the_model_trains_and_only_then(tiny_vit, processor):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    varied = load(tiny_vit, processor, augment="flip,turn,crop,colour")
    plain, seen = load(tiny_vit, processor), []
    varied.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for model, training in ((varied, True), (varied, True), (varied, False), (plain, True)):
        torch.manual_seed(0)
        model.train(training)(pixel_values=pixels)
    first, second, evaluated, untouched = seen
    assert torch.equal(first, second)  # the same draws from the same seed
    assert (first - untouched).abs().mean() > 0.1 and torch.equal(evaluated, untouched)


def test_normalisation_is_not_saved_with_the_weights(tmp_path, tiny_vit, processor):
    load(tiny_vit, processor).save_pretrained(tmp_path)
    loading = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_a_pickled_checkpoint_is_refused(tmp_path, tiny_vit, processor):
    model = load(tiny_vit, processor)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path, processor)


@pytest.mark.parametrize("damage", ["other names", "another size"])
def test_weights_that_are_not_the_models_are_refused(tmp_path, tiny_vit, processor, damage):
    """Drawn at random instead, they would train to a poor score without a word."""
    shutil.copytree(tiny_vit, tmp_path / "odd")
    if damage == "other names":
        weights = load_file(tiny_vit / "model.safetensors")
        save_file(
            {f"x{name}": weight for name, weight in weights.items()}, tmp_path / "odd/model.safetensors"
        )
    else:
        config = json.loads((tmp_path / "odd" / "config.json").read_text())
        (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        SystemExit, match="odd are not those of its config.json: vit.* is missing or of"
    ) as stop:
        load(tmp_path / "odd", processor)
    assert "\n" not in str(stop.value)


def unnamed(tiny_vit, folder, head):
    """A checkpoint for three classes without names, whose weights have a head or none; and that head."""
    model = ViTForImageClassification.from_pretrained(tiny_vit, num_labels=3, ignore_mismatched_sizes=True)
    weights = model.state_dict()
    model.save_pretrained(
        folder, state_dict=weights if head else {n: w for n, w in weights.items() if "class" not in n}
    )
    return weights["classifier.weight"]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["a", "b", "c"]])
def test_a_head_whose_classes_have_no_names(tmp_path, tiny_vit, processor, caplog, head, names):
    """It is kept where folders are called so, too; else it is said that it was there. A body has no head."""
    weight = unnamed(tiny_vit, tmp_path, head)
    model, new_head = story(
        settings=Settings(), training=SimpleNamespace(seed=1), processor=processor, class_names=names
    )["make_model"](str(tmp_path))
    kept = head and names[0] == "LABEL_0"
    assert new_head is not kept and torch.equal(model.classifier.weight, weight) is kept
    line = f"the 3 classes of the head in {tmp_path} have no names, so a new head is made; to keep the old"
    said = line in caplog.text
    assert said is (head and not kept)


def test_a_finished_head_that_is_missing_is_not_drawn_anew(tmp_path, tiny_vit, processor):
    load(tiny_vit, processor).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="classifier.weight is missing"):
        load(tmp_path, processor)
