"""Convolutional classifiers: slices read one after the other, and the whole volume at once.

Both are MONAI's ResNet-18 with group norms, since two scans are too few for the statistics of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.nets import ResNet
from torch import Tensor, nn

from related_work_row import Found, Row
from vlm3d.config import Config
from vlm3d.labels import DISEASE_NAMES
from vlm3d.losses import classification_loss
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE
from vlm3d.training.data import Batch

SLICES_A_PICTURE = 3
WIDTHS = [64, 128, 256, 512]
_LSTM_WIDTH = 256


def resnet18(spatial_dims: int, channels: int, classes: int | None) -> nn.Module:
    """ResNet-18 (He 2016) in two or three dimensions; without classes it gives 512 features."""
    network: nn.Module = ResNet(
        "basic",
        [2, 2, 2, 2],
        WIDTHS,
        spatial_dims=spatial_dims,
        n_input_channels=channels,
        conv1_t_stride=2,
        num_classes=classes or 1,
        feed_forward=classes is not None,
        norm=("group", {"num_groups": 8}),
    )
    return network


class Classifier(Row):
    """A row that only classifies; `logits_BK` is what its kinds differ in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.phase = config.training.phases.classification
        self.peak_lr = self.phase.lr

    def logits_BK(self, intensity_B1DHW: Tensor) -> Tensor:
        """Logits of the 18 diseases."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Binary cross-entropy over the known labels."""
        return classification_loss(self.logits_BK(batch.intensity_B1DHW), batch.labels_BK)

    def predict(self, intensity_11DHW: Tensor, regions_1DHW: Tensor | None) -> Found:
        """Probabilities of one scan."""
        return Found(self.logits_BK(intensity_11DHW)[0].sigmoid())


class VolumeCNN(Classifier):
    """A 3D CNN: one ResNet-18 over the whole volume."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network = resnet18(3, 1, len(DISEASE_NAMES))

    def logits_BK(self, intensity_B1DHW: Tensor) -> Tensor:
        logits: Tensor = self.network(intensity_B1DHW)
        return logits


class SliceCNN(Classifier):
    """A 2D CNN and an LSTM: a ResNet-18 reads pictures of three neighboring slices, an LSTM goes through them both ways.

    The largest of each feature over the pictures is what the last layer sees.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network = resnet18(2, SLICES_A_PICTURE, None)
        self.lstm = nn.LSTM(WIDTHS[-1], _LSTM_WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * _LSTM_WIDTH, len(DISEASE_NAMES))

    def logits_BK(self, intensity_B1DHW: Tensor) -> Tensor:
        depth = intensity_B1DHW.shape[2]
        missing = -depth % SLICES_A_PICTURE
        padded_BDHW = F.pad(intensity_B1DHW[:, 0], (0, 0, 0, 0, 0, missing), value=OUTSIDE_VALUE)
        pictures = padded_BDHW.unflatten(1, (-1, SLICES_A_PICTURE))
        features_BSF = self.network(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        states_BSF, _ = self.lstm(features_BSF)
        logits: Tensor = self.head(torch.amax(states_BSF, dim=1))
        return logits
