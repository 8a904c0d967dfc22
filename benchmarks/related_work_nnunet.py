"""nnU-Net's plain network, which draws lesions and nothing else.

Patch, loss and boxes are the localizer's own; what nnU-Net's planner would choose for that patch is chosen here by its
rule (Isensee 2021): an axis is halved while it stays at least 4 voxels long and its voxels are no more than twice as long
as the finest. Lesions may overlap, so each has a sigmoid of its own, as in nnU-Net's training on regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.inferers import sliding_window_inference
from torch import Tensor

from related_work_row import Found, Row
from vlm3d.config import Config
from vlm3d.labels import LESION_KEYS
from vlm3d.losses import MultiTaskLoss
from vlm3d.model.patch_embedding import cut_boxes
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE
from vlm3d.training.data import Batch

WINDOW_OVERLAP = 0.5
"""Of neighboring windows at prediction, nnU-Net's usual."""
_SHORTEST_EDGE, _MOST_STAGES, BASE_WIDTH, LARGEST_WIDTH = 4, 6, 32, 320


def planned_strides(patch_DHW: Sequence[int], spacing_mm: Sequence[float]) -> list[tuple[int, ...]]:
    """Strides of each stage from full resolution down, by nnU-Net's rule."""
    size, spacing = list(patch_DHW), list(spacing_mm)
    strides: list[tuple[int, ...]] = [(1, 1, 1)]
    while len(strides) < _MOST_STAGES:
        long_enough = [axis for axis in range(3) if size[axis] >= 2 * _SHORTEST_EDGE and size[axis] % 2 == 0]
        if not long_enough:
            break
        finest = min(spacing[axis] for axis in long_enough)
        stride = tuple(2 if axis in long_enough and spacing[axis] <= 2 * finest else 1 for axis in range(3))
        strides.append(stride)
        size = [length // step for length, step in zip(size, stride, strict=True)]
        spacing = [length * step for length, step in zip(spacing, stride, strict=True)]
    return strides


def plain_network(strides: Sequence[tuple[int, ...]], classes: int) -> Any:
    """nnU-Net's plain network with masks at several scales in training."""
    widths = [min(BASE_WIDTH * 2**stage, LARGEST_WIDTH) for stage in range(len(strides))]
    return PlainConvUNet(
        input_channels=1,
        n_stages=len(strides),
        features_per_stage=widths,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=list(strides),
        n_conv_per_stage=2,
        num_classes=classes,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


class PlainNNUNet(Row):
    """nnU-Net's network on boxes while training, in overlapping windows at prediction.

    Args:
        config: Its localization phase names the box.
        overlap: Of neighboring windows.
    """

    def __init__(self, config: Config, overlap: float = WINDOW_OVERLAP) -> None:
        super().__init__()
        self.phase = config.training.phases.localization
        self.peak_lr = self.phase.lr
        self.patch_size = config.model.vision.patch_size
        self.window_DHW = (
            self.phase.scan_crop or self.phase.localization_crop or config.preprocessing.max_shape
        )
        self.overlap = overlap
        self.network = plain_network(
            planned_strides(self.window_DHW, config.preprocessing.spacing_mm), len(LESION_KEYS)
        )
        # Dice and cross-entropy at every scale, halved from scale to scale; what belongs to text and patches is off.
        self.multi_scale_loss = MultiTaskLoss(
            weight_localization=1.0, text_alignment_weight=0.0, consistency_weight=0.0
        )

    def train(self, mode: bool = True) -> PlainNNUNet:
        """Coarser masks are drawn in training only."""
        self.network.decoder.deep_supervision = mode
        super().train(mode)
        return self

    def loss(self, batch: Batch) -> Tensor:
        """Dice and cross-entropy within the batch's boxes."""
        intensity, masks = batch.intensity_B1DHW, batch.masks_BLDHW
        if batch.boxes is not None:
            intensity = cut_boxes(intensity, batch.boxes, self.patch_size)
            masks = cut_boxes(masks, batch.boxes, self.patch_size)
        finest, *coarser = self.network(grown(intensity, self.window_DHW, OUTSIDE_VALUE))
        masks = grown(masks, self.window_DHW, 0)
        outputs = {
            "localization": {"mask_logits": finest, "coarser_logits": coarser, "patch_similarity": None}
        }
        total: Tensor = self.multi_scale_loss(outputs, {"lesion_masks": masks})["total"]
        return total

    def predict(self, intensity_11DHW: Tensor, regions_1DHW: Tensor | None) -> Found:
        """Masks of one scan; windows are joined by Gaussian weights."""
        logits = sliding_window_inference(
            intensity_11DHW,
            self.window_DHW,
            sw_batch_size=1,
            predictor=self.network,
            overlap=self.overlap,
            mode="gaussian",
            padding_mode="constant",
            cval=OUTSIDE_VALUE,
        )
        assert isinstance(logits, Tensor)
        return Found(mask_probability_LDHW=logits[0].sigmoid())


def grown(volume_BCDHW: Tensor, shape_DHW: Sequence[int], value: float) -> Tensor:
    """Fill up at the ends to a size at least; a scan smaller than the window has smaller boxes."""
    missing = [
        max(wanted - found, 0) for wanted, found in zip(shape_DHW, volume_BCDHW.shape[2:], strict=True)
    ]
    return F.pad(volume_BCDHW, [side for pad in reversed(missing) for side in (0, pad)], value=value)
