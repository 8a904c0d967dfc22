"""Shapes in millimeters: grow, shrink, open and close masks, and pick connected pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

Mask = NDArray[np.bool_]


def signed_distance(mask: Mask, step: float | tuple[float, float, float] = 1.0) -> NDArray[np.float32]:
    """Distance to the mask's surface: negative inside, positive outside; huge where the mask is empty."""
    if not mask.any():
        return np.full(mask.shape, 1e6, dtype=np.float32)
    if mask.all():
        return np.full(mask.shape, -1e6, dtype=np.float32)
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(step)] * 3 if np.isscalar(step) else [float(s) for s in tuple(step)[::-1]])  # type: ignore[arg-type]
    distance = sitk.SignedMaurerDistanceMap(
        image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True
    )
    return sitk.GetArrayFromImage(distance)


def _around(mask: Mask, margin: int) -> tuple[slice, ...] | None:
    """The box of all that is set with a margin, as far as the volume goes; None where nothing is set."""
    found = ndimage.find_objects(mask.view(np.uint8))
    if not found:
        return None
    return tuple(slice(max(cut.start - margin, 0), cut.stop + margin) for cut in found[0])


def medians_of(
    values: NDArray[Any],
    labels: NDArray[np.int32],
    boxes: Sequence[tuple[slice, ...]],
    candidates: NDArray[np.intp],
) -> NDArray[np.float64]:
    """Median of the values under each of some labels; ``boxes`` is ``ndimage.find_objects(labels)``."""
    return np.array(
        [np.median(values[boxes[c - 1]][labels[boxes[c - 1]] == c]) for c in candidates], np.float64
    )


def grow(mask: Mask, radius: float) -> Mask:
    """Dilate by a ball; the radius is in voxels of an isotropic grid."""
    box = _around(mask, int(np.ceil(radius)) + 1)
    grown = np.zeros_like(mask)
    if box is not None:
        grown[box] = signed_distance(mask[box]) <= radius
    return grown


def shrink(mask: Mask, radius: float) -> Mask:
    """Erode by a ball; the volume's border does not erode."""
    box = _around(mask, 1)
    shrunk = np.zeros_like(mask)
    if box is not None:
        shrunk[box] = mask[box] & ~(signed_distance(~mask[box]) <= radius)
    return shrunk


def opened(mask: Mask, radius: float) -> Mask:
    """Remove what a ball of this radius does not fit into."""
    return mask & grow(shrink(mask, radius), radius)


def closed(mask: Mask, radius: float) -> Mask:
    """Fill what a ball of this radius does not fit into; the volume's border does not attract."""
    box = _around(mask, 0)
    filled = mask.copy()
    if box is not None:
        pad = int(np.ceil(radius)) + 1
        padded = np.pad(mask[box], pad)
        near = signed_distance(~(signed_distance(padded) <= radius)) > radius
        filled[box] |= near[pad:-pad, pad:-pad, pad:-pad]
    return filled


def largest(mask: Mask) -> Mask:
    """The largest connected piece."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask.copy()
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def touching(mask: Mask, seed: Mask) -> Mask:
    """The connected pieces of the mask that hold a seed voxel."""
    labels, count = ndimage.label(mask)
    keep = np.zeros(count + 1, dtype=bool)
    keep[np.unique(labels[seed & mask])] = True
    keep[0] = False
    return keep[labels]


def without_small(mask: Mask, min_voxels: int) -> Mask:
    """Drop connected pieces of fewer voxels."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= min_voxels
    keep[0] = False
    return keep[labels]


def hull_slices(mask_DHW: Mask) -> Mask:
    """The convex hull of the mask in each axial slice."""
    hull_DHW = mask_DHW.copy()
    for d in range(mask_DHW.shape[0]):
        points = np.argwhere(mask_DHW[d])
        if len(points) < 3 or (np.ptp(points, axis=0) == 0).any():
            continue
        try:
            equations = ConvexHull(points).equations
        except QhullError:  # all points on one slanted line
            continue
        low, high = points.min(0), points.max(0) + 1
        row, column = np.ogrid[low[0] : high[0], low[1] : high[1]]
        inside = np.ones((high[0] - low[0], high[1] - low[1]), dtype=bool)
        for a, b, c in equations:
            inside &= a * row + b * column + c <= 1e-6
        hull_DHW[d, low[0] : high[0], low[1] : high[1]] = inside
    return hull_DHW
