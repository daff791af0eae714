"""The same file as a notebook: converted by jupytext and run from top to bottom in a real kernel."""

import base64
import io
import json
import re
import subprocess

import nbclient
import nbformat
import pytest
from conftest import ROOT
from make_notebook import NOTEBOOK, make_notebook
from PIL import Image

from finetune_vit import KVASIR_URL, REPOSITORY


def test_notebook_is_that_of_the_script():
    """It is made by `python tests/make_notebook.py`; the badge in the README opens it."""
    assert NOTEBOOK.read_text(encoding="utf-8") == make_notebook()
    badge = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    for readme in ("README.md", "README.tr.md"):
        assert f"({badge}/blob/main/data/finetune_vit.ipynb)" in (ROOT / readme).read_text(encoding="utf-8")


def test_steps_have_titles_and_short_prose(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [re.match(r"##+ (\d+|Elsewhere)", text)[1] for text in prose[1:]]
    assert titles == [*map(str, range(9)), "Elsewhere", "9", "10", "11"]
    assert all(len(text.splitlines()) <= 7 for text in prose[1:])  # a title and six lines at most
    code = "\n\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for block in re.findall(r"^if (?:RUN|TRAIN)\b.*\n((?:    .*\n?)+)", code, re.M)[1:]:
        assert len(block.splitlines()) <= 6, block


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook, folder=NOTEBOOK.parent):
    """In the folder of the notebook, as Jupyter does."""
    place = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_notebook_that_comes_alone_fetches_the_rest_once(notebook, tmp_path):
    """As on Colab, where it has no neighbours; the second time the kernel was restarted."""
    (tmp_path / "finetune_vit").mkdir()
    (tmp_path / "finetune_vit" / "requirements.txt").write_text("numpy\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all of it"]):
        subprocess.run(["git", *command], cwd=tmp_path / "finetune_vit", check=True)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    cells[0].source = cells[0].source.replace(REPOSITORY, str(tmp_path / "finetune_vit"))
    cells[0].source += "\nprint(os.getcwd())"
    notebook.cells, place = cells, tmp_path / "content"
    place.mkdir()
    for _ in range(2):
        run(notebook, place)
        assert outputs(notebook)[-1]["text"].strip() == str(place / "finetune_vit")


def test_defaults_apply_and_the_kernels_own_arguments_are_ignored(notebook):
    cells = notebook.cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith("## 1 "))
    notebook.cells = cells[:start]
    notebook.cells[-1].source += "\nprint(settings.data_url, training.num_train_epochs, sys.argv)"
    run(notebook)
    text = outputs(notebook)[-1]["text"]
    assert text.startswith(f"{KVASIR_URL} 4.0 ") and ".json" in text  # the kernel's connection file


def test_notebook_runs_on_the_sample(notebook, tmp_path):
    flags = ["--config", "data/sample.yaml", "--num_train_epochs", "1"]
    flags += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model")]
    for cell in notebook.cells:
        cell.source = cell.source.replace("ARGUMENTS = [] if", f"ARGUMENTS = {flags} if")
    run(notebook)
    tables = [output for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert len([table for table in tables if "esophagitis" in table["data"]["text/html"]]) >= 2
    pictures = [
        output["data"]["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 9  # examples, prepared; curves, confusion matrix, classes, reliability, galleries
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).width >= 800
    text = "".join(output.get("text", "") for output in outputs(notebook))
    assert "epoch 1 of 1: training loss" in text and "test accuracy 0." in text
    results = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    assert results["settings"]["num_train_epochs"] == 1
