"""Zip and tar archives: refused if hostile or damaged, else unpacked into a folder that is whole."""

import errno
import itertools
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .archive_formats import Tar, open_archive, spell_names
from .console import disk_failed, file_error, log, progress, stop
from .files import atomic, folded, need_space, visible, write_json

BLOCK = 4096  # bytes that even an empty file takes on the disk
SMALL = 1 << 30  # bytes that any archive may unpack to
NAME_ERRORS = {errno.EINVAL, errno.EILSEQ, errno.ENAMETOOLONG}  # this disk takes no such name


def unpack(archive: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Unpack a zip or tar archive into the new `folder`, with a progress bar.

    Raises SystemExit if the archive is damaged or hostile, OSError if a disk fails.
    """
    log.info("unpacking %s", archive)
    try:
        with atomic(folder) as part:
            part.mkdir()
            with open_archive(archive) as file:
                listed = spell_names(file) if isinstance(file, zipfile.ZipFile) else file
                members = list(refuse_hostile(listed, archive))
                options = {}
                if isinstance(file, Tar):
                    file.check_end()
                    options["filter"] = "data"
                need_space(part, sum(map(size_on_disk, members)))
                for member in progress(members, desc=archive.name, unit=" files"):
                    file.extract(member, part, **options)
            write_json(part / ".archive.json", origin)
    except Exception as problem:  # of many kinds, by what is wrong with it
        if disk_failed(problem):
            raise
        remedy = "fetch it again, or give another"
        if isinstance(problem, RuntimeError):  # it is encrypted, or `zipfile` does not know how it is packed
            remedy = "unpack it with another program and give the folder"
        elif file_error(problem) in NAME_ERRORS:
            remedy = "use a disk that takes such names, or rename it in the archive"
        stop(f"cannot unpack {archive}: {problem}", remedy)


def size_on_disk(member: zipfile.ZipInfo | tarfile.TarInfo) -> int:
    """Return about how many bytes a member takes once it is unpacked."""
    return max(BLOCK, member.file_size if isinstance(member, zipfile.ZipInfo) else member.size)


def refuse_hostile(members: Iterable[Any], archive: Path) -> Iterator[zipfile.ZipInfo | tarfile.TarInfo]:
    """Pass on the members of an archive, as long as they are what image archives hold.

    Raises ValueError, NotImplementedError if one is encrypted.
    """
    total, seen, files, most = 0, {}, set(), max(100 * archive.stat().st_size, SMALL)
    for member in members:
        name = member.filename if isinstance(member, zipfile.ZipInfo) else member.name
        if len(name) > BLOCK:  # longer than any system's paths
            raise ValueError(f"a name has {len(name):,} characters: too long for an image")
        path, total = PurePosixPath(name), total + size_on_disk(member)
        if leads_out(name):
            raise ValueError(f"{name!r} would lead out of its folder")
        folder, plain = kind_of(member, files)
        if not plain:
            raise ValueError(f"{name!r} is a link or a device")
        if total > most:
            raise ValueError(f"it unpacks to more than {most:,} bytes: too much for an archive of images")
        for part in itertools.chain([path], path.parents):  # a disk that ignores case would lose one of A, a
            before = seen.setdefault(folded(str(part)), part)
            if before != part or (part is path and before is not part and not folder):
                raise ValueError(f"{str(part)!r} and {str(before)!r} have the same name")
            if before is not part:  # a folder: those around it have been seen, too
                break
        if not folder:
            files.add(path)
        yield member


def leads_out(name: str) -> bool:
    """Say whether a name in an archive could lead to somewhere else, on this system or another."""
    path = PurePosixPath(name.replace("\\", "/"))
    drive = re.match("[A-Za-z]:$", path.parts[0]) if path.parts else None
    refused = os.name == "nt" and re.search(r"[:\\]", name)
    return bool(path.is_absolute() or ".." in path.parts or drive or refused)


def kind_of(member: zipfile.ZipInfo | tarfile.TarInfo, files: set[PurePosixPath]) -> tuple[bool, bool]:
    """Return whether a member is a folder, and whether it is that, a file, or a hard link to one of `files`.

    Raises NotImplementedError if it is encrypted.
    """
    if isinstance(member, tarfile.TarInfo):
        linked = member.islnk() and PurePosixPath(member.linkname) in files
        return member.isdir(), member.isdir() or member.isreg() or linked
    if member.flag_bits & 1:
        raise NotImplementedError("it is encrypted")
    return member.is_dir(), stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)


def class_root(folder: Path) -> Path:
    """Descend while a folder holds one folder that holds folders: archives wrap class folders so.

    A table of the images stays in reach.
    """
    inside = [entry for entry in visible(folder) if entry.is_dir()]
    wrapped = len(inside) == 1 and any(entry.is_dir() for entry in visible(inside[0]))
    wrapped = wrapped and not any(entry.name.startswith("metadata.") for entry in visible(folder))
    return class_root(inside[0]) if wrapped else folder
