"""A contrastive model in the manner of CT-CLIP (Hamamci 2024): scans and their reports meet in one space.

It sees no label. A disease's probability is the softmax between 'X is present.' and 'X is not present.' Scans are padded to
one size, as CT-CLIP's are: the largest of the training scans.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from torch import Tensor, nn

from related_work_row import Found, Row
from vlm3d.config import Config
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.text_encoder import TextEncoder, load_text_encoder
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE
from vlm3d.training.data import Batch

SCANS_A_BATCH = 8
"""The other scans of a batch are what a report must not fit."""
PROMPTS = tuple(
    f"{name} is {is_present}." for is_present in ("present", "not present") for name in DISEASE_NAMES
)


class ContrastiveModel(Row):
    """MONAI's ViT, as wide and deep as our encoder, beside the frozen text encoder of the configuration.

    Args:
        config: Width, depth and heads of the encoder; the text encoder; the shared space.
        dataset: The training split, whose largest grid is the fixed size.
        text_encoder: A loaded one; the configured one by default.
    """

    def __init__(
        self, config: Config, dataset: PreparedDataset, text_encoder: TextEncoder | None = None
    ) -> None:
        super().__init__()
        phase = config.training.phases.classification
        self.phase = phase.model_copy(update={"batch_size": min(SCANS_A_BATCH, len(dataset))})
        self.peak_lr = phase.lr
        vision = config.model.vision
        depth, height, width = vision.patch_size
        patch = (2 * depth, height, width)  # nearer to a cube in mm, as CT-CLIP's patches are
        self.shape_DHW = tuple(
            -(-max(case.shape_DHW[axis] for case in dataset.cases) // patch[axis]) * patch[axis]
            for axis in range(3)
        )
        self.vit = ViT(
            1,
            self.shape_DHW,
            patch,
            hidden_size=vision.embed_dim,
            mlp_dim=round(vision.embed_dim * vision.mlp_ratio),
            num_layers=vision.depth,
            num_heads=vision.num_heads,
        )
        for block in self.vit.blocks:
            block.attn.use_flash_attention = True  # type: ignore[union-attr]
        encoder = text_encoder or load_text_encoder(config.model.classifier.text_encoder)
        self._text_encoder = [encoder]  # in a list, so that its frozen weights are not part of the row
        self._known_texts: dict[str, Tensor] = {}
        self.image_projection = nn.Linear(vision.embed_dim, config.model.classifier.shared_dim, bias=False)
        self.text_projection = nn.Linear(encoder.dim, config.model.classifier.shared_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(self, batch: Batch) -> Tensor:
        """Each scan must find its report among the batch's, and each report its scan (Radford 2021)."""
        told = [index for index, report in enumerate(batch.reports) if report.strip()]
        if not told:
            return self.log_scale * 0.0
        image_BS = self._image_features(batch.intensity_B1DHW[told])
        text_BS = self._text_features([batch.reports[index] for index in told])
        logits_BB = self._scale() * image_BS @ text_BS.T
        target_B = torch.arange(len(told))
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2

    def predict(self, intensity_11DHW: Tensor, regions_1DHW: Tensor | None) -> Found:
        """Which of each disease's two prompts the scan is nearer to."""
        similarity = self._scale() * self._image_features(intensity_11DHW) @ self._text_features(PROMPTS).T
        return Found(similarity.view(2, len(DISEASE_NAMES)).softmax(dim=0)[0])

    def _scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=100.0)

    def _image_features(self, intensity_B1DHW: Tensor) -> Tensor:
        tokens_BNC, _ = self.vit(fitted(intensity_B1DHW, self.shape_DHW))
        return F.normalize(self.image_projection(tokens_BNC.mean(dim=1)), dim=-1)

    def _text_features(self, texts: list[str] | tuple[str, ...]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known_texts]
        if new:
            self._known_texts |= dict(zip(new, self._text_encoder[0].encode(new).clone(), strict=True))
        text_BT = torch.stack([self._known_texts[text] for text in texts])
        return F.normalize(self.text_projection(text_BT), dim=-1)


def fitted(intensity_B1DHW: Tensor, shape_DHW: tuple[int, ...]) -> Tensor:
    """Pad with air, or crop, on both sides alike, to a fixed size."""
    pads = [wanted - found for wanted, found in zip(shape_DHW, intensity_B1DHW.shape[2:], strict=True)]
    both_sides = [side for pad in reversed(pads) for side in (pad // 2, pad - pad // 2)]
    return F.pad(intensity_B1DHW, both_sides, value=OUTSIDE_VALUE)
