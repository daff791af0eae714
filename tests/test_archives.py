"""Zip and tar archives: unpacked whole or not at all, and nothing outside of their folder."""

import errno
import functools
import io
import re
import shutil
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import left_over, load_images, locate_images
from PIL import Image

from steps.options import Settings


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


def write_zip(path, members):
    """Write {name: content}; a content of (mode, bytes) sets the Unix mode of the entry."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are there twice
        for name, content in members:
            mode, content = content if isinstance(content, tuple) else (stat.S_IFREG | 0o644, content)
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(info, content)


def write_tar(path, members, mode="w:gz"):
    kinds = {stat.S_IFLNK: tarfile.SYMTYPE, stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}
    with tarfile.open(path, mode) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = kinds[stat.S_IFMT(content[0])], content[1].decode()
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


ZEROS = bytes(400 << 20)
HOSTILE = {
    "above": ([("a/0.jpg", b"x"), ("../../escaped.txt", b"x")], "'../../escaped.txt' would lead out"),
    "absolute": ([("/tmp/escaped-from-an-archive.txt", b"x")], "would lead out"),
    "backslash": ([("a\\..\\..\\escaped.txt", b"x")], "would lead out"),
    "drive": ([("C:/escaped.txt", b"x")], "would lead out"),
    "symlink": ([("a/link", (stat.S_IFLNK | 0o777, b"/etc")), ("a/link/x", b"x")], "'a/link' is a link"),
    "device": ([("a/null", (stat.S_IFCHR | 0o666, b""))], "'a/null' is a link or a device"),
    "pipe": ([("a/pipe.jpg", (stat.S_IFIFO | 0o666, b""))], "is a link or a device"),
    "case": ([("a/0.jpg", b"x"), ("a/0.JPG", b"y")], "'a/0.JPG' and 'a/0.jpg' have the same name"),
    "folder case": ([("Polyps/0.jpg", b"x"), ("polyps/1.jpg", b"y")], "'polyps' and 'Polyps' have the same"),
    "unicode": ([("a/\u00e9.jpg", b"x"), ("a/e\u0301.jpg", b"y")], "have the same name"),
    "twice": ([("a/0.jpg", b"x"), ("a/0.jpg", b"y")], "have the same name"),
    "file and folder": ([("a", b"x"), ("a/0.jpg", b"y")], "cannot unpack"),
    "our own name": ([("a/0.jpg", b"x"), (".archive.json/0.jpg", b"y")], "cannot unpack"),
    "long": ([("a/" * 3000 + "0.jpg", b"x")], "a name of 6,005 characters"),
    "bomb": ([("a/0.bmp", ZEROS), ("a/1.bmp", ZEROS), ("a/2.bmp", ZEROS)], "unpacks to more than"),
}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path, name, kind):
    members, message = HOSTILE[name]
    root, path = tmp_path / "deep" / "data", tmp_path / f"a.{kind}"
    (write_zip if kind == "zip" else write_tar)(path, members)
    with pytest.raises(SystemExit, match="cannot unpack") as stopped:
        locate_images(Settings(data_url=str(path), data_root=str(root)))
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert left_over(root) == [] and not list(root.glob(".part*"))
    assert not list(tmp_path.glob("**/escaped*")) and not list(Path("/tmp").glob("escaped-from*"))


def test_a_disk_that_is_too_small_is_noticed_before_unpacking(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match="MB free, but"):
        locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    assert left_over(tmp_path / "data") == []


def test_a_disk_that_fills_while_unpacking_leaves_nothing(tmp_path, archive, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", fill)
    with pytest.raises(OSError, match="No space left"):  # in a script one line, see test_script
        locate_images(Settings(data_url=archive, data_root=str(tmp_path / "data")))
    assert left_over(tmp_path / "data") == [] and not list((tmp_path / "data").glob(".part*"))


@pytest.mark.parametrize("end", [0, 200, 512])
def test_a_tar_cut_between_two_members_is_not_whole(tmp_path, make_images, end):
    make_images("wrapped/endoscopy", count=2)
    path = shutil.make_archive(tmp_path / "cut", "tar", tmp_path / "wrapped")
    with tarfile.open(path) as file:
        last = file.getmembers()[-1]
    with open(path, "r+b") as file:
        file.truncate(last.offset + end)
    with pytest.raises(SystemExit, match="cannot unpack"):
        locate_images(Settings(data_url=path, data_root=str(tmp_path / "data")))


def test_a_flipped_bit_in_a_compressed_tar_is_noticed_wherever_it_is(tmp_path):
    """Random pixels, so that gzip stores them as they are: only its checksum, at the end, tells."""
    rng, path = np.random.default_rng(0), tmp_path / "pixels.tar.gz"
    write_tar(path, [(f"{label}/{i}.bmp", rng.bytes(3000)) for label in "ab" for i in range(5)])
    body = path.read_bytes()
    for place in rng.integers(20, len(body) - 1, 30):
        path.write_bytes(body[:place] + bytes([body[place] ^ 4]) + body[place + 1 :])
        with pytest.raises(SystemExit, match="cannot unpack"):
            locate_images(Settings(data_url=str(path), data_root=str(tmp_path / "data")))
    path.write_bytes(body)
    folder = locate_images(Settings(data_url=str(path), data_root=str(tmp_path / "data")))
    assert len(list(folder.glob("*/*.bmp"))) == 10


def test_a_damaged_header_inside_a_tar_is_not_its_end(tmp_path, make_images):
    make_images("wrapped/endoscopy", count=2)
    path = shutil.make_archive(tmp_path / "header", "tar", tmp_path / "wrapped")
    with tarfile.open(path) as file:
        middle = file.getmembers()[5]
    with open(path, "r+b") as file:
        file.seek(middle.offset + 150)  # its checksum
        file.write(b"x")
    with pytest.raises(SystemExit, match="cannot unpack .*its end, a block of zeros, is missing"):
        locate_images(Settings(data_url=path, data_root=str(tmp_path / "data")))


def test_a_tar_may_name_its_folders_last(tmp_path):
    with tarfile.open(tmp_path / "late.tar", "w") as file:
        for name, kind in (
            ("a/0.jpg", tarfile.REGTYPE),
            ("b/0.jpg", tarfile.REGTYPE),
            ("a", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(f"./{name}")
            info.type, info.mode = kind, 0o755
            file.addfile(info)
    folder = locate_images(Settings(data_url=str(tmp_path / "late.tar"), data_root=str(tmp_path / "data")))
    assert sorted(path.name for path in folder.glob("[ab]")) == ["a", "b"]


def test_stray_files_around_the_class_folders_do_not_matter(tmp_path, make_images):
    root = make_images("wrapped/endoscopy", count=2).parent
    (root / "__MACOSX" / "endoscopy").mkdir(parents=True)
    for stray in ("Thumbs.db", "README.txt", "__MACOSX/endoscopy/._red", "endoscopy/red/.DS_Store"):
        (root / stray).write_bytes(b"x")
    path = shutil.make_archive(tmp_path / "strays", "zip", root)
    folder = locate_images(Settings(data_url=path, data_root=str(tmp_path / "data")))
    assert folder.name == "endoscopy"
    assert len(load_images(folder)) == 6


def test_one_class_in_a_wrapping_folder_is_called_so(tmp_path, make_images):
    make_images("wrapped/endoscopy", classes=("polyps",))
    path = shutil.make_archive(tmp_path / "one", "zip", tmp_path / "wrapped")
    folder = locate_images(Settings(data_url=path, data_root=str(tmp_path / "data")))
    with pytest.raises(SystemExit, match="holds one class only"):
        load_images(folder)


PARTS = st.sampled_from(
    [
        "a",
        "b",
        "A",
        "..",
        ".",
        "",
        " ",
        "\u00e9",
        "e\u0301",
        "x.jpg",
        "y.JPG",
        "z.png",
        "\n",
        "CON",
        "C:",
        "-",
    ]
    + ["__MACOSX", ".DS_Store", "Thumbs.db", "a" * 300, "\\", "%2e%2e", "\ud800", "\udcff.jpg", "a::b.jpg"]
)
MEMBERS = st.lists(
    st.tuples(
        st.lists(PARTS, min_size=1, max_size=4).map("/".join), st.sampled_from(["jpeg", "text", "none"])
    ),
    max_size=8,
)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    members=MEMBERS,
    kind=st.sampled_from(["zip", "tar.gz", "tar"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.floats(0, 1), max_size=3),
)
def test_no_archive_ends_in_a_traceback(tmp_path_factory, members, kind, cut, flips):
    """Odd names, damaged bytes, cut ends: a folder of images, or one line, and nothing outside."""
    folder = tmp_path_factory.mktemp("fuzz")
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(picture, "JPEG")
    content = {"jpeg": picture.getvalue(), "text": b"hello", "none": b""}
    path = folder / f"archive.{kind}"
    try:
        write = (
            write_zip if kind == "zip" else functools.partial(write_tar, mode="w:gz" if "gz" in kind else "w")
        )
        write(path, [(name, content[which]) for name, which in members])
    except (ValueError, OSError):  # no archive can hold such a name
        return
    body = bytearray(path.read_bytes())
    for place in flips:
        body[int(place * (len(body) - 1))] ^= 16
    path.write_bytes(body[: int((1 if cut > 0.3 else cut) * len(body))])
    try:
        root = locate_images(Settings(data_url=str(path), data_root=str(folder / "deep" / "data")))
        images = load_images(root)
        assert len(images) >= 1 and len(images.features["label"].names) >= 2
    except SystemExit as stopped:
        assert re.fullmatch(r"error: .+; .+", str(stopped)), stopped
    assert {entry.name for entry in folder.iterdir()} == {path.name, "deep"}
    assert {entry.name for entry in (folder / "deep").iterdir()} == {"data"}
    assert {entry.name for entry in (folder / "deep" / "data").iterdir()} <= {".lock", "archive"}
