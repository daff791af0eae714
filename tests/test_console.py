"""What the user is told: one line for a mistake, bars for people, and nothing twice."""

import errno
import io
import logging
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from steps import console
from steps.console import bars_wanted, end_in_one_line, file_error, listed, progress, retry, show, show_images
from steps.console import PlainFormatter, stop

GO_ON = "run the same command to go on: what is finished is kept"


@pytest.fixture(params=[False, True])
def silent(request, monkeypatch):
    """True in those of torchrun's processes that do not speak."""
    monkeypatch.setattr(console, "MAIN", not request.param)
    return request.param


def test_a_mistake_is_one_line_without_a_token(silent):
    token = "hf_" + 34 * "x"
    with pytest.raises(SystemExit) as stopped:
        stop(ValueError(f"two\n  lines and {token}"), f"try {token}, not hf_short")
    line = "error: two lines and hf_...; try hf_..., not hf_short"
    assert stopped.value.code == (1 if silent else line)


MISSING = f"error: the package yaml is not installed in {sys.executable}; activate the environment "
MISSING += "(source .venv/bin/activate), or pip install -r requirements.txt"
FILE = "error: a file cannot be used: "


@pytest.mark.parametrize("problem, line", [
    (KeyboardInterrupt(), f"stopped; {GO_ON}"),
    (ModuleNotFoundError("No module named 'yaml'", name="yaml"), MISSING),
    (OSError(errno.ENOSPC, "No space left", "model"), f"{FILE}[Errno 28] No space left: 'model'; {GO_ON}"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), f"{FILE}[Errno 32] Broken pipe; {GO_ON}"),
    (RuntimeError("I/O error: full (os error 28)"), f"{FILE}I/O error: full (os error 28); {GO_ON}"),
])  # fmt: skip
def test_what_a_user_can_mend_ends_in_one_line(problem, line, silent, capsys):
    end_in_one_line(type(problem), problem, None)
    assert capsys.readouterr() == ("", "" if silent else f"{line}\n")


@pytest.mark.parametrize(
    "problem", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")]
)
def test_what_no_user_can_mend_keeps_its_traceback(problem, capsys):
    try:
        raise problem
    except Exception:
        end_in_one_line(*sys.exc_info())
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and f"{type(problem).__name__}: {problem}" in error


def test_failures_of_files_are_known_whichever_library_met_them():
    assert file_error(OSError(errno.EIO, "Input/output error")) == errno.EIO
    assert file_error(RuntimeError("Error while serializing: I/O error (os error 5)")) == errno.EIO
    assert (
        file_error(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")) == errno.ENOSPC
    )
    assert file_error(RuntimeError("out of patience")) is None and file_error(OSError("no number")) is None


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited; no time passes."""
    seconds = []
    monkeypatch.setattr(console.time, "sleep", seconds.append)
    return seconds


class Failing:
    """Fails as often as there are `problems`, then answers with what it was given."""

    def __init__(self, *problems):
        self.problems = list(problems)

    def __call__(self, *args, **options):
        if self.problems:
            raise self.problems.pop(0)
        return args, options


def test_what_may_pass_is_tried_again(waits, caplog):
    action = Failing(OSError(errno.EIO, "Input/output\nerror"), TimeoutError(errno.ETIMEDOUT, "timed out"))
    assert retry(action, 1, two=2) == ((1,), {"two": 2}) and waits == [1, 2]
    assert [record.message for record in caplog.records] == [
        "warning: [Errno 5] Input/output error; trying again in 1 s",
        "warning: [Errno 110] timed out; trying again in 2 s",
    ]


def test_patience_has_an_end(waits):
    action = Failing(*(OSError(errno.EIO, f"failure {number}") for number in range(9)))
    with pytest.raises(OSError, match="failure 5"):
        retry(action)
    assert waits == [1, 2, 4, 8, 16] and len(action.problems) == 3


def test_what_does_not_pass_is_not_tried_again(waits):
    for problem in (OSError(errno.ENOSPC, "full"), ValueError("a bug")):
        with pytest.raises(type(problem)):
            retry(Failing(problem))
    assert waits == []


def test_what_gives_hope_can_be_chosen(waits):
    assert retry(Failing(ValueError("busy")), when=lambda problem: "busy" in str(problem)) == ((), {})
    with pytest.raises(OSError):
        retry(Failing(OSError(errno.EIO, "Input/output error")), when=lambda problem: False)
    assert waits == [1]


def test_tables_are_text_in_a_terminal(silent, capsys):
    show(pd.DataFrame({"images": [1200]}, ["polyps"]))
    assert capsys.readouterr().out == ("" if silent else "\n        images\npolyps    1200\n\n")


def test_pictures_have_no_place_in_a_terminal(capsys):
    show_images("title", [np.zeros((2, 2, 3), np.uint8)], ["caption"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_are_drawn_in_a_terminal_only(terminal, silent, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    wanted = terminal and not silent
    assert bars_wanted() == wanted
    assert list(progress(range(3), desc="count")) == [0, 1, 2]
    assert ("count: 100%" in screen.getvalue()) == wanted
    list(progress(range(3), desc="never", disable=True))
    assert "never" not in screen.getvalue()


def test_a_notebook_gets_bars_tables_and_pictures(monkeypatch, capsys):
    pytest.importorskip("IPython")
    import IPython.display

    shown = []
    monkeypatch.setattr(console, "NOTEBOOK", True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    table = pd.DataFrame({"images": [1]})
    show(table)
    show_images("title", (np.zeros((2, 2, 3), np.uint8) for _ in range(5)), ["caption"] * 5)
    assert bars_wanted() and shown[0] is table and capsys.readouterr().out == ""
    assert len(shown) == 2 and shown[1].data.startswith(b"\x89PNG") and shown[1].width == 800


def test_importing_it_needs_no_package():
    """Or a package that is missing could not be named in one line."""
    code = "import steps.console; steps.console.start_logging()"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_only_one_process_speaks(monkeypatch):
    """Under torchrun each process has a RANK; errors are logged by all."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    code = (
        "from steps.console import *; start_logging(); log.info('told'); log.error('alarm'); stop('a', 'b')"
    )
    for rank, told, line in (("0", 1, "error: a; b"), ("1", 0, "")):
        monkeypatch.setenv("RANK", rank)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip()) == (1, line)
        assert (done.stdout.count("told"), done.stdout.count("alarm")) == (told, 1)
    assert logging.getLogger("finetune_vit") is console.log


@pytest.mark.parametrize(
    "names", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR"]
)
def test_half_of_a_launchers_variables_are_no_launcher(names):
    """Left over, they would silence the only process, or let it wait for others."""
    code = (
        "from steps.console import *; start_logging(); log.info('told'); print(os.environ.get('WORLD_SIZE'))"
    )
    environment = os.environ | dict.fromkeys(names.split(), "1")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    warning, told, size = done.stdout.splitlines()
    ignored = names.removesuffix(" MASTER_ADDR").replace(" ", ", ")
    assert f"warning: ignoring {ignored}, because RANK, WORLD_SIZE" in warning
    assert "told" in told and size == "None"


NAMES = """import os; from steps.console import *; start_logging()
log.info("told %s", os.listdir(FOLDER)); print(ascii(os.listdir(FOLDER)), sys.getfilesystemencoding())"""


@pytest.mark.parametrize("environment, shown", [
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "k?rm?z?"),
    ({"PYTHONIOENCODING": "cp1252"}, "k?rm?z?"),
    ({"PYTHONIOENCODING": "latin-1"}, "k?rm?z?"),
    ({"PYTHONIOENCODING": "utf-8"}, "kırmızı"),
])  # fmt: skip
def test_names_stay_right_whatever_the_screen_can_show(tmp_path, environment, shown):
    (tmp_path / "kırmızı").mkdir()
    command = [sys.executable, "-c", NAMES.replace("FOLDER", repr(str(tmp_path)))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, check=True)
    told, names = done.stdout.decode().splitlines()
    assert f"told ['{shown}']" in told and done.stderr == b""
    assert names == f"{ascii(['kırmızı'])} utf-8"


def test_figures_need_no_window_and_no_notebook():
    """Colab hands this back end to its scripts; the environment of the script may lack it."""
    code = "from steps.console import start_logging; start_logging(); import matplotlib.pyplot as plt; "
    command = [sys.executable, "-c", f"{code} plt.figure(); print(plt.get_backend())"]
    environment = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().lower() == "agg"


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert console.stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert console.stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_gets_no_more_text(tmp_path):
    """The terminal is a pseudo-terminal whose other end has gone; a file still gets its lines."""
    code = "import sys, os; from steps.console import *; start_logging(); sys.stdin.read(); close_screen(); "
    code += "print('to nobody', flush=True); os.write(2, b'to the file')"
    other, terminal = os.openpty()
    with (tmp_path / "errors").open("wb") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": terminal, "stderr": errors}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
        os.close(terminal)
        os.close(other)
        process.communicate()
    assert process.returncode == 0 and (tmp_path / "errors").read_bytes() == b"to the file"


@pytest.mark.parametrize(
    "load, given, policy", [(0.0, None, None), (99.0, None, "PASSIVE"), (99.0, "ACTIVE", "ACTIVE")]
)
def test_waiting_threads_leave_a_busy_machine_alone(load, given, policy):
    """Idle cores train faster with threads that spin; the user's own choice stays."""
    code = (
        f"import os; os.getloadavg = lambda: ({load}, 0, 0); from steps.console import start_logging; "
        "start_logging(); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(policy)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, ""),
        (1, "c0"),
        (3, "c0, c1, c2"),
        (4, "c0, c1, c2 and 1 more"),
        (5000, "c0, c1, c2 and 4,997 more"),
    ],
)
def test_a_long_list_is_cut(count, text):
    assert listed((f"c{number}" for number in range(count)), most=3) == text


def test_a_name_forges_no_line_and_sends_no_escape_sequence():
    name = "a\nerror: \x1b[31mfake\r"
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s: learned", (name,), None)
    assert PlainFormatter("%(message)s").format(record) == r"a\nerror: \x1b[31mfake\r: learned"
    with pytest.raises(SystemExit, match=re.escape(r"error: \x1b[2J is bad; rename it")):
        stop("\x1b[2J is bad", "rename it")
