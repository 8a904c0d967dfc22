"""Heart, diaphragm and what lies between and below the lungs, from the lungs' own surfaces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.lungs import Lungs
from vlm3d.anatomy.morphology import grow, largest, opened

HEART_BALL_MM = 11.0
HEART_TOP_BELOW_CARINA_MM = 10.0
HEART_FRONT_OF_CANAL_MM = 58.0
HEART_BESIDE_MM = (75.0, 115.0)
ABOVE_WEIGHT = 0.03
VEIN_RADIUS_MM, ESOPHAGUS_RADIUS_MM = 8.0, 8.0


@dataclass(frozen=True)
class Frame:
    """Landmarks that place organs, on the coarse grid.

    Attributes:
        carina_DHW: Where the trachea splits, found or estimated.
        canal_D: (D, 2) center (h, w) of the spinal canal in each slice.
        diaphragm_HW: Level below which lies the abdomen, for every (h, w).
    """

    carina_DHW: tuple[float, float, float]
    canal_D: NDArray[np.float64]
    diaphragm_HW: NDArray[np.float64]


def find_diaphragm(grid: WorkGrid, lungs: Lungs) -> NDArray[np.float64]:
    """Level of the diaphragm over the whole plane: the lungs' bases, carried smoothly to where no lung lies above it.

    A lung's base is its lowest voxel in a column, except in the steep gutters at the edges, where the base of the dome
    is a better guide than the lung's tip.
    """
    level_HW = np.full(grid.shape_DHW[1:], np.nan)
    for lung in (lungs.right_DHW, lungs.left_DHW):
        if not lung.any():
            continue
        covered = lung.any(axis=0)
        base = np.where(covered, lung.argmax(axis=0), np.nan)
        core = ndimage.binary_erosion(covered, iterations=grid.voxels(15.0), border_value=1)
        use = core if core.any() else covered
        level_HW[use] = base[use]
    known = np.isfinite(level_HW)
    if not known.any():
        return np.zeros(grid.shape_DHW[1:])
    # Columns whose lung rests on the heart end above the diaphragm: they count little from the second round on.
    weight = known.astype(np.float64)
    surface = _carried(level_HW, weight, grid.step_mm)
    for _ in range(6):
        above_mm = (np.where(known, level_HW, 0.0) - surface) * grid.step_mm
        weight = np.where(known, np.where(above_mm > 4.0, ABOVE_WEIGHT, 1.0), 0.0)
        surface = _carried(level_HW, weight, grid.step_mm)
    return surface


def _carried(
    level_HW: NDArray[np.float64], weight_HW: NDArray[np.float64], step_mm: float
) -> NDArray[np.float64]:
    """A weighted smooth surface; wide smoothing where nothing near is known."""
    values = np.where(weight_HW > 0, np.nan_to_num(level_HW), 0.0) * weight_HW
    result = np.full(level_HW.shape, values.sum() / max(weight_HW.sum(), 1e-9))
    for sigma_mm in (60.0, 25.0):
        sigma = sigma_mm / step_mm
        total = ndimage.gaussian_filter(weight_HW, sigma)
        mean = ndimage.gaussian_filter(values, sigma) / np.maximum(total, 1e-9)
        trust = np.clip(total / 0.08, 0.0, 1.0)
        result = trust * mean + (1 - trust) * result
    return result


def find_heart(grid: WorkGrid, soft_DHW: Mask, frame: Frame, aorta_DHW: Mask) -> Mask:
    """The bulk of soft tissue in front of the spine between carina and diaphragm, without the descending aorta."""
    step = grid.step_mm
    level, row, column = np.ogrid[: grid.shape_DHW[0], : grid.shape_DHW[1], : grid.shape_DHW[2]]
    canal_h, canal_w = frame.canal_D[:, 0][:, None, None], frame.canal_D[:, 1][:, None, None]
    front_mm = (canal_h - row) * step
    left_mm = (column - canal_w) * step
    room = soft_DHW & (front_mm > HEART_FRONT_OF_CANAL_MM)
    room &= (left_mm > -HEART_BESIDE_MM[0]) & (left_mm < HEART_BESIDE_MM[1])
    room &= level < frame.carina_DHW[0] - HEART_TOP_BELOW_CARINA_MM / step
    room &= level > frame.diaphragm_HW[None]
    room &= ~aorta_DHW
    bulk = opened(room, HEART_BALL_MM / step)
    return largest(bulk) if bulk.any() else bulk


def draw_tube(shape_DHW: tuple[int, int, int], path_ND: NDArray[np.float64], radius: float) -> Mask:
    """A round tube through points (d, h, w), one disc a slice between the first and the last level."""
    mask = np.zeros(shape_DHW, dtype=bool)
    order = np.argsort(path_ND[:, 0])
    levels = np.arange(
        max(0, int(np.ceil(path_ND[order[0], 0]))), min(shape_DHW[0], int(path_ND[order[-1], 0]) + 1)
    )
    row, column = np.ogrid[: shape_DHW[1], : shape_DHW[2]]
    for d in levels:
        h, w = (np.interp(d, path_ND[order, 0], path_ND[order, axis]) for axis in (1, 2))
        mask[d] |= np.hypot(row - h, column - w) <= radius
    return mask


def estimate_esophagus(grid: WorkGrid, frame: Frame) -> Mask:
    """A tube from behind the trachea to the hiatus, beside the descending aorta."""
    step, carina = grid.step_mm, frame.carina_DHW
    lowest = float(np.median(frame.diaphragm_HW)) - 10.0 / step
    top = min(grid.shape_DHW[0] - 1.0, carina[0] + 90.0 / step)
    levels = np.linspace(lowest, top, 12)
    points = []
    for d in levels:
        canal = frame.canal_D[int(np.clip(round(d), 0, len(frame.canal_D) - 1))]
        above = np.clip((d - carina[0]) * step / 90.0, 0.0, 1.0)
        below = np.clip((carina[0] - d) * step / 110.0, 0.0, 1.0)
        points.append(
            [d, canal[0] - (56.0 - 12.0 * above + 8.0 * below) / step, canal[1] + (5.0 + 10.0 * below) / step]
        )
    return draw_tube(grid.shape_DHW, np.array(points), ESOPHAGUS_RADIUS_MM / step)


def estimate_great_veins(grid: WorkGrid, frame: Frame) -> Mask:
    """Superior vena cava right of the ascending aorta, and inferior vena cava through the diaphragm."""
    step, carina = grid.step_mm, frame.carina_DHW
    superior = np.array(
        [
            [carina[0] - 45.0 / step, carina[1] - 20.0 / step, carina[2] - 22.0 / step],
            [
                min(grid.shape_DHW[0] - 1.0, carina[0] + 45.0 / step),
                carina[1] - 16.0 / step,
                carina[2] - 22.0 / step,
            ],
        ]
    )
    diaphragm = float(np.median(frame.diaphragm_HW))
    canal = frame.canal_D[int(np.clip(round(diaphragm), 0, len(frame.canal_D) - 1))]
    inferior = np.array(
        [
            [diaphragm + 15.0 / step, canal[0] - 88.0 / step, canal[1] - 8.0 / step],
            [max(0.0, diaphragm - 90.0 / step), canal[0] - 55.0 / step, canal[1] - 20.0 / step],
        ]
    )
    radius = VEIN_RADIUS_MM / step
    return draw_tube(grid.shape_DHW, superior, radius) | draw_tube(grid.shape_DHW, inferior, radius * 1.25)


def find_hilar_vessels(grid: WorkGrid, lungs: Lungs, airways_DHW: Mask) -> Mask:
    """Vessels thick enough to see on the coarse grid: dense tissue that the lungs' filling enclosed, near the hila."""
    inside = lungs.both_DHW & ~lungs.aerated_DHW & (grid.hu_DHW > -100.0) & (grid.hu_DHW < 700.0)
    return inside & grow(airways_DHW, 35.0 / grid.step_mm) if airways_DHW.any() else inside


def find_liver(grid: WorkGrid, abdomen_DHW: Mask, canal_D: NDArray[np.float64]) -> Mask:
    """The bulk of even soft tissue under the right half of the diaphragm, reaching a little to the left."""
    hu = ndimage.gaussian_filter(grid.hu_DHW, 1.0)
    right_mm = (canal_D[:, 1][:, None, None] - np.arange(grid.shape_DHW[2])[None, None]) * grid.step_mm
    room = abdomen_DHW & (right_mm > -30.0)
    seed = room & (hu > 20.0) & (hu < 250.0) & (right_mm > 30.0)
    if seed.sum() < 50:
        return np.zeros(grid.shape_DHW, dtype=bool)
    typical = float(np.median(hu[seed]))
    even = opened(room & (np.abs(hu - typical) < 45.0), 8.0 / grid.step_mm)
    return largest(even) if even.any() else even
