"""The same file as a notebook: converted by jupytext and run from top to bottom in a real kernel."""

import base64
import io
import json
import re
import subprocess

import nbclient
import nbformat
import pytest
from conftest import REPOSITORY
from make_notebook import NOTEBOOK, READMES, make_notebook, make_readme
from PIL import Image

from steps.options import KVASIR_URL


def test_notebook_and_badges_are_those_of_the_script():
    """They are made by `python tests/make_notebook.py`; the badge in the README opens the notebook."""
    assert NOTEBOOK.read_text(encoding="utf-8") == make_notebook()
    badge = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        assert f"({badge}/blob/main/data/finetune_vit.ipynb)" in text and make_readme(text) == text


def test_owner_in_a_readme_is_replaced_by_the_scripts():
    addresses = "https://colab.research.google.com/github/{0}/blob/main/data/ https://github.com/{0}.git"
    name = REPOSITORY.removeprefix("https://github.com/")
    assert make_readme(addresses.format("someone/finetune_vit")) == addresses.format(name)
    other = "https://github.com/huggingface/transformers/tree/main https://colab.research.google.com/assets/"
    assert make_readme(other) == other


def test_steps_have_titles_and_cells_are_short(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = re.findall(r"^##+ (\d+|.+)", "\n".join(prose), re.M)
    assert titles == [*map(str, range(12))]
    for text in prose:
        lines = [line for line in text.splitlines() if line and not line.startswith(("#", "|", "<div "))]
        assert 1 <= len(lines) <= 10, text
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(text.splitlines()) <= 45 for text in code)


def test_contents_lead_to_each_step(notebook):
    """Colab goes by the cell's id, Jupyter by the anchor in it."""
    title, contents = notebook.cells[:2]
    assert title.source.startswith("# ") and contents.cell_type == "markdown"
    links = re.findall(r"\[(.+?)\]\(#(.+?)\)", contents.source)
    steps = [cell for cell in notebook.cells if "\n## " in cell.source and cell.cell_type == "markdown"]
    assert [text for text, _ in links] == [re.search("^## (.+)", cell.source, re.M)[1] for cell in steps]
    for (_, link), cell in zip(links, steps, strict=True):
        assert cell.source.startswith(f'<div id="{link}"></div>\n\n## ')
        assert link == f"scrollTo={cell.id}" == f"scrollTo={cell.metadata['id']}"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook, folder=NOTEBOOK.parent):
    """In the folder of the notebook, as Jupyter does."""
    place = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def first_cell(notebook, repository):
    """Keep the first code cell only; it clones `repository`."""
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    assert REPOSITORY in notebook.cells[0].source
    notebook.cells[0].source = notebook.cells[0].source.replace(REPOSITORY, str(repository))


def test_notebook_that_comes_alone_fetches_the_rest_once(notebook, tmp_path):
    """As on Colab, where it has no neighbours; the second time the kernel was restarted."""
    (tmp_path / "finetune_vit").mkdir()
    (tmp_path / "finetune_vit" / "requirements.txt").write_text("numpy\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all of it"]):
        subprocess.run(["git", *command], cwd=tmp_path / "finetune_vit", check=True)
    first_cell(notebook, tmp_path / "finetune_vit")
    notebook.cells[0].source += "\nprint(os.getcwd(), sys.path[0])"
    place = tmp_path / "content"
    place.mkdir()
    for _ in range(2):
        run(notebook, place)
        folder = place / "finetune_vit"
        assert outputs(notebook)[-1]["text"].strip() == f"{folder} {folder}"


@pytest.mark.parametrize("step", ["clone", "install"])
def test_what_cannot_be_fetched_is_one_line(notebook, tmp_path, step):
    """A repository that is not there; a requirement that is not there, after a clone."""
    first_cell(notebook, tmp_path / "gone")
    if step == "install":
        (tmp_path / "finetune_vit").mkdir()
        (tmp_path / "finetune_vit" / "requirements.txt").write_text("./gone\n")
    with pytest.raises(nbclient.exceptions.CellExecutionError) as failed:
        run(notebook, tmp_path)
    (error,) = [output for output in outputs(notebook) if output["output_type"] == "error"]
    line = error["evalue"]
    assert error["ename"] == "SystemExit" and line.startswith("error: ") and len(line.splitlines()) == 1
    assert (str(tmp_path / "gone") if step == "clone" else "requirements.txt") in line
    assert line.endswith("; check REPOSITORY and the network")
    assert "CalledProcessError" not in str(failed.value) + str(outputs(notebook))


def test_defaults_apply_and_the_kernels_own_arguments_are_ignored(notebook):
    cells = notebook.cells
    start = next(i for i, cell in enumerate(cells) if "\n## 1 " in cell.source)
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
        base64.b64decode(output["data"]["image/png"])
        for output in outputs(notebook)
        if "image/png" in output.get("data", {})
    ]
    for picture in pictures:
        assert Image.open(io.BytesIO(picture)).width >= 800
    names = "training_curves confusion_matrix per_class reliability roc precision_recall mistakes attribution"
    names += " label_issues"
    report = tmp_path / "model" / "report"
    drawn = [(report / f"{name}.png").read_bytes() for name in names.split()]
    assert pictures[2:] == drawn and len(pictures) == 11  # the first two: examples as files, and prepared
    text = "".join(output.get("text", "") for output in outputs(notebook))
    assert "epoch 1 of 1: training loss" in text and "test accuracy 0." in text
    results = json.loads((report / "metrics.json").read_text())
    assert results["settings"]["num_train_epochs"] == 1
