"""Map Hounsfield units to the model's numbers, or to the whole numbers that a store keeps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vlm3d.io.hounsfield import PADDING_HU

OUTSIDE_VALUE = -1.0
"""Intensity of voxels beyond the scan: that of the window's lower end, air by default."""

HIGHEST_HU = 3071
"""Top of a scanner's usual 12 bits; only metal and its artifacts lie above."""


def outside_hu(hu_window: tuple[float, float]) -> int:
    """HU stored for voxels beyond the scan: air so thin that the window maps it to `OUTSIDE_VALUE`."""
    return min(PADDING_HU, math.floor(hu_window[0]))


def stored_hu(hu_DHW: NDArray[np.float32], lowest: int) -> NDArray[np.int16]:
    """Round HU to int16 between ``lowest`` and `HIGHEST_HU`, overwriting the array given."""
    np.clip(hu_DHW, lowest, HIGHEST_HU, out=hu_DHW)
    np.rint(hu_DHW, out=hu_DHW)
    return hu_DHW.astype(np.int16)


def window_in_place(hu_DHW: NDArray[np.float32], hu_window: tuple[float, float]) -> NDArray[np.float32]:
    """Map a window of HU linearly to -1 .. 1 and clip what lies outside, overwriting the array.

    Args:
        hu_DHW: Hounsfield units.
        hu_window: HU that become -1 and 1. The default of `PreprocessingConfig`, -1000 to 1000, shows lung,
            soft tissue and bone at once.
    """
    lower, upper = hu_window
    np.clip(hu_DHW, lower, upper, out=hu_DHW)
    hu_DHW -= np.float32((lower + upper) / 2)
    hu_DHW *= np.float32(2 / (upper - lower))
    return hu_DHW
