"""Fit how classifier and localizer are weighed (`vlm3d.model.head_fusion`) on cases that trained neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm3d.evaluation.ranking import Floats
from vlm3d.evaluation.thresholds import best_cut, every_cut
from vlm3d.labels import Lesion
from vlm3d.model.head_fusion import HeadFusion, Mix, shown_by

RIDGE = 1.0
"""Penalty on half the squared weights of standardized features, beside the sum of the cases' losses."""
MIN_OF_EACH = 5
"""Cases with and without a finding below which nothing is fitted: the heads then speak for themselves."""

MASK_CUTS: Floats = np.arange(-16, 17) / 2
"""Logits at which a mask may be cut."""


def fit_logistic(feature_NF: Floats, label_N: NDArray[np.bool_], ridge: float = RIDGE) -> Floats:
    """Weights and, last, offset (F + 1,) of a ridge-penalized logistic regression, by Newton's method.

    The penalty is on the weights of features scaled to unit variance; the offset is free.
    """
    mean_F, scale_F = feature_NF.mean(axis=0), feature_NF.std(axis=0)
    scale_F = np.where(scale_F > 1e-9, scale_F, 1.0)
    design = np.c_[(feature_NF - mean_F) / scale_F, np.ones(len(feature_NF))]
    penalty = np.r_[np.full(feature_NF.shape[1], ridge), 1e-6]
    weight = np.zeros(design.shape[1])
    for _ in range(50):
        odds_N = np.clip(design @ weight, -30, 30)
        p_N = 1 / (1 + np.exp(-odds_N))
        gradient = design.T @ (p_N - label_N) + penalty * weight
        hessian = (design * (p_N * (1 - p_N))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        weight -= np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    weight_F = weight[:-1] / scale_F
    return np.r_[weight_F, weight[-1] - weight_F @ mean_F]


def dice_at_cuts(mask_logits_DHW: Tensor, true_DHW: NDArray[np.bool_]) -> Floats:
    """Dice (C,) of a mask cut at each of `MASK_CUTS`; NaN where mask and truth are empty."""
    cuts = torch.from_numpy(MASK_CUTS).to(mask_logits_DHW)
    reached = torch.bucketize(mask_logits_DHW.contiguous(), cuts, right=True).flatten()
    hit = reached[torch.from_numpy(true_DHW).flatten().to(reached.device)]

    def voxels_from(bins: Tensor) -> Floats:
        counts: Floats = torch.bincount(bins, minlength=len(cuts) + 1).cpu().double().numpy()
        return counts[::-1].cumsum()[::-1][1:]

    total = voxels_from(reached) + len(hit)
    return np.where(total > 0, 2 * voxels_from(hit) / np.maximum(total, 1), np.nan)


def fit_mask_offsets(dice: Mapping[str, Floats]) -> dict[str, float]:
    """What is added to each mask's logits so that a cut at 0 has the highest mean Dice.

    Args:
        dice: Lesion key -> `dice_at_cuts` of each case that has it (N, C).
    """
    offsets: dict[str, float] = {}
    for key, dice_NC in dice.items():
        if len(dice_NC) >= MIN_OF_EACH:
            mean_C = dice_NC.mean(axis=0)
            best = np.flatnonzero(np.isclose(mean_C, mean_C.max(), rtol=0, atol=1e-12))
            offsets[key] = 0.0 - float(MASK_CUTS[best[np.argmin(np.abs(MASK_CUTS[best]))]])
    return offsets


def presence_threshold(probability_N: Floats, dice_N: Floats, has_N: NDArray[np.bool_]) -> float:
    """From which probability on a lesion is drawn: the highest mean Dice over the cases that have it or have it drawn.

    Args:
        probability_N: That each case has the lesion.
        dice_N: Of its mask, were it drawn; NaN where there would be nothing to draw.
        has_N: Whether the case has the lesion.
    """
    cut, worth, alarms = every_cut(probability_N, np.where(has_N, dice_N, 0.0), ~has_N & ~np.isnan(dice_N))
    return best_cut(cut, worth / (has_N.sum() + alarms))


def fit_fusion(
    logits: Mapping[str, Floats],
    peaks: Mapping[str, Floats],
    labels: Mapping[str, Floats],
    present: Mapping[str, Floats],
    dice: Mapping[str, Floats],
    lesions: Sequence[Lesion],
) -> HeadFusion | None:
    """Fit the diseases that masks show, each lesion's presence, from when on it is drawn, and its outline.

    Args:
        logits: Disease -> the classifier's, one a case (N,).
        peaks: Lesion key -> `mask_peaks`, (N,).
        labels: Disease -> 0, 1 or NaN, (N,).
        present: Lesion key -> whether its true mask has a voxel: 0, 1, or NaN where it is not annotated, (N,).
        dice: Lesion key -> `dice_at_cuts`, (N, C); any number where the lesion is not annotated.
        lesions: Those of the masks.

    Returns:
        None where nothing has enough cases.
    """
    offsets = fit_mask_offsets({key: dice[key][has_N == 1] for key, has_N in present.items()})
    diseases: dict[str, Mix] = {}
    for name in logits:
        mix = _fit(logits[name], {key: peaks[key] for key in shown_by(name, lesions)}, labels[name])
        if mix is not None:
            diseases[name] = mix
    drawn: dict[str, Mix] = {}
    thresholds: dict[str, float] = {}
    for lesion in lesions:
        if lesion.disease not in logits:
            continue
        key, known_N = lesion.key, ~np.isnan(present[lesion.key])
        mix = _fit(logits[lesion.disease], {key: peaks[key]}, present[key])
        if mix is not None:
            found = [
                mix.probability(logit, {key: peak})
                for logit, peak in zip(logits[lesion.disease][known_N], peaks[key][known_N], strict=True)
            ]
            drawn[key] = mix
            cut = int(np.argmin(np.abs(MASK_CUTS + offsets.get(key, 0.0))))
            thresholds[key] = presence_threshold(
                np.array(found), dice[key][known_N, cut], present[key][known_N] == 1
            )
    return HeadFusion(diseases, drawn, thresholds, offsets) if diseases or drawn or offsets else None


def _fit(logit_N: Floats, peaks: Mapping[str, Floats], label_N: Floats) -> Mix | None:
    """None for a disease that no mask shows, and where too few cases have or lack it."""
    known_N = ~np.isnan(label_N)
    true_N = label_N[known_N] > 0.5
    if not peaks or min(true_N.sum(), (~true_N).sum()) < MIN_OF_EACH:
        return None
    feature_NF = np.stack([logit_N, *peaks.values()], axis=1)[known_N]
    classifier, *masks, offset = fit_logistic(feature_NF, true_N).tolist()
    return Mix(classifier, dict(zip(peaks, masks, strict=True)), offset)
