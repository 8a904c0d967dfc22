"""Scans as the report generator sees them, encoded once, each with what is true of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlm3d.evaluation.case_prediction import ModelRun, drawn_masks
from vlm3d.evaluation.location_facts import LocationFact
from vlm3d.model.checkpoint import StoredThresholds, threshold_of
from vlm3d.model.head_fusion import HeadOdds, draw_lesions
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence
from vlm3d.training.data import Batch
from vlm3d.training.group_sampling import ReportContext
from vlm3d.training.rewards import ReportTruth, located_in_masks, truth_of_report


@torch.no_grad()
def scan_contexts(
    model: VLM3DMultiTask,
    batch: Batch,
    predicted: list[bool] | None = None,
    thresholds: StoredThresholds | None = None,
) -> list[tuple[ReportContext, ReportTruth]]:
    """Encode a batch once: each scan's features and findings for the report generator, and its truth.

    Args:
        model: In evaluation mode.
        batch: Of whole scans.
        predicted: A scan's report builds on what the heads find, not on the truth; all do by default.
        thresholds: How the heads are weighed and when they have found something, as in prediction.
    """
    predicted = predicted or [True] * len(batch.case_ids)
    features = model.encode(batch.intensity_B1DHW, batch.regions_BDHW)
    classified = model.classify(features)
    logits_BLDHW = model.read_masks(batch.intensity_B1DHW, batch.regions_BDHW, features).float()
    fusion = None if thresholds is None else thresholds.fusion
    spacing_mm = model.config.preprocessing.spacing_mm
    contexts = []
    for index, builds_on_heads in enumerate(predicted):
        one = slice(index, index + 1)
        labels_1K, masks_1LDHW = batch.labels_BK[one], batch.masks_BLDHW[one]
        regions_1DHW = None if batch.regions_BDHW is None else batch.regions_BDHW[one]
        odds = HeadOdds.of(
            classified["logits"][index], model.disease_names, logits_BLDHW[index], model.lesions
        )
        called = [p >= threshold_of(name, thresholds) for name, p in odds.probabilities(fusion).items()]
        called_1K = torch.tensor([called], device=labels_1K.device).to(labels_1K.dtype)
        drawn_LDHW, _ = draw_lesions(logits_BLDHW[index], model.lesions, odds, fusion)
        drawn_1LDHW = _without_specks(drawn_LDHW, spacing_mm)[None]
        evidence = LesionEvidence(
            called_1K if builds_on_heads else labels_1K.where(~labels_1K.isnan(), called_1K),
            drawn_1LDHW if builds_on_heads else masks_1LDHW.float().where(masks_1LDHW >= 0, drawn_1LDHW),
            regions_1DHW,
            spacing_mm,
            features.grid,
            (classified["seen"] if builds_on_heads else batch.guidance_BKZYX)[one],
        )
        scan = replace(
            features,
            global_BC=features.global_BC[one],
            patch_BNC=features.patch_BNC[one],
            region_BRC=features.region_BRC[one],
            region_present_BR=features.region_present_BR[one],
        )
        report = batch.reports[index].strip() or None
        located = [] if report else _located(model, masks_1LDHW, regions_1DHW)
        truth = truth_of_report(labels_1K[0].tolist(), report, located)
        contexts.append((ReportContext.of(model.report_generator, scan, evidence), truth))
    return contexts


def _without_specks(probability_LDHW: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Masks without the pieces that prediction drops."""
    run = ModelRun()
    kept_LDHW = torch.from_numpy(drawn_masks(probability_LDHW, spacing_mm, run)).to(probability_LDHW.device)
    return probability_LDHW.masked_fill((probability_LDHW >= run.mask_threshold) & ~kept_LDHW, 0.0)


def _located(model: VLM3DMultiTask, masks_1LDHW: Tensor, regions_1DHW: Tensor | None) -> list[LocationFact]:
    regions_DHW = None if regions_1DHW is None else regions_1DHW[0].cpu().numpy()
    spacing_mm = model.config.preprocessing.spacing_mm
    return located_in_masks(masks_1LDHW[0].cpu().numpy(), regions_DHW, spacing_mm, model.lesions)
