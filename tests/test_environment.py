"""What lies around a run: forms of paths, homes that cannot be written, disks without locks, launchers."""

import errno
import os
import signal
import socket
import subprocess
import sys

import datasets
import filelock
import huggingface_hub
import pytest
import torch
from conftest import read_settings

from steps import environment
from steps.environment import CACHES, can_write, keep_caches, lock_of, meeting, plain_path, same_value
from steps.environment import use_own_cores
from steps.options import Settings


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a folder `images` in it, and the folder that the script is run from."""
    (tmp_path / "home" / "images").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("written, plain", [
    ("images/", "images"), ("./images", "images"), ("./images//", "images"), ("../home/images", None),
    ("~/images", "HOME/images"), ("~/new", "HOME/new"), ("~nobody-here/x", None), ("new/", None),
    ("google/vit-base", None), ("https://example.com/~me/a.zip", None), ("", None), (" ", None),
    ("a\0b", None),
])  # fmt: skip
def test_a_path_is_written_in_one_form(home, written, plain):
    """What is not there may be a name on the Hub, or a URL: it stays as it is."""
    assert plain_path(written) == (plain or written).replace("HOME", str(home))


@pytest.mark.parametrize("one, other, same", [
    ("images", "../home/images", True), ("images", "{}/images", True), ("link", "images", True),
    ("images", ".", False), ("new", "./new", False), (None, "images", False), ("", "", True), (1.0, 1, True),
    ("1", 1, False), (["a"], ["a"], True),
])  # fmt: skip
def test_two_names_of_one_folder_are_the_same(home, one, other, same):
    (home / "link").symlink_to("images")
    other = other.format(home) if isinstance(other, str) else other
    assert same_value(one, other) == same_value(other, one) == same


def test_home_is_meant_by_a_tilde_in_flags_and_in_files(home, tmp_path):
    (home / "my.yaml").write_text("data_dir: ~/images\ndata_root: ~/data\noutput_dir: ~/model\n")
    (home / "a.jpg").touch()
    settings, training = read_settings(["--config", "~/my.yaml", "--predict", "~/a.jpg", "./images/"])
    assert [settings.data_dir, settings.data_root] == [f"{home}/images", f"{home}/data"]
    assert settings.predict == [f"{home}/a.jpg", "images"] and training.output_dir == f"{home}/model"
    (home / "checkpoint-3").mkdir()
    training = read_settings(["--data_dir=~/images/", "--resume_from_checkpoint=~/checkpoint-3/"])[1]
    assert training.resume_from_checkpoint == f"{home}/checkpoint-3"


def test_whether_a_folder_can_be_written_is_known_without_writing(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to("nowhere")
    wanted = {"new/in/new": True, "": True, "file": False, "file/new": False, "dead/new": False}
    assert {name: can_write(tmp_path / name) for name in wanted} == wanted
    assert not can_write(environment.Path("~/.cache"))  # where a user has no home, this is not expanded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead", "file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_of_others_cannot_be_written(tmp_path):
    tmp_path.chmod(0o555)
    assert not can_write(tmp_path / "new")


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """A home that is a file, in the environment and in the Hub's client, which has read that already."""
    (tmp_path / "file").touch()
    hub = huggingface_hub.constants
    for name in ("HF_HOME", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", *CACHES):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
        if hasattr(hub, name):
            monkeypatch.setattr(hub, name, f"{tmp_path}/file/{name}")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    return tmp_path


def test_what_a_home_cannot_keep_goes_into_data_root(no_home, caplog):
    with caplog.at_level("INFO", logger="finetune_vit"):
        keep_caches(Settings(data_root=str(no_home / "data")))
    kept = no_home / "data" / "cache" / "home"
    assert {name: os.environ[name] for name in CACHES} == {n: str(kept / path) for n, path in CACHES.items()}
    assert huggingface_hub.constants.HF_HUB_CACHE == str(kept / "hub")
    assert huggingface_hub.constants.HF_HOME == str(kept) and os.environ["MPLCONFIGDIR"].startswith(str(kept))
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("cannot write to ")
    assert not (no_home / "data").exists()  # nothing is made before it is needed


def test_a_home_that_can_be_written_keeps_what_it_kept(no_home, monkeypatch):
    monkeypatch.setenv("HOME", str(no_home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(no_home / "huggingface"))
    keep_caches(Settings(data_root=str(no_home / "data")))
    assert not {*CACHES, "MPLCONFIGDIR"} & os.environ.keys()


def test_a_checkpoint_in_a_home_that_can_only_be_read_is_used(no_home, monkeypatch):
    commit = no_home / "hub" / "models--me--vit" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(no_home / "hub"))
    keep_caches(Settings(data_root=str(no_home / "data"), model_name_or_path="me/vit"))
    assert "HF_HUB_CACHE" not in os.environ and "HF_METRICS_CACHE" in os.environ


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def no_locks(request, monkeypatch):
    """A disk that refuses locks, as NFS, Lustre and FUSE may."""

    def flock(file, operation):
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(environment.fcntl, "flock", flock)
    environment.bear_lack_of_locks()


def test_a_file_stands_in_for_a_lock_that_the_disk_lacks(tmp_path, no_locks, caplog):
    (tmp_path / ".lock").touch()  # of a time when the disk had locks
    lock = lock_of(tmp_path, timeout=0)
    with lock:
        assert (tmp_path / ".lock-holder").read_text().split()[:2] == [str(os.getpid()), socket.gethostname()]
        with pytest.raises(filelock.Timeout):
            filelock.SoftFileLock(tmp_path / ".lock-holder", timeout=0).acquire()
    assert not (tmp_path / ".lock-holder").exists()
    assert len(caplog.messages) == 1 and "no file locks on a disk (no locks here)" in caplog.messages[0]


def test_a_holder_that_was_killed_holds_nothing(tmp_path, no_locks):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    (tmp_path / ".lock-holder").write_text(f"{gone.pid}\n{socket.gethostname()}\n")
    with lock_of(tmp_path, timeout=0):
        assert (tmp_path / ".lock-holder").read_text().startswith(f"{os.getpid()}\n")


def test_the_libraries_bear_it_too(tmp_path, no_locks):
    with datasets.utils.filelock.FileLock(str(tmp_path / "builder.lock"), timeout=1) as lock:
        assert lock.is_locked


def test_where_the_disk_has_locks_they_are_used(tmp_path):
    lock = lock_of(tmp_path, timeout=0)
    with lock:
        assert isinstance(lock, filelock.FileLock) and lock_of(tmp_path, timeout=0) is lock
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".lock", timeout=0).acquire()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_wait_for_other_processes(monkeypatch, caplog, processes):
    """They meet in C++, where no handler of Python's runs."""
    monkeypatch.setattr(environment, "PROCESSES", processes)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with caplog.at_level("INFO", logger="finetune_vit"), meeting():
            inside = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (inside == signal.SIG_DFL) == (processes == 2)
    assert caplog.messages == (["2 processes meet at node1:29500"] if processes == 2 else [])


@pytest.mark.parametrize("asked, quota, threads", [(None, "1", 1), ("3", "1", 3)])
def test_torch_keeps_to_the_quota_of_a_container(monkeypatch, asked, quota, threads):
    """What joblib takes from this variable it takes from a cgroup, too."""
    before = torch.get_num_threads()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", quota)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(3)
    try:
        use_own_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
