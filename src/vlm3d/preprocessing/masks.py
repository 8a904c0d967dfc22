"""Put a lesion's mask on the model's grid without losing small lesions.

A voxel of the new grid is lesion where the mask, interpolated linearly at its center, is at least one half: sizes are
then right on average, and thin shells do not fade as they would under averaging. A piece so small that it lies between
the new centers keeps the one voxel that is nearest to its middle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.errors import MaskError
from vlm3d.io.wording import shape_words
from vlm3d.preprocessing.geometry import ScanGeometry
from vlm3d.preprocessing.orientation import canonical_view
from vlm3d.preprocessing.resampling import AxisWeights, linear_weights, resample_linear

_TOUCHING = np.ones((3, 3, 3), bool)
_EDGE = 0.5 - 1e-4  # float32 weights of two equal neighbors may sum to a little less than a half


def resample_mask(
    mask_DHW: NDArray[np.bool_], geometry: ScanGeometry, name: str, threads: int | None = None
) -> NDArray[np.bool_]:
    """Bring one mask from the scan's own grid and axes to the model's grid.

    Args:
        mask_DHW: On the scan's grid and axes.
        geometry: Where the model's grid lies in the scan.
        name: Of the lesion, for the error.
        threads: As in `resample_linear`.

    Raises:
        MaskError: The mask has another shape than the scan.
    """
    if mask_DHW.shape != geometry.source_shape_DHW:
        raise MaskError(
            f"the mask of {name} has {shape_words(mask_DHW.shape)} voxels, the scan "
            f"{shape_words(geometry.source_shape_DHW)}; resample the mask onto the scan"
        )
    result_DHW = np.zeros(geometry.model_shape_DHW, bool)
    view = canonical_view(mask_DHW, np.array(geometry.source_affine))
    box = filled_box(view)
    if box is None:
        return result_DHW
    target: list[slice] = []
    weights: list[AxisWeights] = []
    for axis, filled in enumerate(box):
        reached = _model_indices(geometry, axis, filled)
        if len(reached) == 0:
            return result_DHW
        indices = np.arange(reached.start, reached.stop, dtype=np.float64)
        positions = geometry.step_DHW[axis] * indices + geometry.offset_DHW[axis]
        weights.append(linear_weights(positions, view.shape[axis]))
        target.append(slice(reached.start, reached.stop))
    along_d, along_h, along_w = weights
    resample_linear(view, (along_d, along_h, along_w), result_DHW[tuple(target)], _half_full, threads)
    _keep_small_pieces(view, box, result_DHW, geometry)
    return result_DHW


def filled_box(mask_DHW: NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    """The smallest box around a mask, or None if it is empty; reads it slice by slice."""
    filled_D = np.array([bool(plane.any()) for plane in mask_DHW])
    if not filled_D.any():
        return None
    along_d = _span(filled_D)
    flat_HW = np.asarray(mask_DHW[along_d].any(axis=0))
    return along_d, _span(np.asarray(flat_HW.any(axis=1))), _span(np.asarray(flat_HW.any(axis=0)))


def _span(filled: NDArray[np.bool_]) -> slice:
    indices = np.flatnonzero(filled)
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _half_full(share_DHW: NDArray[np.float32]) -> NDArray[np.bool_]:
    return share_DHW >= _EDGE


def _model_indices(geometry: ScanGeometry, axis: int, filled: slice) -> range:
    """Model indices inside the scan whose centers lie within one scan voxel of the filled ones."""
    step, offset = geometry.step_DHW[axis], geometry.offset_DHW[axis]
    first, last = geometry.content_DHW[axis]
    start = int(np.floor((filled.start - 1 - offset) / step))
    stop = int(np.ceil((filled.stop - offset) / step)) + 1
    return range(max(first, start), min(last, stop))


def _keep_small_pieces(
    mask_DHW: NDArray[Any],
    box: tuple[slice, slice, slice],
    result_DHW: NDArray[np.bool_],
    geometry: ScanGeometry,
) -> None:
    """Give each piece that no model voxel shows the one voxel nearest to its middle, if that is in the model's view."""
    if max(geometry.step_DHW) <= 1.0:
        return
    pieces_DHW, _ = ndimage.label(mask_DHW[box], structure=_TOUCHING)
    corner = np.array([side.start for side in box])
    for number, piece in enumerate(ndimage.find_objects(pieces_DHW), start=1):
        inside_DHW = pieces_DHW[piece] == number
        start = corner + [side.start for side in piece]
        if _is_shown(inside_DHW, start, result_DHW, geometry):
            continue
        middle = np.argwhere(inside_DHW).mean(axis=0) + start
        nearest = np.rint((middle - geometry.offset_DHW) / geometry.step_DHW).astype(int)
        if all(first <= n < last for n, (first, last) in zip(nearest, geometry.content_DHW, strict=True)):
            result_DHW[tuple(nearest)] = True


def _is_shown(
    inside_DHW: NDArray[np.bool_],
    start: NDArray[np.int64],
    result_DHW: NDArray[np.bool_],
    geometry: ScanGeometry,
) -> bool:
    """Whether a model voxel that is lesion has its center in (or beside) one piece of the mask."""
    reached = [
        _model_indices(geometry, axis, slice(int(start[axis]), int(start[axis]) + inside_DHW.shape[axis]))
        for axis in range(3)
    ]
    found = np.argwhere(result_DHW[tuple(slice(indices.start, indices.stop) for indices in reached)])
    if len(found) == 0:
        return False
    model_indices = found + [indices.start for indices in reached]
    centers = np.rint(model_indices * geometry.step_DHW + geometry.offset_DHW).astype(np.int64) - start
    within = ((centers >= 0) & (centers < inside_DHW.shape)).all(axis=1)
    return bool(inside_DHW[tuple(centers[within].T)].any())
