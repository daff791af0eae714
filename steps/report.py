"""Step 9: the model card, written from the run's own numbers, and the model's web page."""

import re
import shlex
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any

import matplotlib
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from .console import NOTEBOOK, log, show_picture
from .files import atomic, read_json, write_json, write_text
from .lettering import fonts_for
from .load import KVASIR
from .options import SHOWN
from .scores import worst_classes
from .split import rarest_classes
from .workspace import HERE, SAMPLE, Workspace

# In a name: signs of Markdown, HTML and TeX, blanks that would be lost, _ at the ends of words.
SPECIAL = re.compile(r"[!-&*:<-@[-^`{-~]|[^\S ]|[\0-\x1f\x7f-\x9f]|^ | (?= )| $|(?<![^\W_])_|_(?![^\W_])")
TEMPLATES = HERE / "templates"
# What card and page say of how a model was made, in this order; TUNED only if its layers were trained.
TUNED = """images_per_step min_steps learning_rate layer_decay lr_scheduler_type warmup_steps weight_decay
freeze_backbone class_weights optim metric_for_best_model""".split()
ALWAYS = "linear_probe augment bf16 fp16 seed test_size validation_size".split()


def public(value: Any) -> Any:
    """Return a setting as it may be published: a path outside this folder is cut to its last name."""
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    flag, equals, text = value.partition("=") if value.startswith("--") else ("", "", value)
    path = Path(text)
    elsewhere = path.is_absolute() or text.startswith("~") or ".." in path.parts
    return flag + equals + (path.name if elsewhere else text)


def plain_text(name: str) -> str:
    """Return a name as Markdown that shows it as it is, also in a table.

    Signs of Markdown, HTML or TeX become entities such as &#124;, which always show as text. The _ in a_word
    stays.
    """
    return SPECIAL.sub(lambda found: f"&#{ord(found[0])};", name)


def code(name: str) -> str:
    """Return a name as code in Markdown, also where it holds what would end that."""
    plain = re.fullmatch(r"[^\s`|]+( [^\s`|]+)*", name)
    return f"`{name}`" if plain else f"<code>{plain_text(name)}</code>"


def command_of(results: dict) -> str:
    """Return the command line that makes the same model and report."""
    words = list(results["settings"]["arguments"])
    later = {"cross_validate": results.get("cross_validation", {}).get("folds")}
    later |= {"external_dir": results.get("external", {}).get("folder")}
    for name, value in later.items():  # added to a finished run, perhaps; the last flag counts
        if value and str(value) != Path(str(results["settings"].get(name))).name:
            words.append(f"--{name}={value}")
    return shlex.join(["python", "finetune_vit.py", *words])


def settings_shown(results: dict) -> dict[str, Any]:
    """Return the settings that card and page show, from the content of metrics.json."""
    names = ["recipe", "num_train_epochs", *(TUNED if results["made"] == "fine-tuned" else ()), *ALWAYS]
    shown = {name: results["settings"][name] for name in names}
    return shown | {"split_by": results["split"]["by"]}


def make_model_card(results: dict, pictures: list[str], model_type: str) -> ModelCard:
    """Return the model card, in the Hub's format, with the named `pictures` of `report/`."""
    kvasir = KVASIR if results["data"]["kvasir"] else None
    base = results["settings"]["model_name_or_path"]
    names = {"data": kvasir["name"] if kvasir else results["data"]["name"], "base": Path(base).name}
    on_the_hub = "/" in base and not Path(base).exists()  # `public` has cut a folder to its name
    shown = {"accuracy": "accuracy", "macro_f1": "f1", "mcc": "matthews_correlation"}
    from_the_hub = "revision" in results["data"]
    kind = results["data"]["name"] if from_the_hub else "imagefolder"
    where = {"dataset_name": names["data"], "dataset_type": kind, "dataset_split": "test"}
    where |= {"task_type": "image-classification"}
    scores = [
        (kind, name.replace("_", " "), round(results["test"][name]["value"], 4))
        for name, kind in shown.items()
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", model_type],
        metrics=list(shown.values()),
        datasets=[kind] if from_the_hub else None,
        base_model=base if on_the_hub else None,
        model_name=f"{names['base']} {results['made']} on {names['data']}",
        eval_results=[
            EvalResult(metric_type=kind, metric_name=name, metric_value=value, **where)
            for kind, name, value in scores
        ],
    )
    if kvasir:
        card_data.license, card_data.license_name = "other", "kvasir-research-and-education"
        card_data.license_link = kvasir["homepage"]
    more = {"names": names, "kvasir": kvasir, "pictures": pictures, "command": command_of(results)}
    more |= {"model_type": model_type, "plain": plain_text, "code": code, "room": SHOWN}
    more |= {"worst": worst_classes(results["per_class"]), "settings_shown": settings_shown(results)}
    more |= {"rarest": rarest_classes(results["split"]["classes"])}
    return ModelCard.from_template(card_data, str(TEMPLATES / "model_card.md"), **more, **results)


def write_report(results: dict, figures: dict[str, Callable[[], Figure]], work: Workspace) -> None:
    """Draw the pictures that are missing and write numbers and card; a card that was edited stays."""
    if results != read_json(work.report / "metrics.json"):  # with folds and external images
        write_json(work.report / "metrics.json", results)
    style = {"text.parse_math": False, "font.family": fonts_for(results["per_class"])}  # keep $ in names
    for name, draw in figures.items():
        path = work.report / name
        if not path.exists():
            with atomic(path) as part, matplotlib.rc_context(style):
                draw().savefig(part, dpi=150)
        if NOTEBOOK:
            log.info("%s", path)
            show_picture(path.read_bytes())
    write_card(results, work)
    log.info("model and model card: %s; numbers and pictures: %s", work.output_dir, work.report)


def write_card(results: dict, work: Workspace) -> None:
    """Write report/model_card.md and, unless someone has edited it, README.md; only what has changed."""
    made, shown = work.report / "model_card.md", work.output_dir / "README.md"
    pictures = sorted(path.name for path in work.report.glob("*.png"))
    card = str(make_model_card(results, pictures, read_json(work.output_dir / "config.json")["model_type"]))
    before = made.read_bytes() if made.exists() else None
    if not shown.exists() or before == shown.read_bytes() != card.encode():
        write_text(shown, card)
    if before != card.encode():
        write_text(made, card)


def make_space(space: Path, class_names: list[str], model: str = "", revision: str | None = None) -> Path:
    """Write a model's web page into `space`, by default for the run that `space` lies in; return its path.

    `model.json` beside it says which model. Images of the drawn sample are its examples, where the sample has
    the model's classes.
    """
    app, chosen = (TEMPLATES / "app.py").read_text(encoding="utf-8"), {"model": model, "revision": revision}
    page, made = space / "app.py", space / "model.json"
    if made.exists() and read_json(made) == chosen and page.exists() and page.read_text("utf-8") == app:
        return page
    with zipfile.ZipFile(SAMPLE) if SAMPLE.exists() else nullcontext() as sample:
        names = sorted(sample.namelist()) if sample else []
        files = {PurePosixPath(name).parent.name: name for name in names}
        for name in files.keys() & set(class_names):
            (space / "examples").mkdir(parents=True, exist_ok=True)
            (space / "examples" / f"{name}.jpg").write_bytes(sample.read(files[name]))
    write_text(space / "requirements.txt", "torch>=2.6\ntransformers>=5.18\npillow>=10.3\n")
    header = {"title": Path(model).name or "Classifier", "sdk": "gradio", "app_file": "app.py"}
    header |= {"models": [model]} if model else {}
    write_text(space / "README.md", f"---\n{yaml.safe_dump(header)}---\n\nMade by `finetune_vit.py`.\n")
    write_json(made, chosen)
    write_text(page, app)
    return page
