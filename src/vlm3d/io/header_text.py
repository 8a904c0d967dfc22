"""What the text headers of MetaImage and NRRD have in common: sizes, and where the voxels lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from vlm3d.errors import UnreadableFileError
from vlm3d.io.limits import FARTHEST_MM, MAX_VOXELS
from vlm3d.io.wording import shown

MAX_HEADER_BYTES = 1 << 20
WITHOUT_ORIENTATION = "the header has no orientation: axes taken as Left, Posterior, Superior"


def data_file_beside(header: Path, stated: str) -> Path:
    """The voxel file that a header names, which must lie in the header's own folder.

    Raises:
        UnreadableFileError: An absolute path, another folder, a pattern or list of files, or no such file.
    """
    name = shown(header)
    plain = PurePosixPath(stated).name == stated and PureWindowsPath(stated).name == stated
    if not plain or stated in ("", ".", ".."):
        raise UnreadableFileError(
            f"{name} names voxels outside its own folder; only a file beside it is read. Move both together."
        )
    if "%" in stated or stated.upper().startswith("LIST"):
        raise UnreadableFileError(f"{name} spreads its voxels over several files; save it as a single file.")
    data = header.with_name(stated)
    if data.is_symlink() or not data.is_file():
        raise UnreadableFileError(f"{name} names a voxel file that is not beside it. Copy both files.")
    return data


def whole_numbers(fields: Mapping[str, str], key: str, name: str) -> tuple[int, ...]:
    """A header field that holds whole numbers.

    Raises:
        UnreadableFileError: The field is missing or holds something else.
    """
    text = fields.get(key)
    if text is None:
        raise UnreadableFileError(f"{name} has a damaged header: the field '{key}' is missing.")
    try:
        values = tuple(int(part) for part in text.split()[:16])
    except ValueError as error:
        raise UnreadableFileError(
            f"{name} has a damaged header: '{key}' is no list of whole numbers."
        ) from error
    if not values or max(abs(value) for value in values) > 16 * MAX_VOXELS:
        raise UnreadableFileError(f"{name} has a damaged header: '{key}' is empty or absurdly large.")
    return values


def numbers(fields: Mapping[str, str], key: str, count: int, name: str) -> tuple[float, ...]:
    """A header field that holds lengths or directions, so many of them.

    Raises:
        UnreadableFileError: The field holds something else.
    """
    try:
        values = tuple(float(part) for part in fields[key].split()[: count + 1])
    except ValueError:
        values = ()
    if len(values) != count or not all(abs(value) <= FARTHEST_MM for value in values):
        raise UnreadableFileError(
            f"{name} has a damaged header: '{key}' must hold {count} numbers of at most {FARTHEST_MM:.0f}."
        )
    return values


def voxel_sizes(fields: Mapping[str, str], key: str, name: str) -> tuple[float, ...]:
    """A header field that holds the three sides of a voxel; a negative one would mirror the patient.

    Raises:
        UnreadableFileError: The field holds something else.
    """
    sizes = numbers(fields, key, 3, name)
    if min(sizes) <= 0:
        raise UnreadableFileError(
            f"{name} states voxel sizes that are not positive ('{key}'). Export it again with a direction instead."
        )
    return sizes
