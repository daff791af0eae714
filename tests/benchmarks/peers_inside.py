"""What `peers.py` runs in the Python of another program: `python peers_inside.py FUNCTION WORD ...`."""

import json
import sys
from pathlib import Path

import pandas as pd
import torch

TIMM_NAMES = {  # what timm calls the weights of a ViT, replaced in this order
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",
    "layers.": "blocks.",
    "attention.o_proj": "attn.proj",
    "attention.": "attn.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm.": "norm.",
}


def answer_transformers(model: str, images: str, results: str) -> None:
    """Classify a folder by the saved model and its own image processor."""
    from transformers import pipeline

    files = sorted(map(str, Path(images).glob("*/*")))
    classify = pipeline("image-classification", model)
    answers = classify(files, top_k=classify.model.config.num_labels, batch_size=8)
    rows = [{f"prob_{int(one['label'])}": one["score"] for one in answer} for answer in answers]
    pd.DataFrame(rows, [Path(file).name for file in files]).to_csv(results)


def write_timm_weights(model: str, name: str, folder: str) -> None:
    """Write a ViT of transformers in timm's form; its features must be the same to 1e-4."""
    import timm
    from transformers import ViTModel

    vit = ViTModel.from_pretrained(model, add_pooling_layer=False, dtype=torch.float32).eval()
    size = vit.config.image_size
    other = timm.create_model(name, img_size=size, num_classes=0).eval()
    weights = {key: torch.ones_like(one) for key, one in other.state_dict().items() if "gamma" in key}
    for key, tensor in vit.state_dict().items():
        for ours, theirs in TIMM_NAMES.items():
            key = key.replace(ours, theirs)
        weights[key] = tensor
    for number in range(vit.config.num_hidden_layers):  # timm has one matrix for query, key and value
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"blocks.{number}.attn.{one}_proj.{kind}") for one in "qkv"]
            weights[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    other.load_state_dict(weights)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        difference = (vit(pixels).last_hidden_state - other.forward_features(pixels)).abs().max().item()
    if difference > 1e-4:
        raise ValueError(f"the features of timm's model differ by {difference}")
    print(f"largest difference of a feature: {difference:.1e}")
    Path(folder).mkdir()
    torch.save(weights, Path(folder, "pytorch_model.bin"))
    usual = {key: other.pretrained_cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    config = {"architecture": "same_vit", "num_features": other.num_features, "input_size": [3, size, size]}
    Path(folder, "config.json").write_text(json.dumps(config | usual))


def fit_autogluon(images: str, weights: str, name: str, epochs: str, precision: str, folder: str) -> None:
    """The lines of AutoGluon's documentation, with its own defaults but for model, epochs and precision."""
    import timm
    from autogluon.multimodal import MultiModalPredictor

    size = json.loads(Path(weights, "config.json").read_text())["input_size"][-1]

    def same_vit(**values):  # AutoGluon passes no size, and timm's own is 518 pixels
        return timm.create_model(name, img_size=size, **values)

    timm.models.register_model(same_vit)
    parts = {}
    for split in ("train", "validation", "test"):
        files = sorted(Path(images, split).glob("*/*"))
        labels = [int(file.parent.name) for file in files]
        parts[split] = pd.DataFrame({"image": [str(file) for file in files], "label": labels})
    predictor = MultiModalPredictor(label="label", problem_type="multiclass", path=f"{folder}/run")
    hyperparameters = {
        "model.names": ["timm_image"],
        "model.timm_image.checkpoint_name": weights,
        "optim.max_epochs": int(epochs),
        "env.precision": {"bf16": "bf16-mixed", "float32": "32-true"}[precision],
    }
    print("fit begins")
    predictor.fit(parts["train"], tuning_data=parts["validation"], hyperparameters=hyperparameters)
    print("fit ended")
    chances = predictor.predict_proba(parts["test"]).add_prefix("prob_")
    chances.index = [Path(file).name for file in parts["test"]["image"]]
    chances.to_csv(f"{folder}/answers.csv")


if __name__ == "__main__":
    FUNCTIONS = {one.__name__: one for one in (answer_transformers, write_timm_weights, fit_autogluon)}
    FUNCTIONS[sys.argv[1]](*sys.argv[2:])
