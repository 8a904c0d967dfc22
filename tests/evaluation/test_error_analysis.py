"""Curves enclose the figures' areas, confusions add up, suspects are suspect, and texts are taken apart without loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.evaluation.classification import auroc
from vlm3d.evaluation.collected import CollectedCases, ReportPair
from vlm3d.evaluation.error_analysis import (
    MOST_POINTS,
    confusion,
    noise_suspects,
    pr_curve,
    report_diffs,
    roc_curve,
    word_diff,
    worst_cases,
)
from vlm3d.evaluation.figures import Thresholds
from vlm3d.labels import DISEASE_NAMES

K = len(DISEASE_NAMES)
HALF = Thresholds.fixed(0.5)


def collected(
    probability_NK: np.ndarray, label_NK: np.ndarray, reports: list[ReportPair] | None = None
) -> CollectedCases:
    ids = [f"case_{n}" for n in range(len(label_NK))]
    return CollectedCases(ids, ids, list(probability_NK), list(label_NK), reports or [])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), cases=st.integers(2, 60), levels=st.integers(2, 40))
def test_a_roc_curve_encloses_auroc_and_passes_through_the_threshold(
    seed: int, cases: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    score, truth = rng.integers(0, levels, cases) / levels, rng.random(cases) > 0.5
    curve = roc_curve(score, truth, 0.5)
    if truth.all() or not truth.any():
        assert curve is None
        return
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(auroc(score, truth), abs=2e-3)
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    distance = np.hypot(np.subtract(curve.x, curve.at[0]), np.subtract(curve.y, curve.at[1]))
    assert distance.min() < 1e-3


def test_long_curves_are_thinned_and_keep_their_area() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) > 0.7
    score = rng.normal(truth * 1.0, 1.0)
    roc, pr = roc_curve(score, truth, 0.5), pr_curve(score, truth, 0.5)
    assert len(roc.x) <= MOST_POINTS + 2
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(auroc(score, truth), abs=3e-3)
    assert list(pr.x) == sorted(pr.x)
    assert pr.y[-1] == pytest.approx(truth.mean(), abs=1e-4)
    assert pr_curve(score, truth & False, 0.5) is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), cases=st.integers(1, 30))
def test_confusions_add_up_to_the_known_labels(seed: int, cases: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.where(rng.random((cases, K)) < 0.2, np.nan, (rng.random((cases, K)) > 0.5).astype(float))
    probability = rng.random((cases, K))
    found = confusion(collected(probability, label), HALF)
    np.testing.assert_array_equal(found.counts_K4.sum(axis=1), (~np.isnan(label)).sum(axis=0))
    _, invented, missed, _ = found.counts_K4.T
    np.testing.assert_array_equal(np.diag(found.together_KK), invented + missed)
    np.testing.assert_array_equal(found.together_KK, found.together_KK.T)
    i, j = rng.integers(0, K, 2)
    both = (label[:, i] == 1) & (probability[:, i] < 0.5) & (label[:, j] == 0) & (probability[:, j] >= 0.5)
    assert found.missed_with_invented_KK[i, j] == both.sum()


def test_the_worst_case_is_the_one_that_was_surest_of_what_is_not_so() -> None:
    label = np.zeros((3, K))
    probability = np.full((3, K), 0.2)
    probability[1, 4], probability[2, 4], probability[2, 5] = 0.999, 0.6, 0.7
    label[2, 7] = 1
    worst = worst_cases(collected(probability, label), HALF)
    assert [case.case_id for case in worst] == ["case_1", "case_2"]
    assert [call.disease for call in worst[0].invented] == [DISEASE_NAMES[4]]
    assert [call.disease for call in worst[1].invented] == [DISEASE_NAMES[5], DISEASE_NAMES[4]]
    assert [(call.disease, call.probability) for call in worst[1].missed] == [(DISEASE_NAMES[7], 0.2)]


def test_labels_are_suspect_where_the_report_or_a_sure_system_contradicts_them() -> None:
    emphysema, hernia = DISEASE_NAMES.index("Emphysema"), DISEASE_NAMES.index("Hiatal hernia")
    label, probability = np.zeros((3, K)), np.full((3, K), 0.4)
    probability[0, emphysema] = probability[1, emphysema] = probability[2, hernia] = 0.95
    reports = [
        ReportPair("case_0", None, "Emphysema is seen in the upper lobes."),
        ReportPair("case_1", None, "There is no emphysema."),
    ]
    found = noise_suspects(collected(probability, label, reports))
    assert [(s.case_id, s.disease, s.witnesses) for s in found] == [
        ("case_0", "Emphysema", 2),  # both speak against the label
        ("case_2", "Hiatal hernia", 1),  # no report to ask
    ]  # of case_1 the report supports the label, so the system is wrong
    assert "upper lobes" in found[0].sentence


WORDS = st.lists(st.sampled_from(["no", "effusion", "is", "seen.", "Lung", "clear,", "é"]), max_size=25)


@settings(max_examples=100, deadline=None)
@given(truth=WORDS, predicted=WORDS)
def test_texts_are_taken_apart_without_loss(truth: list[str], predicted: list[str]) -> None:
    parts = word_diff(" ".join(truth), " ".join(predicted))
    ours = " ".join(text for kind, text in parts if kind != "missing").split()
    assert ours == predicted
    theirs = " ".join(text for kind, text in parts if kind != "added").lower().split()
    assert [word.strip(".,") for word in theirs] == [word.lower().strip(".,") for word in truth]


def test_reports_with_most_wrong_findings_come_first() -> None:
    reports = [
        ReportPair("case_0", "No effusion.", "No effusion."),
        ReportPair("case_1", "There is emphysema.", "There is a pleural effusion. There is a hiatal hernia."),
        ReportPair("case_2", None, "There is emphysema."),
    ]
    diffs = report_diffs(collected(np.full((3, K), np.nan), np.full((3, K), np.nan), reports))
    assert [diff.case_id for diff in diffs] == ["case_1", "case_0"]
    assert {name for name, _ in diffs[0].missed} == {"Pleural effusion", "Hiatal hernia"}
    assert diffs[0].invented == (("Emphysema", "There is emphysema."),)
