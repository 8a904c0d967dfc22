"""The outline of a lesion on one slice, as an SVG path that stays sharp at any size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import LineType, contour_generator
from numpy.typing import NDArray

UNITS_PER_MM = 10
"""A path counts in tenths of a millimeter, so that whole numbers are fine enough."""

_SMALLEST_GRID = 8
_CHARS_PER_CORNER = 5


def outline_path(mask_HW: NDArray[Any], spacing_mm: tuple[float, float], *, max_chars: int = 20_000) -> str:
    """Trace a mask's edge.

    Args:
        mask_HW: bool; row 0 is the top of the picture.
        spacing_mm: Pixel size (down, across).
        max_chars: A longer path (a mask of noise) is traced again on a coarser grid until it fits.

    Returns:
        The ``d`` of an SVG path in units of `UNITS_PER_MM`, from the picture's top left corner; empty without lesion.
    """
    mask_HW = np.asarray(mask_HW, dtype=bool)
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if rows.size == 0:
        return ""
    top, left = int(rows[0]), int(columns[0])
    part_HW = mask_HW[top : rows[-1] + 1, left : columns[-1] + 1]
    corner_mm = (top * spacing_mm[0], left * spacing_mm[1])
    while True:
        coarse = min(part_HW.shape) < _SMALLEST_GRID
        if coarse or _CHARS_PER_CORNER * _corners(part_HW) <= max_chars:
            path = _trace(part_HW, spacing_mm, corner_mm)
            if coarse or len(path) <= max_chars:
                return path
        part_HW = _halved(part_HW)
        spacing_mm = (2 * spacing_mm[0], 2 * spacing_mm[1])


def _corners(mask_HW: NDArray[np.bool_]) -> int:
    """How often the edge turns, as 2 x 2 pixels see it; cheap, so that noise is not traced to be thrown away."""
    padded = np.pad(mask_HW, 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    along_rows = (upper_left == upper_right) & (lower_left == lower_right)
    along_columns = (upper_left == lower_left) & (upper_right == lower_right)
    return int(np.count_nonzero(~(along_rows | along_columns)))


def _trace(
    mask_HW: NDArray[np.bool_], spacing_mm: tuple[float, float], corner_mm: tuple[float, float]
) -> str:
    padded = np.pad(mask_HW, 1).astype(np.float32)
    lines: Any = contour_generator(z=padded, line_type=LineType.ChunkCombinedOffset).lines(0.5)
    chunks, offsets = lines
    if chunks[0] is None or offsets[0] is None:
        return ""
    scale_xy = np.array([spacing_mm[1], spacing_mm[0]]) * UNITS_PER_MM
    corner_xy = np.array([corner_mm[1], corner_mm[0]]) * UNITS_PER_MM
    points_xy = np.rint((chunks[0] - 0.5) * scale_xy + corner_xy).astype(np.int64)
    sizes = np.diff(offsets[0].astype(np.int64))
    ring = np.repeat(np.arange(len(sizes)), sizes)

    def keep(kept: NDArray[np.bool_]) -> None:
        nonlocal points_xy, ring
        points_xy, ring = points_xy[kept], ring[kept]

    keep(~_ends(ring))  # a ring's last point repeats its first
    keep((points_xy != points_xy[_previous(ring)]).any(axis=1))
    before = points_xy - points_xy[_previous(ring)]
    after = np.empty_like(before)
    after[_previous(ring)] = before
    keep(before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0])  # straight runs need their ends only
    return _as_path(points_xy, ring)


def _ends(ring: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which points are the last of their ring."""
    return np.diff(ring, append=ring[-1:] + 1) != 0


def _previous(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each point, the index of the one before it on its ring; before the first comes the last."""
    previous = np.arange(-1, len(ring) - 1)
    ends = np.flatnonzero(_ends(ring))
    previous[np.append(0, ends[:-1] + 1)[: len(ends)]] = ends
    return previous


def _as_path(points_xy: NDArray[np.int64], ring: NDArray[np.int64]) -> str:
    """Rings as SVG subpaths: an absolute start, then relative steps; fewer than 3 points have no area."""
    steps_xy = np.diff(points_xy, axis=0, prepend=points_xy[:1]).tolist()
    subpaths = []
    start = 0
    for stop in (np.flatnonzero(_ends(ring)) + 1).tolist():
        if stop - start >= 3:
            steps = " ".join(f"{x} {y}" for x, y in steps_xy[start + 1 : stop])
            subpaths.append(f"M{points_xy[start, 0]} {points_xy[start, 1]}l{steps}z")
        start = stop
    return "".join(subpaths)


def _halved(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every 2 x 2 pixels become one, lesion where at least two of them are."""
    count = np.pad(mask_HW, [(0, size % 2) for size in mask_HW.shape]).astype(np.uint8)
    return (count[::2, ::2] + count[1::2, ::2] + count[::2, 1::2] + count[1::2, 1::2]) >= 2


def runs(present: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where a row of flags is on, as (first, one past last) pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(present, dtype=bool), [False]])))
    return [(int(start), int(stop)) for start, stop in list(pairwise(edges))[::2]]
