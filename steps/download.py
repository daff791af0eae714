"""Step 2: from a URL to a folder. A download goes on where it stopped; nothing half done gets its name."""

import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import filelock

from .archives import class_root, unpack
from .checks import archive_name, is_url
from .console import log, may_pass, progress, retry, stop
from .files import need_space, read_json, remove, sha256_of, write_json
from .formats import is_archive
from .hubdata import fetch_dataset
from .options import KVASIR_URL, Settings
from .workspace import Workspace

KVASIR_BYTES = 2_489_312_085


def fetch_images(work: Workspace) -> tuple[Path, dict[str, Any]]:
    """Return the folder of class folders and what it came from.

    That is `data_dir` and {}, or a data set of the Hub and its url and revision, or the unpacked archive and
    its url, bytes, mtime_ns and sha256, downloaded into `work.archives` and unpacked into `data_root` if need
    be. Raises SystemExit.
    """
    settings = work.settings
    url, root = settings.data_url, Path(settings.data_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        stop(f"cannot write into {root}: {problem}", "choose another --data_root")
    if settings.data_dir is not None:
        return Path(settings.data_dir).resolve(), {}
    if settings.dataset_name is not None:
        with filelock.FileLock(root / ".lock"):
            return fetch_dataset(settings)
    name, stem = archive_name(url)
    archive, folder = work.archives / name if is_url(url) else Path(url), root / stem
    if folder.is_file():
        stop(f"{folder} is a file, where {name} is to be unpacked", "move it, or use another --data_root")
    with filelock.FileLock(root / ".lock"):  # a second run waits for the first one's download
        if is_url(url) and not folder.exists():
            download(url, archive)
        origin = identify(archive, folder, settings)
        if not folder.exists():
            retry(unpack, archive, folder, origin)
    return class_root(folder.resolve()), origin


def identify(archive: Path, folder: Path, settings: Settings) -> dict[str, Any]:
    """Return url, bytes, mtime_ns and sha256 of `archive`, or what `folder` records of the one it came from.

    Raises SystemExit if the two disagree, or it is not the archive that `data_sha256` asks for.
    """
    before, now = read_json(folder / ".archive.json", ["sha256"]), {"url": settings.data_url}
    if folder.exists() and not before:  # not unpacked by us
        now = {}
    elif archive.exists():
        status = archive.stat()
        now |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        if now.items() <= before.items():  # the same file: 2 GB need not be read again
            now = before
        else:
            now["sha256"] = retry(sha256_of, archive)
    elif before.get("url", now["url"]) == now["url"]:
        now = before
    if before and before["sha256"] != now.get("sha256"):
        stop(f"{folder} was unpacked from another archive", f"use another --data_root, or delete {folder}")
    if settings.data_sha256 and settings.data_sha256.lower() != now.get("sha256"):
        remedy = f"delete {archive} and {folder} to start anew, or correct --data_sha256"
        stop(f"the SHA-256 of {archive} is {now.get('sha256', 'not known')}", remedy)
    return now


def download(url: str, archive: Path, timeout: float = 60) -> None:
    """Download `url` to the file `archive`, from where an earlier attempt stopped. Raises SystemExit.

    `timeout`: seconds without a byte. What is there already is kept, if it came from the same URL.
    """
    part, note = (archive.with_name(f".{name}") for name in (f"part-{archive.name}", f"{archive.name}.json"))
    if archive.exists() and read_json(note).get("url", url) != url:
        stop(f"{archive} came from another URL", f"use another --data_root, or delete {archive}")
    if archive.exists():
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    remedy, most, tries = f"run again to go on, or put the file at {archive} by other means", 0, 0
    log.info("downloading %s", url)
    while tries < 6:
        try:
            fetch_rest(url, part, note, timeout)
            break
        except (OSError, ValueError, http.client.HTTPException) as problem:
            size = part.stat().st_size if part.exists() else 0
            most, tries = max(most, size), 1 if size > most else tries + 1
            if tries == 6 or not may_pass(problem):
                stop(f"cannot download {url}: {problem or type(problem).__name__}", remedy)
            asked = str(getattr(problem, "headers", {}).get("Retry-After"))
            wait = min(int(asked) if asked.isdecimal() else 2 ** (tries - 1), 60)
            log.warning("warning: %s; trying again in %s s", problem or type(problem).__name__, wait)
            time.sleep(wait)
    if not is_archive(part):
        remove(part)
        stop(f"{url} sends what is no zip or tar archive", f"put the file at {archive} by other means")
    os.replace(part, archive)
    if url == KVASIR_URL and archive.stat().st_size != KVASIR_BYTES:
        log.warning("warning: Kvasir v2 had %s bytes, this has %s", KVASIR_BYTES, archive.stat().st_size)


def fetch_rest(url: str, part: Path, note: Path, timeout: float) -> None:
    """Append to `part` what it lacks of `url`; start over where the server has another file, or no ranges.

    `note` keeps what identifies the file: its size, its ETag or date. Raises OSError, ValueError,
    HTTPException.
    """
    known = read_json(note)
    start = part.stat().st_size if part.exists() and known.get("url") == url else 0
    if start and start == known["size"]:
        return
    try:
        response = urllib.request.urlopen(ask_from(start, url, known), timeout=timeout)
    except urllib.error.HTTPError as problem:
        if problem.code == 416:  # no such range: the file has changed
            remove(part)
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the server sends a web page, not an archive")
        if response.status != 206:  # the whole file
            start = 0
        size = start + int(response.headers.get("Content-Length") or 0)
        rest = str(response.headers.get("Content-Range")).startswith(f"bytes {start}-")
        if start and not (rest and size == (known["size"] or size)):
            remove(part)
            raise ConnectionError("the server does not send the rest of the same file")
        need_space(part.parent, size - start)
        tag = response.headers.get("ETag", "W/")
        validator = response.headers.get("Last-Modified") if tag.startswith("W/") else tag  # W/: weak
        write_json(note, {"url": url, "size": size if size > start else None, "validator": validator})
        options = {"total": size or None, "initial": start, "unit": "B", "unit_scale": True}
        with part.open("ab" if start else "wb") as file, progress(desc=url.split("/")[-1], **options) as bar:
            while block := response.read1(1 << 20):
                bar.update(file.write(block))
    if size > start and part.stat().st_size != size:
        raise ConnectionError(f"{part.stat().st_size:,} of {size:,} bytes came")


def ask_from(start: int, url: str, known: dict[str, Any]) -> urllib.request.Request:
    """Return the request for `url` from byte `start` on, if it is still the file that is `known`."""
    headers = {"User-Agent": "finetune_vit", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    return urllib.request.Request(url, headers=headers)
