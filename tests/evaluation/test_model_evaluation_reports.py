"""Reports of a store are written side by side, from the findings at the thresholds, with the words of one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.small_cases import case, small_cases
from support.small_models import small_config, small_model
from vlm3d.datasets.prepare import prepare
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.evaluation import model_evaluation
from vlm3d.evaluation.case_findings import CaseFindings
from vlm3d.evaluation.case_prediction import HeadFindings, run_heads
from vlm3d.evaluation.evaluator import EvaluationSettings
from vlm3d.evaluation.figures import Thresholds
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.model_evaluation import MendedReport, ModelRun, evaluate_model, predict_case
from vlm3d.inference.contradictions import check_report
from vlm3d.inference.head_contradictions import ReportMender, diseases_of
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.preprocessing.intensity import window_in_place

QUICK = EvaluationSettings(intervals=Intervals(resamples=0))
RUN = ModelRun(reports=True, report_generation={"max_new_tokens": 12, "temperature": 0.0})
FINDING = {
    "finding": "Lung nodule",
    "side": "right",
    "region": "right_upper_lobe",
    "level": "upper",
    "size_mm": 9.0,
}


@pytest.fixture(scope="module")
def model() -> VLM3DMultiTask:
    return small_model(with_text=False).eval()


@pytest.fixture(scope="module", params=["given", "none"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases, with anatomy and without."""
    folder = tmp_path_factory.mktemp("data") / "store"
    rng = np.random.default_rng(0)
    cases = [
        case(
            plain.case_id,
            plain.load,
            split="test",
            labels_K=tuple((rng.random(len(DISEASE_NAMES)) > 0.5).astype(float)),
            facts={"findings": [FINDING]},
        )
        for plain in small_cases(3)
    ]
    prepare(cases, folder, small_config().preprocessing, anatomy=request.param, workers=1)
    return folder


def test_a_batch_has_the_words_of_one_by_one(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    run = replace(RUN, report_batch=2)  # three cases: a full batch and the rest
    evaluation = evaluate_model(model, dataset, QUICK, run=run)
    alone = [predict_case(model, dataset, index, RUN)[0].report for index in range(len(dataset))]
    assert [pair.predicted for pair in evaluation.cases.reports] == alone
    grounding = evaluation.figures["grounding"]
    assert grounding["reports"] == 3
    assert grounding["no_contradiction"] is None
    assert grounding["contradictions_checked"] == 0


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("listened_to", [True, False])
def test_each_case_gets_the_report_of_its_own_prompt(
    model: VLM3DMultiTask, store: Path, monkeypatch: pytest.MonkeyPatch, batch: int, listened_to: bool
) -> None:
    sizes: list[int] = []

    def numbered(_: VLM3DMultiTask, prompts: Sequence[torch.Tensor], run: ModelRun) -> list[str]:
        sizes.append(len(prompts))
        return [str(float(prompt.double().sum())) for prompt in prompts]

    seen: list[tuple[str, str | None]] = []

    def listen(predicted: CaseFindings, true: CaseFindings) -> None:
        seen.append((true.case_id, predicted.report))

    monkeypatch.setattr(model_evaluation, "write_reports", numbered)
    dataset = PreparedDataset(store, ("test",))
    run = replace(RUN, report_batch=batch)
    cases = evaluate_model(model, dataset, QUICK, run=run, on_case=listen if listened_to else None).cases
    prompts = [run_heads(model, dataset, index, RUN).prompt_PM for index in range(len(dataset))]
    texts = [str(float(prompt.double().sum())) for prompt in prompts if prompt is not None]
    assert len(set(texts)) == 3
    assert [pair.predicted for pair in cases.reports] == texts
    assert seen == (list(zip(cases.case_ids, texts, strict=True)) if listened_to else [])
    assert [size for size in sizes if size] == {1: [1, 1, 1], 2: [2, 1], 8: [3]}[batch]


def test_words_are_those_of_the_model_alone(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    arrays, record = dataset.read(0), dataset.cases[0]
    intensity = window_in_place(arrays.hu_DHW.astype(np.float32), model.config.preprocessing.hu_window)
    regions = torch.from_numpy(arrays.regions_DHW)[None] if record.regions_method is not None else None
    found = model.predict(
        torch.from_numpy(intensity)[None, None],
        regions,
        report_generation_config=RUN.report_generation,
        spacing_mm=record.spacing_mm,
    )
    assert predict_case(model, dataset, 0, RUN)[0].report == found["reports"][0]


def test_findings_enter_the_report_at_their_thresholds(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    none, every = (
        run_heads(model, dataset, 0, RUN, Thresholds(np.full(len(DISEASE_NAMES), cut), "made up"))
        for cut in (1.0, 0.0)
    )
    assert none.heads is not None
    assert every.heads is not None
    assert none.heads.positive == []
    assert every.heads.positive == list(DISEASE_NAMES)
    assert none.prompt_PM is not None
    assert every.prompt_PM is not None
    assert len(every.prompt_PM) > len(none.prompt_PM)


def test_contradictions_are_counted_with_the_models_own_heads(model: VLM3DMultiTask, store: Path) -> None:
    seen: list[HeadFindings] = []
    flag = ReportMender(model, "flag")

    def flagged(text: str, heads: HeadFindings) -> MendedReport:
        seen.append(heads)
        return flag(text, heads)

    dataset = PreparedDataset(store, ("test",))
    evaluation = evaluate_model(model, dataset, QUICK, run=RUN, mend=flagged)
    grounding = evaluation.figures["grounding"]
    assert grounding["contradictions_checked"] == len(seen) == 3
    for figure in ("no_contradiction", "bleu_4"):
        assert grounding[figure] == grounding[f"{figure}_written"]
    assert grounding["report_macro_f1"] == grounding["written_macro_f1"]
    bare = replace(seen[0], pieces={}, probabilities=dict.fromkeys(DISEASE_NAMES, 0.1))
    assert flag("Findings:\nPleural effusion on the left.", bare).contradictions == 1
    assert flag("Findings:\nNo pleural effusion.", bare).contradictions == 0
    assert check_report("Findings:\nCardiomegaly.", diseases_of(bare), []).contradictions


def test_a_repaired_report_is_what_is_scored(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    every = Thresholds(np.full(len(DISEASE_NAMES), 1e-6), "made up")
    run = replace(RUN, mask_threshold=0.99)
    flagged, repaired = (
        evaluate_model(model, dataset, QUICK, run=run, thresholds=every, mend=ReportMender(model, policy))
        for policy in ("flag", "repair")
    )
    before, after = flagged.figures["grounding"], repaired.figures["grounding"]
    assert before["no_contradiction"] == after["no_contradiction_written"] == 0.0
    assert after["no_contradiction"] == 1.0
    assert after["written_macro_f1"] == before["report_macro_f1"]
    assert after["bleu_4_written"] == before["bleu_4"]
    for pair in repaired.cases.reports:
        assert "Hiatal hernia." in pair.predicted
