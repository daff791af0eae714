"""The whole script against what goes wrong around it: kills, full disks, second runs, Drive, leaks."""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, ask, start_server
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Return a function that runs the script; it returns status and output.

    `kind` is the signal that it sends, `seconds` after the output has `text`, unless the run is faster. With
    `largest_file`, in bytes, it stands for a disk that fills up.
    """
    output, server = tmp_path_factory.mktemp("output") / "output.txt", start_server()

    def run(flags, kind=None, text="", seconds=0.0, largest_file=resource.RLIM_INFINITY):
        output.write_text("")
        child = ask(server, flags, output, output, largest_file)
        with suppress(ProcessLookupError):  # raised once it has ended by itself
            while kind and text not in output.read_text():
                time.sleep(0.01)
                os.kill(child, 0)
            if kind:
                time.sleep(seconds)
                os.kill(child, kind)
        return os.waitstatus_to_exitcode(int(server.stdout.readline())), output.read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture
def flags(tmp_path, make_images, tiny_vit):
    """Flags of a run of a few seconds, but for its output_dir."""
    return [
        "--data_dir", make_images(count=20), "--data_root", tmp_path / "data", "--num_train_epochs", "16",
        "--model_name_or_path", tiny_vit, "--learning_rate", "5e-3", "--report_to", "none",
        "--per_device_train_batch_size", "8", "--disable_tqdm", "true",
    ]  # fmt: skip


def results(folder):
    """What must be the same however often a run was killed: weights, predictions, scores."""
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("test", "validation", "per_class", "calibration", "shortcuts")}
    weights = {
        name: value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()
    }
    return weights, (folder / "report" / "predictions.csv").read_bytes(), kept


def finished_checkpoints(folder):
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/files.json"))


# What the output says as the run goes on: between two of them lies a step, an evaluation, a checkpoint, the
# model, the scores, the pictures.
EPOCHS = [f"epoch {number} of" for number in (1, 4, 7, 10, 13)]
PHASES = ["", "60 images", "training on", *EPOCHS, "saved the model", "test ece"]


def test_kills_at_random_moments_change_no_bit_and_repeat_no_finished_epoch(tmp_path, flags, runner):
    status, text = runner([*flags, "--output_dir", tmp_path / "whole"])
    assert status == 0, text
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 8:
        folder, rounds = tmp_path / f"killed-{rounds}", rounds + 1
        for phase in (*PHASES, None):
            saved = finished_checkpoints(folder)
            kind = phase if phase is None else signal.SIGKILL
            status, text = runner([*flags, "--output_dir", folder], kind, phase, rng.uniform(0, 0.3))
            assert status in (0, -signal.SIGKILL) and "Traceback" not in text, text
            if "training on" in text and saved:
                assert f"checkpoint-{saved[-1]}" in re.search("training on .*", text)[0], text
            if status == 0:
                break
            kills += 1
        assert status == 0 and results(folder) == results(tmp_path / "whole")
        left = [path for path in folder.rglob(".part*") if "damaged-checkpoint" not in str(path)]
        assert not left  # a checkpoint that was killed half-way is renamed as it is


def test_a_signal_at_any_moment_is_one_line(tmp_path, flags, runner):
    """Those in the middle of training, and Ctrl-C, are in test_finetune."""
    stopped = 0
    for phase in ("60 images", "training on", "epoch 2 of", "saved the model"):
        status, text = runner([*flags, "--output_dir", tmp_path / "model"], signal.SIGTERM, phase, 0.05)
        assert "Traceback" not in text, text
        if status != 0:
            stopped += 1
            last = text.strip().splitlines()[-1]
            assert last == "stopped; run the same command to go on: what is finished is kept"
            assert status == -signal.SIGINT
    assert stopped >= 3


def test_a_reader_that_goes_away_is_one_line(tmp_path, flags):
    """As in `python finetune_vit.py | head -1`."""
    command = [sys.executable, "finetune_vit.py", *map(str, flags), "--output_dir", str(tmp_path / "model")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        run.stdout.readline()
        run.stdout.close()
        errors = run.stderr.read()
    assert "Traceback" not in errors and run.wait() != 0
    assert re.search(r"error: .*Broken pipe; run the same command to go on", errors), errors


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(tmp_path, flags, runner):
    """The cache fails, then the weights of a checkpoint, then its optimizer; then there is room."""
    flags += ["--model_name_or_path", "data/sample-vit", "--num_train_epochs", "2", "--output_dir"]
    for kilobytes, training in ((10, False), (1500, True), (2500, True)):
        status, text = runner([*flags, tmp_path / "model"], largest_file=kilobytes << 10)
        assert status == 1 and "Traceback" not in text, text
        assert ("training on" in text) is training
        last = text.strip().splitlines()[-1]
        assert re.fullmatch("error: a file cannot be used: .*; run the same command to go on: .*", last)
    for folder in ("model", "whole"):
        status, text = runner([*flags, tmp_path / folder])
        assert status == 0, text
    assert results(tmp_path / "model") == results(tmp_path / "whole")


# What Colab has that matters here: a package google.colab, and Drive as a mounted folder, which is slow and
# fails at times. The mount point is that of the copy of the rooms, see `on_colab`.
COLAB = """
import errno, io, os, random, sys, time
DRIVE, FAILS = {drive!r}, random.Random(0)
ismount, real_open, real_replace, failures = os.path.ismount, io.open, os.replace, []
os.path.ismount = lambda path: os.path.isdir(path) if str(path) == DRIVE else ismount(path)

def slow(path):
    if str(path).startswith(DRIVE):
        time.sleep(0.01)
        if "checkpoint" in str(path) and FAILS.random() < {rate}:
            failures.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))

def open(path, *args, **kwargs):
    slow(path)
    return real_open(path, *args, **kwargs)

def replace(source, target, **kwargs):
    slow(target)
    return real_replace(source, target, **kwargs)

io.open = open
__builtins__["open"] = open
os.replace = replace
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
"""


@pytest.fixture
def on_colab(tmp_path):
    """Return a function that runs the script with the stand-in for Colab, Drive mounted or not."""
    drive, packages, work = tmp_path / "drive", tmp_path / "packages", tmp_path / "content"
    for folder in (packages / "google" / "colab", work / "data"):
        folder.mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").touch()
    shutil.copy(ROOT / "finetune_vit.py", work)
    shutil.copytree(ROOT / "steps", work / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "data" / "sample.zip", work / "data")
    sources = [work / "finetune_vit.py", *(work / "steps").rglob("*.py")]
    assert "".join(path.read_text() for path in sources).count('"/content/drive"') == 1
    room = work / "steps" / "workspace.py"
    text = room.read_text()
    assert text.count('DRIVE = Path("/content/drive")') == 1
    room.write_text(text.replace('"/content/drive"', repr(str(drive))))

    def run(*flags, mounted=True, rate=0.0):
        if mounted:
            (drive / "MyDrive").mkdir(parents=True, exist_ok=True)
        (packages / "sitecustomize.py").write_text(COLAB.format(drive=str(drive), rate=rate))
        command = [sys.executable, "finetune_vit.py", *map(str, flags)]
        environment = os.environ | {"PYTHONPATH": str(packages)}
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)

    return run, drive / "MyDrive" / "finetune_vit", work


@pytest.fixture
def web(tmp_path, make_images):
    """The URL of an archive; how often it was asked for is the length of the list."""
    make_images("wrapped/images", count=12)
    shutil.make_archive(tmp_path / "served" / "images", "zip", tmp_path / "wrapped")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/images.zip", asked
        http.shutdown()


def test_colab_keeps_results_on_drive_and_small_files_off_it(tmp_path, on_colab, web, tiny_vit):
    run, home, work = on_colab
    url, asked = web
    flags = [
        "--data_url",
        url,
        "--model_name_or_path",
        tiny_vit,
        "--num_train_epochs",
        "2",
        "--report_to",
        "none",
    ]
    done = run(*flags, mounted=False)
    assert done.returncode == 1 and "drive.mount('" in done.stderr and not asked
    assert done.stderr.startswith("error: Google Drive is not mounted; run `from google.colab import drive;")
    assert not home.parent.exists()

    done = run(*flags, rate=0.15)
    assert done.returncode == 0, done.stderr
    assert "warning: [Errno 5] Input/output error" in done.stdout and "trying again in" in done.stdout
    assert {path.name for path in home.iterdir()} >= {"images.zip", "model"}
    assert (home / "model" / "report" / "metrics.json").exists() and list(
        (home / "model").glob("checkpoint-*")
    )
    on_drive = {path.suffix for path in home.rglob("*") if path.is_file()}
    assert not on_drive & {".jpg", ".arrow"}
    assert len(list(work.rglob("*.jpg"))) == 36 and len(list(work.rglob("pixels-*.arrow"))) == 1

    shutil.rmtree(work / "data" / "images")  # Colab disconnects: the machine's disk is lost, Drive is not
    shutil.rmtree(work / "data" / "cache")
    again = run(*flags)
    assert again.returncode == 0 and "found the finished model" in again.stdout, again.stderr
    assert asked == ["/images.zip"]


TOKEN = "hf_" + "MarkedSecretMarkedSecretMarkedSecret"[:34]


def test_a_token_is_nowhere_to_be_found(tmp_path, flags, runner):
    """Given right, and wrong in the ways that happen; with TensorBoard."""
    folder, texts = tmp_path / "model", []
    flags[flags.index("--report_to") + 1] = "tensorboard"
    flags += ["--output_dir", folder]
    for more in (
        ["--hub_token", TOKEN], ["--hub_token", TOKEN, "--seed", "7"], ["--hub_tokn", TOKEN],
        [f"--hub_tokn={TOKEN}"], [TOKEN], ["--model_name_or_path", f"someone/{TOKEN}"],
        ["--learning_rate", TOKEN],
    ):  # fmt: skip
        texts.append(runner([*flags, *more])[1])
    assert "model and model card" in texts[0] and "seed was 42, is 7" in texts[1]
    assert all(text.strip().splitlines()[-1].startswith("error: ") for text in texts[1:])
    assert "a token of the Hub stands where it would be written down" in texts[5]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (
        len(list(folder.glob("runs/**/events*"))) == 1 and len(list(folder.rglob("training_args.bin"))) == 2
    )
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert [text for text in texts if TOKEN in text] == []
