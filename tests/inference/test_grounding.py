"""Sentences of a report lead to the finding, the probability and the piece of a mask that they tell of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.predictions import component, make_prediction
from vlm3d.inference.consistency import repair_report
from vlm3d.inference.contradictions import check_report
from vlm3d.inference.grounding import ground_report, section_bodies
from vlm3d.inference.prediction import AttentionPlace, DiseaseFinding, Prediction, ReportSentence
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.report_sections import parse_report

RIGHT_UPPER = component(6, "right upper lobe", 17.0)
RIGHT_LOWER = component(2, "right lower lobe", 5.0) | {"level": "lower", "volume_ml": 0.4}
LEFT_LOWER = component(3, "left lower lobe", 9.0) | {"side": "left", "level": "lower", "volume_ml": 1.0}
REPORT = """Findings:
A nodule of 9 mm is seen in the left lower lobe. A nodule of 17 mm lies in the right upper lobe.
The heart is enlarged. No pericardial effusion.

Impression: Bilateral lung nodules.

Recommendations:
Follow-up of the nodules in 3 months."""


def nodules(*pieces: dict[str, object]) -> Prediction:
    return make_prediction({"lung_nodule": list(pieces)})


def grounded(text: str, prediction: Prediction) -> list[ReportSentence]:
    return ground_report(text, prediction.diseases, prediction.lesions)


def test_a_sentence_leads_to_the_piece_it_tells_of() -> None:
    left, right, heart, denied, both, advice = grounded(REPORT, nodules(RIGHT_UPPER, LEFT_LOWER, RIGHT_LOWER))
    assert (left.lesion, left.component, left.key_slice) == ("lung_nodule", 1, 3)
    assert (right.lesion, right.component, right.key_slice) == ("lung_nodule", 0, 6)
    assert heart.findings[0].name == "Cardiomegaly"
    assert heart.lesion is None
    assert heart.key_slice is None
    assert denied.findings[0].status == "negative"
    assert not denied.findings[0].affirmed
    assert [(place.side, place.component) for place in both.findings[0].places] == [("right", 0), ("left", 1)]
    assert both.section == "impression"
    assert advice.section == "recommendations"
    assert advice.findings[0].places == []


def test_probability_and_threshold_stand_with_the_finding() -> None:
    prediction = nodules(RIGHT_UPPER)
    finding = grounded(REPORT, prediction)[0].findings[0]
    nodule = prediction.diseases[DISEASE_NAMES.index("Lung nodule")]
    assert (finding.probability, finding.threshold) == (nodule.probability, nodule.threshold)
    assert finding.positive == nodule.positive
    assert finding.in_mask


def test_offsets_give_back_the_words() -> None:
    for sentence in grounded(REPORT, nodules(RIGHT_UPPER)):
        assert REPORT[sentence.start : sentence.end] == sentence.text
        for finding in sentence.findings:
            assert sentence.start <= finding.start < finding.end <= sentence.end
    words = {REPORT[f.start : f.end] for s in grounded(REPORT, nodules(RIGHT_UPPER)) for f in s.findings}
    assert {"heart is enlarged", "pericardial effusion"} <= words


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A lung nodule of 16 mm on the right.", 0),
        ("A lung nodule of 6 mm on the right.", 1),
        ("A lung nodule of 6 mm on the left.", 2),
        ("A lung nodule in the right lower lobe.", 1),
        ("A lung nodule in the lower third of the right lung.", 1),
        ("A lung nodule is present.", 0),
    ],
)
def test_side_then_lobe_then_level_then_size_choose_the_piece(sentence: str, expected: int) -> None:
    assert grounded(sentence, nodules(RIGHT_UPPER, RIGHT_LOWER, LEFT_LOWER))[0].component == expected


def test_places_that_masks_do_not_show_are_told_apart() -> None:
    prediction = nodules(RIGHT_UPPER)

    def agreement(text: str) -> str:
        return grounded(text, prediction)[0].findings[0].places[0].agreement

    assert agreement("A lung nodule in the right upper lobe.") == "agrees"
    assert agreement("A lung nodule in the right middle lobe.") == "wrong_lobe"
    assert agreement("A lung nodule in the left upper lobe.") == "wrong_side"
    assert agreement("Bronchiectasis in the left upper lobe.") == "unmeasured"


def test_a_piece_that_reaches_into_a_second_lobe_is_there_too() -> None:
    values = nodules(RIGHT_UPPER).model_dump()
    lesion = next(item for item in values["lesions"] if item["key"] == "lung_nodule")
    told = "Lung nodule in the right middle lobe."
    for share, expected in ((0.01, "wrong_lobe"), (0.3, "agrees")):
        lesion["volume_ml_by_region"] = {
            "right upper lobe": 2.5 * (1 - share),
            "right middle lobe": 2.5 * share,
        }
        place = grounded(told, Prediction.model_validate(values))[0].findings[0].places[0]
        assert place.agreement == expected


def test_without_anatomy_only_the_side_can_be_wrong() -> None:
    nowhere = component(6, "", 17.0)
    places = [
        grounded(text, nodules(nowhere))[0].findings[0].places[0].agreement
        for text in ("Nodule in the right lower lobe.", "Nodule in the left lower lobe.")
    ]
    assert places == ["agrees", "wrong_side"]


def test_without_a_mask_words_are_held_against_where_the_classifier_looked() -> None:
    seen = [AttentionPlace(side="left", region="left lower lobe", level="lower", key_slice=12)]
    found = DiseaseFinding(
        name="Atelectasis", probability=0.9, threshold=0.5, positive=True, uncertainty=0.4, places=seen
    )

    def told(text: str) -> tuple[str, int | None]:
        (sentence,) = ground_report(text, [found], [])
        return sentence.findings[0].places[0].agreement, sentence.key_slice

    assert told("Atelectasis in the left lower lobe.") == ("agrees", 12)
    assert told("Atelectasis in the left upper lobe.") == ("wrong_lobe", 12)
    assert told("Atelectasis on the right.") == ("wrong_side", 12)
    assert told("Atelectasis.") == ("agrees", 12)
    wrong = "Findings:\nAtelectasis in the right upper lobe.\n\nImpression:\nAtelectasis.\n\nRecommendations:\nNone."
    (contradiction,) = check_report(wrong, [found], []).contradictions
    assert contradiction.message.endswith("the classifier looked elsewhere")
    mended, _ = repair_report(wrong, [found], [])
    assert "Atelectasis in the left lower lobe." in mended
    assert "right" not in mended


def test_consolidation_shows_a_lung_opacity_but_no_ground_glass() -> None:
    prediction = make_prediction({"consolidation": [RIGHT_UPPER]})
    plain, glass = grounded("There is lung opacity on the right. Ground-glass opacity.", prediction)
    assert plain.lesion == "consolidation"
    assert glass.lesion is None


def test_headings_may_stand_in_a_line_or_lack() -> None:
    text = "Preface.\n**Findings:** Clear lungs.\nFindings: More.\nImpression:\nNormal."
    bodies = section_bodies(text)
    assert [(body.section, text[body.start : body.end].strip()) for body in bodies] == [
        ("findings", "Preface."),
        ("findings", "Clear lungs."),
        ("findings", "More."),
        ("impression", "Normal."),
    ]
    assert [body.section for body in section_bodies("Only words.")] == ["findings"]
    assert section_bodies("") == []


WORDS = st.lists(
    st.sampled_from(
        [
            *(
                "nodule",
                "no",
                "pleural effusion",
                "in the",
                "right",
                "left",
                "upper lobe",
                "and",
                "emphysema",
            ),
            *(
                "5 mm",
                ".",
                ".\n",
                ";",
                "\nImpression:\n",
                "\nRecommendations: ",
                "Findings:\n",
                "?",
                "İ",
                "•",
            ),
        ]
    ),
    max_size=40,
)


@given(WORDS)
def test_any_text_is_cut_into_sentences_that_it_holds_in_order(words: Sequence[str]) -> None:
    text = " ".join(words)
    sentences = grounded(text, nodules(RIGHT_UPPER, LEFT_LOWER))
    ends = [0, *(sentence.end for sentence in sentences)]
    for sentence, earlier in zip(sentences, ends, strict=False):
        assert earlier <= sentence.start < sentence.end
        assert text[sentence.start : sentence.end] == sentence.text
    sections = parse_report(text)
    told = {name: "".join(s.text for s in sentences if s.section == name) for name in sections._fields}
    for name, body in zip(sections._fields, sections, strict=True):
        assert set(told[name]) <= set(body)
