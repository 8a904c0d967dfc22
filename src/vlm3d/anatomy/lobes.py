"""Lobes by fissure planes placed from each lung's own height and depth: an estimate, since fissures are not searched."""

from __future__ import annotations

import numpy as np

from vlm3d.anatomy.grid import Mask
from vlm3d.anatomy.regions import REGION_IDS

# Height of the oblique fissure, as a share of the lung's height: at its front and at its back.
OBLIQUE_RIGHT, OBLIQUE_LEFT = (0.02, 0.80), (-0.02, 0.82)
HORIZONTAL = 0.50


def divide_lung(lung_DHW: Mask, side: str, lung_ids_DHW: np.ndarray) -> None:
    """Write the ids of a lung's lobes into an array of region ids.

    Args:
        lung_DHW: One lung.
        side: ``"right"`` or ``"left"``.
        lung_ids_DHW: uint8 ids on the same grid, changed in place.
    """
    if not lung_DHW.any():
        return
    levels = np.nonzero(lung_DHW.any((1, 2)))[0]
    rows = np.nonzero(lung_DHW.any((0, 2)))[0]
    height = (np.arange(lung_DHW.shape[0]) - levels[0] + 0.5) / (levels[-1] - levels[0] + 1)
    depth = (np.arange(lung_DHW.shape[1]) - rows[0] + 0.5) / (rows[-1] - rows[0] + 1)
    front, back = OBLIQUE_RIGHT if side == "right" else OBLIQUE_LEFT
    below_oblique = height[:, None, None] < front + (back - front) * depth[None, :, None]
    ids = np.where(below_oblique, REGION_IDS[f"{side}_lower_lobe"], REGION_IDS[f"{side}_upper_lobe"])
    if side == "right":
        middle = ~below_oblique & (height < HORIZONTAL)[:, None, None]
        ids = np.where(middle, REGION_IDS["right_middle_lobe"], ids)
    np.copyto(lung_ids_DHW, ids.astype(np.uint8), where=lung_DHW)
