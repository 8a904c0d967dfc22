"""Resamples by draw counts equal figures of copied cases; intervals, paired tests, patients drawn whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vlm3d.evaluation.bootstrap import (
    bootstrap_classification,
    compare_classification,
    difference,
    draw_counts,
    interval,
    resample_means,
)
from vlm3d.evaluation.classification import classification_figures
from vlm3d.evaluation.ranking import auroc_and_ap, rank

NAMES = ("a", "b", "c")


def table(seed: int, cases: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = (rng.random((cases, 3)) < [0.5, 0.2, 0.06]).astype(float)
    return np.round(np.clip(rng.normal(0.4 + 0.2 * label, 0.3), 0, 1), 1), label


def test_a_resample_equals_its_cases_copied() -> None:
    probability, label = table(0)
    label[3, 0], label[:, 2] = np.nan, np.arange(len(label)) == 5
    resampled = bootstrap_classification(probability, label, NAMES, resamples=12, seed=4)
    counts = np.concatenate(list(draw_counts(len(label), 12, seed=4)), axis=1).astype(int)
    assert (counts.sum(axis=0) == len(label)).all()
    undefined = 0
    for r in range(12):
        drawn = np.repeat(np.arange(len(label)), counts[:, r])
        copied = classification_figures(probability[drawn], label[drawn], NAMES)
        for figure in ("auroc", "ap", "f1", "precision", "recall", "accuracy"):
            for k, name in enumerate(NAMES):
                expected = copied["per_disease"][name][figure]
                undefined += math.isnan(expected)
                assert resampled.drawn.per_disease[figure][r, k] == pytest.approx(
                    expected, abs=1e-12, nan_ok=True
                )
            assert resampled.drawn.macro[figure][r] == pytest.approx(copied["macro"][figure], abs=1e-12)
            assert resampled.drawn.micro[figure][r] == pytest.approx(copied["micro"][figure], abs=1e-12)
        assert resampled.drawn.crg_R[r] == pytest.approx(copied["crg"], abs=1e-12)
        y, p = label[drawn, 1], probability[drawn, 1]
        assert resampled.drawn.per_disease["auroc"][r, 1] == pytest.approx(
            sklearn_metrics.roc_auc_score(y, p), abs=1e-9
        )
    assert undefined  # the rare class has resamples without a positive


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_classification(*table(1), NAMES, resamples=20, seed=1)
    monkeypatch.setattr("vlm3d.evaluation.ranking._BLOCK_BYTES", 64)
    parts = bootstrap_classification(*table(1), NAMES, resamples=20, seed=1)
    np.testing.assert_array_equal(whole.drawn.per_disease["ap"], parts.drawn.per_disease["ap"])
    monkeypatch.setattr("vlm3d.evaluation.bootstrap._BLOCK_CELLS", 100)
    assert [block.shape for block in draw_counts(40, 5, seed=0)] == [(40, 2), (40, 2), (40, 1)]


def test_interval_holds_the_middle_of_the_resamples() -> None:
    resampled = bootstrap_classification(*table(2), NAMES, resamples=200)
    found = resampled.intervals(0.9)
    low, high = np.quantile(resampled.drawn.macro["auroc"], [0.05, 0.95])
    auroc = found["macro"]["auroc"]
    assert (auroc.low, auroc.high) == (low, high)
    assert auroc.value == classification_figures(*table(2), NAMES)["macro"]["auroc"]
    assert auroc.low < auroc.value < auroc.high
    assert found["per_disease"]["a"]["f1"].low <= found["per_disease"]["a"]["f1"].high
    assert found["crg"].low < found["crg"].high
    nothing = interval(float("nan"), np.full(5, np.nan))
    assert math.isnan(nothing.low)


def test_scans_of_a_patient_are_drawn_together() -> None:
    patients = ["p1", "p2", "p1", "p3", "p3", "p3"]
    counts = np.concatenate(list(draw_counts(6, 50, seed=0, patient_ids=patients)), axis=1)
    np.testing.assert_array_equal(counts[0], counts[2])
    np.testing.assert_array_equal(counts[3], counts[5])
    assert (counts[[0, 1, 3]].sum(axis=0) == 3).all()  # as many patients as there are
    with pytest.raises(ValueError, match="2 patient ids for 6"):
        next(draw_counts(6, 1, 0, ["p1", "p2"]))
    with pytest.raises(ValueError, match="no cases"):
        next(draw_counts(0, 1, 0))


def test_paired_test_tells_better_from_equal() -> None:
    probability, label = table(3, cases=150)
    better = np.clip(probability + 0.3 * (label - 0.5), 0, 1)
    first, second = (
        bootstrap_classification(p, label, NAMES, resamples=300, seed=7) for p in (better, probability)
    )
    found = compare_classification(first, second)
    auroc = found["macro"]["auroc"]
    assert auroc.value == pytest.approx(first.own.macro["auroc"][0] - second.own.macro["auroc"][0])
    assert 0 < auroc.low < auroc.value < auroc.high
    assert auroc.p_value == pytest.approx(2 / 301)
    same = compare_classification(first, first)["crg"]
    assert (same.value, same.p_value) == (0, 1)
    with pytest.raises(ValueError, match="resample both alike"):
        compare_classification(first, bootstrap_classification(probability, label, NAMES, resamples=10))


def test_p_value_counts_the_far_side_of_zero() -> None:
    drawn = np.array([-1.0, 0.0, 1.0, 2.0, 3.0, np.nan])
    assert difference(1.0, drawn).p_value == pytest.approx(2 * (2 + 1) / 6)
    assert difference(1.0, np.ones(99)).p_value == pytest.approx(0.02)
    assert math.isnan(difference(float("nan"), np.full(3, np.nan)).p_value)


def test_means_of_cases_are_resampled_around_what_is_known() -> None:
    value = np.array([[0.2, np.nan], [0.4, np.nan], [0.9, np.nan], [0.5, 0.7]])
    drawn = resample_means(value, resamples=30, seed=2)
    counts = np.concatenate(list(draw_counts(4, 30, seed=2)), axis=1)
    np.testing.assert_allclose(drawn[:, 0], counts.T @ value[:, 0] / 4)
    assert set(np.isnan(drawn[:, 1])) == {True, False}
    assert np.nanmax(np.abs(drawn[:, 1] - 0.7)) < 1e-12


def test_counts_past_single_precision_stay_exact() -> None:
    ranking = rank(np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, False, True, False]), cases=4)
    weight = np.array([[2**24], [3], [2**23 + 1], [5]], dtype=np.float32)
    area, precision = auroc_and_ap(ranking, weight)
    first, wrong, second, last = (int(value) for value in weight[:, 0])
    pairs = (first + second) * (wrong + last)
    assert area[0] == pytest.approx(1 - second * wrong / 2 / pairs, abs=1e-14)
    called = first + wrong + second
    assert precision[0] == pytest.approx(
        (first + second * (first + second) / called) / (first + second), abs=1e-14
    )
