"""Lesion locations as words and as tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from support.small_models import small_config, small_language_model
from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.location import LesionLocationInjector, describe_findings, told_pieces
from vlm3d.model.report_generator import LesionEvidence, ReportGenerator


@dataclass
class Piece:
    side: str = "right"
    region: str = "right upper lobe"
    level: str = "upper"
    volume_ml: float = 0.94
    max_diameter_mm: float = 12.3


def lungs() -> torch.Tensor:
    """Regions (1, D, H, W): the patient's right lung at low w, upper lobes on top."""
    regions = torch.zeros(1, 12, 8, 16, dtype=torch.uint8)
    regions[:, :6, :, 1:7] = REGION_IDS["right_lower_lobe"]
    regions[:, 6:, :, 1:7] = REGION_IDS["right_upper_lobe"]
    regions[:, :6, :, 9:15] = REGION_IDS["left_lower_lobe"]
    regions[:, 6:, :, 9:15] = REGION_IDS["left_upper_lobe"]
    return regions


def masks_with(key: str, *boxes: tuple[slice, slice, slice]) -> torch.Tensor:
    masks = torch.zeros(1, len(LESION_KEYS), 12, 8, 16)
    for box in boxes:
        masks[(0, LESION_KEYS.index(key), *box)] = 1
    return masks


def test_findings_are_listed_in_the_labels_order_with_places() -> None:
    text = describe_findings(
        ["Pleural effusion", "Lung nodule", "Cardiomegaly", "Lung opacity"],
        {
            "lung_nodule": [Piece(volume_ml=32.4), *[Piece(side="left", region="", volume_ml=31.7)] * 4],
            "ground_glass_opacity": [Piece(region="liver", level="lower")],
            "pericardial_effusion": [Piece(side="midline", region="heart", level="middle")],
        },
    )
    assert text == (
        "Cardiomegaly; "
        "Pericardial effusion: heart, middle third, 12 mm, 0.9 ml; "
        "Lung nodule: right upper lobe, upper third, 12 mm, 32 ml and left, upper third, 12 mm, 32 ml "
        "and left, upper third, 12 mm, 32 ml and 2 more; "
        "Lung opacity; Ground-glass opacity: right liver, lower third, 12 mm, 0.9 ml; "
        "Pleural effusion"
    )


@pytest.mark.parametrize("key", ["bronchiectasis", "consolidation", "ground_glass_opacity"])
def test_what_falls_into_pieces_is_told_once_a_place_and_where_there_is_enough_of_it(key: str) -> None:
    pieces = [
        Piece(volume_ml=3.0),
        Piece(side="left", region="left lower lobe", level="lower", volume_ml=2.5),
        *[Piece(side="left", region="left lower lobe", volume_ml=1.0)] * 2,
        Piece(region="right middle lobe", volume_ml=0.4),
    ]
    (told, more) = told_pieces(key, pieces)
    assert [(piece.region, piece.volume_ml) for piece in told] == [
        ("left lower lobe", 2.5),
        ("right upper lobe", 3.0),
    ]
    assert more == 0
    assert told_pieces("lung_nodule", pieces) == (pieces[:3], 1)
    assert told_pieces("lung_nodule", [pieces[0], replace(pieces[1], volume_ml=0.8)]) == (pieces[:1], 0)
    assert told_pieces(key, []) == ([], 0)


def test_fluid_is_told_by_its_side_and_around_the_heart_as_one() -> None:
    pieces = [Piece(volume_ml=400.0), Piece(region="ribs", volume_ml=3.0), Piece(side="left", volume_ml=4.0)]
    assert told_pieces("pleural_effusion", pieces) == (pieces[:1], 0)
    assert told_pieces("pericardial_effusion", pieces) == (pieces[:1], 0)


@pytest.mark.parametrize("key", ["pleural_effusion", "consolidation"])
def test_what_is_large_is_told_however_much_there_is_elsewhere(key: str) -> None:
    pieces = [Piece(volume_ml=600.0), Piece(side="left", region="left lower lobe", volume_ml=51.0)]
    assert told_pieces(key, pieces) == (pieces, 0)
    small = [pieces[0], replace(pieces[1], volume_ml=49.0)]
    assert told_pieces(key, small) == (small[:1], 0)


def test_masks_are_measured_into_words() -> None:
    injector = LesionLocationInjector("text", 8, 8)
    assert list(injector.parameters()) == []
    box = (slice(1, 3), slice(2, 4), slice(10, 13))
    probabilities = torch.zeros(1, 18)
    probabilities[0, DISEASE_NAMES.index("Emphysema")] = 0.7
    (text,) = injector.describe(probabilities, masks_with("lung_nodule", box), lungs(), (5.0, 2.0, 2.0))
    assert text == "Emphysema; Lung nodule: left lower lobe, lower third, 6 mm, 0.2 ml"
    mirrored = masks_with("lung_nodule", (box[0], box[1], slice(3, 6)))
    assert "right lower lobe" in injector.describe(probabilities, mirrored, lungs(), (5.0, 2.0, 2.0))[0]
    assert injector.describe(probabilities, disease_thresholds=0.8) == ["no abnormal finding"]


def test_tokens_hold_the_features_under_the_mask_and_absence_has_its_own() -> None:
    torch.manual_seed(0)
    injector = LesionLocationInjector("embedding", 8, 16, output_rms=0.3)
    grid, patches = (3, 2, 4), torch.randn(1, 24, 8, requires_grad=True)
    masks = masks_with("lung_nodule", (slice(0, 4), slice(0, 4), slice(0, 4)))
    tokens = injector.embed(patches, masks, grid)
    assert tokens.shape == (1, 5, 16)
    assert torch.allclose(tokens.square().mean(-1).sqrt(), torch.full((1, 5), 0.3), atol=1e-3)
    tokens[0, LESION_KEYS.index("lung_nodule")].sum().backward()
    touched = patches.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [True] + [False] * 23
    without = injector.embed(patches, torch.zeros_like(masks), grid)
    assert torch.equal(without[0, :4], tokens[0, :4])
    assert not torch.allclose(without[0, 4], tokens[0, 4], atol=1e-2)
    with pytest.raises(ValueError, match="makes no embeddings"):
        LesionLocationInjector("text", 8, 16).embed(patches, masks, grid)


def test_both_strategies_together_train_every_parameter() -> None:
    torch.manual_seed(0)
    llm = small_language_model()
    for parameter in llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    generator = ReportGenerator(llm, 32, small_config(location_strategy="both").model.report)
    tokens, mask = generator.tokenize_reports(["Findings: A nodule."])
    image = (torch.randn(1, 32), torch.randn(1, 20, 32), torch.randn(1, 24, 32))
    found = LesionEvidence(
        torch.zeros(1, 18), masks_with("lung_nodule", (slice(0, 4),) * 3), lungs(), (5.0, 2.0, 2.0), (3, 2, 4)
    )
    loss = generator(*image, tokens, mask, evidence=found)["loss"]
    loss.backward()
    silent = [name for name, p in generator.named_parameters() if p.requires_grad and not (p.grad != 0).any()]
    assert silent == []
    elsewhere = LesionEvidence(
        torch.zeros(1, 18),
        masks_with("lung_nodule", (slice(8, 12),) * 2 + (slice(12, 16),)),
        lungs(),
        grid=(3, 2, 4),
    )
    assert not torch.equal(loss, generator(*image, tokens, mask, evidence=elsewhere)["loss"])
    with pytest.raises(ValueError, match="needs evidence"):
        generator(*image, tokens, mask)
