"""Step 11: a finished model sorts images, folders and archives, in a terminal, into a table and on a page."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import COLOURS, ROOT, draw, read_settings, run_script, story
from joblib import cpu_count
from transformers import ViTForImageClassification, ViTImageProcessor

from steps.preprocess import decode_file
from steps.use import classify, find_inputs, load_classifier, open_page, predict_files, show_commands

SCRIPT = ROOT / "finetune_vit.py"


def use(folder, *flags):
    return run_script(*flags, cwd=folder)


def reported(run):
    """What the run itself predicted for its test images, by file."""
    table = pd.read_csv(run["model"] / "report" / "predictions.csv")
    return table[table["split"] == "test"].set_index("file")


def run_columns(run):
    """The columns of the probabilities, each called p_ and the class."""
    return list(reported(run).columns[-8:])


def test_a_few_images_are_shown_as_the_run_predicted_them(run, tmp_path):
    expected, images = reported(run).iloc[::9], run["data"] / "sample" / "sample"
    done = use(
        tmp_path, "--output_dir", run["model"], "--predict", *(images / name for name in expected.index)
    )
    assert done.returncode == 0, done.stderr
    for file, row in expected.iterrows():
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(str(images / file)))
        _, prediction, probability, _, _ = line.split()
        assert prediction == row["prediction"]
        assert float(probability) == pytest.approx(row[f"p_{prediction}"], abs=0.02)  # another batch in bf16
    assert re.search(r"8 images, \d+\.\d images/s", done.stdout) and list(tmp_path.iterdir()) == []


def test_many_images_go_into_a_table(run, tmp_path):
    """A folder and an archive of the same images, and two files that are none."""
    expected, images = reported(run), run["data"] / "sample" / "sample"
    (tmp_path / "in").mkdir()
    for file in expected.index:
        (tmp_path / "in" / file).parent.mkdir(exist_ok=True)
        shutil.copy(images / file, tmp_path / "in" / file)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in expected.index[:30]:
            archive.write(images / file, f"top/{file}")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    done = use(tmp_path, "--output_dir", run["model"], "--predict", "in", "in.zip", "text.jpg", "empty.png")
    assert done.returncode == 0, done.stderr

    table = pd.read_csv(tmp_path / "predictions.csv").set_index("file")
    columns = run_columns(run)
    assert list(table.columns) == ["prediction", *columns, "error"] and len(table) == 72 + 30 + 2
    folder = table.loc[[f"in/{file}" for file in expected.index]]
    assert (folder["prediction"].to_numpy() == expected["prediction"]).all()
    assert np.abs(folder[columns].to_numpy() - expected[columns].to_numpy()).max() < 0.02
    zipped = table.loc[[f"in.zip/top/{file}" for file in expected.index[:30]]]
    assert (zipped["prediction"].to_numpy() == expected["prediction"][:30]).all()
    for name in ("text.jpg", "empty.png"):
        assert table.loc[name, columns].isna().all() and pd.isna(table.loc[name, "prediction"])
        assert "UnidentifiedImageError" in table.loc[name, "error"] and f"unreadable: '{name}'" in done.stdout
    assert "104 images" in done.stdout and "0x" not in done.stdout

    title, index, *shown = done.stdout.split("\n\n")[1].splitlines()  # the count per predicted class
    counts = {name: int(n) for name, n in map(str.split, shown)}
    assert (title.strip(), index.strip()) == ("images", "prediction") and sum(counts.values()) == 72 + 30
    assert counts == table["prediction"].value_counts().to_dict()

    again = use(tmp_path, "--output_dir", run["model"], "--predict", "in")
    assert (again.returncode, again.stderr.splitlines()[-1]) == (
        1, "error: predictions.csv exists; name another file with --predictions_file"
    )  # fmt: skip


def test_predictions_file_is_always_written(run, tmp_path):
    """For a single image, too; and under the name that was given."""
    file, row = next(reported(run).iterrows())
    flags = ["--output_dir", run["model"], "--predict", run["data"] / "sample" / "sample" / file]
    done = use(tmp_path, *flags, "--predictions_file", "deep/my answers.csv")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "deep" / "my answers.csv", keep_default_na=False)
    assert list(table.columns) == ["file", "prediction", *run_columns(run), "error"] and len(table) == 1
    assert table["prediction"][0] == row["prediction"] and table["error"][0] == ""
    column = f"p_{row['prediction']}"
    assert table[column][0] == pytest.approx(row[column], abs=0.02)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(str(flags[-1])))
    assert line.split()[1] == row["prediction"]  # it is shown as well
    assert re.search(r" 1 images, \d+\.\d images/s: deep/my answers.csv\n", done.stdout)
    assert os.listdir(tmp_path) == ["deep"] and os.listdir(tmp_path / "deep") == ["my answers.csv"]


def test_predictions_file_that_is_there_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "mine.csv").write_text("mine")
    (tmp_path / "a.png").touch()
    flags = ["--model_name_or_path", "no-such/model", "--predict", "a.png", "--predictions_file", "mine.csv"]
    done = use(tmp_path, *flags)
    assert done.returncode == 1 and "reading the checkpoint" not in done.stdout
    assert done.stderr.splitlines()[-1] == "error: --predictions_file mine.csv exists; give another name"
    assert (tmp_path / "mine.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--predict", "absent.jpg"], "--predict absent.jpg is not there"),
        (["--predict", "."], "nothing holds no finished model; train it first"),
        pytest.param(
            ["--demo"],
            "nothing holds no finished model; train it first",
            marks=pytest.mark.skipif(not find_spec("gradio"), reason="no Gradio here"),
        ),
        (
            ["--model_name_or_path", ROOT / "data" / "sample-vit", "--predict", "."],
            "its classes have no names",
        ),
        (["--output_dir", "RUN", "--predict", "."], "no images in ."),
        (["--output_dir", "RUN", "--predict", "trap.zip"], "cannot unpack trap.zip"),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("trap.zip", "w") as archive:
        archive.writestr("../out.jpg", b"")
    flags = [str(run["model"] if flag == "RUN" else flag) for flag in flags]
    with pytest.raises(SystemExit, match=re.escape(said)):
        settings, training = read_settings(["--output_dir", "nothing", *flags])
        if settings.demo:
            open_page(settings, training)
        predict_files(settings, training)
    assert sorted(os.listdir()) == ["trap.zip"]


def test_nothing_but_damaged_files_is_no_table(run, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no image")
    flags = ["--output_dir", run["model"], "--predict", tmp_path]
    with caplog.at_level("INFO", logger="finetune_vit"):
        predict_files(*read_settings(flags))
    assert capsys.readouterr().out == "" and re.search(r"unreadable: '.*text.jpg'", caplog.text)
    assert "1 images" in caplog.text and os.listdir() == ["text.jpg"]


def test_many_damaged_files_are_in_the_table_and_leave_nothing_to_count(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(21):
        Path(f"{number}.jpg").write_text("no image")
    predict_files(*read_settings(["--output_dir", run["model"], "--predict", tmp_path]))
    assert pd.read_csv("predictions.csv")["error"].str.startswith("UnidentifiedImageError").sum() == 21
    assert capsys.readouterr().out == ""


def test_few_images_are_one_table_whatever_the_batch(run, tmp_path, capsys):
    files = [run["data"] / "sample" / "sample" / file for file in reported(run).index[:5]]
    flags = ["--output_dir", run["model"], "--per_device_eval_batch_size", 2, "--predict", *files]
    predict_files(*read_settings(flags))
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[0].split() == "prediction probability or else its probability".split()
    assert shown[1].strip() == "file"
    assert [line.split()[0] for line in shown[2:]] == list(map(str, files))


def test_another_model_is_taken_where_it_is_named(run, tmp_path):
    """A folder that was moved, or another than that of the finished run in output_dir."""
    shutil.copytree(run["model"], tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["id2label"] = {number: f"moved-{name}" for number, name in config["id2label"].items()}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    image = run["data"] / "sample" / "sample" / reported(run).index[0]
    done = use(tmp_path, "--output_dir", run["model"], "--model_name_or_path", "moved", "--predict", image)
    assert done.returncode == 0 and " moved-" in done.stdout, done.stderr


@pytest.fixture
def colour_model(tiny_vit):
    """A model of three classes, its processor, and settings of a small batch."""
    processor = ViTImageProcessor.from_pretrained(tiny_vit)
    flags = ["--use_cpu", "true", "--bf16", "false", "--per_device_eval_batch_size", "32"]
    settings, training = read_settings(flags)
    names = {"settings": settings, "training": training, "processor": processor, "class_names": list(COLOURS)}
    model, _ = story(**names)["make_model"](str(tiny_vit))
    return model.eval(), processor, training


@pytest.fixture
def cranes(tiny_vit, tmp_path):
    """A checkpoint from elsewhere whose labels repeat, sure of the last crane; an image with an odd name."""
    model = ViTForImageClassification.from_pretrained(tiny_vit)
    model.config.id2label = dict(
        enumerate(["cat|\r<b>", "crane", "crane (3)", "crane", "error", "file", "self"])
    )
    model.classifier.bias.data = torch.eye(7)[3] * 9
    model.save_pretrained(tmp_path / "cranes")
    shutil.copy(tiny_vit / "preprocessor_config.json", tmp_path / "cranes")
    draw(COLOURS["red"], np.random.default_rng(0)).save(tmp_path / "a\r,ü.png")
    return tmp_path / "cranes", tmp_path / "a\r,ü.png"


def test_labels_that_repeat_are_kept_apart_in_a_table(cranes, tmp_path, capsys):
    flags = ["--model_name_or_path", cranes[0], "--predict", cranes[1], "--predictions_file"]
    predict_files(*read_settings([*flags, tmp_path / "a.csv"]))
    table = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    names = ["cat|\r<b>", "crane (1)", "crane (3) (2)", "crane (3) (3)", "error", "file", "self"]
    assert table.columns.tolist() == ["file", "prediction", *(f"p_{name}" for name in names), "error"]
    assert table.loc[0, ["file", "prediction", "error"]].tolist() == [str(cranes[1]), names[3], ""]
    assert table["p_crane (3) (3)"][0] > 0.9 and " p_" not in capsys.readouterr().out


def test_labels_that_repeat_are_kept_apart_on_the_page(cranes, monkeypatch):
    gradio, pages = pytest.importorskip("gradio"), []
    monkeypatch.setattr(gradio.Interface, "launch", lambda page, **options: (pages.append(page), "", ""))
    monkeypatch.setattr(gradio.Interface, "block_thread", lambda page: None)
    open_page(*read_settings(["--model_name_or_path", cranes[0], "--demo"]))
    answer = pages[0].fn(str(cranes[1]))
    assert len(answer) == 7 and max(answer, key=answer.get) == "crane (3) (3)"
    assert "7 classes: cat&#124;&#13;&#60;b&#62;, crane (1), " in pages[0].article  # Markdown


def test_memory_does_not_grow_with_the_number_of_files(colour_model, tmp_path):
    for number in range(20):
        draw(COLOURS["red"], np.random.default_rng(number), (300, 200)).save(tmp_path / f"{number}.jpg")
    files = sorted(tmp_path.iterdir())

    def peak_after(count):
        rows = sum(
            len(table) for table in classify({str(n): files[n % 20] for n in range(count)}, *colour_model)
        )
        assert rows == count
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

    peak_after(500)
    assert peak_after(5000) - peak_after(500) < 20  # all their pixels would be 15 MB and their rows 180 MB


def test_decoding_goes_on_while_the_model_works(colour_model, tmp_path, monkeypatch):
    """With decoding and the model as slow as each other, both take little longer than one of them."""
    draw(COLOURS["red"], np.random.default_rng(0)).save(tmp_path / "a.png")
    model, processor, training = colour_model
    pause = 0.15 * cpu_count() / 32  # 0.15 s per batch

    def slow_decode(*args, **kwargs):
        time.sleep(pause)
        return decode_file(*args, **kwargs)

    monkeypatch.setattr("steps.use.decode_file", slow_decode)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.15))
    start = time.perf_counter()
    tables = list(classify({str(n): tmp_path / "a.png" for n in range(640)}, model, processor, training))
    assert len(tables) == 20 and time.perf_counter() - start < 5  # 3.2 s; one after the other 6


def test_inputs_keep_their_order_and_hidden_files_stay_out(tmp_path, make_images):
    folder = make_images(count=3)
    (folder / "red" / "._000.jpg").write_bytes(b"macOS leaves these")
    with find_inputs([str(folder / "red" / "002.jpg"), str(folder)]) as inputs:
        names = [os.path.relpath(name, folder) for name in inputs]
    assert names == [
        "red/002.jpg",
        *(f"{c}/00{n}.jpg" for c in COLOURS for n in range(3) if (c, n) != ("red", 2)),
    ]


@pytest.mark.parametrize("more", ["scan.nii", "notes.txt", "deep.zip"])
def test_images_that_cannot_be_read_are_rows_and_say_why(
    colour_model, tmp_path, make_images, caplog, bare_pillow, more
):
    folder = make_images(count=1)
    (folder / "hash::tag.jpg").write_bytes((folder / "red" / "000.jpg").read_bytes())
    for name in ("a.dcm", "b.DCM", more):
        (folder / name).write_bytes(b"x")
    with caplog.at_level("INFO", logger="finetune_vit"), find_inputs([str(folder)]) as inputs:
        (table,) = classify(inputs, *colour_model)
    table = table.set_index("file")["error"].rename(index=lambda name: os.path.relpath(name, folder))
    dicom = "DICOM: needs `pip install pydicom`"
    named = {"a.dcm": dicom, "b.DCM": dicom}
    named |= {"scan.nii": ".nii: Pillow cannot read it"} if more == "scan.nii" else {}
    readable = {"hash::tag.jpg", *(f"{label}/000.jpg" for label in COLOURS)}
    assert table.to_dict() == named | dict.fromkeys(readable, "")
    assert ("1 files left out: archives" in caplog.text) is (more == "deep.zip") and ".txt" not in caplog.text


def test_a_file_that_is_named_never_disappears(colour_model, tmp_path, make_images, caplog, bare_pillow):
    """A damaged disk, a JPEG with a zip behind it, a phone's photo, no ending, an archive without images."""
    jpeg = (make_images(count=1) / "red" / "000.jpg").read_bytes()
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("note.txt", "x")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)
    files = {"good.jpg": jpeg, "both.jpg": jpeg + (tmp_path / "plain.zip").read_bytes(), "noext": jpeg}
    files |= {f"zeros{size}.jpg": bytes(size) for size in (0, 100, 1024, 20480)}
    files |= {"both.zip": files["both.jpg"], "IMG_1.HEIC": heic, "IMG_2.jpg": heic, "notes.txt": b"text"}
    files |= {"scan.dcm": bytes(128) + b"DICM" + bytes(500), "x.cr2": b"II*\0" + bytes(50)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with find_inputs([str(tmp_path / name) for name in (*files, "plain.zip")]) as inputs:
        (table,) = classify(inputs, *colour_model)
    errors = dict(zip(map(os.path.basename, table["file"]), table["error"], strict=True))
    assert errors.keys() == files.keys() and f"no images in {tmp_path}/plain.zip" in caplog.text
    readable = {name for name, error in errors.items() if not error}
    assert readable == {"good.jpg", "both.jpg", "both.zip", "noext"}
    assert "pip install pillow-heif" in errors["IMG_1.HEIC"] and errors["IMG_2.jpg"] == errors["IMG_1.HEIC"]
    assert "pip install pydicom" in errors["scan.dcm"] and errors["x.cr2"].startswith(".cr2: Pillow")


def test_the_next_commands_name_the_folder_where_it_is_not_the_usual_one(caplog):
    with caplog.at_level("INFO", logger="finetune_vit"):
        show_commands("model")
        show_commands("my model")
    usual, named = caplog.messages
    commands = "python finetune_vit.py --predict PATH ...  or  python finetune_vit.py --demo"
    assert usual == f"next: open model/report/index.html in a browser;  {commands}"
    commands = commands.replace("finetune_vit.py", "finetune_vit.py --output_dir 'my model'")
    assert named == f"next: open my model/report/index.html in a browser;  {commands}"


@pytest.fixture(scope="module")
def page(run):
    """The page of the finished run, served by the script itself; its address and the seconds it took."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-u", SCRIPT, "--output_dir", run["model"], "--demo"]
    environment = os.environ | {"GRADIO_SERVER_PORT": "7899", "PYTHONUNBUFFERED": "1"}
    environment |= {
        "http_proxy": "http://127.0.0.1:9",
        "all_proxy": "socks5://127.0.0.1:9",
    }  # nobody is there
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        late = threading.Timer(60, process.kill)
        late.start()
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
        late.cancel()
        yield address, time.perf_counter() - start
        process.kill()


def test_page_answers_as_the_run_did(page, run):
    client = pytest.importorskip("gradio_client").Client(page[0], verbose=False)
    assert page[1] < 20  # 5 s when nothing else runs
    handle = sys.modules["gradio_client"].handle_file
    for file, row in reported(run).iloc[::20].iterrows():
        answer = client.predict(handle(run["data"] / "sample" / "sample" / file), api_name="/classify")
        assert answer["label"] == row["prediction"] and len(answer["confidences"]) == 8
        assert answer["confidences"][0]["confidence"] == pytest.approx(
            row[f"p_{row['prediction']}"], abs=0.02
        )


def test_page_in_a_browser(page, run, tmp_path):
    """Open it, upload a file, read the answer; a text that is called .jpg gets a sentence."""
    browsers = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium here")
    expected = reported(run).iloc[0]
    (tmp_path / "text.jpg").write_text("no image")
    with browsers.sync_playwright() as play:
        tab = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        tab.goto(page[0])
        tab.get_by_text("Not a medical device").wait_for()
        tab.get_by_text("esophagitis", exact=True).wait_for()  # an example
        tab.set_input_files("input[type=file]", run["data"] / "sample" / "sample" / expected.name)
        tab.get_by_text("Submit").click()
        assert tab.get_by_test_id("label-output-value").inner_text() == expected["prediction"]
        tab.get_by_text("Clear").click()
        tab.set_input_files("input[type=file]", tmp_path / "text.jpg")
        tab.get_by_text("Submit").click()
        assert "cannot be read as an image" in tab.locator(".toast-body").inner_text()


def test_page_of_the_run_stands_alone(run):
    """report/space is a Space: an app that compiles, its requirements, its header, drawn examples."""
    space = run["model"] / "report" / "space"
    compile((space / "app.py").read_text(), "app.py", "exec")
    assert {path.stem for path in (space / "examples").iterdir()} == {name[2:] for name in run_columns(run)}
    assert "sdk: gradio" in (space / "README.md").read_text()
    assert "torch" in (space / "requirements.txt").read_text()
    assert json.loads((space / "model.json").read_text()) == {"model": "", "revision": None}


def test_export_to_onnx_agrees_with_the_model(run, tmp_path):
    """README's command. Optimum needs an older transformers: put the optimum-cli of another venv on PATH."""
    if not (optimum := shutil.which("optimum-cli")):
        pytest.skip("optimum-cli is not on PATH")
    export = [optimum, "export", "onnx", "--model", run["model"], "--task", "image-classification", tmp_path]
    subprocess.run(list(map(str, export)), check=True, capture_output=True)
    pixels = torch.rand(5, 3, 64, 64) * 2 - 1
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    code = """import numpy, onnxruntime; model = onnxruntime.InferenceSession("model.onnx")
numpy.save("logits.npy", model.run(["logits"], {"pixel_values": numpy.load("pixels.npy")})[0])"""
    with open(optimum) as script:
        python = script.readline().removeprefix("#!").strip()
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    model, _ = load_classifier(str(run["model"]))
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits.numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - logits).max() < 1e-4
