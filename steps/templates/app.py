"""Web page to try a fine-tuned image classifier: `python app.py`, or as a Space of the Hub."""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def ask_this_machine_directly() -> None:
    """Keep requests to this machine away from proxies, or Gradio cannot find its own page."""
    for name in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(name)
        os.environ[name] = ",".join([*filter(None, [known]), "localhost", "127.0.0.1", "::1", "0.0.0.0"])
    if not importlib.util.find_spec("socksio"):  # then httpx refuses every request
        for name, value in list(os.environ.items()):
            if name.lower().endswith("_proxy") and value.startswith("socks"):
                del os.environ[name]


ask_this_machine_directly()  # first: Gradio makes a client as it is imported
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # what is shown here is nobody else's business
UPLOADS = tempfile.TemporaryDirectory()  # and gone at the end; Gradio's own folder may be another user's
os.environ.setdefault("GRADIO_TEMP_DIR", UPLOADS.name)

import gradio as gr
import PIL.Image
from transformers import pipeline

HERE = Path(__file__).resolve().parent
MOST = 40  # classes that the page names
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
            with PIL.Image.open(image) as opened:
                deep = opened.mode[0] in "IF"  # I, I;16 and F
            answers = [] if deep else classifier(image, top_k=len(names))
        except (OSError, ValueError) as problem:  # Pillow's
            raise gr.Error("This file cannot be read as an image.", print_exception=False) from problem
        if deep:
            raise gr.Error("This image has more than 8 bits per channel: convert it.", print_exception=False)
        return {answer["label"]: answer["score"] for answer in answers}

    # In Markdown a sign can mean something else; an entity such as &#124; never does.
    special = r"[^\w .,()-]|(?<![^\W_])_|_(?![^\W_])"
    shown = [re.sub(special, lambda sign: f"&#{ord(sign[0])};", name) for name in names[:MOST]]
    more = f" and {len(names) - MOST:,} more" if len(names) > MOST else ""
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
        article=f"{len(names):,} classes: {', '.join(shown)}{more}.{note}",
        examples=examples or None,
        example_labels=[Path(example).stem for example in examples] or None,
        cache_examples=False,
        flagging_mode="never",  # it would keep the images
    )


def serve(page: gr.Interface, share: bool = False) -> None:
    """Open the page, with `share` at a public address, too, until Ctrl-C. Raises SystemExit if that fails."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio's lines, on the options of its own
            _, local, public = page.launch(share=share or None, quiet=True, prevent_thread_lock=True)
    except Exception as problem:  # of many kinds: ports, settings in the environment
        line = str(problem).strip().partition("\n")[0] or type(problem).__name__
        sys.exit(f"error: the page cannot be opened: {line}; fix that, or set another GRADIO_SERVER_PORT")
    if share and not public:
        page.close()
        sys.exit("error: Gradio's server gave no public link; check the network, or leave --demo_share out")
    print("page:", ", public link: ".join(filter(None, [local, public])), flush=True)
    if "ipykernel" not in sys.modules:  # a notebook goes on
        page.block_thread()


if __name__ == "__main__":
    chosen = json.loads((HERE / "model.json").read_text(encoding="utf-8"))  # its name and branch on the Hub
    serve(build_page(chosen["model"] or str(HERE.parents[1]), chosen["revision"]))
