"""Where a system errs: curves, confusions, the worst cases, labels that may be wrong, reports side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.collected import CollectedCases, ReportPair
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.labeler import ReportLabels, label_report
from vlm3d.evaluation.ranking import Bools, Floats
from vlm3d.labels import DISEASE_NAMES

MOST_POINTS = 160
CONFIDENT = 0.8
"""From which distance of probability and label a disagreement is confident."""


# --- curves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A curve in the unit square, thinned so that it can be drawn.

    Attributes:
        x: Rising.
        y: At each x.
        at: The point of the threshold in use.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    at: tuple[float, float]


def roc_curve(score_N: Floats, truth_N: Bools, threshold: float) -> Curve | None:
    """Sensitivity against false positive rate; None if there is one class only."""
    positives, negatives = int(truth_N.sum()), int((~truth_N).sum())
    if not positives or not negatives:
        return None
    hits, called = _cumulative(score_N, truth_N)
    x, y = (called - hits) / negatives, hits / positives
    chosen = score_N >= threshold
    at = (float((chosen & ~truth_N).sum() / negatives), float((chosen & truth_N).sum() / positives))
    return Curve(*_thinned(np.r_[0.0, x], np.r_[0.0, y]), at)


def pr_curve(score_N: Floats, truth_N: Bools, threshold: float) -> Curve | None:
    """Precision against recall; None without positives."""
    positives = int(truth_N.sum())
    if not positives:
        return None
    hits, called = _cumulative(score_N, truth_N)
    chosen = score_N >= threshold
    precision = float((chosen & truth_N).sum() / chosen.sum()) if chosen.any() else 0.0
    at = (float((chosen & truth_N).sum() / positives), precision)
    recall, precisions = hits / positives, hits / called
    return Curve(*_thinned(np.r_[0.0, recall], np.r_[precisions[0], precisions]), at)


def _cumulative(score_N: Floats, truth_N: Bools) -> tuple[Floats, Floats]:
    """Hits and calls from the highest score down, one entry a distinct score."""
    order = np.argsort(-score_N, kind="stable")
    last_of_tie = np.r_[np.diff(score_N[order]) != 0, True]
    hits = np.cumsum(truth_N[order])[last_of_tie].astype(np.float64)
    return hits, (np.flatnonzero(last_of_tie) + 1).astype(np.float64)


def _thinned(x: Floats, y: Floats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if len(x) > MOST_POINTS:
        length = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
        kept = np.searchsorted(length, np.linspace(0, length[-1], MOST_POINTS)).clip(0, len(x) - 1)
        kept = np.unique(np.r_[0, kept, len(x) - 1])
        x, y = x[kept], y[kept]
    return tuple(np.round(x, 4).tolist()), tuple(np.round(y, 4).tolist())


# --- what is confused with what ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """Calls against labels, over known labels.

    Attributes:
        counts_K4: True positives, false positives, false negatives and true negatives of each disease.
        missed_with_invented_KK: Cases in which the row's disease was missed and the column's called without being there.
        together_KK: Cases with an error, of either kind, in both diseases; on the diagonal all errors of a disease.
    """

    counts_K4: NDArray[np.int64]
    missed_with_invented_KK: NDArray[np.int64]
    together_KK: NDArray[np.int64]


def confusion(cases: CollectedCases, thresholds: Thresholds) -> Confusion:
    """Count errors and which come together."""
    called, truth, known = _calls(cases, thresholds)
    missed, invented = (known & truth & ~called).astype(np.int64), (known & ~truth & called).astype(np.int64)
    wrong = missed + invented
    hits, right = (known & truth & called).sum(axis=0), (known & ~truth & ~called).sum(axis=0)
    counts = np.stack([hits, invented.sum(axis=0), missed.sum(axis=0), right], axis=1)
    return Confusion(counts.astype(np.int64), missed.T @ invented, wrong.T @ wrong)


def _calls(cases: CollectedCases, thresholds: Thresholds) -> tuple[Bools, Bools, Bools]:
    label_NK, probability_NK = cases.label_NK, cases.probability_NK
    known = ~np.isnan(label_NK) & ~np.isnan(probability_NK)
    with np.errstate(invalid="ignore"):
        return probability_NK >= thresholds.value_K, label_NK == 1, known


# --- single cases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongCall:
    """One wrong disease of a case, with its probability."""

    disease: str
    probability: float


@dataclass(frozen=True)
class WorstCase:
    """A case with many or sure errors.

    Attributes:
        case_id: Whose.
        loss: Mean log loss over its known labels.
        missed: Diseases that are there and were not called, the surest error first.
        invented: Diseases that were called and are not there, the surest error first.
    """

    case_id: str
    loss: float
    missed: tuple[WrongCall, ...]
    invented: tuple[WrongCall, ...]


def worst_cases(cases: CollectedCases, thresholds: Thresholds, at_most: int = 15) -> list[WorstCase]:
    """Cases with errors, by falling log loss."""
    called, truth, known = _calls(cases, thresholds)
    p = np.clip(np.nan_to_num(cases.probability_NK, nan=0.5), 1e-6, 1 - 1e-6)
    loss_NK = np.where(known, -np.log(np.where(truth, p, 1 - p)), 0.0)
    loss_N = loss_NK.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    wrong = known & (called != truth)
    found: list[WorstCase] = []
    for n in np.argsort(-loss_N, kind="stable"):
        if len(found) == at_most:
            break
        if wrong[n].any():
            kinds: list[tuple[WrongCall, ...]] = []
            for there in (True, False):
                places = np.flatnonzero(wrong[n] & (truth[n] == there))
                places = places[np.argsort(-loss_NK[n, places], kind="stable")]
                kinds.append(
                    tuple(WrongCall(DISEASE_NAMES[k], float(cases.probability_NK[n, k])) for k in places)
                )
            found.append(WorstCase(cases.case_ids[n], float(loss_N[n]), kinds[0], kinds[1]))
    return found


@dataclass(frozen=True)
class NoiseSuspect:
    """A label that may be wrong.

    Attributes:
        case_id: Whose.
        disease: Of the label.
        label: As given.
        probability: The system's, or None without one.
        report_says: What the labeler reads from the true report, or None without one.
        sentence: The sentence that it reads that from; empty where the report does not name the disease.
    """

    case_id: str
    disease: str
    label: bool
    probability: float | None
    report_says: bool | None
    sentence: str

    @property
    def witnesses(self) -> int:
        """How many speak against the label: a confident system and the true report; none where the report supports it."""
        if self.report_says == self.label:
            return 0
        of_system = self.probability is not None and abs(self.probability - self.label) >= CONFIDENT
        return int(of_system) + int(self.report_says is not None)


def noise_suspects(cases: CollectedCases, at_most: int = 30) -> list[NoiseSuspect]:
    """Labels that the true report contradicts, or a confident system where no report supports them; the worst first."""
    report_of = {pair.case_id: pair.truth for pair in cases.reports}
    probability_NK, label_NK = cases.probability_NK, cases.label_NK
    suspects = []
    for n, case_id in enumerate(cases.case_ids):
        read = label_report(report_of[case_id]) if case_id in report_of else None
        for k, disease in enumerate(DISEASE_NAMES):
            if np.isnan(label_NK[n, k]):
                continue
            p = None if np.isnan(probability_NK[n, k]) else float(probability_NK[n, k])
            says = None if read is None else read.labels_K[k]
            evidence = None if read is None else read.evidence.get(disease)
            suspect = NoiseSuspect(
                case_id, disease, bool(label_NK[n, k]), p, says, evidence.sentence if evidence else ""
            )
            if suspect.witnesses:
                suspects.append(suspect)
    suspects.sort(key=lambda s: (-s.witnesses, -abs((s.probability or 0.0) - s.label)))
    return suspects[:at_most]


# --- reports -------------------------------------------------------------------------------------------------------

DiffKind = Literal["same", "missing", "added"]


@dataclass(frozen=True)
class ReportDiff:
    """A generated report beside the true one.

    Attributes:
        case_id: Whose.
        parts: Runs of words that both have, that only the true report has (missing) or only the generated one (added).
        missed: Findings of the true report that the generated one lacks, with the true sentence.
        invented: Findings of the generated report alone, with its sentence.
        shared: Findings of both.
    """

    case_id: str
    parts: tuple[tuple[DiffKind, str], ...]
    missed: tuple[tuple[str, str], ...]
    invented: tuple[tuple[str, str], ...]
    shared: tuple[str, ...]


def report_diffs(cases: CollectedCases, at_most: int = 8) -> list[ReportDiff]:
    """The reports with most missed and invented findings, and how their words differ from the true ones."""
    read = [
        (pair, label_report(pair.predicted), label_report(pair.truth))
        for pair in cases.reports
        if pair.predicted is not None
    ]
    read.sort(key=lambda item: -sum(a != b for a, b in zip(item[1].labels_K, item[2].labels_K, strict=True)))
    return [_diff(pair, predicted, true) for pair, predicted, true in read[:at_most]]


def _diff(pair: ReportPair, predicted: ReportLabels, true: ReportLabels) -> ReportDiff:
    said, there = set(predicted.present), set(true.present)
    return ReportDiff(
        pair.case_id,
        tuple(word_diff(pair.truth, pair.predicted or "")),
        tuple((name, _sentence(true, name)) for name in true.present if name not in said),
        tuple((name, _sentence(predicted, name)) for name in predicted.present if name not in there),
        tuple(name for name in true.present if name in said),
    )


def _sentence(labels: ReportLabels, disease: str) -> str:
    evidence = labels.evidence.get(disease)
    return evidence.sentence.strip() if evidence else ""


def word_diff(truth: str, predicted: str) -> list[tuple[DiffKind, str]]:
    """Two texts as runs of words: same, missing from the second, added by it."""
    words = [re.findall(r"\S+", text) for text in (truth, predicted)]
    plain: list[Sequence[str]] = [[word.lower().strip(".,;:") for word in text] for text in words]
    parts: list[tuple[DiffKind, str]] = []
    matcher = difflib.SequenceMatcher(None, plain[0], plain[1], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            parts.append(("same", " ".join(words[1][k:m])))
        else:
            if j > i:
                parts.append(("missing", " ".join(words[0][i:j])))
            if m > k:
                parts.append(("added", " ".join(words[1][k:m])))
    return parts
