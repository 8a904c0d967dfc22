"""How well predicted masks fit true ones: by voxel, by surface in mm, and lesion by lesion.

A case becomes one small `MaskRecord`, whatever its size; figures are computed over records. A case whose mask is empty
in truth and prediction has no Dice; a case with one empty mask has Dice 0 and no surface distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.lesion_matching import FOUND_IOU, LesionOverlaps, lesion_overlaps
from vlm3d.evaluation.surface_distance import Bools, Box, Floats, bounding_box, surface_distances

SIZE_EDGES_MM = (10.0, 30.0)
"""Between small, medium and large lesions: the diameter of a ball of the lesion's volume."""
FROC_RATES = (0.5, 1.0, 2.0, 4.0)
"""False positives a scan, as the challenge reads its curve."""
SURFACE_TOLERANCE_MM = 3.0
AP_IOU = 0.5


@dataclass(frozen=True)
class MaskRecord:
    """What is kept of one lesion's masks in one case.

    Attributes:
        both: Voxels in truth and prediction.
        predicted: Predicted voxels.
        true: True voxels.
        hd95_mm: NaN unless both masks have voxels, or if no spacing was known.
        average_surface_mm: As ``hd95_mm``.
        surface_dice: At `SURFACE_TOLERANCE_MM`; NaN if both masks are empty or no spacing was known.
        lesions: Component by component, or None if no spacing was known.
    """

    both: int
    predicted: int
    true: int
    hd95_mm: float = float("nan")
    average_surface_mm: float = float("nan")
    surface_dice: float = float("nan")
    lesions: LesionOverlaps | None = None

    @property
    def dice(self) -> float:
        """2 shared / (predicted + true); NaN if both are empty."""
        total = self.predicted + self.true
        return 2 * self.both / total if total else float("nan")

    @property
    def iou(self) -> float:
        """Shared / union; NaN if both are empty."""
        union = self.predicted + self.true - self.both
        return self.both / union if union else float("nan")


def mask_record(
    predicted_DHW: Bools,
    truth_DHW: Bools,
    spacing_mm: Sequence[float] | None = None,
    probability_DHW: NDArray[Any] | None = None,
) -> MaskRecord:
    """Compare one lesion's masks in one case.

    Args:
        predicted_DHW: On the truth's grid.
        truth_DHW: Where the lesion is.
        spacing_mm: Voxel size along (D, H, W); without it only voxels are counted.
        probability_DHW: That the predicted mask was cut from, for the confidence of its lesions.

    Raises:
        ValueError: The grids differ, or the spacing is not three positive lengths.
    """
    if predicted_DHW.shape != truth_DHW.shape:
        raise ValueError(f"masks of {predicted_DHW.shape} against {truth_DHW.shape}")
    if spacing_mm is not None and (len(spacing_mm) != 3 or not all(0 < mm < np.inf for mm in spacing_mm)):
        raise ValueError(f"a spacing is three positive lengths in mm, got {tuple(spacing_mm)}")
    box = _union(bounding_box(predicted_DHW), bounding_box(truth_DHW))
    predicted, truth = predicted_DHW[box], truth_DHW[box]
    both, called, true = (int(np.count_nonzero(mask)) for mask in (predicted & truth, predicted, truth))
    if spacing_mm is None:
        return MaskRecord(both, called, true)
    probability = None if probability_DHW is None else probability_DHW[box]
    lesions = lesion_overlaps(predicted, truth, spacing_mm, probability)
    if not called or not true:
        surface_dice = 0.0 if called or true else float("nan")
        return MaskRecord(both, called, true, surface_dice=surface_dice, lesions=lesions)
    distances = surface_distances(predicted, truth, spacing_mm)
    return MaskRecord(
        both,
        called,
        true,
        hd95_mm=distances.hausdorff_mm(),
        average_surface_mm=distances.average_mm(),
        surface_dice=distances.surface_dice(SURFACE_TOLERANCE_MM),
        lesions=lesions,
    )


def _union(first: Box | None, second: Box | None) -> Box:
    if first is None or second is None:
        return first or second or (slice(0, 0), slice(0, 0), slice(0, 0))
    d, h, w = (slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return d, h, w


def localization_figures(records: Mapping[str, Sequence[MaskRecord]]) -> dict[str, Any]:
    """Figures of each lesion over its cases, and their means.

    Args:
        records: Lesion key -> one record a case.

    Returns:
        ``per_lesion``: key -> ``dice``, ``iou`` (means over cases with the lesion in truth or prediction), ``cases``; and
        where spacings were known ``hd95_mm``, ``average_surface_mm`` (means over the ``surface_cases`` with both masks),
        ``surface_dice``, ``lesions`` (see `lesion_figures`). ``macro``: means of the numbers over lesions.
    """
    per_lesion: dict[str, dict[str, Any]] = {}
    for key, rows in records.items():
        figures: dict[str, Any] = {
            "dice": nanmean([row.dice for row in rows]),
            "iou": nanmean([row.iou for row in rows]),
            "cases": len(rows),
        }
        overlaps = [row.lesions for row in rows if row.lesions is not None]
        if overlaps:
            figures |= {
                name: nanmean([getattr(row, name) for row in rows])
                for name in ("hd95_mm", "average_surface_mm", "surface_dice")
            }
            figures["surface_cases"] = sum(not np.isnan(row.hd95_mm) for row in rows)
            figures["lesions"] = lesion_figures(overlaps)
        per_lesion[key] = figures
    names = ["dice", "iou"]
    if any("lesions" in figures for figures in per_lesion.values()):
        names += ["hd95_mm", "average_surface_mm", "surface_dice"]
    macro: dict[str, Any] = {
        name: nanmean([figures.get(name, float("nan")) for figures in per_lesion.values()]) for name in names
    }
    if len(names) > 2:
        counted = [figures["lesions"] for figures in per_lesion.values() if "lesions" in figures]
        macro |= {
            name: nanmean([figures[name] for figures in counted])
            for name in ("sensitivity", "precision", "ap50")
        }
    return {"per_lesion": per_lesion, "macro": macro}


def lesion_figures(cases: Sequence[LesionOverlaps], found_iou: float = FOUND_IOU) -> dict[str, Any]:
    """Figures of single lesions, pooled over cases.

    Returns:
        ``truth`` and ``predicted``: lesions counted. ``sensitivity``: true lesions whose partner overlaps by
        ``found_iou``; ``precision``: predicted lesions that are such partners. ``ap50``: `detection_ap` at IoU 0.5.
        ``froc``: sensitivity at each of `FROC_RATES` false positives a scan. ``by_size``: diameter class -> ``truth``,
        ``sensitivity``, ``dice`` (mean over true lesions of the Dice with the partner, 0 where there is none).
    """
    partner_iou = np.concatenate([case.partners(found_iou) for case in cases])
    truth_ml = np.concatenate([case.truth_ml_T for case in cases])
    found, predicted = int((partner_iou > 0).sum()), sum(len(case.predicted_ml_P) for case in cases)
    diameter_mm = np.cbrt(truth_ml * 1000 * 6 / np.pi)
    size = np.digitize(diameter_mm, SIZE_EDGES_MM)
    by_size = {}
    for number, name in enumerate(size_names()):
        chosen = partner_iou[size == number]
        by_size[name] = {
            "truth": int(chosen.size),
            "sensitivity": float((chosen > 0).mean()) if chosen.size else float("nan"),
            "dice": float((2 * chosen / (1 + chosen)).mean()) if chosen.size else float("nan"),
        }
    return {
        "truth": int(truth_ml.size),
        "predicted": predicted,
        "sensitivity": found / truth_ml.size if truth_ml.size else float("nan"),
        "precision": found / predicted if predicted else float("nan"),
        "ap50": detection_ap(cases, AP_IOU),
        "froc": froc(cases, found_iou),
        "by_size": by_size,
    }


def size_names() -> tuple[str, ...]:
    """Names of the size classes, small to large."""
    edges = [f"{edge:g}" for edge in SIZE_EDGES_MM]
    middle = [f"{low}-{high} mm" for low, high in itertools.pairwise(edges)]
    return (f"<{edges[0]} mm", *middle, f">={edges[-1]} mm")


def _detections(cases: Sequence[LesionOverlaps], needed_iou: float) -> tuple[Floats, NDArray[np.int8]]:
    """Confidence of every predicted lesion, and 1 for a hit, 0 for one more on a found lesion, -1 for a false positive.

    The most confident prediction goes first and takes the unfound true lesion that it overlaps best.
    """
    confidences, kinds = [np.zeros(0)], [np.zeros(0, dtype=np.int8)]
    for case in cases:
        kind_P = np.full(len(case.confidence_P), -1, dtype=np.int8)
        enough = np.flatnonzero(case.iou_o >= needed_iou)
        order = enough[np.lexsort((-case.iou_o[enough], -case.confidence_P[case.predicted_o[enough]]))]
        found: set[int] = set()
        for place in order:
            predicted, truth = int(case.predicted_o[place]), int(case.truth_o[place])
            if kind_P[predicted] == 1:
                continue
            kind_P[predicted] = 0 if truth in found else 1
            found.add(truth)
        confidences.append(case.confidence_P)
        kinds.append(kind_P)
    confidence, kind = np.concatenate(confidences), np.concatenate(kinds)
    order = np.argsort(-confidence, kind="stable")
    return confidence[order], kind[order]


def detection_ap(cases: Sequence[LesionOverlaps], needed_iou: float = AP_IOU) -> float:
    """Area under the precision-recall curve of lesions pooled over cases; NaN without a true lesion.

    Predictions are ranked by confidence, equal confidences enter together; a prediction counts as right if it overlaps a
    true lesion by ``needed_iou`` that no better one has taken. Precision at a recall is the best at that recall or
    beyond (the all-point rule of PASCAL VOC 2010).
    """
    truth = sum(len(case.truth_ml_T) for case in cases)
    if not truth:
        return float("nan")
    confidence, kind = _detections(cases, needed_iou)
    if not kind.size:
        return 0.0
    last = np.r_[confidence[1:] != confidence[:-1], True]
    hits = np.cumsum(kind == 1)[last]
    precision = hits / (np.flatnonzero(last) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((best * np.diff(np.r_[0, hits])).sum() / truth)


def froc(cases: Sequence[LesionOverlaps], found_iou: float = FOUND_IOU) -> dict[str, float]:
    """Sensitivity at given false positives a scan, pooled over cases; NaN without a true lesion.

    A second prediction on a lesion that is already found is neither a hit nor a false positive.
    """
    truth = sum(len(case.truth_ml_T) for case in cases)
    confidence, kind = _detections(cases, found_iou)
    last = np.r_[confidence[1:] != confidence[:-1], True] if kind.size else np.zeros(0, dtype=bool)
    hits, alarms = np.cumsum(kind == 1)[last], np.cumsum(kind == -1)[last]
    result = {}
    for rate in FROC_RATES:
        reached = hits[alarms <= rate * len(cases)]
        result[f"{rate:g}"] = (reached[-1] if reached.size else 0) / truth if truth else float("nan")
    return {rate: float(value) for rate, value in result.items()}


def nanmean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; NaN without one."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
