"""How good the model is on scans that it does not train on, by the project's own metrics, with samples to look at."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm3d.config import Config, PhaseConfig
from vlm3d.datasets.augmentation import NO_AUGMENTATION
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.evaluation.case_findings import CaseFindings
from vlm3d.evaluation.evaluator import EvaluationSettings
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.model_evaluation import ModelRun, evaluate_model, predict_case
from vlm3d.model.checkpoint import StoredThresholds
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.data import ScanStream, collate
from vlm3d.training.samples import CaseSample, track_sample
from vlm3d.training.step import StepPlan, TrainingStep
from vlm3d.training.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        figures: Flat, by names such as ``valid/auroc``.
        score: What checkpoints of the phase are ranked by; higher is better.
    """

    figures: dict[str, float]
    score: float


def validate(
    step_module: TrainingStep, dataset: PreparedDataset, config: Config, phase: PhaseConfig
) -> Validation:
    """Run the phase's tasks over the validation split.

    Figures are macro AUROC and average precision, macro Dice, and the report loss (nats a token, true findings given),
    as far as the phase trains them. The score is the mean of AUROC and Dice where either is, else minus the report loss.

    Args:
        step_module: The model, with the weights to judge, and its loss.
        dataset: What to judge on, such as `PreparedDataset.some_of_patients` of the validation split.
        config: The run's settings.
        phase: Decides which tasks are judged.
    """
    model = step_module.model
    figures: dict[str, float] = {}
    goods: list[float] = []
    if "classification" in phase.tasks or "localization" in phase.tasks:
        evaluation = evaluate_model(
            model,
            dataset,
            EvaluationSettings(intervals=Intervals(resamples=0)),
            run=ModelRun(masks="localization" in phase.tasks),
        )
        found = evaluation.figures
        if "classification" in phase.tasks and found.get("classification"):
            macro = found["classification"]["macro"]
            figures |= {f"valid/{key}": _number(macro[key]) for key in ("auroc", "ap", "f1")}
            goods.append(figures["valid/auroc"])
        if "localization" in phase.tasks and found.get("localization"):
            per_lesion = found["localization"]["per_lesion"]
            figures |= {f"valid/dice/{key}": _number(v["dice"]) for key, v in per_lesion.items()}
            figures["valid/dice"] = _number(found["localization"]["macro"]["dice"])
            goods.append(figures["valid/dice"])
    if "generation" in phase.tasks:
        figures["valid/report_loss"] = _report_loss(step_module, dataset, config, phase)
        if not goods:
            goods.append(-figures["valid/report_loss"])
    known = [good for good in goods if np.isfinite(good)]
    if not known:
        logger.warning(
            "no validation case tells how good this phase is: its last checkpoint counts as its best"
        )
    return Validation(figures, float(np.mean(known)) if known else float("-inf"))


def track_samples(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    config: Config,
    phase: PhaseConfig,
    tracker: Tracker,
    step: int,
    stored: StoredThresholds | None = None,
) -> None:
    """Keep the first validation cases as pictures and texts, with reports where the phase trains them.

    Findings are called, and heads weighed, by the thresholds that fit the weights, where there are any.
    """
    fusion = None if stored is None else stored.fusion
    for index in range(min(len(dataset), config.training.sample_cases)):
        with_report = "generation" in phase.tasks and index < config.training.validation_reports
        run = ModelRun(reports=with_report, fusion=fusion)
        predicted, true = predict_case(model, dataset, index, run, Thresholds.stored(stored))
        arrays, case = dataset.read(index), dataset.cases[index]
        track_sample(
            tracker,
            step,
            CaseSample(
                case.case_id,
                arrays.hu_DHW,
                case.spacing_mm,
                _masks(true),
                _masks(predicted),
                case.labels_K or (),
                () if predicted.scores_K is None else predicted.scores_K.tolist(),
                case.report,
                predicted.report,
            ),
        )


@torch.no_grad()
def _report_loss(
    step_module: TrainingStep, dataset: PreparedDataset, config: Config, phase: PhaseConfig
) -> float:
    """Mean cross-entropy of the true reports' tokens, scan by scan, findings and masks being the true ones."""
    quiet = config.model_copy(
        update={"training": config.training.model_copy(update={"augmentation": NO_AUGMENTATION})}
    )
    whole = phase.model_copy(update={"localization_crop": None, "scan_crop": None, "without_regions": 0.0})
    stream = ScanStream(dataset, quiet, whole, phase_number=0)
    was_training = step_module.training
    step_module.eval()
    device = next(step_module.model.parameters()).device
    losses = []
    for position in range(len(dataset)):
        batch = collate([stream[position]]).to(device)
        if batch.reports[0].strip():
            losses.append(float(step_module(batch, StepPlan(("generation",), False))["generation"]))
    step_module.train(was_training)
    return float(np.mean(losses)) if losses else float("nan")


def _masks(findings: CaseFindings) -> dict[str, Any]:
    masks = None if findings.load_masks is None else findings.load_masks()
    return {} if masks is None else dict(masks.masks)


def _number(figure: Any) -> float:
    """A figure as a float, whether it carries an interval, is a plain number or is not defined."""
    if isinstance(figure, Mapping):
        figure = figure.get("value")
    figure = getattr(figure, "value", figure)
    return float("nan") if figure is None else float(figure)
