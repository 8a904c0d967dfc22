"""DICOM files of a folder: which they are, which should be there but cannot be used, and their elements."""

from __future__ import annotations

import logging
import os
import stat
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from vlm3d.errors import SeriesError, UnreadableFileError
from vlm3d.io.limits import MAX_INFLATED_BYTES
from vlm3d.io.wording import reason, shown

MAX_FILES = 50_000
_HEAD_BYTES = 132
_META_START = 144  # preamble, DICM, and the element that tells the length of the file meta information
_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_CLUTTER = ("dicomdir", "version", "lockfile", "readme", "license", "licence", "changelog", "makefile")


def has_dicom_magic(head: bytes) -> bool:
    """``DICM`` after 128 bytes, or a first element of group 0008 (old files without preamble)."""
    without_preamble = head[:2] == b"\x08\x00" and head[2:4] in (
        b"\x00\x00",
        b"\x01\x00",
        b"\x05\x00",
        b"\x08\x00",
    )
    return head[128:132] == b"DICM" or without_preamble


def looks_like_dicom(path: Path) -> bool:
    """Whether the file starts as DICOM does, with or without its preamble."""
    return has_dicom_magic(first_bytes(path))


def first_bytes(path: Path) -> bytes:
    """What DICOM is known by; nothing where the file cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""


def is_named_dicom(path: Path) -> bool:
    """Whether the file's ending says DICOM."""
    return path.suffix.lower() in _DICOM_SUFFIXES


def lost_slices(unusable: Iterable[Path], slices: Iterable[Path]) -> list[Path]:
    """Those of the files that cannot be used which, by their names, stand where a slice is to be expected.

    Args:
        unusable: Files that cannot be opened or hold nothing.
        slices: Files that are slices; what ends as they do is expected to be one.
    """
    endings = {"", *_DICOM_SUFFIXES, *(_ending(path) for path in slices)}
    return [path for path in unusable if _ending(path) in endings and path.name.lower() not in _CLUTTER]


def files_in(folder: Path, *, nested: bool, closed: list[Path]) -> Iterator[Path]:
    """Files of a folder that are not hidden, in the order of their names; links that lead nowhere are among them.

    Args:
        folder: Where to look.
        nested: Whether its subfolders belong to it.
        closed: Takes the subfolders that may not be opened.

    Raises:
        SeriesError: More files than are accepted.
        UnreadableFileError: The folder itself may not be opened.
    """

    def note_closed(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UnreadableFileError(f"{shown(folder)} cannot be opened: {reason(error)}.") from error
        closed.append(Path(error.filename))

    count = 0
    for parent, subfolders, names in os.walk(folder, onerror=note_closed):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")) if nested else []
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or not _may_be_opened(path):
                continue
            count += 1
            if count > MAX_FILES:
                raise SeriesError(
                    f"{shown(folder)} holds more than {MAX_FILES} files; give the folder of one study."
                )
            yield path


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings and log lines back: they quote values, which may be a patient's."""
    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def read_elements(path: Path, tags: Iterable[str], *, pixels: bool) -> pydicom.Dataset:
    """Some elements of a file; one that is deflated as a whole is inflated up to a limit first.

    Args:
        path: The file.
        tags: Keywords of the elements.
        pixels: Whether pixels are among them, else reading stops there.

    Raises:
        UnreadableFileError: It inflates to more than the limit.
        Exception: Whatever pydicom makes of a damaged file.
    """
    source: Any = BytesIO(_inflated(path)) if _is_deflated(path) else path
    return pydicom.dcmread(source, force=True, specific_tags=list(tags), stop_before_pixels=not pixels)


def _ending(path: Path) -> str:
    """The suffix; the numbers after the dots of a UID are none."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdigit() else suffix


def _may_be_opened(path: Path) -> bool:
    """Everything but devices and pipes; what cannot be asked is found out when it is opened."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _is_deflated(path: Path) -> bool:
    try:
        return read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian
    except InvalidDicomError:  # without preamble: no file meta information either
        return False


def _inflated(path: Path) -> bytes:
    """The elements after the file meta information, which is never deflated."""
    start = _META_START + int(read_file_meta_info(path).FileMetaInformationGroupLength)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    with path.open("rb") as file:
        file.seek(start)
        data = inflate.decompress(file.read(), MAX_INFLATED_BYTES)
    if not inflate.eof and len(data) >= MAX_INFLATED_BYTES:
        raise UnreadableFileError(
            f"{shown(path)} is deflated and grows beyond {MAX_INFLATED_BYTES >> 20} MiB; save it without."
        )
    return data
