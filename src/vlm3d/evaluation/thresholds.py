"""Where to cut each disease's probability: tuned on one split, applied to another.

CRG counts hits, misses and false alarms of all diseases together, but its sum has one term a disease, so that the best
cut of each disease alone is the best of all. The challenge cuts at 0.5; `shift_to_half` moves each disease's own cut there.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.classification import predictions
from vlm3d.evaluation.ranking import Bools, Floats

Objective = Literal["f1", "crg"]

_JUST_BELOW_HALF = np.nextafter(0.5, 0)
_EXTREME = 1e-12
"""How near to 0 or 1 a cut may lie that `shift_to_half` moves to 0.5."""


def tune_thresholds(
    probability_NK: NDArray[Any], label_NK: NDArray[Any], objective: Objective = "f1"
) -> Floats:
    """The cut of each disease that gives the highest F1, or the highest CRG, on these cases.

    A cut lies halfway between two neighboring probabilities, so that it carries over to other cases; of cuts that are
    equally good the one nearest to 0.5 is taken. A disease without a known positive has no F1: it keeps 0.5.

    Args:
        probability_NK: Disease probabilities in [0, 1].
        label_NK: 0, 1, or NaN where unknown.
        objective: ``"f1"`` or ``"crg"``.

    Returns:
        (K,) thresholds; a probability of at least this is positive.

    Raises:
        ValueError: As `vlm3d.evaluation.classification.predictions`; a probability lies outside [0, 1]; or CRG is asked for
            and no label is positive.
    """
    table = predictions(probability_NK, label_NK)
    if table.probability_NK.size and not 0 <= table.probability_NK.min() <= table.probability_NK.max() <= 1:
        raise ValueError("a probability lies outside 0 to 1; are these logits?")
    whole = table.known_NK.all(axis=1)
    cells, actual = table.truth_NK[whole].size, int(table.truth_NK[whole].sum())
    if objective == "crg" and not actual:
        raise ValueError(
            "CRG needs at least one positive label in the truth, in a case whose labels are all known"
        )
    reward = (cells - actual) / (2 * actual) if actual else 0.0
    threshold_K = np.full(table.truth_NK.shape[1], 0.5)
    for k in range(threshold_K.size):
        known = whole if objective == "crg" else table.known_NK[:, k]
        truth = table.truth_NK[known, k]
        if objective == "f1" and not truth.any():
            continue
        cut, hits, alarms = _every_cut(table.probability_NK[known, k], truth)
        gain = (
            2 * hits / np.maximum(hits + alarms + truth.sum(), 1)
            if objective == "f1"
            else reward * 2 * hits - alarms
        )
        threshold_K[k] = _best_cut(cut, gain)
    return threshold_K


def _best_cut(cut_C: Floats, gain_C: Floats) -> float:
    """The cut of the highest gain; of equal ones that nearest to 0.5."""
    equal = 1e-12 * max(1.0, abs(gain_C.max()))
    best = np.flatnonzero(np.isclose(gain_C, gain_C.max(), rtol=0, atol=equal))
    return float(cut_C[best[np.argmin(np.abs(cut_C[best] - 0.5))]])


def _every_cut(score_N: Floats, truth_N: Bools) -> tuple[Floats, Floats, Floats]:
    """Cuts that differ in whom they call, each with the numbers of hits and of false alarms that it calls."""
    score, group_N = np.unique(score_N, return_inverse=True)
    hit = np.bincount(group_N, weights=truth_N, minlength=score.size)
    alarm = np.bincount(group_N, weights=~truth_N, minlength=score.size)
    edge = np.r_[0.0, score, 1.0]
    cut = (edge[:-1] + edge[1:]) / 2
    cut[:-1] = np.where(cut[:-1] > edge[:-2], cut[:-1], score)  # no number lies between two neighbors
    if cut[-1] <= edge[-2]:
        cut[-1] = np.nextafter(1.0, 2.0)  # calls nobody where somebody has probability 1
    return cut, np.r_[hit[::-1].cumsum()[::-1], 0.0], np.r_[alarm[::-1].cumsum()[::-1], 0.0]


def shift_to_half(probability_NK: NDArray[Any], threshold_K: NDArray[Any]) -> Floats:
    """Move each disease's probabilities so that its threshold lands on 0.5; their order is kept.

    The threshold's log-odds are subtracted from each probability's, and ``shifted >= 0.5`` holds exactly where
    ``probability >= threshold``.

    Args:
        probability_NK: Disease probabilities in [0, 1], of one case (K) or of many.
        threshold_K: The probability from which on each disease is positive.

    Raises:
        ValueError: The number of diseases differs.
    """
    p, threshold = np.asarray(probability_NK, dtype=np.float64), np.asarray(threshold_K, dtype=np.float64)
    if p.shape[-1:] != threshold.shape:
        raise ValueError(f"thresholds of {threshold.size} diseases for {p.shape[-1]}")
    cut = np.clip(threshold, _EXTREME, 1 - _EXTREME)
    with np.errstate(divide="ignore", over="ignore"):
        odds_against = (1 - p) * cut / (p * (1 - cut))
    shifted = 1 / (1 + odds_against)  # each step keeps the order, rounding included
    return np.where(p >= threshold, np.maximum(shifted, 0.5), np.minimum(shifted, _JUST_BELOW_HALF))
