"""Make data/finetune_vit.ipynb, which Colab opens, of finetune_vit.py: `python tests/make_notebook.py`.

The owner of the repository stands in one place, REPOSITORY in finetune_vit.py. The addresses in README.md and
README.tr.md, first of all that of the Colab badge, are written anew from it.
"""

import re
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "finetune_vit.py"
NOTEBOOK = ROOT / "data" / "finetune_vit.ipynb"
READMES = ROOT / "README.md", ROOT / "README.tr.md"


def make_notebook():
    """Return the notebook as text, the same each time, with a table of contents after the title.

    Colab goes to a cell by #scrollTo= and the cell's id, and knows no other anchors. Jupyter makes anchors of
    titles, but does not find one with a · in it. So each step gets an anchor that suits both.
    """
    notebook, contents = jupytext.read(SCRIPT), []
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if title := re.match(r"## ((\d+) · .+)", cell.source):
            cell.id = cell.metadata["id"] = f"step-{title[2]}"  # Colab reads the one in the metadata
            cell.source = f'<div id="scrollTo={cell.id}"></div>\n\n{cell.source}'
            contents.append(f"[{title[1]}](#scrollTo={cell.id})")
    table = nbformat.v4.new_markdown_cell(f"**Contents:** {' | '.join(contents)}", id="contents")
    notebook.cells.insert(1, table)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"accelerator": "GPU", "kernelspec": kernel})
    return nbformat.writes(notebook) + "\n"


def make_readme(text):
    """Return the text of a README with the repository's address, in the Colab badge and elsewhere."""
    repository = re.search(r'^REPOSITORY = "https://github\.com/(.+)"', SCRIPT.read_text("utf-8"), re.M)[1]
    text = re.sub(r"(colab\.research\.google\.com/github)/[^/]+/[^/]+", rf"\1/{repository}", text)
    return re.sub(r"(https://github\.com)/[\w.-]+/finetune_vit\b", rf"\1/{repository}", text)


if __name__ == "__main__":
    NOTEBOOK.write_text(make_notebook(), encoding="utf-8")
    for path in READMES:
        path.write_text(make_readme(path.read_text("utf-8")), encoding="utf-8")
