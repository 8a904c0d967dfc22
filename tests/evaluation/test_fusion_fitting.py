"""The weights of classifier and localizer: equal to scikit-learn's, and never worse than a blind head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vlm3d.evaluation.fusion_fitting import (
    MASK_CUTS,
    MIN_OF_EACH,
    dice_at_cuts,
    fit_fusion,
    fit_logistic,
    fit_mask_offsets,
    presence_threshold,
)
from vlm3d.labels import DISEASE_NAMES, LESIONS


@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    feature = rng.normal(size=(64, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, -2.0]
    label = rng.random(64) < 1 / (1 + np.exp(-(feature[:, 0] + 0.2 * feature[:, 1] - 1)))
    scaled = (feature - feature.mean(axis=0)) / feature.std(axis=0)
    peer = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled, label)
    own = fit_logistic(feature, label)
    expected = scaled @ peer.coef_[0] + peer.intercept_[0]
    np.testing.assert_allclose(feature @ own[:-1] + own[-1], expected, atol=1e-4)


def test_separable_cases_have_finite_weights() -> None:
    feature = np.arange(20.0)[:, None]
    assert np.isfinite(fit_logistic(feature, feature[:, 0] > 9)).all()


def heads(cases: int = 200, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """A classifier that is blind for nodules beside a mask that shows them, and peaks without any sense else."""
    rng = np.random.default_rng(seed)
    present = {lesion.key: (rng.random(cases) < 0.4).astype(float) for lesion in LESIONS}
    labels = {name: (rng.random(cases) < 0.4).astype(float) for name in DISEASE_NAMES}
    labels["Lung nodule"] = present["lung_nodule"]
    peaks = {key: rng.normal(size=cases) for key in present}
    peaks["lung_nodule"] = 2 * present["lung_nodule"] + rng.normal(size=cases)
    logits = {name: 3 * label + rng.normal(size=cases) for name, label in labels.items()}
    logits["Lung nodule"] = rng.normal(size=cases)
    dice = {
        key: np.where(has[:, None] > 0, rng.random((cases, 1)), 0.0) / (1 + np.abs(MASK_CUTS + 1.5))
        for key, has in present.items()
    }
    return {"logits": logits, "peaks": peaks, "labels": labels, "present": present, "dice": dice}


def test_the_mask_speaks_where_the_classifier_is_blind() -> None:
    found = heads()
    fusion = fit_fusion(**found, lesions=LESIONS)
    assert fusion is not None
    assert set(fusion.diseases) == {lesion.disease for lesion in LESIONS}
    mix = fusion.diseases["Lung nodule"]
    other = heads(seed=1)
    scores = [
        mix.probability(logit, {"lung_nodule": peak})
        for logit, peak in zip(other["logits"]["Lung nodule"], other["peaks"]["lung_nodule"], strict=True)
    ]
    truth = other["labels"]["Lung nodule"]
    assert roc_auc_score(truth, scores) > roc_auc_score(truth, other["logits"]["Lung nodule"]) + 0.3
    best = int(np.argmin(np.abs(MASK_CUTS + fusion.mask_offsets["lung_nodule"])))
    own = [
        fusion.lesions["lung_nodule"].probability(logit, {"lung_nodule": peak})
        for logit, peak in zip(found["logits"]["Lung nodule"], found["peaks"]["lung_nodule"], strict=True)
    ]
    assert MASK_CUTS[best] == -1.5
    has = found["present"]["lung_nodule"] == 1
    expected = presence_threshold(np.array(own), found["dice"]["lung_nodule"][:, best], has)
    assert fusion.lesion_thresholds["lung_nodule"] == expected
    opacity = fusion.diseases["Lung opacity"]
    assert abs(opacity.classifier) > 5 * max(map(abs, opacity.masks.values()))


def test_unknown_labels_are_left_out_and_few_cases_fit_nothing() -> None:
    found = heads()
    found["labels"]["Lung nodule"][::2] = np.nan
    found["present"]["pleural_effusion"][:] = np.nan
    found["present"]["consolidation"][:] = 0.0
    found["present"]["consolidation"][: MIN_OF_EACH - 1] = 1.0
    fusion = fit_fusion(**found, lesions=LESIONS)
    assert fusion is not None
    assert "Lung nodule" in fusion.diseases
    assert set(fusion.lesions) == {"pericardial_effusion", "ground_glass_opacity", "lung_nodule"}
    assert set(fusion.lesion_thresholds) == set(fusion.lesions)
    few = {part: {key: values[:4] for key, values in table.items()} for part, table in found.items()}
    assert fit_fusion(**few, lesions=LESIONS) is None


def test_dice_at_every_cut_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 6, 7)).astype(np.float32))
    logits[0, 0, :3] = 0.25  # on a cut: belongs to the mask
    true = rng.random((5, 6, 7)) < 0.3
    expected = [
        2 * (drawn & true).sum() / (drawn.sum() + true.sum())
        for drawn in (logits.numpy() >= c for c in MASK_CUTS)
    ]
    np.testing.assert_allclose(dice_at_cuts(logits, true), expected)
    invented = dice_at_cuts(logits, np.zeros_like(true))
    np.testing.assert_array_equal(invented, np.where(float(logits.max()) >= MASK_CUTS, 0.0, np.nan))


@pytest.mark.parametrize("seed", range(5))
def test_a_lesion_is_drawn_where_that_raises_the_mean_dice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, 8, 40) / 8
    has = rng.random(40) < probability
    dice = np.where(has, rng.random(40), np.where(rng.random(40) < 0.5, 0.0, np.nan))  # NaN: nothing to draw

    def mean_dice(threshold: float) -> float:
        of_case = np.where(probability >= threshold, dice, np.where(has, 0.0, np.nan))
        return float(np.nanmean(of_case))

    best = max(map(mean_dice, np.arange(0, 9) / 8))
    assert mean_dice(presence_threshold(probability, dice, has)) == pytest.approx(best)


def test_an_outline_moves_to_where_it_fits_and_stays_where_few_cases_tell() -> None:
    timid = np.repeat(np.where(MASK_CUTS == -1.5, 0.8, 0.3)[None], MIN_OF_EACH, axis=0)
    blind = np.zeros((MIN_OF_EACH, len(MASK_CUTS)))
    found = fit_mask_offsets({"consolidation": timid, "lung_nodule": timid[1:], "pleural_effusion": blind})
    assert found == {"consolidation": 1.5, "pleural_effusion": 0.0}
