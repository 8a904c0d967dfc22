"""All figures of all three tasks, accumulated batch by batch, on one process or many.

What is kept of a case is small whatever its volume: 18 probabilities and labels, a few numbers a lesion
(`vlm3d.evaluation.localization.MaskRecord`), its report. Formulas stand in ``classification``, ``localization`` and
``report`` beside this file. A figure that the data do not define is NaN and left out of means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from vlm3d.evaluation.calibration import brier_score, expected_calibration_error
from vlm3d.evaluation.classification import (
    auroc,
    average_precision,
    classification_figures,
    crg,
    mean_of_known,
)
from vlm3d.evaluation.localization import MaskRecord, localization_figures, mask_record
from vlm3d.evaluation.ranking import Floats
from vlm3d.evaluation.report import Reading, report_scores
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

__all__ = ["MultiTaskMetrics", "auroc", "average_precision", "crg"]


@dataclass
class _Rows:
    """What is kept, with the case id of each entry or None where none was given."""

    scores: list[tuple[str | None, Floats, Floats]] = field(default_factory=list)
    masks: dict[str, list[tuple[str | None, MaskRecord]]] = field(default_factory=dict)
    reports: list[tuple[str | None, str, str]] = field(default_factory=list)

    def lists(self) -> dict[str, list[Any]]:
        """Every list by what it holds, to walk over all alike."""
        found: dict[str, list[Any]] = {"probabilities": self.scores, "reports": self.reports}
        for key, rows in self.masks.items():
            found[f"masks of {key}"] = rows
        return found


class MultiTaskMetrics:
    """Accumulates predictions and labels, then computes all figures.

    Args:
        threshold: Probability from which a disease is positive; one, or one a disease.
        mask_threshold: Probability from which a voxel is lesion.
        disease_names: In the order of the columns.
        lesion_keys: In the order of the masks.
        report_reading: ``"official"`` or ``"words"``, see `vlm3d.evaluation.report`.
    """

    def __init__(
        self,
        threshold: float | Sequence[float] | Floats = 0.5,
        mask_threshold: float = 0.5,
        disease_names: Sequence[str] = DISEASE_NAMES,
        lesion_keys: Sequence[str] = LESION_KEYS,
        report_reading: Reading = "official",
    ) -> None:
        self.threshold = threshold
        self.mask_threshold = mask_threshold
        self.disease_names = tuple(disease_names)
        self.lesion_keys = tuple(lesion_keys)
        self.report_reading = report_reading
        self.reset()

    def reset(self) -> None:
        """Forget all cases."""
        self._rows = _Rows(masks={key: [] for key in self.lesion_keys})
        self._seen: set[tuple[str, str]] = set()

    def update(
        self,
        probabilities_BK: Tensor | None = None,
        labels_BK: Tensor | None = None,
        lesion_probabilities: Mapping[str, Tensor] | None = None,
        lesion_masks: Mapping[str, Tensor] | None = None,
        *,
        spacing_mm: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        reports: Sequence[str] | None = None,
        reference_reports: Sequence[str | None] | None = None,
        case_ids: Sequence[str] | None = None,
    ) -> None:
        """Add a batch; any task may be left out.

        Args:
            probabilities_BK: Disease probabilities.
            labels_BK: 0, 1, or NaN where unknown.
            lesion_probabilities: Lesion key -> (B, D, H, W).
            lesion_masks: Lesion key -> (B, D, H, W); a negative value says that the case is not annotated.
            spacing_mm: Voxel size along (D, H, W), of all cases or of each; without it there are Dice and IoU only.
            reports: Generated texts.
            reference_reports: The radiologist's; None where a case has none.
            case_ids: Of the batch. With them, `gather` counts a case once that several processes saw.

        Raises:
            ValueError: Shapes or names do not fit, a probability is no number, or a case comes twice.
        """
        rows = _Rows()
        if probabilities_BK is not None and labels_BK is not None:
            rows.scores = self._score_rows(probabilities_BK, labels_BK, case_ids)
        for key, truth in (lesion_masks or {}).items():
            if key not in self.lesion_keys or lesion_probabilities is None or key not in lesion_probabilities:
                raise ValueError(
                    f"no predicted mask for the lesion '{key}'; known: {', '.join(self.lesion_keys)}"
                )
            rows.masks[key] = self._mask_rows(key, lesion_probabilities[key], truth, spacing_mm, case_ids)
        if reports is not None and reference_reports is not None:
            if len(reports) != len(reference_reports):
                raise ValueError(
                    f"{len(reports)} generated reports against {len(reference_reports)} references"
                )
            ids = _ids(case_ids, len(reports))
            rows.reports = [
                (case, text, reference)
                for case, text, reference in zip(ids, reports, reference_reports, strict=True)
                if reference is not None
            ]
        self._keep(rows)

    def _keep(self, rows: _Rows) -> None:
        """Add rows; nothing of a batch with a case that was there already."""
        new = Counter(
            (kind, row[0]) for kind, added in rows.lists().items() for row in added if row[0] is not None
        )
        twice = sorted(
            {case for (kind, case), times in new.items() if times > 1 or (kind, case) in self._seen}
        )
        if twice:
            raise ValueError(f"cases come twice: {', '.join(twice[:5])}; every case counts once")
        self._seen.update(new)
        self._rows.scores += rows.scores
        self._rows.reports += rows.reports
        for key, added in rows.masks.items():
            self._rows.masks[key] += added

    def _score_rows(
        self, probabilities_BK: Tensor, labels_BK: Tensor, case_ids: Sequence[str] | None
    ) -> list[tuple[str | None, Floats, Floats]]:
        expected = (len(labels_BK), len(self.disease_names))
        if tuple(probabilities_BK.shape) != expected or tuple(labels_BK.shape) != expected:
            raise ValueError(
                f"probabilities and labels are {expected}, got {tuple(probabilities_BK.shape)} and "
                f"{tuple(labels_BK.shape)}"
            )
        probabilities = probabilities_BK.detach().double().cpu().numpy()
        labels = labels_BK.detach().double().cpu().numpy()
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("a probability is NaN or outside 0 to 1")
        return list(zip(_ids(case_ids, len(labels)), probabilities, labels, strict=True))

    def _mask_rows(
        self,
        key: str,
        probabilities_BDHW: Tensor,
        truth_BDHW: Tensor,
        spacing_mm: Sequence[float] | Sequence[Sequence[float]] | Tensor | None,
        case_ids: Sequence[str] | None,
    ) -> list[tuple[str | None, MaskRecord]]:
        if probabilities_BDHW.shape != truth_BDHW.shape:
            raise ValueError(
                f"{key}: masks of {tuple(probabilities_BDHW.shape)} against {tuple(truth_BDHW.shape)}"
            )
        batch = len(truth_BDHW)
        spacing_B3 = (
            None if spacing_mm is None else np.broadcast_to(np.asarray(spacing_mm, float), (batch, 3))
        )
        rows = []
        for b, case in enumerate(_ids(case_ids, batch)):
            truth = truth_BDHW[b].detach().cpu()
            if int(truth.min()) < 0:
                continue
            probability = probabilities_BDHW[b].detach().float().cpu()
            record = mask_record(
                (probability >= self.mask_threshold).numpy(),
                (truth > 0).numpy(),
                None if spacing_B3 is None else tuple(spacing_B3[b].tolist()),
                probability.numpy(),
            )
            rows.append((case, record))
        return rows

    def gather(self) -> MultiTaskMetrics:
        """Metrics over the cases of all processes; every process must call it and gets the same.

        A case that several processes saw (a sampler fills up the last batch) counts once if its id was given. Without
        `torch.distributed` this is a copy.
        """
        everyone: list[_Rows | None] = [self._rows]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, self._rows)
        whole = MultiTaskMetrics(
            self.threshold, self.mask_threshold, self.disease_names, self.lesion_keys, self.report_reading
        )
        for rows in everyone:
            assert rows is not None
            fresh = {
                kind: [row for row in added if row[0] is None or (kind, row[0]) not in whole._seen]
                for kind, added in rows.lists().items()
            }
            masks = {key: fresh[f"masks of {key}"] for key in rows.masks}
            whole._keep(_Rows(fresh["probabilities"], masks, fresh["reports"]))
        return whole

    def compute(self) -> dict[str, Any]:
        """All figures of the tasks that have cases.

        Returns:
            ``classification``: as `vlm3d.evaluation.classification.classification_figures`, with ``ece`` and ``brier``
            beside the other figures of each disease and of ``macro``. ``localization``: as
            `vlm3d.evaluation.localization.localization_figures`. ``reports``: as `vlm3d.evaluation.report.ReportScores`,
            with ``cases`` and ``reading``.
        """
        result: dict[str, Any] = {}
        if self._rows.scores:
            result["classification"] = self._classification()
        if any(self._rows.masks.values()):
            result["localization"] = localization_figures(
                {key: [record for _, record in rows] for key, rows in self._rows.masks.items()}
            )
        if self._rows.reports:
            _, predicted, truth = zip(*self._rows.reports, strict=True)
            scores = report_scores(predicted, truth, self.report_reading)
            result["reports"] = scores.figures | {"cases": len(truth), "reading": scores.reading}
        return result

    def _classification(self) -> dict[str, Any]:
        probability_NK = np.stack([probability for _, probability, _ in self._rows.scores])
        label_NK = np.stack([label for _, _, label in self._rows.scores])
        figures = classification_figures(probability_NK, label_NK, self.disease_names, self.threshold)
        for name, values_K in (
            ("ece", expected_calibration_error(probability_NK, label_NK)),
            ("brier", brier_score(probability_NK, label_NK)),
        ):
            for disease, value in zip(self.disease_names, values_K, strict=True):
                figures["per_disease"][disease][name] = float(value)
            figures["macro"][name] = float(mean_of_known(values_K))
        return figures


def _ids(case_ids: Sequence[str] | None, batch: int) -> Sequence[str | None]:
    if case_ids is None:
        return [None] * batch
    if len(case_ids) != batch:
        raise ValueError(f"{len(case_ids)} case ids for a batch of {batch}")
    return case_ids
