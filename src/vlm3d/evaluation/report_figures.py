"""Figures of reports: their words against the true report's, and the findings that a labeler reads from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm3d.evaluation.bootstrap import bootstrap_classification, interval, resample_means
from vlm3d.evaluation.classification import classification_figures
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.labeler import ReportLabeler
from vlm3d.evaluation.ranking import Floats
from vlm3d.evaluation.report import Reading, report_scores
from vlm3d.labels import DISEASE_NAMES

READINGS: tuple[Reading, ...] = ("official", "words")

CLINICAL_FIGURES = ("f1", "precision", "recall", "accuracy")
"""Of findings that a text has or has not: there is no probability to rank by."""


def report_section(
    cases: CollectedCases,
    intervals: Intervals,
    labeler: ReportLabeler,
    *,
    with_bert_score: bool = False,
) -> dict[str, Any]:
    """Text figures in both readings over the reports that were written, and clinical figures over all.

    A report that was not written has no words to compare, as in the challenge, and no finding.
    """
    pairs = cases.reports
    written = [pair for pair in pairs if pair.predicted is not None]
    section: dict[str, Any] = {"cases": len(pairs), "missing": len(pairs) - len(written)}
    if written:
        patients = cases.patients_of([pair.case_id for pair in written])
        for reading in READINGS:
            section[reading] = _text_figures(
                [pair.predicted or "" for pair in written],
                [pair.truth for pair in written],
                reading,
                patients,
                intervals,
            )
        if with_bert_score:
            section["meaning"] = _bert_figures(
                [pair.predicted or "" for pair in written],
                [pair.truth for pair in written],
                patients,
                intervals,
            )
    predicted_NK, truth_NK, given = report_findings(cases, labeler)
    section["clinical"] = {
        "labeler": labeler.name,
        "truth": "labels that were given" if given else f"read from the true reports by {labeler.name}",
        **_clinical(predicted_NK, truth_NK, cases.patients_of([pair.case_id for pair in pairs]), intervals),
    }
    return section


def report_findings(cases: CollectedCases, labeler: ReportLabeler) -> tuple[Floats, Floats, bool]:
    """Findings of the generated and of the true reports.

    Returns:
        (N, K) of 0 and 1 read from the generated reports; (N, K) true labels, NaN where unknown; whether these were given.
        Where no case of them has labels, they are read from the true reports.
    """
    read = labeler.label_reports
    pairs = cases.reports
    predicted_NK = np.asarray(read([pair.predicted or "" for pair in pairs]), dtype=np.float64)
    predicted_NK[[pair.predicted is None for pair in pairs]] = 0.0
    row_of = dict(zip(cases.case_ids, cases.label_NK, strict=True))
    given_NK = np.array([row_of[pair.case_id] for pair in pairs])
    if not np.isnan(given_NK).all():
        return predicted_NK, given_NK, True
    return predicted_NK, np.asarray(read([pair.truth for pair in pairs]), dtype=np.float64), False


def _text_figures(
    predicted: Sequence[str],
    truth: Sequence[str],
    reading: Reading,
    patients: Sequence[str],
    intervals: Intervals,
) -> dict[str, Any]:
    scores = report_scores(predicted, truth, reading)
    if not intervals.resamples:
        return dict(scores.figures)
    drawn = scores.resampled(patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed)
    return {name: interval(value, drawn[name], intervals.level) for name, value in scores.figures.items()}


def _bert_figures(
    predicted: Sequence[str], truth: Sequence[str], patients: Sequence[str], intervals: Intervals
) -> dict[str, Any]:
    """BERTScore with the name of its encoder."""
    from vlm3d.evaluation.bert_score import bert_score

    scores = bert_score(predicted, truth)
    value_NM = np.stack([scores.precision_N, scores.recall_N, scores.f1_N], axis=1)
    names = ("precision", "recall", "f1")
    figures: dict[str, Any] = dict(zip(names, value_NM.mean(axis=0).tolist(), strict=True))
    if intervals.resamples:
        drawn_RM = resample_means(
            value_NM, patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed
        )
        figures = {
            name: interval(figures[name], drawn_RM[:, m], intervals.level) for m, name in enumerate(names)
        }
    return {"encoder": scores.encoder, **figures}


def _clinical(
    predicted_NK: Floats, truth_NK: Floats, patients: Sequence[str], intervals: Intervals
) -> dict[str, Any]:
    plain = classification_figures(predicted_NK, truth_NK, DISEASE_NAMES)
    section = plain
    if intervals.resamples:
        section = bootstrap_classification(
            predicted_NK,
            truth_NK,
            DISEASE_NAMES,
            patient_ids=patients,
            resamples=intervals.resamples,
            seed=intervals.seed,
        ).intervals(intervals.level)
    return {
        "per_disease": {
            disease: {
                **{name: section["per_disease"][disease][name] for name in CLINICAL_FIGURES},
                "cases": int(counts["cases"]),
                "positives": int(counts["positives"]),
            }
            for disease, counts in plain["per_disease"].items()
        },
        "macro": {name: section["macro"][name] for name in CLINICAL_FIGURES},
        "micro": {name: section["micro"][name] for name in CLINICAL_FIGURES},
        "crg": section["crg"],
    }
