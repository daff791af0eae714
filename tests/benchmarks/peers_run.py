"""Running another program for `peers.py`, and what it took. Needs Linux: memory is read from /proc."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

import psutil

PHASES = "before", "training", "after"  # to start and prepare; to train and validate; to answer, save, report


def watch(process: psutil.Process, seen: dict[str, float]) -> None:
    """Twice a second note the CPU seconds and the highest memory (PSS) of a process and its children."""
    while True:
        try:
            family = [process, *process.children(recursive=True)]
            seen["memory"] = max(seen["memory"], sum(one.memory_full_info().pss for one in family))
            seen["cpu"] = max(seen["cpu"], sum(sum(one.cpu_times()[:4]) for one in family))
        except psutil.NoSuchProcess:
            if not process.is_running():
                return
        except psutil.AccessDenied:  # it has ended, and nobody has asked how
            return
        time.sleep(0.5)


def run(command: list, log: Path, trained: tuple[str, ...] = (), **options) -> dict[str, float]:
    """Run a command; return its seconds and CPU seconds before, in and after training, and its peak bytes.

    `trained`: what it prints when training begins, and when it has ended; without that all is "before".
    `options` are those of subprocess.Popen. Raises RuntimeError with the last line if the command fails.
    """
    start, seen, marks = time.perf_counter(), {"memory": 0, "cpu": 0.0}, [(0.0, 0.0)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen([str(word) for word in command], **options)
    watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid), seen))
    watcher.start()
    last, words = "", [*trained, "$ "]  # no line has a blank after its end
    with log.open("a", buffering=1) as file:
        for line in process.stdout:
            file.write(line)
            last = line.strip() or last
            if re.search(words[len(marks) - 1], line):
                marks.append((time.perf_counter() - start, seen["cpu"]))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise RuntimeError(last or f"exit status {process.returncode}")
    marks.append((time.perf_counter() - start, usage.ru_utime + usage.ru_stime))
    found = {"peak bytes": seen["memory"]}
    for phase, begun, ended in zip(PHASES, marks, marks[1:], strict=False):
        found[f"{phase}, s"], found[f"{phase}, CPU s"] = ended[0] - begun[0], ended[1] - begun[1]
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
