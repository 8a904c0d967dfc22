"""Two systems are compared over the same cases: their difference is that of the figures that each gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlm3d.evaluation.case_findings import CaseFindings, FindingsSource, LesionMasks
from vlm3d.evaluation.evaluator import EvaluationSettings, evaluate
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.tables import evaluation_text
from vlm3d.labels import DISEASE_NAMES

RNG = np.random.default_rng(0)
LABELS_NK = (RNG.random((40, len(DISEASE_NAMES))) > 0.5).astype(float)
DRAWN = EvaluationSettings(intervals=Intervals(resamples=200))
PLAIN = EvaluationSettings(intervals=Intervals(resamples=0))


def _source(name: str, cases: list[CaseFindings]) -> FindingsSource:
    return FindingsSource(name, {case.case_id: case for case in cases}, frozenset({"lung_nodule"}))


def _case(number: int, nodule: bool | None = None, **more) -> CaseFindings:
    load = None
    if nodule is not None:
        mask_DHW = np.zeros((3, 4, 5), bool)
        mask_DHW[1, 1:3, 1:3] = nodule
        load = lambda: LesionMasks({"lung_nodule": mask_DHW}, np.eye(4))  # noqa: E731
    return CaseFindings(f"case_{number}", f"patient_{number // 2}", load_masks=load, **more)


def _scored(name: str, noise: float, seed: int) -> FindingsSource:
    scores_NK = 0.5 + (LABELS_NK - 0.5) * 0.4 + np.random.default_rng(seed).normal(0, noise, LABELS_NK.shape)
    return _source(name, [_case(n, scores_K=row) for n, row in enumerate(scores_NK.clip(0, 1))])


TRUTH = _source("truth", [_case(n, scores_K=row) for n, row in enumerate(LABELS_NK)])


def test_a_system_that_invents_lesions_is_worse() -> None:
    truth = _source("truth", [_case(n, nodule=n < 10) for n in range(40)])
    perfect = replace(truth, name="perfect")
    inventing = _source("inventing", [_case(n, nodule=True) for n in range(40)])
    own, other = (evaluate(system, truth, PLAIN).figures["localization"] for system in (perfect, inventing))
    found = evaluate(perfect, truth, DRAWN, against=inventing).figures["comparison"]["localization"]
    for figure in ("dice", "iou"):
        for place in (found["per_lesion"]["lung_nodule"], found["macro"]):
            assert place[figure]["value"] == pytest.approx(own["macro"][figure] - other["macro"][figure])
            assert place[figure]["low"] > 0.5
            assert place[figure]["p_value"] < 0.02


@pytest.mark.parametrize("part", ["classification", "reports"])
def test_a_difference_is_that_of_the_two_figures(part: str) -> None:
    def said(name: str, share: float) -> FindingsSource:
        rng = np.random.default_rng(int(100 * share))
        texts = [
            " ".join(
                f"{word} is seen."
                for word, there in zip(("Cardiomegaly", "Emphysema", "Consolidation"), row, strict=True)
                if there
            )
            for row in (LABELS_NK[:, [2, 7, 15]] > 0) ^ (rng.random((40, 3)) < share)
        ]
        return _source(name, [_case(n, report=text or "Normal.") for n, text in enumerate(texts)])

    if part == "reports":
        first, second, truth = said("first", 0.1), said("second", 0.4), said("truth", 0.0)
    else:
        first, second, truth = _scored("first", 0.2, 1), _scored("second", 0.5, 2), TRUTH
    one, two = (evaluate(system, truth, PLAIN).figures[part] for system in (first, second))
    compared = evaluate(first, truth, DRAWN, against=second).figures
    found = compared["comparison"][part]
    if part == "reports":
        assert found["words"]["BLEU_4"]["value"] == pytest.approx(
            one["words"]["BLEU_4"] - two["words"]["BLEU_4"]
        )
        one, two, found = one["clinical"], two["clinical"], found["clinical"]
    assert found["macro"]["f1"]["value"] == pytest.approx(one["macro"]["f1"] - two["macro"]["f1"])
    assert found["crg"]["value"] == pytest.approx(one["crg"] - two["crg"])
    assert found["macro"]["f1"]["low"] < found["macro"]["f1"]["value"] < found["macro"]["f1"]["high"]
    assert "first minus second" in evaluation_text(compared)


def test_without_resamples_differences_stand_alone() -> None:
    first, second = _scored("first", 0.2, 1), _scored("second", 0.5, 2)
    plain = evaluate(first, TRUTH, PLAIN, against=second).figures["comparison"]
    drawn = evaluate(first, TRUTH, DRAWN, against=second).figures["comparison"]
    assert plain["classification"]["macro"]["auroc"] == pytest.approx(
        drawn["classification"]["macro"]["auroc"]["value"]
    )
    assert "p=" not in evaluation_text(evaluate(first, TRUTH, PLAIN, against=second).figures)


def test_a_case_that_one_system_is_silent_on_is_compared_in_neither() -> None:
    first = _scored("first", 0.3, 1)
    silent = _case(7, report="Normal.")
    second = replace(first, name="second", cases={**first.cases, silent.case_id: silent})
    common = replace(DRAWN, common_only=True)
    figures = evaluate(first, TRUTH, common, against=second).figures
    assert figures["silent"] == {}
    assert figures["comparison"]["silent"] == {"labels": ["case_7"]}
    assert figures["comparison"]["classification"]["cases"] == 39
    auroc = figures["comparison"]["classification"]["macro"]["auroc"]
    assert (auroc["value"], auroc["low"], auroc["high"], auroc["p_value"]) == (0, 0, 0, 1)
    assert "second says nothing of the labels of 1 case: case_7" in evaluation_text(figures)
