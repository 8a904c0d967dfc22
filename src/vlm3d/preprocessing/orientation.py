"""Turn a scan so that its axes point to superior, posterior and left, and back; no voxel changes value."""

from __future__ import annotations

from typing import Any

import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt2axcodes,
    ornt_transform,
)
from numpy.typing import NDArray

from vlm3d.volume import CANONICAL_AXES, RegionMap, Volume

_CANONICAL = axcodes2ornt(CANONICAL_AXES)


def axis_codes(affine: NDArray[np.float64]) -> tuple[str, str, str]:
    """Where the array's axes point, such as ``("S", "P", "L")``: the closest of R, L, A, P, S, I for each.

    Raises:
        ValueError: The affine is singular, so that an axis points nowhere.
    """
    d, h, w = ornt2axcodes(_orientation(affine))
    return d, h, w


def to_canonical(volume: Volume) -> Volume:
    """Transpose and flip a scan to (Superior, Posterior, Left); the voxels are a view of the given ones.

    An oblique scan keeps its tilt: only whole axes move, each to the direction that it is closest to.
    """
    voxels_DHW, affine = _turn(volume.voxels_DHW, volume.affine)
    return volume.with_voxels(voxels_DHW, affine)


def regions_to_canonical(regions: RegionMap) -> RegionMap:
    """Transpose and flip a region map to (Superior, Posterior, Left); its labels are a view."""
    labels_DHW, affine = _turn(regions.labels_DHW, regions.affine)
    return RegionMap(labels_DHW, affine, regions.method)


def canonical_view(array_DHW: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """View an array on the scan's own axes in canonical orientation; writing to the view writes the array."""
    view: NDArray[Any] = apply_orientation(array_DHW, ornt_transform(_orientation(affine), _CANONICAL))
    return view


def from_canonical(array_DHW: NDArray[Any], original_affine: NDArray[np.float64]) -> NDArray[Any]:
    """Turn a canonical array back onto the axes that the scan came with; a view.

    Args:
        array_DHW: In canonical orientation.
        original_affine: The affine of the scan before `to_canonical`.
    """
    back = ornt_transform(_CANONICAL, _orientation(original_affine))
    view: NDArray[Any] = apply_orientation(array_DHW, back)
    return view


def canonical_affine(
    affine: NDArray[np.float64], shape_DHW: tuple[int, int, int]
) -> tuple[NDArray[np.float64], tuple[int, int, int]]:
    """Affine and shape that a grid has after `to_canonical`."""
    transform = ornt_transform(_orientation(affine), _CANONICAL)
    shape = [0, 0, 0]
    for axis, (target, _) in enumerate(transform):
        shape[int(target)] = shape_DHW[axis]
    return affine @ inv_ornt_aff(transform, shape_DHW), (shape[0], shape[1], shape[2])


def _turn(array_DHW: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    d, h, w = array_DHW.shape
    return canonical_view(array_DHW, affine), canonical_affine(affine, (d, h, w))[0]


def _orientation(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    orientation: NDArray[np.float64] = io_orientation(affine)
    if not np.isfinite(orientation).all():
        raise ValueError("the affine is singular: at least one array axis has no direction in the patient")
    return orientation
