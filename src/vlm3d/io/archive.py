"""Zip archives of scans, unpacked into a private folder that is deleted afterwards, unless the process is killed."""

from __future__ import annotations

import errno
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from vlm3d.errors import ArchiveError, ResourceError
from vlm3d.io.wording import reason, shown

MAX_FILES = 20_000
MAX_FOLDERS = 5_000
MAX_DEPTH = 32
MAX_TOTAL_BYTES = 8 * 2**30
MAX_RATIO = 200
_RATIO_FREE_BYTES = 32 * 2**20
_CHUNK_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
_LONGEST_NAME = 1024
_LONGEST_PART = 200


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a zip into a temporary folder that only this user can read.

    The directory of the archive is checked as a whole before the first byte is written: no path that leaves
    the folder, no links, no encryption, and bounded files, folders, bytes and compression ratio.

    Raises:
        ArchiveError: One of these checks fails, or the archive is damaged.
        ResourceError: The temporary folder is full.
    """
    name = shown(path)
    with tempfile.TemporaryDirectory(prefix="vlm3d-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in _checked_entries(archive, name):
                    _write_entry(archive, entry, Path(folder), name)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ArchiveError(f"{name} is a damaged zip: {reason(error)}. Copy it again.") from error
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise ResourceError(
                    f"{name} cannot be unpacked to {folder}: {reason(error)}. Make room there."
                ) from error
            raise ArchiveError(f"{name} is a damaged zip: {reason(error)}. Copy it again.") from error
        yield Path(folder)


def _checked_entries(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if not entries:
        raise ArchiveError(f"{name} is an empty zip.")
    if len(entries) > MAX_FILES:
        raise ArchiveError(f"{name} holds {len(entries)} files, more than the {MAX_FILES} accepted.")
    for entry in entries:
        _check_name(entry, name)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ArchiveError(f"{name} holds a symbolic link, which could point anywhere: refused.")
        if entry.flag_bits & 0x1:
            raise ArchiveError(f"{name} is encrypted. Unpack it with its password and give the folder.")
    folders = {parent for entry in entries for parent in _inner_path(entry).parents}
    if len(folders) > MAX_FOLDERS:
        raise ArchiveError(f"{name} holds {len(folders)} folders, more than the {MAX_FOLDERS} accepted.")
    total = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if total > MAX_TOTAL_BYTES:
        raise ArchiveError(
            f"{name} would unpack to {total / 2**30:.1f} GiB, more than the {MAX_TOTAL_BYTES >> 30} accepted."
        )
    if total > _RATIO_FREE_BYTES and total > MAX_RATIO * max(1, packed):
        raise ArchiveError(
            f"{name} would unpack to {total / max(1, packed):.0f} times its size, more than the "
            f"{MAX_RATIO} accepted: "
            "it looks like a zip bomb."
        )
    return entries


def _check_name(entry: zipfile.ZipInfo, name: str) -> None:
    stated = entry.orig_filename
    posix, windows = PurePosixPath(stated), PureWindowsPath(stated)
    escapes = posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in windows.parts
    if escapes or "\0" in stated:
        raise ArchiveError(f"{name} holds a path that leaves the folder it is unpacked to: refused.")
    if len(stated) > _LONGEST_NAME or any(len(part) > _LONGEST_PART for part in windows.parts):
        raise ArchiveError(f"{name} holds a path of {len(stated)} characters, too long to unpack.")
    if len(windows.parts) > MAX_DEPTH:
        raise ArchiveError(
            f"{name} holds folders {len(windows.parts) - 1} deep, more than the {MAX_DEPTH - 1} accepted."
        )


def _inner_path(entry: zipfile.ZipInfo) -> PureWindowsPath:
    """Where an entry lies in the archive; both kinds of slashes part folders."""
    return PureWindowsPath(entry.filename)


def _write_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, name: str) -> None:
    target = folder.joinpath(*_inner_path(entry).parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(exist_ok=False)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArchiveError(f"{name} holds two entries of one name. Unpack it and give the folder.") from error
    left = entry.file_size
    with archive.open(entry) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise ArchiveError(f"{name} holds a file larger than it states: it looks like a zip bomb.")
            sink.write(chunk)
