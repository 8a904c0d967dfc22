"""Sides, lobes, thirds and sizes are read from reports; phantoms' reports give back what they were written from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.cohort import sample_findings
from vlm3d.datasets.phantom.reports import write_report
from vlm3d.datasets.phantom.truth import FindingTruth
from vlm3d.evaluation.labeler import label_report
from vlm3d.evaluation.location_facts import LocationFact, compare_facts, location_facts
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.model.location import describe_findings, told_pieces

LOBES = ("right_upper_lobe", "right_middle_lobe", "right_lower_lobe", "left_upper_lobe", "left_lower_lobe")
IN_LOBES = ("Atelectasis", "Lung opacity", "Pulmonary fibrotic sequela", "Consolidation", "Bronchiectasis")
NODULE = "Lung nodule"
RUL, RML, RLL, LUL, LLL = (("right" if lobe[0] == "r" else "left", lobe) for lobe in LOBES)


def told(text: str) -> list[tuple[str, str | None, str | None, str | None, float | None]]:
    return [fact.told for fact in location_facts(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A nodule of 6 mm in the right upper lobe.", [(NODULE, *RUL, None, 6.0)]),
        ("A nodule, 4x7 mm, in the lower lobe of the left lung.", [(NODULE, *LLL, None, 7.0)]),
        ("Nodule of 1.5 cm in the left lung lower lobe.", [(NODULE, *LLL, None, 15.0)]),
        ("Nodules of 2-3 mm in the middle lobe.", [(NODULE, *RML, None, 3.0)]),
        (
            "A 5 mm nodule in the right upper lobe and a 3 mm nodule in the left lower lobe are seen.",
            [(NODULE, *RUL, None, 5.0), (NODULE, *LLL, None, 3.0)],
        ),
        (
            "Emphysema of both upper lobes and a 9 mm nodule in the right middle lobe.",
            [("Emphysema", *RUL, None, None), ("Emphysema", *LUL, None, None), (NODULE, *RML, None, 9.0)],
        ),
        (
            "Bronchiectasis and peribronchial thickening in the left lower lobe.",
            [("Peribronchial thickening", *LLL, None, None), ("Bronchiectasis", *LLL, None, None)],
        ),
        (
            "In the lingula there is atelectasis and a consolidation of 20 mm.",
            [("Atelectasis", *LUL, None, None), ("Consolidation", *LUL, None, 20.0)],
        ),
        (
            "Consolidation of the right upper and lower lobes.",
            [("Consolidation", *RUL, None, None), ("Consolidation", *RLL, None, None)],
        ),
        (
            "The right upper lobe and left lower lobe show consolidation of up to 34 mm.",
            [("Consolidation", *RUL, None, 34.0), ("Consolidation", *LLL, None, None)],
        ),
        ("Emphysema in the upper zones.", [("Emphysema", None, None, "upper", None)]),
        ("Atelectasis at the left base.", [("Atelectasis", "left", None, "lower", None)]),
        (
            "Pleural effusion on both sides, small on the left and large on the right.",
            [
                ("Pleural effusion", "left", "left_pleural_space", None, None),
                ("Pleural effusion", "right", "right_pleural_space", None, None),
            ],
        ),
        ("Bilateral pleural effusion.", [("Pleural effusion", "bilateral", None, None, None)]),
        ("Hiatal hernia of 45 mm behind the heart.", [("Hiatal hernia", "midline", None, None, 45.0)]),
        (
            "Enlarged mediastinal lymph nodes, the largest 14 mm.",
            [("Lymphadenopathy", None, "mediastinum", None, 14.0)],
        ),
        (
            "Calcified plaque of the aortic wall.",
            [("Arterial wall calcification", None, "aorta", None, None)],
        ),
        ("No nodule in the right upper lobe.", []),
        ("The left ventricle is wide. Cardiomegaly.", [("Cardiomegaly", "midline", None, None, None)]),
        ("Emphysema. FEV1 of 55 ml, slices of 5 mm.", [("Emphysema", None, None, None, None)]),
    ],
)
def test_facts_of_sentences(
    text: str, expected: list[tuple[str, str | None, str | None, str | None, float | None]]
) -> None:
    assert sorted(told(text), key=str) == sorted(expected, key=str)


def test_impression_repeats_and_recommendations_add_nothing() -> None:
    text = (
        "Findings: Nodule of 6 mm in the left lower lobe. Lymphadenopathy with nodes of up to 23 mm.\n\n"
        "Impression: Lung nodule on the left. Lymphadenopathy on the right.\n\n"
        "Recommendations: CT of the nodule in the right upper lobe in 3 months."
    )
    assert told(text) == [
        (NODULE, *LLL, None, 6.0),
        ("Lymphadenopathy", "right", None, None, 23.0),
    ]


def test_twins_in_the_findings_stay_two() -> None:
    twin = "A nodule of 5 mm in the left lower lobe."
    text = f"Findings:\n{twin} {twin}\n\nImpression:\nNodules."
    assert told(text) == [(NODULE, *LLL, None, 5.0)] * 2


@dataclass(frozen=True)
class Piece:
    side: str
    region: str
    level: str
    volume_ml: float
    max_diameter_mm: float


PIECES = st.builds(
    lambda lobe, level, size: Piece(
        lobe.split("_")[0], lobe.replace("_", " "), level, 0.4 * size, float(size)
    ),
    st.sampled_from(LOBES),
    st.sampled_from(["upper", "middle", "lower"]),
    st.integers(2, 90),
)


@settings(deadline=None)
@given(
    st.sets(st.sampled_from(DISEASE_NAMES)),
    st.dictionaries(
        st.sampled_from([lesion.key for lesion in LESIONS if "effusion" not in lesion.key]),
        st.lists(PIECES, min_size=1, max_size=5, unique_by=lambda piece: (piece.region, piece.level)),
    ),
)
def test_the_line_told_to_the_language_model_is_read_back(
    positive: set[str], pieces: dict[str, list[Piece]]
) -> None:
    text = describe_findings(sorted(positive), pieces)
    by_key = {lesion.key: lesion.disease for lesion in LESIONS}
    assert set(label_report(text).present) == positive | {by_key[key] for key in pieces}
    expected = Counter(
        (by_key[key], piece.side, piece.region.replace(" ", "_"), piece.level, piece.max_diameter_mm)
        for key, found in pieces.items()
        for piece in told_pieces(key, found)[0]
    )
    said = Counter(fact for fact in told(text) if fact[0] in {by_key[key] for key in pieces})
    assert said == expected


def drawn_truth(seed: int) -> list[FindingTruth]:
    """A patient's findings at drawn places, as a phantom would have them, without an image."""
    rng = np.random.default_rng(seed)
    truth = []
    for name, spec in sample_findings(rng).items():
        alone = name in ("Cardiomegaly", "Hiatal hernia", "Pericardial effusion", "Medical material")
        sides = [("right",), ("left",), ("right", "left")][int(rng.integers(3))]
        for index in range(
            1 if alone else len(sides) if name == "Pleural effusion" else int(rng.integers(1, 8))
        ):
            region, kind = "mediastinum", ""
            if name in (NODULE, *IN_LOBES):
                region = LOBES[int(rng.integers(5))]
            if name == "Pleural effusion":
                region, kind = (
                    f"{sides[index]}_pleural_space",
                    ("small", "moderate", "large")[int(rng.integers(3))],
                )
            elif name == NODULE:
                kind = ("solid", "part-solid", "calcified")[int(rng.integers(3))]
            elif name == "Medical material":
                kind = ("port", "pacemaker", "sternal wires")[int(rng.integers(3))]
            elif name == "Atelectasis":
                kind = ("lobar", "linear")[seed % 2]
            side = region.split("_")[0] if region != "mediastinum" else "midline"
            size_mm, volume_ml = round(float(rng.uniform(3, 60)), 1), float(rng.uniform(0.1, 90))
            truth.append(
                FindingTruth(
                    name,
                    None,
                    region,
                    side,
                    "upper",
                    size_mm,
                    volume_ml,
                    spec.severity,
                    kind,
                    (0.0, 0.0, 0.0),
                )  # type: ignore[arg-type]
            )
    return truth


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_phantom_reports_give_back_their_truth(seed: int) -> None:
    """Every label; every nodule that is told, with lobe and size; every lobe of the findings that lie in lobes."""
    truth = drawn_truth(seed)
    report = write_report(truth, rng=np.random.default_rng(seed))
    assert set(label_report(report.text).present) == {item.finding for item in truth}
    facts = location_facts(report.text)
    nodules = sorted((item for item in truth if item.finding == NODULE), key=lambda item: -item.volume_ml)
    said = Counter((fact.region, fact.size_mm) for fact in facts if fact.finding == NODULE and fact.region)
    assert said == Counter((item.region, float(f"{item.size_mm:.0f}")) for item in nodules[:4])
    for name in IN_LOBES:
        lobes = {(item.side, item.region) for item in truth if item.finding == name}
        assert {(fact.side, fact.region) for fact in facts if fact.finding == name} == lobes
    sides = {item.side for item in truth if item.finding == "Pleural effusion"}
    assert {fact.side for fact in facts if fact.finding == "Pleural effusion"} == sides
    placed = [fact for fact in facts if fact.finding in (NODULE, "Pleural effusion", *IN_LOBES)]
    assert compare_facts(placed, truth).wrong == ()


FACTS = st.lists(
    st.builds(
        LocationFact,
        st.sampled_from(DISEASE_NAMES[:4]),
        st.sampled_from(["right", "left", "bilateral", None]),
        st.sampled_from([*LOBES[:2], None]),
        st.sampled_from(["upper", None]),
        st.sampled_from([5.0, 5.5, 30.0, None]),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(FACTS, FACTS)
def test_comparison_is_whole_and_symmetric(first: list[LocationFact], second: list[LocationFact]) -> None:
    """Each fact is right or wrong, once; what is missed one way is wrong the other way round."""
    comparison, back = compare_facts(first, second), compare_facts(second, first)
    assert Counter(comparison.right + comparison.wrong) == Counter(first)
    assert list(comparison.missed) == list(back.wrong)
    assert compare_facts(first, first).wrong == ()
    assert 0.0 <= comparison.precision <= 1.0


def test_comparison_tells_wrong_lobes_sizes_and_missed_findings() -> None:
    truth = [
        LocationFact(NODULE, "left", "left_lower_lobe", None, 6.4),
        LocationFact("Consolidation", "right", "right_lower_lobe"),
    ]
    close, far, elsewhere, vague = (
        LocationFact(NODULE, "left", "left_lower_lobe", None, 6.0),
        LocationFact(NODULE, "left", "left_lower_lobe", None, 9.0),
        LocationFact(NODULE, "right", "right_upper_lobe"),
        LocationFact(NODULE),
    )
    comparison = compare_facts([close, far, elsewhere, vague], truth)
    assert comparison.right == (close, vague)
    assert comparison.wrong == (far, elsewhere)
    assert comparison.missed == (truth[1],)
    assert comparison.precision == 0.5
    assert compare_facts([far], truth, size_tolerance_mm=3).right == (far,)
    assert compare_facts([], []).precision == 1.0


def test_every_region_that_a_fact_names_exists() -> None:
    text = "Effusion on both sides. Nodules in all: right upper lobe, middle lobe, lingula, left lower lobe. Aortic plaque."
    assert {fact.region for fact in location_facts(text)} - {None} <= REGION_IDS.keys()
