"""A model over a prepared store: each case is read, predicted, scored and let go, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.datasets.prepared import PreparedArrays, PreparedDataset
from vlm3d.errors import CheckpointError, InputError
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks
from vlm3d.evaluation.collected import CollectedCases
from vlm3d.evaluation.evaluator import (
    Evaluation,
    EvaluationSettings,
    Part,
    Progress,
    evaluated,
    tuned_thresholds,
)
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.store_truth import masks_in, truth_of
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.preprocessing.intensity import window_in_place
from vlm3d.volume import Volume

OnCase = Callable[[CaseFindings, CaseFindings], None]


@dataclass(frozen=True)
class ModelRun:
    """How a model is run over cases.

    Attributes:
        reports: Whether to write reports, for cases whose truth has one.
        masks: Whether to draw lesions, for cases where some are annotated.
        mask_threshold: Probability from which a voxel is lesion.
        report_generation: As `VLM3DMultiTask.predict` takes it.
    """

    reports: bool = False
    masks: bool = True
    mask_threshold: float = 0.5
    report_generation: Mapping[str, Any] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is compared."""
        return ("labels", *(("masks",) if self.masks else ()), *(("reports",) if self.reports else ()))


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
    progress: Progress | None = None,
) -> Evaluation:
    """Predict and score cases of a prepared store.

    Args:
        model: On the device that it is to run on; its mode is left as it was.
        dataset: Prepared as the model needs it.
        settings: How figures are computed.
        run: What the model is asked for.
        indices: Of the cases; all by default.
        thresholds: Where probabilities are cut; `settings.threshold` by default.
        name: What the figures call the model.
        on_case: Called with prediction and truth of each case before they are let go, for samples and pictures.
        progress: Called with the number of cases done and of all.

    Raises:
        ConfigError: The store was prepared for another model.
        DataError: A case is damaged.
        InputError: There is no case.
    """
    settings, run = settings or EvaluationSettings(), run or ModelRun()
    chosen = list(range(len(dataset)) if indices is None else indices)
    if not chosen:
        raise InputError(f"{dataset.store} holds no case of the split that was asked for")
    dataset.check(model.config.preprocessing)
    drawn = [lesion.key for lesion in model.lesions if lesion.key in LESION_KEYS]
    cases = CollectedCases(key_slices_per_lesion=settings.key_slices)
    for done, index in enumerate(chosen, start=1):
        predicted, true = predict_case(model, dataset, index, run)
        cases.add(predicted, true, run.parts, drawn)
        if on_case is not None:
            on_case(predicted, true)
        if progress is not None:
            progress(done, len(chosen))
    return evaluated(
        cases,
        settings,
        thresholds or Thresholds.fixed(settings.threshold),
        predictions=name,
        truth=dataset.store.name,
        training=model.training_status,
        untrained_tasks=model.untrained_tasks,
    )


def predict_case(
    model: VLM3DMultiTask, dataset: PreparedDataset, index: int, run: ModelRun | None = None
) -> tuple[CaseFindings, CaseFindings]:
    """Prediction and truth of one case of a store, both in memory."""
    run = run or ModelRun()
    case, arrays = dataset.cases[index], dataset.read(index)
    affine = np.array(case.affine)
    true = replace(
        truth_of(dataset, index),
        load_masks=(lambda: masks_in(arrays, case)) if case.known_lesions else None,
        load_scan=lambda: Volume(arrays.hu_DHW, affine),
    )
    intensity, regions = _tensors(model, arrays, case.regions_method is not None)
    with_masks = run.masks and bool(case.known_lesions)
    with_report = run.reports and case.report is not None
    if not with_masks and not with_report:
        scores_K = _scores(model, _probabilities(model, intensity, regions))
        return CaseFindings(case.case_id, case.patient_id, scores_K), true
    found = model.predict(
        intensity,
        regions,
        generate_report=with_report,
        report_generation_config=run.report_generation,
        spacing_mm=case.spacing_mm,
    )
    masks = _masks(found["localization"]["probabilities"], affine, run.mask_threshold) if with_masks else None
    predicted = CaseFindings(
        case.case_id,
        case.patient_id,
        _scores(model, found["classification"]["probabilities"]),
        found["reports"][0] if with_report else None,
        (lambda: masks) if masks is not None else None,
    )
    return predicted, true


def tune_on_store(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    settings: EvaluationSettings,
    *,
    name: str,
    evaluated_patients: Sequence[str] = (),
    progress: Progress | None = None,
) -> Thresholds:
    """Take each disease's threshold from the model's probabilities on another split.

    Raises:
        ConfigError: The store was prepared for another model.
        InputError: The split has no labels, or a patient is evaluated too.
    """
    dataset.check(model.config.preprocessing)
    predicted: dict[str, CaseFindings] = {}
    truth: dict[str, CaseFindings] = {}
    for index, case in enumerate(dataset.cases):
        if case.labels_K is not None:
            found, true = predict_case(model, dataset, index, ModelRun(masks=False))
            predicted[case.case_id], truth[case.case_id] = found, truth_of(dataset, index)
        if progress is not None:
            progress(index + 1, len(dataset))
    return tuned_thresholds(
        FindingsSource(name, predicted),
        FindingsSource(dataset.store.name, truth),
        settings.objective,
        evaluated_patients=evaluated_patients,
    )


def _tensors(
    model: VLM3DMultiTask, arrays: PreparedArrays, with_regions: bool
) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device
    intensity_DHW = window_in_place(arrays.hu_DHW.astype(np.float32), model.config.preprocessing.hu_window)
    intensity = torch.from_numpy(intensity_DHW)[None, None].to(device)
    return intensity, torch.from_numpy(arrays.regions_DHW)[None].to(device) if with_regions else None


@torch.inference_mode()
def _probabilities(model: VLM3DMultiTask, intensity: Tensor, regions: Tensor | None) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return model.classify(model.encode(intensity, regions))["probabilities"]
    finally:
        model.train(was_training)


def _scores(model: VLM3DMultiTask, probabilities_BK: Tensor) -> NDArray[np.float64]:
    """The first scan's probabilities in CT-RATE's order."""
    place = {name: k for k, name in enumerate(model.disease_names)}
    missing = [name for name in DISEASE_NAMES if name not in place]
    if missing:
        raise CheckpointError(
            f"the model has no probability of {missing[0]}; only models of the 18 diseases are scored"
        )
    values = probabilities_BK[0].double().cpu().numpy()
    return np.array([values[place[name]] for name in DISEASE_NAMES])


def _masks(probabilities: Mapping[str, Tensor], affine: NDArray[np.float64], threshold: float) -> LesionMasks:
    found = {
        key: probability_BDHW[0].float().cpu().numpy()
        for key, probability_BDHW in probabilities.items()
        if key in LESION_KEYS
    }
    masks = {key: probability_DHW >= threshold for key, probability_DHW in found.items()}
    return LesionMasks(masks, affine, probabilities=found)
