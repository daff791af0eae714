"""The script's own code for tests and benchmarks, which cannot import it: it is a flat script."""

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from steps import settings as settings_room
from steps.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent


def story(**values):
    """Return the names of the script's first lines and functions, which cannot be imported: its own code.

    Its imports, RECIPES, make_model and fine_tune; `values` are what the cells above have set by then, such
    as settings, training, processor, class_names, shape.
    """
    kept = []
    for node in ast.parse((ROOT / "finetune_vit.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            kept.append(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node).startswith(("RECIPES", "REPOSITORY")):
            kept.append(node)
    names = {"__file__": str(ROOT / "finetune_vit.py")}
    exec(compile(ast.Module(kept, []), "finetune_vit.py", "exec"), names)
    names.update(values)  # the functions look their globals up here
    return names


RECIPES, REPOSITORY = (story()[name] for name in ("RECIPES", "REPOSITORY"))


def read_settings(flags):
    """As the script does."""
    return settings_room.read_settings([str(flag) for flag in flags], RECIPES)


def make_work(flags):
    """Return the workspace of a run with these flags, without its folders."""
    settings, training = read_settings(flags)
    return Workspace(settings, training, Path(settings.data_root))


class Built(Exception):
    """Carries a Trainer out of `fine_tune`."""


def build_trainer(checkpoint, splits, training, **values):
    """Return the Trainer as `fine_tune` builds it, untrained; `values` as for `story`."""

    def leave(trainer):
        raise Built(trainer)

    names = story(training=training, patch_saving=leave, **values)  # what `fine_tune` calls once it is built
    try:
        names["fine_tune"](checkpoint, splits, training)
    except Built as built:
        return built.args[0]
