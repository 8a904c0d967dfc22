"""Writers that are given the labels of a study and nothing else, and the check that holds a text against the labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from real_language.studies import Case, Study
from vlm3d.datasets.synthetic_reports import write_synthetic_report
from vlm3d.inference.consistency import repair_report
from vlm3d.inference.prediction import DiseaseFinding
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.report_sections import parse_report


class Writer(Protocol):
    """Whatever turns labels into reports."""

    def write(self, cases: Sequence[Case]) -> list[str]:
        """One text a case, without headings."""
        ...


class TemplateWriter:
    """Findings and impression of the synthetic reports; what is not there is denied now and then, as there."""

    def write(self, cases: Sequence[Case]) -> list[str]:
        """One text a case."""
        texts = []
        for case in cases:
            report = write_synthetic_report(case.case_id, [float(label) for label in case.labels_K], {})
            assert report is not None, "18 known labels are something to tell of"
            texts.append(f"{report.findings} {report.impression}")
        return texts


class NearestWriter:
    """The report of the training study that shares most labels; of several, the first of the training studies."""

    def __init__(self, training: Sequence[Study]) -> None:
        self._texts = [study.text for study in training]
        self._label_TK = np.array([study.case.labels_K for study in training], dtype=bool)

    def write(self, cases: Sequence[Case]) -> list[str]:
        """One text a case, word for word that of a training study."""
        return [self._texts[self.nearest(case)] for case in cases]

    def nearest(self, case: Case) -> int:
        """Index of the training study whose labels differ least."""
        return int(self._differing_T(case).argmin())

    def differing(self, case: Case) -> int:
        """How many of the 18 labels the nearest training study does not share."""
        return int(self._differing_T(case).min())

    def _differing_T(self, case: Case) -> NDArray[np.int_]:
        counts_T: NDArray[np.int_] = (self._label_TK != np.array(case.labels_K)).sum(axis=1)
        return counts_T


class Checked(NamedTuple):
    """A text after the check.

    Attributes:
        text: Without headings.
        removed: Sentences that contradicted a label.
        added: Sentences that were added.
    """

    text: str
    removed: int
    added: int


def check_against_labels(text: str, case: Case) -> Checked:
    """Take out the sentences that contradict the labels, and add a plain sentence for each finding that is left out.

    The package does the same to a report that contradicts the model's own heads; here the labels stand in their place.
    """
    repaired, edits = repair_report(text, findings_of(case), ())
    removed = sum(edit.action == "removed" for edit in edits)
    return Checked(without_headings(repaired), removed, len(edits) - removed)


def findings_of(case: Case) -> list[DiseaseFinding]:
    """The labels in the form in which the classifier tells its findings."""
    return [
        DiseaseFinding(name=name, probability=float(label), threshold=0.5, positive=label, uncertainty=0.0)
        for name, label in zip(DISEASE_NAMES, case.labels_K, strict=True)
    ]


def without_headings(text: str) -> str:
    """Findings, impression and recommendations in one run, as the real reports are."""
    return " ".join(part for part in parse_report(text) if part)
