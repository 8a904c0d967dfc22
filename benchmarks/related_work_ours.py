"""Our model as rows: both tasks, each task alone, and with less to learn from or to look at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from related_work_row import Found, Row
from vlm3d.config import Config
from vlm3d.labels import TASKS
from vlm3d.losses import MultiTaskLoss
from vlm3d.model.multi_task_model import PARTS, VLM3DMultiTask
from vlm3d.training.data import Batch
from vlm3d.training.step import StepPlan, TrainingStep, shared_parameters

_PART_OF_TASK = {"classification": "classifier", "localization": "localizer"}


class Ours(Row):
    """`VLM3DMultiTask`, trained by the trainer's own step; encoder and heads learn together from the first step.

    Args:
        config: The model, its losses, its phases.
        tasks: ``classification``, ``localization`` or both.
        anatomy: Whether it ever sees regions, in training or at prediction.
        places: Whether the classifier is taught where to look, from masks and stated places.
    """

    def __init__(
        self, config: Config, tasks: Sequence[str], *, anatomy: bool = True, places: bool = True
    ) -> None:
        super().__init__()
        self.tasks = tuple(task for task in TASKS if task in tasks)
        self.anatomy = anatomy
        phases = config.training.phases
        own = phases.classification if "classification" in tasks else phases.localization
        self.peak_lr = own.lr
        if len(self.tasks) > 1:  # masks are drawn in the boxes of the localizer's own phase
            own = own.model_copy(
                update={
                    "localization_crop": phases.localization.localization_crop,
                    "lesion_crops": phases.localization.lesion_crops,
                }
            )
        self.phase = own if anatomy else own.model_copy(update={"without_regions": 1.0})
        loss = config.loss if places else config.loss.model_copy(update={"evidence_weight": 0.0})
        model = VLM3DMultiTask(config, load_llm=False)
        model.freeze(*PARTS)
        model.unfreeze("vision", *(_PART_OF_TASK[task] for task in self.tasks))
        self.step = TrainingStep(
            model, MultiTaskLoss.from_config(loss, config.model.classifier.class_weights)
        )

    @property
    def model(self) -> VLM3DMultiTask:
        """The model."""
        return self.step.model

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the tasks' losses."""
        losses = self.step(batch, StepPlan(self.tasks, predicted_findings=False))
        if self.step.loss.gradnorm is not None:
            self.step.loss.gradnorm.update(losses, shared_parameters(self.model))
        total: Tensor = losses["total"]
        return total

    def predict(self, intensity_11DHW: Tensor, regions_1DHW: Tensor | None) -> Found:
        """What the row's heads say of one scan; only they run."""
        regions_1DHW = regions_1DHW if self.anatomy else None
        features = self.model.encode(intensity_11DHW, regions_1DHW)
        probability_K = masks_LDHW = None
        if "classification" in self.tasks:
            probability_K = self.model.classify(features)["probabilities"][0]
        if "localization" in self.tasks:
            drawn = self.model.localize(intensity_11DHW, regions_1DHW, features)
            masks_LDHW = drawn["mask_logits"][0].sigmoid()
        return Found(probability_K, masks_LDHW)
