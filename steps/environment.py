"""Step 0: what surrounds a run: forms of paths, homes that cannot be written, disks without locks."""

import errno
import functools
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub
import torch
from joblib import cpu_count
from transformers import TrainingArguments

from .console import PROCESSES, log, stop_signals
from .files import may_use
from .options import PATHS, Settings

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None

# What libraries keep in the home folder: the variable that moves it, and where it is without that.
CACHES = {
    "HF_HUB_CACHE": "hub",
    "HF_XET_CACHE": "xet",
    "HF_ASSETS_CACHE": "assets",
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
    "HF_METRICS_CACHE": "metrics",  # `evaluate` makes a folder there, although it keeps nothing in it
}
LONGEST = 255  # bytes in a name, on nearly every disk
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # NFS, Lustre, FUSE


def plain_paths(settings: Settings, training: TrainingArguments) -> None:
    """Normalise all paths: expand `~`, drop `./` and a slash at the end."""
    for name in (*PATHS, "predictions_file"):  # the Trainer expands its own output_dir
        if value := getattr(settings, name):
            setattr(settings, name, plain_path(value))
    for name in ("compare", "predict"):
        if values := getattr(settings, name):
            setattr(settings, name, [plain_path(path) for path in values])
    if training.resume_from_checkpoint:
        training.resume_from_checkpoint = plain_path(training.resume_from_checkpoint)


def plain_path(value: str) -> str:
    """Return a normalised path; if it does not exist (a URL, a name on the Hub), only `~` is expanded."""
    path = os.path.expanduser(value)
    return str(Path(path)) if os.path.exists(path) else path


def same_value(one: Any, other: Any) -> bool:
    """Say whether two settings mean the same: equal values, or two names of one folder or file."""
    if one == other:
        return True
    texts = isinstance(one, str) and isinstance(other, str) and one and other
    return bool(texts) and os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other)


def can_write(folder: Path) -> bool:
    """Say whether files can be made in a folder, or it can be made, without making anything."""
    if folder.parts[:1] == ("~",):  # this user has no home
        return False
    if any(len(os.fsencode(part)) > LONGEST for part in folder.parts):
        return False
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and may_use(folder, os.W_OK | os.X_OK)


def keep_caches(settings: Settings) -> None:
    """Let libraries keep under `data_root` what they would keep in a home that cannot be written.

    Call it before `datasets`, `evaluate`, `matplotlib` and `gradio` are imported: they read the environment
    once. A pretrained checkpoint that lies in a home that can be read is still taken from there.
    """
    constants, root = huggingface_hub.constants, Path(settings.data_root).absolute() / "cache"
    home, moved = Path(constants.HF_HOME), []
    for name, folder in CACHES.items():
        where = Path(os.environ.get(name) or home / folder)
        if can_write(where) or (name == "HF_HUB_CACHE" and is_cached(settings.model_name_or_path)):
            continue
        moved.append(str(where))
        os.environ[name] = str(root / "home" / folder)
        if hasattr(constants, name):  # the Hub's client has read the environment already
            setattr(constants, name, os.environ[name])
    if not can_write(home / "gradio"):  # what makes a public link
        constants.HF_HOME = str(root / "home")
    for kind in ("cache", "config"):
        where = os.environ.get(f"XDG_{kind.upper()}_HOME") or os.path.expanduser(f"~/.{kind}")
        if not can_write(Path(where, "matplotlib")):
            os.environ.setdefault("MPLCONFIGDIR", str(root / "home" / "matplotlib"))
    if moved:
        log.info("cannot write to %s: using %s instead", moved[0], root / "home")


def is_cached(name: str) -> bool:
    """Say whether the Hub's client has a checkpoint already."""
    with suppress(huggingface_hub.errors.HFValidationError):
        return isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    return False


def bear_lack_of_locks() -> None:
    """Make `filelock` notice a disk without locks; it then uses a file that names process and host.

    It expects ENOSYS, but network disks answer with other errors, too. The Hub's client and `datasets` use
    `filelock`, so they all need it.
    """
    if fcntl and not hasattr(fcntl.flock, "__wrapped__"):
        fcntl.flock = tell_lack_of_locks(fcntl.flock)
        warnings.filterwarnings("ignore", "flock not supported")  # said below


def tell_lack_of_locks(flock: Any) -> Any:
    """Return a `flock` that answers ENOSYS, and warns once, where the disk has no locks."""
    warned = []

    @functools.wraps(flock)
    def lock(file: int, operation: int) -> None:
        try:
            return flock(file, operation)
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            if not warned:
                text = "warning: no file locks on a disk (%s): start no second run on it from another machine"
                log.warning(text, problem.strerror)
                warned.append(True)
            raise OSError(errno.ENOSYS, problem.strerror) from problem

    return lock


def lock_of(folder: Path, timeout: float = -1) -> filelock.BaseFileLock:
    """Return the lock of a folder that is there, not held yet; `timeout`: seconds to wait for it, or -1.

    The lock ends with the process. On a disk without locks it is a file that names process and host. Its name
    differs from that of a real lock's file, which stays behind: a run would wait for that for ever. Raises
    OSError if the folder cannot be written.
    """
    options = {"timeout": timeout, "is_singleton": True}  # a cell may be run twice
    if has_locks(folder):
        return filelock.FileLock(folder / ".lock", **options)
    return filelock.SoftFileLock(folder / ".lock-holder", **options)


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that several runs use; wait for it, and say so, if another run has it."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        text = "waiting for another run, which is at work in %s; if there is none, delete %s"
        log.info(text, folder, lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def has_locks(folder: Path) -> bool:
    """Say whether the disk of a folder has locks. Raises OSError if the folder cannot be written."""
    with (folder / ".lock").open("a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as problem:
            return problem.errno not in NO_LOCKS  # else another process holds it
    return True


def use_own_cores() -> None:
    """Let torch start no more threads than this process has cores, unless OMP_NUM_THREADS says how many.

    torch respects the cores a process is bound to, but not the quota of a container (cgroup).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))


@contextmanager
def meeting() -> Iterator[None]:
    """While the processes of a launcher meet, let signals end this one at once.

    They meet in C++, where Python's own handlers do not run: it would wait for the others, for hours.
    """
    if PROCESSES == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("%s processes meet at %s", PROCESSES, where)
    before = {kind: signal.signal(kind, signal.SIG_DFL) for kind in stop_signals()}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
