"""Step 9: what decides an answer is found, whatever the type of the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_architectures import KINDS, write_checkpoint
from transformers import ViTImageProcessor

from steps.attribution import attribute, blur, log_odds
from steps.model import normalise_on_device
from steps.use import load_classifier

SIDE = 16  # of a patch, in pixels of 64


def draw_patches(count, rng):
    """Grey, black on the left, with a patch whose colour is the class, and its corner; class 3 has none."""
    pixels = rng.integers(60, 200, (count, 1, 64, 64)) + rng.integers(-9, 9, (count, 3, 64, 64))
    pixels[..., :20] = 3
    labels, corners = rng.integers(0, 4, count), rng.integers(0, 64 - SIDE, (count, 2))
    for image, label, (top, left) in zip(pixels, labels, corners, strict=True):
        if label < 3:
            image[:, top : top + SIDE, left : left + SIDE] = 30
            image[label, top : top + SIDE, left : left + SIDE] = 240
    return torch.tensor(pixels.astype(np.uint8)), torch.tensor(labels), corners


class Reader(torch.nn.Module):
    """A model that looks for the most coloured place, of red, green or blue, and says 3 if it is grey."""

    device = torch.device("cpu")

    def forward(self, pixel_values):
        tint = pixel_values - (pixel_values.sum(1, keepdim=True) - pixel_values) / 2
        strongest = F.avg_pool2d(tint, 8, 4).amax((2, 3))
        return SimpleNamespace(logits=torch.cat([20 * strongest, torch.full((len(tint), 1), 10.0)], dim=1))


@pytest.fixture
def reader():
    model = Reader()
    normalise_on_device(model, ViTImageProcessor())
    return model


def test_the_patch_that_decides_is_found(reader):
    pixels, labels, corners = draw_patches(80, np.random.default_rng(1))
    right = (reader(pixel_values=pixels).logits.argmax(1) == labels).numpy()
    assert right.mean() > 0.9
    shown = right & (labels < 3).numpy()
    maps = attribute(reader, pixels[shown])
    tops = 4 * np.stack(np.unravel_index(maps.flatten(1).argmax(1).numpy(), (16, 16)), axis=1) + 2
    found = ((corners[shown] <= tops) & (tops < corners[shown] + SIDE)).all(1)
    assert found.mean() >= 0.9


def test_a_black_frame_adds_nothing(reader):
    pixels, labels, corners = draw_patches(20, np.random.default_rng(3))
    beside = (corners[:, 1] >= 24) & (labels < 3).numpy()
    maps = attribute(reader, pixels[beside])
    assert (maps[:, :, :4] == 0).all() and (maps.amax((1, 2)) > 0).all()


def test_a_map_adds_up_to_what_the_detail_changes(reader):
    pixels, _, _ = draw_patches(3, np.random.default_rng(2))
    for image, found in zip(pixels, attribute(reader, pixels), strict=True):
        both = torch.stack([blur(image[None].float())[0], image.float()])
        inputs = (both - reader.pixel_mean) / reader.pixel_std
        guess = reader(pixel_values=inputs).logits[1:].argmax(1)
        before, after = log_odds(reader, inputs, guess).detach()
        assert found.sum() == pytest.approx(float(after - before), rel=0.15, abs=0.1)


def test_log_odds_are_those_of_the_softmax(reader):
    pixels = torch.rand(4, 3, 64, 64)
    chances = reader(pixel_values=pixels).logits.softmax(1)[:, 1]
    found = log_odds(reader, pixels, torch.tensor([1])).detach()
    assert found.numpy() == pytest.approx(torch.logit(chances).detach().numpy(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_model_has_a_map(tmp_path, kind):
    model, _ = load_classifier(str(write_checkpoint(tmp_path, kind)))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    maps = attribute(model, pixels)
    assert maps.shape == (2, 16, 16) and maps.dtype == torch.float32 and maps.abs().sum() > 0
    one = attribute(model, pixels[1:])
    assert torch.allclose(one, maps[1:]) and all(weights.grad is None for weights in model.parameters())
