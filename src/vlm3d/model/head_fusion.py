"""Classifier and localizer decide together: how sure a disease is, and whether its lesion is drawn at all.

A classifier reads density and size well and misses what is small; a U-Net finds what is small and colors a little of it
into scans that have none. A logistic regression a disease and a lesion, fitted on validation cases by ``vlm3d tune``,
weighs the two, and each mask is cut where its outline fits best there (docs/decisions/0011).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm3d.labels import DISEASE_NAMES, IMPLIED, STORED_LESION_KEYS, Lesion

PEAK_VOXELS = 8
"""Voxels of a mask whose mean log-odds tell how surely it shows anything: the volume of a nodule of 5 to 6 mm."""


@dataclass(frozen=True)
class Mix:
    """One log-odds: ``offset + classifier * logit + sum of masks[key] * peak[key]``.

    Attributes:
        classifier: Weight of the classifier's logit of the disease.
        masks: Lesion key -> weight of its mask's peak (`mask_peaks`).
        offset: Added.
    """

    classifier: float
    masks: Mapping[str, float]
    offset: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Mix:
        """What `dataclasses.asdict` made of one; errors are those of `HeadFusion.from_json`."""
        masks = {key: _number(weight) for key, weight in values["masks"].items()}
        return cls(_number(values["classifier"]), masks, _number(values["offset"]))

    def probability(self, logit: float, peaks: Mapping[str, float]) -> float:
        """Of the disease or lesion, from the classifier's logit and the peaks by lesion key."""
        odds = self.offset + self.classifier * logit + sum(w * peaks[key] for key, w in self.masks.items())
        return 1.0 / (1.0 + math.exp(-min(max(odds, -50.0), 50.0)))


@dataclass(frozen=True)
class HeadFusion:
    """How the heads are weighed, kept beside the weights that it was fitted for.

    Attributes:
        diseases: Disease -> its mix; others keep the classifier's probability.
        lesions: Lesion key -> the mix that tells whether a scan has it; others are always drawn.
        lesion_thresholds: Lesion key -> probability from which it is drawn.
        mask_offsets: Lesion key -> added to the logits of its mask, so that a voxel of 0.5 is where its outline fits best.
    """

    diseases: Mapping[str, Mix]
    lesions: Mapping[str, Mix]
    lesion_thresholds: Mapping[str, float]
    mask_offsets: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadFusion:
        """What `dataclasses.asdict` made of one.

        Raises:
            KeyError: A part is missing.
            TypeError: A part is of another kind.
            ValueError: A name is unknown, or a number is none.
        """
        fusion = cls(
            {name: Mix.from_json(mix) for name, mix in values["diseases"].items()},
            {key: Mix.from_json(mix) for key, mix in values["lesions"].items()},
            {key: _number(value) for key, value in values["lesion_thresholds"].items()},
            {key: _number(value) for key, value in values.get("mask_offsets", {}).items()},
        )
        keys = {key for mix in (*fusion.diseases.values(), *fusion.lesions.values()) for key in mix.masks}
        keys |= set(fusion.mask_offsets)
        if not (set(fusion.diseases) <= set(DISEASE_NAMES) and keys <= set(STORED_LESION_KEYS)):
            raise ValueError("a disease or a lesion is unknown")
        if set(fusion.lesions) != set(fusion.lesion_thresholds) or not set(fusion.lesions) <= set(
            STORED_LESION_KEYS
        ):
            raise ValueError("lesions and their thresholds differ")
        return fusion


@dataclass(frozen=True)
class HeadOdds:
    """What the heads say of one scan, each for itself.

    Attributes:
        logits: Disease -> the classifier's logit.
        peaks: Lesion key -> `mask_peaks`; empty where no mask was drawn.
    """

    logits: Mapping[str, float]
    peaks: Mapping[str, float]

    @classmethod
    def of(
        cls,
        logits_K: Tensor,
        disease_names: Sequence[str],
        mask_logits_LDHW: Tensor | None,
        lesions: Sequence[Lesion],
    ) -> HeadOdds:
        """From the heads' outputs for one scan, with the names of both."""
        peaks: dict[str, float] = {}
        if mask_logits_LDHW is not None:
            keys = [lesion.key for lesion in lesions]
            peaks = dict(zip(keys, mask_peaks(mask_logits_LDHW).tolist(), strict=True))
        return cls(dict(zip(disease_names, logits_K.double().tolist(), strict=True)), peaks)

    def probabilities(self, fusion: HeadFusion | None) -> dict[str, float]:
        """Probability of each disease; without a fusion the classifier's own."""
        own = Mix(1.0, {}, 0.0)
        mixes = {} if fusion is None else fusion.diseases
        return {
            name: mixes.get(name, own).probability(logit, self.peaks) for name, logit in self.logits.items()
        }

    def presence(self, lesions: Sequence[Lesion], fusion: HeadFusion | None) -> dict[str, float]:
        """Lesion key -> probability that the scan has it, for the lesions that a fusion tells of."""
        mixes = {} if fusion is None else fusion.lesions
        return {
            lesion.key: mixes[lesion.key].probability(self.logits[lesion.disease], self.peaks)
            for lesion in lesions
            if lesion.key in mixes
        }


def shown_by(disease: str, lesions: Sequence[Lesion]) -> list[str]:
    """Keys of the lesions that show a disease, or one that implies it: a consolidation is a lung opacity too."""
    return [lesion.key for lesion in lesions if disease in (lesion.disease, IMPLIED.get(lesion.disease))]


def mask_peaks(mask_logits_LDHW: Tensor) -> Tensor:
    """How surely each mask shows anything (L,): mean of its `PEAK_VOXELS` highest logits."""
    flat_LV = mask_logits_LDHW.flatten(1)
    return flat_LV.float().topk(min(PEAK_VOXELS, flat_LV.shape[1]), dim=1).values.mean(dim=1)


def drawn_probability(
    mask_logits_LDHW: Tensor, lesions: Sequence[Lesion], odds: HeadOdds, fusion: HeadFusion | None
) -> Tensor:
    """Probability of each voxel (L, D, H, W); 0 throughout a lesion that the scan is not thought to have."""
    if fusion is None:
        return mask_logits_LDHW.float().sigmoid()
    offsets = [fusion.mask_offsets.get(lesion.key, 0.0) for lesion in lesions]
    offset_L = torch.tensor(offsets, device=mask_logits_LDHW.device)
    probability_LDHW = (mask_logits_LDHW + offset_L[:, None, None, None]).sigmoid_()
    presence = odds.presence(lesions, fusion)
    for lesion, probability_DHW in zip(lesions, probability_LDHW, strict=True):
        if lesion.key in presence and presence[lesion.key] < fusion.lesion_thresholds[lesion.key]:
            probability_DHW.zero_()
    return probability_LDHW


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("not a number")
    return float(value)
