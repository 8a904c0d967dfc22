"""How far a figure would move with other patients: bootstrap intervals, and tests of two systems on the same patients.

A resample draws as many patients as there are, with replacement; all scans of a patient come along. Figures come from
draw counts instead of copied cases, so that a thousand resamples cost little more than a few hundred evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.classification import WeightedFigures, predictions, weighted_figures
from vlm3d.evaluation.ranking import Floats

DEFAULT_RESAMPLES = 1000
_BLOCK_CELLS = 8 * 1024**2
"""Cases x resamples held at a time."""


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval.

    Attributes:
        value: On the cases themselves.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Figure of the first system minus figure of the second, over the same resamples.

    Attributes:
        value: On the cases themselves.
        low: Lower end of the interval.
        high: Upper end.
        p_value: Two-sided: twice the share of resamples on the other side of 0, counted with one more (never 0).
    """

    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Resampled:
    """Classification figures of the cases, and of R resamples of them.

    Attributes:
        names: Of the K diseases.
        own: R = 1: the cases themselves.
        drawn: The resamples.
    """

    names: tuple[str, ...]
    own: WeightedFigures
    drawn: WeightedFigures

    def intervals(self, level: float = 0.95) -> dict[str, Any]:
        """Percentile intervals in the shape of `vlm3d.evaluation.classification.classification_figures`."""
        return _walk(
            self.names,
            lambda own, drawn: interval(own[0][0], drawn[0], level),
            (self.own,),
            (self.drawn,),
        )


def draw_counts(
    cases: int, resamples: int, seed: int, patient_ids: Sequence[str] | None = None
) -> Iterator[NDArray[np.float32]]:
    """How often each case is drawn, in blocks of resamples.

    Args:
        cases: N.
        resamples: R in all.
        seed: Same seed, same draws.
        patient_ids: Of the cases; scans of a patient are drawn together. Each case is its own patient by default.

    Yields:
        (N, block) whole numbers.

    Raises:
        ValueError: There is no case, or the ids are not as many.
    """
    if not cases:
        raise ValueError("no cases to resample")
    if patient_ids is not None and len(patient_ids) != cases:
        raise ValueError(f"{len(patient_ids)} patient ids for {cases} cases")
    patient_N = (
        np.arange(cases)
        if patient_ids is None
        else np.unique(np.asarray(patient_ids), return_inverse=True)[1]
    )
    patients = int(patient_N.max()) + 1
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK_CELLS // cases)
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        drawn = generator.integers(patients, size=(block, patients)) + patients * np.arange(block)[:, None]
        count_RP = np.bincount(drawn.ravel(), minlength=block * patients).reshape(block, patients)
        yield np.ascontiguousarray(count_RP.T.astype(np.float32)[patient_N])


def bootstrap_classification(
    probability_NK: NDArray[Any],
    label_NK: NDArray[Any],
    names: Sequence[str],
    *,
    threshold: float | Sequence[float] | Floats = 0.5,
    patient_ids: Sequence[str] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """Every classification figure of every resample.

    Args:
        probability_NK: Disease probabilities.
        label_NK: 0, 1, or NaN where unknown.
        names: Of the K diseases.
        threshold: Probability from which a disease is positive; one, or one a disease.
        patient_ids: Of the N cases, where a patient has several.
        resamples: How many.
        seed: Two systems with the same seed see the same patients.

    Raises:
        ValueError: As `vlm3d.evaluation.classification.predictions` and `draw_counts`.
    """
    table = predictions(probability_NK, label_NK, threshold)
    if len(names) != table.truth_NK.shape[1]:
        raise ValueError(f"{len(names)} disease names for {table.truth_NK.shape[1]} columns")
    cases = len(table.truth_NK)
    own = weighted_figures(table, np.ones((cases, 1), dtype=np.float32))
    blocks = [
        weighted_figures(table, weight_NR) for weight_NR in draw_counts(cases, resamples, seed, patient_ids)
    ]
    drawn = WeightedFigures(
        per_disease=_joined([block.per_disease for block in blocks]),
        macro=_joined([block.macro for block in blocks]),
        micro=_joined([block.micro for block in blocks]),
        crg_R=np.concatenate([block.crg_R for block in blocks]),
    )
    return Resampled(tuple(names), own, drawn)


def _joined(blocks: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def compare_classification(first: Resampled, second: Resampled, level: float = 0.95) -> dict[str, Any]:
    """Paired differences of two systems, figure by figure.

    Args:
        first: Of the same cases, patients and seed as ``second``.
        second: The system that is subtracted.
        level: Of the interval.

    Returns:
        `Difference` in the shape of `vlm3d.evaluation.classification.classification_figures`.

    Raises:
        ValueError: The diseases or the number of resamples differ.
    """
    if first.names != second.names or len(first.drawn.crg_R) != len(second.drawn.crg_R):
        raise ValueError(
            "the two systems have other diseases or another number of resamples; resample both alike"
        )
    return _walk(
        first.names,
        lambda own, drawn: difference(own[0][0] - own[1][0], drawn[0] - drawn[1], level),
        (first.own, second.own),
        (first.drawn, second.drawn),
    )


def _walk(
    names: Sequence[str], make: Any, own: Sequence[WeightedFigures], drawn: Sequence[WeightedFigures]
) -> dict[str, Any]:
    """Apply a function to each figure's own values and resampled values, keeping the shape of the result."""
    figures = own[0].macro
    result: dict[str, Any] = {
        "per_disease": {
            name: {
                figure: make(
                    [one.per_disease[figure][:, k] for one in own],
                    [one.per_disease[figure][:, k] for one in drawn],
                )
                for figure in figures
            }
            for k, name in enumerate(names)
        }
    }
    for group in ("macro", "micro"):
        result[group] = {
            figure: make(
                [getattr(one, group)[figure] for one in own], [getattr(one, group)[figure] for one in drawn]
            )
            for figure in figures
        }
    result["crg"] = make([one.crg_R for one in own], [one.crg_R for one in drawn])
    return result


def interval(value: float, drawn_R: Floats, level: float = 0.95) -> Interval:
    """Percentile interval over the resamples that define the figure; NaN ends where none does."""
    low, high = _ends(drawn_R, level)
    return Interval(float(value), low, high)


def difference(value: float, drawn_R: Floats, level: float = 0.95) -> Difference:
    """Interval and two-sided p of a difference over the resamples that define it."""
    low, high = _ends(drawn_R, level)
    known = drawn_R[~np.isnan(drawn_R)]
    if not known.size or np.isnan(value):
        return Difference(float(value), low, high, float("nan"))
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return Difference(float(value), low, high, min(1.0, 2 * (tail + 1) / (known.size + 1)))


def _ends(drawn_R: Floats, level: float) -> tuple[float, float]:
    known = drawn_R[~np.isnan(drawn_R)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample_means(
    value_NM: Floats,
    *,
    patient_ids: Sequence[str] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Floats:
    """Means of M per-case figures (Dice, ROUGE-L …) in each resample.

    Args:
        value_NM: NaN where a case does not define a figure; it is left out of that mean.
        patient_ids: Of the N cases.
        resamples: R.
        seed: Two systems with the same seed see the same patients.

    Returns:
        (R, M), NaN where no drawn case defines the figure.
    """
    known = ~np.isnan(value_NM)
    filled = np.where(known, value_NM, 0)
    means = []
    for weight_NR in draw_counts(len(value_NM), resamples, seed, patient_ids):
        weight_RN = weight_NR.T.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((weight_RN @ filled) / (weight_RN @ known.astype(np.float64)))
    return np.concatenate(means)
