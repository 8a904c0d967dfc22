"""A report against the model's own heads: what is caught, what is let pass, and what is done about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.predictions import component, make_prediction
from vlm3d.datasets.phantom.reports import write_report
from vlm3d.evaluation.labeler import label_report
from vlm3d.inference.consistency import consistent_report, mend_report, repair_report
from vlm3d.inference.contradictions import check_report
from vlm3d.inference.measured_sentences import DENIALS, located_sentence
from vlm3d.inference.prediction import DiseaseFinding, LesionFinding, Report
from vlm3d.labels import DISEASE_NAMES, STORED_LESIONS
from vlm3d.model.report_sections import form_score, parse_report

RIGHT_UPPER = component(6, "right upper lobe", 17.0)
LEFT_LOWER = component(3, "left lower lobe", 9.0) | {"side": "left", "level": "lower", "volume_ml": 1.0}
Heads = tuple[list[DiseaseFinding], list[LesionFinding]]


def heads(
    positive: Collection[str], pieces: Mapping[str, Sequence[dict[str, object]]] | None = None
) -> Heads:
    diseases = [
        DiseaseFinding(
            name=name,
            probability=0.9 if name in positive else 0.1,
            threshold=0.4,
            positive=name in positive,
            uncertainty=0.3,
        )
        for name in DISEASE_NAMES
    ]
    return diseases, make_prediction({key: list(found) for key, found in (pieces or {}).items()}).lesions


def kinds(text: str, found: Heads) -> list[tuple[str, str]]:
    return [(item.kind, item.finding) for item in check_report(text, *found).contradictions]


def test_a_report_that_says_what_the_heads_found_passes() -> None:
    found = heads({"Lung nodule", "Cardiomegaly"}, {"lung_nodule": [RIGHT_UPPER]})
    text = (
        "Findings:\nA nodule of 17 mm lies in the right upper lobe. The heart is enlarged. No pleural effusion.\n\n"
        "Impression:\nLung nodule on the right. Cardiomegaly.\n\nRecommendations:\nFollow-up."
    )
    checked = check_report(text, *found)
    assert checked.contradictions == []
    assert [sentence.supported for sentence in checked.sentences] == [True, True, True, True, True, None]


@pytest.mark.parametrize(
    ("text", "positive", "pieces", "expected"),
    [
        ("Emphysema.", (), {}, [("unsupported", "Emphysema")]),
        ("Possible emphysema.", (), {}, [("unsupported", "Emphysema")]),
        ("No emphysema.", ("Emphysema",), {}, [("denied", "Emphysema")]),
        ("Clear.", ("Emphysema",), {}, [("not_mentioned", "Emphysema")]),
        ("History of emphysema.", ("Emphysema",), {}, [("not_mentioned", "Emphysema")]),
        ("No nodule.", (), {"lung_nodule": [RIGHT_UPPER]}, [("denied", "Lung nodule")]),
        (
            "Nodule on the left.",
            ("Lung nodule",),
            {"lung_nodule": [RIGHT_UPPER]},
            [("wrong_side", "Lung nodule")],
        ),
        (
            "Nodule in the right lower lobe.",
            ("Lung nodule",),
            {"lung_nodule": [RIGHT_UPPER]},
            [("wrong_lobe", "Lung nodule")],
        ),
        (
            "Bilateral lung nodules.",
            ("Lung nodule",),
            {"lung_nodule": [RIGHT_UPPER]},
            [("wrong_side", "Lung nodule")],
        ),
        ("The lungs are clear. Emphysema.", ("Emphysema",), {}, [("called_normal", "")]),
        (
            "Normal chest CT.",
            ("Emphysema",),
            {},
            [("called_normal", ""), ("not_mentioned", "Emphysema")],
        ),
        (
            "No significant abnormality. Emphysema.",
            ("Emphysema",),
            {},
            [("called_normal", "")],
        ),
    ],
)
def test_what_is_caught(text: str, positive: tuple[str, ...], pieces: dict, expected: list) -> None:
    assert kinds(text, heads(positive, pieces)) == expected


@pytest.mark.parametrize(
    ("text", "positive", "pieces"),
    [
        ("Nodule in the right upper lobe.", (), {"lung_nodule": [RIGHT_UPPER]}),  # the mask supports it
        (
            "Nodule in the right upper lobe. No other nodules.",
            ("Lung nodule",),
            {"lung_nodule": [RIGHT_UPPER]},
        ),
        (
            "Right pleural effusion. No pleural effusion on the left.",
            ("Pleural effusion",),
            {"pleural_effusion": [component(4, "right pleural space")]},
        ),
        ("Normal chest CT.", (), {}),
        ("History of emphysema.", (), {}),
        ("Bronchiectasis in the left lower lobe.", ("Bronchiectasis",), {}),  # no mask knows where
        (
            "Consolidation in the right upper lobe. No ground-glass opacity. Lung opacity.",
            ("Lung opacity", "Consolidation"),
            {"consolidation": [RIGHT_UPPER]},
        ),
        ("The liver is normal. Emphysema.", ("Emphysema",), {}),
        ("Consolidation.", ("Consolidation", "Lung opacity"), {}),  # the dense kind of opacity
    ],
)
def test_what_is_let_pass(text: str, positive: tuple[str, ...], pieces: dict) -> None:
    assert kinds(text, heads(positive, pieces)) == []


def test_a_placed_denial_is_held_against_its_place() -> None:
    found = heads({"Lung nodule"}, {"lung_nodule": [RIGHT_UPPER, LEFT_LOWER]})
    text = "Nodule in the right upper lobe. There is no nodule in the left lung."
    assert kinds(text, found) == [("denied", "Lung nodule")]


def test_contradictions_point_to_their_sentences() -> None:
    checked = check_report("Emphysema. No cardiomegaly.", *heads({"Cardiomegaly", "Bronchiectasis"}))
    assert [item.sentence for item in checked.contradictions] == [0, 1, None]
    assert [sentence.supported for sentence in checked.sentences] == [False, False]
    assert "0.10, threshold 0.40" in checked.contradictions[0].message


@dataclass(frozen=True)
class Written:
    text: str
    mean_surprisal_bits: float = 1.0


def report_of(texts: Sequence[str], policy: str, attempts: int = 3) -> tuple[Report, list[int]]:
    asked: list[int] = []

    def write(attempt: int) -> Written:
        asked.append(attempt)
        return Written(texts[attempt], float(attempt))

    return consistent_report(write, *heads({"Emphysema"}), policy, attempts), asked  # type: ignore[arg-type]


def test_flagging_writes_once_and_keeps_the_words() -> None:
    report, asked = report_of(["Cardiomegaly."], "flag")
    assert asked == [0]
    assert report.text == "Cardiomegaly."
    assert report.check is not None
    assert report.check.count == 2
    assert [item.kind for item in report.check.contradictions] == ["unsupported", "not_mentioned"]


def test_regenerating_stops_at_the_first_report_without_contradictions() -> None:
    report, asked = report_of(["Cardiomegaly.", "Emphysema.", "Never."], "regenerate")
    assert asked == [0, 1]
    assert report.text == "Emphysema."
    assert report.uncertainty == 1.0
    assert report.check is not None
    assert (report.check.counts_by_attempt, report.check.attempt, report.check.count) == ([2, 0], 1, 0)


def test_regenerating_keeps_the_best_of_what_it_was_allowed() -> None:
    texts = ["Cardiomegaly.", "Clear.", "No emphysema.", "Emphysema."]
    report, asked = report_of(texts, "regenerate", attempts=2)
    assert asked == [0, 1, 2]
    assert report.text == "Clear."
    assert report.check is not None
    assert report.check.counts_by_attempt == [2, 1, 1]


def test_repairing_keeps_what_was_said_and_shows_what_changed() -> None:
    diseases, lesions = heads({"Lung nodule"}, {"lung_nodule": [LEFT_LOWER]})
    unsure = [
        disease.model_copy(update={"probability": max(disease.probability, 0.3)}) for disease in diseases
    ]
    found = (unsure, lesions)  # nothing is excluded so surely that it would be denied
    text = (
        "Findings:\nChest CT. Nodule in the right upper lobe.\n\nImpression:\nNormal chest CT.\n\n"
        "Recommendations:\nNone."
    )
    report = consistent_report(lambda _: Written(text), *found, "repair")
    assert report.findings == "Chest CT. Lung nodule of 9 mm in the left lower lobe."
    assert report.impression == "Lung nodule on the left."
    assert report.recommendations == "None."
    check = report.check
    assert check is not None
    assert check.count == 0
    assert check.text_before_repair == text
    assert [(edit.action, edit.section) for edit in check.edits] == [
        ("removed", "findings"),
        ("removed", "impression"),
        ("added", "findings"),
        ("added", "impression"),
    ]
    assert [sentence.origin for sentence in report.sentences] == ["model", "repair", "repair", "model"]


def test_what_a_removed_sentence_said_rightly_is_said_again() -> None:
    text, edits = repair_report("Emphysema and cardiomegaly.", *heads({"Emphysema"}))
    assert parse_report(text).findings == "Emphysema."
    assert [edit.text for edit in edits if edit.action == "removed"] == ["Emphysema and cardiomegaly."]


@pytest.mark.parametrize("positive", [set(), {"Emphysema"}])
def test_a_report_keeps_its_form_where_a_whole_section_contradicts(positive: set[str]) -> None:
    text = (
        "Findings:\nCardiomegaly.\n\nImpression:\nCardiomegaly.\n\n"
        "Recommendations:\nFollow-up of the lung nodule in six months."
    )
    found = heads(positive)
    repaired, edits = repair_report(text, *found)
    assert form_score(repaired) == 1.0
    said = "Emphysema." if positive else "No finding."
    assert parse_report(repaired) == (said, said, "None.")
    assert not check_report(repaired, *found).contradictions
    assert [edit.section for edit in edits if edit.action == "removed"] == [
        "findings",
        "impression",
        "recommendations",
    ]


def test_what_was_denied_is_said_in_its_place() -> None:
    """The impression names it already; the findings would else have lost it."""
    found = heads({"Pleural effusion"}, {"pleural_effusion": [RIGHT_UPPER]})
    repaired, _ = repair_report(
        "Findings:\nClear lungs. No pleural effusion.\n\nImpression:\nPleural effusion.", *found
    )
    sections = parse_report(repaired)
    assert sections.findings == "Clear lungs. Pleural effusion on the right, about 2 ml."
    assert sections.impression == "Pleural effusion."


def test_a_small_nodule_may_be_told_though_words_need_not() -> None:
    small = RIGHT_UPPER | {
        "side": "left",
        "region": "left lower lobe",
        "volume_ml": 0.1,
        "max_diameter_mm": 5.0,
    }
    found = heads({"Lung nodule"}, {"lung_nodule": [RIGHT_UPPER, small]})
    assert located_sentence("Lung nodule", found[1]) == "Lung nodule of 17 mm in the right upper lobe."
    text = "Findings:\nNodule of 5 mm in the left lower lobe.\n\nImpression:\nLung nodule.\n\nRecommendations:\nNone."
    assert not check_report(text, *found).contradictions


def test_sizes_of_several_nodules_in_a_sentence_are_not_judged() -> None:
    beside = RIGHT_UPPER | {"region": "remaining mediastinum", "max_diameter_mm": 7.0}
    found = heads({"Lung nodule"}, {"lung_nodule": [beside, RIGHT_UPPER | {"max_diameter_mm": 1.0}]})
    text = located_sentence("Lung nodule", found[1])
    assert text == "Lung nodule of 7 mm on the right and of 1 mm in the right upper lobe."
    assert kinds(text, found) == []


@pytest.mark.parametrize(("size_mm", "wrong"), [(8, True), (13, False), (17, False), (24, False), (26, True)])
def test_a_size_that_the_mask_does_not_measure_is_repaired(size_mm: int, wrong: bool) -> None:
    found = heads({"Lung nodule"}, {"lung_nodule": [RIGHT_UPPER]})
    findings = f"A nodule of {size_mm} mm in the right upper lobe."
    text = f"Findings:\n{findings}\n\nImpression:\nNodule.\n\nRecommendations:\nNone."
    assert kinds(text, found) == ([("wrong_size", "Lung nodule")] if wrong else [])
    repaired, _ = repair_report(text, *found)
    assert kinds(repaired, found) == []
    assert ("17 mm" in repaired) == (wrong or size_mm == 17)


def test_what_repair_says_stands_where_a_reader_looks_for_it() -> None:
    found = heads({"Pericardial effusion", "Emphysema", "Hiatal hernia"})
    text = (
        "Findings:\nThe heart is of normal size. No pericardial effusion. No pleural effusion. No lung nodule. "
        "Consolidation on the left.\n\nImpression:\nHiatal hernia. Consolidation.\n\nRecommendations:\nNone."
    )
    sections = parse_report(repair_report(text, *found)[0])
    assert sections.findings == (
        "The heart is of normal size. Pericardial effusion. No pleural effusion. No lung nodule. Emphysema."
    )
    assert sections.impression == "Hiatal hernia. Pericardial effusion. Emphysema."


def test_a_consistent_report_is_not_touched() -> None:
    text = "Findings:\n  Emphysema.\n\n\nImpression: Emphysema"
    assert repair_report(text, *heads({"Emphysema"})) == (text, [])


def test_what_both_heads_exclude_is_denied_where_the_report_is_silent() -> None:
    diseases, lesions = heads({"Emphysema"}, {"lung_nodule": [RIGHT_UPPER]})
    unsure = {"Hiatal hernia": 0.25, "Lung nodule": 0.1}  # of a threshold of 0.4; the nodule is drawn
    diseases = [d.model_copy(update={"probability": unsure.get(d.name, d.probability)}) for d in diseases]
    text = "Findings:\nEmphysema. No pleural effusion.\n\nImpression:\nEmphysema.\n\nRecommendations:\nNone."
    mended, edits = mend_report(text, diseases, lesions)
    sections = parse_report(mended)
    assert sections.findings == (
        "Emphysema. No consolidation. No bronchiectasis. No pleural effusion. The heart is of normal size. "
        "No pericardial effusion. No enlarged lymph nodes."
    )
    assert (sections.impression, sections.recommendations) == ("Emphysema.", "None.")
    assert [edit.text for edit in edits] == [
        DENIALS[name]
        for name in (
            "Cardiomegaly",
            "Pericardial effusion",
            "Lymphadenopathy",
            "Consolidation",
            "Bronchiectasis",
        )
    ]
    assert mend_report(mended, diseases, lesions) == (mended, [])


_NODULE = ({"Lung nodule"}, {"lung_nodule": [RIGHT_UPPER]})
_WORK_UP = "Further work-up of the largest nodule."


@pytest.mark.parametrize(
    ("findings", "advised", "found", "expected"),
    [
        ("No lung nodule.", "No follow-up is needed.", _NODULE, _WORK_UP),
        (
            "A nodule of 6 mm in the right upper lobe.",
            "Follow-up CT of the nodule in a year.",
            _NODULE,
            _WORK_UP,
        ),
        ("Consolidation. A nodule of 10 mm.", "Control. Work-up of the nodule.", (set(), {}), "None."),
        (
            "A nodule of 17 mm in the right upper lobe. Emphysema.",
            "Tissue sampling.",
            _NODULE,
            "Tissue sampling.",
        ),
        ("A nodule of 17 mm in the left upper lobe.", "Tissue sampling.", _NODULE, "Tissue sampling."),
        (
            "No nodule.",
            "None.",
            ({"Cardiomegaly", "Consolidation"}, {}),
            "Control after treatment. Echocardiography.",
        ),
    ],
)
def test_recommendations_follow_the_findings_that_repair_changed(
    findings: str, advised: str, found: tuple[set[str], dict], expected: str
) -> None:
    text = f"Findings:\n{findings}\n\nImpression:\nSee above.\n\nRecommendations:\n{advised}"
    mended, edits = mend_report(text, *heads(*found))
    assert parse_report(mended).recommendations == expected
    changed = [edit for edit in edits if edit.section == "recommendations"]
    assert bool(changed) == (expected != advised)
    assert all(any(name in edit.reason for name in DISEASE_NAMES) for edit in changed)


def test_what_is_said_twice_is_said_once_and_more_is_not_said_twice() -> None:
    middle = RIGHT_UPPER | {"region": "right middle lobe", "max_diameter_mm": 9.0}
    found = heads({"Lung nodule", "Emphysema"}, {"lung_nodule": [RIGHT_UPPER, middle]})
    text = (
        "Findings:\nNodule of 17 mm in the right upper lobe. Nodule of 9 mm in the right middle lobe. Moderate emphysema. "
        "Chest CT. A 9 mm nodule lies in the right middle lobe. Emphysema. The nodule of 9 mm is spiculated.\n\n"
        "Impression:\nNodules on the right. Emphysema. Emphysema.\n\nRecommendations:\nCT. CT."
    )
    mended, edits = mend_report(text, *found)
    sections = parse_report(mended)
    assert sections.findings.startswith(
        "Nodule of 17 mm in the right upper lobe. Nodule of 9 mm in the right middle lobe. Moderate emphysema. Chest CT. "
        "The nodule of 9 mm is spiculated. "
    )
    assert sections.findings.count("odule") == 3
    assert sections.impression == "Nodules on the right. Emphysema."
    assert sections.recommendations == "CT. CT."
    assert [edit.text for edit in edits if edit.action == "removed"] == [
        "A 9 mm nodule lies in the right middle lobe.",
        "Emphysema.",
        "Emphysema.",
    ]


def test_what_only_the_impression_tells_is_described_in_the_findings() -> None:
    found = heads({"Lung nodule"}, {"lung_nodule": [RIGHT_UPPER]})
    found = ([d for d in found[0] if d.name == "Lung nodule"], found[1])
    text = "Findings:\nChest CT.\n\nImpression:\nLung nodule on the right.\n\nRecommendations:\nCT."
    mended, edits = mend_report(text, *found)
    assert parse_report(mended).findings == "Chest CT. Lung nodule of 17 mm in the right upper lobe."
    assert [edit.reason for edit in edits] == ["Only the impression tells of Lung nodule"]


@pytest.mark.parametrize(("name", "sentence"), DENIALS.items())
def test_a_denial_is_read_as_one_of_its_own_finding(name: str, sentence: str) -> None:
    labels = label_report(sentence)
    assert labels.present == []
    assert kinds(sentence, heads({name})) == [("denied", name)]


REGIONS = ["right upper lobe", "right middle lobe", "left lower lobe", "remaining mediastinum", "ribs", ""]
PIECE = st.builds(
    lambda region, side, level, size: (
        component(6, region, size)
        | {"side": region.split()[0] if region.split()[:1] in (["right"], ["left"]) else side, "level": level}
    ),
    st.sampled_from(REGIONS),
    st.sampled_from(["right", "left", "midline"]),
    st.sampled_from(["upper", "middle", "lower"]),
    st.floats(1.0, 80.0),
)
HEADS = st.builds(
    heads,
    st.sets(st.sampled_from(DISEASE_NAMES)),
    st.dictionaries(st.sampled_from([lesion.key for lesion in STORED_LESIONS]), st.lists(PIECE, max_size=4)),
)
SENTENCES = st.lists(
    st.sampled_from(
        [
            *("Emphysema.", "No emphysema.", "Normal chest CT.", "Nodule of 5 mm in the left upper lobe."),
            *("No pleural effusion.", "Bilateral pleural effusion", "Consolidation in both lower lobes."),
            *("Emphysema and cardiomegaly.", "No nodule or lymphadenopathy", "\n\nImpression:\n"),
            *(
                "Ground-glass opacity on the right;",
                "Possible pneumonia?",
                "\n\nRecommendations:\n",
                "Clear lungs.",
            ),
        ]
    ),
    max_size=10,
).map(" ".join)


@settings(deadline=None, max_examples=150)
@given(SENTENCES, HEADS)
def test_a_repaired_report_never_contradicts_its_heads(text: str, found: Heads) -> None:
    repaired, edits = repair_report(text, *found)
    assert check_report(repaired, *found).contradictions == []
    assert check_report(mend_report(text, *found)[0], *found).contradictions == []
    assert bool(edits) == (check_report(text, *found).contradictions != [])
    present = set(label_report(repaired).present)
    present |= {"Lung opacity"} if "Consolidation" in present else set()
    assert {disease.name for disease in found[0] if disease.positive} <= present


@given(PIECE, st.sampled_from(STORED_LESIONS))
def test_a_sentence_from_measurements_agrees_with_them(piece: dict, lesion: object) -> None:
    found = heads({lesion.disease}, {lesion.key: [piece]})  # type: ignore[attr-defined]
    assert kinds(located_sentence(lesion.disease, found[1]), found) == []  # type: ignore[attr-defined]


def test_sentences_of_every_finding_are_read_as_their_own() -> None:
    for name in DISEASE_NAMES:
        assert label_report(located_sentence(name, [])).present == [name]
    assert write_report([], rng=np.random.default_rng(0)).text
