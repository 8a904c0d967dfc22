"""Classification figures against scikit-learn and literal formulas; thresholds and the shift of CRG's best cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from vlm3d.evaluation.classification import auroc, average_precision, classification_figures, crg, predictions
from vlm3d.evaluation.thresholds import shift_to_half, tune_thresholds

NAMES = ("a", "b", "c", "d")


def table(seed: int, cases: int = 60, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties, labels of which the last class is never positive."""
    rng = np.random.default_rng(seed)
    label = (rng.random((cases, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(float)
    return np.round(np.clip(rng.normal(0.4 + 0.2 * label, 0.3), 0, 1), digits), label


def literal_auroc(score: np.ndarray, truth: np.ndarray) -> float:
    pairs = list(itertools.product(score[truth], score[~truth]))
    return sum((s > t) + 0.5 * (s == t) for s, t in pairs) / len(pairs) if pairs else math.nan


def literal_ap(score: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return math.nan
    total, before = 0.0, 0.0
    for cut in sorted(set(score), reverse=True):
        called = score >= cut
        recall = (called & truth).sum() / truth.sum()
        total += (recall - before) * (called & truth).sum() / called.sum()
        before = recall
    return total


def literal_crg(called: np.ndarray, truth: np.ndarray) -> float:
    x, a = truth.size, truth.sum()
    tp, fn, fp = (called & truth).sum(), (~called & truth).sum(), (called & ~truth).sum()
    r, u = (x - a) / (2 * a), (x - a) / 2
    s = r * tp - r * fn - fp
    return 0.0 if 2 * u == s else u / (2 * u - s)


@pytest.mark.parametrize(("seed", "digits"), [(0, 1), (1, 6), (2, 2)])
def test_every_figure_equals_scikit_learn(seed: int, digits: int) -> None:
    probability, label = table(seed, digits=digits)
    cut = [0.5, 0.3, 0.7, 0.5]
    found = classification_figures(probability, label, NAMES, cut)
    truth, called = label.astype(int), (probability >= cut).astype(int)
    for k, name in enumerate(NAMES):
        row, y, c = found["per_disease"][name], truth[:, k], called[:, k]
        expected = {
            "f1": sklearn_metrics.f1_score(y, c, zero_division=0),
            "precision": sklearn_metrics.precision_score(y, c, zero_division=0),
            "recall": sklearn_metrics.recall_score(y, c, zero_division=0),
            "accuracy": sklearn_metrics.accuracy_score(y, c),
            "cases": 60,
            "positives": y.sum(),
        }
        if y.any():
            expected["auroc"] = sklearn_metrics.roc_auc_score(y, probability[:, k])
            expected["ap"] = sklearn_metrics.average_precision_score(y, probability[:, k])
        else:
            assert math.isnan(row["auroc"])
            assert math.isnan(row["ap"])
        assert {figure: row[figure] for figure in expected} == pytest.approx(expected, abs=1e-9)
    positive = truth.any(axis=0)
    assert found["macro"]["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(truth[:, positive], probability[:, positive], average="macro"), abs=1e-9
    )
    assert found["macro"]["f1"] == pytest.approx(
        sklearn_metrics.f1_score(truth, called, average="macro", zero_division=0), abs=1e-9
    )
    assert found["micro"] == pytest.approx(
        {
            "auroc": sklearn_metrics.roc_auc_score(truth, probability, average="micro"),
            "ap": sklearn_metrics.average_precision_score(truth, probability, average="micro"),
            "f1": sklearn_metrics.f1_score(truth, called, average="micro"),
            "precision": sklearn_metrics.precision_score(truth, called, average="micro"),
            "recall": sklearn_metrics.recall_score(truth, called, average="micro"),
            "accuracy": (truth == called).mean(),
        },
        abs=1e-9,
    )
    assert found["crg"] == pytest.approx(literal_crg(called > 0, truth > 0), abs=1e-12)


scores_and_truth = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=25
)


@given(scores_and_truth)
@settings(max_examples=40, deadline=None)
def test_ranking_figures_equal_their_definitions(rows: list[tuple[float, bool]]) -> None:
    score, truth = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    assert auroc(score, truth) == pytest.approx(literal_auroc(score, truth), abs=1e-12, nan_ok=True)
    assert average_precision(score, truth) == pytest.approx(literal_ap(score, truth), abs=1e-12, nan_ok=True)


def test_unknown_labels_are_left_out() -> None:
    probability, label = table(0)
    label[::3, 0], label[:, 1] = np.nan, np.nan
    found = classification_figures(probability, label, NAMES)
    known = ~np.isnan(label[:, 0])
    alone = classification_figures(probability[known, :1], label[known, :1], ("a",))
    assert found["per_disease"]["a"] == alone["per_disease"]["a"]
    assert all(math.isnan(found["per_disease"]["b"][figure]) for figure in ("auroc", "f1", "accuracy"))
    assert found["micro"]["accuracy"] == pytest.approx(
        ((probability >= 0.5) == (label > 0.5))[~np.isnan(label)].mean()
    )
    assert math.isnan(found["crg"])  # no case is known whole


def test_crg_at_its_fixed_points() -> None:
    truth = np.random.default_rng(0).random((30, 18)) < 0.2
    assert crg(truth, truth) == pytest.approx(1.0)
    assert crg(np.zeros_like(truth), truth) == pytest.approx(1 / 3)
    assert crg(np.ones_like(truth), truth) == pytest.approx(1 / 3)
    assert crg(~truth, truth) == pytest.approx(literal_crg(~truth, truth))
    with pytest.raises(ValueError, match="positive"):
        crg(truth, np.zeros_like(truth))


def test_tables_that_do_not_fit_are_refused_with_their_rows() -> None:
    probability, label = table(0)
    with pytest.raises(ValueError, match=r"\(60, 3\)"):
        predictions(probability[:, :3], label)
    probability[7, 1] = np.nan
    with pytest.raises(ValueError, match=r"NaN .* rows are 7"):
        predictions(probability, label)
    probability[7, 1] = 0.5
    label[9, 0] = 2
    with pytest.raises(ValueError, match=r"neither 0 nor 1 .* rows are 9"):
        predictions(probability, label)
    with pytest.raises(ValueError, match="3 disease names for 4"):
        classification_figures(*table(0), NAMES[:3])


def literal_f1(called: np.ndarray, truth: np.ndarray) -> float:
    hits, total = (called & truth).sum(), called.sum() + truth.sum()
    return 2 * hits / total if total else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_tuned_thresholds_are_the_best_of_all_cuts(seed: int) -> None:
    probability, label = table(seed, digits=1)
    truth = label > 0.5
    cuts = np.arange(-0.05, 1.11, 0.1)  # between the scores
    best_f1 = tune_thresholds(probability, label, "f1")
    for k in range(3):
        best = max(literal_f1(probability[:, k] >= cut, truth[:, k]) for cut in cuts)
        assert literal_f1(probability[:, k] >= best_f1[k], truth[:, k]) == pytest.approx(best, abs=1e-12)
    assert best_f1[3] == 0.5  # no positive, no F1
    best_crg = tune_thresholds(probability, label, "crg")
    reached = literal_crg(probability >= best_crg, truth)
    for k, cut in itertools.product(range(4), cuts):
        other = best_crg.copy()
        other[k] = cut
        assert literal_crg(probability >= other, truth) <= reached + 1e-12


def test_thresholds_carry_over_to_another_split() -> None:
    threshold = tune_thresholds(*table(0), "f1")
    probability, label = table(1)
    found = classification_figures(probability, label, NAMES, threshold)
    assert found["per_disease"]["b"]["f1"] == pytest.approx(
        sklearn_metrics.f1_score(label[:, 1], probability[:, 1] >= threshold[1], zero_division=0)
    )


def test_thresholds_of_extreme_probabilities() -> None:
    label = np.array([[1.0], [0.0]])
    assert 0 < tune_thresholds(np.array([[1.0], [0.0]]), label)[0] < 1
    useless = tune_thresholds(np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), "crg")
    assert useless[0] == 0.5
    near = np.array([[np.nextafter(0.5, 1)], [0.5]])
    assert ((near >= tune_thresholds(near, label)) == [[True], [False]]).all()
    with pytest.raises(ValueError, match="logits"):
        tune_thresholds(np.array([[3.0], [0.1]]), label)
    with pytest.raises(ValueError, match="CRG needs"):
        tune_thresholds(near, np.zeros((2, 1)), "crg")


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.one_of(st.floats(0, 1), st.just(np.nextafter(1.0, 2.0))),
)
@settings(max_examples=40, deadline=None)
def test_shift_keeps_order_and_moves_the_cut_to_one_half(p: list[float], cut: float) -> None:
    probability = np.sort(np.array(p))[:, None]
    shifted = shift_to_half(probability, np.array([cut]))
    assert ((shifted >= 0.5) == (probability >= cut)).all()
    assert (np.diff(shifted[:, 0]) >= 0).all()
    assert ((shifted >= 0) & (shifted <= 1)).all()


def test_a_shift_to_one_half_reaches_the_tuned_crg_there() -> None:
    probability, label = table(2)
    threshold = tune_thresholds(probability, label, "crg")
    shifted = shift_to_half(probability, threshold)
    truth = label > 0.5
    best = crg(probability >= threshold, truth)
    assert crg(shifted >= 0.5, truth) == best
    assert best >= crg(probability >= 0.5, truth)
    positive = truth[:, 0]
    assert auroc(shifted[:, 0], positive) == auroc(probability[:, 0], positive)
    with pytest.raises(ValueError, match="4 diseases for 3"):
        shift_to_half(probability[:, :3], threshold)
