"""How far apart the surfaces of two masks lie, in mm on anisotropic grids: HD95, average distance, surface Dice.

A surface is the set of voxels of a mask that touch a face-neighbor outside of it, the scan's border counting as outside;
distances run between voxel centers. These are MONAI's conventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances between the surfaces of a predicted and a true mask.

    Attributes:
        to_truth_mm: From each predicted surface voxel to the nearest true one; infinite where the truth is empty.
        to_prediction_mm: From each true surface voxel to the nearest predicted one; infinite where nothing is predicted.
    """

    to_truth_mm: Floats
    to_prediction_mm: Floats

    def hausdorff_mm(self, percentile: float = 95) -> float:
        """The larger of the two directions' percentiles; NaN if both masks are empty, infinite if one is."""
        if not self.to_truth_mm.size and not self.to_prediction_mm.size:
            return float("nan")
        if not self.to_truth_mm.size or not self.to_prediction_mm.size:
            return float("inf")
        return max(
            float(np.percentile(distances, percentile))
            for distances in (self.to_truth_mm, self.to_prediction_mm)
        )

    def average_mm(self) -> float:
        """Mean over the voxels of both surfaces; NaN if both masks are empty, infinite if one is."""
        both = np.concatenate([self.to_truth_mm, self.to_prediction_mm])
        return float(both.mean()) if both.size else float("nan")

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces within a tolerance of the other; NaN if both masks are empty, 0 if one is."""
        both = np.concatenate([self.to_truth_mm, self.to_prediction_mm])
        return float((both <= tolerance_mm).mean()) if both.size else float("nan")


def bounding_box(mask_DHW: Bools) -> Box | None:
    """The smallest box around a mask, or None if it is empty."""
    if not mask_DHW.size:
        return None
    rows = np.flatnonzero(mask_DHW.reshape(len(mask_DHW), -1).any(axis=1))
    if not rows.size:
        return None
    depth = _extent(rows)
    plane_HW = np.logical_or.reduce(mask_DHW[depth], axis=0)
    return depth, _extent(np.flatnonzero(plane_HW.any(axis=1))), _extent(np.flatnonzero(plane_HW.any(axis=0)))


def _extent(places: NDArray[np.intp]) -> slice:
    return slice(int(places[0]), int(places[-1]) + 1)


def surface_voxels(mask_DHW: Bools) -> NDArray[np.intp]:
    """(n, 3) indices of a mask's voxels that touch a face-neighbor outside of it."""
    box = bounding_box(mask_DHW)
    if box is None:
        return np.zeros((0, 3), dtype=np.intp)
    inside = np.pad(mask_DHW[box], 1)
    inner = inside[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for side in (slice(0, -2), slice(2, None)):
            window = [slice(1, -1)] * 3
            window[axis] = side
            inner &= inside[tuple(window)]
    edge = np.flatnonzero(inside[1:-1, 1:-1, 1:-1] & ~inner)
    return np.stack(np.unravel_index(edge, inner.shape), axis=1) + [one.start for one in box]


def surface_distances(
    predicted_DHW: Bools, truth_DHW: Bools, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    """Distances of each surface voxel to the other mask's surface.

    Args:
        predicted_DHW: On the truth's grid.
        truth_DHW: Where the lesion is.
        spacing_mm: Voxel size along (D, H, W).

    Raises:
        ValueError: The grids differ.
    """
    if predicted_DHW.shape != truth_DHW.shape:
        raise ValueError(f"masks of {predicted_DHW.shape} against {truth_DHW.shape}")
    predicted_n3, truth_n3 = surface_voxels(predicted_DHW), surface_voxels(truth_DHW)
    if not len(predicted_n3) or not len(truth_n3):
        return SurfaceDistances(np.full(len(predicted_n3), np.inf), np.full(len(truth_n3), np.inf))
    scale = np.asarray(spacing_mm, dtype=np.float64)
    shape = truth_DHW.shape
    predicted_id, truth_id = (
        np.ravel_multi_index(tuple(voxels.T), shape) for voxels in (predicted_n3, truth_n3)
    )
    return SurfaceDistances(
        _nearest(predicted_n3 * scale, truth_n3 * scale, np.isin(predicted_id, truth_id, assume_unique=True)),
        _nearest(truth_n3 * scale, predicted_n3 * scale, np.isin(truth_id, predicted_id, assume_unique=True)),
    )


def _nearest(from_n3: Floats, to_n3: Floats, shared_n: Bools) -> Floats:
    """Distance of each point to the nearest target; points that are targets themselves cost nothing."""
    distance_n = np.zeros(len(from_n3))
    apart = ~shared_n
    if apart.any():
        tree = cKDTree(to_n3, leafsize=16, balanced_tree=False, compact_nodes=False)
        distance_n[apart] = tree.query(from_n3[apart])[0]
    return distance_n
