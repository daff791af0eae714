"""Step 2: from a URL to a folder. A download goes on where it stopped; nothing half done gets its name."""

import http.client
import os
import ssl
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from .archive_formats import is_archive, other_kind
from .archives import class_root, unpack
from .checks import archive_name, is_url, local_path
from .console import first_line, log, may_pass, progress, retry, status_of, stop
from .environment import in_turn
from .files import need_space, read_json, remove, sha256_of, write_json
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
        with in_turn(root):
            return fetch_dataset(settings)
    name, stem = archive_name(url)
    archive, folder = work.archives / name if is_url(url) else local_path(url), root / stem
    if folder.is_file():
        stop(f"{folder} is a file, where {name} is to be unpacked", "move it, or use another --data_root")
    with in_turn(root):  # a second run waits for the first one's download
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
    if folder.exists() and not before:
        log.warning("warning: using the folder %s, which was not unpacked from the archive", folder)
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
    check_proxy(url)
    most, tries = 0, 0
    log.info("downloading %s", url)
    while tries < 6:
        try:
            fetch_rest(url, part, note, timeout)
            break
        except (OSError, ValueError, http.client.HTTPException) as problem:
            size = part.stat().st_size if part.exists() else 0
            most, tries = max(most, size), 1 if size > most else tries + 1
            if tries == 6 or not may_pass(problem):
                remedy = remedy_for(problem, url)
                stop(f"cannot download {url}: {first_line(problem)}", f"{remedy} {archive}")
            asked = str(getattr(problem, "headers", {}).get("Retry-After"))
            wait = min(int(asked) if asked.isdecimal() else 2 ** (tries - 1), 60)
            log.warning("warning: %s; trying again in %s s", first_line(problem), wait)
            time.sleep(wait)
    if not is_archive(part):
        kind = other_kind(part) or "not a zip or tar archive"
        remove(part)
        stop(f"the file at {url} is {kind}", f"put a zip or tar archive at {archive}")
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
        request = ask_from(start, url, known)
        response = urllib.request.urlopen(request, timeout=timeout, context=trusted())
    except urllib.error.HTTPError as problem:
        if problem.code == 416:  # no such range: the file has changed
            remove(part)
        raise
    with response:
        if response.headers.get_content_type() == "text/html" and response.peek(99).lstrip()[:1] == b"<":
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
    parts = urllib.parse.urlsplit(url)  # as a browser shows it: with spaces and umlauts
    place, query = (urllib.parse.quote(text, safe=string.punctuation) for text in (parts.path, parts.query))
    host = parts.netloc.encode("idna").decode()
    url = urllib.parse.urlunsplit((parts.scheme, host, place, query, ""))
    return urllib.request.Request(url, headers=headers)


def trusted() -> ssl.SSLContext:
    """Return what certificates to trust: the system's or those of SSL_CERT_FILE, and of REQUESTS_CA_BUNDLE.

    Raises SystemExit if these cannot be read.
    """
    context, more = ssl.create_default_context(), os.environ.get("REQUESTS_CA_BUNDLE")
    if more:
        try:
            context.load_verify_locations(**{"capath" if os.path.isdir(more) else "cafile": more})
        except OSError as problem:
            stop(f"cannot read REQUESTS_CA_BUNDLE, {more}: {problem}", "correct or unset it")
    return context


def check_proxy(url: str) -> None:
    """Raise SystemExit if the proxy for `url` cannot be used; its password is never shown."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname):
        return
    try:
        proxy = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        good = bool(proxy.hostname and proxy.scheme in ("http", "https") and (proxy.port or True))
    except ValueError:  # its port is no number, as where a password holds a "/"
        good = False
    if not good:
        remedy = "set it to http://HOST:PORT (in passwords, write special characters as %XX) or unset it"
        stop(f"{parts.scheme}_proxy is not an HTTP proxy", remedy)


def remedy_for(problem: Exception, url: str) -> str:
    """Return what to do about a download that failed; the path of the file is to follow."""
    put = "download it yourself to"
    host = f".{urllib.parse.urlsplit(url).hostname}"
    status = status_of(problem)
    if status == 407:
        return f"give the proxy as http://NAME:PASSWORD@HOST:PORT in http_proxy and https_proxy, or {put}"
    if host.endswith((".drive.google.com", ".docs.google.com")):
        return "download it with gdown (pip install gdown) to"
    if host.endswith(".kaggle.com"):
        return "download it with kaggle (pip install kaggle), and put it at"
    if isinstance(getattr(problem, "reason", None), ssl.SSLCertVerificationError):
        return f"give your network's certificates in SSL_CERT_FILE or REQUESTS_CA_BUNDLE, or {put}"
    if status in (401, 403) or isinstance(problem, ValueError):
        return "it may need a login: download it in a browser and save it as"
    return f"run again to go on, or {put}" if may_pass(problem) else f"check the URL, or {put}"
