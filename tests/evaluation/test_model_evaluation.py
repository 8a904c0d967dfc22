"""A model over a prepared store gives the figures that predicting its cases by hand gives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.small_cases import GRID, case, load_small, small_cases
from support.small_models import small_config, small_model
from vlm3d.datasets.prepare import prepare
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.datasets.store import ANNOTATED_SLICES
from vlm3d.errors import ConfigError, DataError, InputError
from vlm3d.evaluation.case_prediction import tuning_scans
from vlm3d.evaluation.classification import classification_figures
from vlm3d.evaluation.evaluator import EvaluationSettings
from vlm3d.evaluation.intervals import Intervals
from vlm3d.evaluation.model_evaluation import ModelRun, evaluate_model, predict_case, tune_on_store
from vlm3d.evaluation.prediction_files import read_findings
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.preprocessing.intensity import window_in_place

QUICK = EvaluationSettings(intervals=Intervals(resamples=0))


@pytest.fixture(scope="module")
def model() -> VLM3DMultiTask:
    return small_model(with_text=False).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "store"
    rng = np.random.default_rng(0)
    cases = []
    for n, plain in enumerate(small_cases(4)):
        labels = tuple((rng.random(len(DISEASE_NAMES)) > 0.5).astype(float))
        cases.append(case(plain.case_id, plain.load, split="valid" if n == 3 else "test", labels_K=labels))
    prepare(cases, folder, small_config().preprocessing, anatomy="given", workers=1)
    return folder


def test_figures_are_those_of_predicting_case_by_case(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    evaluation = evaluate_model(model, dataset, QUICK)
    probabilities, overlaps = [], []
    for index, record in enumerate(dataset.cases):
        arrays = dataset.read(index)
        intensity = window_in_place(arrays.hu_DHW.astype(np.float32), model.config.preprocessing.hu_window)
        found = model.predict(
            torch.from_numpy(intensity)[None, None],
            torch.from_numpy(arrays.regions_DHW)[None],
            generate_report=False,
        )
        probabilities.append(found["classification"]["probabilities"][0].double().numpy())
        predicted = found["localization"]["masks"]["lung_nodule"][0].numpy()
        truth = (arrays.lesion_bits_DHW >> LESION_KEYS.index("lung_nodule") & 1) > 0
        overlaps.append(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
        assert set(record.known_lesions) == {
            "lung_nodule",
            "consolidation",
        }
    label_NK = np.array([record.labels_K for record in dataset.cases])
    expected = classification_figures(np.array(probabilities), label_NK, DISEASE_NAMES)
    figures = evaluation.figures
    assert figures["classification"]["macro"]["auroc"] == pytest.approx(expected["macro"]["auroc"])
    assert figures["classification"]["crg"] == pytest.approx(expected["crg"])
    per_lesion = figures["localization"]["per_lesion"]
    assert set(per_lesion) == {"lung_nodule", "consolidation"}  # the others were not annotated
    assert per_lesion["lung_nodule"]["dice"] == pytest.approx(np.mean(overlaps))
    assert per_lesion["consolidation"]["with_lesion"] == 0
    assert (figures["training"], figures["truth"], figures["cases"]) == ("untrained", "store", 3)


def test_masks_that_do_not_cover_a_scan_are_not_scored(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    dataset.cases = tuple(
        replace(record, facts={**record.facts, ANNOTATED_SLICES: (0, 2)} if n == 0 else record.facts)
        for n, record in enumerate(dataset.cases)
    )
    evaluation = evaluate_model(model, dataset, QUICK)
    assert evaluation.figures["localization"]["per_lesion"]["lung_nodule"]["cases"] == 2
    assert [scan.counts for scan in tuning_scans(model, dataset, 0)] == [{}]
    assert tuning_scans(model, dataset, 1)[0].counts


def test_cases_can_be_chosen_and_listened_to_and_the_models_mode_stays(
    model: VLM3DMultiTask, store: Path
) -> None:
    seen: list[str] = []
    steps: list[tuple[int, int]] = []
    model.train()
    evaluation = evaluate_model(
        model,
        PreparedDataset(store, None),
        QUICK,
        indices=[2, 0],
        run=ModelRun(masks=False),
        on_case=lambda predicted, true: seen.append(predicted.case_id),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert model.training
    model.eval()
    assert seen == evaluation.cases.case_ids == ["case_2", "case_0"]
    assert steps == [(1, 2), (2, 2)]
    assert "localization" not in evaluation.figures


def test_reports_are_written_where_the_truth_has_one(model: VLM3DMultiTask, store: Path) -> None:
    run = ModelRun(reports=True, masks=False, report_generation={"max_new_tokens": 4})
    evaluation = evaluate_model(model, PreparedDataset(store, ("valid",)), QUICK, run=run)
    (pair,) = evaluation.cases.reports
    assert pair.truth == "Report of 3."
    assert pair.predicted is not None
    assert evaluation.figures["reports"]["cases"] == 1


def test_pictures_come_from_the_store(model: VLM3DMultiTask, store: Path) -> None:
    settings = EvaluationSettings(intervals=Intervals(resamples=0), key_slices=1)
    cases = evaluate_model(model, PreparedDataset(store, ("test",)), settings).cases
    picture = next(item for item in cases.key_slices if item.lesion == "lung_nodule")
    assert picture.hu_HW is not None
    assert picture.hu_HW.shape == picture.truth_HW.shape == picture.predicted_HW.shape


def test_a_store_of_another_model_an_empty_split_and_damage_are_refused(
    model: VLM3DMultiTask, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no case of the split"):
        evaluate_model(model, PreparedDataset(store, ("train",)), QUICK)
    other = tmp_path / "other"
    prepare([case("case_0", load_small_0)], other, GRID, anatomy="given", workers=1)
    with pytest.raises(ConfigError, match="fingerprint"):
        evaluate_model(model, PreparedDataset(other), QUICK)
    damaged = Path(shutil.copytree(store, tmp_path / "damaged"))
    (damaged / "cases" / "case_1" / "image.b2nd").write_bytes(b"no")
    with pytest.raises(DataError, match="case_1"):
        evaluate_model(model, PreparedDataset(damaged, ("test",)), QUICK)


def load_small_0():  # type: ignore[no-untyped-def]
    return load_small(0)


def test_thresholds_are_tuned_on_another_split_of_other_patients(model: VLM3DMultiTask, store: Path) -> None:
    dataset = PreparedDataset(store, ("test",))
    tuned = tune_on_store(model, dataset, QUICK, name="split 'test'")
    thresholds = tuned.thresholds
    assert tuned.fusion is None  # its localizer never learned
    assert thresholds.source == "highest F1 on split 'test' (3 cases)"
    valid = PreparedDataset(store, ("valid",))
    figures = evaluate_model(model, valid, QUICK, thresholds=thresholds).figures
    assert figures["thresholds"]["values"][DISEASE_NAMES[0]] == thresholds.value_K[0]
    with pytest.raises(InputError, match="p_case_1"):
        tune_on_store(model, dataset, QUICK, name="test", evaluated_patients=["p_case_1"])


def test_a_store_is_a_truth_for_files_too(model: VLM3DMultiTask, store: Path) -> None:
    truth = read_findings(store, truth=True)
    assert sorted(truth.cases) == ["case_0", "case_1", "case_2", "case_3"]
    dataset = PreparedDataset(store, None)
    _, true = predict_case(model, dataset, 0, ModelRun(masks=False))
    from_files = truth.cases[dataset.cases[0].case_id].load_masks()
    np.testing.assert_array_equal(from_files.masks["lung_nodule"], true.load_masks().masks["lung_nodule"])
    assert from_files.absent == {"consolidation"}
    assert truth.cases["case_0"].patient_id == "p_case_0"
