"""The weights of classifier and localizer equal scikit-learn's; masks are cut and left out where that raises the Dice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from vlm3d.evaluation.fusion_fitting import (
    BIN_CENTERS,
    MASK_CUTS,
    MIN_OF_EACH,
    MIN_PIECE_CHANCE,
    MaskCounts,
    MaskScan,
    fit_fusion,
    fit_logistic,
    fit_mask_rule,
    fit_presence,
)
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.model.head_fusion import MaskRule


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


@pytest.mark.parametrize("seed", range(3))
def test_equal_observations_may_stand_in_one_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    feature, trials = rng.normal(size=12), rng.integers(1, 30, 12)
    hits = rng.binomial(trials, 1 / (1 + np.exp(-feature)))
    rows = np.repeat(feature, trials)
    label = np.concatenate([np.arange(n) < k for n, k in zip(trials, hits, strict=True)])
    together = fit_logistic(feature[:, None], hits / trials, trials.astype(float), ridge=0.0)
    np.testing.assert_allclose(together, fit_logistic(rows[:, None], label, ridge=0.0), atol=1e-7)


def mask(
    rng: np.random.Generator, *, lesion: bool, sure: float, timid: float = 0.0
) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Logits and truth of 12 x 12 x 12 voxels, ``timid`` too low, about a cube or, less ``sure``, about nothing."""
    true = np.zeros((12, 12, 12), bool)
    true[4:8, 4:8, 4:8] = lesion
    shown = np.zeros_like(true)
    shown[4:8, 4:8, 4:8] = True
    logits = np.where(shown, sure, -5.0) + rng.normal(size=true.shape) - timid
    return torch.from_numpy(logits.astype(np.float32)), true


def scan(rng: np.random.Generator, *, lesion: bool, sure: float, timid: float = 0.0) -> MaskScan:
    """Such a mask, with a classifier that sees nothing."""
    return MaskScan(float(rng.normal()), MaskCounts.of(*mask(rng, lesion=lesion, sure=sure, timid=timid)))


def heads(cases: int = 200, seed: int = 0) -> dict[str, dict[str, Any]]:
    """A classifier that is blind for nodules beside a mask that shows them, and peaks without any sense else."""
    rng = np.random.default_rng(seed)
    present = {lesion.key: (rng.random(cases) < 0.4).astype(float) for lesion in LESIONS}
    labels = {name: (rng.random(cases) < 0.4).astype(float) for name in DISEASE_NAMES}
    labels["Lung nodule"] = present["lung_nodule"]
    peaks = {key: rng.normal(size=cases) for key in present}
    peaks["lung_nodule"] = 2 * present["lung_nodule"] + rng.normal(size=cases)
    logits = {name: 3 * label + rng.normal(size=cases) for name, label in labels.items()}
    logits["Lung nodule"] = rng.normal(size=cases)
    scans = {
        key: [scan(rng, lesion=has > 0, sure=3.0 if has > 0 else -5.0) for has in present[key][:20]]
        for key in present
    }
    return {"logits": logits, "peaks": peaks, "labels": labels, "scans": scans}


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
    opacity = fusion.diseases["Lung opacity"]
    assert abs(opacity.classifier) > 5 * max(map(abs, opacity.masks.values()))
    assert fusion.masks == {key: fit_mask_rule(scans) for key, scans in found["scans"].items()}


def test_unknown_labels_are_left_out_and_few_cases_fit_nothing() -> None:
    found = heads()
    found["labels"]["Lung nodule"][::2] = np.nan
    del found["scans"]["pleural_effusion"]
    found["scans"]["consolidation"] = [scan(np.random.default_rng(0), lesion=False, sure=1.0)] * 20
    fusion = fit_fusion(**found, lesions=LESIONS)
    assert fusion is not None
    assert "Lung nodule" in fusion.diseases
    assert set(fusion.masks) == {"pericardial_effusion", "ground_glass_opacity", "lung_nodule"}
    few = {part: {key: values[:4] for key, values in table.items()} for part, table in found.items()}
    assert fit_fusion(**few, lesions=LESIONS) is None


def test_a_rule_moves_the_outline_to_where_it_fits_and_leaves_out_what_is_unsure() -> None:
    rng = np.random.default_rng(0)
    ill = [scan(rng, lesion=True, sure=4.0, timid=5.0) for _ in range(8)]  # at 0.5 nothing is drawn
    well = [scan(rng, lesion=False, sure=1.0, timid=5.0) for _ in range(8)]
    rule = fit_mask_rule(ill + well)
    assert rule is not None
    assert rule.presence is not None
    assert -8 < rule.cut < -1
    assert rule.chance_slope > 0
    assert rule.min_piece_chance == MIN_PIECE_CHANCE
    cut = int(np.flatnonzero(rule.cut == MASK_CUTS)[0])
    assert all(one.counts.dice()[cut] > 0.9 for one in ill)
    for lesion, sure in [(True, 4.0), (False, 1.0)] * 5:
        logits, _ = mask(rng, lesion=lesion, sure=sure, timid=5.0)  # one that was not fitted
        expected = rule.expected_dice(rule.chance(logits), logits >= rule.cut)
        assert (rule.presence.probability(0.0, expected) >= rule.presence.threshold(expected)) == lesion
    wrong = [
        MaskScan(one.logit, MaskCounts(one.counts.voxels_B, (one.counts.lesion_B > 0).astype(float)))
        for one in ill
    ]  # hardly a voxel is lesion
    mostly_wrong = fit_mask_rule(wrong + well)
    assert mostly_wrong is not None
    assert mostly_wrong.min_piece_chance == 0.0


def test_variations_of_a_scan_are_no_further_cases() -> None:
    rng = np.random.default_rng(0)
    ill = [scan(rng, lesion=True, sure=4.0) for _ in range(MIN_OF_EACH)]
    well = [scan(rng, lesion=False, sure=1.0) for _ in range(MIN_OF_EACH)]
    copies = [replace(one, varied=True) for one in ill + well]
    assert fit_mask_rule(ill[1:] + well + copies) is None
    always = fit_mask_rule(ill + well[1:] + copies)
    assert always is not None
    assert always.presence is None
    whole = fit_mask_rule(ill + well + copies)
    assert whole is not None
    assert whole.presence is not None


@pytest.mark.parametrize("seed", range(3))
def test_counts_expect_the_dice_that_the_rule_expects_of_the_mask(seed: int) -> None:
    logits, true = mask(np.random.default_rng(seed), lesion=True, sure=2.0)
    rule = MaskRule(cut=1.0, chance_slope=0.7, chance_offset=-2.0)
    chance_B = rule.chance(torch.from_numpy(BIN_CENTERS)).double().numpy()
    counted = MaskCounts.of(logits, true).expected_dice(chance_B, int(np.flatnonzero(MASK_CUTS == 1.0)[0]))
    assert counted == pytest.approx(rule.expected_dice(rule.chance(logits), logits >= 1.0), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_mean_dice_to_beat_draws_better(seed: int) -> None:
    """Of all values of `dice_to_beat` the one that was found gives the highest mean Dice that the chances allow."""
    rng = np.random.default_rng(seed)
    has = rng.random(60) < 0.5
    expected, logit = np.clip(0.4 * has + 0.6 * rng.random(60), 0, 1), has + rng.normal(size=60)
    presence = fit_presence(logit, expected, has)
    p = np.array([presence.probability(*pair) for pair in zip(logit, expected, strict=True)])

    def mean_dice(beat: float) -> float:
        shown = p * expected >= (1 - p) * beat
        return float((p * expected)[shown].sum() / (p + (1 - p) * shown).sum())

    assert mean_dice(presence.dice_to_beat) == pytest.approx(presence.dice_to_beat)
    assert max(map(mean_dice, np.linspace(0, 1, 101))) <= presence.dice_to_beat + 1e-9


def test_a_classifier_without_numbers_ends_the_fit() -> None:
    has = np.arange(12) % 2 == 0
    with np.errstate(invalid="ignore"):
        presence = fit_presence(np.full(12, np.nan), np.linspace(0.1, 0.9, 12), has)
    assert presence.dice_to_beat == 0.0


def test_dice_at_every_cut_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 6, 7)).astype(np.float32))
    logits[0, 0, :3] = 0.25  # on a cut: belongs to the mask
    true = rng.random((5, 6, 7)) < 0.3
    expected = [
        2 * (drawn & true).sum() / (drawn.sum() + true.sum())
        for drawn in (logits.numpy() >= c for c in MASK_CUTS)
    ]
    np.testing.assert_allclose(MaskCounts.of(logits, true).dice(), expected)
    invented = MaskCounts.of(logits, np.zeros_like(true)).dice()
    np.testing.assert_array_equal(invented, np.where(float(logits.max()) >= MASK_CUTS, 0.0, np.nan))
