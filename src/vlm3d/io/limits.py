"""What a header may claim before memory is spent on it.

A header is a few bytes that anyone can write; an array is gigabytes. Readers compare with these limits before they take
memory; DICOM checks the grid of a whole series where it decodes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io.wording import shape_words

MAX_VOXELS = 2**30
"""Largest grid read: 1024 x 1024 x 1024, four times the largest clinical chest CT."""

MAX_INFLATED_BYTES = 2**28
"""Largest DICOM file that is inflated in memory; a slice of 8192 x 8192 takes half of it."""

DEFLATE_MAX_RATIO = 1032
"""Deflate cannot expand its input more than this (zlib's technical details)."""

MIN_SLICES = 8
MIN_IN_PLANE = 32
MIN_EXTENT_MM = 50.0
MAX_EXTENT_MM = 1000.0
MAX_LENGTH_MM = 2200.0
"""Along the longest axis: PET/CT from head to feet."""
FARTHEST_MM = 1e5
"""No voxel lies farther from a scanner's center."""


def check_header_grid(
    name: str,
    shape: Sequence[int],
    bytes_per_voxel: int,
    stored_bytes: int,
    *,
    compressed: bool,
) -> None:
    """Refuse a grid that is not 3D, is empty, is absurdly large, or cannot lie in the bytes that are there.

    Args:
        name: The file, as shown to the user.
        shape: Grid size along each axis as the header states it.
        bytes_per_voxel: Size of one stored voxel.
        stored_bytes: Bytes on disk that hold the voxels.
        compressed: Whether these bytes are deflated.
    """
    if len(shape) != 3:
        raise NotAChestCTError(
            f"{name} has {len(shape)} axes ({shape_words(tuple(shape))}); vlm3d needs a 3D volume. "
            f"Is it {'a single slice' if len(shape) < 3 else 'a time series'}?"
        )
    if min(shape) < 1:
        raise NotAChestCTError(
            f"{name} holds no voxels: its header states a grid of {shape_words(tuple(shape))}. Export it "
            "again."
        )
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise UnreadableFileError(
            f"{name} states an absurd grid of {shape_words(tuple(shape))} voxels; at most {MAX_VOXELS} are "
            "read. "
            "Is the header damaged?"
        )
    needed = voxels * bytes_per_voxel
    if needed > stored_bytes * (DEFLATE_MAX_RATIO if compressed else 1):
        raise UnreadableFileError(
            f"{name} is truncated or its header is wrong: a grid of {shape_words(tuple(shape))} needs "
            f"{needed} bytes, "
            f"the file has {stored_bytes}{' compressed' if compressed else ''}. Copy or export it again."
        )


def check_scan_size(
    name: str, shape_DHW: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    """Refuse a grid too small or too large to be a chest CT."""
    ordered = sorted(shape_DHW)
    if ordered[0] < MIN_SLICES:
        raise NotAChestCTError(
            f"{name} has only {ordered[0]} slices ({shape_words(shape_DHW)}); vlm3d needs at least "
            f"{MIN_SLICES}. "
            "Give the whole scan."
        )
    if ordered[1] < MIN_IN_PLANE:
        raise NotAChestCTError(
            f"{name} has a grid of {shape_words(shape_DHW)}, below {MIN_IN_PLANE} x {MIN_IN_PLANE} in the "
            "plane. "
            "Give the scan in its original resolution."
        )
    shortest, middle, longest = sorted(
        size * spacing for size, spacing in zip(shape_DHW, spacing_mm, strict=True)
    )
    if shortest < MIN_EXTENT_MM or middle > MAX_EXTENT_MM or longest > MAX_LENGTH_MM:
        raise NotAChestCTError(
            f"{name} measures {_extents(shape_DHW, spacing_mm)} mm; a chest scan has "
            f"{MIN_EXTENT_MM:.0f} to {MAX_EXTENT_MM:.0f} mm along each axis, or {MAX_LENGTH_MM:.0f} mm along the body. "
            "Is the voxel size in its header right?"
        )


def _extents(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> str:
    return " x ".join(
        f"{n * s:.0f}" if n * s >= 1 else f"{n * s:.2g}" for n, s in zip(shape, spacing_mm, strict=True)
    )
