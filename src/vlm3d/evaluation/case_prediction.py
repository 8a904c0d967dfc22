"""One case of a prepared store through a model: its heads at once, its report later, many reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.anatomy.measurement import Component
from vlm3d.datasets.prepared import PreparedArrays, PreparedDataset
from vlm3d.errors import CheckpointError
from vlm3d.evaluation.case_findings import CaseFindings, LesionMasks
from vlm3d.evaluation.evaluator import Part
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.store_truth import masks_in, truth_of
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.location import describe_findings
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence
from vlm3d.preprocessing.intensity import window_in_place
from vlm3d.volume import Volume


@dataclass(frozen=True)
class ModelRun:
    """How a model is run over cases.

    Attributes:
        reports: Whether to write reports, for cases whose truth has one.
        masks: Whether to draw lesions, for cases where some are annotated.
        mask_threshold: Probability from which a voxel is lesion.
        report_generation: As `VLM3DMultiTask.predict` takes it.
        report_batch: Reports that are written side by side; the words are those of one by one.
    """

    reports: bool = False
    masks: bool = True
    mask_threshold: float = 0.5
    report_generation: Mapping[str, Any] | None = None
    report_batch: int = 8

    def __post_init__(self) -> None:
        if self.report_batch < 1:
            raise ValueError(f"report_batch is 1 or more, got {self.report_batch}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is compared."""
        return ("labels", *(("masks",) if self.masks else ()), *(("reports",) if self.reports else ()))


@dataclass(frozen=True)
class HeadFindings:
    """What the classifier and the localizer say about a scan, and what its report builds on.

    Attributes:
        probabilities: Disease name -> probability.
        thresholds: Disease name -> probability from which it is positive.
        pieces: Lesion key -> measured pieces, largest first.
        max_probabilities: Lesion key -> that of its surest voxel.
        mask_threshold: Probability from which a voxel is lesion.
        affine: Index (d, h, w, 1) of the model's grid to RAS+ mm.
    """

    probabilities: Mapping[str, float]
    thresholds: Mapping[str, float]
    pieces: Mapping[str, Sequence[Component]]
    max_probabilities: Mapping[str, float]
    mask_threshold: float
    affine: NDArray[np.float64]

    @property
    def positive(self) -> list[str]:
        """Diseases that reach their thresholds."""
        return [name for name, value in self.probabilities.items() if value >= self.thresholds[name]]


@dataclass(frozen=True)
class CasePrediction:
    """A case whose report is not written yet.

    Attributes:
        predicted: Probabilities and masks.
        true: What the store knows.
        heads: Where a report is wanted: what it builds on.
        prompt_PM: Where a report is wanted: what the language model reads before it.
    """

    predicted: CaseFindings
    true: CaseFindings
    heads: HeadFindings | None = None
    prompt_PM: Tensor | None = None

    def with_report(self, text: str) -> CasePrediction:
        """The case once its report is there; the prompt is let go."""
        return replace(self, predicted=replace(self.predicted, report=text), prompt_PM=None)


@torch.inference_mode()
def run_heads(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    index: int,
    run: ModelRun,
    thresholds: Thresholds | None = None,
) -> CasePrediction:
    """Predict one case of a store up to the prompt of its report.

    Args:
        model: On the device that it is to run on; its mode is left as it was.
        dataset: Prepared as the model needs it.
        index: Of the case.
        run: What the model is asked for.
        thresholds: From which probability on a finding enters the report; 0.5 by default.

    Raises:
        CheckpointError: The model lacks one of the 18 diseases.
        DataError: The case is damaged.
    """
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
    with evaluating(model):
        features = model.encode(intensity, regions)
        scores = _scores(model, model.classify(features)["probabilities"])
        scores_K = np.array([scores[name] for name in DISEASE_NAMES])
        predicted = CaseFindings(case.case_id, case.patient_id, scores_K)
        if not with_masks and not with_report:
            return CasePrediction(predicted, true)
        masks_BLDHW = model.localize(intensity, regions, features)["mask_logits"].sigmoid()
        if with_masks:
            masks = _masks(model, masks_BLDHW[0], affine, run.mask_threshold)
            predicted = replace(predicted, load_masks=lambda: masks)
        if not with_report:
            return CasePrediction(predicted, true)
        regions_DHW = arrays.regions_DHW if regions is not None else None
        heads = _head_findings(
            model, scores, masks_BLDHW[0], regions_DHW, affine, case.spacing_mm, run, thresholds
        )
        generator = model.report_generator
        generator.load_llm()
        words = ""
        if generator.location.uses_text:
            words = describe_findings(heads.positive, heads.pieces, model.lesions)
        (prompt_PM,) = generator.prompts(
            features.global_BC,
            features.region_BRC,
            features.patch_BNC,
            [words],
            LesionEvidence(masks_BLDHW=masks_BLDHW, grid=features.grid),
            features.region_present_BR,
        )
    return CasePrediction(predicted, true, heads, prompt_PM)


def write_reports(model: VLM3DMultiTask, prompts: Sequence[Tensor], run: ModelRun) -> list[str]:
    """Write the reports that follow some prompts, side by side.

    Args:
        model: Whose prompts they are.
        prompts: From `run_heads`, (P, M) each, of any lengths.
        run: How words are chosen.
    """
    if not prompts:
        return []
    with evaluating(model):
        written = model.report_generator.write(prompts, **(run.report_generation or {}))
    return [group[0].text for group in written]


def _tensors(
    model: VLM3DMultiTask, arrays: PreparedArrays, with_regions: bool
) -> tuple[Tensor, Tensor | None]:
    device = next(model.parameters()).device
    intensity_DHW = window_in_place(arrays.hu_DHW.astype(np.float32), model.config.preprocessing.hu_window)
    intensity = torch.from_numpy(intensity_DHW)[None, None].to(device)
    return intensity, torch.from_numpy(arrays.regions_DHW)[None].to(device) if with_regions else None


def _scores(model: VLM3DMultiTask, probabilities_BK: Tensor) -> dict[str, float]:
    """The first scan's probabilities by disease, all of CT-RATE's among them."""
    missing = [name for name in DISEASE_NAMES if name not in model.disease_names]
    if missing:
        raise CheckpointError(
            f"the model has no probability of {missing[0]}; only models of the 18 diseases are scored"
        )
    return dict(zip(model.disease_names, probabilities_BK[0].double().cpu().tolist(), strict=True))


def _masks(
    model: VLM3DMultiTask, probability_LDHW: Tensor, affine: NDArray[np.float64], threshold: float
) -> LesionMasks:
    found = {
        lesion.key: probability_DHW.float().cpu().numpy()
        for lesion, probability_DHW in zip(model.lesions, probability_LDHW, strict=True)
        if lesion.key in LESION_KEYS
    }
    masks = {key: probability_DHW >= threshold for key, probability_DHW in found.items()}
    return LesionMasks(masks, affine, probabilities=found)


def _head_findings(
    model: VLM3DMultiTask,
    scores: Mapping[str, float],
    probability_LDHW: Tensor,
    regions_DHW: NDArray[np.uint8] | None,
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    run: ModelRun,
    thresholds: Thresholds | None,
) -> HeadFindings:
    cuts = (thresholds or Thresholds.fixed(0.5)).as_json()["values"]
    masks_LDHW = (probability_LDHW >= run.mask_threshold).cpu().numpy()
    peaks_L = probability_LDHW.flatten(1).amax(dim=1).tolist()
    return HeadFindings(
        probabilities=scores,
        thresholds={name: cuts.get(name, 0.5) for name in scores},
        pieces=model.report_generator.location.measure(masks_LDHW, regions_DHW, spacing_mm),
        max_probabilities={lesion.key: peak for lesion, peak in zip(model.lesions, peaks_L, strict=True)},
        mask_threshold=run.mask_threshold,
        affine=affine,
    )
