"""Sources are joined by id, every figure comes from the numeric core, and what does not fit is refused with ids named."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.small_models import small_text_encoder
from vlm3d.errors import ConfigError, InputError, MaskError, OutputError
from vlm3d.evaluation import bert_score
from vlm3d.evaluation.boxes import box_figures
from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks
from vlm3d.evaluation.classification import classification_figures
from vlm3d.evaluation.evaluation_files import write_evaluation
from vlm3d.evaluation.evaluator import EvaluationSettings, evaluate, join
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.labeler import label_reports
from vlm3d.evaluation.official_boxes import LesionBox, boxes_of_mask
from vlm3d.evaluation.report import report_scores
from vlm3d.evaluation.tables import evaluation_text
from vlm3d.evaluation.thresholds import tune_thresholds
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.preprocessing.orientation import canonical_view, to_canonical
from vlm3d.volume import Volume

K = len(DISEASE_NAMES)
AFFINE = np.array([[0.0, 0, -2, 10], [0, -2, 0, 20], [3, 0, 0, 30], [0, 0, 0, 1]])
QUICK = EvaluationSettings(intervals=Intervals(resamples=0))


def labels(cases: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((cases, K)) > 0.6).astype(float)


def scores(truth_NK: np.ndarray, seed: int = 1, noise: float = 0.35) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(0.5 + (truth_NK - 0.5) * 0.4 + rng.normal(0, noise, truth_NK.shape), 0, 1)


def source(
    name: str, rows: np.ndarray, prefix: str = "case", reports: dict[str, str] | None = None, **more
) -> FindingsSource:
    ids = [f"{prefix}_{n}" for n in range(len(rows))]
    cases = {
        case: CaseFindings(case, f"patient_{prefix}_{n // 2}", row, (reports or {}).get(case))
        for n, (case, row) in enumerate(zip(ids, rows, strict=True))
    }
    return FindingsSource(name, cases, **more)


def with_masks(
    masks: dict[str, dict[str, np.ndarray]], name: str, affine: np.ndarray = AFFINE, scan: bool = False
) -> FindingsSource:
    def case(case_id: str, of_lesion: dict[str, np.ndarray]) -> CaseFindings:
        return CaseFindings(
            case_id,
            case_id,
            load_masks=lambda: LesionMasks.on_grid(of_lesion, affine),
            load_scan=(lambda: Volume(np.full((4, 6, 8), -500, np.int16), affine)) if scan else None,
        )

    keys = frozenset(key for of_lesion in masks.values() for key in of_lesion)
    return FindingsSource(name, {case_id: case(case_id, found) for case_id, found in masks.items()}, keys)


def a_mask(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((4, 6, 8)) > 0.7


# --- classification ------------------------------------------------------------------------------------------------


def test_figures_equal_the_numeric_core_whatever_the_order_of_cases() -> None:
    truth_NK = labels(30)
    truth_NK[3, 2] = np.nan
    probability_NK = scores(labels(30))
    predictions = source("p", probability_NK)
    shuffled = FindingsSource("p", dict(reversed(list(predictions.cases.items()))))
    found = evaluate(shuffled, source("t", truth_NK), QUICK).figures
    expected = classification_figures(probability_NK, truth_NK, DISEASE_NAMES)
    for name in DISEASE_NAMES:
        for figure in ("auroc", "ap", "f1", "precision", "recall", "accuracy"):
            assert found["classification"]["per_disease"][name][figure] == pytest.approx(
                expected["per_disease"][name][figure], abs=1e-12
            )
    assert found["classification"]["crg"] == pytest.approx(expected["crg"], abs=1e-12)
    assert found["classification"]["per_disease"][DISEASE_NAMES[2]]["cases"] == 29
    assert (found["cases"], found["patients"]) == (30, 15)


def test_intervals_hold_the_figure_and_count_patients() -> None:
    truth_NK = labels(40)
    evaluation = evaluate(
        source("p", scores(truth_NK)),
        source("t", truth_NK),
        EvaluationSettings(intervals=Intervals(resamples=100, level=0.9, seed=3)),
    )
    macro = evaluation.figures["classification"]["macro"]["auroc"]
    assert macro["low"] < macro["value"] < macro["high"]
    assert evaluation.figures["intervals"] == {
        "method": "percentile bootstrap over patients",
        "level": 0.9,
        "resamples": 100,
        "seed": 3,
    }
    json.dumps(evaluation.figures, allow_nan=False)


def test_labels_of_one_class_leave_auroc_undefined_not_wrong() -> None:
    truth_NK = labels(10)
    truth_NK[:, 0] = 0
    found = evaluate(source("p", scores(truth_NK)), source("t", truth_NK), QUICK).figures["classification"]
    assert found["per_disease"][DISEASE_NAMES[0]]["auroc"] is None
    assert found["per_disease"][DISEASE_NAMES[0]]["f1"] == 0.0
    assert "-" in evaluation_text(
        evaluate(source("p", scores(truth_NK)), source("t", truth_NK), QUICK).figures
    )


def test_thresholds_come_from_the_other_split() -> None:
    tuning_NK, truth_NK = labels(40, 5), labels(20, 6)
    tuning = scores(tuning_NK, 7) * 0.4  # a system whose cut is far from 0.5
    evaluation = evaluate(
        source("p", scores(truth_NK, 8) * 0.4),
        source("t", truth_NK),
        QUICK,
        tune_on=(source("v", tuning, "valid"), source("vt", tuning_NK, "valid")),
    )
    expected = tune_thresholds(tuning, tuning_NK, "f1")
    np.testing.assert_allclose(evaluation.thresholds.value_K, expected)
    thresholds = evaluation.figures["thresholds"]
    assert thresholds["values"][DISEASE_NAMES[4]] == expected[4]
    assert thresholds["source"] == "highest F1 on v (40 cases)"
    plain = classification_figures(scores(truth_NK, 8) * 0.4, truth_NK, DISEASE_NAMES, expected)
    assert evaluation.figures["classification"]["macro"]["f1"] == pytest.approx(plain["macro"]["f1"])


def test_thresholds_are_never_tuned_on_evaluated_patients() -> None:
    truth_NK = labels(8)
    predictions, truth = source("p", scores(truth_NK)), source("t", truth_NK)
    with pytest.raises(InputError, match=r"4 patients.*patient_case_0"):
        evaluate(predictions, truth, QUICK, tune_on=(predictions, truth))
    with pytest.raises(InputError, match=r"without true labels: other_0"):
        evaluate(predictions, truth, QUICK, tune_on=(source("o", scores(truth_NK), "other"), truth))


def test_thresholds_are_never_tuned_on_evaluated_cases_whatever_their_patients_are_called() -> None:
    truth_NK = labels(8)
    predictions, truth = source("p", scores(truth_NK)), source("t", truth_NK)
    renamed = FindingsSource(
        "r", {name: replace(case, patient_id=f"other_{name}") for name, case in truth.cases.items()}
    )
    with pytest.raises(InputError, match=r"8 cases evaluated with them: case_0"):
        evaluate(predictions, truth, QUICK, tune_on=(predictions, renamed))


def test_a_truth_that_tells_nothing_is_refused() -> None:
    unknown_NK = np.full((4, K), np.nan)
    with pytest.raises(InputError, match="t has no known label"):
        evaluate(source("p", scores(labels(4))), source("t", unknown_NK), QUICK)


def test_boxes_of_lesions_that_the_truth_did_not_annotate_are_no_false_positives() -> None:
    mask = np.zeros((4, 6, 8), bool)
    mask[1:3, 2:4, 2:5] = True
    truth = with_masks({f"c{n}": {"lung_nodule": mask} for n in range(3)}, "t")
    boxes = tuple(boxes_of_mask(canonical_view(mask, AFFINE), to_canonical(Volume(mask, AFFINE)).affine))
    sure = tuple(LesionBox((0.0, 0.0, 0.0, 2.0, 2.0, n + 1.0), 1.0) for n in range(5))
    found = [
        evaluate(
            FindingsSource("p", {f"c{n}": CaseFindings(f"c{n}", f"c{n}", boxes=said) for n in range(3)}),
            truth,
            QUICK,
        ).figures["boxes"]["froc"]
        for said in ({"lung_nodule": boxes}, {"lung_nodule": boxes, "consolidation": sure})
    ]
    assert found[0] == found[1]
    assert set(found[0].values()) == {1.0}


def test_two_systems_are_compared_on_the_same_patients() -> None:
    truth_NK = labels(60)
    good, bad = source("good", scores(truth_NK, 2, 0.1)), source("bad", scores(truth_NK, 3, 0.8))
    chosen = EvaluationSettings(intervals=Intervals(resamples=200))
    found = evaluate(good, source("t", truth_NK), chosen, against=bad).figures["comparison"]
    macro = found["classification"]["macro"]["auroc"]
    assert found["against"] == "bad"
    assert 0 < macro["low"] < macro["value"]
    assert macro["p_value"] < 0.05
    assert found["thresholds"] == "0.5 for every disease"
    same = evaluate(good, source("t", truth_NK), chosen, against=good).figures["comparison"]
    assert same["classification"]["macro"]["auroc"]["value"] == 0
    assert same["classification"]["macro"]["auroc"]["p_value"] == 1


# --- ids -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(lost=st.sets(st.integers(0, 11), max_size=4), added=st.sets(st.integers(20, 30), max_size=4))
def test_cases_that_only_one_side_knows_are_named_or_left_out_when_asked(
    lost: set[int], added: set[int]
) -> None:
    truth = source("t", labels(12))
    rows = {f"case_{n}": scores(labels(1), n)[0] for n in (set(range(12)) - lost) | added}
    predictions = FindingsSource("p", {case: CaseFindings(case, case, row) for case, row in rows.items()})
    if lost or added:
        with pytest.raises(InputError) as raised:
            join(predictions, truth)
        assert all(f"case_{n}" in str(raised.value) for n in lost | added)
    joined = join(predictions, truth, common_only=True)
    assert set(joined.case_ids) == {f"case_{n}" for n in set(range(12)) - lost}
    assert set(joined.left_out) == {f"case_{n}" for n in lost | added}


def test_sources_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(InputError, match=r"p has labels, t has masks: nothing can be compared"):
        join(source("p", labels(2)), with_masks({"case_0": {"lung_nodule": a_mask(0)}}, "t"))
    with pytest.raises(InputError, match="no case in common"):
        join(source("p", labels(2), "a"), source("t", labels(2), "b"), common_only=True)


def test_a_case_without_the_report_that_others_have_is_named() -> None:
    truth = source("t", labels(3), reports={f"case_{n}": "Fine." for n in range(3)})
    predictions = source("p", scores(labels(3)), reports={"case_0": "Fine.", "case_2": "Fine."})
    with pytest.raises(InputError, match=r"no reports for 1 case of t: case_1"):
        evaluate(predictions, truth, QUICK)
    found = evaluate(predictions, truth, EvaluationSettings(common_only=True, intervals=Intervals(0)))
    assert (found.figures["reports"]["cases"], found.figures["reports"]["missing"]) == (3, 1)


# --- masks and boxes -----------------------------------------------------------------------------------------------


def test_masks_are_scored_in_mm_and_a_lesion_that_was_not_drawn_counts() -> None:
    truth = with_masks({"a": {"lung_nodule": a_mask(1)}, "b": {"lung_nodule": a_mask(2)}}, "t")
    predictions = with_masks({"a": {"lung_nodule": a_mask(3)}, "b": {"consolidation": a_mask(2)}}, "p")
    evaluation = evaluate(predictions, truth, QUICK)
    found = evaluation.figures["localization"]["per_lesion"]["lung_nodule"]
    both = np.count_nonzero(a_mask(1) & a_mask(3))
    dice = 2 * both / (a_mask(1).sum() + a_mask(3).sum())
    assert found["dice"] == pytest.approx(dice / 2)  # b has Dice 0
    assert (found["cases"], found["with_lesion"], found["missed"], found["invented"]) == (2, 2, 1, 0)
    assert found["hd95_mm"] >= 2
    assert list(evaluation.figures["localization"]["per_lesion"]) == ["lung_nodule"]
    assert evaluation.cases.lesions[0].truth_ml == pytest.approx(a_mask(1).sum() * 12 / 1000)


def test_a_lesion_that_the_system_never_draws_is_named_as_not_scored() -> None:
    truth = with_masks({"a": {"lung_nodule": a_mask(1), "pleural_effusion": a_mask(2)}}, "t")
    evaluation = evaluate(with_masks({"a": {"lung_nodule": a_mask(1)}}, "p"), truth, QUICK)
    assert evaluation.figures["localization"]["not_drawn"] == ["pleural_effusion"]
    assert "hold no mask of it in any case: pleural effusion" in evaluation_text(evaluation.figures).lower()
    both = evaluate(truth, truth, QUICK).figures
    assert both["localization"]["not_drawn"] == []
    assert "not scored" not in evaluation_text(both)


def test_masks_on_another_grid_or_in_another_place_are_refused_with_their_case() -> None:
    truth = with_masks({"case_7": {"lung_nodule": a_mask(1)}}, "t")
    with pytest.raises(MaskError, match=r"case_7.*\(4, 6, 7\)"):
        evaluate(with_masks({"case_7": {"lung_nodule": a_mask(1)[..., :-1]}}, "p"), truth, QUICK)
    moved = AFFINE + np.array([[0, 0, 0, 5.0], [0] * 4, [0] * 4, [0] * 4])
    with pytest.raises(MaskError, match=r"case_7.*5\.0 mm apart"):
        evaluate(with_masks({"case_7": {"lung_nodule": a_mask(1)}}, "p", moved), truth, QUICK)


def test_boxes_come_from_masks_where_the_truth_is_boxes() -> None:
    boxes = {"lung_nodule": tuple(boxes_of_mask(a_mask(1), AFFINE))}
    truth = FindingsSource("t", {"a": CaseFindings("a", "a", boxes=boxes)}, frozenset(LESION_KEYS))
    found = evaluate(with_masks({"a": {"lung_nodule": a_mask(1)}}, "p"), truth, QUICK).figures["boxes"]
    assert found["per_lesion"]["lung_nodule"]["iou"] == pytest.approx(1)
    assert found["per_lesion"]["lung_nodule"]["distance_mm"] == pytest.approx(0)
    assert found["per_lesion"]["consolidation"]["iou"] is None
    turned = evaluate(truth, with_masks({"a": {"lung_nodule": a_mask(1)}}, "t"), QUICK)  # boxes against masks
    assert turned.figures["boxes"]["per_lesion"]["lung_nodule"]["iou"] == pytest.approx(1)
    lost = {"lung_nodule": (LesionBox((0, 0, 0, 1, 1, 1)),)}
    far = FindingsSource(
        "p", {"a": CaseFindings("a", "a", boxes={"lung_nodule": (LesionBox((9, 9, 9, 1, 1, 1)),)})}
    )
    truth = FindingsSource("t", {"a": CaseFindings("a", "a", boxes=lost)})
    expected = box_figures({"a": far.cases["a"].boxes}, {"a": lost})
    found = evaluate(far, truth, QUICK).figures["boxes"]
    assert found["macro"]["distance_mm"] == expected["distance"]["macro"] == 768.0
    assert found["froc"] == expected["froc"]


@settings(max_examples=12, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=3, max_size=9), kept=st.integers(1, 3))
def test_the_worst_lesions_keep_the_slice_where_they_are_worst(seeds: list[int], kept: int) -> None:
    truth = with_masks({f"c{n}": {"lung_nodule": a_mask(s)} for n, s in enumerate(seeds)}, "t", scan=True)
    predictions = with_masks({f"c{n}": {"lung_nodule": a_mask(s + 500)} for n, s in enumerate(seeds)}, "p")
    chosen = EvaluationSettings(intervals=Intervals(resamples=0), key_slices=kept)
    cases = evaluate(predictions, truth, chosen).cases
    worst = sorted(score.record.dice for score in cases.lesions)[:kept]
    assert [item.dice for item in cases.key_slices] == pytest.approx(worst)
    item = cases.key_slices[0]
    seed = seeds[int(item.case_id[1:])]
    wrong_D = (a_mask(seed) ^ a_mask(seed + 500)).sum(axis=(1, 2))
    assert item.index == int(np.argmax(wrong_D))
    np.testing.assert_array_equal(item.truth_HW, a_mask(seed)[item.index])
    assert item.hu_HW is not None
    assert item.spacing_mm == (2, 2)


# --- reports -------------------------------------------------------------------------------------------------------


def test_reports_are_scored_by_words_and_by_findings() -> None:
    texts = {
        "case_0": "There is a pleural effusion on the right.",
        "case_1": "No pleural effusion. Emphysema is seen.",
    }
    wrong = {"case_0": "No effusion. Cardiomegaly is seen.", "case_1": texts["case_1"]}
    found = evaluate(
        source("p", scores(labels(2)), reports=wrong),
        source("t", np.full((2, K), np.nan), reports=texts),
        QUICK,
    ).figures["reports"]
    expected = report_scores(list(wrong.values()), list(texts.values()), "official").figures
    assert found["official"]["BLEU_1"] == pytest.approx(expected["BLEU_1"])
    usual = report_scores(list(wrong.values()), list(texts.values()), "words").figures
    assert found["words"]["BLEU_2"] == pytest.approx(usual["BLEU_2"])
    read = classification_figures(
        label_reports(wrong.values()), label_reports(texts.values()) * 1.0, DISEASE_NAMES
    )
    assert found["clinical"]["macro"]["f1"] == pytest.approx(read["macro"]["f1"])
    assert found["clinical"]["truth"].startswith("read from the true reports")
    truth_NK = label_reports(wrong.values()).astype(float)
    found = evaluate(source("p", truth_NK, reports=wrong), source("t", truth_NK, reports=texts), QUICK)
    assert found.figures["reports"]["clinical"]["crg"] == 1.0
    assert found.figures["reports"]["clinical"]["truth"] == "labels that were given"


def test_bert_score_is_added_when_asked_and_names_its_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_text_encoder()
    monkeypatch.setattr(bert_score, "load_text_encoder", lambda name: encoder)
    reports = {f"case_{n}": text for n, text in enumerate(("No effusion.", "Emphysema on the left."))}
    truth = source("t", labels(2), reports=reports)
    chosen = EvaluationSettings(intervals=Intervals(resamples=20), bert_score=True)
    figures = evaluate(source("p", scores(labels(2)), reports=reports), truth, chosen).figures
    meaning = figures["reports"]["meaning"]
    assert meaning["f1"]["value"] == pytest.approx(1, abs=1e-5)
    assert meaning["encoder"] == encoder.name
    assert f"BERTScore with {encoder.name}" in evaluation_text(figures)


# --- settings and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"objective": "luck"},
        {"intervals": Intervals(-1)},
        {"intervals": Intervals(9, 1.0)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        EvaluationSettings(**wrong)


def test_an_evaluation_is_written_whole_and_replaced_only_when_asked(tmp_path: Path) -> None:
    truth = with_masks({"a": {"lung_nodule": a_mask(1)}, "b": {"lung_nodule": a_mask(2) & False}}, "t")
    predictions = with_masks({"a": {"lung_nodule": a_mask(3)}, "b": {"lung_nodule": a_mask(2) & False}}, "p")
    evaluation = evaluate(predictions, truth, QUICK)
    files = write_evaluation(evaluation, tmp_path / "new" / "out")
    assert {file.name for file in files} == {"evaluation.json", "evaluation.txt", "lesions.csv"}
    assert json.loads((tmp_path / "new/out/evaluation.json").read_text()) == evaluation.figures
    rows = list(csv.DictReader((tmp_path / "new/out/lesions.csv").read_text().splitlines()))
    assert float(rows[0]["dice"]) == pytest.approx(evaluation.cases.lesions[0].record.dice)
    assert rows[1]["dice"] == ""
    with pytest.raises(OutputError, match="holds an evaluation already"):
        write_evaluation(evaluation, tmp_path / "new" / "out")
    write_evaluation(evaluation, tmp_path / "new" / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_evaluation(evaluation, tmp_path / "file")


def test_the_table_says_what_a_person_must_know() -> None:
    truth_NK = labels(20)
    evaluation = evaluate(source("p", scores(truth_NK), training="untrained"), source("t", truth_NK))
    text = evaluation_text(evaluation.figures)
    assert "p against t: 20 cases of 10 patients" in text
    assert "UNTRAINED" in text
    assert "0.5 for every disease" in text
    assert all(name in text for name in DISEASE_NAMES)
    assert "CRG" in text
