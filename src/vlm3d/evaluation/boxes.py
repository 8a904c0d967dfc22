"""The VLM3D challenge's score of boxes around lesions: IoU, distance of centers, sensitivity at false positives a scan.

All in the challenge's millimeters (`vlm3d.evaluation.official_boxes`). Boxes of a lesion in a case are matched one to one
by the least sum of 1 - IoU; a pair counts from an IoU of 0.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from vlm3d.evaluation.lesion_matching import FOUND_IOU
from vlm3d.evaluation.official_boxes import NAME_OF_LESION, Boxes, LesionBox

WORST_DISTANCE_MM = 768.0
"""Of a lesion with boxes in the truth and none found: the diagonal of 512 x 512 x 256 mm."""
FROC_BUDGETS = (0.5, 1, 2, 4)

Floats = NDArray[np.float64]


def iou_of_boxes(first_P6: Floats, second_T6: Floats) -> Floats:
    """(P, T) IoU of each pair of boxes (x, y, z, dx, dy, dz)."""
    low = np.maximum(first_P6[:, None, :3], second_T6[None, :, :3])
    high = np.minimum(
        (first_P6[:, :3] + first_P6[:, 3:])[:, None], (second_T6[:, :3] + second_T6[:, 3:])[None]
    )
    shared = np.clip(high - low, 0, None).prod(axis=2)
    union = first_P6[:, 3:].prod(axis=1)[:, None] + second_T6[:, 3:].prod(axis=1)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match_boxes(predicted: Sequence[LesionBox], truth: Sequence[LesionBox]) -> list[tuple[float, float]]:
    """IoU and distance of centers (mm) of each true positive in one case."""
    if not predicted or not truth:
        return []
    predicted_P6, truth_T6 = _array(predicted), _array(truth)
    # The cost is kept as 1 - IoU, and the IoU read back from it, so that a pair at the threshold falls as officially.
    cost_PT = 1.0 - iou_of_boxes(predicted_P6, truth_T6)
    rows, columns = linear_sum_assignment(cost_PT)
    pairs = []
    for row, column in zip(rows, columns, strict=True):
        iou = 1.0 - cost_PT[row, column]
        if iou >= FOUND_IOU:
            apart = _centers(predicted_P6[row]) - _centers(truth_T6[column])
            pairs.append((float(iou), float(np.linalg.norm(apart))))
    return pairs


def box_figures(
    predicted: Mapping[str, Boxes],
    truth: Mapping[str, Boxes],
    lesion_names: Mapping[str, str] = NAME_OF_LESION,
) -> dict[str, Any]:
    """The challenge's three figures over all cases.

    A case that only one side has counts as a case without boxes on the other.

    Args:
        predicted: Case id -> lesion key -> boxes with probabilities.
        truth: Case id -> lesion key -> boxes.
        lesion_names: Lesion key -> name in the result.

    Returns:
        ``iou``: ``per_pathology`` (mean over true positives; 0.0 if there is truth and none was found; None without truth)
        and ``macro`` (mean of those that are not None, None if all are). ``distance``: the same in mm, 768.0 if none was
        found. ``froc``: ``"0.5"``, ``"1"``, ``"2"``, ``"4"`` false positives a scan -> `box_froc`.
    """
    cases = list(dict.fromkeys([*predicted, *truth]))
    iou: dict[str, float | None] = {}
    distance: dict[str, float | None] = {}
    for key, name in lesion_names.items():
        pairs = [
            pair
            for case in cases
            for pair in match_boxes(predicted.get(case, {}).get(key, ()), truth.get(case, {}).get(key, ()))
        ]
        has_truth = any(boxes.get(key) for boxes in truth.values())
        iou[name] = float(np.mean([one for one, _ in pairs])) if pairs else (0.0 if has_truth else None)
        distance[name] = (
            float(np.mean([one for _, one in pairs])) if pairs else (WORST_DISTANCE_MM if has_truth else None)
        )
    return {
        "iou": {"per_pathology": iou, "macro": _mean(iou)},
        "distance": {"per_pathology": distance, "macro": _mean(distance)},
        "froc": {f"{budget:g}": box_froc(predicted, truth, budget) for budget in FROC_BUDGETS},
    }


def box_froc(predicted: Mapping[str, Boxes], truth: Mapping[str, Boxes], budget: float) -> float:
    """Share of all true boxes that are found before each scan has used up its false positives.

    Boxes go by falling probability, all lesions of a scan together. A box takes the unfound true box of its lesion that it
    overlaps best, if by at least 0.10; else it is a false positive. A scan with ``budget`` false positives takes no more.
    """
    total = sum(len(boxes) for case in truth.values() for boxes in case.values())
    if not total:
        return 0.0
    return sum(_found(predicted[case], truth.get(case, {}), budget) for case in predicted) / total


def _found(predicted: Boxes, truth: Boxes, budget: float) -> int:
    """True boxes found in one scan: scans do not touch each other, so each is walked by itself."""
    ranked = [
        (box.probability, key, place) for key in _order(predicted) for place, box in enumerate(predicted[key])
    ]
    ranked.sort(key=lambda entry: -entry[0])
    overlap = {
        key: iou_of_boxes(_array(predicted[key]), _array(truth[key]))
        for key in predicted
        if predicted[key] and truth.get(key)
    }
    found, alarms = 0, 0
    for _, key, place in ranked:
        if alarms >= budget:
            break
        row = overlap[key][place] if key in overlap else np.zeros(1)
        best = int(row.argmax())
        if row[best] >= FOUND_IOU:
            found += 1
            overlap[key][:, best] = -1.0
        else:
            alarms += 1
    return found


def _order(boxes: Boxes) -> list[str]:
    """Lesions in the challenge's order, which decides between equal probabilities."""
    known = [key for key in NAME_OF_LESION if key in boxes]
    return known + [key for key in boxes if key not in NAME_OF_LESION]


def _array(boxes: Sequence[LesionBox]) -> Floats:
    return np.array([box.bbox_mm for box in boxes], dtype=np.float64).reshape(-1, 6)


def _centers(box_6: Floats) -> Floats:
    center: Floats = box_6[:3] + box_6[3:] / 2
    return center


def _mean(values: Mapping[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known else None
