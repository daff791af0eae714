"""What the user is told: log lines, tables, pictures, errors of one line.

Only the standard library is imported at the top, so that a missing package can be named in one line.
"""

import errno
import io
import logging
import os
import re
import signal
import ssl
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

# Set by torchrun and other launchers. Some of these, left over from another program, would make this process
# wait for others that do not exist, or stay silent.
LAUNCHER = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
LAUNCHED = os.environ.keys() >= set(LAUNCHER)
PROCESSES = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
STRAY = [] if LAUNCHED else [name for name in LAUNCHER[:3] if name in os.environ]
for name in STRAY:
    del os.environ[name]
MAIN = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that writes and speaks
NOTEBOOK = "ipykernel" in sys.modules
TOKEN = r"hf_\w{30,}"  # a token of the Hub
# PASSING: a network drive recovers. LASTING: someone has to mend it.
PASSING = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN}
LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE}
log = logging.getLogger("finetune_vit")


class PlainFormatter(logging.Formatter):
    """Log lines in which control characters are escaped: a name of a file cannot forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return escape_controls(super().format(record))


def escape_controls(text: str) -> str:
    r"""Return a text with control characters as \r, \x1b and so on."""
    return re.sub(r"[\0-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def start_logging() -> None:
    """Send log lines to standard output; in a script, let errors and Ctrl-C end in one line."""
    if not NOTEBOOK:
        read_names_as_utf8()
        os.environ["MPLBACKEND"] = "agg"  # no window is opened; a notebook's own may not be installed here
    with suppress(AttributeError):  # of a notebook, which shows everything
        sys.stdout.reconfigure(errors="replace")  # a console may lack letters; standard error escapes them
    logging.basicConfig(stream=sys.stdout, force=True)
    logging.root.handlers[0].setFormatter(PlainFormatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    log.setLevel(logging.INFO if MAIN else logging.ERROR)
    logging.raiseExceptions = False  # or every line after a closed pipe gets a traceback of its own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notices on new heads alarm newcomers
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or each attempt to reach the Hub is told twice
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() / 2:  # others use the cores, too:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits must not keep one busy
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm draws its bars as text then
    if not NOTEBOOK:
        sys.excepthook = end_in_one_line
        for kind in stop_signals():
            signal.signal(kind, signal.default_int_handler)  # like Ctrl-C
    if STRAY:
        text = "warning: ignoring %s, because %s are not all set: this run is a single process"
        log.warning(text, ", ".join(STRAY), ", ".join(LAUNCHER))


def read_names_as_utf8() -> None:
    """Restart this script in UTF-8 mode if Python reads file names in another encoding; Unix only.

    The system stores names as bytes. Another encoding would garble them, in the model's labels, too.
    """
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8":
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")  # the screen's
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def stop_signals() -> list[int]:
    """Return Ctrl-C, SIGTERM and SIGHUP (of a closed terminal), but for what `nohup` has switched off."""
    names = "SIGINT", "SIGTERM", "SIGHUP"  # the last is unknown to Windows
    kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [kind for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN]


def close_screen() -> None:
    """Discard further output: after SIGHUP, writing to the closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for screen in (1, 2):
        if stat.S_ISCHR(os.fstat(screen).st_mode):
            os.dup2(nowhere, screen)


def first_line(problem: BaseException) -> str:
    """Return the first line of what an exception says, or its kind."""
    return str(problem).strip().partition("\n")[0] or type(problem).__name__


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return names joined by commas; of many, the first ones and how many more there are."""
    names = [*names]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def stop(problem: object, remedy: str) -> NoReturn:
    """Raise SystemExit with one line that a user can act on and that holds no token; status 1."""
    line = f"error: {' '.join(str(problem).split())}; {remedy}"
    raise SystemExit(escape_controls(re.sub(TOKEN, "hf_...", line)) if MAIN else 1)


def end_in_one_line(kind: type[BaseException], problem: BaseException, trace: TracebackType | None) -> None:
    """Say in one line what ended the script; show a traceback only for what no user can mend."""
    go_on = "run the same command to go on: what is finished is kept"
    if issubclass(kind, KeyboardInterrupt):
        line = f"stopped; {go_on}"
    elif issubclass(kind, ModuleNotFoundError):
        remedy = "activate the environment (source .venv/bin/activate), or pip install -r requirements.txt"
        line = f"error: the package {problem.name} is not installed in {sys.executable}; {remedy}"
    elif kind.__name__ == "OutOfMemoryError":  # torch's; training itself gives more advice
        remedy = "nvidia-smi shows what else uses the GPU; or try --per_device_eval_batch_size 8"
        line = f"error: {str(problem).split('.')[0]}; {remedy}"
    elif disk_failed(problem):
        line = f"error: a file cannot be used: {problem}; {go_on}"
    else:
        sys.__excepthook__(kind, problem, trace)
        return
    if MAIN:
        print(line, file=sys.stderr)


def file_error(problem: BaseException) -> int | None:
    """Return the errno of a failed file operation, whichever library met it; None for any other problem."""
    if isinstance(problem, OSError):
        return problem.errno
    number = re.search(r"os error (\d+)", str(problem))  # safetensors
    return int(number[1]) if number else errno.ENOSPC if "inline_container" in str(problem) else None


def disk_failed(problem: BaseException) -> bool:
    """Say whether a disk, not what lies on it, is the problem."""
    return file_error(problem) in PASSING | LASTING


def retry(action: Callable, *args: Any, when: Callable | None = None, **options: Any) -> Any:
    """Return action(*args, **options); after a failure that may pass, try again for half a minute.

    `when` says of an exception whether it may pass; by default its errno is one of PASSING. Raises the last.
    """
    for wait in (1, 2, 4, 8, 16):
        try:
            return action(*args, **options)
        except Exception as problem:
            if not (when(problem) if when else file_error(problem) in PASSING):
                raise
            log.warning("warning: %s; trying again in %s s", " ".join(str(problem).split()), wait)
            time.sleep(wait)
    return action(*args, **options)


def may_pass(problem: BaseException) -> bool:
    """Say whether a failed download or upload is worth another try."""
    problem = hidden_cause(problem)
    if status := status_of(problem):
        return status in (408, 416, 425, 429, 500, 502, 503, 504)
    certificate = isinstance(getattr(problem, "reason", None), ssl.SSLCertVerificationError)
    return not (certificate or isinstance(problem, ValueError) or file_error(problem) in LASTING)


def status_of(problem: BaseException) -> int | None:
    """Return the HTTP status that a server, or a proxy on the way to it, has answered with."""
    if refused := re.search(r"Tunnel connection failed: (\d+)", str(problem)):  # by a proxy
        return int(refused[1])
    response = getattr(problem, "response", None)  # of the Hub's client
    return getattr(problem, "code", None) or getattr(response, "status_code", None)


def hidden_cause(problem: BaseException) -> BaseException:
    """Return what went wrong on the way to the Hub, which its client at times hides behind a RuntimeError."""
    return problem.__cause__ or problem if isinstance(problem, RuntimeError) else problem


def bars_wanted() -> bool:
    """Say whether there is someone to watch a progress bar: in a terminal or notebook, not in a file."""
    return MAIN and (NOTEBOOK or sys.stderr.isatty())


def progress(*arguments: Any, **options: Any) -> Any:
    """Return a `tqdm` bar, drawn if one is wanted."""
    from tqdm.auto import tqdm

    return tqdm(*arguments, **{"disable": not bars_wanted()} | options)


def show(table: Any) -> None:
    """Show a pandas table: as HTML in a notebook, as text in a terminal."""
    if NOTEBOOK and MAIN:
        from IPython.display import display

        display(table)
    elif MAIN:
        print(f"\n{table.to_string()}\n", flush=True)


def show_images(title: str, pictures: Iterable, captions: Iterable[str]) -> None:
    """Show pictures, uint8 (height, width, 3), in a notebook; a terminal has no place for them."""
    if NOTEBOOK and MAIN:
        from matplotlib.figure import Figure

        shown = list(zip(pictures, captions, strict=False))
        rows = -(-len(shown) // 4)
        figure = Figure(figsize=(10, 0.4 + 2.2 * rows), layout="constrained")
        figure.suptitle(title)
        for number, (picture, caption) in enumerate(shown, 1):
            axes = figure.add_subplot(rows, 4, number)
            axes.imshow(picture)
            axes.set_title(caption, fontsize=9)
            axes.axis("off")
        figure.savefig(content := io.BytesIO())
        show_picture(content.getvalue())


def show_picture(content: bytes) -> None:
    """Show a PNG in a notebook."""
    from IPython.display import Image, display

    display(Image(content, width=800))
