"""The vertebral column: found by its canal, a soft column ringed by bone, and drawn from vertebrae's shape around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.body import Body
from vlm3d.anatomy.grid import FineBox, Mask, WorkGrid
from vlm3d.anatomy.lungs import Lungs
from vlm3d.anatomy.morphology import opened, without_small
from vlm3d.volume import Volume

BONE_HU = 150.0
CORTEX_HU = 180.0
CANAL_HU = 140.0
SEARCH_BESIDE_MM = 45.0
RING_MM, CANAL_MM = 8.0, 3.0


@dataclass(frozen=True)
class Spine:
    """The vertebral column.

    Attributes:
        canal_center_D: (D, 2) position (h, w) of the spinal canal's center in each coarse slice.
        mask_DHW: Vertebrae on the coarse grid.
        canal_DHW: Spinal canal on the coarse grid.
        fine_DHW: Vertebrae on the finer grid of `box`.
        box: The finer grid.
    """

    canal_center_D: NDArray[np.float64]
    mask_DHW: Mask
    canal_DHW: Mask
    fine_DHW: Mask
    box: FineBox


def find_spine(volume: Volume, grid: WorkGrid, body: Body, lungs: Lungs) -> Spine | None:
    """Follow the column of bone behind and between the lungs; None where there is none."""
    center_D = _column_centers(grid, body, lungs)
    if center_D is None:
        return None
    fine = grid.finer(volume, _column_box(grid, center_D))
    step_mm = grid.step_mm / fine.scale
    canal_fine = _canal_path(fine.hu_DHW, step_mm)
    vertebrae, canal = _vertebrae(fine.hu_DHW, canal_fine, step_mm)
    if not vertebrae.any():
        return None
    shape = grid.shape_DHW
    d, h, w = fine.start_DHW
    canal_center = np.repeat(canal_fine.reshape(-1, fine.scale, 2).mean(1)[:1], shape[0], 0)
    inside = canal_fine.reshape(-1, fine.scale, 2).mean(1)
    canal_center[d : d + len(inside)] = inside
    canal_center = (canal_center + 0.5) / fine.scale - 0.5 + (h, w)
    return Spine(
        canal_center, fine.to_coarse(vertebrae, shape), fine.to_coarse(canal, shape), vertebrae, fine
    )


def _column_centers(grid: WorkGrid, body: Body, lungs: Lungs) -> NDArray[np.float64] | None:
    """Densest bone behind the lungs' middle, followed up and down with small steps."""
    bone = ((grid.hu_DHW > BONE_HU) & body.mask_DHW).astype(np.float32)
    sigma = 11.0 / grid.step_mm
    density = ndimage.gaussian_filter(bone, (2.0, sigma, sigma), mode="constant")
    d_lungs, h_lungs, _ = np.nonzero(lungs.both_DHW)
    middle_w = lungs.middle_w
    if middle_w is None:
        middle_w = float(np.mean(np.nonzero(body.mask_DHW.any((0, 1)))[0]))
    reach = grid.voxels(SEARCH_BESIDE_MM)
    low_w, high_w = max(0, int(middle_w) - reach), int(middle_w) + reach + 1
    front, back = np.percentile(h_lungs, (1, 99))
    low_h = int(front + 0.65 * (back - front))
    levels = slice(int(d_lungs.min()), int(d_lungs.max()) + 1)
    column = ndimage.gaussian_filter(bone[levels].mean(0), 15.0 / grid.step_mm, mode="constant")[
        low_h:, low_w:high_w
    ]
    if not column.size or column.max() < 0.05:
        return None
    peak = np.unravel_index(column.argmax(), column.shape)
    first = np.array([low_h + peak[0], low_w + peak[1]], dtype=float)
    near = density[levels, round(first[0]), round(first[1])]
    start = levels.start + int(near.argmax())
    center_D = np.zeros((len(density), 2))
    for order in (range(start, len(density)), range(start, -1, -1)):
        current = first.copy()
        for d in order:
            current = _nearby_peak(density[d], current, reach=2)
            center_D[d] = current
    return center_D


def _nearby_peak(
    density_HW: NDArray[np.float32], center: NDArray[np.float64], reach: int
) -> NDArray[np.float64]:
    h, w = (round(c) for c in center)
    low_h, low_w = max(0, h - reach), max(0, w - reach)
    window = density_HW[low_h : h + reach + 1, low_w : w + reach + 1]
    if not window.size or window.max() < 0.02:
        return center
    peak = np.unravel_index(window.argmax(), window.shape)
    return 0.5 * center + 0.5 * np.array([low_h + peak[0], low_w + peak[1]], dtype=float)


def _column_box(grid: WorkGrid, center_D: NDArray[np.float64]) -> tuple[slice, slice, slice]:
    front, back, beside = grid.voxels(50.0), grid.voxels(70.0), grid.voxels(50.0)
    h, w = center_D[:, 0], center_D[:, 1]
    return (
        slice(0, grid.shape_DHW[0]),
        slice(max(0, int(h.min()) - front), min(grid.shape_DHW[1], int(h.max()) + back)),
        slice(max(0, int(w.min()) - beside), min(grid.shape_DHW[2], int(w.max()) + beside)),
    )


def _canal_path(hu_DHW: NDArray[np.float32], step_mm: float) -> NDArray[np.float64]:
    """(D, 2) center (h, w) of the spinal canal: the connected path that is most ringed by bone, found at once."""
    bone = (hu_DHW > CORTEX_HU).astype(np.float32)
    along = 3.75 / step_mm
    ring = ndimage.gaussian_filter(bone, (along, RING_MM / step_mm, RING_MM / step_mm))
    ring -= ndimage.gaussian_filter(bone, (along, CANAL_MM / step_mm, CANAL_MM / step_mm))
    total = np.empty_like(ring)
    total[0] = ring[0]
    for d in range(1, len(ring)):
        total[d] = ring[d] + ndimage.maximum_filter(total[d - 1], 3)
    path = np.zeros((len(ring), 2))
    here = np.array(np.unravel_index(total[-1].argmax(), total[-1].shape))
    path[-1] = here
    for d in range(len(ring) - 2, -1, -1):
        low = np.maximum(here - 1, 0)
        window = total[d, low[0] : here[0] + 2, low[1] : here[1] + 2]
        here = low + np.array(np.unravel_index(window.argmax(), window.shape))
        path[d] = here
    smooth: NDArray[np.float64] = ndimage.gaussian_filter1d(path, 6.0 / step_mm, axis=0, mode="nearest")
    return smooth


def _vertebrae(
    hu_DHW: NDArray[np.float32], canal_D: NDArray[np.float64], step_mm: float
) -> tuple[Mask, Mask]:
    """Vertebrae and canal: bone inside a vertebra's shape, drawn around the canal.

    The shape is a body in front of the canal, as wide as it is measured to be at that level; an arch with transverse
    processes; and a spinous process behind. Ribs, which join the body's back corners, stay outside.
    """
    _, n_h, n_w = hu_DHW.shape
    behind = ((np.arange(n_h)[None, :] - canal_D[:, :1]) * step_mm)[:, :, None].astype(np.float32)
    beside = (np.abs(np.arange(n_w)[None, :] - canal_D[:, 1:]) * step_mm)[:, None, :].astype(np.float32)
    bone = ndimage.gaussian_filter(hu_DHW, 0.6) > BONE_HU
    bone &= (behind > -48) & (behind < 65) & (beside < 45)
    bone = _closed_slices(bone, round(2.5 / step_mm))
    half_width = _body_half_widths(bone, behind, beside, step_mm)[:, None, None] + 1.0
    shape = (behind <= -2) & (behind > -45) & (beside < half_width)
    shape |= (behind > -4) & (behind < 4) & (beside < half_width + 1)
    shape |= (behind >= 4) & (behind < 32) & (beside < 28)
    shape |= (behind >= 8) & (behind < 62) & (beside < 12)
    soft = ndimage.gaussian_filter(hu_DHW, 1.5) < CANAL_HU
    canal = opened(soft & (np.hypot(behind, beside) < 11), 2.0)
    vertebrae = without_small(bone & shape & ~canal, round(2000 / step_mm**3))
    return vertebrae, canal


def _closed_slices(mask_DHW: Mask, radius: int) -> Mask:
    """Close and fill each axial slice on its own, so that discs stay open."""
    row, column = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = (row**2 + column**2 <= radius**2)[None]
    pad = ((0, 0), (radius, radius), (radius, radius))
    closed = ndimage.binary_closing(np.pad(mask_DHW, pad), disc)[:, radius:-radius, radius:-radius]
    return np.stack([ndimage.binary_fill_holes(slice_HW) for slice_HW in closed])


def _body_half_widths(
    bone_DHW: Mask, behind: NDArray[np.float32], beside: NDArray[np.float32], step_mm: float
) -> NDArray[np.float64]:
    """(D,) half the width of the vertebral body in mm, where bone thins out in front of the ribs' joints."""
    reach_mm = np.arange(8.0, 31.0)
    front = (behind > -30) & (behind < -16)
    profile = np.empty((len(bone_DHW), len(reach_mm)))
    for i, mm in enumerate(reach_mm):
        strip = front & (np.abs(beside - mm) < 1.0)
        profile[:, i] = (bone_DHW & strip).sum((1, 2)) / np.maximum(strip.sum((1, 2)), 1)
    profile = ndimage.gaussian_filter1d(profile, 15.0 / step_mm, axis=0)
    thin = profile < 0.5 * profile[:, :4].max(1, keepdims=True)
    widths = np.where(thin.any(1), reach_mm[thin.argmax(1)], reach_mm[-1])
    smooth: NDArray[np.float64] = ndimage.gaussian_filter1d(widths, 10.0 / step_mm)
    return np.clip(smooth, 11.0, 30.0)
