"""Calibration against torchmetrics, scikit-learn and a loop over bins."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss

from vlm3d.evaluation.calibration import brier_score, expected_calibration_error, reliability

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchmetrics.functional.classification import binary_calibration_error


@pytest.mark.parametrize("seed", range(3))
def test_ece_and_brier_equal_torchmetrics_and_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.random((200, 3))
    label = (rng.random((200, 3)) < probability).astype(float)
    ece, brier = expected_calibration_error(probability, label, bins=15), brier_score(probability, label)
    for k in range(3):
        score, truth = torch.tensor(probability[:, k]), torch.tensor(label[:, k]).long()
        peer = binary_calibration_error(score, truth, n_bins=15, norm="l1")
        assert ece[k] == pytest.approx(float(peer), abs=1e-9)
        assert brier[k] == pytest.approx(brier_score_loss(label[:, k], probability[:, k]), abs=1e-9)


def test_reliability_counts_each_bin() -> None:
    probability = np.array([[0.0], [0.1], [0.5], [0.55], [1.0], [0.7]])
    label = np.array([[0.0], [1.0], [1.0], [0.0], [1.0], [np.nan]])
    found = reliability(probability, label, bins=2)
    assert found.edge.tolist() == [0, 0.5, 1]
    assert found.cases_KB.tolist() == [[2, 3]]
    np.testing.assert_allclose(found.mean_probability_KB, [[0.05, (0.5 + 0.55 + 1) / 3]])
    np.testing.assert_allclose(found.positive_share_KB, [[0.5, 2 / 3]])
    expected = 2 / 5 * 0.45 + 3 / 5 * abs(2.05 / 3 - 2 / 3)
    assert expected_calibration_error(probability, label, bins=2)[0] == pytest.approx(expected, abs=1e-12)


def test_nothing_known_and_logits() -> None:
    nothing = np.full((2, 1), np.nan)
    assert math.isnan(expected_calibration_error(np.full((2, 1), 0.5), nothing)[0])
    assert math.isnan(brier_score(np.full((2, 1), 0.5), nothing)[0])
    with pytest.raises(ValueError, match="logits"):
        reliability(np.array([[2.0]]), np.array([[1.0]]))
