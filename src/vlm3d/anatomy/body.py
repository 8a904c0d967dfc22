"""Where the patient is: the body without the table, and the air outside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.morphology import largest, medians_of, opened

TISSUE_HU = -300.0
AIR_HU = -400.0
OUTSIDE_AIR_HU = -960.0
TABLE_SHELL_MM = 5.0


@dataclass(frozen=True)
class Body:
    """The patient on the coarse grid.

    Attributes:
        mask_DHW: Everything inside the skin, air-filled organs included.
        inner_air_DHW: Air inside the body: lungs, airways, bowel gas.
    """

    mask_DHW: Mask
    inner_air_DHW: Mask


def find_body(grid: WorkGrid) -> Body:
    """Separate the patient from table, clothes and outside air."""
    hu = grid.hu_DHW
    air = (hu < AIR_HU) | grid.padding_DHW
    outside = _outside_air(grid, air)
    core = largest(opened(~outside, grid.voxels(TABLE_SHELL_MM)))
    near = ndimage.binary_dilation(core, iterations=2)
    mask = core | (near & (hu > TISSUE_HU) & ~outside)
    return Body(mask, mask & air)


def _outside_air(grid: WorkGrid, air: Mask) -> Mask:
    """Padding, and pieces of air that reach the image's sides and are as thin as room air."""
    labels, count = ndimage.label(air)
    side = np.zeros(count + 1, dtype=bool)
    for face in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        side[np.unique(face)] = True
    side[0] = False
    outside = grid.padding_DHW.copy()
    candidates = np.flatnonzero(side)
    if candidates.size:
        medians = medians_of(grid.hu_DHW, labels, ndimage.find_objects(labels), candidates)
        thin = np.zeros(count + 1, dtype=bool)
        thin[candidates[medians < OUTSIDE_AIR_HU]] = True
        outside |= thin[labels]
    return outside
