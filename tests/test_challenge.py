"""``vlm3d challenge``: the official files of a folder of volumes, all of them or none."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.phantoms import coarse_phantom
from support.scan_files import write_itk
from support.small_models import small_model
from vlm3d import cli
from vlm3d.challenge import case_name, find_volumes, official_boxes, official_probabilities, official_report
from vlm3d.errors import InputError
from vlm3d.evaluation.official import read_classification, read_reports, write_reports
from vlm3d.evaluation.official_boxes import read_boxes, write_boxes
from vlm3d.inference.pipeline import Pipeline, PredictionSettings, Result
from vlm3d.inference.prediction import TRAINING_NOTES, DiseaseFinding, Report
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS
from vlm3d.model.checkpoint import StoredThresholds

ROOT = Path(__file__).parents[1]
SERIES = "9ec28230-c131-4aad-85dd-04fe45c00bac"
NAMES = ("valid_1_a_1", f"batch_7_{SERIES}")
ASKED = PredictionSettings(anatomy="none", report=False)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(small_model(with_text=False), checkpoint="small")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phantom in both formats, under two names; one lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("input")
    volume = coarse_phantom().volume
    write_itk(folder / f"{NAMES[0]}.mha", volume.voxels_DHW, volume.affine)
    (folder / "more").mkdir()
    write_itk(folder / "more" / f"{NAMES[1]}.nii.gz", volume.voxels_DHW, volume.affine)
    (folder / "readme.txt").write_text("no volume")
    return folder


@pytest.fixture(scope="module")
def drawn(pipeline: Pipeline) -> Result:
    """A prediction with masks, which untrained weights draw at a low threshold alone."""
    volume = coarse_phantom().volume
    found = pipeline(volume, ASKED).prediction.lesions
    return pipeline(
        volume, replace(ASKED, localization_threshold=0.98 * min(lesion.max_probability for lesion in found))
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]):
    """Run a command in this process with the small model; returns exit code, output and error lines."""
    for name in ("HF_HUB_OFFLINE", "PIP_NO_INDEX"):
        monkeypatch.setenv(name, "1")

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(cli, "_pipeline", lambda *_, **__: pipeline)
        monkeypatch.setattr(sys, "argv", ["vlm3d", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, drawn: Result) -> None:
    """Predictions that take no time: what is under test is what becomes of them, and of files that cannot be read."""

    def predict(self: Pipeline, path: Path, settings: PredictionSettings) -> Result:
        from vlm3d.io import read_volume

        read_volume(path)
        text = f"Findings:\nAs asked: {settings.report}.\n\nImpression:\nNone.\n\nRecommendations:\nRest."
        report = Report(
            text=text,
            findings=f"As asked: {settings.report}.",
            impression="None.",
            recommendations="Rest.",
            generated=settings.report,
        )
        return replace(drawn, prediction=drawn.prediction.model_copy(update={"report": report}))

    monkeypatch.setattr(Pipeline, "__call__", predict)


def error_of(result: tuple[int, str, list[str]], code: int) -> str:
    """Check that a run failed as documented, in one line; returns it."""
    found, out, lines = result
    (line,) = [line for line in lines if line.startswith("vlm3d: error: ")]
    assert (found, out, lines[-1]) == (code, "", line)
    assert not any("Traceback" in line for line in lines)
    return line


# --- files -------------------------------------------------------------------------------------------------------


def test_probabilities_are_the_models_whatever_the_format_and_can_be_scored(
    run, scans: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "here"
    code, stdout, lines = run("challenge", "--task", "classification", "--input", scans, "-o", out)
    assert code == 0, lines
    assert stdout.strip() == str(out / "results.json")
    assert any(TRAINING_NOTES["untrained"] in line for line in lines)
    assert any("has no thresholds" in line for line in lines)
    assert any(re.match(r"\[2/2\] \d+\.\d s a case", line) for line in lines)
    assert not any(name in line for name in NAMES for line in lines)
    found = read_classification(out / "results.json", expected_ids=NAMES)
    np.testing.assert_array_equal(found[NAMES[0]], found[NAMES[1]])
    expected = pipeline(scans / f"{NAMES[0]}.mha", PredictionSettings(report=False)).prediction.diseases
    np.testing.assert_array_equal(found[NAMES[0]], [disease.probability for disease in expected])

    truth = tmp_path / "ground_truth.csv"
    rows = [f"{name},{','.join(str((n + k) % 2) for k in range(18))}" for n, name in enumerate(NAMES)]
    truth.write_text("\n".join([",".join(["AccessionNo", *DISEASE_NAMES]), *rows]) + "\n")
    code, stdout, lines = run("evaluate", out / "results.json", "--truth", truth, "--resamples", 0)
    assert code == 0, lines
    assert "2 cases" in stdout


@pytest.mark.parametrize(
    ("year", "file", "second"), [(2025, "results.json", NAMES[1]), (2026, "predictions.json", SERIES)]
)
def test_reports_are_one_line_under_the_names_of_the_year(
    run, quick, scans: Path, tmp_path: Path, year: int, file: str, second: str
) -> None:
    code, _, lines = run("challenge", "--task", "reports", "--year", year, "-i", scans, "-o", tmp_path)
    assert code == 0, lines
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert isinstance(json.loads((tmp_path / file).read_text()), dict if year == 2025 else list)
    found = read_reports(tmp_path / file, expected_ids=[NAMES[0], second])
    assert set(found.values()) == {"Findings: As asked: True. Impression: None."}
    write_reports(tmp_path / "truth.json", found, year=2025)
    code, stdout, lines = run("evaluate", tmp_path / file, "-t", tmp_path / "truth.json", "--resamples", 0)
    assert code == 0, lines
    assert "BLEU_1 1.000" in stdout


def test_boxes_surround_the_five_lesions_and_can_be_scored(
    run, quick, scans: Path, drawn: Result, tmp_path: Path
) -> None:
    code, _, lines = run("challenge", "--task", "boxes", "-i", scans, "-o", tmp_path)
    assert code == 0, lines
    content = json.loads((tmp_path / "results.json").read_text())
    named = [case["input_image_name"] for case in content[0]["outputs"][0]["value"]["predictions"]]
    assert sorted(named) == sorted([f"{NAMES[0]}.mha", f"{NAMES[1]}.nii.gz"])
    boxes = read_boxes(tmp_path / "results.json", expected_ids=NAMES)[NAMES[0]]
    assert list(boxes) == list(LESION_KEYS)
    for lesion in drawn.prediction.lesions[: len(LESION_KEYS)]:
        assert boxes[lesion.key], lesion.key
        assert {box.probability for box in boxes[lesion.key]} == {lesion.max_probability}
    write_boxes(tmp_path / "truth.json", dict.fromkeys(NAMES, boxes))
    code, _, lines = run(
        "evaluate", tmp_path / "results.json", "-t", tmp_path / "truth.json", "--resamples", 0
    )
    assert code == 0, lines


def test_boxes_take_the_fitted_probability_that_the_scan_has_the_lesion(drawn: Result) -> None:
    lesions = [lesion.model_copy(update={"presence": 0.125}) for lesion in drawn.prediction.lesions]
    fitted = replace(drawn, prediction=drawn.prediction.model_copy(update={"lesions": lesions}))
    assert {box.probability for boxes in official_boxes(fitted).values() for box in boxes} == {0.125}


def test_folders_come_from_the_environment(
    run, quick, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORITHMUS_INPUT", str(scans))
    monkeypatch.setenv("FORITHMUS_OUTPUT", str(tmp_path))
    code, stdout, lines = run("challenge", "--task", "classification")
    assert code == 0, lines
    assert stdout.strip() == str(tmp_path / "results.json")


# --- names and texts ---------------------------------------------------------------------------------------------


def test_cases_are_called_as_the_scorers_look_for_them() -> None:
    path = Path("/input/1.2.840_B_Toraks.NII.GZ")
    assert case_name(path, "classification", 2026) == case_name(path, "reports", 2026) == "1.2.840_B_Toraks"
    assert case_name(path, "boxes", 2025) == path.name
    of_series = Path(f"batch_7_{SERIES}.nii.gz")
    assert case_name(of_series, "reports", 2026) == SERIES
    assert case_name(of_series, "classification", 2026) == f"batch_7_{SERIES}"


def test_a_report_without_sections_is_kept_in_one_line() -> None:
    report = Report(text="Clear\n lungs. ", findings="", impression="", recommendations="", generated=True)
    assert official_report(report) == "Clear lungs."


# --- probabilities -----------------------------------------------------------------------------------------------


def finding(probability: float, threshold: float) -> DiseaseFinding:
    return DiseaseFinding(
        name="Emphysema",
        probability=probability,
        threshold=threshold,
        positive=probability >= threshold,
        uncertainty=0.0,
    )


@given(p=st.floats(0, 1), other=st.floats(0, 1), threshold=st.floats(0, 1))
def test_a_disease_is_positive_at_one_half_where_it_was_at_its_threshold(
    p: float, other: float, threshold: float
) -> None:
    low, high = (
        official_probabilities([finding(value, threshold)], shift=True)["Emphysema"]
        for value in sorted((p, other))
    )
    assert 0 <= low <= high <= 1
    assert (low >= 0.5, high >= 0.5) == (min(p, other) >= threshold, max(p, other) >= threshold)


def test_thresholds_of_the_checkpoint_move_to_one_half(
    run,
    quick,
    scans: Path,
    pipeline: Pipeline,
    drawn: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = StoredThresholds({}, "highest F1 on split 'valid' (4 cases)", "")
    monkeypatch.setattr(pipeline, "thresholds", stored)
    diseases = [
        disease.model_copy(update={"threshold": 0.9 * disease.probability if n % 2 else 0.99})
        for n, disease in enumerate(drawn.prediction.diseases)
    ]
    monkeypatch.setattr(drawn.prediction, "diseases", diseases)
    code, _, lines = run("challenge", "--task", "classification", "-i", scans, "-o", tmp_path)
    assert code == 0, lines
    assert any("highest F1 on split 'valid'" in line for line in lines)
    found = read_classification(tmp_path / "results.json")[NAMES[0]]
    assert (found >= 0.5).tolist() == [bool(n % 2) for n in range(18)]


# --- failures ----------------------------------------------------------------------------------------------------


def broken_folder(scans: Path, folder: Path) -> Path:
    """A good volume, then one that is cut off."""
    whole = (scans / f"{NAMES[0]}.mha").read_bytes()
    folder.mkdir()
    (folder / "a.mha").write_bytes(whole)
    (folder / "b.mha").write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_broken_volume_ends_the_run_with_its_name_and_no_file(
    run, quick, scans: Path, tmp_path: Path
) -> None:
    folder = broken_folder(scans, tmp_path / "in")
    arguments = ("challenge", "--task", "classification", "-i", folder, "-o", tmp_path / "out")
    assert "b.mha" in error_of(run(*arguments), 3)
    assert not list((tmp_path / "out").iterdir())


def test_an_earlier_file_is_replaced_when_asked_and_only_by_a_whole_one(
    run, quick, scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text("mine")
    good = ("challenge", "--task", "classification", "-o", tmp_path, "-i")
    assert "--overwrite" in error_of(run(*good, scans), 5)
    error_of(run(*good, broken_folder(scans, tmp_path / "in"), "--overwrite"), 3)
    assert (tmp_path / "results.json").read_text() == "mine"
    assert run(*good, scans, "--overwrite")[0] == 0
    assert set(read_classification(tmp_path / "results.json")) == set(NAMES)


def test_a_model_that_fails_names_the_volume(
    run, scans: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Result:
        raise ZeroDivisionError("by nothing\nat all")

    monkeypatch.setattr(Pipeline, "__call__", fail)
    line = error_of(run("challenge", "--task", "boxes", "-i", scans, "-o", tmp_path), 1)
    assert f"{NAMES[1]}.nii.gz" in line or f"{NAMES[0]}.mha" in line
    assert "ZeroDivisionError: by nothing" in line
    assert not list(tmp_path.iterdir())


def test_folders_and_options_that_cannot_be_right(
    run, scans: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    classify = ("challenge", "--task", "classification", "-i")
    error_of(run(*classify, tmp_path / "file", "-o", tmp_path), 3)
    assert "holds no volume" in error_of(run(*classify, tmp_path / "empty", "-o", tmp_path), 3)
    error_of(run(*classify, scans, "-o", tmp_path / "file"), 5)
    error_of(run(*classify, scans, "-o", tmp_path, "--year", 2024), 2)
    error_of(run("challenge", "--task", "poetry", "-i", scans, "-o", tmp_path), 2)
    monkeypatch.setattr(pipeline, "model", SimpleNamespace(disease_names=["Gout"]))
    assert "1 disease;" in error_of(run(*classify, scans, "-o", tmp_path), 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_one_case_in_two_formats_and_a_link_to_nowhere_are_not_passed_over(
    run, quick, tmp_path: Path
) -> None:
    for name in ("a.mha", "a.nii.gz"):
        (tmp_path / name).touch()
    arguments = ("challenge", "--task", "boxes", "-i", tmp_path, "-o", tmp_path / "out")
    assert "more than once: a" in error_of(run(*arguments), 3)
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "a.mha").unlink()
    (tmp_path / "b.mha").symlink_to(tmp_path / "nowhere.mha")
    assert "b.mha" in error_of(run(*arguments), 3)
    with pytest.raises(InputError):
        find_volumes(tmp_path / "out")


def test_the_container_takes_the_torch_of_the_makefile() -> None:
    pinned = re.search(r"^TORCH\s*\?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert f"ARG TORCH={pinned[1]}\n" in (ROOT / "docker" / "challenge.Dockerfile").read_text()
