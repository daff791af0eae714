"""Zip and tar archives: unpacked whole or not at all, and nothing outside of their folder."""

import errno
import functools
import gzip
import io
import os
import re
import shutil
import stat
import struct
import tarfile
import time
import tracemalloc
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import left_over, load_images, locate_images
from PIL import Image

from steps.archives import unpack
from steps.archive_formats import is_archive
from steps.load import record_data
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
    "long": ([("a/" * 3000 + "0.jpg", b"x")], "a name has 6,005 characters"),
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


class Raw(zipfile.ZipInfo):
    """A member whose name is written as it is given, in bytes."""

    def _encodeFilenameFlags(self):  # noqa: N802
        return self.raw, self.flag_bits


def write_raw_zip(path, names, extra=lambda raw: b"", system=3):
    with zipfile.ZipFile(path, "w") as file:
        for number, raw in enumerate(names):
            info = Raw(str(number))
            info.raw, info.extra, info.create_system = raw, extra(raw), system
            file.writestr(info, b"x")


def unicode_path(name):
    """What writes the name into Info-ZIP's extra field, for whatever name is in the header."""
    content = name.encode()
    size = 5 + len(content)
    return lambda raw: struct.pack("<HHBL", 0x7075, size, 1, zlib.crc32(raw)) + content


def of_another(name):
    return lambda raw: unicode_path(name)(raw + b"?")


OF_UNIX, OF_WINDOWS = 3, 0
NAMES = {  # raw name, extra field, system: name on the disk, whether it was guessed
    "UTF-8, no flag": ("ülser/ş.jpg".encode(), None, OF_UNIX, "ülser/ş.jpg", False),
    "NFD, no flag": ("u\u0308lser/0.jpg".encode(), None, OF_UNIX, "u\u0308lser/0.jpg", False),
    "extra field": (b"\x81lser/0.jpg", unicode_path("ülser/ş.jpg"), OF_WINDOWS, "ülser/ş.jpg", False),
    "extra field for ASCII": (b"_lser/0.jpg", unicode_path("ülser/0.jpg"), OF_WINDOWS, "ülser/0.jpg", False),
    "field of another name": (b"\x81lser/0.jpg", of_another("x/y.jpg"), OF_UNIX, "ülser/0.jpg", True),
    "cp437": (b"\x81lser/0.jpg", None, OF_UNIX, "ülser/0.jpg", True),
    "Windows": (b"set\\a\\0.jpg", None, OF_WINDOWS, "set/a/0.jpg", False),
    "Windows, mixed": (b"set/a\\0.jpg", None, OF_WINDOWS, "set/a/0.jpg", False),
    "Unix, no slash": (b"set\\a\\0.jpg", None, OF_UNIX, "set/a/0.jpg", False),
    "Unix, in a name": (b"a/x\\y.jpg", None, OF_UNIX, "a/x\\y.jpg", False),
    "Shift-JIS": ("表/0.jpg".encode("shift_jis"), None, OF_WINDOWS, "ò\\/0.jpg", True),
    "colon": (b"set: a/b: 0?.jpg", None, OF_UNIX, "set: a/b: 0?.jpg", False),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows takes fewer characters")
@pytest.mark.parametrize("case", NAMES)
def test_names_in_zips_are_what_their_maker_meant(tmp_path, caplog, case):
    raw, extra, system, name, guessed = NAMES[case]
    write_raw_zip(tmp_path / "a.zip", [raw], extra or (lambda raw: b""), system)
    unpack(tmp_path / "a.zip", tmp_path / "a", {})
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != ".archive.json"]
    assert [path.relative_to(tmp_path / "a").as_posix() for path in files] == [name]
    assert ("read as cp437, for example" in caplog.text) == guessed


def test_many_guessed_names_are_said_once(tmp_path, caplog):
    write_raw_zip(tmp_path / "a.zip", [f"ü/{i}.jpg".encode("cp1254") for i in range(50)])
    unpack(tmp_path / "a.zip", tmp_path / "a", {})
    assert caplog.text.count("cp437") == 1 and "50 of its names" in caplog.text and "'ⁿ/0.jpg'" in caplog.text


@pytest.mark.parametrize(
    "name", ["..\\escaped", "a\\..\\..\\escaped", "\\escaped", "C:\\escaped", "../escaped"]
)
@pytest.mark.parametrize("way", ["Windows", "Unix", "extra field"])
def test_no_spelling_of_a_name_leads_out(tmp_path, name, way):
    extra, raw = (
        (unicode_path(name), b"a/0.jpg") if way == "extra field" else (lambda raw: b"", name.encode())
    )
    write_raw_zip(tmp_path / "a.zip", [raw], extra, OF_WINDOWS if way == "Windows" else OF_UNIX)
    with pytest.raises(SystemExit, match="would lead out"):
        unpack(tmp_path / "a.zip", tmp_path / "deep" / "a", {})
    assert not list(tmp_path.rglob("*escaped*"))


def tar_header(name, size, kind):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def record(text):
    """A pax record with its own length."""
    size = len(text) + 2
    while size != len(f"{size} {text}\n"):
        size = len(f"{size} {text}\n")
    return f"{size} {text}\n".encode()


def blocks(content):
    return content + bytes(-len(content) % 512)


BAD_HEADER = "one of its headers is damaged"
REDOS = b"0" * (200 << 10)  # CVE-2024-6232
LONG_NUMBER = record("a=" + "0" * (200 << 10))
QUADRATIC = b"2 " * (200 << 10) + b"="
MEGABYTES = {
    "long name": (tar_header("x", 2 << 20, b"L") + bytes(2 << 20), "headers are too long"),
    "4 GB that are not there": (tar_header("x", 4 << 30, b"x"), "headers are too long"),
    "pax": (tar_header("x", 2 << 20, b"x") + bytes(2 << 20), "headers are too long"),
    "many": ((tar_header("x", 900 << 10, b"g") + bytes(900 << 10)) * 2, "headers are too long"),
    "digits": (tar_header("x", len(REDOS), b"x") + blocks(REDOS), BAD_HEADER),
    "a number": (tar_header("x", len(LONG_NUMBER), b"x") + blocks(LONG_NUMBER), BAD_HEADER),
    "short records": (tar_header("x", len(QUADRATIC), b"x") + blocks(QUADRATIC), BAD_HEADER),
    "behind": (bytes(80 << 20), "more than 64 MB follow its end"),
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_headers_of_a_tar_take_neither_time_nor_memory(tmp_path, name):
    content, message = MEGABYTES[name]
    first = tar_header("a/0.jpg", 1, b"0") + blocks(b"x")
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as file:
        file.write(first + content + tar_header("a/1.jpg", 0, b"0") + bytes(1024))
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(SystemExit, match=message):
        unpack(tmp_path / "a.tar.gz", tmp_path / "a", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 5 and peak < 50e6


def test_ordinary_long_names_in_a_tar_are_taken(tmp_path):
    name = "ü" * 60 + "/" + "x" * 200 + ".jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as file:
            info = tarfile.TarInfo(name)
            info.pax_headers = {"SCHILY.xattr.note": "x = 1\n" * 999} if form == tarfile.PAX_FORMAT else {}
            file.addfile(info)
        unpack(tmp_path / f"{form}.tar", tmp_path / str(form), {})
        assert (tmp_path / str(form) / name).is_file()


def test_hard_links_are_taken_inside_of_a_tar_only(tmp_path):
    for target, taken in (("a/0.jpg", True), ("a", False), ("/etc/passwd", False), ("../x", False)):
        path = tmp_path / f"{len(target)}.tar"
        with tarfile.open(path, "w") as file:
            info = tarfile.TarInfo("a/0.jpg")
            info.size = 5
            file.addfile(info, io.BytesIO(b"image"))
            link = tarfile.TarInfo("b/1.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, target
            file.addfile(link)
        with nullcontext() if taken else pytest.raises(SystemExit, match="'b/1.jpg' is a link or a device"):
            unpack(path, tmp_path / path.stem, {})
            assert (tmp_path / path.stem / "b" / "1.jpg").read_bytes() == b"image"


def test_empty_files_take_a_block_each_of_the_ratio(tmp_path, monkeypatch):
    """A tar of empty files: 3 kB that make 2 MB of files; as a zip it is 20 times as large."""
    monkeypatch.setattr("steps.archives.SMALL", 1 << 20)
    members = [(f"a/{i}.jpg", b"") for i in range(600)]
    write_tar(tmp_path / "a.tar.gz", members)
    write_zip(tmp_path / "a.zip", members)
    with pytest.raises(SystemExit, match="unpacks to more than 1,048,576 bytes"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "tar", {})
    unpack(tmp_path / "a.zip", tmp_path / "zip", {})
    assert len(list((tmp_path / "zip" / "a").iterdir())) == 600


def encrypted(path):
    write_zip(path, [("a/0.jpg", b"x")])
    body = bytearray(path.read_bytes())
    body[body.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(body)


def deflate64(path):
    write_zip(path, [("a/0.jpg", b"x")])
    body = bytearray(path.read_bytes())
    body[8] = body[body.find(b"PK\1\2") + 10] = 9
    path.write_bytes(body)


UNREAD = {
    "encrypted": (encrypted, "it is encrypted; unpack it with another program and give the folder"),
    "deflate64": (deflate64, "compression .*; unpack it with another program and give the folder"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "it is a 7z archive; unpack it with another program"),
    "rar": (b"Rar!\x1a\x07\0" + bytes(50), "it is a RAR archive; unpack it with another program"),
    "zeros": (bytes(10240), "it is damaged, or not a zip or tar archive"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_cannot_be_unpacked_is_named(tmp_path, kind):
    content, message = UNREAD[kind]
    path = tmp_path / "a.zip"
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"cannot unpack .*{message}"):
        unpack(path, tmp_path / "a", {})
    assert is_archive(path) == (kind in ("encrypted", "deflate64")) and not (tmp_path / "a").exists()


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
        record_data(load_images(folder), folder, {}, None)


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
