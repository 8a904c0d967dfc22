"""Classifier and localizer weighed together: the formulas, what is not drawn, and what the file may hold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.model.head_fusion import (
    LOGIT_REACH,
    HeadFusion,
    HeadOdds,
    MaskRule,
    Mix,
    Presence,
    draw_lesions,
    mask_peaks,
    shown_by,
)

NODULE = Mix(0.5, {"lung_nodule": 2.0}, -1.0)


def odds(nodule_logit: float = 0.0, mask_logit: float = -4.0) -> tuple[HeadOdds, torch.Tensor]:
    masks_LDHW = torch.full((len(LESIONS), 4, 4, 4), -4.0)
    masks_LDHW[4, 0, :2] = mask_logit  # 8 voxels of the nodule
    logits_K = torch.zeros(len(DISEASE_NAMES))
    logits_K[DISEASE_NAMES.index("Lung nodule")] = nodule_logit
    return HeadOdds.of(logits_K, DISEASE_NAMES, masks_LDHW, LESIONS), masks_LDHW


def fusion(presence: Presence | None = None, **rule: float) -> HeadFusion:
    found = MaskRule(**{"cut": 0.0, "chance_slope": 1.0, "chance_offset": 0.0, **rule}, presence=presence)
    return HeadFusion({"Lung nodule": NODULE}, {"lung_nodule": found})


def test_a_probability_is_the_logistic_of_both_heads() -> None:
    found, _ = odds(nodule_logit=1.0, mask_logit=3.0)
    probabilities = found.probabilities(fusion())
    assert probabilities["Lung nodule"] == pytest.approx(1 / (1 + math.exp(-(0.5 * 1.0 + 2.0 * 3.0 - 1.0))))
    assert probabilities["Emphysema"] == 0.5  # has no mask: the classifier's own
    alone = found.probabilities(None)
    assert alone["Lung nodule"] == pytest.approx(1 / (1 + math.exp(-1.0)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_mask_expects_the_dice_of_its_voxels_chances() -> None:
    _, masks = odds(mask_logit=1.0)
    inside, outside = 8 * sigmoid(0.5 * 1.0 - 1.0), 56 * sigmoid(0.5 * -4.0 - 1.0)
    rule = MaskRule(cut=0.5, chance_slope=0.5, chance_offset=-1.0)
    chance = rule.chance(masks[4])
    assert rule.expected_dice(chance, masks[4] >= 0.5) == pytest.approx(2 * inside / (8 + inside + outside))
    assert rule.expected_dice(chance, masks[4] >= 1.5) == 0.0
    far = torch.tensor([200.0, -200.0])
    assert torch.equal(rule.chance(far), rule.chance(far.clamp(-LOGIT_REACH, LOGIT_REACH)))


@pytest.mark.parametrize(("logit", "is_drawn"), [(-1.6, False), (-1.3, True)])
def test_a_lesion_is_drawn_where_that_raises_the_mean_dice_and_others_always(
    logit: float, is_drawn: bool
) -> None:
    found, masks = odds(nodule_logit=logit, mask_logit=0.5)
    expected = 2 * 8 * sigmoid(0.5) / (8 + 8 * sigmoid(0.5) + 56 * sigmoid(-4.0))  # 0.71
    presence = Presence(classifier=1.0, mask=1.0, offset=0.0, dice_to_beat=0.4)
    probability = sigmoid(logit + math.log(expected / (1 - expected)))
    drawn, decisions = draw_lesions(masks, LESIONS, found, fusion(presence))
    assert torch.equal(drawn[4], masks[4].sigmoid() if is_drawn else torch.zeros(4, 4, 4))
    assert torch.equal(drawn[:4], masks[:4].sigmoid())
    assert set(decisions) == {"lung_nodule"}
    decision = decisions["lung_nodule"]
    assert decision.expected_dice == pytest.approx(expected)
    assert decision.presence == pytest.approx(probability)
    assert decision.presence_threshold == pytest.approx(0.4 / (0.4 + expected))
    assert decision.is_drawn == is_drawn == (probability * expected >= (1 - probability) * 0.4)
    without, none = draw_lesions(masks, LESIONS, found, None)
    assert torch.equal(without, masks.sigmoid())
    assert none == {}


def test_a_mask_without_a_voxel_has_a_probability_and_a_threshold() -> None:
    presence = Presence(classifier=1.0, mask=1.0, offset=0.0, dice_to_beat=0.0)
    assert presence.threshold(0.0) == 1.0
    assert 0 <= presence.probability(-1e9, 0.0) < presence.probability(1e9, 1.0) <= 1


def test_a_cut_moves_the_outline_of_its_own_mask() -> None:
    found, masks = odds(mask_logit=-0.5)
    drawn, _ = draw_lesions(masks, LESIONS, found, fusion(cut=-1.0))
    assert (drawn[4] >= 0.5).sum() == 8
    torch.testing.assert_close(drawn[4], (masks[4] + 1.0).sigmoid())
    assert torch.equal(drawn[:4], masks[:4].sigmoid())


def beside_an_unsure_piece() -> torch.Tensor:
    """Logits (L, 24, 8, 8): a nodule of 8 voxels of 3, far from it one of 2 voxels of 1, each with a rim of -0.4."""
    masks = torch.full((len(LESIONS), 24, 8, 8), -9.0)
    masks[4, :3, :4, :4] = masks[4, 19:22, 4:, 4:] = -0.4
    masks[4, 1, 1:3, :4], masks[4, 20, 5, 5:7] = 3.0, 1.0
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsure_pieces_are_left_out_with_their_rims(dtype: torch.dtype) -> None:
    found, _ = odds()
    masks = beside_an_unsure_piece().to(dtype)
    rule = {"chance_offset": -1.5, "min_piece_chance": 0.5}  # chances of 0.82 and 0.38
    before = masks.clone()
    drawn, _ = draw_lesions(masks, LESIONS, found, fusion(**rule))
    assert torch.equal(masks, before)
    assert (drawn[4] >= 0.5).sum() == 8
    assert drawn[4, 12:].max() < 0.01
    torch.testing.assert_close(drawn[4, :12], masks[4, :12].float().sigmoid())
    kept = draw_lesions(masks, LESIONS, found, fusion(chance_offset=-1.5))[0]
    assert torch.equal(kept, masks.float().sigmoid())
    assert (kept[4] >= 0.5).sum() == 10
    nothing, decisions = draw_lesions(masks, LESIONS, found, fusion(chance_offset=-9.0, min_piece_chance=0.5))
    assert nothing[4].max() == 0
    assert decisions["lung_nodule"].is_drawn  # no presence was fitted


def test_a_peak_is_the_mean_of_eight_voxels_so_that_one_alone_says_little() -> None:
    mask = torch.full((1, 4, 4, 4), -5.0)
    mask[0, 0, 0, 0] = 11.0
    assert mask_peaks(mask).item() == pytest.approx((11.0 - 35.0) / 8)
    assert mask_peaks(torch.ones(2, 1, 1, 3)).tolist() == [1.0, 1.0]


def test_a_consolidation_shows_a_lung_opacity_too() -> None:
    assert shown_by("Lung opacity", LESIONS) == ["consolidation", "ground_glass_opacity"]
    assert shown_by("Lung nodule", LESIONS) == ["lung_nodule"]
    assert shown_by("Emphysema", LESIONS) == []


@pytest.mark.parametrize("presence", [None, Presence(0.5, 1.5, -1.0, 0.4)])
def test_a_fusion_comes_back_from_its_file(presence: Presence | None) -> None:
    whole = fusion(presence, min_piece_chance=0.5)
    assert HeadFusion.from_json(json.loads(json.dumps(asdict(whole)))) == whole


RULE = asdict(fusion().masks["lung_nodule"])


@pytest.mark.parametrize(
    "change",
    [
        {"diseases": {"Gout": asdict(NODULE)}},
        {"diseases": {"Lung nodule": {"classifier": 1.0, "masks": {"gout": 1.0}, "offset": 0.0}}},
        {"diseases": {"Lung nodule": {"classifier": 1.0, "offset": 0.0}}},
        {"diseases": {"Lung nodule": {"classifier": math.nan, "masks": {}, "offset": 0.0}}},
        {"masks": {"gout": RULE}},
        {"masks": {"lung_nodule": {"cut": 0.0, "chance_slope": 1.0, "chance_offset": 0.0}}},
        {"masks": {"lung_nodule": {**RULE, "cut": math.inf}}},
        {"masks": {"lung_nodule": {**RULE, "cut": True}}},
        {"masks": {"lung_nodule": {**RULE, "presence": {"classifier": 1.0}}}},
        {"masks": {"lung_nodule": {**RULE, "presence": 1.0}}},
        {
            "masks": {
                "lung_nodule": {**RULE, "presence": {**asdict(Presence(1, 1, 0, 0)), "dice_to_beat": -0.5}}
            }
        },
        {"masks": {"lung_nodule": {**RULE, "min_piece_chance": 1.5}}},
        {"masks": None},
    ],
)
def test_a_damaged_fusion_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        HeadFusion.from_json({**asdict(fusion()), **change})
