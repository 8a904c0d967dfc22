"""MetaImage files (.mha, .mhd with .raw or .zraw)."""

from __future__ import annotations

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
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_metaimage(path: Path) -> Volume:
    """Read a MetaImage on its own grid, axes (D, H, W) = MetaImage's (z, y, x).

    Raises:
        UnreadableFileError: Damaged, truncated, or naming voxels elsewhere.
        NotAChestCTError: Not one 3D volume of scalar voxels.
    """
    name = shown(path)
    try:
        fields, header_bytes = _read_header(path, name)
        sizes = whole_numbers(fields, "DimSize", name)
        dims = whole_numbers(fields, "NDims", name)[0]
        if dims != len(sizes):
            raise UnreadableFileError(
                f"{name} has a damaged header: NDims {dims}, DimSize of {len(sizes)} numbers."
            )
        if fields.get("ElementNumberOfChannels", "1") != "1":
            raise NotAChestCTError(
                f"{name} has several channels a voxel; a CT has one. Is it a color picture?"
            )
        dtype = _dtype(fields, name)
        stated = fields["ElementDataFile"]
        local = stated.upper() == "LOCAL"
        data_path = path if local else data_file_beside(path, stated)
        compressed = _flag(fields, "CompressedData")
        offset = header_bytes if local else _header_size(fields, data_path, sizes, dtype, name)
        stored_bytes = data_path.stat().st_size - offset
        check_header_grid(name, sizes, dtype.itemsize, stored_bytes, compressed=compressed)
        width, height, depth = sizes
        affine, notes = _affine(fields, name)
        affine = normalize_affine(affine, (depth, height, width), name)
        stored = read_array(
            data_path,
            (depth, height, width),
            dtype,
            compression=_compression(data_path, offset) if compressed else "none",
            offset=offset,
        )
    except OSError as error:
        raise UnreadableFileError(f"{name} cannot be read: {reason(error)}.") from error
    return Volume(rescaled(stored), affine, source=shown(path), notes=notes)


def _read_header(path: Path, name: str) -> tuple[dict[str, str], int]:
    """The fields up to ElementDataFile, which is the last one, and the bytes that they take."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < MAX_HEADER_BYTES and (line := file.readline(4096)):
            key, equals, value = line.decode("latin-1").partition("=")
            if not equals:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                return fields, file.tell()
    raise UnreadableFileError(f"{name} is no MetaImage: its header has no ElementDataFile. Export it again.")


def _affine(fields: dict[str, str], name: str) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Index (d, h, w, 1) to RAS+ mm, and a note without orientation; the keys have several spellings, as in ITK."""
    direction_key = _first(fields, ("TransformMatrix", "Rotation", "Orientation"))
    spacing_key = _first(fields, ("ElementSpacing", "ElementSize"))
    origin_key = _first(fields, ("Offset", "Position", "Origin"))
    directions = numbers(fields, direction_key, 9, name) if direction_key else np.eye(3).ravel()
    spacing = voxel_sizes(fields, spacing_key, name) if spacing_key else (1.0, 1.0, 1.0)
    lps = np.eye(4)
    # each row of the header's matrix is the direction of one axis
    lps[:3, :3] = np.reshape(directions, (3, 3)).T * spacing
    lps[:3, 3] = numbers(fields, origin_key, 3, name) if origin_key else (0.0, 0.0, 0.0)
    notes = () if direction_key else (WITHOUT_ORIENTATION,)
    return (LPS_TO_RAS @ lps)[:, [2, 1, 0, 3]], notes


def _first(fields: dict[str, str], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in fields), None)


def _dtype(fields: dict[str, str], name: str) -> np.dtype[np.generic]:
    stated = fields.get("ElementType", "nothing")
    if stated not in _TYPES:
        raise UnreadableFileError(
            f"{name} states voxel type '{printable(stated[:20])}', which is none that a CT has."
        )
    big = _flag(fields, "BinaryDataByteOrderMSB") or _flag(fields, "ElementByteOrderMSB")
    if not _flag(fields, "BinaryData", default=True):
        raise UnreadableFileError(f"{name} stores its voxels as text; save it as binary.")
    return np.dtype(_TYPES[stated]).newbyteorder(">" if big else "<")


def _header_size(
    fields: dict[str, str], data_path: Path, sizes: tuple[int, ...], dtype: np.dtype[np.generic], name: str
) -> int:
    """Bytes to skip in a voxel file of its own; -1 means that the voxels are its last bytes."""
    skip = whole_numbers(fields, "HeaderSize", name)[0] if "HeaderSize" in fields else 0
    size = data_path.stat().st_size
    if skip == -1:
        needed = dtype.itemsize
        for n in sizes:
            needed *= n
        skip = max(0, size - needed)
    if not 0 <= skip <= size:
        raise UnreadableFileError(
            f"{name} has a damaged header: HeaderSize {skip} in a file of {size} bytes."
        )
    return skip


def _flag(fields: dict[str, str], key: str, default: bool = False) -> bool:
    return fields[key].strip().lower() in ("true", "1", "yes") if key in fields else default


def _compression(path: Path, offset: int) -> Compression:
    with path.open("rb") as file:
        file.seek(offset)
        return "gzip" if file.read(2) == b"\x1f\x8b" else "zlib"
