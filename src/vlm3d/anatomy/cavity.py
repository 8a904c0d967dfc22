"""The space inside the rib cage and the abdominal wall, from a smooth surface around the lungs and under the ribs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.body import Body
from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.lungs import Lungs
from vlm3d.anatomy.morphology import hull_slices
from vlm3d.anatomy.spine import BONE_HU

NUM_ANGLES = 72
PLEURA_MM = 2.0
RIB_MM = 7.0
BEHIND_TURN = 0.07
DEFAULT_SHARE = 0.8


def find_cavity(grid: WorkGrid, body: Body, lungs: Lungs, spine_center_D: NDArray[np.float64]) -> Mask:
    """Everything inside the rib cage's inner surface and, below it, inside the abdominal wall.

    In each axial slice the surface is a radius for each direction, as a share of the way to the skin. It is measured
    where a ray meets lung or rib, and carried smoothly to directions and slices where it meets neither.

    Args:
        grid: The scan on the coarse grid.
        body: The patient.
        lungs: Both lungs.
        spine_center_D: (D, 2) position (h, w) of the spine in each slice.
    """
    shape = grid.shape_DHW
    center_h = float(np.nonzero(lungs.both_DHW.any((0, 2)))[0].mean())
    center_w = float(spine_center_D[:, 1].mean())
    row, column = np.ogrid[: shape[1], : shape[2]]
    radius_HW = np.hypot(row - center_h, column - center_w)
    turn_HW = np.arctan2(row - center_h, column - center_w) / (2 * np.pi) % 1.0
    angle_HW = np.minimum((turn_HW * NUM_ANGLES).astype(np.intp), NUM_ANGLES - 1)
    skin = _outer_radius(body.mask_DHW, radius_HW, angle_HW)
    lung = _outer_radius(lungs.both_DHW, radius_HW, angle_HW)
    bridged = _outer_radius(hull_slices(lungs.both_DHW), radius_HW, angle_HW)
    lung = np.where(_narrow_gaps(np.isfinite(lung)), bridged, lung)
    rib = _rib_radius(grid, body, lung, skin, radius_HW, angle_HW)
    pleura = PLEURA_MM / grid.step_mm
    measured = np.where(
        np.isfinite(rib), np.maximum(rib - pleura, np.nan_to_num(lung, nan=0.0)), lung + pleura
    )
    behind = np.abs((np.arange(NUM_ANGLES) + 0.5) / NUM_ANGLES - 0.25) < BEHIND_TURN
    to_spine = np.maximum(spine_center_D[:, :1] - center_h, 0.0)
    measured[:, behind] = np.where(np.isfinite(lung[:, behind]), lung[:, behind], to_spine)
    share = _carried(measured / skin, grid.step_mm)
    surface = np.maximum(share * np.nan_to_num(skin, nan=0.0), np.nan_to_num(lung, nan=0.0))
    cavity = np.stack([radius_HW <= surface[d][angle_HW] for d in range(shape[0])])
    cavity[int(np.nonzero(lungs.both_DHW.any((1, 2)))[0][-1]) + 1 :] = False
    return (cavity & body.mask_DHW) | lungs.both_DHW


def _carried(share: NDArray[np.float64], step_mm: float) -> NDArray[np.float64]:
    """Fill unmeasured directions and slices from their neighbors, the near ones first; and smooth."""
    known = np.isfinite(share) & (share < 1.0)
    weight = known.astype(np.float64)
    values = np.where(known, share, 0.0)
    result = np.full(share.shape, DEFAULT_SHARE)
    for sigma_mm, sigma_angle in ((80.0, 4.0), (30.0, 2.5), (8.0, 1.0)):
        sigma = (sigma_mm / step_mm, sigma_angle)
        total = ndimage.gaussian_filter(weight, sigma, mode=("nearest", "wrap"))
        mean = ndimage.gaussian_filter(values, sigma, mode=("nearest", "wrap")) / np.maximum(total, 1e-9)
        trust = np.clip(total / 0.2, 0.0, 1.0)
        result = trust * mean + (1 - trust) * result
    return result


def _narrow_gaps(met: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Directions that meet no lung but lie between two that do, less than a third of a turn apart."""
    half = NUM_ANGLES // 6
    around = np.concatenate([met, met, met], axis=1)
    wide = ndimage.binary_closing(around, np.ones((1, 2 * half + 1)), border_value=0)
    return wide[:, NUM_ANGLES : 2 * NUM_ANGLES] & ~met


def _outer_radius(
    mask_DHW: Mask, radius_HW: NDArray[np.float64], angle_HW: NDArray[np.intp]
) -> NDArray[np.float64]:
    """(D, angle) distance of the mask's outermost voxel from the center; NaN where a ray meets none."""
    outer = np.full((mask_DHW.shape[0], NUM_ANGLES), -1.0)
    d, h, w = np.nonzero(mask_DHW)
    np.maximum.at(outer, (d, angle_HW[h, w]), radius_HW[h, w])
    return np.where(outer >= 0, outer, np.nan)


def _rib_radius(
    grid: WorkGrid,
    body: Body,
    lung: NDArray[np.float64],
    skin: NDArray[np.float64],
    radius_HW: NDArray[np.float64],
    angle_HW: NDArray[np.intp],
) -> NDArray[np.float64]:
    """(D, angle) distance of the innermost rib voxel: the first bone beyond lung, else the bone nearest to the skin."""
    d, h, w = np.nonzero((grid.hu_DHW > BONE_HU) & body.mask_DHW)
    angle, radius = angle_HW[h, w], radius_HW[h, w]
    near = (radius > lung[d, angle] - 1.0) & (radius < lung[d, angle] + 25.0 / grid.step_mm)
    inner = np.full(lung.shape, np.inf)
    np.minimum.at(inner, (d[near], angle[near]), radius[near])
    shallow = radius > 0.65 * skin[d, angle]
    outermost = np.full(lung.shape, -np.inf)
    np.maximum.at(outermost, (d[shallow], angle[shallow]), radius[shallow])
    fallback = np.where(np.isfinite(lung), np.nan, outermost - RIB_MM / grid.step_mm)
    rib = np.where(np.isfinite(inner), inner, fallback)
    return np.where(np.isfinite(rib), rib, np.nan)
