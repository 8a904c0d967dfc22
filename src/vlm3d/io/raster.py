"""Voxel bytes from disk into an array of known size, never more than the header declared.

Checksums are compared, too: SimpleITK, for one, hands back damaged compressed voxels without a word.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from isal import igzip, isal_zlib
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from vlm3d.errors import UnreadableFileError
from vlm3d.io.wording import reason, shown

Compression = Literal["none", "gzip", "zlib"]
_CHUNK_BYTES = 1 << 20

DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, IsalError)  # type: ignore[assignment]


@contextmanager
def stream_of(path: Path, compression: Compression, offset: int = 0) -> Iterator[Any]:
    """The decompressed bytes of a file from an offset on."""
    with path.open("rb") as file:
        file.seek(offset)
        if compression == "gzip":
            with igzip.IGzipFile(fileobj=file, mode="rb") as stream:
                yield stream
        elif compression == "zlib":
            with io.BufferedReader(_ZlibStream(file), _CHUNK_BYTES) as stream:
                yield stream
        else:
            yield file


def fill_array(stream: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    """Read exactly one array; trailing bytes are looked at (for the checksum) but not kept.

    Raises:
        UnreadableFileError: The stream ends early or fails its checksum.
    """
    array = np.empty(shape, dtype)
    target = array.reshape(-1).view(np.uint8).data
    filled = 0
    try:
        while filled < len(target):
            got = stream.readinto(target[filled : filled + 16 * _CHUNK_BYTES])
            if not got:
                raise UnreadableFileError(
                    f"{name} is truncated: {filled} of {len(target)} voxel bytes are there. Copy it again."
                )
            filled += got
        stream.read(1)  # a reader that reaches the end compares the checksum
    except DAMAGED as error:
        raise UnreadableFileError(
            f"{name} is truncated or damaged: {reason(error)} after {filled} of {len(target)} voxel bytes. "
            "Copy it again."
        ) from error
    if not array.dtype.isnative:
        array = array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))
    return array


def read_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    compression: Compression = "none",
    offset: int = 0,
) -> NDArray[Any]:
    """Read one array out of a file whose header has been checked.

    Raises:
        UnreadableFileError: The file ends early, is damaged or cannot be opened.
    """
    try:
        with stream_of(path, compression, offset) as stream:
            return fill_array(stream, shape, dtype, shown(path))
    except OSError as error:
        raise UnreadableFileError(f"{shown(path)} cannot be read: {reason(error)}.") from error


class _ZlibStream(io.RawIOBase):
    """A zlib stream read piece by piece; its checksum is compared at its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._inflate = isal_zlib.decompressobj()
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._inflate.eof:
            source = self._pending or self._file.read(_CHUNK_BYTES)
            data = self._inflate.decompress(source, len(target))
            self._pending = self._inflate.unconsumed_tail
            if data:
                target[: len(data)] = data
                return len(data)
            if not source:
                raise EOFError("compressed data ends early")
        return 0
