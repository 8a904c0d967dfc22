"""What kind of file this is: by its first bytes, and only then by its name."""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

from isal import isal_zlib

from vlm3d.errors import UnreadableFileError
from vlm3d.io.dicom_files import has_dicom_magic
from vlm3d.io.nifti import has_nifti_magic
from vlm3d.io.raster import DAMAGED
from vlm3d.io.wording import reason, shown


class Format(Enum):
    """The formats that are read."""

    NIFTI = "NIfTI"
    DICOM = "DICOM"
    ZIP = "zip"
    METAIMAGE = "MetaImage"
    NRRD = "NRRD"
    NPZ = "NPZ"


READ_FORMATS = "NIfTI, DICOM (file, folder or zip), MetaImage, NRRD and NPZ"

_FOREIGN = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array without voxel size"),
    (b"7z\xbc\xaf", "a 7z archive (unpack it and give the folder)"),
    (b"Rar!", "a RAR archive (unpack it and give the folder)"),
    (b"<", "an XML or HTML page"),
    (b"{", "a JSON file"),
    (b"\x80", "a Python pickle"),
)
_NIFTI_SUFFIXES = (".nii", ".img", ".hdr")
_HEAD_BYTES = 1024


def detect_format(path: Path) -> Format:
    """Tell a file's format.

    Raises:
        UnreadableFileError: No such file, not a regular file, empty, or none of the formats that are read.
    """
    name = shown(path)
    if path.is_dir():
        return Format.DICOM
    if not path.exists():
        raise UnreadableFileError(f"{name} does not exist. Check the path.")
    if not path.is_file():
        raise UnreadableFileError(f"{name} is no regular file (a device or pipe). Give a file or folder.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UnreadableFileError(f"{name} cannot be read: {reason(error)}.") from error
    if not head:
        raise UnreadableFileError(f"{name} is empty (0 bytes). Copy it again.")
    found = _by_content(path, head, name)
    if found:
        return found
    is_text = b"DimSize" in head and b"=" in head
    if is_text or (path.suffix.lower() in (".mha", ".mhd") and b"=" in head[:64]):
        return Format.METAIMAGE
    is_foreign = head.startswith(tuple(magic for magic, _ in _FOREIGN[:7]))
    if path.name.lower().endswith(_NIFTI_SUFFIXES) and not is_foreign:
        return Format.NIFTI  # its reader says what is wrong, and finds the header beside an .img
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise UnreadableFileError(f"{name} is {what}, not a CT scan. vlm3d reads {READ_FORMATS}.")
    raise UnreadableFileError(f"{name} is in no format that vlm3d knows; it reads {READ_FORMATS}.")


def _by_content(path: Path, head: bytes, name: str) -> Format | None:
    if head.startswith(b"\x1f\x8b"):
        return _inside_gzip(path, head, name)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Format.NPZ if _is_npz(path) else Format.ZIP
    if head.startswith(b"NRRD0"):
        return Format.NRRD
    if has_nifti_magic(head):
        return Format.NIFTI
    if has_dicom_magic(head):
        return Format.DICOM
    return None


def _inside_gzip(path: Path, head: bytes, name: str) -> Format:
    inflate = isal_zlib.decompressobj(wbits=31)
    try:
        inner = inflate.decompress(head, _HEAD_BYTES)
    except DAMAGED as error:
        raise UnreadableFileError(
            f"{name} is a damaged gzip file: {reason(error)}. Copy it again."
        ) from error
    lowered = path.name.lower()
    if has_nifti_magic(inner) or lowered.endswith((".nii.gz", ".img.gz", ".hdr.gz")):
        return Format.NIFTI
    if inner[257:262] == b"ustar":
        raise UnreadableFileError(f"{name} is a tar archive; unpack it and give the folder.")
    raise UnreadableFileError(
        f"{name} is a gzip file without a NIfTI image in it. vlm3d reads {READ_FORMATS}."
    )


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return path.suffix.lower() == ".npz"
    return bool(names) and all(name.endswith(".npy") for name in names)
