"""One scan through encoder, classifier and localizer, before the two are weighed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.head_fusion import HeadOdds
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.vision_encoder import VisionFeatures

Stage = Callable[[str], AbstractContextManager[object]]
"""Entered under the name of each stage, such as a stopwatch."""


@dataclass(frozen=True)
class HeadReading:
    """What the heads say of one scan.

    Attributes:
        features: Of the scan; batch of one.
        odds: Each head for itself.
        seen_KZYX: How much the classifier looked at each patch for each disease.
        mask_logits_LDHW: On the model's grid; None where no mask was asked for.
    """

    features: VisionFeatures
    odds: HeadOdds
    seen_KZYX: Tensor
    mask_logits_LDHW: Tensor | None


def read_heads(
    model: VLM3DMultiTask,
    intensity_11DHW: Tensor,
    regions_1DHW: Tensor | None,
    *,
    masks: bool = True,
    stage: Stage = lambda _: nullcontext(),
) -> HeadReading:
    """Encode, classify and localize one scan; the model's mode is left as it was.

    Args:
        model: On the tensors' device.
        intensity_11DHW: In -1..1.
        regions_1DHW: Region ids, or None.
        masks: Whether the localizer runs.
        stage: Entered for ``encode``, ``classify`` and ``localize``.
    """
    with evaluating(model):
        with stage("encode"):
            features = model.encode(intensity_11DHW, regions_1DHW)
        with stage("classify"):
            classified = model.classify(features)
        mask_logits_LDHW = None
        if masks:
            with stage("localize"):
                mask_logits_LDHW = model.read_masks(intensity_11DHW, regions_1DHW, features)[0]
    odds = HeadOdds.of(classified["logits"][0], model.disease_names, mask_logits_LDHW, model.lesions)
    return HeadReading(features, odds, classified["seen"][0], mask_logits_LDHW)
