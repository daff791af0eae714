"""Make data/finetune_vit.ipynb, which Colab opens, of finetune_vit.py: `python tests/make_notebook.py`."""

from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "data" / "finetune_vit.ipynb"


def make_notebook():
    """Return the notebook as text, the same each time."""
    notebook = jupytext.read(ROOT / "finetune_vit.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"accelerator": "GPU", "kernelspec": kernel})
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(make_notebook(), encoding="utf-8")
