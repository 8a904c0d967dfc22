"""A model over a prepared store: each case is read, predicted, scored and let go, so that memory stays flat.

Reports are written in batches: of the cases whose reports are still to come only the prompts are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import InputError
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource
from vlm3d.evaluation.case_prediction import (
    CasePrediction,
    HeadFindings,
    ModelRun,
    TuningScan,
    run_heads,
    tuning_scans,
    write_reports,
)
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.evaluator import (
    Evaluation,
    EvaluationSettings,
    Progress,
    evaluated,
    tuned_thresholds,
)
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.fusion_fitting import MASK_VARIATIONS, MaskScan, fit_fusion
from vlm3d.evaluation.grounding_figures import GroundedReport, grounding_section, located_findings
from vlm3d.evaluation.intervals import as_json
from vlm3d.evaluation.location_facts import LocationFact
from vlm3d.evaluation.store_truth import truth_of
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.head_fusion import HeadFusion
from vlm3d.model.multi_task_model import VLM3DMultiTask

__all__ = ["ModelRun", "evaluate_model", "predict_case", "tune_on_store"]

OnCase = Callable[[CaseFindings, CaseFindings], None]


@dataclass(frozen=True)
class MendedReport:
    """A report after it was held against the heads that it was written from.

    Attributes:
        text: As it is handed out.
        contradictions: That remain in it.
        contradictions_written: That the language model wrote.
    """

    text: str
    contradictions: int
    contradictions_written: int


MendReport = Callable[[str, HeadFindings], MendedReport]


def evaluate_model(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    settings: EvaluationSettings | None = None,
    *,
    run: ModelRun | None = None,
    indices: Sequence[int] | None = None,
    thresholds: Thresholds | None = None,
    name: str = "model",
    on_case: OnCase | None = None,
    mend: MendReport | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict and score cases of a prepared store.

    Args:
        model: On the device that it is to run on; its mode is left as it was.
        dataset: Prepared as the model needs it.
        settings: How figures are computed.
        run: What the model is asked for.
        indices: Of the cases; all by default.
        thresholds: Where probabilities are cut, for the figures and for the findings that reports are written from;
            `settings.threshold` by default.
        name: What the figures call the model.
        on_case: Called with prediction and truth of each case before they are let go, for samples and pictures. The
            masks and scans of a batch of reports are in memory together then.
        mend: Holds a report against the heads that it was written from, as ``vlm3d predict`` does; without it reports
            stay as they are written and their contradictions are not told.
        progress: Called with the number of cases done and of all.

    Raises:
        ConfigError: The store was prepared for another model.
        DataError: A case is damaged.
        InputError: There is no case.
    """
    settings, run = settings or EvaluationSettings(), run or ModelRun()
    thresholds = thresholds or Thresholds.fixed(settings.threshold)
    chosen = list(range(len(dataset)) if indices is None else indices)
    if not chosen:
        raise InputError(f"{dataset.store} holds no case of the split that was asked for")
    dataset.check(model.config.preprocessing)
    drawn = [lesion.key for lesion in model.lesions if lesion.key in LESION_KEYS]
    cases = CollectedCases(key_slices_per_lesion=settings.key_slices)
    batch = _ReportBatch(model, run, cases, on_case, mend)
    for done, index in enumerate(chosen, start=1):
        found = run_heads(model, dataset, index, run, thresholds)
        cases.add(found.predicted, found.true, run.parts, drawn)
        batch.add(found, located_findings(dataset.cases[index].facts))
        if progress is not None:
            progress(done, len(chosen))
    batch.finish()
    evaluation = evaluated(
        cases,
        settings,
        thresholds,
        predictions=name,
        truth=dataset.store.name,
        training=model.training_status,
        untrained_tasks=model.untrained_tasks,
    )
    if batch.grounded:
        section = grounding_section(batch.grounded, thresholds, settings.intervals)
        evaluation.figures["grounding"] = as_json(section)
    return evaluation


@dataclass
class _ReportBatch:
    """Cases whose reports are still to be written, in the order in which they came."""

    model: VLM3DMultiTask
    run: ModelRun
    cases: CollectedCases
    on_case: OnCase | None
    mend: MendReport | None
    grounded: list[GroundedReport] = field(default_factory=list)
    waiting: list[tuple[CasePrediction, list[LocationFact]]] = field(default_factory=list)

    def add(self, found: CasePrediction, located: list[LocationFact]) -> None:
        """Take a case that has been scored but for its report."""
        if self.on_case is None:
            if found.prompt_PM is None:
                return
            let_go = (
                replace(case, load_masks=None, load_scan=None) for case in (found.predicted, found.true)
            )
            predicted, true = let_go
            found = replace(found, predicted=predicted, true=true)
        self.waiting.append((found, located))
        if self._prompts() and len(self.waiting) < self.run.report_batch:
            return
        self.finish()

    def _prompts(self) -> list[CasePrediction]:
        return [found for found, _ in self.waiting if found.prompt_PM is not None]

    def finish(self) -> None:
        """Write the reports that are still to come."""
        prompts = [found.prompt_PM for found, _ in self.waiting if found.prompt_PM is not None]
        texts = iter(write_reports(self.model, prompts, self.run))
        unwritten = len(self.cases.reports) - len(prompts)
        for found, located in self.waiting:
            if found.prompt_PM is not None:
                assert found.heads is not None
                text = next(texts)
                mended = None if self.mend is None else self.mend(text, found.heads)
                found = found.with_report(text if mended is None else mended.text)
                self._keep(found, text, mended, located, unwritten)
                unwritten += 1
            if self.on_case is not None:
                self.on_case(found.predicted, found.true)
        self.waiting.clear()

    def _keep(
        self,
        found: CasePrediction,
        written: str,
        mended: MendedReport | None,
        located: list[LocationFact],
        place: int,
    ) -> None:
        """Put a report where its place was kept free, and among those to ground."""
        text, scores_K = found.predicted.report, found.predicted.scores_K
        assert text is not None
        assert scores_K is not None
        pair = self.cases.reports[place]
        assert pair.case_id == found.true.case_id, "reports are written in the order of their cases"
        self.cases.reports[place] = replace(pair, predicted=text)
        labels_K = found.true.scores_K
        self.grounded.append(
            GroundedReport(
                found.true.patient_id,
                text,
                pair.truth,
                np.full(len(scores_K), np.nan) if labels_K is None else labels_K,
                scores_K,
                located,
                None if mended is None else mended.contradictions,
                written,
                None if mended is None else mended.contradictions_written,
            )
        )


def predict_case(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    index: int,
    run: ModelRun | None = None,
    thresholds: Thresholds | None = None,
) -> tuple[CaseFindings, CaseFindings]:
    """Prediction and truth of one case of a store, both in memory; arguments are those of `run_heads`."""
    run = run or ModelRun()
    found = run_heads(model, dataset, index, run, thresholds)
    if found.prompt_PM is not None:
        found = found.with_report(write_reports(model, [found.prompt_PM], run)[0])
    return found.predicted, found.true


@dataclass(frozen=True)
class Tuned:
    """What a validation split taught about a model's heads.

    Attributes:
        thresholds: Of the diseases' probabilities, as `fusion` leaves them.
        fusion: How classifier and localizer are weighed and masks drawn; None where no mask was learned or annotated.
    """

    thresholds: Thresholds
    fusion: HeadFusion | None


def tune_on_store(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    settings: EvaluationSettings,
    *,
    name: str,
    evaluated_patients: Sequence[str] = (),
    variations: int = MASK_VARIATIONS,
    progress: Progress | None = None,
) -> Tuned:
    """Weigh classifier and localizer on another split, and take each disease's threshold there.

    Args:
        model: On the device that it is to run on; its mode is left as it was.
        dataset: The split.
        settings: What the thresholds maximize.
        name: Of the split, for the record.
        evaluated_patients: Who must not be in it.
        variations: How often each scan is varied, as in training, for the rules of the masks.
        progress: Called with the number of cases done and of all.

    Raises:
        ConfigError: The store was prepared for another model.
        InputError: The split has no labels, or a patient is evaluated too.
    """
    dataset.check(model.config.preprocessing)
    indices = [i for i, case in enumerate(dataset.cases) if case.labels_K is not None]
    drawn = "localization" not in model.untrained_tasks  # a localizer that never learned has no say
    told = []
    for done, index in enumerate(indices, start=1):
        told.append(tuning_scans(model, dataset, index, masks=drawn, variations=variations))
        if progress is not None:
            progress(done, len(indices))
    fusion = _fitted(model, dataset, indices, told) if drawn and told else None
    predicted: dict[str, CaseFindings] = {}
    truth: dict[str, CaseFindings] = {}
    for index, (tuning, *_) in zip(indices, told, strict=True):
        case = dataset.cases[index]
        probabilities = tuning.odds.probabilities(fusion)
        scores_K = np.array([probabilities[disease] for disease in DISEASE_NAMES])
        predicted[case.case_id] = CaseFindings(case.case_id, case.patient_id, scores_K)
        truth[case.case_id] = truth_of(dataset, index)
    thresholds = tuned_thresholds(
        FindingsSource(name, predicted),
        FindingsSource(dataset.store.name, truth),
        settings.objective,
        evaluated_patients=evaluated_patients,
    )
    return Tuned(thresholds, fusion)


def _fitted(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    indices: Sequence[int],
    told: Sequence[Sequence[TuningScan]],
) -> HeadFusion | None:
    """How the heads are weighed and masks drawn, from `tuning_scans` of each case."""
    cases = [dataset.cases[index] for index in indices]
    labels_NK = np.array([case.labels_K for case in cases], dtype=float)
    stored = [scans[0] for scans in told]
    return fit_fusion(
        {name: np.array([scan.odds.logits[name] for scan in stored]) for name in DISEASE_NAMES},
        {lesion.key: np.array([scan.odds.peaks[lesion.key] for scan in stored]) for lesion in model.lesions},
        {name: labels_NK[:, k] for k, name in enumerate(DISEASE_NAMES)},
        {
            lesion.key: [
                MaskScan(scan.odds.logits[lesion.disease], scan.counts[lesion.key], varied=number > 0)
                for scans in told
                for number, scan in enumerate(scans)
                if lesion.key in scan.counts
            ]
            for lesion in model.lesions
        },
        model.lesions,
    )
