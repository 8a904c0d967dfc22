"""One case of a prepared store through a model: its heads at once, its report later, many reports side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.anatomy.measurement import Component, drop_small_pieces
from vlm3d.datasets.augmentation import Augmenter, TrainingSample
from vlm3d.datasets.prepared import PreparedArrays, PreparedCase, PreparedDataset, lesion_masks
from vlm3d.errors import CheckpointError
from vlm3d.evaluation.case_findings import CaseFindings, LesionMasks
from vlm3d.evaluation.evaluator import Part
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.fusion_fitting import MaskCounts
from vlm3d.evaluation.store_truth import masks_in, truth_of
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS, MIN_LESION_ML
from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.head_fusion import HeadFusion, HeadOdds, draw_lesions
from vlm3d.model.heads import read_heads
from vlm3d.model.location import describe_findings, places_of
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence
from vlm3d.model.seen_places import SeenPlace
from vlm3d.model.vision_encoder import VisionFeatures
from vlm3d.preprocessing.intensity import window_in_place
from vlm3d.volume import Volume


@dataclass(frozen=True)
class ModelRun:
    """How a model is run over cases.

    Attributes:
        reports: Whether to write reports, for cases whose truth has one.
        masks: Whether to draw lesions, for cases where some are annotated.
        mask_threshold: Probability from which a voxel is lesion.
        min_lesion_ml: Smaller pieces are removed from the masks.
        fusion: How classifier and localizer are weighed; without it each speaks for itself.
        report_generation: As `VLM3DMultiTask.predict` takes it.
        report_batch: Reports that are written side by side; the words are those of one by one.
    """

    reports: bool = False
    masks: bool = True
    mask_threshold: float = 0.5
    min_lesion_ml: float = MIN_LESION_ML
    fusion: HeadFusion | None = None
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
        seen: Positive disease that no mask shows -> places at which the classifier saw it.
        max_probabilities: Lesion key -> that of its surest voxel.
        mask_threshold: Probability from which a voxel is lesion.
        affine: Index (d, h, w, 1) of the model's grid to RAS+ mm.
    """

    probabilities: Mapping[str, float]
    thresholds: Mapping[str, float]
    pieces: Mapping[str, Sequence[Component]]
    seen: Mapping[str, Sequence[SeenPlace]]
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


@dataclass(frozen=True)
class TuningScan:
    """What a scan of a validation split tells about the heads.

    Attributes:
        odds: The heads before they are weighed.
        counts: Lesion key -> how its mask's logits are spread, for the lesions that are annotated.
    """

    odds: HeadOdds
    counts: Mapping[str, MaskCounts]


@torch.inference_mode()
def tuning_scans(
    model: VLM3DMultiTask, dataset: PreparedDataset, index: int, *, masks: bool = True, variations: int = 0
) -> list[TuningScan]:
    """Read the heads, or the classifier alone, on one case, as it is stored and varied; errors are those of `run_heads`.

    Args:
        model: On the device that it is to run on; its mode is left as it was.
        dataset: Prepared as the model needs it.
        index: Of the case.
        masks: Whether the localizer runs; without it nothing is varied.
        variations: How often the scan is varied as in the training of these weights.
    """
    case, arrays = dataset.cases[index], dataset.read(index)
    _check_names(model)
    masks_drawn = masks and any(lesion.key in case.scored_lesions for lesion in model.lesions)
    tuning = []
    for number in range(1 + variations * masks_drawn):
        scan = arrays if number == 0 else _varied(model, arrays, case, [number - 1, index])
        found = read_heads(model, *_tensors(model, scan, case.regions_method is not None), masks=masks)
        counts = {}
        if found.mask_logits_LDHW is not None:
            counts = _counts(model, found.mask_logits_LDHW, scan, case.scored_lesions)
        tuning.append(TuningScan(found.odds, counts))
    return tuning


def _counts(
    model: VLM3DMultiTask, logits_LDHW: Tensor, arrays: PreparedArrays, known: Sequence[str]
) -> dict[str, MaskCounts]:
    keys = [lesion.key for lesion in model.lesions]
    true_LDHW = lesion_masks(arrays.lesion_bits_DHW, known, keys) > 0
    return {
        key: MaskCounts.of(logits_DHW, true_DHW)
        for key, logits_DHW, true_DHW in zip(keys, logits_LDHW, true_LDHW, strict=True)
        if key in known
    }


def _varied(
    model: VLM3DMultiTask, arrays: PreparedArrays, case: PreparedCase, seed: Sequence[int]
) -> PreparedArrays:
    """The scan as the training of these weights may have met it, but not mirrored: prediction mirrors for masks alone."""
    with_regions = case.regions_method is not None
    sample = TrainingSample(
        hu_DHW=arrays.hu_DHW,
        regions_DHW=arrays.regions_DHW if with_regions else None,
        lesion_bits_DHW=arrays.lesion_bits_DHW,
        labels_K=np.full(len(DISEASE_NAMES), np.nan, np.float32),
        report=case.report,
        case_id=case.case_id,
        spacing_mm=case.spacing_mm,
    )
    augmentation = model.config.training.augmentation.model_copy(update={"flip_probability": 0.0})
    varied = Augmenter(augmentation)(sample, np.random.default_rng(seed))
    regions_DHW = arrays.regions_DHW if varied.regions_DHW is None else varied.regions_DHW
    return PreparedArrays(varied.hu_DHW, regions_DHW, varied.lesion_bits_DHW)


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
        load_masks=(lambda: masks_in(arrays, case)) if case.scored_lesions else None,
        load_scan=lambda: Volume(arrays.hu_DHW, affine),
    )
    intensity, regions = _tensors(model, arrays, case.regions_method is not None)
    _check_names(model)
    with_masks = run.masks and bool(case.scored_lesions)
    with_report = run.reports and case.report is not None
    drawn = with_masks or with_report or run.fusion is not None
    found = read_heads(model, intensity, regions, masks=drawn)
    scores = found.odds.probabilities(run.fusion)
    scores_K = np.array([scores[name] for name in DISEASE_NAMES])
    predicted = CaseFindings(case.case_id, case.patient_id, scores_K)
    if found.mask_logits_LDHW is None or not (with_masks or with_report):
        return CasePrediction(predicted, true)
    probability_LDHW, _ = draw_lesions(found.mask_logits_LDHW, model.lesions, found.odds, run.fusion)
    masks_LDHW = drawn_masks(probability_LDHW, case.spacing_mm, run)
    if with_masks:
        masks = _lesion_masks(model, masks_LDHW, probability_LDHW, affine)
        predicted = replace(predicted, load_masks=lambda: masks)
    if not with_report:
        return CasePrediction(predicted, true)
    regions_DHW = arrays.regions_DHW if regions is not None else None
    peaks_L = probability_LDHW.flatten(1).amax(dim=1).tolist()
    heads = _head_findings(
        model,
        scores,
        found.seen_KZYX,
        masks_LDHW,
        peaks_L,
        regions_DHW,
        affine,
        case.spacing_mm,
        run,
        thresholds,
    )
    prompt_PM = _prompt(model, found.features, heads, probability_LDHW)
    return CasePrediction(predicted, true, heads, prompt_PM)


def _prompt(
    model: VLM3DMultiTask, features: VisionFeatures, heads: HeadFindings, probability_LDHW: Tensor
) -> Tensor:
    """What the language model reads before the report."""
    generator = model.report_generator
    generator.load_llm()
    words = ""
    if generator.location.uses_text:
        words = describe_findings(heads.positive, heads.pieces, model.lesions, seen=heads.seen)
    with evaluating(model):
        (prompt_PM,) = generator.prompts(
            features.global_BC,
            features.region_BRC,
            features.patch_BNC,
            [words],
            LesionEvidence(masks_BLDHW=probability_LDHW[None], grid=features.grid),
            features.region_present_BR,
        )
    return prompt_PM


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


def _check_names(model: VLM3DMultiTask) -> None:
    missing = [name for name in DISEASE_NAMES if name not in model.disease_names]
    if missing:
        raise CheckpointError(
            f"the model has no probability of {missing[0]}; only models of the 18 diseases are scored"
        )


def drawn_masks(
    probability_LDHW: Tensor, spacing_mm: tuple[float, float, float], run: ModelRun
) -> NDArray[np.bool_]:
    """Masks (L, D, H, W) without pieces that are too small, as `vlm3d predict` draws them."""
    masks_LDHW: NDArray[np.bool_] = (probability_LDHW >= run.mask_threshold).cpu().numpy()
    for mask_DHW in masks_LDHW:
        drop_small_pieces(mask_DHW, run.min_lesion_ml * 1000 / float(np.prod(spacing_mm)))
    return masks_LDHW


def _lesion_masks(
    model: VLM3DMultiTask,
    masks_LDHW: NDArray[np.bool_],
    probability_LDHW: Tensor,
    affine: NDArray[np.float64],
) -> LesionMasks:
    numbers = {lesion.key: number for number, lesion in enumerate(model.lesions) if lesion.key in LESION_KEYS}
    return LesionMasks(
        {key: masks_LDHW[number] for key, number in numbers.items()},
        affine,
        probabilities={key: probability_LDHW[number].cpu().numpy() for key, number in numbers.items()},
    )


def _head_findings(
    model: VLM3DMultiTask,
    scores: Mapping[str, float],
    seen_KZYX: Tensor,
    masks_LDHW: NDArray[np.bool_],
    peaks_L: Sequence[float],
    regions_DHW: NDArray[np.uint8] | None,
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    run: ModelRun,
    thresholds: Thresholds | None,
) -> HeadFindings:
    cuts = (thresholds or Thresholds.fixed(0.5)).as_json()["values"]
    cut_at = {name: cuts.get(name, 0.5) for name in scores}
    positive = [name for name, score in scores.items() if score >= cut_at[name]]
    pieces = model.report_generator.location.measure(masks_LDHW, regions_DHW, spacing_mm)
    return HeadFindings(
        probabilities=scores,
        thresholds=cut_at,
        pieces=pieces,
        seen=places_of(positive, seen_KZYX, regions_DHW, pieces, model.lesions),
        max_probabilities={lesion.key: peak for lesion, peak in zip(model.lesions, peaks_L, strict=True)},
        mask_threshold=run.mask_threshold,
        affine=affine,
    )
