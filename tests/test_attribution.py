"""Step 9: what decides an answer is found, whatever the type of the model."""

import numpy as np
import pytest
import torch
from test_architectures import KINDS, write_checkpoint
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from steps.attribution import attribute, blur, log_odds
from steps.model import normalise_on_device
from steps.use import load_classifier

SIDE = 16  # of a patch, in pixels of 64


def draw_patches(count, rng):
    """Grey noise, black on the left, a patch whose colour is the class, its corner; class 3 has none."""
    pixels = rng.integers(60, 200, (count, 1, 64, 64)) + rng.integers(-9, 9, (count, 3, 64, 64))
    pixels[..., :20] = 3
    labels, corners = rng.integers(0, 4, count), rng.integers(0, 64 - SIDE, (count, 2))
    for image, label, (top, left) in zip(pixels, labels, corners, strict=True):
        if label < 3:
            image[:, top : top + SIDE, left : left + SIDE] = 30
            image[label, top : top + SIDE, left : left + SIDE] = 240
    return torch.tensor(pixels.astype(np.uint8)), torch.tensor(labels), corners


@pytest.fixture(scope="module")
def trained():
    """A ViT that has learned to read the colour of the patch."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64,
        patch_size=8, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rng = ViTForImageClassification(config), np.random.default_rng(0)
    normalise_on_device(model, ViTImageProcessor())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(200):
        pixels, labels, _ = draw_patches(24, rng)
        loss = model.train()(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    return model


def test_the_patch_that_decides_is_found(trained):
    pixels, labels, corners = draw_patches(80, np.random.default_rng(1))
    right = (trained.eval()(pixel_values=pixels).logits.argmax(1) == labels).numpy()
    assert right.mean() > 0.9
    shown = right & (labels < 3).numpy()
    maps = attribute(trained, pixels[shown])
    tops = 4 * np.stack(np.unravel_index(maps.flatten(1).argmax(1).numpy(), (16, 16)), axis=1) + 2
    found = ((corners[shown] <= tops) & (tops < corners[shown] + SIDE)).all(1)
    assert found.mean() >= 0.9


def test_a_map_adds_up_to_what_the_detail_changes(trained):
    pixels, _, _ = draw_patches(3, np.random.default_rng(2))
    for image, found in zip(pixels, attribute(trained, pixels), strict=True):
        both = torch.stack([blur(image[None].float())[0], image.float()])
        inputs = (both - trained.pixel_mean) / trained.pixel_std
        guess = trained(pixel_values=inputs).logits[1:].argmax(1)
        before, after = log_odds(trained, inputs, guess).detach()
        assert found.sum() == pytest.approx(float(after - before), rel=0.15, abs=0.1)


def test_log_odds_are_those_of_the_softmax(trained):
    pixels = torch.rand(4, 3, 64, 64)
    chances = trained(pixel_values=pixels).logits.softmax(1)[:, 1]
    found = log_odds(trained, pixels, torch.tensor([1])).detach()
    assert found.numpy() == pytest.approx(torch.logit(chances).detach().numpy(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_model_has_a_map(tmp_path, kind):
    model, _ = load_classifier(str(write_checkpoint(tmp_path, kind)))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    maps = attribute(model, pixels)
    assert maps.shape == (2, 16, 16) and maps.dtype == torch.float32 and maps.abs().sum() > 0
    one = attribute(model, pixels[1:])
    assert torch.allclose(one, maps[1:]) and all(weights.grad is None for weights in model.parameters())
