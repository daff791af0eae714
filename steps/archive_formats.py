"""Zip and tar archives: told by their content, names as their makers meant them, headers of bounded size."""

import os
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from .console import log

OTHERS = {  # what files begin with that need another program
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
}
WINDOWS = (0, 10, 14)  # FAT, NTFS and VFAT, as a zip says where it was made
LONGEST = 1 << 20  # bytes that the headers of one file in a tar may take
BEHIND = 64 << 20  # bytes that may lie behind the end of a tar
PAX, LONG = (b"x", b"g", b"X"), (b"L", b"K")  # headers of tar that have more behind them: records or a name
DIGITS = bytes.maketrans(b"123456789", b"0" * 9)


def is_archive(path: Path) -> bool:
    """Say whether a file is a zip or tar archive, by its content."""
    if zipfile.is_zipfile(path):  # even if it is damaged
        return True
    try:
        open_archive(path).close()
    except (ValueError, EOFError, NotImplementedError):
        return False
    return True


def open_archive(path: Path) -> "zipfile.ZipFile | Tar":
    """Open a zip or tar archive by its content.

    Raises NotImplementedError for other archives, ValueError for other files, and what zip and tar raise.
    """
    if zipfile.is_zipfile(path):
        return zipfile.ZipFile(path)
    with suppress(tarfile.TarError):
        archive = Tar.open(path)
        if archive.firstmember is not None:  # a file of zeros would be an empty tar
            return archive
        archive.close()
    if kind := other_kind(path):
        raise NotImplementedError(f"it is {kind}")
    raise ValueError("it is damaged, or not a zip or tar archive")


def other_kind(path: Path) -> str | None:
    """Return what a file is, if it is an archive that needs another program."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((kind for magic, kind in OTHERS.items() if start.startswith(magic)), None)


def spell_names(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the members of a zip, their `filename` as its maker meant it, with "/" between folders.

    Names that are in no known encoding are read as cp437, as the format has it, and said once.
    """
    guessed = []
    for member in archive.infolist():
        name, certain = decode_name(member)
        if not name:
            raise ValueError("a file in it has no name")
        if not certain:
            guessed.append(name)
        elif "/" not in name or member.create_system in WINDOWS:
            name = name.replace("\\", "/")
        member.filename = name
    if guessed:
        problem = "warning: %s does not say how %s of its names are encoded: read as cp437, for example %r"
        remedy = "; if that looks wrong, pack it again as tar, or with names in UTF-8"
        log.warning(problem + remedy, archive.filename, f"{len(guessed):,}", guessed[0])
    return archive.infolist()


def decode_name(member: zipfile.ZipInfo) -> tuple[str, bool]:
    """Return a member's name, and False if its encoding had to be guessed.

    That is UTF-8 if the member says so, else what Info-ZIP's extra field says, else UTF-8 if it is valid.
    """
    name, certain = member.orig_filename, True
    if not member.flag_bits & 0x800:  # names are in UTF-8; else `zipfile` has read them as cp437
        raw = name.encode("cp437")
        try:
            name = unicode_path(member.extra, raw) or raw.decode()
        except UnicodeDecodeError:
            certain = False
    return name.partition("\0")[0], certain


def unicode_path(extra: bytes, raw: bytes) -> str:
    """Return the name in the Info-ZIP Unicode Path field (0x7075), "" if there is none for the name `raw`."""
    while len(extra) >= 4:
        kind, size = struct.unpack("<HH", extra[:4])
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == 0x7075 and content[:5] == struct.pack("<BL", 1, zlib.crc32(raw)):
            return content[5:].decode()
    return ""


class Tar(tarfile.TarFile):
    """A tar archive whose headers cannot fill the memory, even if 9 kB unpack to 4 GB of them.

    `next` raises ValueError for a header that no archive of images has.
    """

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, None at the end."""
        if not isinstance(self.fileobj, Headers):
            self.fileobj = Headers(self.fileobj, BEHIND + 20 * os.path.getsize(self.name))
        self.fileobj.begin()
        return super().next()

    def check_end(self) -> None:
        """Raise EOFError, OSError or ValueError unless all members were listed, and the archive is whole.

        `tarfile` takes any damaged header for the end.
        """
        self.fileobj = self.fileobj.stream  # what is read from now on is no header
        self.fileobj.seek(self.offset)
        if self.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("its end, a block of zeros, is missing")
        for _ in range(BEHIND >> 20):  # to where a compressed file keeps its checksum
            if not self.fileobj.read(1 << 20):
                return
        raise ValueError(f"more than {BEHIND >> 20} MB follow its end")


class Headers:
    """The file of a tar archive while its headers are read, which may take `most` bytes."""

    def __init__(self, stream: Any, most: int) -> None:
        self.stream, self.left, self.kind = stream, most, b""

    def begin(self) -> None:
        """Go on to the headers of the next member."""
        self.of_member, self.kind = LONGEST, b""

    def read(self, size: int) -> bytes:
        """Return `size` bytes. Raises ValueError if they are too many, or malformed records."""
        self.left, self.of_member = self.left - size, self.of_member - size
        if size < 0 or self.left < 0 or self.of_member < 0:
            raise ValueError("its headers are too long for an archive of images")
        block = self.stream.read(size)
        if self.kind in PAX:
            check_records(block)
        self.kind = b"" if self.kind in PAX + LONG else block[156:157]  # where a header keeps its kind
        return block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def check_records(block: bytes) -> None:
    r"""Raise ValueError unless a pax header holds records `LENGTH KEY=VALUE\n`, then zeros.

    `tarfile` of Python before 3.11.10 and 3.12.6 takes hours over others, and over long numbers
    (CVE-2024-6232).
    """
    at, damaged = 0, b"0" * 100 in block.translate(DIGITS)
    while not damaged and block[at : at + 1].strip(b"\0"):
        length = block[at : at + 20].partition(b" ")[0]
        record = block[at : at + int(length)] if length.isdigit() else b""
        damaged = not record.endswith(b"\n") or b"=" not in record
        at += len(record)
    if damaged:
        raise ValueError("one of its headers is damaged")
