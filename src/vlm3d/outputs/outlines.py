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
    path = _trace(part_HW, spacing_mm, corner_mm)
    while len(path) > max_chars and min(part_HW.shape) >= _SMALLEST_GRID:
        part_HW = _halved(part_HW)
        spacing_mm = (2 * spacing_mm[0], 2 * spacing_mm[1])
        path = _trace(part_HW, spacing_mm, corner_mm)
    return path


def _trace(
    mask_HW: NDArray[np.bool_], spacing_mm: tuple[float, float], corner_mm: tuple[float, float]
) -> str:
    padded = np.pad(mask_HW, 1).astype(np.float32)
    closed_lines = contour_generator(z=padded, line_type=LineType.Separate).lines(0.5)
    scale_xy = np.array([spacing_mm[1], spacing_mm[0]]) * UNITS_PER_MM
    corner_xy = np.array([corner_mm[1], corner_mm[0]]) * UNITS_PER_MM
    subpaths = []
    for line in closed_lines:
        points_xy = np.rint((np.asarray(line) - 0.5) * scale_xy + corner_xy).astype(np.int64)
        points_xy = _without_straight_runs(points_xy)
        if len(points_xy) >= 3:
            steps = " ".join(f"{x} {y}" for x, y in np.diff(points_xy, axis=0).tolist())
            subpaths.append(f"M{points_xy[0, 0]} {points_xy[0, 1]}l{steps}z")
    return "".join(subpaths)


def _without_straight_runs(points_xy: NDArray[np.int64]) -> NDArray[np.int64]:
    """A closed ring without repeated points and without those in the middle of a straight run."""
    ring = points_xy[:-1] if len(points_xy) > 1 and (points_xy[0] == points_xy[-1]).all() else points_xy
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return ring[turns]


def _halved(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every 2 x 2 pixels become one, lesion where at least two of them are."""
    padded = np.pad(mask_HW, [(0, size % 2) for size in mask_HW.shape])
    rows, columns = padded.shape
    return padded.reshape(rows // 2, 2, columns // 2, 2).sum(axis=(1, 3)) >= 2


def runs(present: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where a row of flags is on, as (first, one past last) pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(present, dtype=bool), [False]])))
    return [(int(start), int(stop)) for start, stop in list(pairwise(edges))[::2]]
