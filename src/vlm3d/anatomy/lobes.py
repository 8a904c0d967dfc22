"""A lung divided into its lobes by its fissures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.fissures import Fissures
from vlm3d.anatomy.grid import Mask
from vlm3d.anatomy.regions import REGION_IDS


def divide_lung(lung_DHW: Mask, side: str, fissures: Fissures, lung_ids_DHW: NDArray[np.uint8]) -> None:
    """Write the ids of a lung's lobes into an array of region ids.

    Args:
        lung_DHW: One lung, on any grid.
        side: ``"right"`` or ``"left"``.
        fissures: Of that lung.
        lung_ids_DHW: uint8 ids on the same grid, changed in place.
    """
    if not lung_DHW.any():
        return
    height, depth, across = (_shares(lung_DHW, axis) for axis in range(3))
    height, depth = height[:, None, None], depth[:, None]
    below_oblique = height < fissures.oblique.height(depth, across)
    ids = np.where(below_oblique, REGION_IDS[f"{side}_lower_lobe"], REGION_IDS[f"{side}_upper_lobe"])
    if fissures.horizontal is not None:
        middle = ~below_oblique & (height < fissures.horizontal.height(depth, across))
        ids = np.where(middle, REGION_IDS[f"{side}_middle_lobe"], ids)
    np.copyto(lung_ids_DHW, ids.astype(np.uint8), where=lung_DHW)


def _shares(lung_DHW: Mask, axis: int) -> NDArray[np.float64]:
    """Where each index of an axis lies between the lung's first (0) and its last (1)."""
    others = tuple({0, 1, 2} - {axis})
    places = np.flatnonzero(np.any(lung_DHW, axis=others))
    shares: NDArray[np.float64] = (np.arange(lung_DHW.shape[axis]) - places[0] + 0.5) / (
        places[-1] - places[0] + 1
    )
    return shares
