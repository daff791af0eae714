"""Step 2: images come by path or from a server on this machine; what is there is not fetched twice."""

import errno
import functools
import hashlib
import os
import shutil
import ssl
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import left_over, locate_images

from steps.download import download, fetch_images
from steps.options import Settings
from steps.workspace import Workspace


@pytest.fixture
def server(archive):
    """A server of one file, as good as Apache is, unless `faults` holds what it does wrong the next times.

    `requests` are the headers that came, `sent` the bytes of the file that went out.
    """
    with open(archive, "rb") as file:
        body = file.read()
    state = SimpleNamespace(
        body=body, tag='"v1"', faults=[], requests=[], paths=[], sent=0, release=threading.Event()
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fault = state.faults.pop(0) if state.faults else ""
            state.requests.append(dict(self.headers))
            state.paths.append(self.path)
            body, start, size = state.body, 0, len(state.body)
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "7")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if fault == "redirect":
                self.send_response(302)
                self.send_header("Location", "/elsewhere/endoscopy.zip")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            asked, tag = self.headers.get("Range"), self.headers.get("If-Range", state.tag)
            if asked and fault != "no ranges" and tag == state.tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= size:
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            else:
                self.send_response(200)
            html = str(fault).endswith("html")
            self.send_header("Content-Type", "text/html; charset=utf-8" if html else "application/zip")
            if state.tag:
                self.send_header("ETag", state.tag)
            body = b"<html>Please sign in</html>" if fault == "html" else body[start:]
            if fault != "no length":
                self.send_header(
                    "Content-Length",
                    str({"long": 2, "short": 0.5}.get(fault, 1) * len(body))[:9].split(".")[0],
                )
            self.end_headers()
            part = len(body) * 9 // 10 if fault in ("cut", "stall") else len(body)
            self.wfile.write(body[:part])
            state.sent += part
            if fault == "stall":
                self.wfile.flush()
                state.release.wait(20)
            self.close_connection = True

        do_CONNECT = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}/some/endoscopy.zip"
        yield state
        state.release.set()
        http.shutdown()


def fetch(server, tmp_path, **more):
    """Download the file; return the bytes that came, and where it lies."""
    path = tmp_path / "down" / "endoscopy.zip"
    path.parent.mkdir(exist_ok=True)
    download(server.url, path, **more)
    return path.read_bytes(), path


def origin_of(settings):
    """What the images came from, if downloads are kept beside data_root."""
    root = Path(settings.data_root)
    return fetch_images(Workspace(settings, None, root.parent))[1]


def test_url_is_downloaded_and_unpacked_once(tmp_path, server):
    settings = Settings(data_url=server.url, data_root=str(tmp_path / "data"))
    for _ in range(2):
        folder = locate_images(settings)
        assert folder == tmp_path / "data" / "endoscopy" / "endoscopy"
        assert sorted(path.name for path in folder.iterdir()) == ["blue", "green", "red"]
        assert len(list(folder.glob("*/*.jpg"))) == 36
    assert len(server.requests) == 1 and left_over(tmp_path / "data") == ["endoscopy", "endoscopy.zip"]
    assert not list((tmp_path / "data").glob(".part*"))


def sent(server, times=1):
    """Return how many bytes of the archive were sent; the server's thread counts after it has sent them."""
    for _ in range(100):
        if server.sent < times * len(server.body):
            threading.Event().wait(0.02)
    return server.sent


@pytest.mark.parametrize("fault", ["cut", "stall", "redirect", 429, 503, 500, 408])
def test_a_fault_that_passes_costs_no_byte_twice(tmp_path, server, waits, fault):
    server.faults = [fault]
    content, _ = fetch(server, tmp_path, timeout=1)
    assert content == server.body and sent(server) == len(server.body)
    assert len(server.requests) == 2
    assert waits == ([] if fault == "redirect" else [7] if isinstance(fault, int) else [1])
    if fault in ("cut", "stall"):
        again = server.requests[1]
        assert again["Range"] == f"bytes={len(server.body) * 9 // 10}-" and again["If-Range"] == '"v1"'


def test_an_interrupted_download_goes_on_in_the_next_run(tmp_path, server, waits):
    """However it was interrupted: what a second process finds is the part on disk and its note."""
    server.faults = ["cut"] + [500] * 9
    with pytest.raises(
        SystemExit, match="cannot download .*endoscopy.zip: HTTP Error 500.*; run again to go on"
    ):
        fetch(server, tmp_path)
    assert waits == [1, 7, 7, 7, 7] and left_over(tmp_path / "down") == []
    server.faults = []
    content, _ = fetch(server, tmp_path)
    assert content == server.body and sent(server) == len(server.body)


@pytest.mark.parametrize("change", ["the file", "the file, no ETag", "no ranges"])
def test_the_start_of_another_file_is_thrown_away(tmp_path, server, waits, change):
    server.tag = None if "no ETag" in change else server.tag
    server.faults = ["cut", *[500] * 5]
    with pytest.raises(SystemExit):
        fetch(server, tmp_path)
    if change == "no ranges":
        server.faults = ["no ranges"]
    else:
        server.body = server.body[:40] + b"x" * 5000 + server.body[40:]
        server.tag = server.tag and '"v2"'
    content, _ = fetch(server, tmp_path)
    assert content == server.body


def test_a_length_that_is_a_lie_costs_the_file_once_more(tmp_path, server, waits):
    server.faults = ["long"]
    assert fetch(server, tmp_path)[0] == server.body and sent(server, 2) == 2 * len(server.body)


def test_a_server_without_etag_is_resumed_if_the_size_is_the_same(tmp_path, server, waits):
    server.tag, server.faults = None, ["cut"]
    content, _ = fetch(server, tmp_path)
    assert content == server.body and sent(server) == len(server.body)


def test_a_finished_part_is_not_asked_for_again(tmp_path, server):
    """Killed between the last byte and the renaming."""
    content, path = fetch(server, tmp_path)
    path.rename(path.with_name(".part-endoscopy.zip"))
    assert fetch(server, tmp_path)[0] == content and len(server.requests) == 1


def test_length_may_be_unknown(tmp_path, server):
    server.faults = ["no length"]
    assert fetch(server, tmp_path)[0] == server.body


@pytest.mark.parametrize(
    "faults, message, remedy, requests",
    [
        ([403], "403", "save it as", 1),
        ([404], "404", "download it yourself to", 1),
        ([500] * 9, "500", "download it yourself to", 6),
        (["html"], "a web page, not an archive", "save it as", 1),
        (["short"], "is not a zip or tar archive", "put a zip or tar archive at", 1),
        (["long"] * 9, "416", "download it yourself to", 6),
    ],
    ids=str,
)
def test_what_does_not_pass_is_one_line(tmp_path, server, waits, faults, message, remedy, requests):
    server.faults = faults
    with pytest.raises(SystemExit) as stopped:
        locate_images(Settings(data_url=server.url, data_root=str(tmp_path / "data")))
    line = str(stopped.value)
    assert server.url in line and message in line and "\n" not in line
    assert line.endswith(f" {remedy} {tmp_path / 'data' / 'endoscopy.zip'}")
    assert len(server.requests) == requests and left_over(tmp_path / "data") == []


def test_unreachable_server_is_one_line(tmp_path, waits):
    with pytest.raises(SystemExit, match="cannot download http://127.0.0.1:9/x.zip: .*refused.*; run again"):
        locate_images(Settings(data_url="http://127.0.0.1:9/x.zip", data_root=str(tmp_path)))
    assert waits == [1, 2, 4, 8, 16]


def test_the_same_name_from_another_url_is_not_taken_for_it(tmp_path, server):
    fetch(server, tmp_path)
    with pytest.raises(SystemExit, match="endoscopy.zip came from another URL"):
        download(server.url + "?v=2", tmp_path / "down" / "endoscopy.zip")


def test_a_full_disk_is_noticed_before_the_download(tmp_path, server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=len(server.body) - 1))
    with pytest.raises(SystemExit, match="MB free, but .* MB are needed"):
        fetch(server, tmp_path)
    assert left_over(tmp_path / "down") == [] and not list((tmp_path / "down").glob(".part*"))


def test_archive_is_known_by_its_content(tmp_path, archive):
    with open(archive, "rb") as file:
        right = hashlib.sha256(file.read()).hexdigest()
    settings = Settings(data_url=archive, data_root=str(tmp_path / "data"), data_sha256="0" * 64)
    with pytest.raises(SystemExit, match=f"the SHA-256 of {archive} is {right}"):
        locate_images(settings)
    assert left_over(tmp_path / "data") == []
    settings.data_sha256 = right.upper()
    for _ in range(2):
        origin = origin_of(settings)
        assert origin["sha256"] == right and origin["bytes"] == Path(archive).stat().st_size
    os.utime(archive, (1, 1))  # touched, not changed
    assert origin_of(settings)["sha256"] == right
    Path(archive).unlink()  # it has done its work
    assert origin_of(settings)["sha256"] == right


def test_a_drive_that_fails_for_a_while_is_waited_for(tmp_path, archive, monkeypatch, waits):
    extract, failures = zipfile.ZipFile.extract, iter([0, 0, 0, 1, 0, 1] + [0] * 99)

    def fail_at_times(*arguments):
        if next(failures):
            raise OSError(errno.EIO, "Input/output error")
        return extract(*arguments)

    monkeypatch.setattr(zipfile.ZipFile, "extract", fail_at_times)
    folder = locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    assert len(list(folder.glob("*/*.jpg"))) == 36 and waits == [1, 2]


def test_another_archive_of_the_same_name_is_not_mixed_up(tmp_path, archive, make_images):
    locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    make_images("other/endoscopy", count=5)
    other = shutil.make_archive(tmp_path / "other" / "endoscopy", "zip", tmp_path / "other")
    same = shutil.copy(archive, tmp_path / "other" / "wrapped.zip")
    with pytest.raises(SystemExit, match="from another archive"):
        locate_images(Settings(data_url=other, data_root=str(tmp_path / "data")))
    shutil.copy(other, archive)  # replaced in its place
    with pytest.raises(SystemExit, match="from another archive"):
        locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    os.replace(same, archive)
    locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))


ADDRESSES = {  # what follows the server: what is asked for, the folder
    "/download?id=7": ("/download?id=7", "download"),
    "/set-v2.0": ("/set-v2.0", "set-v2.0"),
    "/görsel ler.zip?x=ş": ("/g%C3%B6rsel%20ler.zip?x=%C5%9F", "görsel ler"),
    "/g%C3%B6rsel.zip": ("/g%C3%B6rsel.zip", "görsel"),
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_url_may_be_as_a_browser_shows_it(tmp_path, server, address):
    asked, stem = ADDRESSES[address]
    url = server.url.replace("http://", "HTTP://").removesuffix("/some/endoscopy.zip") + address
    for _ in range(2):
        folder = locate_images(Settings(data_url=url, data_root=str(tmp_path / "data")))
        assert folder == tmp_path / "data" / stem / "endoscopy" and len(list(folder.glob("*/*.jpg"))) == 36
    assert server.paths == [asked]


def test_a_local_archive_needs_no_ending_and_may_be_a_file_url(tmp_path, archive):
    local = tmp_path / "my göz set"
    shutil.copy(archive, local)
    for number, name in enumerate([str(local), local.as_uri(), f"file://{local}"]):
        folder = locate_images(Settings(data_url=name, data_root=str(tmp_path / f"data{number}")))
        assert folder == tmp_path / f"data{number}" / "my göz set" / "endoscopy"


def test_an_archive_that_says_it_is_a_page_is_taken(tmp_path, server):
    server.faults = ["archive as html"]
    assert fetch(server, tmp_path)[0] == server.body


REFUSED = {  # url, what the server or the proxy answers: message, remedy
    "login": (None, 401, "HTTP Error 401", "it may need a login: download it in a browser"),
    "page": (None, "html", "a web page", "it may need a login: download it in a browser"),
    "nowhere": (None, 404, "HTTP Error 404", "check the URL, or download it yourself to"),
    "drive": (
        "http://drive.google.com/file/d/1/view",
        "html",
        "a web page",
        "with gdown (pip install gdown)",
    ),
    "kaggle": ("http://www.kaggle.com/datasets/a/b", 404, "404", "with kaggle (pip install kaggle)"),
    "proxy": ("http://host.invalid/a.zip", 407, "HTTP Error 407", "give the proxy as http://NAME:PASSWORD@"),
    "tunnel": (
        "https://host.invalid/a.zip",
        407,
        "Tunnel connection failed: 407",
        "give the proxy as http://",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_running_again_cannot_help_is_said_so(tmp_path, server, waits, monkeypatch, caplog, case):
    url, fault, message, remedy = REFUSED[case]
    server.faults = [fault]
    if url:  # nothing outside is asked: the server plays the proxy
        monkeypatch.setenv(f"{url.split(':')[0]}_proxy", server.url.replace("//", "//me:hidden%2Fword@"))
    with pytest.raises(SystemExit) as stopped:
        locate_images(Settings(data_url=url or server.url, data_root=str(tmp_path / "data")))
    line = str(stopped.value)
    assert message in line and remedy in line and "run again" not in line and "\n" not in line
    assert waits == [] and len(server.requests) == 1 and "hidden" not in line + caplog.text


@pytest.mark.parametrize(
    "proxy", ["http://me:hidden/word@host:80", "socks5://me:hidden@host:80", "http://me:hidden@host:x"]
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(tmp_path, monkeypatch, caplog, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(SystemExit, match="^error: http_proxy is not an HTTP proxy; set it to") as stopped:
        locate_images(Settings(data_url="http://host.invalid/a.zip", data_root=str(tmp_path)))
    assert "hidden" not in str(stopped.value) + caplog.text


def test_no_proxy_is_asked_for_this_machine(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://host.invalid:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(server, tmp_path)[0] == server.body


CERTIFICATES = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
@pytest.mark.parametrize("variable", [None, *CERTIFICATES])
def test_certificates_are_those_of_the_system_and_of_the_network(
    tmp_path, archive, waits, monkeypatch, variable
):
    for name in CERTIFICATES:
        monkeypatch.delenv(name, raising=False)
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    command = f"{command} -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=Path(archive).parent)
    with ThreadingHTTPServer(("localhost", 0), handler) as http:
        http.socket = context.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"https://localhost:{http.server_port}/{Path(archive).name}"
        try:
            if variable:
                monkeypatch.setenv(variable, str(certificate))
                download(url, tmp_path / "down.zip")
                assert (tmp_path / "down.zip").read_bytes() == Path(archive).read_bytes()
            else:
                with pytest.raises(SystemExit, match="CERTIFICATE.*; give your network's certificates in"):
                    download(url, tmp_path / "down.zip")
                assert waits == []
        finally:
            http.shutdown()


def test_certificates_that_are_not_there_are_one_line(tmp_path, server, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(SystemExit, match="cannot read REQUESTS_CA_BUNDLE, .*; correct or unset it"):
        fetch(server, tmp_path)


def test_a_file_in_the_way_is_one_line(tmp_path, archive, make_images):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "endoscopy").write_text("mine")
    with pytest.raises(
        SystemExit, match="endoscopy is a file, where endoscopy.zip is to be unpacked; move it"
    ):
        locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    settings = Settings(data_dir=str(make_images()), data_root=archive)
    with pytest.raises(SystemExit, match="cannot write into .*; choose another --data_root"):
        locate_images(settings)


def test_data_dir_is_taken_as_it_is(make_images):
    folder = make_images(count=1)
    assert locate_images(Settings(data_dir=str(folder))) == folder
