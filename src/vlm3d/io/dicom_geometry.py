"""From slices at measured positions to an even stack: order, duplicates, gaps, uneven steps, gantry tilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.errors import SeriesError
from vlm3d.io.dicom_headers import SAME_PLACE_MM, Slice
from vlm3d.io.geometry import LPS_TO_RAS
from vlm3d.io.hounsfield import INT16, PADDING_HU
from vlm3d.io.limits import MAX_EXTENT_MM, MAX_VOXELS, MIN_SLICES
from vlm3d.io.wording import counted

MAX_MISSING_IN_A_GAP = 2
MAX_MISSING_SHARE = 0.2
EVEN_WITHIN = 0.02
"""Positions off the even grid by this share of a step are rounding, not unevenness."""
RESAMPLED_WITHIN = 0.25
"""Up to this share they are resampled; beyond, the series is refused."""
_WIDEST_SPAN_MM = 5000.0
_TILT_PIXELS = 0.5
_STRAIGHT_PIXELS = 1.0


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices in order along their normal, and the even grid that they are to lie on.

    Attributes:
        slices: Without duplicates, ascending along the normal.
        positions: Of each slice, in steps of the even grid, starting at 0.
        count: Slices of the even grid.
        step_lps: From one grid slice to the next, LPS mm; off the normal where the gantry was tilted.
        tilt_degrees: Between the normal and the step; 0 where they agree.
        notes: What the user should know.
    """

    slices: list[Slice]
    positions: NDArray[np.float64]
    count: int
    step_lps: NDArray[np.float64]
    tilt_degrees: float
    notes: tuple[str, ...]

    @property
    def is_even(self) -> bool:
        """Whether every grid slice is a measured one."""
        return self.count == len(self.slices) and bool(
            np.abs(self.positions - np.arange(self.count)).max() <= EVEN_WITHIN
        )


def stack_slices(slices: Sequence[Slice], name: str) -> Stack:
    """Order slices by position and find the even grid that they belong to.

    Raises:
        SeriesError: No positions, too few slices, too many missing, too uneven, or not on a straight line.
    """
    first = slices[0]
    if first.orientation_lps is None or first.pixel_spacing_mm is None:
        raise SeriesError(f"{name} has slices without orientation or pixel spacing. Export the series again.")
    if any(item.position_lps is None for item in slices):
        raise SeriesError(
            f"{name} has slices without a position (ImagePositionPatient). Export the series again."
        )
    if min(first.pixel_spacing_mm) <= 0 or max(first.pixel_spacing_mm) > MAX_EXTENT_MM:
        row_mm, column_mm = first.pixel_spacing_mm
        raise SeriesError(
            f"{name} states a pixel spacing of {row_mm:g} x {column_mm:g} mm; between 0 and "
            f"{MAX_EXTENT_MM:.0f} is possible. Export the series again."
        )
    normal = np.cross(*first.orientation_lps)
    ordered, heights, notes = _without_duplicates(slices, normal)
    if len(ordered) < MIN_SLICES:
        raise SeriesError(
            f"{name} has slices at {len(ordered)} positions; vlm3d needs at least {MIN_SLICES}. Give the "
            "whole series."
        )
    acquisitions = {item.acquisition for item in ordered} - {None}
    if len(acquisitions) > 1:
        notes.append(f"{len(acquisitions)} acquisitions that continue each other joined")
    positions, count, gap_notes = _even_grid(heights, name)
    places = np.array([item.position_lps for item in ordered])
    span_lps = places[-1] - places[0]
    step_lps = span_lps / (count - 1)
    row_mm, column_mm = first.pixel_spacing_mm
    along = np.array(
        [span_lps @ first.orientation_lps[0] / column_mm, span_lps @ first.orientation_lps[1] / row_mm]
    )
    tilted = float(np.abs(along).max()) > _TILT_PIXELS
    straight = places[0] + positions[:, None] * step_lps
    height_step = float(heights[-1] - heights[0]) / (count - 1)
    off_line = places - straight
    off_line -= np.outer(off_line @ normal, normal)
    if np.abs(off_line).max() > _STRAIGHT_PIXELS * max(row_mm, column_mm):
        raise SeriesError(
            f"{name} has slices shifted sideways by up to {np.abs(off_line).max():.1f} mm: no single volume. "
            "Choose one acquisition of it."
        )
    tilt = 0.0
    if tilted:
        tilt = float(np.degrees(np.arccos(np.clip(step_lps @ normal / np.linalg.norm(step_lps), -1, 1))))
        notes.append(f"gantry tilt of {tilt:.1f} degrees corrected by resampling")
    else:
        step_lps = normal * height_step
    return Stack(ordered, positions, count, step_lps, tilt, (*notes, *gap_notes))


def stack_affine(stack: Stack) -> NDArray[np.float64]:
    """Index (d, h, w, 1) to RAS+ mm of the even, possibly tilted, grid."""
    first = stack.slices[0]
    assert first.orientation_lps is not None  # stack_slices has checked
    assert first.pixel_spacing_mm is not None
    affine = np.eye(4)
    affine[:3, 0] = stack.step_lps
    affine[:3, 1] = first.orientation_lps[1] * first.pixel_spacing_mm[0]
    affine[:3, 2] = first.orientation_lps[0] * first.pixel_spacing_mm[1]
    affine[:3, 3] = first.position_lps
    return np.asarray(LPS_TO_RAS @ affine)


def evenly_stacked(voxels_DHW: NDArray[Any], stack: Stack) -> NDArray[Any]:
    """Measured slices on the even grid; missing ones by linear interpolation between their neighbors."""
    if stack.is_even:
        return voxels_DHW
    result = np.empty((stack.count, *voxels_DHW.shape[1:]), voxels_DHW.dtype)
    for index in range(stack.count):
        above = int(np.clip(np.searchsorted(stack.positions, index), 1, len(stack.positions) - 1))
        low, high = stack.positions[above - 1], stack.positions[above]
        weight = float(np.clip((index - low) / (high - low), 0, 1))
        if weight <= EVEN_WITHIN or weight >= 1 - EVEN_WITHIN:
            result[index] = voxels_DHW[above - 1 if weight < 0.5 else above]
            continue
        mixed = (1 - weight) * voxels_DHW[above - 1].astype(np.float32)
        mixed += np.float32(weight) * voxels_DHW[above]
        result[index] = np.rint(mixed) if result.dtype == np.int16 else mixed
    return result


def untilted(
    voxels_DHW: NDArray[Any], affine: NDArray[np.float64], name: str
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Resample a sheared stack onto a right-angled grid along the table's direction.

    The new grid holds all of the old one; what the scanner did not see becomes padding.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    along = affine[:3, 0] / spacing[0]
    across = affine[:3, 2] / spacing[2]
    across = across - along * (across @ along)
    across /= np.linalg.norm(across)
    down = np.cross(along, across)
    down *= np.sign(down @ affine[:3, 1])
    axes = np.stack([along, down, across], axis=1) * spacing
    shape = np.array(voxels_DHW.shape)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    in_new = np.linalg.solve(axes, affine[:3, :3] @ corners)
    low = np.floor(in_new.min(axis=1) + 1e-6)
    new_shape = (np.ceil(in_new.max(axis=1) - 1e-6) - low).astype(int) + 1
    if np.prod(new_shape, dtype=np.float64) > MAX_VOXELS:
        raise SeriesError(f"{name} is tilted so far that correcting it needs more than {MAX_VOXELS} voxels.")
    matrix = np.linalg.solve(affine[:3, :3], axes)
    resampled = ndimage.affine_transform(
        voxels_DHW.astype(np.float32), matrix, matrix @ low, tuple(new_shape), order=1, cval=PADDING_HU
    )
    if voxels_DHW.dtype == np.int16:
        resampled = np.clip(np.rint(resampled), INT16.min, INT16.max).astype(np.int16)
    new_affine = np.eye(4)
    new_affine[:3, :3] = axes
    new_affine[:3, 3] = affine[:3, 3] + axes @ low
    return resampled, new_affine


def _without_duplicates(
    slices: Sequence[Slice], normal: NDArray[np.float64]
) -> tuple[list[Slice], NDArray[np.float64], list[str]]:
    """Ascending along the normal, the first acquisition's slice where several lie at one place."""
    with_height = sorted(
        ((float(item.position_lps @ normal), item) for item in slices if item.position_lps is not None),
        key=lambda pair: (
            round(pair[0] / SAME_PLACE_MM),
            pair[1].acquisition or 0,
            pair[1].instance,
            str(pair[1].path),
        ),
    )
    kept: list[Slice] = []
    heights: list[float] = []
    for height, item in with_height:
        if heights and height - heights[-1] <= SAME_PLACE_MM:
            continue
        kept.append(item)
        heights.append(height)
    dropped = len(slices) - len(kept)
    return (
        kept,
        np.array(heights),
        [f"{counted(dropped, 'slice')} at positions already taken dropped (copies or another phase)"]
        if dropped
        else [],
    )


def _even_grid(heights: NDArray[np.float64], name: str) -> tuple[NDArray[np.float64], int, list[str]]:
    """Positions in steps of an even grid, the number of its slices, and notes."""
    if heights[-1] - heights[0] > _WIDEST_SPAN_MM:
        raise SeriesError(
            f"{name} has slices spread over {heights[-1] - heights[0]:.0f} mm: no single volume. Is a header damaged?"
        )
    gaps = np.diff(heights)
    step = float(np.percentile(gaps, 50, method="lower"))  # a gap that is there, not a mean of two
    steps_in_gap = np.maximum(1, np.round(gaps / step)).astype(int)
    missing = int((steps_in_gap - 1).sum())
    widest = int(steps_in_gap.max()) - 1
    count = len(heights) + missing
    if widest > MAX_MISSING_IN_A_GAP or missing > MAX_MISSING_SHARE * count:
        raise SeriesError(
            f"{name} lacks {missing} of {count} slices, up to {widest} in a row (at most "
            f"{MAX_MISSING_IN_A_GAP} are "
            "filled). Copy the series again or choose another one."
        )
    positions = (heights - heights[0]) / (heights[-1] - heights[0]) * (count - 1)
    indices = np.concatenate([[0], np.cumsum(steps_in_gap)])
    deviation = max(float(np.abs(gaps / step - steps_in_gap).max()), float(np.abs(positions - indices).max()))
    if deviation > RESAMPLED_WITHIN:
        raise SeriesError(
            f"{name} has unevenly spaced slices ({gaps.min():.2f} to {gaps.max():.2f} mm, usually "
            f"{step:.2f}): "
            "no single volume. Choose one acquisition of it."
        )
    notes = []
    if missing:
        notes.append(f"{missing} missing slices filled by interpolation between their neighbors")
    if float(np.abs(positions - indices).max()) > EVEN_WITHIN:
        notes.append(f"slices unevenly spaced by up to {deviation:.0%} of a step, resampled to even steps")
    else:
        positions = indices.astype(np.float64)
    return positions, count, notes
