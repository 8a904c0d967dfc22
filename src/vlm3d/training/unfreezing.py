"""Which parameters train at which step of a phase."""

from __future__ import annotations

from vlm3d.config import PhaseConfig
from vlm3d.model.multi_task_model import PARTS, VLM3DMultiTask


class GradualUnfreezing:
    """The parts that a phase trains, the encoder's last blocks before its first where the phase says so.

    Args:
        model: All of it is frozen but the parts of the phase.
        phase: Its ``parts``, ``train_prompts`` and ``unfreeze_blocks``.
    """

    def __init__(self, model: VLM3DMultiTask, phase: PhaseConfig) -> None:
        self._model = model
        self._phase = phase
        self._blocks: int | None = None
        model.freeze(*PARTS)
        model.unfreeze(*phase.parts)
        if not phase.train_prompts:
            model.classifier.soft_prompts.requires_grad_(False)

    def at(self, step: int) -> bool:
        """Let train what trains after so many steps; True where that changed something."""
        phase, model = self._phase, self._model
        if "vision" not in phase.parts or not phase.unfreeze_blocks:
            return False
        done = step / phase.steps
        blocks = max((count for share, count in phase.unfreeze_blocks if share <= done), default=0)
        if blocks == self._blocks:
            return False
        self._blocks = blocks
        if blocks >= len(model.vision_encoder.blocks):
            model.unfreeze("vision")
        elif blocks:
            model.unfreeze_last_blocks(blocks)
        else:
            model.freeze("vision")
        return True
