"""Web page that tries a fine-tuned image classifier: `python app.py`, or as a Space of the Hub."""

import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what is shown here is nobody else's business

import gradio as gr
from transformers import pipeline

MODEL = ""  # its name on the Hub; if empty, the folder whose report this lies in
REVISION = None  # branch there
EXAMPLES = Path(__file__).resolve().parent / "examples"
WARNING = """For research and teaching. **Not a medical device: do not use it to diagnose, to treat or to
triage anyone.** It answers with one of its classes whatever it is shown."""


def build_page(model: str, revision: str | None = None) -> gr.Interface:
    """Return the page of the model in a folder or on the Hub."""
    classifier = pipeline("image-classification", model, revision=revision)
    names = list(classifier.model.config.id2label.values())

    def classify(image: str | None) -> dict[str, float]:
        if image is None:
            raise gr.Error("Choose an image first.", print_exception=False)
        try:
            answers = classifier(image, top_k=len(names))
        except (OSError, ValueError) as problem:  # Pillow's
            raise gr.Error("This file cannot be read as an image.", print_exception=False) from problem
        return {answer["label"]: answer["score"] for answer in answers}

    upload = gr.Image(type="filepath", label="image", sources=["upload", "clipboard"])
    upload.preprocess = lambda file: file and file.path  # its own ends in a traceback on what is no image
    examples = sorted(map(str, EXAMPLES.glob("*.jpg")))
    return gr.Interface(
        classify,
        upload,
        gr.Label(label="probabilities", num_top_classes=min(len(names), 10)),
        title=Path(model).name,
        description=WARNING,
        article=f"{len(names)} classes: {', '.join(names)}." + " The examples are drawn." * bool(examples),
        examples=examples or None,
        example_labels=[Path(example).stem for example in examples] or None,
        cache_examples=False,
        flagging_mode="never",  # it would keep the images
    )


if __name__ == "__main__":
    build_page(MODEL or str(Path(__file__).resolve().parents[2]), REVISION).launch()
