"""Predictions of any system are read from whatever they come in, and what does not fit is refused with ids named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.phantoms import coarse_phantom
from support.predictions import make_prediction
from vlm3d.datasets.phantom.writing import write_phantom
from vlm3d.errors import InputError, MaskError, UnreadableFileError
from vlm3d.evaluation.official import write_classification, write_reports
from vlm3d.evaluation.official_boxes import LesionBox, write_boxes
from vlm3d.evaluation.prediction_files import read_findings
from vlm3d.io import write_nifti_mask
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

K = len(DISEASE_NAMES)
AFFINE = np.array([[0.0, 0, -2, 10], [0, -2, 0, 20], [3, 0, 0, 30], [0, 0, 0, 1]])


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def a_mask(seed: int = 0, shape: tuple[int, int, int] = (4, 6, 8)) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) > 0.7).astype(np.uint8)


def test_a_table_is_read_by_its_columns_names_in_any_order(tmp_path: Path) -> None:
    order = list(reversed(DISEASE_NAMES))
    values = [round(0.05 * k, 2) for k in range(K)]
    path = write_csv(
        tmp_path / "p.csv", ["note", *order, "VolumeName"], [["x", *values, "valid_3_a_1.nii.gz"]]
    )
    source = read_findings(path)
    case = source.cases["valid_3_a_1"]
    assert case.patient_id == "valid_3"
    np.testing.assert_allclose(case.scores_K, values[::-1])
    assert case.parts == {"labels"}


def test_tables_of_reports_and_labels_are_joined_by_id(tmp_path: Path) -> None:
    labels = write_csv(
        tmp_path / "l.csv", ["AccessionNo", *DISEASE_NAMES], [["a", *[0] * K], ["b", *[1] * K]]
    )
    reports = tmp_path / "r.csv"
    reports.write_text('VolumeName,Findings_EN,Impressions_EN\na.nii.gz,"One, ""two""\nthree.",Fine.\n')
    source = read_findings([labels, reports], truth=True)
    assert source.cases["a"].report == 'Findings: One, "two"\nthree.\nImpression: Fine.'
    assert source.cases["b"].parts == {"labels"}
    with pytest.raises(InputError, match=r"repeats.*a, b"):
        read_findings([labels, labels], truth=True)


def test_an_empty_report_is_unknown_in_truth_and_empty_in_predictions(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("VolumeName,report\na.nii.gz,Normal.\nb.nii.gz,\n")
    assert read_findings(path, truth=True).cases["b"].report is None
    assert read_findings(path).cases["b"].report == ""


@pytest.mark.parametrize(
    "content",
    ["[]", '{"scan": {"source": null}}', '{"scan": [1]}', '{"schema_version": ' + "9" * 5000 + "}"],
)
def test_a_prediction_of_another_form_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "prediction.json").write_text(content)
    with pytest.raises(UnreadableFileError) as caught:
        read_findings(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_label_is_unknown_in_truth_and_refused_in_predictions(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "l.csv", ["AccessionNo", *DISEASE_NAMES], [["case_4", "", *[1] * (K - 1)]])
    assert np.isnan(read_findings(path, truth=True).cases["case_4"].scores_K[0])
    with pytest.raises(InputError, match=r"case_4.*Medical material"):
        read_findings(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.2", "yes"])
def test_a_value_that_is_no_probability_is_refused_with_its_case(tmp_path: Path, value: str) -> None:
    path = write_csv(tmp_path / "p.csv", ["case_id", *DISEASE_NAMES], [["case_4", *[0.5] * (K - 1), value]])
    with pytest.raises(InputError, match=r"case_4.*Interlobular septal thickening"):
        read_findings(path)
    path = write_csv(tmp_path / "t.csv", ["case_id", *DISEASE_NAMES], [["case_4", *[0] * (K - 1), "0.5"]])
    with pytest.raises(InputError, match="labels are 0, 1 or empty"):
        read_findings(path, truth=True)


def test_tables_without_ids_with_missing_columns_or_double_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column of case ids"):
        read_findings(write_csv(tmp_path / "p.csv", ["scan", *DISEASE_NAMES], [["a", *[0] * K]]))
    header = ["case_id", *[name for name in DISEASE_NAMES if name != "Emphysema"]]
    with pytest.raises(InputError, match="lacks the columns Emphysema"):
        read_findings(write_csv(tmp_path / "p.csv", header, [["a", *[0] * (K - 1)]]))
    rows = [["case_9", *[0] * K], ["case_9.nii.gz", *[0] * K]]
    with pytest.raises(InputError, match=r"more than once: case_9"):
        read_findings(write_csv(tmp_path / "p.csv", ["case_id", *DISEASE_NAMES], rows))
    whole = write_csv(tmp_path / "p.csv", ["case_id", *DISEASE_NAMES], rows[:1]).read_text()
    (tmp_path / "p.csv").write_text(whole[:-9])
    with pytest.raises(UnreadableFileError, match="row 2"):
        read_findings(tmp_path / "p.csv")
    with pytest.raises(UnreadableFileError, match="does not exist"):
        read_findings(tmp_path / "none.csv")
    with pytest.raises(InputError, match="neither"):
        read_findings(write_csv(tmp_path / "p.csv", ["case_id", "age"], [["a", 3]]))


def test_the_challenges_files_are_told_apart_by_content(tmp_path: Path) -> None:
    write_classification(tmp_path / "c.json", {"a": np.full(K, 0.25)}, wrapped=True)
    write_reports(tmp_path / "r.json", {"a": "Clear."}, year=2026)
    write_boxes(tmp_path / "b.json", {"a.mha": {"lung_nodule": [LesionBox((0, 0, 0, 1, 1, 1), 0.5)]}})
    source = read_findings([tmp_path / "c.json", tmp_path / "r.json", tmp_path / "b.json"])
    case = source.cases["a"]
    assert case.parts == {"labels", "reports", "boxes"}
    assert case.report == "Clear."
    assert len(case.boxes["lung_nodule"]) == 1
    with pytest.raises(InputError, match=r"truth.*a"):
        read_findings(tmp_path / "c.json", truth=True)
    (tmp_path / "x.json").write_text('{"weights": 3}')
    with pytest.raises(UnreadableFileError, match="no result file"):
        read_findings(tmp_path / "x.json")


def layout(folder: Path, kind: str) -> None:
    first, second = a_mask(1), a_mask(2)
    if kind == "folders":
        (folder / "case_1" / "masks").mkdir(parents=True)
        (folder / "case_2").mkdir()
        write_nifti_mask(first, AFFINE, folder / "case_1" / "masks" / "lung_nodule.nii.gz")
        write_nifti_mask(second, AFFINE, folder / "case_1" / "masks" / "Ground glass opacity.nii.gz")
        write_nifti_mask(second, AFFINE, folder / "case_2" / "lung_nodule.nii.gz")
    elif kind == "names":
        write_nifti_mask(first, AFFINE, folder / "case_1_lung_nodule.nii.gz")
        write_nifti_mask(second, AFFINE, folder / "case_1_ground-glass_opacity.nii.gz")
        write_nifti_mask(second, AFFINE, folder / "case_2_lung_nodule.nii.gz")
    else:
        numbered = np.where(second, 4, 0)
        write_nifti_mask(np.where(first, 5, numbered), AFFINE, folder / "case_1.nii.gz")
        write_nifti_mask(np.where(second, 5, 0), AFFINE, folder / "case_2.nii.gz")


@pytest.mark.parametrize("kind", ["folders", "names", "numbers"])
def test_masks_are_found_by_folder_by_name_and_by_number(tmp_path: Path, kind: str) -> None:
    layout(tmp_path, kind)
    source = read_findings(tmp_path)
    assert sorted(source.cases) == ["case_1", "case_2"]
    masks = source.cases["case_1"].load_masks()
    np.testing.assert_array_equal(masks.masks["lung_nodule"], a_mask(1) > 0)
    glass = (a_mask(2) > 0) & ((a_mask(1) == 0) | (kind != "numbers"))
    np.testing.assert_array_equal(masks.masks["ground_glass_opacity"], glass)
    np.testing.assert_allclose(masks.spacing_mm, (3, 2, 2))
    second = source.cases["case_2"].load_masks()
    assert not second.mask("ground_glass_opacity", (4, 6, 8)).any()
    known = read_findings(tmp_path, truth=True).cases["case_2"].load_masks().keys
    assert ("ground_glass_opacity" in known) == (kind == "numbers")  # elsewhere it was not annotated


def test_masks_on_other_axes_are_turned_to_the_same_place(tmp_path: Path) -> None:
    mask = a_mask(3)
    flipped = AFFINE.copy()
    flipped[:3, 3] = (AFFINE @ [3, 0, 0, 1])[:3]
    flipped[:3, 0] *= -1
    write_nifti_mask(mask[::-1], flipped, tmp_path / "case_1_lung_nodule.nii.gz")
    found = read_findings(tmp_path).cases["case_1"].load_masks()
    np.testing.assert_array_equal(found.masks["lung_nodule"], mask > 0)
    np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)


def test_mask_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_nifti_mask(a_mask(), AFFINE, tmp_path / "case_1_lung_nodule.nii.gz")
    write_nifti_mask(a_mask(shape=(4, 6, 9)), AFFINE, tmp_path / "case_1_consolidation.nii.gz")
    with pytest.raises(MaskError, match="different grids"):
        read_findings(tmp_path).cases["case_1"].load_masks()
    write_nifti_mask(a_mask(), AFFINE, tmp_path / "case_1_liver.nii.gz")
    with pytest.raises(InputError, match="case_1_liver"):
        read_findings(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no predictions"):
        read_findings(tmp_path / "empty")


def test_numbers_mean_what_the_file_beside_the_masks_says(tmp_path: Path) -> None:
    write_nifti_mask(np.where(a_mask(), 7, 0), AFFINE, tmp_path / "case_1.nii.gz")
    with pytest.raises(MaskError, match=r"\[7\]"):
        read_findings(tmp_path).cases["case_1"].load_masks()
    (tmp_path / "labels.json").write_text('{"Lung nodule": 7}')
    masks = read_findings(tmp_path).cases["case_1"].load_masks().masks
    assert list(masks) == ["lung_nodule"]
    np.testing.assert_array_equal(masks["lung_nodule"], a_mask() > 0)
    (tmp_path / "labels.json").write_text('{"liver": 7}')
    with pytest.raises(InputError, match="own number"):
        read_findings(tmp_path)


def own_prediction(
    folder: Path, source: str = "ct.nii.gz", mask: str | None = "masks/lung_nodule.nii.gz"
) -> None:
    prediction = make_prediction(training="synthetic", source=source)
    content = json.loads(prediction.model_dump_json())
    for lesion in content["lesions"]:
        lesion["mask_file"] = mask if lesion["key"] == "lung_nodule" else None
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    write_nifti_mask(a_mask(4), AFFINE, folder / "masks" / "lung_nodule.nii.gz")
    (folder / "prediction.json").write_text(json.dumps(content))


def test_our_own_predictions_are_read_with_masks_report_and_how_the_weights_were_trained(
    tmp_path: Path,
) -> None:
    own_prediction(tmp_path / "out" / "case_1")
    own_prediction(tmp_path / "out" / "case_2", mask=None)
    source = read_findings(tmp_path / "out")
    assert source.training == "synthetic"
    assert source.lesion_keys == {"lung_nodule"}
    assert source.cases["case_1"].scores_K[3] == pytest.approx(3 / 20)
    assert source.cases["case_1"].report == "T"
    np.testing.assert_array_equal(source.cases["case_1"].load_masks().masks["lung_nodule"], a_mask(4) > 0)
    assert source.cases["case_2"].load_masks is None
    own_prediction(tmp_path / "one", source="valid_9_a_1.nii.gz")
    assert list(read_findings(tmp_path / "one").cases) == ["valid_9_a_1"]


def test_a_prediction_that_names_a_mask_outside_or_lacks_one_is_refused(tmp_path: Path) -> None:
    own_prediction(tmp_path / "out", mask="../secret.nii.gz")
    with pytest.raises(InputError, match="outside"):
        read_findings(tmp_path / "out")
    own_prediction(tmp_path / "out", mask="masks/gone.nii.gz")
    with pytest.raises(UnreadableFileError, match=r"gone\.nii\.gz"):
        read_findings(tmp_path / "out")
    (tmp_path / "out" / "prediction.json").write_text('{"diseases": []}')
    with pytest.raises(UnreadableFileError, match="is missing in it"):
        read_findings(tmp_path / "out")


def test_phantoms_are_their_own_truth(tmp_path: Path) -> None:
    phantom = coarse_phantom()
    write_phantom(phantom, tmp_path / "cohort" / "phantom_000001")
    source = read_findings(tmp_path / "cohort", truth=True)
    case = source.cases["phantom_000001"]
    np.testing.assert_array_equal(case.scores_K, phantom.disease_labels)
    assert case.report == phantom.report.text
    masks = case.load_masks()
    assert masks.keys == set(LESION_KEYS)
    shape = masks.shape_DHW
    assert all(masks.mask(key, shape).sum() == phantom.lesion_masks[key].sum() for key in LESION_KEYS)
    assert case.load_scan().shape_DHW == phantom.volume.shape_DHW


@pytest.mark.real_data
def test_ct_rates_own_tables_are_read_as_they_are(real_data: Path) -> None:
    folder = real_data / "ct_rate_layout"
    tables = [folder / "valid_predicted_labels.csv", folder / "validation_reports.csv"]
    source = read_findings(tables, truth=True)
    assert len(source.cases) == 1921
    assert all(case.parts == {"labels", "reports"} for case in source.cases.values())
    assert len({case.patient_id for case in source.cases.values()}) < 992  # some patients have two studies
