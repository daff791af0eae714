"""Zip and tar archives: refused if hostile or damaged, else unpacked into a folder that is whole."""

import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .console import LASTING, PASSING, file_error, log, progress, stop
from .files import atomic, need_access, need_space, write_json

MOST_FILES = 200_000  # more are no archive of images
HIDDEN = (".", "__MACOSX", "__pycache__")  # what names such as .ipynb_checkpoints begin with


def is_archive(path: Path) -> bool:
    """Say whether a file is a zip or tar archive, by its content."""
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def unpack(archive: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Unpack a zip or tar archive into the new `folder`, with a progress bar.

    Raises SystemExit if the archive is damaged or hostile, OSError if a disk fails.
    """
    log.info("unpacking %s", archive)
    try:
        with atomic(folder) as part:
            part.mkdir()
            with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as file:
                if isinstance(file, zipfile.ZipFile):
                    members, options = list(refuse_hostile(file.infolist(), archive)), {}
                    size = sum(member.file_size for member in members)
                else:
                    members, options = list(refuse_hostile(file, archive)), {"filter": "data"}
                    size = sum(member.size for member in members)
                    check_end(file)
                need_space(part, size)
                for member in progress(members, desc=archive.name, unit=" files"):
                    file.extract(member, part, **options)
            write_json(part / ".archive.json", origin)
    except Exception as problem:  # of many kinds, by what is wrong with it
        if file_error(problem) in PASSING | LASTING:
            raise
        stop(f"cannot unpack {archive}: {problem}", "delete it if it is damaged")


def check_end(archive: tarfile.TarFile) -> None:
    """Raise EOFError or OSError unless all of it is there: `tarfile` takes any damaged header for its end."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end, a block of zeros, is missing")
    while archive.fileobj.read(1 << 20):  # to where a compressed file keeps its checksum
        pass


def refuse_hostile(members: Iterable[Any], archive: Path) -> Iterator[zipfile.ZipInfo | tarfile.TarInfo]:
    """Pass on the members of an archive, as long as they are what image archives hold. Raises ValueError."""
    total, seen, most = 0, {}, max(100 * archive.stat().st_size, 1 << 30)  # bytes; more is a zip bomb
    for count, member in enumerate(members, 1):
        if isinstance(member, zipfile.ZipInfo):
            name, size, folder = member.filename, member.file_size, member.is_dir()
            plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        else:
            name, size, folder = member.name, member.size, member.isdir()
            plain = folder or member.isreg()
        path, total = PurePosixPath(name), total + size
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name.split("/")[0]:
            raise ValueError(f"{name!r} would lead out of its folder")
        if not plain:
            raise ValueError(f"{name!r} is a link or a device")
        if count > MOST_FILES or total > most:
            raise ValueError(f"{count:,} files of {total:,} bytes and more are no archive of images")
        for part in [path, *path.parents]:  # a disk that ignores case would lose one of A and a
            before = seen.setdefault(unicodedata.normalize("NFC", str(part)).casefold(), part)
            if before != part or (part is path and before is not part and not folder):
                raise ValueError(f"{str(part)!r} and {str(before)!r} have the same name")
        yield member


def class_root(folder: Path) -> Path:
    """Descend while a folder holds one folder that holds folders: archives wrap class folders so.

    A table of the images stays in reach.
    """
    inside = [entry for entry in visible(folder) if entry.is_dir()]
    wrapped = len(inside) == 1 and any(entry.is_dir() for entry in visible(inside[0]))
    wrapped = wrapped and not any(entry.name.startswith("metadata.") for entry in visible(folder))
    return class_root(inside[0]) if wrapped else folder


def visible(folder: Path) -> list[Path]:
    """Return what lies in `folder`, without hidden entries. Raises SystemExit where it may not be read."""
    need_access(folder)
    return [entry for entry in folder.iterdir() if not entry.name.startswith(HIDDEN)]
