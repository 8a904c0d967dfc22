"""A trained row over held-out scans, by the project's own evaluation."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from related_work_row import Row
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.evaluation.case_findings import CaseFindings, LesionMasks
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.evaluator import EvaluationSettings, evaluated
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.store_truth import masks_in, truth_of
from vlm3d.labels import LESION_KEYS
from vlm3d.preprocessing.intensity import window_in_place

logger = logging.getLogger(__name__)

THRESHOLD = 0.5


@dataclass(frozen=True)
class Scored:
    """How good a row is, and how fast.

    Attributes:
        figures: As `vlm3d.evaluation.evaluator.evaluated` gives them.
        seconds_a_scan: Median wall clock of a prediction, reading not counted.
    """

    figures: dict[str, Any]
    seconds_a_scan: float


@torch.inference_mode()
def score_row(
    row: Row,
    dataset: PreparedDataset,
    indices: Sequence[int],
    hu_window: tuple[float, float],
    settings: EvaluationSettings | None = None,
) -> Scored:
    """Predict and score cases one by one; regions are offered to every row, whether it looks at them or not.

    Args:
        row: Put into evaluation mode.
        dataset: The held-out split.
        indices: Of its cases.
        hu_window: HU that map to -1 and 1.
        settings: How figures are computed.
    """
    row.eval()
    settings = settings or EvaluationSettings()
    cases, seconds = CollectedCases(), []
    for done, index in enumerate(indices, start=1):
        case, arrays = dataset.cases[index], dataset.read(index)
        affine = np.array(case.affine)
        intensity = torch.from_numpy(window_in_place(arrays.hu_DHW.astype(np.float32), hu_window))[None, None]
        regions = torch.from_numpy(arrays.regions_DHW)[None] if case.regions_method is not None else None
        start = time.perf_counter()
        found = row.predict(intensity, regions)
        seconds.append(time.perf_counter() - start)
        scores_K = None if found.probability_K is None else found.probability_K.double().numpy()
        drawn = None
        if found.mask_probability_LDHW is not None and case.known_lesions:
            probabilities = dict(zip(LESION_KEYS, found.mask_probability_LDHW.float().numpy(), strict=True))
            masks = {key: value_DHW >= THRESHOLD for key, value_DHW in probabilities.items()}
            drawn = LesionMasks(masks, affine, probabilities=probabilities)
        predicted = CaseFindings(
            case.case_id,
            case.patient_id,
            scores_K,
            load_masks=None if drawn is None else (lambda drawn=drawn: drawn),
        )
        true_masks = masks_in(arrays, case) if case.known_lesions else None
        true = replace(
            truth_of(dataset, index),
            load_masks=None if true_masks is None else (lambda masks=true_masks: masks),
        )
        cases.add(predicted, true, ("labels", "masks"), LESION_KEYS)
        if done % 10 == 0:
            logger.info("scored %d of %d", done, len(indices))
    found_figures = evaluated(
        cases,
        settings,
        Thresholds.fixed(settings.threshold),
        predictions=type(row).__name__,
        truth=dataset.store.name,
    ).figures
    return Scored(found_figures, float(np.median(seconds)))
