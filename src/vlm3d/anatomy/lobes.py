"""A lung divided into its lobes by its fissures."""

from __future__ import annotations

import numpy as np

from vlm3d.anatomy.fissures import Fissures
from vlm3d.anatomy.grid import Mask
from vlm3d.anatomy.regions import REGION_IDS


def divide_lung(lung_DHW: Mask, side: str, fissures: Fissures, lung_ids_DHW: np.ndarray) -> None:
    """Write the ids of a lung's lobes into an array of region ids.

    Args:
        lung_DHW: One lung, on any grid.
        side: ``"right"`` or ``"left"``.
        fissures: Of that lung.
        lung_ids_DHW: uint8 ids on the same grid, changed in place.
    """
    if not lung_DHW.any():
        return
    height = _shares(lung_DHW.any(axis=(1, 2)))[:, None, None]
    depth = _shares(lung_DHW.any(axis=(0, 2)))[:, None]
    across = _shares(lung_DHW.any(axis=(0, 1)))
    below_oblique = height < fissures.oblique.height(depth, across)
    ids = np.where(below_oblique, REGION_IDS[f"{side}_lower_lobe"], REGION_IDS[f"{side}_upper_lobe"])
    if fissures.horizontal is not None:
        middle = ~below_oblique & (height < fissures.horizontal.height(depth, across))
        ids = np.where(middle, REGION_IDS[f"{side}_middle_lobe"], ids)
    np.copyto(lung_ids_DHW, ids.astype(np.uint8), where=lung_DHW)


def _shares(filled: np.ndarray) -> np.ndarray:
    """Where each index lies between the first (0) and the last (1) one that is filled."""
    places = np.flatnonzero(filled)
    shares: np.ndarray = (np.arange(len(filled)) - places[0] + 0.5) / (places[-1] - places[0] + 1)
    return shares
