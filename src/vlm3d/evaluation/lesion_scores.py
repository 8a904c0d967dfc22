"""One predicted lesion mask against the true one of the same case: its record with whose it is and how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.lesion_matching import LesionOverlaps
from vlm3d.evaluation.localization import MaskRecord, mask_record

LESION_FIGURES = (
    "dice",
    "iou",
    "sensitivity",
    "precision",
    "hd95_mm",
    "average_surface_mm",
    "surface_dice",
)
"""Of each case; means of them are reported."""


@dataclass(frozen=True)
class LesionScore:
    """How well one lesion of one case was drawn; NaN where the masks do not define a figure.

    Attributes:
        case_id: Whose.
        lesion: Its key.
        record: What is kept of the two masks.
        voxel_ml: Volume of a voxel.
    """

    case_id: str
    lesion: str
    record: MaskRecord
    voxel_ml: float

    @property
    def truth_ml(self) -> float:
        """Volume of the true lesion."""
        return self.record.true * self.voxel_ml

    @property
    def predicted_ml(self) -> float:
        """Volume of the predicted lesion."""
        return self.record.predicted * self.voxel_ml

    @property
    def figures(self) -> dict[str, float]:
        """`LESION_FIGURES` of this case; sensitivity and precision are shares of voxels."""
        record = self.record
        return {
            "dice": record.dice,
            "iou": record.iou,
            "sensitivity": record.both / record.true if record.true else float("nan"),
            "precision": record.both / record.predicted if record.predicted else float("nan"),
            "hd95_mm": record.hd95_mm,
            "average_surface_mm": record.average_surface_mm,
            "surface_dice": record.surface_dice,
        }

    @property
    def badness(self) -> tuple[float, float]:
        """What the worst lesions are ranked by: low overlap, then much of it."""
        return -self.record.dice, max(self.truth_ml, self.predicted_ml)


def score_lesion(
    case_id: str,
    lesion: str,
    predicted_DHW: NDArray[np.bool_],
    truth_DHW: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    probability_DHW: NDArray[np.floating[Any]] | None = None,
) -> LesionScore:
    """Compare two masks on one grid with voxels of `spacing_mm` along (D, H, W)."""
    record = mask_record(predicted_DHW, truth_DHW, spacing_mm, probability_DHW)
    return LesionScore(case_id, lesion, record, float(np.prod(spacing_mm)) / 1000)


def absent_lesion(case_id: str, lesion: str) -> LesionScore:
    """The score where neither side has a voxel."""
    none, ml = np.zeros(0, dtype=np.intp), np.zeros(0)
    overlaps = LesionOverlaps(ml, ml, ml, none, none, ml)
    return LesionScore(case_id, lesion, MaskRecord(0, 0, 0, lesions=overlaps), 0.0)
