"""Step 2: archives come whole or not at all, by path or from a server on this machine."""

import shutil
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from finetune_vit import Settings, locate_images


@pytest.fixture
def archive(tmp_path, make_images):
    """A zip of three class folders in one root folder, as Kvasir's is."""
    make_images("wrapped/endoscopy")
    return shutil.make_archive(tmp_path / "endoscopy", "zip", tmp_path / "wrapped")


@pytest.fixture
def server(archive):
    """A server that sends `body` and announces `length` bytes; `count` is how often it was asked."""
    with open(archive, "rb") as file:
        body = file.read()
    state = SimpleNamespace(body=body, length=len(body), count=0, status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.count += 1
            self.send_response(state.status)
            if state.length is not None:
                self.send_header("Content-Length", str(state.length))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}/some/endoscopy.zip"
        yield state
        http.shutdown()


def left_over(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith(".part-"))


@pytest.mark.parametrize("length", ["right", None])
def test_url_is_downloaded_and_unpacked_once(tmp_path, server, length):
    server.length = server.length if length else None
    settings = Settings(data_url=server.url, data_root=str(tmp_path / "data"))
    for _ in range(2):
        folder = locate_images(settings)
        assert folder == tmp_path / "data" / "endoscopy" / "endoscopy"
        assert sorted(path.name for path in folder.iterdir()) == ["blue", "green", "red"]
        assert len(list(folder.glob("*/*.jpg"))) == 36
    assert server.count == 1 and left_over(tmp_path / "data") == ["endoscopy", "endoscopy.zip"]


def test_cut_download_leaves_nothing_under_its_name(tmp_path, server):
    server.length = 2 * len(server.body)
    with pytest.raises(SystemExit, match=f"cannot download {server.url}.*bytes"):
        locate_images(Settings(data_url=server.url, data_root=str(tmp_path / "data")))
    assert left_over(tmp_path / "data") == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_server_error_is_one_line(tmp_path, server, status):
    server.status = status
    with pytest.raises(SystemExit, match=f"cannot download.*{status}.*; .*endoscopy.zip") as stopped:
        locate_images(Settings(data_url=server.url, data_root=str(tmp_path / "data")))
    assert "\n" not in str(stopped.value) and left_over(tmp_path / "data") == []


def test_unreachable_server_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="cannot download"):
        locate_images(Settings(data_url="http://127.0.0.1:9/x.zip", data_root=str(tmp_path)))


@pytest.mark.parametrize("damage", ["cut", "flip", "html"])
def test_damaged_archive_leaves_no_folder(tmp_path, archive, damage):
    body = bytearray(open(archive, "rb").read())
    if damage == "flip":
        body[len(body) // 3] ^= 255
    body = {"cut": body[: len(body) // 2], "flip": body, "html": b"<html>not here</html>"}[damage]
    open(archive, "wb").write(body)
    with pytest.raises(SystemExit, match="cannot unpack"):
        locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    assert left_over(tmp_path / "data") == []


@pytest.mark.parametrize("kind, ending", [("gztar", ".tar.gz"), ("tar", ".tar"), ("zip", ".zip")])
@pytest.mark.parametrize("root", ["wrapped", "wrapped/endoscopy"])
def test_zip_and_tar_with_or_without_a_root_folder(tmp_path, make_images, kind, ending, root):
    make_images("wrapped/endoscopy", count=2)
    path = shutil.make_archive(tmp_path / "my.images", kind, tmp_path / root)
    folder = locate_images(Settings(data_url=path, data_root=str(tmp_path / "data")))
    assert path.endswith(ending) and folder.is_relative_to(tmp_path / "data" / "my.images")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["blue", "green", "red"]


def test_members_stay_inside_the_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("../../escaped.txt", "zip")
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        file.add(tmp_path / "a.zip", "../../escaped.txt")
    for name in ("a.zip", "b.tar"):
        try:
            locate_images(Settings(data_url=str(tmp_path / name), data_root=str(tmp_path / "deep" / "data")))
        except SystemExit:
            pass
    assert not list(tmp_path.glob("escaped.txt")) and not list(tmp_path.glob("deep/escaped.txt"))


def test_another_archive_of_the_same_name_is_not_mixed_up(tmp_path, archive):
    locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    (tmp_path / "other").mkdir()
    other = shutil.copy(archive, tmp_path / "other")
    with pytest.raises(SystemExit, match="from another archive"):
        locate_images(Settings(data_url=other, data_root=str(tmp_path / "data")))


def test_name_without_an_ending_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="not named like an archive"):
        locate_images(Settings(data_url="http://127.0.0.1:9/download", data_root=str(tmp_path)))


def test_data_dir_is_taken_as_it_is(make_images):
    folder = make_images(count=1)
    assert locate_images(Settings(data_dir=str(folder))) == folder
