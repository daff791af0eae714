"""Step 6: float32 weights, a head for our classes, pixels normalised in one place."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from finetune_vit import load_model

NAMES = ["blue", "green", "red"]


@pytest.fixture
def processor(tiny_vit):
    return ViTImageProcessor.from_pretrained(tiny_vit)


def load(checkpoint, processor, names=NAMES, seed=42):
    return load_model(str(checkpoint), names, processor, seed)


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
    again = load(tmp_path, processor, names, seed=3)
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
