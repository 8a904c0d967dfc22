"""How well scores rank ill above healthy, for many weightings of the cases at once.

A bootstrap resample is a weight per case: how often it was drawn. Scores are sorted once, and the sorted cells are cut
into segments where a positive begins or ends a run of equal scores: all that AUROC and average precision ask of a
resample is how many cells lie in each segment, which is one sparse product of segments x cases with the weights. The
figures of the cases themselves are those of one weighting with ones, so that a figure and its interval come from the
same lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

_BLOCK_BYTES = 2 * 1024**2
"""Of counts per segment held at a time."""


@dataclass(frozen=True)
class Ranking:
    """Cells in falling order of score, cut into segments.

    Attributes:
        cells_in_segment: (segments, cases) how many cells of a case lie in a segment.
        positives_in_segment: (segments, cases) how many of them are positive.
        case_p: The case of each positive.
        first_p: Segments before the run of equal scores that a positive stands in.
        last_p: Segments up to the end of that run.
        most_cells_a_case: Of any case.
    """

    cells_in_segment: csr_matrix
    positives_in_segment: csr_matrix
    case_p: Indices
    first_p: Indices
    last_p: Indices
    most_cells_a_case: int


def rank(score_n: Floats, truth_n: Bools, cases: int, case_n: Indices | None = None) -> Ranking:
    """Sort cells once.

    Args:
        score_n: One score a cell; only known cells.
        truth_n: True where the disease is there.
        cases: How many cases there are, N.
        case_n: The case that each cell belongs to; by default cell n is case n.
    """
    order = np.argsort(-score_n, kind="stable")
    score, truth = score_n[order], truth_n[order]
    case = order if case_n is None else case_n[order]
    starts_run = np.r_[True, score[1:] != score[:-1]] if score.size else np.zeros(0, dtype=bool)
    first = np.flatnonzero(starts_run)
    positive_p = np.flatnonzero(truth)
    run_p = np.cumsum(starts_run)[positive_p] - 1
    start_p, end_p = first[run_p], np.r_[first[1:], score.size][run_p]
    edges = np.unique(np.r_[0, start_p, end_p, score.size])
    segment = np.searchsorted(edges, np.arange(score.size), side="right") - 1
    shape = (max(len(edges) - 1, 0), cases)
    return Ranking(
        cells_in_segment=_count(segment, case, shape),
        positives_in_segment=_count(segment[positive_p], case[positive_p], shape),
        case_p=case[positive_p],
        first_p=np.searchsorted(edges, start_p),
        last_p=np.searchsorted(edges, end_p),
        most_cells_a_case=int(np.bincount(case).max()) if case.size else 0,
    )


def _count(row: Indices, column: Indices, shape: tuple[int, int]) -> csr_matrix:
    return csr_matrix((np.ones(len(row), dtype=np.float32), (row, column)), shape=shape)


def auroc_and_ap(ranking: Ranking, weight_NR: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """AUROC and average precision under each of R weightings.

    AUROC is the weighted share of pairs of a positive and a negative that are in order, ties counting half
    (Mann-Whitney). Average precision is the sum over distinct scores of precision x gain in recall.

    Args:
        ranking: Of the cells.
        weight_NR: How often each case counts, whole numbers as float32 (exact below 2**24).

    Returns:
        (R,) AUROC, NaN without a positive or a negative; (R,) average precision, NaN without a positive.
    """
    resamples = weight_NR.shape[1]
    auroc_R, ap_R = np.full(resamples, np.nan), np.full(resamples, np.nan)
    if not ranking.case_p.size:
        return auroc_R, ap_R
    step = max(16, _BLOCK_BYTES // (4 * ranking.cells_in_segment.shape[0]))
    for start in range(0, resamples, step):
        part = slice(start, start + step)
        auroc_R[part], ap_R[part] = _block(ranking, np.ascontiguousarray(weight_NR[:, part]))
    return auroc_R, ap_R


def _block(ranking: Ranking, weight_NR: NDArray[Any]) -> tuple[Floats, Floats]:
    # Counts are whole, so float32 holds them exactly while they are few enough, at half the memory traffic.
    exact = np.float32 if weight_NR.sum(axis=0).max() * ranking.most_cells_a_case < 2**23 else np.float64
    weight_NR = weight_NR.astype(exact, copy=False)
    called_sR = _running_sum(ranking.cells_in_segment @ weight_NR, exact)
    hits_sR = _running_sum(ranking.positives_in_segment @ weight_NR, exact)
    alarms_sR = called_sR - hits_sR
    weight_pR = weight_NR[ranking.case_p]
    positives_R, negatives_R = hits_sR[-1].astype(np.float64), alarms_sR[-1].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        alarms_pR = alarms_sR[ranking.first_p] + alarms_sR[ranking.last_p]
        auroc_R = 1 - _weigh(weight_pR, alarms_pR) / (2 * positives_R * negatives_R)
        precision_sR = np.divide(hits_sR, np.maximum(called_sR, 1), dtype=np.float64)
        ap_R = _weigh(weight_pR, precision_sR[ranking.last_p]) / positives_R
    return auroc_R, ap_R


def _weigh(weight_pR: NDArray[Any], value_pR: NDArray[Any]) -> Floats:
    """Sum over positives in double precision."""
    total: Floats = np.einsum("pr,pr->r", weight_pR, value_pR, dtype=np.float64)
    return total


def _running_sum(count_sR: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """With a first row of zeros."""
    total_sR = np.empty((len(count_sR) + 1, count_sR.shape[1]), dtype=dtype)
    total_sR[0] = 0
    np.cumsum(count_sR, axis=0, out=total_sR[1:], dtype=dtype)
    return total_sR
