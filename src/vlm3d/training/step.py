"""One forward pass of training: a batch and the step's tasks become losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlm3d.config import PhaseConfig
from vlm3d.labels import TASKS
from vlm3d.losses import MultiTaskLoss
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.patch_embedding import cut_boxes
from vlm3d.training.data import Batch


@dataclass(frozen=True)
class StepPlan:
    """What a step of the optimizer does; the same in all its forward passes and on all processes.

    Attributes:
        tasks: Of `vlm3d.labels.TASKS`.
        predicted_findings: Reports build on what the heads find, not on the truth.
    """

    tasks: tuple[str, ...]
    predicted_findings: bool


def plan_step(phase: PhaseConfig, seed: int, phase_number: int, step: int) -> StepPlan:
    """Draw a step's tasks, at least one, and whether reports build on predicted findings.

    Args:
        phase: Its ``tasks`` are chances; ``predicted_findings`` is the chance at its last step, rising linearly to it.
        seed: Of the run.
        phase_number: Tells the phases' random numbers apart.
        step: Steps of the phase that are done.
    """
    rng = np.random.default_rng([seed, phase_number, 2, step])
    tasks: tuple[str, ...] = ()
    while not tasks:
        tasks = tuple(task for task in TASKS if rng.random() < phase.tasks.get(task, 0.0))  # type: ignore[call-overload]
    chance = phase.predicted_findings * (step + 1) / phase.steps
    return StepPlan(tasks, bool(rng.random() < chance))


def seed_step(seed: int, phase_number: int, step: int, process: int) -> None:
    """Let torch's random numbers, which dropout draws, follow from the step and the process, not from what ran before."""
    torch.manual_seed(int(np.random.default_rng([seed, phase_number, 6, step, process]).integers(2**62)))


class TrainingStep(nn.Module):
    """The model and its loss as one module, so that wrappers for many devices see a single forward pass.

    Args:
        model: What trains.
        loss: What it is trained by.
    """

    def __init__(self, model: VLM3DMultiTask, loss: MultiTaskLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch, plan: StepPlan) -> dict[str, Tensor]:
        """Losses: ``total`` and one a task, as `MultiTaskLoss` gives them."""
        tokens = attention = None
        if "generation" in plan.tasks:
            generator = self.model.report_generator
            tokens, attention = generator.tokenize_reports(batch.reports, device=batch.intensity_B1DHW.device)
        keys = [lesion.key for lesion in self.model.lesions]
        outputs = self.model(
            batch.intensity_B1DHW,
            batch.regions_BDHW,
            None if plan.predicted_findings else batch.labels_BK,
            None if plan.predicted_findings else dict(zip(keys, batch.masks_BLDHW.unbind(1), strict=True)),
            tokens,
            report_attention_mask=attention,
            seen_patches=None if plan.predicted_findings else batch.guidance_BKZYX,
            tasks=plan.tasks,
            localization_boxes=batch.boxes,
            places=batch.places,
        )
        masks = batch.masks_BLDHW
        if batch.boxes is not None:
            masks = cut_boxes(masks, batch.boxes, self.model.config.model.vision.patch_size)
        targets = {
            "disease_labels": batch.labels_BK,
            "lesion_masks": masks,
            "guidance": batch.guidance_BKZYX,
        }
        return self.loss(outputs, targets)


def shared_parameters(model: VLM3DMultiTask) -> list[nn.Parameter]:
    """What all tasks train and GradNorm measures: the encoder's last block."""
    return list(model.vision_encoder.blocks[-1].parameters())


def spread(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each loss over the forward passes that had it."""
    names = sorted({name for loss in losses for name in loss})
    return {name: float(np.mean([loss[name] for loss in losses if name in loss])) for name in names}
