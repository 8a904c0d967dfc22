"""Fit how heads are weighed and masks are drawn (`vlm3d.model.head_fusion`) on cases that trained neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.evaluation.ranking import Floats
from vlm3d.labels import Lesion
from vlm3d.model.head_fusion import LOGIT_REACH, HeadFusion, MaskRule, Mix, Presence, dice_odds, shown_by

RIDGE = 1.0
"""Penalty on half the squared weights of standardized features, beside the sum of the cases' losses."""
MIN_OF_EACH = 5
"""Cases with and without a finding below which nothing is fitted: the heads then speak for themselves."""

MIN_PIECE_CHANCE = 0.5
"""Pieces are left out whose voxels have a lower mean chance to be lesion."""
MASK_VARIATIONS = 1
"""How often a validation scan is varied, as in training, for the masks' rules, beside the scan itself."""
MASK_CUTS: Floats = np.arange(-4 * LOGIT_REACH, 4 * LOGIT_REACH + 1) / 4
"""Logits (C,) at which a mask may be cut."""
BIN_CENTERS: Floats = np.r_[-LOGIT_REACH, (MASK_CUTS[:-1] + MASK_CUTS[1:]) / 2, LOGIT_REACH]
"""Logits (C + 1,) that stand for the voxels between two cuts, and beyond the first and the last."""


def fit_logistic(
    feature_NF: Floats, label_N: NDArray[Any], weight_N: Floats | None = None, ridge: float = RIDGE
) -> Floats:
    """Weights and, last, offset (F + 1,) of a ridge-penalized logistic regression, by Newton's method.

    The penalty is on the weights of features scaled to unit variance; the offset is free.

    Args:
        feature_NF: One row an observation.
        label_N: Whether each is positive, or the share of positives among equal ones.
        weight_N: How many equal ones each row stands for; 1 by default.
        ridge: Penalty.
    """
    weight_N = np.ones(len(feature_NF)) if weight_N is None else weight_N
    mean_F, scale_F = feature_NF.mean(axis=0), feature_NF.std(axis=0)
    scale_F = np.where(scale_F > 1e-9, scale_F, 1.0)
    design = np.c_[(feature_NF - mean_F) / scale_F, np.ones(len(feature_NF))]
    penalty = np.r_[np.full(feature_NF.shape[1], ridge), 1e-6]
    weight = np.zeros(design.shape[1])
    for _ in range(50):
        odds_N = np.clip(design @ weight, -30, 30)
        p_N = 1 / (1 + np.exp(-odds_N))
        gradient = design.T @ (weight_N * (p_N - label_N)) + penalty * weight
        hessian = (design * (weight_N * p_N * (1 - p_N))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        weight -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    weight_F = weight[:-1] / scale_F
    return np.r_[weight_F, weight[-1] - weight_F @ mean_F]


@dataclass(frozen=True)
class MaskCounts:
    """How the logits of one mask are spread, over all voxels and over those of the lesion.

    Bin 0 lies under the first of `MASK_CUTS`, bin c from cut c - 1 up to cut c, the last one from the last cut up.

    Attributes:
        voxels_B: Of the scan (C + 1,).
        lesion_B: Of these, lesion.
    """

    voxels_B: Floats
    lesion_B: Floats

    @classmethod
    def of(cls, mask_logits_DHW: Tensor, true_DHW: NDArray[np.bool_]) -> MaskCounts:
        """Count one mask's logits."""
        cuts = torch.from_numpy(MASK_CUTS).to(mask_logits_DHW)
        bins = torch.bucketize(mask_logits_DHW.contiguous(), cuts, right=True, out_int32=True).flatten()
        lesion = bins[torch.from_numpy(true_DHW).flatten().to(bins.device)]
        voxels_B, lesion_B = (
            torch.bincount(part, minlength=len(cuts) + 1).cpu().double().numpy() for part in (bins, lesion)
        )
        return cls(voxels_B, lesion_B)

    @property
    def has_lesion(self) -> bool:
        """Whether the scan has the lesion."""
        return bool(self.lesion_B.any())

    def dice(self) -> Floats:
        """Dice (C,) of the mask at each cut; NaN where mask and truth are empty."""
        drawn_C, hit_C = _from_cut_on(self.voxels_B), _from_cut_on(self.lesion_B)
        total_C = drawn_C + self.lesion_B.sum()
        return np.where(total_C > 0, 2 * hit_C / np.maximum(total_C, 1), np.nan)

    def expected_dice(self, chance_B: Floats, cut: int) -> float:
        """`MaskRule.expected_dice` at cut number ``cut``, from the chance of each bin's voxels."""
        drawn = _from_cut_on(self.voxels_B)[cut]
        expected_B = self.voxels_B * chance_B
        return float(2 * _from_cut_on(expected_B)[cut] / (drawn + expected_B.sum())) if drawn else 0.0


def _from_cut_on(bins_B: Floats) -> Floats:
    """What lies at or above each cut (C,)."""
    return bins_B[::-1].cumsum()[::-1][1:]


@dataclass(frozen=True)
class MaskScan:
    """One lesion in a scan where it is annotated.

    Attributes:
        logit: The classifier's, of the lesion's disease.
        counts: Of the mask.
        varied: Whether the scan is a variation of a stored one.
    """

    logit: float
    counts: MaskCounts
    varied: bool = False


def fit_mask_rule(scans: Sequence[MaskScan]) -> MaskRule | None:
    """Where to cut a lesion's mask, with the highest mean Dice over the scans that have it, and what of it to draw.

    Args:
        scans: With and without the lesion.

    Returns:
        None with fewer than `MIN_OF_EACH` stored scans with the lesion. With fewer without it, its presence is not fitted.
        Pieces are left out only where the voxels drawn are lesion more often than not: a mask that is mostly wrong would
        lose what it has.
    """
    counts, stored_N = [scan.counts for scan in scans], np.array([not scan.varied for scan in scans], bool)
    has_N = np.array([of_scan.has_lesion for of_scan in counts], bool)
    if (has_N & stored_N).sum() < MIN_OF_EACH:
        return None
    dice_NC = np.stack([of_scan.dice() for of_scan in counts])
    mean_C = dice_NC[has_N].mean(axis=0)
    best = np.flatnonzero(np.isclose(mean_C, mean_C.max(), rtol=0, atol=1e-12))
    cut = int(best[np.argmin(np.abs(MASK_CUTS[best]))])
    voxels_B = np.sum([of_scan.voxels_B for of_scan in counts], axis=0)
    lesion_B = np.sum([of_scan.lesion_B for of_scan in counts], axis=0)
    slope, offset = fit_logistic(BIN_CENTERS[:, None], lesion_B / np.maximum(voxels_B, 1), voxels_B).tolist()
    rule = MaskRule(float(MASK_CUTS[cut]), slope, offset)
    if 2 * lesion_B[cut + 1 :].sum() >= voxels_B[cut + 1 :].sum() > 0:
        rule = replace(rule, min_piece_chance=MIN_PIECE_CHANCE)
    if (~has_N & stored_N).sum() < MIN_OF_EACH:
        return rule
    chance_B = rule.chance(torch.from_numpy(BIN_CENTERS)).double().numpy()
    expected_N = np.array([of_scan.expected_dice(chance_B, cut) for of_scan in counts])
    return replace(rule, presence=fit_presence(np.array([scan.logit for scan in scans]), expected_N, has_N))


def fit_presence(logit_N: Floats, expected_N: Floats, has_N: NDArray[np.bool_]) -> Presence:
    """When to draw a lesion.

    Args:
        logit_N: The classifier's, of the lesion's disease.
        expected_N: Dice that each mask expects.
        has_N: Whether the scan has the lesion.
    """
    classifier, mask, offset = fit_logistic(
        np.stack([logit_N, dice_odds(expected_N)], axis=1), has_N
    ).tolist()
    presence = Presence(classifier, mask, offset, 0.0)
    p_N = np.array([presence.probability(*pair) for pair in zip(logit_N, expected_N, strict=True)])
    while True:  # Dinkelbach's iteration: rises to the highest mean Dice that these chances allow
        drawn_N = (p_N * expected_N >= (1 - p_N) * presence.dice_to_beat) & (expected_N > 0)
        counted = (p_N + (1 - p_N) * drawn_N).sum()
        mean_dice = float((p_N * expected_N)[drawn_N].sum() / counted)
        if not mean_dice > presence.dice_to_beat + 1e-9:  # of numbers that are none, too
            return presence
        presence = replace(presence, dice_to_beat=mean_dice)


def fit_fusion(
    logits: Mapping[str, Floats],
    peaks: Mapping[str, Floats],
    labels: Mapping[str, Floats],
    scans: Mapping[str, Sequence[MaskScan]],
    lesions: Sequence[Lesion],
) -> HeadFusion | None:
    """Fit the diseases that masks show, and each mask's outline and from when on it is drawn.

    Args:
        logits: Disease -> the classifier's, one a case (N,).
        peaks: Lesion key -> `mask_peaks`, (N,).
        labels: Disease -> 0, 1 or NaN, (N,).
        scans: Lesion key -> each scan in which it is annotated.
        lesions: Those of the masks.

    Returns:
        None where nothing has enough cases.
    """
    diseases = {
        name: mix
        for name in logits
        if (mix := _fit(logits[name], {key: peaks[key] for key in shown_by(name, lesions)}, labels[name]))
    }
    masks = {key: rule for key, with_masks in scans.items() if (rule := fit_mask_rule(with_masks))}
    return HeadFusion(diseases, masks) if diseases or masks else None


def _fit(logit_N: Floats, peaks: Mapping[str, Floats], label_N: Floats) -> Mix | None:
    """None for a disease that no mask shows, and where too few cases have or lack it."""
    known_N = ~np.isnan(label_N)
    true_N = label_N[known_N] > 0.5
    if not peaks or min(true_N.sum(), (~true_N).sum()) < MIN_OF_EACH:
        return None
    feature_NF = np.stack([logit_N, *peaks.values()], axis=1)[known_N]
    classifier, *masks, offset = fit_logistic(feature_NF, true_N).tolist()
    return Mix(classifier, dict(zip(peaks, masks, strict=True)), offset)
