"""Step 10: the real client of the Hub against a server here that speaks its protocol, and fails."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
from conftest import COLOURS, ROOT, draw, make_work
from hub_server import READER, WRITER, Fault, HubServer
from transformers import pipeline

from steps.earlier import find_earlier
from steps.options import Settings
from steps.publish import PUBLISHED, open_hub, publish, push, read_back
from steps.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
CHARTS = {"confusion_matrix.png", "per_class.png", "reliability.png", "training_curves.png"}
CHARTS |= {"roc.png", "precision_recall.png"}


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def run_with_hub(server, tmp_path, *flags, token=WRITER, cwd=ROOT):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, ROOT / "finetune_vit.py", *map(str, flags)]
    environment |= {"HF_TOKEN": token}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert WRITER not in done.stdout + done.stderr
    return done


@pytest.fixture
def finished(run, tmp_path):
    """A finished run that may be changed, and the flags that go on with it."""
    shutil.copytree(run["model"], tmp_path / "model")
    return [*run["flags"][:-1], tmp_path / "model", "--push_to_hub", "--hub_model_id", "me/sample-vit"]


def test_published_model_is_read_back_and_the_card_says_so(server, run, finished, tmp_path):
    done = run_with_hub(
        server, tmp_path, *finished, "--hub_private_repo", "true", "--hub_space_id", "me/page"
    )
    assert done.returncode == 0, done.stderr
    repo, model = server.repos["model", "me/sample-vit"], tmp_path / "model"
    assert repo.private and server.repos["space", "me/page"].private

    _, (_, first, _, everything), (_, last, _, _) = repo.history  # one commit; one more with the check
    assert everything == sorted(PUBLISHED)
    before, after = repo.commits[first], repo.commits[last]
    assert {name for name in after if after[name] != before[name]} == {"README.md", "report/metrics.json"}
    files = server.files("me/sample-vit")
    assert all(files[name] == (model / name).read_bytes() for name in PUBLISHED)
    assert {Path(name).name for name in files if name.endswith(".png")} == CHARTS  # no image of the data set
    card = files["README.md"].decode()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert path in files
    n = int(re.search(r"gives (\d+) of the 32 predictions", card)[1])
    assert ".\n\n## Intended use" in card
    assert first in card and n >= 31 and '"image-classification", "me/sample-vit")' in card
    assert f"read back: {n} of 32 predictions agree" in done.stdout

    published = b"".join(content for name, content in files.items() if not name.endswith(".safetensors"))
    for secret in (WRITER, str(tmp_path), str(ROOT), str(run["model"].parent)):
        assert secret.encode() not in published
    page = server.files("me/page", kind="space")
    assert json.loads(page["model.json"]) == {"model": "me/sample-vit", "revision": None}
    assert page["app.py"] == (ROOT / "steps" / "templates" / "app.py").read_bytes()
    assert b"sdk: gradio" in page["README.md"]
    assert len([name for name in page if name.startswith("examples/")]) == 8

    commits, received = len(repo.history), server.received
    again = run_with_hub(
        server, tmp_path, *finished, "--hub_private_repo", "true", "--hub_space_id", "me/page"
    )
    assert again.returncode == 0 and "read back" not in again.stdout, again.stderr
    assert (len(repo.history), server.received) == (commits, received)  # nothing was sent twice

    classify, images = pipeline("image-classification", str(model)), model / "report" / "space" / "examples"
    answers = {path: classify(str(path))[0] for path in images.iterdir()}
    image = max(answers, key=lambda path: answers[path]["score"])  # rounding may turn what is nearly a draw
    use = ["--output_dir", tmp_path / "no", "--model_name_or_path", "me/sample-vit", "--predict", image]
    done = run_with_hub(server, tmp_path, *use)
    answer = answers[image]["label"]
    assert done.returncode == 0 and f"{image}  {answer}  " in re.sub(" +", "  ", done.stdout), done.stderr


@pytest.fixture
def client(server, monkeypatch):
    """Let the client in this process talk to the server, and not sleep."""
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": address, "HF_HUB_OFFLINE": False}
    for name, value in (constants | {"HF_HUB_DISABLE_XET": True}).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return server


def test_push_that_fails_after_training_leaves_all_and_is_made_up_for(client, run, finished, caplog):
    """Its own model is not "another model" then, though nothing here says yet that it was pushed."""
    images = run["data"] / "sample" / "sample"

    def push_again():
        work = make_work([*finished, "--hub_revision", "v2"])
        predictions = pd.read_csv(work.report / "predictions.csv")
        with caplog.at_level(logging.INFO, "finetune_vit"):
            publish(open_hub(work), predictions, images, work)

    client.faults = [Fault("POST", "/commit/", 403, times=1)]
    with pytest.raises(SystemExit, match="only the push is left to do"):
        push_again()
    client.faults = [Fault("GET", "/resolve/.*safetensors", 403)]
    with pytest.raises(SystemExit, match="was pushed, but cannot be read back"):
        push_again()
    push_again()
    assert "32 predictions agree" in caplog.text
    repo = client.repos["model", "me/sample-vit"]
    assert [branch for branch, *_ in repo.history] == ["main", "v2", "v2"]
    assert list(client.files("me/sample-vit")) == [".gitattributes"]
    assert 'revision="v2")' in client.files("me/sample-vit", revision="v2")["README.md"].decode()


@pytest.fixture
def wish(tmp_path):
    training = {
        "push_to_hub": True,
        "hub_model_id": "me/model",
        "hub_private_repo": None,
        "hub_revision": None,
    }
    training = SimpleNamespace(output_dir=str(tmp_path / "model"), **training)
    return Workspace(SimpleNamespace(hub_space_id=None), training, tmp_path)


def test_new_names_are_made_before_training(client, wish):
    wish.training.hub_model_id, wish.settings.hub_space_id = None, "me/page"
    assert open_hub(wish) == "me/model" and not wish.training.push_to_hub
    assert set(client.repos) == {("model", "me/model"), ("space", "me/page")}
    wish.training.push_to_hub = True
    assert open_hub(wish) == "me/model"  # empty still


def test_without_the_wish_the_hub_is_not_asked(client, wish):
    wish.training.push_to_hub = False
    assert open_hub(wish) == "" and not client.requests


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, s, patch: patch.delenv("HF_TOKEN"), "no token of the Hub; run `hf auth login`"),
        (lambda t, s, patch: patch.setenv("HF_TOKEN", READER), "403 Forbidden"),
        (lambda t, s, patch: patch.setenv("HF_TOKEN", "hf_" + "x" * 34), "401"),
        (lambda t, s, patch: setattr(t, "hub_model_id", "you/model"), "403 Forbidden"),
        (lambda t, s, patch: setattr(t, "hub_model_id", "me/a model"), "me/a model"),
        (
            lambda t, s, patch: setattr(t, "hub_model_id", "me/taken"),
            "me/taken holds another model; give another",
        ),
        (lambda t, s, patch: setattr(s, "hub_space_id", "you/page"), "403 Forbidden"),
        (lambda t, s, patch: s.server.faults.append(Fault("POST", "create", 500)), "500"),
        (lambda t, s, patch: s.server.faults.append(Fault("POST", "create", 429)), "429"),
        (lambda t, s, patch: s.server.server.server_close(), "Connection refused"),
        (lambda t, s, patch: patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), "offline"),
    ],
)
def test_what_would_fail_later_is_found_before_training(client, wish, monkeypatch, change, said):
    monkeypatch.setattr(
        "huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN")
    )  # not the login cache
    client.create("me/taken").commit("main", {"model.safetensors": b"of someone"}, "mine")
    wish.settings.server = client
    change(wish.training, wish.settings, monkeypatch)
    if said == "Connection refused":
        client.server.shutdown()
        huggingface_hub.close_session()  # its kept connection
    with pytest.raises(SystemExit, match=re.escape(said)) as error:
        open_hub(wish)
    text = str(error.value)
    assert "\n" not in text and text.startswith("error: ") and "hf_" not in text


def test_check_comes_before_training_and_before_the_download(server, tmp_path):
    flags = [
        "--config",
        "data/sample.yaml",
        "--data_root",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "new",
    ]
    done = run_with_hub(server, tmp_path, *flags, "--push_to_hub", token=READER)
    assert done.returncode == 1 and "403 Forbidden" in done.stderr and "Traceback" not in done.stderr
    assert "unpacking" not in done.stdout and not (tmp_path / "data").exists()


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, as far as a push is concerned; and what must not be pushed."""
    for name in [
        *PUBLISHED,
        "report/mistakes.png",
        "report/label_issues.png",
        "report/label_issues.csv",
        "report/predictions.csv",
        "checkpoint-3/model.safetensors",
    ]:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(name.encode() * 1000)
    (tmp_path / "out" / "README.md").write_text("---\ntags: [vit]\n---\n")
    return tmp_path / "out"


@pytest.mark.parametrize("status", [429, 500, 503, "cut"])
@pytest.mark.parametrize(
    "where", ["preupload", "lfs/objects/batch", "/lfs/[0-9a-f]{64}", "/verify/", "/commit/"]
)
def test_upload_outlives_a_fault_anywhere(client, folder, where, status):
    client.create("me/model")
    method = "PUT" if "{64}" in where else "POST"
    fault = Fault(method, where, times=2) if status == "cut" else Fault(method, where, status, times=2)
    fault.cut = 5 if status == "cut" else None
    client.faults = [fault]
    push(folder, "me/model", allow_patterns=PUBLISHED)
    assert fault.times == 0 and len(client.repos["model", "me/model"].history) == 2  # in one commit
    assert set(client.files("me/model")) == {".gitattributes", *PUBLISHED}
    push(folder, "me/model", allow_patterns=PUBLISHED)
    assert len(client.repos["model", "me/model"].history) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 409, 500])
def test_upload_that_keeps_failing_ends_in_one_line(client, folder, status, caplog):
    client.create("me/model")
    client.faults = [Fault("POST", "/commit/", status, times=99)]
    with pytest.raises(SystemExit, match=f"cannot push to me/model: .*{status}.*all is safe in"):
        push(folder, "me/model", allow_patterns=PUBLISHED)
    again = sum("trying again" in record.getMessage() for record in caplog.records)
    assert again == (5 if status == 500 else 0) and client.faults[0].times < 99
    assert len(client.repos["model", "me/model"].history) == 1  # nothing half done
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_answers_of_another_model_are_noticed(client, run, tmp_path):
    """The weights on the Hub are changed behind our back."""
    table = pd.read_csv(run["model"] / "report" / "predictions.csv")
    images = run["data"] / "sample" / "sample"
    tested = table[table["split"] == "test"]
    tested = tested.assign(path=[str(images / file) for file in tested["file"]])
    repo = client.create("me/model")
    files = {name: (run["model"] / name).read_bytes() for name in PUBLISHED[:3]}
    good = repo.commit("main", files, "ours")
    found = read_back("me/model", good, tested, "cpu")
    assert found["images"] == 32 and found["agreeing"] >= 31 and found["largest_difference"] < 0.05
    weights = bytearray(files["model.safetensors"])
    weights[-40_000:] = bytes(40_000)
    bad = repo.commit("main", {"model.safetensors": bytes(weights)}, "theirs")
    with pytest.raises(SystemExit, match="answers unlike this run did"):
        read_back("me/model", bad, tested, "cpu")
    client.faults = [Fault("GET", "resolve/.*safetensors", cut=100_000)]
    assert read_back("me/model", good, tested, "cpu") == found  # a cut download goes on
    assert client.faults[0].times == 0


def test_settings_that_have_no_effect_are_refused(server, finished, tmp_path):
    metrics = json.loads((tmp_path / "model" / "report" / "metrics.json").read_text())
    assert "published" not in metrics
    done = run_with_hub(server, tmp_path, *finished, "--hub_strategy", "checkpoint")
    assert done.returncode == 1 and "--hub_strategy and --hub_always_push have no effect" in done.stderr
    assert not server.repos


def test_nothing_that_is_published_says_where_it_was_on_this_machine(
    server, tmp_path, make_images, tiny_vit, monkeypatch
):
    """Absolute paths, and paths with ~ and .. that no shell has expanded, given as flags and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path / "secret-start"))
    start, up = tmp_path / "secret-start", tmp_path / "secret-up"
    photos = make_images("secret-start/secret-home/photos")
    for image in make_images("secret-up/clinic", count=4).rglob("*.jpg"):
        # no copies of those that it is trained on
        draw(COLOURS[image.parent.name], np.random.default_rng(1 + int(image.stem))).save(image)
    files = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.jpg"))
    parts = [f"{file},{('train', 'validation', 'train', 'test')[n % 4]}" for n, file in enumerate(files)]
    (up / "cut.csv").write_text("\n".join(["file,split", *parts]))
    shutil.copytree(tiny_vit, up / "small-vit")
    written = {"model_name_or_path": up / "small-vit", "data_root": start / "secret-cache" / "data"}
    (up / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in written.items()))
    flags = [
        "--config", "../secret-up/run.yaml", "--data_dir=~/secret-home/photos", "--metadata", up / "cut.csv",
        "--output_dir", "../secret-out/here/../my-model", "--num_train_epochs", 1, "--push_to_hub",
        "--hub_model_id", "me/model", "--hub_token", WRITER, "--hub_space_id", "me/page",
    ]  # fmt: skip
    done = run_with_hub(server, tmp_path, *flags, cwd=start)
    assert done.returncode == 0, done.stderr
    done = run_with_hub(server, tmp_path, *flags, "--external_dir", "../secret-up/clinic", cwd=start)
    assert done.returncode == 0, done.stderr

    published, page = server.files("me/model"), server.files("me/page", "space")
    assert set(PUBLISHED) <= set(published) and {"app.py", "model.json"} <= set(page)
    for name, content in [*published.items(), *page.items()]:
        for secret in ("secret-", "~/", "../", str(tmp_path), WRITER):
            assert secret.encode() not in content, (name, secret)
    card = published["README.md"].decode()
    command = shlex.split(re.search("```bash\n(.+?)\n```", card)[1])
    assert command == [
        "python", "finetune_vit.py", "--config", "run.yaml", "--data_dir=photos", "--metadata", "cut.csv",
        "--output_dir", "my-model", "--num_train_epochs", "1", "--push_to_hub", "--hub_model_id", "me/model",
        "--hub_space_id", "me/page", "--external_dir=clinic",
    ]  # fmt: skip
    assert (
        "# small-vit fine-tuned on photos" in card
        and "Given with the images" in card
        and "| `clinic` (" in card
    )
    assert "base_model" not in card and not re.search("endoscop|burn|inset", card.lower())
    assert "| lower left corner | " in card and "epoch 1 of 1" in card
    metrics = json.loads(published["report/metrics.json"])
    assert metrics["split"]["by"] == "given" and metrics["settings"]["metadata"] == "cut.csv"
    assert metrics["data"]["name"] == metrics["settings"]["data_dir"] == "photos"
    assert metrics["external"]["folder"] == "clinic" and metrics["settings"]["output_dir"] == "my-model"


def test_a_model_of_ours_on_the_hub_brings_its_split(client, tmp_path, monkeypatch):
    """Step 5 asks for it by the name that `--model_name_or_path` gives; other models have none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    published = {
        "config.json": '{"calibration_temperature": 1.5}',
        "report/split.csv": "file,split\na/1.jpg,test\n",
    }
    for name, files in (("me/ours", published), ("me/other", {"config.json": "{}"})):
        huggingface_hub.create_repo(name)
        for file, text in files.items():
            huggingface_hub.upload_file(path_or_fileobj=text.encode(), path_in_repo=file, repo_id=name)
    works = (Workspace(Settings(model_name_or_path=name), None, tmp_path) for name in ("me/ours", "me/other"))
    ours, other = map(find_earlier, works)
    assert ours.to_dict() == {"a/1.jpg": "test"} and other is None
    asked = [path for _, path in client.requests if path.endswith("split.csv")]
    assert asked and not [path for path in asked if "me/other" in path]  # one request less in most runs
