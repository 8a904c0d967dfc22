"""NIfTI files (.nii, .nii.gz, .hdr with .img): read to a volume, and masks written back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io.geometry import normalize_affine
from vlm3d.io.hounsfield import rescaled
from vlm3d.io.limits import check_header_grid
from vlm3d.io.raster import DAMAGED, Compression, fill_array, stream_of
from vlm3d.io.wording import reason, shape_words, shown
from vlm3d.io.writing import atomic_writer
from vlm3d.volume import Volume

NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
MAGICS = (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0")
_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}
_GZIP_MAGIC = b"\x1f\x8b"


def has_nifti_magic(head: bytes) -> bool:
    """Whether the first 348 (or more) bytes are a NIfTI-1 or NIfTI-2 header."""
    return head[344:348] in MAGICS[:2] or head[4:8] in MAGICS[2:]


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI image on its own grid, axes (D, H, W) = NIfTI's (k, j, i); slope and intercept applied.

    Raises:
        UnreadableFileError: Damaged, truncated, or not NIfTI.
        NotAChestCTError: Not one 3D volume of scalar voxels.
    """
    header_path, image_path = _pair(path)
    name = shown(path)
    try:
        compression: Compression = "gzip" if _is_gzip(header_path) else "none"
        with stream_of(header_path, compression) as stream:
            header = _parse_header(_read_up_to(stream, NIFTI2_BYTES, name), name)
        shape, dtype = _grid_of(header, name)
        # nibabel counts (i, j, k); ours is (k, j, i), which is the order in which the bytes lie
        shape_DHW = shape[::-1]
        compression = "gzip" if _is_gzip(image_path) else "none"
        offset = _data_offset(header, header_path == image_path, name)
        stored_bytes = image_path.stat().st_size - (0 if compression == "gzip" else offset)
        check_header_grid(name, shape_DHW, dtype.itemsize, stored_bytes, compressed=compression == "gzip")
        affine, notes = _affine_of(header, name)
        affine = normalize_affine(affine[:, [2, 1, 0, 3]], (shape_DHW[0], shape_DHW[1], shape_DHW[2]), name)
        with stream_of(image_path, compression) as stream:
            _read_up_to(stream, offset, name)
            stored = fill_array(stream, shape_DHW, dtype, name)
    except OSError as error:
        raise UnreadableFileError(f"{name} cannot be read: {reason(error)}.") from error
    slope, intercept = _rescale_of(header, name)
    if (slope, intercept) != (1.0, 0.0):
        notes.append(f"the header's slope {slope:g} and intercept {intercept:g} applied")
    return Volume(rescaled(stored, slope, intercept), affine, source=shown(path), notes=tuple(notes))


def write_nifti_mask(labels_DHW: NDArray[Any], affine: NDArray[np.float64], path: str | Path) -> None:
    """Write a label mask as NIfTI, whole or not at all.

    Args:
        labels_DHW: Whole numbers of at least 0, or booleans.
        affine: Index (d, h, w, 1) to RAS+ mm, as in `Volume`.
        path: ``.nii.gz`` is compressed, ``.nii`` is not; the folder must exist.

    Raises:
        OutputError: The file cannot be written.
    """
    path = Path(path)
    if labels_DHW.ndim != 3 or labels_DHW.dtype.kind not in "iub":
        raise ValueError(f"a mask is 3D and integer, got {labels_DHW.shape} {labels_DHW.dtype}")
    highest = int(labels_DHW.max(initial=0))
    dtype = np.uint8 if highest <= 255 else np.uint16 if highest <= 65535 else np.int32
    labels = np.ascontiguousarray(labels_DHW, dtype=dtype)
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(labels.shape[::-1])
    header.set_xyzt_units("mm")
    nifti_affine = affine[:, [2, 1, 0, 3]]
    header.set_sform(nifti_affine, code=1)
    header.set_qform(nifti_affine, code=1)
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = b"n+1"
    head = header.binaryblock + bytes(4)
    with atomic_writer(path) as file:
        if path.suffix == ".gz":
            with igzip.IGzipFile(filename="", fileobj=file, mode="wb", compresslevel=2, mtime=0) as stream:
                stream.write(head)
                stream.write(labels.data)
        else:
            file.write(head)
            file.write(labels.data)


def _pair(path: Path) -> tuple[Path, Path]:
    """Header and image file: the same one for .nii, two for .hdr with .img."""
    suffixes = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if not suffixes.startswith((".hdr", ".img")):
        return path, path
    stem = path.name[: -len(suffixes)]
    found = []
    for kind in (".hdr", ".img"):
        candidates = [path.with_name(stem + kind), path.with_name(stem + kind + ".gz")]
        existing = [c for c in candidates if c.is_file()]
        if not existing:
            raise UnreadableFileError(
                f"{shown(path)} is one half of a pair and {stem}{kind} is not beside it. Copy both files."
            )
        found.append(existing[0])
    return found[0], found[1]


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP_MAGIC


def _read_up_to(stream: Any, count: int, name: str) -> bytes:
    """Read a number of bytes, fewer only where the stream ends."""
    parts = io.BytesIO()
    try:
        while parts.tell() < count and (part := stream.read(count - parts.tell())):
            parts.write(part)
    except DAMAGED as error:
        raise UnreadableFileError(
            f"{name} is truncated or damaged: {reason(error)}. Copy it again."
        ) from error
    return parts.getvalue()


def _parse_header(head: bytes, name: str) -> nib.Nifti1Header:
    if not has_nifti_magic(head):
        raise UnreadableFileError(
            f"{name} has no NIfTI header (no magic 'n+1' or 'ni1' in it). Is it another format, renamed?"
        )
    second = head[4:8] in MAGICS[2:]
    kind, size = (nib.Nifti2Header, NIFTI2_BYTES) if second else (nib.Nifti1Header, NIFTI1_BYTES)
    if len(head) < size:
        raise UnreadableFileError(f"{name} is truncated within its header. Copy it again.")
    try:
        return kind(head[:size], check=False)
    except Exception as error:  # whatever nibabel makes of hostile bytes
        raise UnreadableFileError(f"{name} has a damaged NIfTI header: {reason(error)}.") from error


def _grid_of(header: nib.Nifti1Header, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise UnreadableFileError(f"{name} has a damaged header: it states {dims[0]} axes.")
    shape = dims[1 : 1 + dims[0]]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) == 3 and shape[2] == 1:
        shape.pop()
    if len(shape) != 3:
        what = "Is it a single slice?" if len(shape) < 3 else "Give one frame of it."
        raise NotAChestCTError(
            f"{name} has {len(shape)} axes ({shape_words(tuple(shape))}); vlm3d needs a 3D volume. {what}"
        )
    try:
        dtype = np.dtype(header.get_data_dtype())
    except Exception as error:
        raise UnreadableFileError(
            f"{name} states voxel type {int(header['datatype'])}, which NIfTI does not define."
        ) from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        kind = "RGB" if dtype.names else str(dtype)
        raise NotAChestCTError(
            f"{name} has {kind} voxels; a CT has one number a voxel. Is it a color picture?"
        )
    return tuple(shape), dtype


def _data_offset(header: nib.Nifti1Header, single_file: bool, name: str) -> int:
    offset = float(header["vox_offset"])
    smallest = header.sizeof_hdr if single_file else 0
    if not np.isfinite(offset) or not smallest <= offset <= 2**24:
        raise UnreadableFileError(f"{name} has a damaged header: its voxels start at byte {offset:g}.")
    return int(offset)


def _affine_of(header: nib.Nifti1Header, name: str) -> tuple[NDArray[np.float64], list[str]]:
    """The sform, else the qform, else voxel sizes alone with a note."""
    scale = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    notes = [] if scale == 1 else [f"lengths in the header converted to mm (x {scale:g})"]
    with np.errstate(all="ignore"):
        try:
            if int(header["sform_code"]) > 0:
                affine = header.get_sform()
            elif int(header["qform_code"]) > 0:
                affine = header.get_qform()
            else:
                affine = np.diag([*(abs(float(p)) for p in header["pixdim"][1:4]), 1.0])
                notes.append("the header has no orientation: axes taken as Right, Anterior, Superior")
        except Exception as error:
            raise UnreadableFileError(f"{name} has a damaged orientation: {reason(error)}.") from error
        affine = np.array(affine, dtype=np.float64)
        affine[:3] *= scale
    return affine, notes


def _rescale_of(header: nib.Nifti1Header, name: str) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(intercept):
        raise UnreadableFileError(f"{name} has a damaged header: its intercept is {intercept}.")
    return slope, intercept
