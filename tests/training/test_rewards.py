"""Rewards: what raises them, what lowers them, and that pleasing words alone do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.config import GrpoPhase
from vlm3d.evaluation.location_facts import LocationFact
from vlm3d.labels import DISEASE_NAMES, LESIONS
from vlm3d.model.report_sections import format_report
from vlm3d.training.rewards import (
    ReportTruth,
    clinical_accuracy,
    factual_consistency,
    fluency,
    located_in_masks,
    repeated_share,
    report_form,
    score_reports,
    truth_of_report,
    watch_reports,
    weighted_rewards,
)

TRUE_REPORT = format_report(
    "There is a nodule of 12 mm in the right upper lobe. There is a left pleural effusion. No consolidation.",
    "Right upper lobe nodule. Left pleural effusion.",
    "Follow-up CT in three months.",
)
LABELS = [1.0 if name in ("Lung nodule", "Pleural effusion") else 0.0 for name in DISEASE_NAMES]
TRUTH = truth_of_report(LABELS, TRUE_REPORT)
NORMAL = truth_of_report([0.0] * 18, format_report("The lungs are clear.", "Normal study.", "None."))


def one(reward, text: str, truth: ReportTruth = TRUTH) -> float:  # type: ignore[no-untyped-def]
    (value,) = reward([text], truth)
    return value


def test_the_true_report_earns_every_reward_in_full() -> None:
    phase = GrpoPhase()
    rewards = weighted_rewards(phase, lambda texts: [10.0] * len(texts))
    assert {name: weight for name, (weight, _) in rewards.items()} == {
        "clinical": 0.4,
        "factual": 0.3,
        "fluency": 0.2,
        "format": 0.1,
    }
    scores = score_reports([TRUE_REPORT, ""], TRUTH, rewards)
    assert {name: values[0] for name, values in scores.items()} == pytest.approx(
        {"total": 1.0, "clinical": 1.0, "factual": 1.0, "fluency": 1.0, "format": 1.0}
    )
    assert {name: values[1] for name, values in scores.items()} == dict.fromkeys(scores, 0.0)


def test_the_total_is_the_weighted_mean() -> None:
    rewards = {"a": (3.0, lambda texts, truth: [0.5]), "b": (1.0, lambda texts, truth: [0.1])}
    assert score_reports(["x"], TRUTH, rewards)["total"] == [pytest.approx((3 * 0.5 + 0.1) / 4)]


def test_clinical_accuracy_is_f1_over_known_labels() -> None:
    assert one(clinical_accuracy, "There is a lung nodule. There is emphysema.") == pytest.approx(2 / 4)
    assert one(clinical_accuracy, "No lung nodule. No effusion.") == 0.0
    unknown = truth_of_report(
        [math.nan if n == "Emphysema" else v for n, v in zip(DISEASE_NAMES, LABELS, strict=True)], None
    )
    assert one(clinical_accuracy, "A lung nodule, pleural effusion and emphysema.", unknown) == 1.0


def test_inventing_costs_on_a_normal_scan_the_more_the_more_is_invented() -> None:
    texts = ["The lungs are clear.", "There is emphysema.", "There is emphysema and cardiomegaly."]
    for reward in (clinical_accuracy, factual_consistency):
        assert reward(texts, NORMAL) == pytest.approx([1.0, 1 / 2, 1 / 3])


def test_naming_everything_does_not_pay() -> None:
    everything = "There is " + ", ".join(name.lower() for name in DISEASE_NAMES) + "."
    assert one(clinical_accuracy, everything) < 0.25
    assert one(factual_consistency, everything) < 0.4


def test_a_wrong_side_loses_against_a_right_one_and_silence_about_it() -> None:
    right = "There is a nodule of 12 mm in the right upper lobe. There is a left pleural effusion."
    vague = "There is a lung nodule. There is a pleural effusion."
    wrong = "There is a nodule of 12 mm in the left upper lobe. There is a right pleural effusion."
    scores = factual_consistency([right, vague, wrong], TRUTH)
    assert scores[0] == 1.0
    assert 0 < scores[1] < 0.8
    assert scores[2] == 0.0
    assert clinical_accuracy([right, vague, wrong], TRUTH) == [1.0, 1.0, 1.0]


def test_sizes_may_be_off_by_a_voxel() -> None:
    near, far = (f"There is a nodule of {mm} mm in the right upper lobe." for mm in (14, 30))
    scores = factual_consistency([near, far], TRUTH)
    assert scores[0] > 0 == scores[1]


def test_unknown_findings_neither_earn_nor_cost() -> None:
    unknown = truth_of_report([math.nan] * 18, None)
    assert factual_consistency(["There is emphysema in the left upper lobe.", ""], unknown) == [1.0, 1.0]


def test_fluency_is_the_true_perplexity_over_the_own_one() -> None:
    table = {"good": 5.0, "bad": 40.0, "easy": 2.0, "report": 10.0, "": math.inf}
    reward = fluency(lambda texts: [table[text] for text in texts], usual_perplexity=20.0)
    told = ReportTruth((0.0,) * 18, report="report")
    assert reward(["good", "bad", "easy", ""], told) == [1.0, 0.25, 1.0, 0.0]
    assert reward(["bad"], ReportTruth((0.0,) * 18)) == [0.5]


def test_repetition_is_taken_off_fluency() -> None:
    once = "The lungs are clear without any focal opacity."
    reward = fluency(lambda texts: [1.0] * len(texts), usual_perplexity=20.0)
    assert reward([once, " ".join([once] * 8)], NORMAL) == [
        1.0,
        pytest.approx(1 - repeated_share(once + " " + " ".join([once] * 7))),
    ]
    assert one(reward, " ".join([once] * 8), NORMAL) < 0.2


def test_form_counts_what_a_report_keeps() -> None:
    good = format_report("Clear lungs.", "Normal.", "None.")
    assert report_form([good]) == [1.0]
    assert report_form([good.rstrip(".")]) == [0.8]
    assert report_form(["Well.\n" + good]) == [0.8]
    swapped = "Impression:\nNormal.\n\nFindings:\nClear.\n\nRecommendations:\nNone."
    assert report_form([swapped]) == [0.8]
    assert report_form(["Findings:\nClear.\n\nImpression:\n\nRecommendations:\nNone."]) == [
        pytest.approx(0.8)
    ]
    assert report_form(["Findings:\nClear.\n\n" + good]) == [pytest.approx(0.6)]
    assert report_form(["Clear lungs"]) == [0.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_words_earn_between_nothing_and_all(texts: list[str]) -> None:
    rewards = weighted_rewards(GrpoPhase(), lambda given: [7.0] * len(given))
    for truth in (TRUTH, NORMAL):
        for name, values in score_reports(texts, truth, rewards).items():
            assert len(values) == len(texts), name
            assert all(0 <= value <= 1 for value in values), name


@settings(max_examples=24, deadline=None)
@given(st.permutations(["There is a lung nodule.", "No effusion.", "Emphysema is seen.", ""]))
def test_a_reward_does_not_depend_on_the_others(texts: list[str]) -> None:
    for reward in (clinical_accuracy, factual_consistency, report_form):
        assert reward(texts, TRUTH) == [one(reward, text) for text in texts]


def test_truth_takes_the_report_where_labels_are_unknown_and_keeps_the_labels_where_not() -> None:
    labels = [math.nan] * 18
    labels[DISEASE_NAMES.index("Pleural effusion")] = 0.0
    truth = truth_of_report(labels, TRUE_REPORT)
    assert [n for n, v in zip(DISEASE_NAMES, truth.labels_K, strict=True) if v == 1] == ["Lung nodule"]
    assert {fact.finding for fact in truth.facts} == {"Lung nodule"}


def test_without_a_report_masks_tell_the_places() -> None:
    masks = np.full((5, 8, 16, 16), -1, np.int8)
    key = [lesion.key for lesion in LESIONS].index("lung_nodule")
    masks[key] = 0
    masks[key, 3:5, 6:9, 2:5] = 1  # W runs to the patient's left, so a small index is right
    regions = np.zeros((8, 16, 16), np.uint8)
    regions[:, :, :8], regions[:, :, 8:] = 1, 4
    facts = located_in_masks(masks, regions, (3.0, 2.0, 2.0), LESIONS)
    assert [(fact.finding, fact.side) for fact in facts] == [("Lung nodule", "right")]
    truth = truth_of_report([1.0 if n == "Lung nodule" else 0.0 for n in DISEASE_NAMES], None, facts)
    right, left = factual_consistency(["A nodule in the right lung.", "A nodule in the left lung."], truth)
    assert right > left == 0.0


def test_what_no_place_is_known_of_may_lie_anywhere() -> None:
    truth = truth_of_report([1.0 if n == "Emphysema" else 0.0 for n in DISEASE_NAMES], None)
    assert truth.facts == (LocationFact("Emphysema"),)
    assert one(factual_consistency, "Emphysema in the right upper lobe.", truth) == 1.0


def test_the_watch_counts_inventions_length_repetition_and_vagueness() -> None:
    text = "There is a lung nodule. There is a lung nodule. There is emphysema."
    watch = watch_reports([text, text], TRUTH)
    assert (watch.invented, watch.missed) == (1.0, 1.0)
    assert watch.words == len(text.split())
    assert watch.length_share == pytest.approx(watch.words / len(TRUE_REPORT.split()))
    assert watch.repeated == repeated_share(text) > 0
    assert watch.vague == 1.0
    assert watch_reports([TRUE_REPORT], TRUTH).vague == 0.0
    assert math.isnan(watch_reports([text], ReportTruth((0.0,) * 18)).length_share)
