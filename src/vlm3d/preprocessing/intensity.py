"""Map Hounsfield units to the model's numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OUTSIDE_VALUE = -1.0
"""Intensity of voxels beyond the scan: that of the window's lower end, air by default."""


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
