"""NRRD files (.nrrd, .nhdr), also 3D Slicer's .seg.nrrd with one layer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io.geometry import LPS_TO_RAS, normalize_affine
from vlm3d.io.header_text import (
    MAX_HEADER_BYTES,
    WITHOUT_ORIENTATION,
    data_file_beside,
    numbers,
    voxel_sizes,
    whole_numbers,
)
from vlm3d.io.hounsfield import rescaled
from vlm3d.io.limits import check_header_grid
from vlm3d.io.raster import Compression, read_array
from vlm3d.io.wording import printable, reason, shown
from vlm3d.volume import Volume

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {word: code for code, words in _TYPES.items() for word in words}
_TO_RAS = {
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
}
_VECTOR = re.compile(r"\(([^()]{1,200})\)")


def read_nrrd(path: Path) -> Volume:
    """Read an NRRD image on its own grid, axes (D, H, W) = NRRD's in reverse order.

    Raises:
        UnreadableFileError: Damaged, truncated, or naming voxels elsewhere.
        NotAChestCTError: Not one 3D volume of scalar voxels.
    """
    name = shown(path)
    try:
        fields, header_bytes = _read_header(path, name)
        sizes = whole_numbers(fields, "sizes", name)
        dims = whole_numbers(fields, "dimension", name)[0]
        if dims != len(sizes):
            raise UnreadableFileError(f"{name} has a damaged header: dimension {dims}, {len(sizes)} sizes.")
        if dims == 4 and fields.get("kinds", "").split()[:1] == ["list"]:
            raise NotAChestCTError(
                f"{name} has {sizes[0]} layers on one grid; save it as one layer without overlap."
            )
        dtype = _dtype(fields, name)
        compression = _compression(fields, name)
        detached = fields.get("data file", fields.get("datafile"))
        data_path = path if detached is None else data_file_beside(path, detached)
        offset = header_bytes if detached is None else 0
        stored_bytes = data_path.stat().st_size - offset
        check_header_grid(name, sizes, dtype.itemsize, stored_bytes, compressed=compression != "none")
        width, height, depth = sizes
        affine, notes = _affine(fields, name)
        affine = normalize_affine(affine, (depth, height, width), name)
        stored = read_array(data_path, (depth, height, width), dtype, compression=compression, offset=offset)
    except OSError as error:
        raise UnreadableFileError(f"{name} cannot be read: {reason(error)}.") from error
    return Volume(rescaled(stored), affine, source=shown(path), notes=notes)


def _read_header(path: Path, name: str) -> tuple[dict[str, str], int]:
    """The fields up to the blank line (or, in a detached header, the end), and the bytes that they take."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        file.readline(64)  # the magic
        while line := file.readline(1 << 16):
            if file.tell() > MAX_HEADER_BYTES:
                break
            text = line.decode("latin-1").strip()
            if not text:
                return fields, file.tell()
            if text.startswith("#") or ":=" in text:
                continue
            key, colon, value = text.partition(":")
            if not colon:
                break
            fields[key.strip().lower()] = value.strip()
        else:
            if "data file" in fields or "datafile" in fields:
                return fields, file.tell()
    raise UnreadableFileError(f"{name} has a damaged NRRD header, without the blank line that ends it.")


def _dtype(fields: dict[str, str], name: str) -> np.dtype[np.generic]:
    stated = fields.get("type", "nothing")
    if stated not in _DTYPES:
        raise UnreadableFileError(
            f"{name} states voxel type '{printable(stated[:20])}', which is none that a CT has."
        )
    return np.dtype(_DTYPES[stated]).newbyteorder(">" if fields.get("endian", "little") == "big" else "<")


def _compression(fields: dict[str, str], name: str) -> Compression:
    encoding = fields.get("encoding", "nothing").lower()
    if any(key in fields for key in ("line skip", "lineskip", "byte skip", "byteskip")):
        raise UnreadableFileError(f"{name} skips lines or bytes of its voxel file; save it again without.")
    if encoding == "raw":
        return "none"
    if encoding in ("gzip", "gz"):
        return "gzip"
    raise UnreadableFileError(
        f"{name} is encoded as '{printable(encoding[:20])}'; vlm3d reads raw and gzip. Save it so."
    )


def _affine(fields: dict[str, str], name: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Index (d, h, w, 1) to RAS+ mm, and a note where the header has no orientation."""
    affine = np.eye(4)
    if "space" not in fields or "space directions" not in fields:
        spacing = voxel_sizes(fields, "spacings", name) if "spacings" in fields else (1.0, 1.0, 1.0)
        affine[:3, :3] = np.diag(spacing)
        affine = LPS_TO_RAS @ affine
        return affine[:, [2, 1, 0, 3]], (WITHOUT_ORIENTATION,)
    space = fields["space"].lower()
    if space not in _TO_RAS:
        raise UnreadableFileError(
            f"{name} lies in the space '{printable(space[:40])}'; vlm3d reads LPS, RAS and LAS. Save it so."
        )
    affine[:3, :3] = np.transpose(_vectors(fields, "space directions", 3, name))
    if "space origin" in fields:
        affine[:3, 3] = _vectors(fields, "space origin", 1, name)[0]
    affine[:3] *= np.array(_TO_RAS[space])[:, None]
    return affine[:, [2, 1, 0, 3]], ()


def _vectors(fields: dict[str, str], key: str, count: int, name: str) -> list[tuple[float, ...]]:
    """A field of vectors such as ``(0.7,0,0) (0,0.7,0) (0,0,5)``."""
    found = _VECTOR.findall(fields[key])
    if len(found) != count:
        raise UnreadableFileError(f"{name} has a damaged header: '{key}' must hold {count} vectors.")
    return [numbers({key: text.replace(",", " ")}, key, 3, name) for text in found]
