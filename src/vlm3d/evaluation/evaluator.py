"""Predictions against truth: joined by id, scored, with intervals and a record of what was compared.

Cases come one by one, from files or from a model; what is kept of each is small, so that any number of them fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from vlm3d.errors import ConfigError, InputError
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, Training
from vlm3d.evaluation.case_ids import check_same_cases, count, named
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.comparison import System, comparison_section
from vlm3d.evaluation.figures import (
    Thresholds,
    box_section,
    classification_section,
    localization_section,
    resampled_classification,
)
from vlm3d.evaluation.intervals import Intervals, as_json
from vlm3d.evaluation.labeler import ReportLabeler, RuleLabeler
from vlm3d.evaluation.report_figures import report_section
from vlm3d.evaluation.thresholds import Objective, tune_thresholds
from vlm3d.version import VERSION

logger = logging.getLogger(__name__)

Part = Literal["labels", "masks", "boxes", "reports"]
PARTS: tuple[Part, ...] = ("labels", "masks", "boxes", "reports")
SCORED = ("classification", "localization", "boxes", "reports")
"""Sections of figures; at least one is in every evaluation."""
SCHEMA_VERSION = "1.1"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationSettings:
    """How figures are computed.

    Attributes:
        threshold: Probability from which a disease is positive, where none was tuned.
        objective: What tuned thresholds maximize on the split that they are tuned on: ``"f1"`` or ``"crg"``.
        intervals: How uncertainty is drawn.
        common_only: Leave out cases that only one side knows, instead of refusing them.
        key_slices: How many of the worst of each lesion keep a picture.
        bert_score: Compare reports by the meaning of their words too, with the embedded text encoder.
        labeler: Reads the findings from reports.
    """

    threshold: float = 0.5
    objective: Objective = "f1"
    intervals: Intervals = field(default_factory=Intervals)
    common_only: bool = False
    key_slices: int = 0
    bert_score: bool = False
    labeler: ReportLabeler = field(default_factory=RuleLabeler)

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(f"the threshold is a probability between 0 and 1, got {self.threshold}")
        if self.objective not in ("f1", "crg"):
            raise ConfigError(f"thresholds are tuned for f1 or crg, got '{self.objective}'")
        if self.intervals.resamples < 0 or not 0 < self.intervals.level < 1:
            raise ConfigError(
                "intervals take 0 or more resamples and a level between 0 and 1, "
                f"got {self.intervals.resamples} and {self.intervals.level}"
            )


@dataclass(frozen=True)
class Evaluation:
    """The figures, and the cases behind them.

    Attributes:
        figures: As `evaluation.json` holds them: JSON values, None where the data do not define a figure.
        cases: What was compared, case by case.
        thresholds: Where probabilities were cut.
        training: How the weights behind the predictions were trained, where that is known.
        training_note: What a reader must know of these weights, in words, where the predictions say so.
    """

    figures: dict[str, Any]
    cases: CollectedCases
    thresholds: Thresholds
    training: Training | None = None
    training_note: str = ""

    @property
    def untrained_tasks(self) -> tuple[str, ...]:
        """Of the model's tasks, those that its weights never learned."""
        return tuple(self.figures["untrained_tasks"])


@dataclass(frozen=True)
class Joined:
    """Two sources over the same cases.

    Attributes:
        predictions: The system's.
        truth: What it is compared with.
        parts: What both speak of.
        case_ids: To compare, in the truth's order.
        left_out: Cases that only one side knows, where that was allowed.
        silent: Part -> cases of whose truth the predictions say nothing, where that was allowed.
    """

    predictions: FindingsSource
    truth: FindingsSource
    parts: tuple[Part, ...]
    case_ids: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    silent: Mapping[Part, tuple[str, ...]] = field(default_factory=dict)

    def pairs(self) -> Iterable[tuple[CaseFindings, CaseFindings]]:
        """Prediction and truth of each case."""
        for case_id in self.case_ids:
            yield self.predictions.cases[case_id], self.truth.cases[case_id]


def join(predictions: FindingsSource, truth: FindingsSource, *, common_only: bool = False) -> Joined:
    """Find out what can be compared.

    For each of labels, masks, boxes and reports that both sides speak of, every case of the truth must be predicted, and
    no case predicted that the truth does not know.

    Raises:
        InputError: The cases differ (named), or the two have nothing in common.
    """
    parts = tuple(part for part in PARTS if _comparable(part, predictions, truth))
    if not parts:
        raise InputError(
            f"{predictions.name} has {_listed(predictions.parts)}, {truth.name} has {_listed(truth.parts)}: "
            "nothing can be compared"
        )
    known = {case_id for case_id, case in truth.cases.items() if any(_speaks(case, part) for part in parts)}
    common = [case_id for case_id in truth.cases if case_id in known and case_id in predictions.cases]
    foreign = set(predictions.cases) - set(truth.cases)
    left_out = (known | foreign) - set(common)
    if not common_only:
        check_same_cases(
            set(predictions.cases) - (set(truth.cases) - known), known, predictions.name, truth.name
        )
    silent = {part: _silent(part, common, predictions, truth) for part in parts}
    for part, case_ids in silent.items():
        if case_ids and not common_only:
            raise InputError(
                f"{predictions.name} has no {part} for {count(len(case_ids), 'case')} of {truth.name}: {named(case_ids)}"
            )
    if not common:
        raise InputError(f"{predictions.name} and {truth.name} have no case in common")
    return Joined(
        predictions,
        truth,
        parts,
        tuple(common),
        tuple(sorted(left_out)),
        {part: case_ids for part, case_ids in silent.items() if case_ids},
    )


def _silent(
    part: Part, case_ids: Iterable[str], predictions: FindingsSource, truth: FindingsSource
) -> tuple[str, ...]:
    return tuple(
        case_id
        for case_id in case_ids
        if _speaks(truth.cases[case_id], part) and not _speaks(predictions.cases[case_id], part)
    )


def _comparable(part: Part, predictions: FindingsSource, truth: FindingsSource) -> bool:
    if part == "boxes":  # masks give boxes too
        both = (predictions.parts, truth.parts)
        return any("boxes" in parts for parts in both) and all(parts & {"boxes", "masks"} for parts in both)
    return part in predictions.parts and part in truth.parts


def _speaks(case: CaseFindings, part: Part) -> bool:
    return part in case.parts or (part == "boxes" and "masks" in case.parts)


def _listed(parts: Iterable[str]) -> str:
    return " and ".join(sorted(parts)) or "nothing"


def evaluate(
    predictions: FindingsSource,
    truth: FindingsSource,
    settings: EvaluationSettings | None = None,
    *,
    against: FindingsSource | None = None,
    tune_on: tuple[FindingsSource, FindingsSource] | None = None,
    tune_against: tuple[FindingsSource, FindingsSource] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a system.

    Args:
        predictions: The system's.
        truth: Labels, masks, boxes, reports, or some of them.
        settings: How.
        against: A second system on the same cases, for a paired test.
        tune_on: Predictions and truth of other patients, from which each disease's threshold is taken.
        tune_against: The same for the second system; without it, it is cut at `settings.threshold`.
        progress: Called with the number of cases done and of all.

    Raises:
        InputError: The cases do not fit; the message names them.
        MaskError: Masks lie on different grids; the message names the case.
    """
    settings = settings or EvaluationSettings()
    joined = join(predictions, truth, common_only=settings.common_only)
    rival = None if against is None else join(against, truth, common_only=settings.common_only)
    if rival is not None:
        check_same_cases(rival.case_ids, joined.case_ids, rival.predictions.name, predictions.name)
    patients = {truth.cases[case_id].patient_id for case_id in joined.case_ids}
    thresholds, rival_thresholds = (
        Thresholds.fixed(settings.threshold)
        if tuning is None
        else tuned_thresholds(
            *tuning, settings.objective, evaluated_patients=patients, evaluated_cases=joined.case_ids
        )
        for tuning in (tune_on, tune_against)
    )
    cases = collect(joined, settings, progress)
    evaluation = evaluated(
        cases,
        settings,
        thresholds,
        predictions=predictions.name,
        truth=truth.name,
        training=predictions.training,
        training_note=predictions.training_note,
        left_out=joined.left_out,
        silent=joined.silent,
    )
    if not any(name in evaluation.figures for name in SCORED):
        raise InputError(f"{truth.name} has no known label, mask, box or report of these cases to score")
    if rival is not None:
        other = collect(rival, settings, progress)
        evaluation.figures["comparison"] = {
            "against": rival.predictions.name,
            "training": rival.predictions.training,
            "thresholds": rival_thresholds.source,
            "left_out": list(rival.left_out),
            "silent": as_json(rival.silent),
            **as_json(
                comparison_section(
                    System(cases, thresholds),
                    System(other, rival_thresholds),
                    settings.intervals,
                    settings.labeler,
                )
            ),
        }
    return evaluation


def collect(joined: Joined, settings: EvaluationSettings, progress: Progress | None = None) -> CollectedCases:
    """Compare case by case; only cases with masks take long enough to tell of progress."""
    cases = CollectedCases(key_slices_per_lesion=settings.key_slices)
    slow = bool({"masks", "boxes"} & set(joined.parts))
    for done, (predicted, true) in enumerate(joined.pairs(), start=1):
        cases.add(predicted, true, joined.parts, joined.predictions.lesion_keys)
        if slow and progress is not None:
            progress(done, len(joined.case_ids))
    return cases


def evaluated(
    cases: CollectedCases,
    settings: EvaluationSettings,
    thresholds: Thresholds,
    *,
    predictions: str,
    truth: str,
    training: Training | None = None,
    training_note: str = "",
    untrained_tasks: Sequence[str] = (),
    left_out: Sequence[str] = (),
    silent: Mapping[Part, Sequence[str]] = MappingProxyType({}),
) -> Evaluation:
    """All figures of compared cases, wherever they came from.

    Args:
        cases: Compared.
        settings: How figures are computed.
        thresholds: Where probabilities are cut.
        predictions: What the system is called.
        truth: What the truth is called.
        training: How its weights were trained.
        training_note: What a reader must know of them, in words.
        untrained_tasks: Of the model's tasks, those that they never learned.
        left_out: Cases that were not compared.
        silent: Part -> cases of whose truth the predictions say nothing.
    """
    figures: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "vlm3d": VERSION,
        "predictions": predictions,
        "training": training,
        "untrained_tasks": list(untrained_tasks),
        "truth": truth,
        "cases": len(cases.case_ids),
        "patients": len(set(cases.patient_ids)),
        "left_out": list(left_out),
        "silent": {part: list(case_ids) for part, case_ids in silent.items()},
        "thresholds": thresholds.as_json(),
        "intervals": settings.intervals.as_json(),
    }
    drawn = resampled_classification(cases, thresholds, settings.intervals)
    if drawn is not None:
        figures["classification"] = classification_section(cases, thresholds, settings.intervals, drawn)
    if cases.lesions:
        figures["localization"] = localization_section(cases, settings.intervals)
    if cases.boxes:
        figures["boxes"] = box_section(cases)
    if cases.reports:
        figures["reports"] = report_section(
            cases, settings.intervals, settings.labeler, with_bert_score=settings.bert_score
        )
    return Evaluation(as_json(figures), cases, thresholds, training, training_note)


def tuned_thresholds(
    predictions: FindingsSource,
    truth: FindingsSource,
    objective: Objective,
    *,
    evaluated_patients: Collection[str] = (),
    evaluated_cases: Collection[str] = (),
) -> Thresholds:
    """Take each disease's threshold from other patients than those that are evaluated.

    Args:
        predictions: The system's, of the split to tune on.
        truth: Labels of at least these cases.
        objective: ``"f1"`` or ``"crg"``.
        evaluated_patients: Who must not be among them.
        evaluated_cases: Nor these, whatever patient the two truths give them to.

    Raises:
        InputError: A case has no labels, a patient or case is evaluated too, or no label is positive.
    """
    scored = [case_id for case_id, case in predictions.cases.items() if case.scores_K is not None]
    foreign = [
        case_id for case_id in scored if case_id not in truth.cases or truth.cases[case_id].scores_K is None
    ]
    if foreign or not scored:
        words = (
            f"{count(len(foreign), 'case')} without true labels: {named(foreign)}" if foreign else "no labels"
        )
        raise InputError(f"{predictions.name} cannot tune thresholds: it has {words}")
    for what, shared in (
        ("patient", {truth.cases[case_id].patient_id for case_id in scored} & set(evaluated_patients)),
        ("case", set(scored) & set(evaluated_cases)),
    ):
        if shared:
            raise InputError(
                f"{predictions.name} would tune thresholds on {count(len(shared), what)} evaluated with them: "
                f"{named(shared)}; tune on another split"
            )
    probability_NK = np.array([predictions.cases[case_id].scores_K for case_id in scored])
    label_NK = np.array([truth.cases[case_id].scores_K for case_id in scored])
    try:
        value_K = tune_thresholds(probability_NK, label_NK, objective)
    except ValueError as error:
        raise InputError(f"{predictions.name} cannot tune thresholds: {error}") from error
    name = {"f1": "F1", "crg": "CRG"}[objective]
    return Thresholds(value_K, f"highest {name} on {predictions.name} ({count(len(scored), 'case')})")
