"""One system minus another on the same cases, each figure with the interval and p of its paired resamples.

Only what both systems speak of is compared, case by case. A mean is that of the system's own figures, as its evaluation
gives it, so that a lesion that one system invents and the other rightly leaves out counts for the one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlm3d.evaluation.bootstrap import (
    Difference,
    Resampled,
    bootstrap_classification,
    compare_classification,
    difference,
    resample_means,
)
from vlm3d.evaluation.classification import mean_of_known
from vlm3d.evaluation.collected import CollectedCases, ReportPair
from vlm3d.evaluation.figures import Thresholds, resampled_classification
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.labeler import ReportLabeler
from vlm3d.evaluation.ranking import Floats
from vlm3d.evaluation.report import report_scores
from vlm3d.evaluation.report_figures import CLINICAL_FIGURES, READINGS, report_findings
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

OVERLAPS = ("dice", "iou")


@dataclass(frozen=True)
class System:
    """One of the two.

    Attributes:
        cases: Compared with the truth, the same cases in the same order as the other system's.
        thresholds: Where its probabilities are cut.
    """

    cases: CollectedCases
    thresholds: Thresholds


def comparison_section(
    first: System, second: System, intervals: Intervals, labeler: ReportLabeler
) -> dict[str, Any]:
    """First system minus second, over the same patients; ``p_value`` is two-sided. Without resamples, plain differences."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "classification": lambda: _classification(first, second, intervals),
        "localization": lambda: _localization(first.cases, second.cases, intervals),
        "reports": lambda: _reports(first.cases, second.cases, intervals, labeler),
    }
    section = {name: found for name, compare in parts.items() if (found := compare())}
    return section if intervals.resamples else {name: _values(found) for name, found in section.items()}


def _values(figures: Any) -> Any:
    """Differences alone: no interval was drawn."""
    if isinstance(figures, Mapping):
        return {name: _values(item) for name, item in figures.items()}
    return figures.value if isinstance(figures, Difference) else figures


def _classification(first: System, second: System, intervals: Intervals) -> dict[str, Any]:
    both_N = first.cases.labeled_N & second.cases.labeled_N
    a, b = (
        resampled_classification(system.cases, system.thresholds, intervals, both_N)
        for system in (first, second)
    )
    if a is None or b is None:
        return {}
    return {"cases": int(both_N.sum()), **compare_classification(a, b, intervals.level)}


def _localization(first: CollectedCases, second: CollectedCases, intervals: Intervals) -> dict[str, Any]:
    scored = [{(item.case_id, item.lesion): item for item in cases.lesions} for cases in (first, second)]
    common = scored[0].keys() & scored[1].keys()
    if not common:
        return {}
    cases, keys = ({item[place] for item in common} for place in (0, 1))
    case_ids = [case_id for case_id in first.case_ids if case_id in cases]
    lesions = [key for key in LESION_KEYS if key in keys]
    own, drawn = list[Floats](), list[Floats]()
    for of_system in scored:
        value_NLM = np.full((len(case_ids), len(lesions), len(OVERLAPS)), np.nan)
        for n, case_id in enumerate(case_ids):
            for number, key in enumerate(lesions):
                if (case_id, key) in common:
                    figures = of_system[case_id, key].figures
                    value_NLM[n, number] = [figures[name] for name in OVERLAPS]
        flat_NM = value_NLM.reshape(len(case_ids), -1)
        drawn_RM = resample_means(
            flat_NM,
            patient_ids=first.patients_of(case_ids),
            resamples=max(1, intervals.resamples),
            seed=intervals.seed,
        )
        own.append(mean_of_known(flat_NM.T).reshape(len(lesions), len(OVERLAPS)))
        drawn.append(drawn_RM.reshape(-1, len(lesions), len(OVERLAPS)))

    def compared(place: Callable[[Floats], Floats]) -> dict[str, Difference]:
        apart, apart_R = place(own[0]) - place(own[1]), place(drawn[0]) - place(drawn[1])
        return {
            name: difference(float(apart[m]), apart_R[..., m], intervals.level)
            for m, name in enumerate(OVERLAPS)
        }

    return {
        "cases": len(case_ids),
        "per_lesion": {
            key: compared(partial(np.take, indices=number, axis=-2)) for number, key in enumerate(lesions)
        },
        "macro": compared(lambda figure: mean_of_known(np.moveaxis(figure, -2, -1))),
    }


def _reports(
    first: CollectedCases, second: CollectedCases, intervals: Intervals, labeler: ReportLabeler
) -> dict[str, Any]:
    """Texts of which both systems wrote one, and the findings of all."""
    if not first.reports or not second.reports:
        return {}
    of_second = {pair.case_id: pair for pair in second.reports}
    pairs = [(pair, of_second[pair.case_id]) for pair in first.reports]
    written = [(a, b) for a, b in pairs if a.predicted is not None and b.predicted is not None]
    section: dict[str, Any] = {"cases": len(pairs), "written_by_both": len(written)}
    if written:
        patients = first.patients_of([a.case_id for a, _ in written])
        for reading in READINGS:
            a, b = (report_scores(*_texts(of_system), reading) for of_system in zip(*written, strict=True))
            drawn_a, drawn_b = (
                scores.resampled(
                    patient_ids=patients, resamples=max(1, intervals.resamples), seed=intervals.seed
                )
                for scores in (a, b)
            )
            section[reading] = {
                name: difference(value - b.figures[name], drawn_a[name] - drawn_b[name], intervals.level)
                for name, value in a.figures.items()
            }
    found, other = (_resampled_findings(cases, intervals, labeler) for cases in (first, second))
    compared = compare_classification(found, other, intervals.level)
    section["clinical"] = {
        "macro": {name: compared["macro"][name] for name in CLINICAL_FIGURES},
        "micro": {name: compared["micro"][name] for name in CLINICAL_FIGURES},
        "crg": compared["crg"],
    }
    return section


def _texts(pairs: Sequence[ReportPair]) -> tuple[list[str], list[str]]:
    return [pair.predicted or "" for pair in pairs], [pair.truth for pair in pairs]


def _resampled_findings(cases: CollectedCases, intervals: Intervals, labeler: ReportLabeler) -> Resampled:
    predicted_NK, truth_NK, _ = report_findings(cases, labeler)
    return bootstrap_classification(
        predicted_NK,
        truth_NK,
        DISEASE_NAMES,
        patient_ids=cases.patients_of([pair.case_id for pair in cases.reports]),
        resamples=max(1, intervals.resamples),
        seed=intervals.seed,
    )
