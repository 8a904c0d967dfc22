"""Contradictions of a report with the heads of a model that is evaluated on a prepared store."""

from __future__ import annotations

import numpy as np

from vlm3d.evaluation.case_prediction import HeadFindings
from vlm3d.evaluation.model_evaluation import MendedReport
from vlm3d.inference.consistency import mend_report
from vlm3d.inference.contradictions import check_report
from vlm3d.inference.lesion_record import listed_piece, listed_places
from vlm3d.inference.prediction import DiseaseFinding, LesionFinding, Policy
from vlm3d.inference.uncertainty import entropy_bits
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.volume import Volume


class ReportMender:
    """Holds a report against the findings that it was written from and mends it, as ``vlm3d predict`` does.

    Args:
        model: Whose reports they are.
        policy: ``"flag"`` leaves a report as it is written; ``"repair"`` is that of
            `vlm3d.inference.consistency.mend_report`.
    """

    def __init__(self, model: VLM3DMultiTask, policy: Policy = "repair") -> None:
        self.policy = policy
        self._lesion_names = {lesion.key: lesion.name for lesion in model.lesions}

    def __call__(self, text: str, heads: HeadFindings) -> MendedReport:
        """The report that is handed out, and how often it contradicts its heads before and after."""
        diseases, lesions = diseases_of(heads), self._lesions(heads)
        written = len(check_report(text, diseases, lesions).contradictions)
        if self.policy != "repair":
            return MendedReport(text, written, written)
        mended, _ = mend_report(text, diseases, lesions)
        return MendedReport(mended, len(check_report(mended, diseases, lesions).contradictions), written)

    def _lesions(self, heads: HeadFindings) -> list[LesionFinding]:
        grid = Volume(np.zeros((1, 1, 1), np.int16), heads.affine)  # a piece's center needs the affine alone
        return [
            LesionFinding(
                key=key,
                name=self._lesion_names[key],
                mask_file=None,
                threshold=heads.mask_threshold,
                max_probability=heads.max_probabilities[key],
                uncertainty=float(entropy_bits(np.asarray(heads.max_probabilities[key]))),
                volume_ml=sum(piece.volume_ml for piece in pieces),
                components=[listed_piece(piece, grid) for piece in pieces],
            )
            for key, pieces in heads.pieces.items()
        ]


def diseases_of(heads: HeadFindings) -> list[DiseaseFinding]:
    """The classifier's findings in the form that the checker reads."""
    return [
        DiseaseFinding(
            name=name,
            probability=probability,
            threshold=heads.thresholds[name],
            positive=probability >= heads.thresholds[name],
            uncertainty=float(entropy_bits(np.asarray(probability))),
            places=listed_places(heads.seen.get(name, ())),
        )
        for name, probability in heads.probabilities.items()
    ]
