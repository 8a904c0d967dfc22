"""How unsure the model says it is: entropy of its own probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def entropy_bits(probability: NDArray[np.floating]) -> NDArray[np.float64]:
    """Binary entropy ``-p log2 p - (1 - p) log2(1 - p)``: 0 where certain, 1 at one half."""
    p = np.clip(np.asarray(probability, dtype=np.float64), 1e-12, 1 - 1e-12)
    return np.minimum(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)), 1.0)


def mask_entropy_bits(probability_DHW: NDArray[np.float32], threshold: float) -> float:
    """Mean entropy inside a mask and its one-voxel rim; over the most probable voxel when the mask is empty."""
    mask_DHW = probability_DHW >= threshold
    if not mask_DHW.any():
        return float(entropy_bits(probability_DHW.max(keepdims=True)).item())
    box = tuple(
        slice(max(0, found.start - 1), found.stop + 1)
        for found in ndimage.find_objects(mask_DHW.astype(np.uint8))[0]
    )
    rim_DHW = ndimage.binary_dilation(mask_DHW[box])
    return float(entropy_bits(probability_DHW[box][rim_DHW]).mean())
