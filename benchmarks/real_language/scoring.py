"""What a row's texts are worth, as JSON, and rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from real_language.studies import Study
from vlm3d.evaluation.bootstrap import bootstrap_classification
from vlm3d.evaluation.case_ids import patient_id_of
from vlm3d.evaluation.intervals import as_json
from vlm3d.evaluation.labeler import label_reports
from vlm3d.evaluation.report import report_scores
from vlm3d.evaluation.word_alignment import METEOR_NAME
from vlm3d.labels import DISEASE_NAMES

TEXT_COLUMNS = {
    "BLEU_1": "BLEU-1",
    "BLEU_2": "BLEU-2",
    "BLEU_3": "BLEU-3",
    "BLEU_4": "BLEU-4",
    "ROUGE_L": "ROUGE-L",
    METEOR_NAME: "METEOR (exact, stem)",
    "CIDEr": "CIDEr",
}
"""Figure of `vlm3d.evaluation.report` -> heading."""

RESAMPLES = 1000


def score(texts: Sequence[str], studies: Sequence[Study], *, is_truth: bool = False) -> dict[str, Any]:
    """Clinical and text figures of one text a study.

    Args:
        texts: What a writer wrote, in the order of the studies.
        studies: With the true labels and reports.
        is_truth: The texts are the true reports, whose words are not compared with themselves.
    """
    label_NK = np.array([study.case.labels_K for study in studies], dtype=np.float64)
    clinical = bootstrap_classification(
        label_reports(texts).astype(np.float64),
        label_NK,
        DISEASE_NAMES,
        patient_ids=[patient_id_of(study.case.case_id) for study in studies],
        resamples=RESAMPLES,
    ).intervals()
    figures: dict[str, Any] = {
        "clinical_macro_f1": clinical["macro"]["f1"],
        "clinical_micro_f1": clinical["micro"]["f1"],
        "crg": clinical["crg"],
        "f1_per_disease": {name: clinical["per_disease"][name]["f1"].value for name in DISEASE_NAMES},
        "mean_words": float(np.mean([len(text.split()) for text in texts])),
    }
    if not is_truth:
        scores = report_scores(texts, [study.text for study in studies])
        figures |= {"reading": scores.reading, **scores.figures}
    return {name: _rounded(value) for name, value in as_json(figures).items()}


def _rounded(value: Any) -> Any:
    """Six digits behind the point, in objects too."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the rows, in their order."""
    headings = (
        "writer",
        "clinical macro F1 [95 %]",
        *TEXT_COLUMNS.values(),
        "mean words",
        "seconds trained",
        "seconds written",
    )
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    f1 = row["clinical_macro_f1"]
    return [
        row["title"],
        f"{f1['value']:.3f} [{f1['low']:.3f}, {f1['high']:.3f}]",
        *(_number(row.get(name), 3) for name in TEXT_COLUMNS),
        _number(row["mean_words"], 0),
        _number(row.get("seconds_trained"), 0),
        _number(row.get("seconds_written"), 1),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
