"""Write a DINOv2 checkpoint as one of the type `vit`.

    python tests/benchmarks/dinov2_to_vit.py facebook/dinov2-small my-dinov2 [98]

The outputs stay the same. A ViT has no LayerScale, so its factors go into the layer before it, and the
positions are interpolated once to those of 224 pixels, or as many as given, as DINOv2 does at every step.
"""

import sys

import torch
from transformers import Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

NAMES = {"encoder.layer.": "layers.", ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after."}


def convert(dinov2: Dinov2Model, size: int = 224) -> ViTForImageClassification:
    """Return a ViT whose class token, after the last norm, is that of `dinov2` on images of `size` pixels."""
    theirs = dinov2.config
    if theirs.use_swiglu_ffn:
        raise SystemExit("error: the giant DINOv2 has another kind of layer; use small, base or large")
    config = ViTConfig(
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        intermediate_size=theirs.hidden_size * theirs.mlp_ratio,
        layer_norm_eps=theirs.layer_norm_eps,
        patch_size=theirs.patch_size,
        image_size=size,
    )
    weights = dict(dinov2.state_dict())
    for name in [name for name in weights if "layer_scale" in name]:
        scale, layer = weights.pop(name), name.split(".layer_scale")[0]
        dense = f"{layer}.attention.o_proj" if "layer_scale1" in name else f"{layer}.mlp.fc2"
        weights[f"{dense}.weight"] = weights[f"{dense}.weight"] * scale[:, None]
        weights[f"{dense}.bias"] = weights[f"{dense}.bias"] * scale
    weights.pop("embeddings.mask_token", None)
    patches = torch.empty(1, 1 + (size // theirs.patch_size) ** 2, theirs.hidden_size)
    positions = dinov2.embeddings.interpolate_pos_encoding(patches, size, size)
    weights["embeddings.position_embeddings"] = positions.detach()
    for old, new in NAMES.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    vit = ViTForImageClassification(config)
    vit.vit.load_state_dict(weights)
    return vit


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    source, folder, size = *sys.argv[1:3], int((*sys.argv, 224)[3])
    convert(Dinov2Model.from_pretrained(source, dtype=torch.float32), size).save_pretrained(folder)
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ViTImageProcessor(size={"height": size, "width": size}, resample=3, **means).save_pretrained(folder)
