"""Which predicted lesion is which true lesion: connected components of two masks, matched one to one by overlap.

Components touch by faces (connectivity 1), as the VLM3D challenge counts them. A true lesion is found if its partner
has an IoU of at least 0.10, the challenge's threshold; partners are chosen so that their summed IoU is greatest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from vlm3d.evaluation.surface_distance import Bools, Box, Floats, bounding_box

FOUND_IOU = 0.10
"""From which overlap a lesion counts as found, as in the challenge's box scorer."""

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LesionOverlaps:
    """The lesions of one case and how they overlap; small, however large the masks were.

    Attributes:
        truth_ml_T: Volume of each true lesion.
        predicted_ml_P: Volume of each predicted lesion.
        confidence_P: Highest probability within each predicted lesion; 1 where only a mask is known.
        predicted_o: Predicted lesion of each overlapping pair.
        truth_o: True lesion of each overlapping pair.
        iou_o: IoU of each overlapping pair.
    """

    truth_ml_T: Floats
    predicted_ml_P: Floats
    confidence_P: Floats
    predicted_o: Indices
    truth_o: Indices
    iou_o: Floats

    def partners(self, found_iou: float = FOUND_IOU) -> Floats:
        """(T,) IoU of each true lesion with its partner, 0 where none reaches ``found_iou``."""
        partner_iou_T = np.zeros(len(self.truth_ml_T))
        enough = self.iou_o >= found_iou
        if enough.any():
            predicted, row_o = np.unique(self.predicted_o[enough], return_inverse=True)
            truth, column_o = np.unique(self.truth_o[enough], return_inverse=True)
            iou_PT = np.zeros((len(predicted), len(truth)))
            iou_PT[row_o, column_o] = self.iou_o[enough]
            row, column = linear_sum_assignment(iou_PT, maximize=True)
            partner_iou_T[truth[column]] = iou_PT[row, column]
        return partner_iou_T


def lesion_overlaps(
    predicted_DHW: Bools,
    truth_DHW: Bools,
    spacing_mm: Sequence[float],
    probability_DHW: NDArray[Any] | None = None,
) -> LesionOverlaps:
    """Find the components of both masks and all overlaps between them.

    Args:
        predicted_DHW: On the truth's grid.
        truth_DHW: Where the lesion is.
        spacing_mm: Voxel size along (D, H, W).
        probability_DHW: That the predicted mask was cut from, for the confidence of its lesions.

    Raises:
        ValueError: The grids differ.
    """
    if predicted_DHW.shape != truth_DHW.shape:
        raise ValueError(f"masks of {predicted_DHW.shape} against {truth_DHW.shape}")
    ml = float(np.prod(np.asarray(spacing_mm, dtype=np.float64))) / 1000
    predicted, truth = _components(predicted_DHW), _components(truth_DHW)
    predicted_P, truth_T = predicted.voxels(), truth.voxels()
    confidence_P = np.ones(len(predicted_P))
    if probability_DHW is not None and predicted.box is not None:
        inside = predicted.label_dhw > 0
        highest = ndimage.maximum(
            np.asarray(probability_DHW[predicted.box])[inside],
            predicted.label_dhw[inside],
            np.arange(1, len(predicted_P) + 1),
        )
        confidence_P = np.asarray(highest, dtype=np.float64)
    predicted_o, truth_o, shared_o = _shared_voxels(predicted, truth, len(truth_T))
    return LesionOverlaps(
        truth_ml_T=truth_T * np.float64(ml),
        predicted_ml_P=predicted_P * np.float64(ml),
        confidence_P=confidence_P,
        predicted_o=predicted_o,
        truth_o=truth_o,
        iou_o=shared_o / (predicted_P[predicted_o] + truth_T[truth_o] - shared_o),
    )


@dataclass(frozen=True)
class _Components:
    """Numbered from 1 within the box that holds them all."""

    box: Box | None
    label_dhw: NDArray[np.int32]
    count: int

    def voxels(self) -> NDArray[np.int64]:
        return np.bincount(self.label_dhw[self.label_dhw > 0], minlength=self.count + 1)[1:]


def _components(mask_DHW: Bools) -> _Components:
    box = bounding_box(mask_DHW)
    if box is None:
        return _Components(None, np.zeros((0, 0, 0), dtype=np.int32), 0)
    label_dhw, count = ndimage.label(mask_DHW[box])
    return _Components(box, label_dhw, int(count))


def _shared_voxels(
    predicted: _Components, truth: _Components, truths: int
) -> tuple[Indices, Indices, NDArray[np.int64]]:
    """Pairs of components that share voxels, and how many; only the boxes' common part is looked at."""
    none = np.zeros(0, dtype=np.intp)
    if predicted.box is None or truth.box is None:
        return none, none, none.astype(np.int64)
    common = [
        slice(max(p.start, t.start), min(p.stop, t.stop))
        for p, t in zip(predicted.box, truth.box, strict=True)
    ]
    if any(one.start >= one.stop for one in common):
        return none, none, none.astype(np.int64)
    p_dhw, t_dhw = (
        side.label_dhw[
            tuple(
                slice(c.start - b.start, c.stop - b.start)
                for c, b in zip(common, side.box or (), strict=True)
            )
        ]
        for side in (predicted, truth)
    )
    both = (p_dhw > 0) & (t_dhw > 0)
    pair = (p_dhw[both].astype(np.int64) - 1) * truths + (t_dhw[both] - 1)
    code, shared = np.unique(pair, return_counts=True)
    return (code // max(truths, 1)).astype(np.intp), (code % max(truths, 1)).astype(np.intp), shared
