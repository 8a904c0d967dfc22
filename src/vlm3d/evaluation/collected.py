"""What is kept of each compared case once its masks and its scan are let go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.case_findings import CaseFindings, LesionMasks, check_same_grid
from vlm3d.evaluation.lesion_scores import LesionScore, absent_lesion, score_lesion
from vlm3d.evaluation.official_boxes import LesionBox, boxes_of_mask
from vlm3d.evaluation.ranking import Floats
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.volume import Volume

CaseBoxes = Mapping[str, tuple[LesionBox, ...]]


@dataclass(frozen=True)
class ReportPair:
    """The report that a system wrote, or None, and the true one."""

    case_id: str
    predicted: str | None
    truth: str


@dataclass(frozen=True, eq=False)
class KeySlice:
    """The axial slice on which a predicted lesion differs most from the true one, canonical axes.

    Attributes:
        case_id: Whose.
        lesion: Its key.
        dice: Over the whole scan.
        badness: What the worst are ranked by.
        index: Of the slice, from the feet.
        slices: Of the scan.
        spacing_mm: Pixel size (down, across).
        truth_HW: The true lesion.
        predicted_HW: The predicted one.
        hu_HW: The scan, or None where there is none to show.
    """

    case_id: str
    lesion: str
    dice: float
    badness: tuple[float, float]
    index: int
    slices: int
    spacing_mm: tuple[float, float]
    truth_HW: NDArray[np.bool_]
    predicted_HW: NDArray[np.bool_]
    hu_HW: NDArray[Any] | None


@dataclass
class CollectedCases:
    """Cases compared so far.

    Attributes:
        case_ids: In the order in which they came.
        patient_ids: Of the cases.
        probabilities: One row a case, NaN where it is not compared.
        labels: One row a case, NaN where unknown.
        reports: Of the cases whose truth has one.
        lesions: One entry a case and lesion that both sides speak of.
        not_drawn: Lesions that a case has and the system never draws; they are not scored.
        boxes: Case id -> predicted and true boxes.
        key_slices: Of the worst lesions, the worst first.
        key_slices_per_lesion: How many are kept of each lesion.
    """

    case_ids: list[str] = field(default_factory=list)
    patient_ids: list[str] = field(default_factory=list)
    probabilities: list[Floats] = field(default_factory=list)
    labels: list[Floats] = field(default_factory=list)
    reports: list[ReportPair] = field(default_factory=list)
    lesions: list[LesionScore] = field(default_factory=list)
    not_drawn: set[str] = field(default_factory=set)
    boxes: dict[str, tuple[CaseBoxes, CaseBoxes]] = field(default_factory=dict)
    key_slices: list[KeySlice] = field(default_factory=list)
    key_slices_per_lesion: int = 0

    @property
    def probability_NK(self) -> Floats:
        """Of every case; NaN where it is not compared."""
        return np.array(self.probabilities).reshape(len(self.case_ids), len(DISEASE_NAMES))

    @property
    def label_NK(self) -> Floats:
        """Of every case; NaN where unknown."""
        return np.array(self.labels).reshape(len(self.case_ids), len(DISEASE_NAMES))

    @property
    def labeled_N(self) -> NDArray[np.bool_]:
        """Cases with probabilities and at least one known label."""
        predicted = ~np.isnan(self.probability_NK).any(axis=1)
        return np.asarray(predicted & ~np.isnan(self.label_NK).all(axis=1), dtype=bool)

    def patients_of(self, case_ids: Iterable[str]) -> list[str]:
        """The patient of each case."""
        patient_of = dict(zip(self.case_ids, self.patient_ids, strict=True))
        return [patient_of[case_id] for case_id in case_ids]

    def add(
        self, predicted: CaseFindings, truth: CaseFindings, parts: Iterable[str], drawn: Iterable[str]
    ) -> None:
        """Compare one case.

        Args:
            predicted: What the system says.
            truth: What is true.
            parts: Of ``labels``, ``masks``, ``boxes`` and ``reports``, those to compare.
            drawn: Lesions that the system draws; one of them without a mask in this case was not found in it.

        Raises:
            MaskError: Masks lie on different grids.
            InputError: A file of the case cannot be read.
        """
        unknown_K = np.full(len(DISEASE_NAMES), np.nan)
        self.case_ids.append(truth.case_id)
        self.patient_ids.append(truth.patient_id)
        both = "labels" in parts and predicted.scores_K is not None and truth.scores_K is not None
        self.probabilities.append(
            predicted.scores_K if both and predicted.scores_K is not None else unknown_K
        )
        self.labels.append(truth.scores_K if truth.scores_K is not None else unknown_K)
        if "reports" in parts and truth.report is not None:
            self.reports.append(ReportPair(truth.case_id, predicted.report, truth.report))
        if {"masks", "boxes"} & set(parts):
            masks, true = (_loaded(case, parts) for case in (predicted, truth))
            if "masks" in parts and masks is not None and true is not None:
                self._add_masks(masks, true, truth, frozenset(drawn))
            if "boxes" in parts and (truth.boxes is not None or true is not None):
                found = predicted.boxes if predicted.boxes is not None else _boxes(masks)
                if truth.boxes is None and true is not None:
                    found = {key: boxes for key, boxes in found.items() if key in true.keys}
                self.boxes[truth.case_id] = (found, truth.boxes if truth.boxes is not None else _boxes(true))

    def _add_masks(
        self, predicted: LesionMasks, true: LesionMasks, truth: CaseFindings, drawn: frozenset[str]
    ) -> None:
        check_same_grid(predicted, true, truth.case_id)
        shape, spacing = predicted.shape_DHW or true.shape_DHW, predicted.spacing_mm or true.spacing_mm
        scan: Volume | None = None
        self.not_drawn |= {key for key, mask in true.masks.items() if key not in drawn and mask.any()}
        for key in (key for key in LESION_KEYS if key in drawn and key in true.keys):
            if shape is None or spacing is None:  # neither side holds a voxel of any lesion
                self.lesions.append(absent_lesion(truth.case_id, key))
                continue
            predicted_DHW, true_DHW = predicted.mask(key, shape), true.mask(key, shape)
            score = score_lesion(
                truth.case_id, key, predicted_DHW, true_DHW, spacing, predicted.probabilities.get(key)
            )
            self.lesions.append(score)
            if self._keeps_picture(score):
                if scan is None and truth.load_scan is not None:
                    scan = to_canonical(truth.load_scan())
                hu_DHW = scan.voxels_DHW if scan is not None and scan.shape_DHW == shape else None
                self._keep_picture(score, predicted_DHW, true_DHW, spacing, hu_DHW)

    def _keeps_picture(self, score: LesionScore) -> bool:
        if np.isnan(score.record.dice) or score.record.dice >= 1:
            return False
        kept = [item.badness for item in self.key_slices if item.lesion == score.lesion]
        return len(kept) < self.key_slices_per_lesion or (bool(kept) and score.badness > min(kept))

    def _keep_picture(
        self,
        score: LesionScore,
        predicted_DHW: NDArray[np.bool_],
        true_DHW: NDArray[np.bool_],
        spacing_mm: tuple[float, float, float],
        hu_DHW: NDArray[Any] | None,
    ) -> None:
        wrong_D = np.count_nonzero(predicted_DHW ^ true_DHW, axis=(1, 2))
        index = int(np.argmax(wrong_D))
        self.key_slices.append(
            KeySlice(
                score.case_id,
                score.lesion,
                score.record.dice,
                score.badness,
                index,
                len(wrong_D),
                spacing_mm[1:],
                true_DHW[index].copy(),
                predicted_DHW[index].copy(),
                None if hu_DHW is None else np.array(hu_DHW[index]),
            )
        )
        self.key_slices.sort(key=lambda item: item.badness, reverse=True)
        of_lesion = [item for item in self.key_slices if item.lesion == score.lesion]
        if len(of_lesion) > self.key_slices_per_lesion:
            self.key_slices.remove(of_lesion[-1])


def _loaded(case: CaseFindings, parts: Iterable[str]) -> LesionMasks | None:
    """The masks of one side, where they are compared or stand for boxes that it lacks."""
    needed = "masks" in parts or case.boxes is None
    return case.load_masks() if needed and case.load_masks is not None else None


def _boxes(masks: LesionMasks | None) -> CaseBoxes:
    if masks is None or masks.affine is None:
        return {}
    return {
        key: tuple(boxes_of_mask(mask_DHW, masks.affine, probability_DHW=masks.probabilities.get(key)))
        for key, mask_DHW in masks.masks.items()
    }
