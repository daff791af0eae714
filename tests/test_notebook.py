"""The same file as a notebook: converted by jupytext and run from top to bottom in a real kernel."""

import json

import jupytext
import nbclient
import pytest
from conftest import ROOT

from finetune_vit import KVASIR_URL


def test_script_converts_to_a_notebook_and_back():
    notebook = jupytext.read(ROOT / "finetune_vit.py")
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [text.splitlines()[0] for text in prose[1:]]
    steps = [f"## {step} " for step in range(10)]
    assert [title[:5] for title in titles] == [*steps[:9], "### E", steps[9]]
    assert all(len(text.splitlines()) <= 7 for text in prose[1:])  # a title and six lines at most
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "\n\n\n".join(code).count("\nif RUN") == 12


@pytest.fixture
def notebook():
    return jupytext.read(ROOT / "finetune_vit.py")


def run(notebook):
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_defaults_apply_and_the_kernels_own_arguments_are_ignored(notebook):
    cells = notebook.cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith("## 1 "))
    notebook.cells = cells[:start]
    notebook.cells[-1].source += "\nprint(settings.data_url, training.num_train_epochs, sys.argv)"
    run(notebook)
    text = outputs(notebook)[-1]["text"]
    assert text.startswith(f"{KVASIR_URL} 5.0 ") and ".json" in text  # the kernel's connection file


def test_notebook_runs_on_the_sample(notebook, tmp_path):
    flags = ["--config", "data/sample.yaml", "--num_train_epochs", "1"]
    flags += ["--data_root", str(tmp_path / "data"), "--output_dir", str(tmp_path / "model")]
    for cell in notebook.cells:
        cell.source = cell.source.replace("ARGUMENTS = [] if", f"ARGUMENTS = {flags} if")
    run(notebook)
    tables = [output for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert len([table for table in tables if "esophagitis" in table["data"]["text/html"]]) >= 2
    text = "".join(output.get("text", "") for output in outputs(notebook))
    assert "epoch 1 of 1: training loss" in text and "test accuracy 0." in text
    results = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    assert results["settings"]["num_train_epochs"] == 1
