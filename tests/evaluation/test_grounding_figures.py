"""Grounding figures on reports whose right answer is known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.grounding_figures import (
    GroundedReport,
    PlaceCounts,
    grounding_section,
    located_findings,
    place_counts,
)
from vlm3d.evaluation.intervals import Intervals, as_json
from vlm3d.evaluation.location_facts import LocationFact
from vlm3d.evaluation.tables import evaluation_text
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.report_sections import form_score, format_report

NODULE = LocationFact("Lung nodule", "right", "right_upper_lobe", "upper", 12.0)
EFFUSION = LocationFact("Pleural effusion", "left", "left_pleural_space")
EMPHYSEMA = LocationFact("Emphysema", "bilateral", "left_upper_lobe")
TRUE = "A nodule of 12 mm in the right upper lobe. Left pleural effusion."
PLAIN = Intervals(resamples=0)
K = len(DISEASE_NAMES)


def labels(*names: str) -> np.ndarray:
    return np.array([float(name in names) for name in DISEASE_NAMES])


def report(
    findings: str, *, true: str = TRUE, located: tuple[LocationFact, ...] = (NODULE, EFFUSION), **fields
) -> GroundedReport:
    values = {
        "patient_id": "p",
        "labels_K": labels("Lung nodule", "Pleural effusion"),
        "probabilities_K": labels("Lung nodule", "Pleural effusion"),
        **fields,
    }
    text = format_report(findings, "As above.", "None.")
    return GroundedReport(text=text, true_report=true, located=located, **values)


@pytest.mark.parametrize(
    ("findings", "side", "lobe"),
    [
        (TRUE, (2, 2), (1, 1)),
        ("A nodule of 12 mm in the right lower lobe. Left pleural effusion.", (2, 2), (0, 1)),
        ("A nodule of 12 mm in the left upper lobe. Right pleural effusion.", (0, 2), (0, 1)),
        ("A lung nodule. Left pleural effusion.", (1, 2), (0, 1)),  # not placed: not right
        (
            "Nodules in the right upper lobe and in the left lower lobe.",
            (0, 1),
            (0, 1),
        ),  # one place is invented
        ("Left pleural effusion. No lung nodule.", (1, 1), (0, 0)),  # the nodule is no true positive
        ("Bilateral pleural effusion.", (0, 1), (0, 0)),
        ("The lungs are clear.", (0, 0), (0, 0)),
    ],
)
def test_places_of_true_positives(findings: str, side: tuple[int, int], lobe: tuple[int, int]) -> None:
    assert place_counts(report(findings)) == {"side": PlaceCounts(*side), "lobe": PlaceCounts(*lobe)}


def test_one_place_of_many_is_enough() -> None:
    second = LocationFact("Lung nodule", "left", "left_lower_lobe", "lower", 5.0)
    counts = place_counts(report("A nodule in the right upper lobe.", located=(NODULE, second)))
    assert counts == {"side": PlaceCounts(1, 1), "lobe": PlaceCounts(1, 1)}


def test_what_neither_report_places_is_not_judged_and_diffuse_findings_have_no_lobe() -> None:
    quiet = report("Emphysema.", true="Emphysema is seen.", located=(EMPHYSEMA,))
    assert place_counts(quiet) == {"side": PlaceCounts(0, 0), "lobe": PlaceCounts(0, 0)}
    one_sided = report("Emphysema in the right lung.", true="Emphysema is seen.", located=(EMPHYSEMA,))
    assert place_counts(one_sided)["side"] == PlaceCounts(1, 1)
    heart = LocationFact("Cardiomegaly", "midline", "heart")
    told = report("Cardiomegaly.", true="Cardiomegaly.", located=(heart,))
    assert place_counts(told)["side"] == PlaceCounts(0, 0)


def test_section_adds_up_over_reports() -> None:
    unknown = np.full(len(DISEASE_NAMES), np.nan)
    reports = [
        report(TRUE, contradictions=0),
        report("A nodule in the left upper lobe.", contradictions=2, patient_id="q"),
        report("Cardiomegaly.", contradictions=None, labels_K=unknown, located=(), patient_id="r"),
    ]
    found = grounding_section(reports, Thresholds.fixed(0.5), PLAIN)
    # in the two labeled ones the nodule is told 2 of 2 times, the effusion 1 of 2; F1 of what nobody has is 0
    assert found["report_macro_f1"] == pytest.approx((1 + 2 / 3) / K)
    assert found["classifier_macro_f1"] == pytest.approx(2 / K)
    assert found["macro_f1_difference"] == pytest.approx(-1 / 3 / K)
    assert found["right_side"] == {"share": pytest.approx(2 / 3), "right": 2, "judged": 3}
    assert found["right_lobe"] == {"share": pytest.approx(1 / 2), "right": 1, "judged": 2}
    assert found["valid_format"] == 1.0
    assert (found["no_contradiction"], found["contradictions_checked"]) == (0.5, 2)
    assert 0 < found["bleu_4"] < 1


def test_consolidation_implies_opacity_as_in_the_labels() -> None:
    lungs = labels("Consolidation", "Lung opacity")
    written = report(
        "Consolidation in the right lower lobe.", labels_K=lungs, probabilities_K=lungs, located=()
    )
    found = grounding_section([written], Thresholds.fixed(0.5), PLAIN)
    assert found["report_macro_f1"] == found["classifier_macro_f1"] == pytest.approx(2 / K)


def test_the_classifier_is_cut_at_the_thresholds_given() -> None:
    weak = 0.3 * labels("Lung nodule", "Pleural effusion")
    written = [report(TRUE, probabilities_K=weak)]
    assert grounding_section(written, Thresholds.fixed(0.5), PLAIN)["classifier_macro_f1"] == 0.0
    tuned = grounding_section(written, Thresholds(np.full(len(DISEASE_NAMES), 0.2), "tuned"), PLAIN)
    assert (tuned["classifier_macro_f1"], tuned["thresholds"]) == (pytest.approx(2 / K), "tuned")


def test_intervals_hold_the_value_and_the_table_tells_all() -> None:
    reports = [report(TRUE if n % 3 else "A nodule in the left lung.", patient_id=f"p{n}") for n in range(12)]
    found = as_json(grounding_section(reports, Thresholds.fixed(0.5), Intervals(resamples=50)))
    for figure in (
        found["report_macro_f1"],
        found["right_side"]["share"],
        found["valid_format"],
        found["bleu_4"],
    ):
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert found["no_contradiction"] is None
    figures = {
        "predictions": "model",
        "truth": "store",
        "cases": 12,
        "patients": 12,
        "left_out": [],
        "silent": {},
        "training": None,
        "untrained_tasks": [],
        "intervals": {"resamples": 0},
        "grounding": found,
    }
    text = evaluation_text(figures)
    for line in ("Grounding", "right side of true positives (16/20)", "valid format", "BLEU-4"):
        assert line in text


def test_facts_of_a_phantom_are_read_and_other_facts_are_none() -> None:
    item = {
        "finding": "Lung nodule",
        "side": "right",
        "region": "right_upper_lobe",
        "level": "upper",
        "size_mm": 12.0,
    }
    assert located_findings({"findings": [{**item, "volume_ml": 0.9}]}) == [NODULE]
    assert located_findings({}) == located_findings({"findings": "none"}) == []


def test_form_is_valid_only_when_whole() -> None:
    good = format_report("Clear lungs.", "Normal.", "None.")
    assert form_score(good) == 1.0
    assert form_score(good.replace("Impression", "Summary")) < 1.0
