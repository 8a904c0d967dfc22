"""Classifier and localizer decide together how sure a disease is, whether its lesion is drawn, and how much of it.

A classifier reads density and size well and misses what is small; a U-Net finds what is small and colors a little of it
into scans that have none. One logistic regression a disease weighs the two for its probability, another for whether a
mask is drawn. A mask is cut where its outline fits best, and pieces are left out whose voxels have a mean chance below a
half to be lesion. All of it is fitted on validation cases by ``vlm3d tune`` (docs/decisions/0011).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlm3d.anatomy.measurement import bounding_box, unsure_pieces
from vlm3d.labels import DISEASE_NAMES, IMPLIED, STORED_LESION_KEYS, Lesion

LOGIT_REACH = 8.0
"""Logits of masks are told apart between minus this and this."""
RIM_VOXELS = 4
"""How far around a piece that is left out its lower probabilities go with it."""
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
        """Of the disease, from the classifier's logit and the peaks by lesion key."""
        odds = self.offset + self.classifier * logit + sum(w * peaks[key] for key, w in self.masks.items())
        return 1.0 / (1.0 + math.exp(-min(max(odds, -50.0), 50.0)))


@dataclass(frozen=True)
class Presence:
    """Whether a scan has a lesion: log-odds of ``offset + classifier * logit + mask * dice_odds(expected Dice)``.

    Attributes:
        classifier: Weight of the classifier's logit of the disease.
        mask: Weight of the log-odds of the Dice that the mask expects of itself (`MaskRule.expected_dice`).
        offset: Added.
        dice_to_beat: Mean Dice that these chances promise over scans that have the lesion or have it drawn, where lesions
            that are missed and masks that are invented count 0.
    """

    classifier: float
    mask: float
    offset: float
    dice_to_beat: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Presence:
        """What `dataclasses.asdict` made of one; errors are those of `HeadFusion.from_json`."""
        classifier, mask, offset = (_number(values[name]) for name in ("classifier", "mask", "offset"))
        return cls(classifier, mask, offset, _share(values["dice_to_beat"]))

    def probability(self, logit: float, expected_dice: float) -> float:
        """That the scan has the lesion."""
        odds = self.offset + self.classifier * logit + self.mask * dice_odds(expected_dice)
        return 1.0 / (1.0 + math.exp(-min(max(odds, -50.0), 50.0)))

    def threshold(self, expected_dice: float) -> float:
        """Probability from which on drawing the mask raises the mean Dice.

        Drawn, it adds its Dice where the lesion is there; where it is not, it adds a scan that counts 0. With a
        probability p of the first the mean rises where ``p * expected_dice >= (1 - p) * dice_to_beat``.
        """
        both = self.dice_to_beat + expected_dice
        return self.dice_to_beat / both if both > 0 else 1.0


@dataclass(frozen=True)
class MaskRule:
    """Where a lesion's mask is cut, and what of it is drawn.

    Attributes:
        cut: Logit from which on a voxel is lesion.
        chance_slope: See `chance_offset`.
        chance_offset: A voxel of logit ``x`` is lesion with log-odds of ``chance_offset + chance_slope * x``: a U-Net that
            learned from boxes around lesions is surer of itself than it is right.
        min_piece_chance: Pieces whose voxels have a lower mean chance to be lesion are left out.
        presence: Whether the scan has the lesion; None: nothing is left out for that.
    """

    cut: float
    chance_slope: float
    chance_offset: float
    min_piece_chance: float = 0.0
    presence: Presence | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MaskRule:
        """What `dataclasses.asdict` made of one; errors are those of `HeadFusion.from_json`."""
        presence = values["presence"]
        return cls(
            cut=_number(values["cut"]),
            chance_slope=_number(values["chance_slope"]),
            chance_offset=_number(values["chance_offset"]),
            min_piece_chance=_share(values["min_piece_chance"]),
            presence=None if presence is None else Presence.from_json(presence),
        )

    def chance(self, logits: Tensor) -> Tensor:
        """Of voxels to be lesion, of any shape; logits beyond `LOGIT_REACH` count as its ends."""
        odds = self.chance_offset + self.chance_slope * logits.float().clamp(-LOGIT_REACH, LOGIT_REACH)
        return odds.sigmoid_()

    def expected_dice(self, chance_DHW: Tensor, drawn_DHW: Tensor) -> float:
        """Dice that a mask expects: twice the lesion expected in it, over its voxels plus the lesion expected anywhere.

        The ratio of both expectations, which is near the expectation of the ratio where a lesion has many voxels; 0 where
        nothing is drawn.
        """
        voxels = float(drawn_DHW.sum())
        if not voxels:
            return 0.0
        inside = float(chance_DHW[drawn_DHW].sum(dtype=torch.float64))
        return 2 * inside / (voxels + float(chance_DHW.sum(dtype=torch.float64)))


@dataclass(frozen=True)
class HeadFusion:
    """How the heads are weighed, kept beside the weights that it was fitted for.

    Attributes:
        diseases: Disease -> its mix; others keep the classifier's probability.
        masks: Lesion key -> its rule; others are cut at 0 and always drawn.
    """

    diseases: Mapping[str, Mix]
    masks: Mapping[str, MaskRule]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadFusion:
        """What `dataclasses.asdict` made of one.

        Raises:
            KeyError: A part is missing.
            AttributeError, TypeError: A part is of another kind.
            ValueError: A name is unknown, or a number is none or out of range.
        """
        fusion = cls(
            {name: Mix.from_json(mix) for name, mix in values["diseases"].items()},
            {key: MaskRule.from_json(rule) for key, rule in values["masks"].items()},
        )
        keys = {key for mix in fusion.diseases.values() for key in mix.masks} | set(fusion.masks)
        if not (set(fusion.diseases) <= set(DISEASE_NAMES) and keys <= set(STORED_LESION_KEYS)):
            raise ValueError("a disease or a lesion is unknown")
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


def shown_by(disease: str, lesions: Sequence[Lesion]) -> list[str]:
    """Keys of the lesions that show a disease, or one that implies it: a consolidation is a lung opacity too."""
    return [lesion.key for lesion in lesions if disease in (lesion.disease, IMPLIED.get(lesion.disease))]


def mask_peaks(mask_logits_LDHW: Tensor) -> Tensor:
    """How surely each mask shows anything (L,): mean of its `PEAK_VOXELS` highest logits."""
    flat_LV = mask_logits_LDHW.flatten(1)
    return flat_LV.float().topk(min(PEAK_VOXELS, flat_LV.shape[1]), dim=1).values.mean(dim=1)


def dice_odds(expected_dice: Any) -> Any:
    """Log-odds of a Dice or of an array of them, within reach of a regression."""
    dice = np.clip(expected_dice, 1e-4, 1 - 1e-4)
    return np.log(dice / (1 - dice))


@dataclass(frozen=True)
class MaskDecision:
    """Why a lesion is drawn or not.

    Attributes:
        expected_dice: `MaskRule.expected_dice` of its mask, before any piece is left out.
        presence: Probability that the scan has it; None where none was fitted.
        presence_threshold: From which it is drawn.
    """

    expected_dice: float
    presence: float | None = None
    presence_threshold: float | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether the scan is thought to have the lesion."""
        return (
            self.presence is None
            or self.presence_threshold is None
            or self.presence >= self.presence_threshold
        )


def draw_lesions(
    mask_logits_LDHW: Tensor, lesions: Sequence[Lesion], odds: HeadOdds, fusion: HeadFusion | None
) -> tuple[Tensor, dict[str, MaskDecision]]:
    """Cut each mask, and leave out what is not thought to be there.

    Returns:
        Probability of each voxel (L, D, H, W), 0.5 where the mask is cut and 0 in and around what is left out; and why, by
        the key of each lesion that has a rule.
    """
    rules = {} if fusion is None else fusion.masks
    cuts = [rules[lesion.key].cut if lesion.key in rules else 0.0 for lesion in lesions]
    cut_L = torch.tensor(cuts, device=mask_logits_LDHW.device)
    probability_LDHW = (mask_logits_LDHW.float() - cut_L[:, None, None, None]).sigmoid_()
    decisions: dict[str, MaskDecision] = {}
    for lesion, logits_DHW, probability_DHW in zip(lesions, mask_logits_LDHW, probability_LDHW, strict=True):
        if (rule := rules.get(lesion.key)) is None:
            continue
        drawn_DHW, chance_DHW = probability_DHW >= 0.5, rule.chance(logits_DHW)
        expected = rule.expected_dice(chance_DHW, drawn_DHW)
        decision = MaskDecision(expected)
        if rule.presence is not None:
            presence = rule.presence.probability(odds.logits[lesion.disease], expected)
            decision = MaskDecision(expected, presence, rule.presence.threshold(expected))
        decisions[lesion.key] = decision
        if not decision.is_drawn:
            probability_DHW.zero_()
        elif rule.min_piece_chance > 0:
            _leave_out_unsure(probability_DHW, drawn_DHW, chance_DHW, rule.min_piece_chance)
    return probability_LDHW, decisions


def _leave_out_unsure(
    probability_DHW: Tensor, drawn_DHW: Tensor, chance_DHW: Tensor, min_chance: float
) -> None:
    """Set pieces of a low mean chance to 0, with the rim around them that would show at a lower threshold."""
    unsure = unsure_pieces(drawn_DHW.cpu().numpy(), chance_DHW.cpu().numpy(), min_chance)
    box = bounding_box(unsure)
    if box is None:
        return
    unsure_DHW = torch.from_numpy(unsure).to(drawn_DHW.device)
    kept_DHW = drawn_DHW & ~unsure_DHW
    if not kept_DHW.any():
        probability_DHW.zero_()
        return
    near = tuple(slice(max(0, side.start - 2 * RIM_VOXELS), side.stop + 2 * RIM_VOXELS) for side in box)
    rim_DHW = _grown(unsure_DHW[near]) & ~_grown(kept_DHW[near])
    probability_DHW[near].masked_fill_(rim_DHW | unsure_DHW[near], 0.0)


def _grown(mask_DHW: Tensor) -> Tensor:
    """A mask and what lies within `RIM_VOXELS` of it along every axis."""
    grown = mask_DHW[None, None].float()
    for axis in range(3):
        size, padding = [1, 1, 1], [0, 0, 0]
        size[axis], padding[axis] = 2 * RIM_VOXELS + 1, RIM_VOXELS
        grown = functional.max_pool3d(grown, size, stride=1, padding=padding)
    return grown[0, 0] > 0


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("not a number")
    return float(value)


def _share(value: Any) -> float:
    if not 0 <= _number(value) <= 1:
        raise ValueError("not from 0 to 1")
    return float(value)
