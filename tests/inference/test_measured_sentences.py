"""What repair says of a finding, from its mask alone."""

from __future__ import annotations

from typing import Any

import pytest

from support.predictions import component, make_prediction
from vlm3d.evaluation.location_facts import location_facts
from vlm3d.inference.measured_sentences import located_sentence, sided_line
from vlm3d.inference.prediction import AttentionPlace


def piece(region: str, diameter_mm: float = 9.0, volume_ml: float = 2.5) -> dict[str, Any]:
    side = region.split()[0] if region.split()[:1] in (["right"], ["left"]) else "left"
    return component(6, region, diameter_mm) | {"side": side, "volume_ml": volume_ml}


SPECK = piece("left upper lobe", volume_ml=0.1)


@pytest.mark.parametrize(
    ("disease", "pieces", "sentence"),
    [
        ("Emphysema", {}, "Emphysema."),
        (
            "Lung nodule",
            {"lung_nodule": [piece("right upper lobe", 12)]},
            "Lung nodule of 12 mm in the right upper lobe.",
        ),
        (
            "Lung nodule",
            {
                "lung_nodule": [
                    piece("right upper lobe", 12),
                    piece("ribs", 6),
                    *[piece("left lower lobe", 5)] * 3,
                ]
            },
            "Lung nodule of 12 mm in the right upper lobe, of 6 mm on the left, of 5 mm in the left lower lobe and 2 more.",
        ),
        (
            "Lung opacity",
            {
                "ground_glass_opacity": [
                    piece("left upper lobe"),
                    piece("left upper lobe"),
                    piece("right middle lobe"),
                ]
            },
            "Ground-glass opacity in the left upper lobe and right middle lobe.",
        ),
        (
            "Lung nodule",
            {
                "lung_nodule": [
                    piece("right upper lobe", 9.2),
                    piece("right upper lobe", 8.9),
                    piece("left lower lobe", 8),
                ]
            },
            "Two lung nodules of 9 mm in the right upper lobe and of 8 mm in the left lower lobe.",
        ),
        (
            "Lung nodule",
            {"lung_nodule": [piece("right upper lobe", 12), *[piece("left lower lobe", 8)] * 2]},
            "Lung nodule of 12 mm in the right upper lobe and two of 8 mm in the left lower lobe.",
        ),
        (
            "Pleural effusion",
            {"pleural_effusion": [piece("right pleural space", volume_ml=0.3)]},
            "Pleural effusion on the right, less than 1 ml.",
        ),
        (
            "Lung opacity",
            {"consolidation": [piece("left upper lobe")]},
            "Lung opacity in the left upper lobe.",
        ),
        (
            "Bronchiectasis",
            {"bronchiectasis": [piece("left lower lobe"), piece("right lower lobe"), SPECK]},
            "Bronchiectasis in the left lower lobe and right lower lobe.",
        ),
        (
            "Pleural effusion",
            {
                "pleural_effusion": [
                    piece("left pleural space", volume_ml=80),
                    piece("right pleural space", volume_ml=31),
                ]
            },
            "Pleural effusion on both sides, about 31 ml on the right and about 80 ml on the left.",
        ),
        (
            "Pleural effusion",
            {
                "pleural_effusion": [
                    piece("left pleural space", volume_ml=80),
                    piece("right pleural space", volume_ml=3),
                ]
            },
            "Pleural effusion on the left, about 80 ml.",
        ),
        (
            "Pericardial effusion",
            {"pericardial_effusion": [piece("heart")]},
            "Pericardial effusion of about 2 ml.",
        ),
    ],
)
def test_a_finding_is_told_with_its_places(
    disease: str, pieces: dict[str, list[dict[str, Any]]], sentence: str
) -> None:
    assert located_sentence(disease, make_prediction(pieces).lesions) == sentence


@pytest.mark.parametrize(
    ("disease", "seen", "sentence"),
    [
        ("Atelectasis", [("left", "left lower lobe")], "Atelectasis in the left lower lobe."),
        (
            "Bronchiectasis",
            [("right", "right upper lobe"), ("left", "left upper lobe")],
            "Bronchiectasis in the right upper lobe and left upper lobe.",
        ),
        ("Lymphadenopathy", [("right", "")], "Lymphadenopathy on the right."),
        ("Lymphadenopathy", [("left", ""), ("right", "")], "Lymphadenopathy on both sides."),
        ("Emphysema", [], "Emphysema."),
    ],
)
def test_without_a_mask_the_classifiers_gaze_tells_the_place(
    disease: str, seen: list[tuple[Any, str]], sentence: str
) -> None:
    places = [AttentionPlace(side=side, region=region, level="middle") for side, region in seen]
    assert located_sentence(disease, [], places) == sentence
    told = {(fact.side, fact.region) for fact in location_facts(sentence) if fact.finding == disease}
    for place in places:
        region = place.region.replace(" ", "_") or None
        assert any(side in (place.side, "bilateral") and region == where for side, where in told)


def test_the_places_are_read_back() -> None:
    lesions = make_prediction(
        {"lung_nodule": [piece("right upper lobe", 12), piece("left lower lobe", 5)]}
    ).lesions
    facts = location_facts(located_sentence("Lung nodule", lesions))
    assert [(fact.region, fact.size_mm) for fact in facts] == [
        ("right_upper_lobe", 12.0),
        ("left_lower_lobe", 5.0),
    ]


@pytest.mark.parametrize(
    ("disease", "pieces", "line"),
    [
        (
            "Lung opacity",
            {"ground_glass_opacity": [piece("left upper lobe")]},
            "Ground-glass opacity on the left.",
        ),
        (
            "Atelectasis",
            {"atelectasis": [piece("left lower lobe"), piece("right lower lobe"), SPECK]},
            "Atelectasis on both sides.",
        ),
        (
            "Pericardial effusion",
            {"pericardial_effusion": [piece("left pleural space")]},
            "Pericardial effusion.",
        ),
        ("Cardiomegaly", {}, "Cardiomegaly."),
    ],
)
def test_an_impression_names_the_side_of_what_has_one(
    disease: str, pieces: dict[str, list[dict[str, Any]]], line: str
) -> None:
    assert sided_line(disease, make_prediction(pieces).lesions) == line


def test_an_impression_names_the_side_that_the_classifier_looked_at() -> None:
    node = AttentionPlace(side="right", region="", level="upper")
    assert sided_line("Lymphadenopathy", [], [node]) == "Lymphadenopathy on the right."
