"""Web page to try a fine-tuned image classifier: `python app.py`, or as a Space of the Hub."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what is shown here is nobody else's business

import gradio as gr
from transformers import pipeline

HERE = Path(__file__).resolve().parent
WARNING = """For research and teaching. **Not a medical device: do not use it to diagnose, to treat or to
triage anyone.** It answers with one of its classes whatever it is shown."""


def build_page(model: str, revision: str | None = None, names: Sequence[str] = ()) -> gr.Interface:
    """Return the page of the model in a folder or on the Hub; `names` of its classes if its own repeat."""
    classifier = pipeline("image-classification", model, revision=revision)
    names = names or list(classifier.model.config.id2label.values())
    classifier.model.config.id2label = dict(enumerate(names))

    def classify(image: str | None) -> dict[str, float]:
        if image is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        try:
            answers = classifier(image, top_k=len(names))
        except (OSError, ValueError) as problem:  # Pillow's
            raise gr.Error("This file cannot be read as an image.", print_exception=False) from problem
        return {answer["label"]: answer["score"] for answer in answers}

    # In Markdown a sign can mean something else; an entity such as &#124; never does.
    special = r"[^\w .,()-]|(?<![^\W_])_|_(?![^\W_])"
    shown = (re.sub(special, lambda sign: f"&#{ord(sign[0])};", name) for name in names)
    upload = gr.Image(type="filepath", label="image", sources=["upload", "clipboard"])
    upload.preprocess = lambda file: file and file.path  # Gradio's ends in a traceback if it is no image
    examples = sorted(map(str, (HERE / "examples").glob("*.jpg")))
    note = " The examples are drawings." if examples else ""
    return gr.Interface(
        classify,
        upload,
        gr.Label(label="probabilities", num_top_classes=min(len(names), 10)),
        title=Path(model).name,
        description=WARNING,
        article=f"{len(names)} classes: {', '.join(shown)}.{note}",
        examples=examples or None,
        example_labels=[Path(example).stem for example in examples] or None,
        cache_examples=False,
        flagging_mode="never",  # it would keep the images
    )


if __name__ == "__main__":
    chosen = json.loads((HERE / "model.json").read_text(encoding="utf-8"))  # its name and branch on the Hub
    build_page(chosen["model"] or str(HERE.parents[1]), chosen["revision"]).launch()
