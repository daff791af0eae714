"""README's way to a DINOv2: the ViT that comes out of it gives the same features, and the script takes it."""

import subprocess
import sys

import torch
from conftest import ROOT, make_work
from transformers import Dinov2Config, Dinov2Model, ViTForImageClassification

from steps.workspace import choose_checkpoint


def test_a_dinov2_becomes_a_vit_of_the_same_outputs(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=518, patch_size=14
    )
    dinov2 = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in dinov2.parameters():
            parameter.normal_(std=0.3)  # no weight, bias or LayerScale at its neutral value
    dinov2.save_pretrained(tmp_path / "dinov2")
    command = [sys.executable, "tests/benchmarks/dinov2_to_vit.py", tmp_path / "dinov2", tmp_path / "vit"]
    subprocess.run(command, cwd=ROOT, check=True)
    vit = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, found = (model(pixels).last_hidden_state for model in (dinov2, vit.vit))
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    work = make_work(["--data_dir", tmp_path, "--model_name_or_path", tmp_path / "vit",
                      "--output_dir", tmp_path.parent / "model"])  # fmt: skip
    assert choose_checkpoint(work) == str(tmp_path / "vit")
