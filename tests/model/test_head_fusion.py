"""Classifier and localizer weighed together: the formula, what is not drawn, and what the file may hold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.model.head_fusion import HeadFusion, HeadOdds, Mix, drawn_probability, mask_peaks, shown_by

NODULE = Mix(0.5, {"lung_nodule": 2.0}, -1.0)


def odds(nodule_logit: float = 0.0, mask_logit: float = -4.0) -> tuple[HeadOdds, torch.Tensor]:
    masks_LDHW = torch.full((len(LESIONS), 4, 4, 4), -4.0)
    masks_LDHW[4, 0, :2] = mask_logit  # 8 voxels of the nodule
    logits_K = torch.zeros(len(DISEASE_NAMES))
    logits_K[DISEASE_NAMES.index("Lung nodule")] = nodule_logit
    return HeadOdds.of(logits_K, DISEASE_NAMES, masks_LDHW, LESIONS), masks_LDHW


def fusion(threshold: float = 0.5) -> HeadFusion:
    return HeadFusion({"Lung nodule": NODULE}, {"lung_nodule": NODULE}, {"lung_nodule": threshold})


def test_a_probability_is_the_logistic_of_both_heads() -> None:
    found, _ = odds(nodule_logit=1.0, mask_logit=3.0)
    probabilities = found.probabilities(fusion())
    assert probabilities["Lung nodule"] == pytest.approx(1 / (1 + math.exp(-(0.5 * 1.0 + 2.0 * 3.0 - 1.0))))
    assert probabilities["Emphysema"] == 0.5  # has no mask: the classifier's own
    alone = found.probabilities(None)
    assert alone["Lung nodule"] == pytest.approx(1 / (1 + math.exp(-1.0)))


def test_a_lesion_that_is_not_thought_to_be_there_is_not_drawn_and_others_are() -> None:
    found, masks = odds(mask_logit=-0.5)  # odds of -2: a probability of 0.12
    drawn = drawn_probability(masks, LESIONS, found, fusion())
    assert drawn[4].max() == 0
    assert torch.equal(drawn[:4], masks[:4].sigmoid())
    assert torch.equal(drawn_probability(masks, LESIONS, found, fusion(0.1)), masks.sigmoid())
    assert torch.equal(drawn_probability(masks, LESIONS, found, None), masks.sigmoid())
    assert found.presence(LESIONS, fusion()) == {"lung_nodule": pytest.approx(1 / (1 + math.exp(2.0)))}
    assert found.presence(LESIONS, None) == {}


def test_an_offset_moves_the_outline_of_its_own_mask() -> None:
    found, masks = odds(nodule_logit=9.0, mask_logit=-0.5)
    moved = replace(fusion(), mask_offsets={"lung_nodule": 1.0})
    drawn = drawn_probability(masks, LESIONS, found, moved)
    assert (drawn[4] >= 0.5).sum() == 8
    torch.testing.assert_close(drawn[4], (masks[4] + 1.0).sigmoid())
    assert torch.equal(drawn[:4], masks[:4].sigmoid())


def test_a_peak_is_the_mean_of_eight_voxels_so_that_one_alone_says_little() -> None:
    mask = torch.full((1, 4, 4, 4), -5.0)
    mask[0, 0, 0, 0] = 11.0
    assert mask_peaks(mask).item() == pytest.approx((11.0 - 35.0) / 8)
    assert mask_peaks(torch.ones(2, 1, 1, 3)).tolist() == [1.0, 1.0]


def test_a_consolidation_shows_a_lung_opacity_too() -> None:
    assert shown_by("Lung opacity", LESIONS) == ["consolidation", "ground_glass_opacity"]
    assert shown_by("Lung nodule", LESIONS) == ["lung_nodule"]
    assert shown_by("Emphysema", LESIONS) == []


def test_a_fusion_comes_back_from_its_file() -> None:
    whole = replace(fusion(), mask_offsets={"lung_nodule": -0.25})
    assert HeadFusion.from_json(json.loads(json.dumps(asdict(whole)))) == whole
    older = {key: value for key, value in asdict(whole).items() if key != "mask_offsets"}
    assert HeadFusion.from_json(older) == fusion()


@pytest.mark.parametrize(
    "change",
    [
        {"diseases": {"Gout": asdict(NODULE)}},
        {"diseases": {"Lung nodule": {"classifier": 1.0, "masks": {"gout": 1.0}, "offset": 0.0}}},
        {"diseases": {"Lung nodule": {"classifier": 1.0, "offset": 0.0}}},
        {"diseases": {"Lung nodule": {"classifier": math.nan, "masks": {}, "offset": 0.0}}},
        {"lesions": {}},
        {"lesion_thresholds": {"lung_nodule": True}},
        {"lesion_thresholds": None},
        {"mask_offsets": {"gout": 1.0}},
        {"mask_offsets": {"lung_nodule": math.inf}},
    ],
)
def test_a_damaged_fusion_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        HeadFusion.from_json({**asdict(fusion()), **change})
