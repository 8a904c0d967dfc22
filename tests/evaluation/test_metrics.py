"""Metrics against literal formulas, over random and degenerate cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vlm3d import MultiTaskMetrics
from vlm3d.evaluation.metrics import auroc, average_precision, crg


@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_ap_equal_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.round(rng.random(40), 1)  # ties
    truth = rng.random(40) < 0.4
    pairs = [(s, t) for s, t in itertools.product(score[truth], score[~truth])]
    assert auroc(score, truth) == pytest.approx(
        np.mean([(s > t) + 0.5 * (s == t) for s, t in pairs]), abs=1e-12
    )
    expected, previous = 0.0, 0.0
    for cut in sorted(set(score), reverse=True):
        called = score >= cut
        recall = (called & truth).sum() / truth.sum()
        expected += (recall - previous) * (called & truth).sum() / called.sum()
        previous = recall
    assert average_precision(score, truth) == pytest.approx(expected, abs=1e-12)


def test_one_class_is_undefined() -> None:
    assert math.isnan(auroc(np.array([0.1, 0.9]), np.array([True, True])))
    assert math.isnan(average_precision(np.array([0.1]), np.array([False])))


def test_crg_at_its_fixed_points() -> None:
    truth = np.random.default_rng(0).random((30, 18)) < 0.2
    assert crg(truth, truth) == pytest.approx(1.0)
    assert crg(np.zeros_like(truth), truth) == pytest.approx(1 / 3)
    assert crg(np.ones_like(truth), truth) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="positive"):
        crg(truth, np.zeros_like(truth))


def test_batches_add_up_and_unknown_labels_are_left_out() -> None:
    torch.manual_seed(0)
    probabilities, labels = torch.rand(12, 18), torch.randint(0, 2, (12, 18)).float()
    labels[0, 3] = math.nan
    whole, parts = MultiTaskMetrics(), MultiTaskMetrics()
    whole.update(probabilities, labels)
    for start in range(0, 12, 5):
        parts.update(probabilities[start : start + 5], labels[start : start + 5])
    assert whole.compute() == parts.compute()
    figures = whole.compute()["classification"]
    assert figures["per_disease"]["Hiatal hernia"]["cases"] == 12
    assert figures["per_disease"]["Pericardial effusion"]["cases"] == 11
    known = labels[1:, 3].numpy() > 0.5
    assert figures["per_disease"]["Pericardial effusion"]["auroc"] == pytest.approx(
        auroc(probabilities[1:, 3].double().numpy(), known)
    )


def test_dice_and_iou() -> None:
    truth, predicted = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    truth[0, 0, :2] = 1
    predicted[0, 0, 1:3] = 0.9
    truth[1] = -1
    metrics = MultiTaskMetrics()
    metrics.update(lesion_probabilities={"lung_nodule": predicted}, lesion_masks={"lung_nodule": truth})
    nodule = metrics.compute()["localization"]["per_lesion"]["lung_nodule"]
    assert nodule == {"dice": pytest.approx(0.5), "iou": pytest.approx(1 / 3), "cases": 2}
    assert math.isnan(metrics.compute()["localization"]["per_lesion"]["consolidation"]["dice"])


def test_wrong_input_is_refused() -> None:
    metrics = MultiTaskMetrics()
    with pytest.raises(ValueError, match="NaN"):
        metrics.update(torch.full((1, 18), math.nan), torch.zeros(1, 18))
    with pytest.raises(ValueError, match="17"):
        metrics.update(torch.zeros(1, 17), torch.zeros(1, 18))
    with pytest.raises(ValueError, match="tumor"):
        metrics.update(lesion_probabilities={}, lesion_masks={"tumor": torch.zeros(1, 2, 2, 2)})
    assert metrics.compute() == {}
