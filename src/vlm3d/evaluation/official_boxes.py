"""The VLM3D challenge's boxes around lesions: from masks, to the file, and back.

``[{"outputs": [{"type": "predictions", "value": {"predictions": [{"input_image_name": "x.mha", "Lung nodule":
[{"bbox_mm": [x, y, z, dx, dy, dz], "probability": 0.9}], … all five keys}]}}]}]``

A box is its minimum corner and its size in mm, order x y z on ITK's axes (x to the patient's left, y to the back, z to the
head), edges at the outer faces of voxels, counted from the minimum corner of the volume's own bounding box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.errors import InputError, UnreadableFileError
from vlm3d.evaluation.case_ids import case_id_of, check_same_cases, check_unique, named
from vlm3d.evaluation.official import read_json, unwrapped, write_json
from vlm3d.labels import LESIONS

LESION_OF_NAME = {lesion.challenge_name: lesion.key for lesion in LESIONS}
NAME_OF_LESION = {lesion.key: lesion.challenge_name for lesion in LESIONS}

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
_FACES = ndimage.generate_binary_structure(3, 1)
_UNIT_CORNERS = np.array(list(product((0, 1), repeat=3)), dtype=np.float64)


@dataclass(frozen=True)
class LesionBox:
    """One lesion in the challenge's millimeters.

    Attributes:
        bbox_mm: (x, y, z, dx, dy, dz): minimum corner, size.
        probability: How sure the system is of it, 0..1.
    """

    bbox_mm: tuple[float, float, float, float, float, float]
    probability: float = 1.0


Boxes = Mapping[str, Sequence[LesionBox]]
"""Lesion key -> its boxes in one case."""


def boxes_of_mask(
    mask_DHW: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    probability_DHW: NDArray[np.floating[Any]] | None = None,
) -> list[LesionBox]:
    """A box around each piece of a mask; voxels that touch by a face belong together.

    Args:
        mask_DHW: bool, or a number that is not 0 where there is lesion.
        affine: Index (d, h, w, 1) to RAS+ mm, as in `Volume`.
        probability_DHW: Of each voxel; a box gets the mean over its piece, and 1 without it.
    """
    labels_DHW, pieces = ndimage.label(np.asarray(mask_DHW, dtype=bool), structure=_FACES)
    if not pieces:
        return []
    numbers = np.arange(1, pieces + 1)
    sure = np.ones(pieces) if probability_DHW is None else ndimage.mean(probability_DHW, labels_DHW, numbers)
    origin_mm, _ = _bounds_mm((0, 0, 0), mask_DHW.shape, affine)
    boxes = []
    for sides, probability in zip(ndimage.find_objects(labels_DHW), sure, strict=True):
        low_mm, high_mm = _bounds_mm([side.start for side in sides], [side.stop for side in sides], affine)
        values = (*(low_mm - origin_mm).tolist(), *(high_mm - low_mm).tolist())
        boxes.append(LesionBox(values, float(probability)))
    return boxes


def _bounds_mm(
    start_dhw: Sequence[int], stop_dhw: Sequence[int], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest x, y, z of a block of voxels, outer faces included; a constant shift of all is of no matter."""
    start, stop = np.asarray(start_dhw, dtype=np.float64), np.asarray(stop_dhw, dtype=np.float64)
    corners_dhw = start + _UNIT_CORNERS * (stop - start)
    corners_mm = corners_dhw @ (_RAS_TO_LPS @ affine[:3, :3]).T
    return corners_mm.min(axis=0), corners_mm.max(axis=0)


def write_boxes(
    path: str | Path, cases: Mapping[str, Boxes], *, expected_ids: Iterable[str] | None = None
) -> None:
    """Write the boxes of all cases, every one of the five lesions in each.

    Args:
        path: The file; its folder must exist.
        cases: File name of the scan (kept as given) -> lesion key -> boxes; a lesion without boxes may be left out.
        expected_ids: The cases that must be there, no more and no fewer.

    Raises:
        InputError: Cases do not fit, a lesion is unknown, or a box is none.
        OutputError: The file cannot be written.
    """
    name = Path(path).name
    ids = [case_id_of(case) for case in cases]
    check_unique(ids, name)
    if expected_ids is not None:
        check_same_cases(ids, map(case_id_of, expected_ids), name, "the input")
    rows: list[dict[str, Any]] = []
    for case, boxes in cases.items():
        unknown = set(boxes) - set(NAME_OF_LESION)
        if unknown:
            raise InputError(f"{name}: case {case_id_of(case)} has unknown lesions: {named(unknown)}")
        row: dict[str, Any] = {"input_image_name": case}
        for key, challenge_name in NAME_OF_LESION.items():
            row[challenge_name] = [
                {"bbox_mm": list(box.bbox_mm), "probability": box.probability}
                for box in (_checked(box, f"{name}: case {case_id_of(case)}") for box in boxes.get(key, ()))
            ]
        rows.append(row)
    write_json(path, [{"outputs": [{"type": "predictions", "value": {"predictions": rows}}]}])


def read_boxes(
    path: str | Path, *, expected_ids: Iterable[str] | None = None
) -> dict[str, dict[str, list[LesionBox]]]:
    """Read a box file, predictions or truth (whose boxes may have no probability).

    Returns:
        Case id -> lesion key -> boxes; all five lesions in each case.

    Raises:
        UnreadableFileError: Missing, truncated, or not such a file.
        InputError: Cases do not fit, a lesion is missing or unknown, or a box is none.
    """
    name = Path(path).name
    rows = unwrapped(read_json(path), name).get("predictions")
    if not isinstance(rows, list):
        raise UnreadableFileError(f"{name} has no list 'predictions'; is it a file of another task?")
    ids, cases = [], []
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("input_image_name"), str):
            raise UnreadableFileError(f"{name}: case {place} has no text 'input_image_name'")
        ids.append(case_id_of(row["input_image_name"]))
        cases.append(_case_boxes(row, f"{name}: case {ids[-1]}"))
    check_unique(ids, name)
    if expected_ids is not None:
        check_same_cases(ids, map(case_id_of, expected_ids), name, "the truth")
    return dict(zip(ids, cases, strict=True))


def _case_boxes(row: dict[str, Any], where: str) -> dict[str, list[LesionBox]]:
    names = set(row) - {"input_image_name"}
    if names != set(LESION_OF_NAME):
        missing, unknown = set(LESION_OF_NAME) - names, names - set(LESION_OF_NAME)
        raise InputError(
            f"{where} lacks the lesions {named(missing)}"
            if missing
            else f"{where} has unknown: {named(unknown)}"
        )
    boxes: dict[str, list[LesionBox]] = {}
    for challenge_name, key in LESION_OF_NAME.items():
        entries = row[challenge_name]
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("bbox_mm"), list) for entry in entries
        ):
            raise UnreadableFileError(f"{where}: '{challenge_name}' is no list of boxes with 'bbox_mm'")
        boxes[key] = [
            _checked(LesionBox(tuple(entry["bbox_mm"]), entry.get("probability", 1.0)), where)
            for entry in entries
        ]
    return boxes


def _checked(box: LesionBox, where: str) -> LesionBox:
    numbers = (*box.bbox_mm, box.probability)
    plain = all(
        isinstance(value, (int, float, np.number)) and not isinstance(value, bool) for value in numbers
    )
    if len(numbers) != 7 or not plain or not all(math.isfinite(value) for value in numbers):
        raise InputError(f"{where}: a box is six numbers in mm with a probability, got {_short(numbers)}")
    if min(box.bbox_mm[3:]) <= 0:
        raise InputError(f"{where}: a box has no extent: {_short(box.bbox_mm)}")
    if not 0 <= box.probability <= 1:
        raise InputError(f"{where}: a box has the probability {box.probability}; it lies in 0..1")
    x, y, z, dx, dy, dz = (float(value) for value in box.bbox_mm)
    return LesionBox((x, y, z, dx, dy, dz), float(box.probability))


def _short(values: Sequence[Any]) -> str:
    return str(list(values))[:80]
