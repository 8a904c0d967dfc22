"""How well 18 disease probabilities fit the truth: AUROC, AP, F1, precision, recall, accuracy, CRG.

Everything is computed over (N, K) tables at once and under R weightings of the cases: ones for the figures themselves,
draw counts for a bootstrap (`vlm3d.evaluation.bootstrap`). A label that is NaN is unknown and left out. A figure that
the data do not define (AUROC of one class, anything of a disease without a known label) is NaN and left out of means;
precision, recall and F1 of nothing called or nothing there are 0, as the VLM3D challenge counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.ranking import Bools, Floats, auroc_and_ap, rank

FIGURES = ("auroc", "ap", "f1", "precision", "recall", "accuracy")
"""Of each disease, of their mean (macro) and of all cells pooled (micro)."""


@dataclass(frozen=True)
class Predictions:
    """Probabilities beside labels, checked.

    Attributes:
        probability_NK: Of each case and disease.
        truth_NK: True where the label is 1.
        known_NK: False where the label is NaN.
        called_NK: True where the probability reaches the disease's threshold.
    """

    probability_NK: Floats
    truth_NK: Bools
    known_NK: Bools
    called_NK: Bools


def predictions(
    probability_NK: NDArray[Any], label_NK: NDArray[Any], threshold: float | Sequence[float] | Floats = 0.5
) -> Predictions:
    """Check two tables and cut the probabilities at a threshold.

    Args:
        probability_NK: Disease probabilities.
        label_NK: 0, 1, or NaN where unknown.
        threshold: Probability from which a disease is positive; one, or one a disease.

    Raises:
        ValueError: The shapes differ, a probability is not a number, or a label is neither 0, 1 nor NaN; the first rows
            are named.
    """
    probability = np.asarray(probability_NK, dtype=np.float64)
    label = np.asarray(label_NK, dtype=np.float64)
    if probability.ndim != 2 or probability.shape != label.shape:
        raise ValueError(
            f"probabilities of shape {probability.shape} against labels of shape {label.shape}; both are (cases, diseases)"
        )
    _refuse_rows(~np.isfinite(probability), "a probability is NaN or infinite")
    known = ~np.isnan(label)
    _refuse_rows(known & (label != 0) & (label != 1), "a label is neither 0 nor 1 nor NaN (unknown)")
    cut_K = np.broadcast_to(np.asarray(threshold, dtype=np.float64), probability.shape[1:])
    return Predictions(probability, known & (label == 1), known, probability >= cut_K)


def _refuse_rows(wrong_NK: Bools, what: str) -> None:
    rows = np.flatnonzero(wrong_NK.any(axis=1))
    if rows.size:
        raise ValueError(f"{what} in {rows.size} cases; the first rows are {', '.join(map(str, rows[:5]))}")


def auroc(score_N: Floats, truth_N: Bools) -> float:
    """Area under the ROC curve: how often a positive case ranks above a negative one; NaN if there is one class only."""
    return float(_ranked(score_N, truth_N)[0])


def average_precision(score_N: Floats, truth_N: Bools) -> float:
    """Sum over distinct thresholds of precision x gain in recall; NaN without positives."""
    return float(_ranked(score_N, truth_N)[1])


def _ranked(score_N: Floats, truth_N: Bools) -> tuple[float, float]:
    area_R, ap_R = auroc_and_ap(
        rank(score_N, truth_N, len(score_N)), np.ones((len(score_N), 1), dtype=np.float32)
    )
    return area_R[0], ap_R[0]


def crg(called_NK: Bools, truth_NK: Bools) -> float:
    """The challenge's CRG: ``U / (2U - s)`` with s = r TP - r FN - FP, pooled over all cases and labels.

    X is the number of cells, A of true ones, r = (X - A) / (2A), U = (X - A) / 2. Perfect is 1; all negative and all
    positive are 1/3; 0 if the denominator is 0.

    Raises:
        ValueError: There is no positive in the truth.
    """
    actual = int(truth_NK.sum())
    if not actual:
        raise ValueError("CRG needs at least one positive label in the truth")
    hits = int((called_NK & truth_NK).sum())
    called = int(called_NK.sum())
    return float(crg_from_counts(truth_NK.size, actual, hits, called))


def crg_from_counts(cells: Any, actual: Any, hits: Any, called: Any) -> Any:
    """`crg` from counts of cells, true ones, hits and called ones; arrays or numbers, NaN where nothing is true."""
    cells, actual = np.asarray(cells, dtype=np.float64), np.asarray(actual, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        reward, best = (cells - actual) / (2 * actual), (cells - actual) / 2
        score = reward * hits - reward * (actual - hits) - (called - hits)
        denominator = 2 * best - score
        value = np.where(denominator == 0, 0.0, best / np.where(denominator == 0, 1.0, denominator))
    return np.where(actual > 0, value, np.nan)


@dataclass(frozen=True)
class WeightedFigures:
    """Classification figures under each of R weightings of the cases.

    Attributes:
        per_disease: Figure -> (R, K).
        macro: Figure -> (R,), means over the diseases that define it.
        micro: Figure -> (R,), all known cells of all diseases pooled.
        crg_R: (R,), over cases whose labels are all known.
    """

    per_disease: dict[str, Floats]
    macro: dict[str, Floats]
    micro: dict[str, Floats]
    crg_R: Floats


def weighted_figures(table: Predictions, weight_NR: NDArray[np.float32]) -> WeightedFigures:
    """All figures under each weighting.

    Args:
        table: From `predictions`.
        weight_NR: How often each case counts, whole numbers.
    """
    resamples, diseases = weight_NR.shape[1], table.truth_NK.shape[1]
    truth, known, called = table.truth_NK, table.known_NK, table.called_NK & table.known_NK
    weight_RN = weight_NR.T.astype(np.float64)
    known_RK, positive_RK, called_RK, hit_RK = (
        weight_RN @ cells.astype(np.float64) for cells in (known, truth, called, called & truth)
    )
    per_disease = _threshold_figures(known_RK, positive_RK, called_RK, hit_RK)
    per_disease["auroc"], per_disease["ap"] = np.empty((resamples, diseases)), np.empty((resamples, diseases))
    for k in range(diseases):
        case_n = np.flatnonzero(known[:, k])
        ranking = rank(table.probability_NK[case_n, k], truth[case_n, k], len(weight_NR), case_n)
        per_disease["auroc"][:, k], per_disease["ap"][:, k] = auroc_and_ap(ranking, weight_NR)
    micro = _threshold_figures(*(cells.sum(axis=1) for cells in (known_RK, positive_RK, called_RK, hit_RK)))
    pooled = rank(table.probability_NK[known], truth[known], len(weight_NR), np.nonzero(known)[0])
    micro["auroc"], micro["ap"] = auroc_and_ap(pooled, weight_NR)
    whole = known.all(axis=1)
    whole_RN = weight_RN[:, whole]
    crg_R = crg_from_counts(
        diseases * whole_RN.sum(axis=1),
        *(whole_RN @ cells[whole].sum(axis=1) for cells in (truth, called & truth, called)),
    )
    return WeightedFigures(
        per_disease={name: per_disease[name] for name in FIGURES},
        macro={name: mean_of_known(per_disease[name]) for name in FIGURES},
        micro={name: micro[name] for name in FIGURES},
        crg_R=crg_R,
    )


def _threshold_figures(known: Floats, positive: Floats, called: Floats, hit: Floats) -> dict[str, Floats]:
    """Figures of a cut, from weighted counts of any shape."""
    with np.errstate(invalid="ignore", divide="ignore"):
        figures = {
            "f1": np.where(called + positive > 0, 2 * hit / (called + positive), 0.0),
            "precision": np.where(called > 0, hit / called, 0.0),
            "recall": np.where(positive > 0, hit / positive, 0.0),
            "accuracy": (known - positive - called + 2 * hit) / known,
        }
    return {name: np.where(known > 0, figure, np.nan) for name, figure in figures.items()}


def mean_of_known(figure_RK: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is known."""
    known = ~np.isnan(figure_RK)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, figure_RK, 0).sum(axis=-1) / known.sum(axis=-1)
    return mean


def classification_figures(
    probability_NK: NDArray[Any],
    label_NK: NDArray[Any],
    names: Sequence[str],
    threshold: float | Sequence[float] | Floats = 0.5,
) -> dict[str, Any]:
    """Every classification figure of one system.

    Args:
        probability_NK: Disease probabilities.
        label_NK: 0, 1, or NaN where unknown.
        names: Of the K diseases.
        threshold: Probability from which a disease is positive; one, or one a disease.

    Returns:
        ``per_disease``: name -> `FIGURES`, ``cases`` and ``positives``; ``macro`` and ``micro``: `FIGURES`; ``crg`` over
        cases whose labels are all known.

    Raises:
        ValueError: As `predictions`, or the names do not fit the columns.
    """
    table = predictions(probability_NK, label_NK, threshold)
    if len(names) != table.truth_NK.shape[1]:
        raise ValueError(f"{len(names)} disease names for {table.truth_NK.shape[1]} columns")
    found = weighted_figures(table, np.ones((len(table.truth_NK), 1), dtype=np.float32))
    known_K, positive_K = table.known_NK.sum(axis=0), table.truth_NK.sum(axis=0)
    return {
        "per_disease": {
            name: {figure: float(values[0, k]) for figure, values in found.per_disease.items()}
            | {"cases": float(known_K[k]), "positives": float(positive_K[k])}
            for k, name in enumerate(names)
        },
        "macro": {figure: float(values[0]) for figure, values in found.macro.items()},
        "micro": {figure: float(values[0]) for figure, values in found.micro.items()},
        "crg": float(found.crg_R[0]),
    }
