"""Running another program for `peers.py`, and what it took. Needs Linux: memory is read from /proc."""

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PHASES = "before", "training", "after"  # to start and prepare; to train and validate; to answer, save, report


def add_up(process: psutil.Process, measure: Callable[[psutil.Process], float]) -> float:
    """Return the sum over a process and its children, their children, and so on."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            total += measure(one)
    return total


def cpu_seconds(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:4])  # its own, and those of children that have ended


def watch(process: psutil.Process, ended: threading.Event, sizes: list[int]) -> None:
    """Now and every half a second note the memory (PSS, in bytes) of a process and its children."""
    while not sizes or not ended.wait(0.5):
        sizes.append(add_up(process, lambda one: one.memory_full_info().pss))


def run(command: list, log: Path, trained: tuple[str, ...] = (), **options) -> dict[str, float]:
    """Run a command; return its seconds and CPU seconds before, in and after training, and its peak bytes.

    `trained`: what it prints when training begins, and when it has ended; without that all is "before".
    `options` are those of subprocess.Popen. Raises RuntimeError if the command fails, with its last line, or
    never prints what `trained` says.
    """
    begun, sizes, ended, marks = time.perf_counter(), [], threading.Event(), [(0.0, 0.0)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen([str(word) for word in command], **options)
    family = psutil.Process(process.pid)
    watcher = threading.Thread(target=watch, args=(family, ended, sizes))
    watcher.start()
    last, words = "", [*trained]
    try:
        with log.open("a", buffering=1) as file:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                if words and re.search(words[0], line):
                    words.pop(0)
                    marks.append((time.perf_counter() - begun, add_up(family, cpu_seconds)))
    finally:
        ended.set()
        watcher.join()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(last or f"exit status {process.returncode}")
    if words:
        raise RuntimeError(f"it never printed {words[0]!r}")
    marks.append((time.perf_counter() - begun, usage.ru_utime + usage.ru_stime))
    found = {"peak bytes": max(sizes)}
    for phase, before, after in zip(PHASES, marks, marks[1:], strict=False):
        found[f"{phase}, s"], found[f"{phase}, CPU s"] = after[0] - before[0], after[1] - before[1]
    return found


def join(trained: dict[str, float], answered: dict[str, float]) -> dict[str, float]:
    """Count the command that answers the test images to what follows training."""
    units = "s", "CPU s"
    both = {f"after, {unit}": trained[f"after, {unit}"] + answered[f"before, {unit}"] for unit in units}
    return trained | both | {"peak bytes": max(trained["peak bytes"], answered["peak bytes"])}


def installed(python: str, packages: list[str]) -> dict[str, str]:
    """Return the versions of packages in a Python; raise RuntimeError with what to do if one is missing."""
    code = "import sys, importlib.metadata as m; print(sys.argv[1], m.version(sys.argv[1]))"
    asked = [subprocess.run([python, "-c", code, name], capture_output=True, text=True) for name in packages]
    found = dict(line.split() for line in (done.stdout for done in asked) if line)
    missing = [name for name in packages if name not in found]
    if missing:
        raise RuntimeError(f"not installed: pip install {' '.join(missing)}")
    return found
