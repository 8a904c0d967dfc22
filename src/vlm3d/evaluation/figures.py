"""The figures of an evaluation, part by part, each figure with its interval where intervals are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm3d.evaluation.bootstrap import (
    Resampled,
    bootstrap_classification,
    interval,
    resample_means,
)
from vlm3d.evaluation.boxes import box_figures
from vlm3d.evaluation.calibration import brier_score, expected_calibration_error
from vlm3d.evaluation.classification import classification_figures, mean_of_known
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.lesion_scores import LESION_FIGURES
from vlm3d.evaluation.localization import lesion_figures, nanmean
from vlm3d.evaluation.ranking import Bools, Floats
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.checkpoint import DEFAULT_THRESHOLD, StoredThresholds, threshold_of


@dataclass(frozen=True)
class Thresholds:
    """Where each disease's probability is cut.

    Attributes:
        value_K: Probability from which a disease is positive.
        source: Where they come from, in words.
    """

    value_K: Floats
    source: str

    @classmethod
    def fixed(cls, threshold: float) -> Thresholds:
        """One for all diseases."""
        return cls(np.full(len(DISEASE_NAMES), threshold), f"{threshold:g} for every disease")

    @classmethod
    def stored(cls, thresholds: StoredThresholds | None) -> Thresholds:
        """Those that lie beside a checkpoint; 0.5 where none do."""
        if thresholds is None:
            return cls.fixed(DEFAULT_THRESHOLD)
        values = np.array([threshold_of(name, thresholds) for name in DISEASE_NAMES])
        return cls(values, f"stored with the checkpoint: {thresholds.source}")

    def as_json(self) -> dict[str, Any]:
        """By disease, with their source."""
        values = dict(zip(DISEASE_NAMES, self.value_K.tolist(), strict=True))
        return {"source": self.source, "values": values}


# --- classification ----------------------------------------------------------------------------------------------


def resampled_classification(
    cases: CollectedCases, thresholds: Thresholds, intervals: Intervals, keep_N: Bools | None = None
) -> Resampled | None:
    """Every classification figure of the labeled cases, or of those to keep, and of resamples; None without a case."""
    keep_N = cases.labeled_N if keep_N is None else keep_N
    if not keep_N.any():
        return None
    return bootstrap_classification(
        cases.probability_NK[keep_N],
        cases.label_NK[keep_N],
        DISEASE_NAMES,
        threshold=thresholds.value_K,
        patient_ids=[patient for patient, keep in zip(cases.patient_ids, keep_N, strict=True) if keep],
        resamples=max(1, intervals.resamples),
        seed=intervals.seed,
    )


def classification_section(
    cases: CollectedCases, thresholds: Thresholds, intervals: Intervals, drawn: Resampled
) -> dict[str, Any]:
    """Per disease, macro, micro, CRG; with calibration, counts and thresholds a disease."""
    labeled = cases.labeled_N
    probability_NK, label_NK = cases.probability_NK[labeled], cases.label_NK[labeled]
    plain = classification_figures(probability_NK, label_NK, DISEASE_NAMES, thresholds.value_K)
    section = drawn.intervals(intervals.level) if intervals.resamples else plain
    in_unit = bool(((probability_NK >= 0) & (probability_NK <= 1)).all())
    ece_K = (
        expected_calibration_error(probability_NK, label_NK)
        if in_unit
        else np.full(len(DISEASE_NAMES), np.nan)
    )
    brier_K = brier_score(probability_NK, label_NK)
    per_disease = {}
    for k, name in enumerate(DISEASE_NAMES):
        per_disease[name] = {
            **section["per_disease"][name],
            "ece": float(ece_K[k]),
            "brier": float(brier_K[k]),
            "threshold": float(thresholds.value_K[k]),
            "cases": int(plain["per_disease"][name]["cases"]),
            "positives": int(plain["per_disease"][name]["positives"]),
        }
    return {
        "cases": int(labeled.sum()),
        "per_disease": per_disease,
        "macro": {
            **section["macro"],
            "ece": float(mean_of_known(ece_K)),
            "brier": float(mean_of_known(brier_K)),
        },
        "micro": section["micro"],
        "crg": section["crg"],
    }


# --- localization ------------------------------------------------------------------------------------------------


def localization_section(cases: CollectedCases, intervals: Intervals) -> dict[str, Any]:
    """Means over cases with the lesion in truth or prediction, and figures of single lesions: per lesion and macro.

    Macro figures are means over the lesions that the system draws; ``not_drawn`` names the others that a case has.
    """
    per_lesion: dict[str, Any] = {}
    for key in (key for key in LESION_KEYS if any(score.lesion == key for score in cases.lesions)):
        scores = [score for score in cases.lesions if score.lesion == key]
        value_NM = np.array([list(score.figures.values()) for score in scores])
        patients = cases.patients_of([score.case_id for score in scores])
        true, predicted = (
            np.array([getattr(s.record, name) for s in scores]) for name in ("true", "predicted")
        )
        overlaps = [score.record.lesions for score in scores if score.record.lesions is not None]
        per_lesion[key] = {
            **_means(value_NM, LESION_FIGURES, patients, intervals),
            "cases": len(scores),
            "with_lesion": int((true > 0).sum()),
            "missed": int(((true > 0) & (predicted == 0)).sum()),
            "invented": int(((true == 0) & (predicted > 0)).sum()),
            "single_lesions": lesion_figures(overlaps),
        }
    macro = {name: nanmean([_value(found[name]) for found in per_lesion.values()]) for name in LESION_FIGURES}
    return {
        "per_lesion": per_lesion,
        "not_drawn": sorted(cases.not_drawn),
        "macro": {
            **macro,
            "single_lesions": {
                name: nanmean([found["single_lesions"][name] for found in per_lesion.values()])
                for name in ("sensitivity", "precision", "ap50")
            },
        },
    }


def box_section(cases: CollectedCases) -> dict[str, Any]:
    """The challenge's figures of boxes."""
    found = box_figures(
        {case_id: predicted for case_id, (predicted, _) in cases.boxes.items()},
        {case_id: true for case_id, (_, true) in cases.boxes.items()},
        {key: key for key in LESION_KEYS},
    )
    return {
        "cases": len(cases.boxes),
        "per_lesion": {
            key: {
                "iou": found["iou"]["per_pathology"][key],
                "distance_mm": found["distance"]["per_pathology"][key],
            }
            for key in LESION_KEYS
        },
        "macro": {"iou": found["iou"]["macro"], "distance_mm": found["distance"]["macro"]},
        "froc": found["froc"],
    }


def _means(
    value_NM: Floats, names: Sequence[str], patients: Sequence[str], intervals: Intervals
) -> dict[str, Any]:
    mean_M = mean_of_known(value_NM.T)
    if not intervals.resamples:
        return dict(zip(names, mean_M.tolist(), strict=True))
    drawn_RM = resample_means(
        value_NM, patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed
    )
    return {name: interval(mean_M[m], drawn_RM[:, m], intervals.level) for m, name in enumerate(names)}


def _value(figure: Any) -> float:
    return float(getattr(figure, "value", figure))
