"""The aorta: a round column left in front of the spine, a wider one in front of the carina, and the arch between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.morphology import opened

FAT_HU = -20.0
BLOOD_CEILING_HU = 700.0

# Anatomy in mm: (toward posterior, toward left), and how far a patient may differ from it.
DESCENDING_FROM_CANAL_MM, DESCENDING_SPREAD_MM = (-43.0, 17.0), 16.0
ASCENDING_FROM_CARINA_MM, ASCENDING_SPREAD_MM = (-30.0, 6.0), 14.0
DESCENDING_RADIUS_MM, ASCENDING_RADIUS_MM, ARCH_RADIUS_MM = 11.0, 16.0, 12.5
ASCENDING_BELOW_CARINA_MM, ARCH_ABOVE_CARINA_MM, ARCH_TOP_MM = 60.0, 8.0, 24.0


@dataclass(frozen=True)
class _Course:
    """Centers (h, w) and radii in coarse voxels of one column, a slice each."""

    levels: NDArray[np.intp]
    center_N2: NDArray[np.float64]
    radius_N: NDArray[np.float64]


def soft_tissue(grid: WorkGrid, cavity_DHW: Mask, blocked_DHW: Mask) -> Mask:
    """Muscle, blood, fluid and organs inside the chest: neither air nor fat nor bone."""
    hu = ndimage.gaussian_filter(grid.hu_DHW, 0.6)
    return cavity_DHW & ~blocked_DHW & (hu > FAT_HU) & (hu < BLOOD_CEILING_HU)


def find_aorta(
    grid: WorkGrid, soft_DHW: Mask, carina_DHW: tuple[float, float, float], canal_D: NDArray[np.float64]
) -> Mask:
    """Follow the aorta's columns through the slices and join them by an arch.

    Args:
        grid: The scan on the coarse grid.
        soft_DHW: From `soft_tissue`.
        carina_DHW: Where the trachea splits.
        canal_D: (D, 2) center (h, w) of the spinal canal.
    """
    step = grid.step_mm
    carina_d = round(carina_DHW[0])
    aorta = np.zeros(grid.shape_DHW, dtype=bool)
    contrast = _blood_contrast(grid, soft_DHW)
    top = min(carina_d + grid.voxels(ARCH_ABOVE_CARINA_MM), grid.shape_DHW[0] - 1)
    descending = _follow(
        _roundness(contrast, DESCENDING_RADIUS_MM / step),
        np.arange(top, -1, -1),
        canal_D + np.array(DESCENDING_FROM_CANAL_MM) / step,
        DESCENDING_SPREAD_MM / step,
        DESCENDING_RADIUS_MM / step,
    )
    bottom = max(carina_d - grid.voxels(ASCENDING_BELOW_CARINA_MM), 0)
    front = np.broadcast_to(
        np.array(carina_DHW[1:]) + np.array(ASCENDING_FROM_CARINA_MM) / step, (grid.shape_DHW[0], 2)
    )
    ascending = _follow(
        _roundness(contrast, ASCENDING_RADIUS_MM / step),
        np.arange(top, bottom - 1, -1),
        front,
        ASCENDING_SPREAD_MM / step,
        ASCENDING_RADIUS_MM / step,
    )
    for course in (descending, ascending):
        _draw_column(aorta, course)
    _draw_arch(aorta, ascending, descending, step)
    return opened(aorta & soft_DHW, 1.5)


def _blood_contrast(grid: WorkGrid, soft_DHW: Mask) -> NDArray[np.float32]:
    """HU clipped between fat and blood, so that neither bone nor contrast medium outshines the shape."""
    values = grid.hu_DHW[soft_DHW]
    blood = float(np.percentile(values, 90)) if values.size else 50.0
    low = -100.0
    clipped = np.clip(np.where(soft_DHW, grid.hu_DHW, low), low, max(blood, 40.0))
    return ((clipped - low) / (max(blood, 40.0) - low)).astype(np.float32)


def _roundness(contrast: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """How much a disc of this radius is brighter than the ring around it, in each axial slice."""
    reach = int(np.ceil(radius * 1.6))
    row, column = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    distance = np.hypot(row, column)
    disc, ring = distance <= radius, (distance > radius + 0.5) & (distance <= radius * 1.5)
    kernel = disc / disc.sum() - 0.8 * ring / ring.sum()
    smooth = ndimage.gaussian_filter1d(contrast, 1.0, axis=0)
    return np.stack([_convolved(slice_HW, kernel) for slice_HW in smooth])


def _convolved(slice_HW: NDArray[np.float32], kernel: NDArray[np.float64]) -> NDArray[np.float32]:
    from scipy.signal import oaconvolve

    result: NDArray[np.float32] = oaconvolve(slice_HW, kernel.astype(np.float32), mode="same")
    return result


def _follow(
    score_DHW: NDArray[np.float32],
    levels: NDArray[np.intp],
    expected_D2: NDArray[np.float64],
    spread: float,
    radius: float,
) -> _Course:
    """The connected path of best score near where anatomy expects it, found at once for all slices."""
    row, column = np.ogrid[: score_DHW.shape[1], : score_DHW.shape[2]]

    def near(d: int) -> NDArray[np.float32]:
        off = np.hypot(row - expected_D2[d, 0], column - expected_D2[d, 1]) / spread
        return (score_DHW[d] - 0.25 * off**2).astype(np.float32)

    gains = [near(int(d)) for d in levels]
    totals = [gains[0]]
    for gain in gains[1:]:
        totals.append(gain + ndimage.maximum_filter(totals[-1], 3))
    here = np.array(np.unravel_index(int(totals[-1].argmax()), totals[-1].shape))
    path = [here]
    for total in reversed(totals[:-1]):
        low = np.maximum(here - 1, 0)
        window = total[low[0] : here[0] + 2, low[1] : here[1] + 2]
        here = low + np.array(np.unravel_index(int(window.argmax()), window.shape))
        path.append(here)
    center = ndimage.gaussian_filter1d(np.array(path[::-1], dtype=np.float64), 2.0, axis=0, mode="nearest")
    return _Course(levels, center, np.full(len(levels), radius))


def _draw_column(mask_DHW: Mask, course: _Course) -> None:
    row, column = np.ogrid[: mask_DHW.shape[1], : mask_DHW.shape[2]]
    for d, (h, w), radius in zip(course.levels, course.center_N2, course.radius_N, strict=True):
        mask_DHW[d] |= np.hypot(row - h, column - w) <= radius


def _draw_arch(mask_DHW: Mask, ascending: _Course, descending: _Course, step_mm: float) -> None:
    """A bow of balls from the top of the ascending to the top of the descending aorta."""
    start = np.array([ascending.levels[0], *ascending.center_N2[0]], dtype=np.float64)
    stop = np.array([descending.levels[0], *descending.center_N2[0]], dtype=np.float64)
    rise = (ARCH_TOP_MM - ARCH_ABOVE_CARINA_MM) / step_mm
    radius = ARCH_RADIUS_MM / step_mm
    reach = int(np.ceil(radius))
    offsets = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    offsets = offsets[np.linalg.norm(offsets, axis=1) <= radius]
    for t in np.linspace(0, 1, 24):
        center = (1 - t) * start + t * stop + np.array([rise * np.sin(np.pi * t), 0.0, 0.0])
        points = np.rint(center).astype(np.intp) + offsets
        inside = ((points >= 0) & (points < np.array(mask_DHW.shape))).all(axis=1)
        mask_DHW[tuple(points[inside].T)] = True
