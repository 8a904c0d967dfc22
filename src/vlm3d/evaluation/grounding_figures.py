"""Whether reports say what their scans show: findings, sides, lobes, form, and agreement with the model's own heads.

The truth must be known beyond the true report's words: labels, and for sides and lobes the findings with their places,
as a phantom's facts hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm3d.evaluation.bootstrap import (
    bootstrap_classification,
    compare_classification,
    interval,
    resample_means,
)
from vlm3d.evaluation.classification import mean_of_known
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.labeler import label_report
from vlm3d.evaluation.location_facts import LocatedFinding, LocationFact, location_facts
from vlm3d.evaluation.ranking import Floats
from vlm3d.evaluation.report import report_scores
from vlm3d.labels import DISEASE_NAMES, IMPLIED
from vlm3d.model.report_sections import form_score

_SIDES: Mapping[str, AbstractSet[str]] = {
    "right": frozenset({"right"}),
    "left": frozenset({"left"}),
    "bilateral": frozenset({"right", "left"}),
}


@dataclass(frozen=True)
class GroundedReport:
    """A written report with what is known of its scan.

    Attributes:
        patient_id: Intervals are drawn over patients.
        text: As it is handed out.
        true_report: The radiologist's, or a phantom's.
        labels_K: True labels, NaN where unknown.
        probabilities_K: The classifier's.
        located: True findings with their places; empty where these are unknown.
        contradictions: Of the text with the model's own heads; None where that was not checked.
        written: What the language model wrote, before anything was mended; None where that is the text.
        contradictions_written: Of that.
    """

    patient_id: str
    text: str
    true_report: str
    labels_K: Floats
    probabilities_K: Floats
    located: Sequence[LocatedFinding] = ()
    contradictions: int | None = None
    written: str | None = None
    contradictions_written: int | None = None

    @property
    def as_written(self) -> GroundedReport:
        """The report as the language model wrote it."""
        return self if self.written is None else replace(self, text=self.written)


@dataclass(frozen=True)
class PlaceCounts:
    """True-positive findings of a report whose side, or lobe, can be judged.

    Attributes:
        right: The report places them rightly and nowhere else.
        judged: All of them; one that the report does not place is among them.
    """

    right: int
    judged: int


def located_findings(facts: Mapping[str, Any]) -> list[LocationFact]:
    """The findings with places that a phantom's facts hold; none where the facts are of another kind."""
    return [
        LocationFact(
            str(item["finding"]), item.get("side"), item.get("region"), item.get("level"), item.get("size_mm")
        )
        for item in facts.get("findings") or ()
        if isinstance(item, Mapping) and "finding" in item
    ]


def place_counts(report: GroundedReport) -> dict[str, PlaceCounts]:
    """How many of the findings that a report tells, and that are there, it places on the right side and in the right lobe.

    A finding is placed rightly if the report tells a place of it and no place where none of it is; it need not tell all
    places of many. Sides are judged of what lies right, left or on both sides, lobes of what lies in lobes of one side:
    of what fills both lungs the truth holds one lobe alone. A finding whose place neither this report nor the true one
    tells is not judged.

    Returns:
        ``side`` and ``lobe``.
    """
    told, usual = location_facts(report.text), location_facts(report.true_report)
    present = _present(report.text)
    sides, lobes = list[bool](), list[bool]()
    for name in dict.fromkeys(item.finding for item in report.located):
        if name not in present:
            continue
        real = [item for item in report.located if item.finding == name]
        own = [fact for fact in told if fact.finding == name]
        others = [fact for fact in usual if fact.finding == name]
        if all(item.side in _SIDES for item in real):
            sides += _judged(_sides(real), _sides(own), _sides(others))
        if all(_in_one_lobe(item) for item in real):
            lobes += _judged(_lobes(real), _lobes(own), _lobes(others))
    return {
        "side": PlaceCounts(sum(sides), len(sides)),
        "lobe": PlaceCounts(sum(lobes), len(lobes)),
    }


def grounding_section(
    reports: Sequence[GroundedReport], thresholds: Thresholds, intervals: Intervals
) -> dict[str, Any]:
    """How well reports are grounded; figures that the data do not define are NaN.

    Args:
        reports: Of different cases.
        thresholds: At which the classifier is compared with the reports, those that the reports were written with.
        intervals: How uncertainty is drawn.
    """
    patients = [report.patient_id for report in reports]
    places = [place_counts(report) for report in reports]
    value_NM = np.array(
        [
            [
                form_score(report.text) == 1,
                *(
                    np.nan if count is None else count == 0
                    for count in (report.contradictions, report.contradictions_written)
                ),
            ]
            for report in reports
        ],
        dtype=np.float64,
    )
    valid, consistent, consistent_written = _means(value_NM, patients, intervals)
    return {
        "reports": len(reports),
        "thresholds": thresholds.source,
        **_clinical(reports, thresholds, patients, intervals),
        "right_side": _place_share([place["side"] for place in places], patients, intervals),
        "right_lobe": _place_share([place["lobe"] for place in places], patients, intervals),
        "valid_format": valid,
        "no_contradiction": consistent,
        "no_contradiction_written": consistent_written,
        "contradictions_checked": sum(report.contradictions is not None for report in reports),
        "bleu_4": _bleu_4(reports, patients, intervals),
        "bleu_4_written": _bleu_4([report.as_written for report in reports], patients, intervals),
    }


def _present(text: str) -> set[str]:
    """Findings that a text affirms, with what they imply."""
    present = set(label_report(text).present)
    return present | {IMPLIED[name] for name in present if name in IMPLIED}


def _sides(facts: Sequence[LocatedFinding]) -> set[str]:
    """Sides told; a fact of the midline tells 'midline', one without a side nothing."""
    told = (_SIDES.get(fact.side, {fact.side}) for fact in facts if fact.side is not None)
    return {side for sides in told for side in sides}


def _lobes(facts: Sequence[LocatedFinding]) -> set[str]:
    return {fact.region for fact in facts if fact.region is not None}


def _in_one_lobe(item: LocatedFinding) -> bool:
    return item.side in ("right", "left") and item.region is not None and item.region.endswith("_lobe")


def _judged(true: set[str], told: set[str], usual: set[str]) -> list[bool]:
    return [bool(told) and told <= true] if told or usual else []


def _clinical(
    reports: Sequence[GroundedReport], thresholds: Thresholds, patients: Sequence[str], intervals: Intervals
) -> dict[str, Any]:
    """Macro F1 of the findings in the texts, of the classifier, the difference, and of the texts as they were written."""
    keep = [index for index, report in enumerate(reports) if not np.isnan(report.labels_K).all()]
    names = ("report_macro_f1", "classifier_macro_f1", "macro_f1_difference", "written_macro_f1")
    if not keep:
        return dict.fromkeys(names, float("nan"))
    label_NK = np.array([reports[index].labels_K for index in keep])
    plain_K = np.full(len(DISEASE_NAMES), 0.5)
    text, heads, written = (
        bootstrap_classification(
            score_NK,
            label_NK,
            DISEASE_NAMES,
            threshold=cut_K,
            patient_ids=[patients[index] for index in keep],
            resamples=max(1, intervals.resamples),
            seed=intervals.seed,
        )
        for score_NK, cut_K in (
            (_called([reports[index].text for index in keep]), plain_K),
            (np.array([reports[index].probabilities_K for index in keep]), thresholds.value_K),
            (_called([reports[index].as_written.text for index in keep]), plain_K),
        )
    )
    found = (
        text.intervals(intervals.level)["macro"]["f1"],
        heads.intervals(intervals.level)["macro"]["f1"],
        compare_classification(text, heads, intervals.level)["macro"]["f1"],
        written.intervals(intervals.level)["macro"]["f1"],
    )
    return {
        name: figure if intervals.resamples else figure.value
        for name, figure in zip(names, found, strict=True)
    }


def _called(texts: Sequence[str]) -> Floats:
    """Findings (N, K) of 0 and 1 that the texts affirm."""
    return np.array([[name in found for name in DISEASE_NAMES] for found in map(_present, texts)], np.float64)


def _place_share(
    places: Sequence[PlaceCounts], patients: Sequence[str], intervals: Intervals
) -> dict[str, Any]:
    """Right of all judged findings, as a ratio of sums; intervals over patients."""
    right, judged = sum(place.right for place in places), sum(place.judged for place in places)
    share: Any = right / judged if judged else float("nan")
    if judged and intervals.resamples:
        count_N2 = np.array([[place.right, place.judged] for place in places], dtype=np.float64)
        drawn_R2 = resample_means(
            count_N2, patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed
        )
        with np.errstate(invalid="ignore"):
            share = interval(share, drawn_R2[:, 0] / drawn_R2[:, 1], intervals.level)
    return {"share": share, "right": right, "judged": judged}


def _means(value_NM: Floats, patients: Sequence[str], intervals: Intervals) -> list[Any]:
    mean_M = mean_of_known(value_NM.T).tolist()
    if not intervals.resamples:
        return list(mean_M)
    drawn_RM = resample_means(
        value_NM, patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed
    )
    return [
        mean if np.isnan(mean) else interval(mean, drawn_RM[:, m], intervals.level)
        for m, mean in enumerate(mean_M)
    ]


def _bleu_4(reports: Sequence[GroundedReport], patients: Sequence[str], intervals: Intervals) -> Any:
    """Over the corpus, in the challenge's reading."""
    scores = report_scores(
        [report.text for report in reports], [report.true_report for report in reports], "official"
    )
    if not intervals.resamples:
        return scores.figures["BLEU_4"]
    drawn = scores.resampled(patient_ids=patients, resamples=intervals.resamples, seed=intervals.seed)
    return interval(scores.figures["BLEU_4"], drawn["BLEU_4"], intervals.level)
