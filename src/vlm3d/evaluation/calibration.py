"""Whether a probability of 30 % comes true in 30 of 100 cases: ECE, Brier score, reliability bins.

All work on (N, K) tables; a label that is NaN is unknown and left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.classification import mean_of_known, predictions
from vlm3d.evaluation.ranking import Floats

DEFAULT_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Predicted against observed, in bins of equal width from 0 to 1.

    Attributes:
        edge: (bins + 1,) of the bins; a bin holds its lower edge, the last one both.
        cases_KB: Known cases in a bin.
        mean_probability_KB: NaN in an empty bin.
        positive_share_KB: NaN in an empty bin.
    """

    edge: Floats
    cases_KB: NDArray[np.int64]
    mean_probability_KB: Floats
    positive_share_KB: Floats


def reliability(
    probability_NK: NDArray[Any], label_NK: NDArray[Any], bins: int = DEFAULT_BINS
) -> Reliability:
    """Count, mean probability and share of positives of each disease and bin.

    Raises:
        ValueError: As `vlm3d.evaluation.classification.predictions`, or a probability lies outside [0, 1].
    """
    table = predictions(probability_NK, label_NK)
    p, known = table.probability_NK, table.known_NK
    if p.size and not 0 <= p.min() <= p.max() <= 1:
        raise ValueError("a probability lies outside 0 to 1; are these logits?")
    diseases, edge = p.shape[1], np.linspace(0, 1, bins + 1)
    inside_NK = np.clip(np.searchsorted(edge, p, side="right") - 1, 0, bins - 1)
    place = (inside_NK + bins * np.arange(diseases))[known]

    def total(weight: NDArray[Any] | None) -> Floats:
        counted = np.bincount(place, weights=weight, minlength=diseases * bins)
        return counted.astype(np.float64).reshape(diseases, bins)

    cases = total(None)
    with np.errstate(invalid="ignore"):
        return Reliability(
            edge=edge,
            cases_KB=cases.astype(np.int64),
            mean_probability_KB=total(p[known]) / cases,
            positive_share_KB=total(table.truth_NK[known].astype(np.float64)) / cases,
        )


def expected_calibration_error(
    probability_NK: NDArray[Any], label_NK: NDArray[Any], bins: int = DEFAULT_BINS
) -> Floats:
    """(K,) mean distance of probability and share of positives, bins weighted by their cases; NaN without cases."""
    found = reliability(probability_NK, label_NK, bins)
    gap_KB = np.nan_to_num(np.abs(found.mean_probability_KB - found.positive_share_KB))
    with np.errstate(invalid="ignore"):
        error: Floats = (gap_KB * found.cases_KB).sum(axis=1) / found.cases_KB.sum(axis=1)
    return error


def brier_score(probability_NK: NDArray[Any], label_NK: NDArray[Any]) -> Floats:
    """(K,) mean squared distance of probability and label; NaN without cases."""
    table = predictions(probability_NK, label_NK)
    squared_NK = (table.probability_NK - table.truth_NK) ** 2
    return mean_of_known(np.where(table.known_NK, squared_NK, np.nan).T)
