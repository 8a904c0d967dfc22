"""The challenge's files: what is written is what the organizers' scripts read, and bad files are refused with ids named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vlm3d.errors import InputError, OutputError, UnreadableFileError, VLM3DError
from vlm3d.evaluation.case_ids import case_id_of, patient_id_of
from vlm3d.evaluation.official import (
    clean_predicted_report,
    clean_true_report,
    read_classification,
    read_reports,
    write_classification,
    write_reports,
)
from vlm3d.evaluation.official_boxes import LesionBox, boxes_of_mask, read_boxes, write_boxes
from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

K = len(DISEASE_NAMES)
EVEN = np.linspace(0, 1, K)


def table(*ids: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {case: rng.random(K) for case in ids}


@pytest.mark.parametrize("wrapped", [False, True])
def test_probabilities_survive_the_file_to_the_last_digit(tmp_path: Path, wrapped: bool) -> None:
    cases = table("valid_1_a_1", "valid_2_a_1")
    write_classification(tmp_path / "results.json", cases, wrapped=wrapped)
    found = read_classification(tmp_path / "results.json", expected_ids=["valid_1_a_1.nii.gz", "valid_2_a_1"])
    assert list(found) == list(cases)
    for case in cases:
        np.testing.assert_array_equal(found[case], cases[case])


def test_the_classification_file_is_laid_out_as_the_challenge_states(tmp_path: Path) -> None:
    write_classification(
        tmp_path / "r.json", {"a.nii.gz": dict(zip(DISEASE_NAMES, EVEN, strict=True))}, wrapped=True
    )
    value = json.loads((tmp_path / "r.json").read_text())[0]["outputs"][0]["value"]
    assert (value["name"], value["type"]) == ("Generated probabilities", "Abnormality Classification")
    assert value["version"] == {"major": 1, "minor": 0}
    (case,) = value["predictions"]
    assert case["input_image_name"] == "a"
    assert list(case["probabilities"]) == list(DISEASE_NAMES)
    assert case["probabilities"]["Lung nodule"] == EVEN[DISEASE_NAMES.index("Lung nodule")]


def test_probabilities_are_read_by_name_and_a_missing_one_counts_zero(tmp_path: Path) -> None:
    content = {
        "predictions": [{"input_image_name": "a", "probabilities": {"Emphysema": 0.7, "Cardiomegaly": 0.2}}]
    }
    (tmp_path / "r.json").write_text(json.dumps(content))
    found = read_classification(tmp_path / "r.json")["a"]
    assert found[DISEASE_NAMES.index("Emphysema")] == 0.7
    assert found[DISEASE_NAMES.index("Cardiomegaly")] == 0.2
    assert found.sum() == pytest.approx(0.9)


def nan_case() -> dict[str, np.ndarray]:
    return {"case_17": np.where(np.arange(K) == 3, np.nan, 0.5)}


@pytest.mark.parametrize(
    ("cases", "expected", "words"),
    [
        (nan_case(), None, ("case_17", "Pericardial effusion")),
        ({"case_17": np.full(K, 1.5)}, None, ("case_17", "1.5")),
        ({"case_17": np.full(K - 1, 0.5)}, None, ("case_17", "17 values")),
        ({"case_17": {"Emphysema": 0.5}}, None, ("case_17", "lacks")),
        (table("b", "a") | {"b.nii.gz": EVEN}, None, ("more than once", "b")),
        (table("a"), ["a", "lost_1"], ("lacks 1 case", "lost_1")),
        (table("a", "odd_1"), ["a"], ("odd_1",)),
    ],
)
def test_bad_probabilities_are_not_written(tmp_path: Path, cases, expected, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as raised:
        write_classification(tmp_path / "r.json", cases, expected_ids=expected)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.01, 0.99))
def test_a_truncated_file_is_refused_wherever_it_ends(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_classification(folder / "r.json", table("a", "b"))
    whole = (folder / "r.json").read_bytes()
    (folder / "r.json").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnreadableFileError, match="truncated"):
        read_classification(folder / "r.json")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", UnreadableFileError),
        ('[{"outputs": []}]', UnreadableFileError),
        ('{"predictions": 3}', UnreadableFileError),
        ('{"generated_reports": []}', UnreadableFileError),
        ('{"predictions": [{"probabilities": {}}]}', UnreadableFileError),
        ('{"predictions": [{"input_image_name": "a", "probabilities": [1]}]}', UnreadableFileError),
        ('{"predictions": [{"input_image_name": "a", "probabilities": {"Gout": 1}}]}', InputError),
        ('{"predictions": [{"input_image_name": "a", "probabilities": {"Emphysema": NaN}}]}', InputError),
        ('{"predictions": [{"input_image_name": "a", "probabilities": {"Emphysema": true}}]}', InputError),
        ('{"predictions": [{"input_image_name": "a", "probabilities": {"Emphysema": "high"}}]}', InputError),
        ('{"predictions": [{"input_image_name": "a", "input_image_name": "b"}]}', UnreadableFileError),
        ("[" * 100_000, UnreadableFileError),
    ],
)
def test_files_that_are_no_classification_are_refused_in_one_line(
    tmp_path: Path, text: str, error: type
) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(error) as raised:
        read_classification(tmp_path / "r.json")
    assert "\n" not in str(raised.value)
    assert "r.json" in str(raised.value)


@pytest.mark.parametrize("year", [2025, 2026])
def test_reports_survive_the_file_of_either_year(tmp_path: Path, year) -> None:
    reports = {"a.nii.gz": 'Findings: "clear".\nImpression: none ünïcode', "b.nii.gz": ""}
    write_reports(tmp_path / "p.json", reports, year=year, expected_ids=["a", "b"])
    content = json.loads((tmp_path / "p.json").read_text())
    value = content[0]["outputs"][0]["value"] if year == 2026 else content
    assert value["version"] == ("1.0" if year == 2026 else {"major": 1, "minor": 0})
    assert value["generated_reports"][0] == {"input_image_name": "a.nii.gz", "report": reports["a.nii.gz"]}
    found = read_reports(tmp_path / "p.json", expected_ids=["a", "b"])
    assert found == {"a": reports["a.nii.gz"], "b": ""}


def test_reports_of_wrong_cases_or_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lost_9"):
        write_reports(tmp_path / "p.json", {"a": ""}, expected_ids=["a", "lost_9"])
    with pytest.raises(InputError, match="case_3"):
        write_reports(tmp_path / "p.json", {"case_3": None})  # type: ignore[dict-item]
    (tmp_path / "p.json").write_text('{"generated_reports": [{"input_image_name": "a", "report": null}]}')
    with pytest.raises(UnreadableFileError, match="case 1"):
        read_reports(tmp_path / "p.json")
    with pytest.raises(OutputError):
        write_reports(tmp_path / "no" / "p.json", {"a": ""})


def test_reports_are_cleaned_as_the_challenge_does() -> None:
    assert clean_true_report('A . B\nC .D "x" _y_') == 'A.BC.D "x" _y_'
    assert clean_predicted_report('A . B\nC .<|eot_id|> "x" _y_') == "A.BC.x y"
    assert clean_predicted_report("_ .") == "."  # the underscore goes before the dots are looked at


def in_order(boxes: list[list[float]]) -> list[list[float]]:
    """Sorted; rounding puts what differs in its last digits alone in no other order."""
    return sorted(boxes, key=lambda box: [round(value, 6) + 0.0 for value in box])


def itk_boxes(mask_DHW: np.ndarray, affine: np.ndarray) -> list[list[float]]:
    """The same boxes from ITK's own geometry: continuous indices of voxel faces, transformed point by point."""
    spacing = np.linalg.norm(affine[:3, [2, 1, 0]], axis=0)
    lps = np.diag([-1.0, -1.0, 1.0])
    image = sitk.GetImageFromArray(mask_DHW.astype(np.uint8))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((lps @ affine[:3, 3]).tolist())
    image.SetDirection((lps @ affine[:3, [2, 1, 0]] / spacing).ravel().tolist())

    def bounds(start_xyz, stop_xyz) -> tuple[np.ndarray, np.ndarray]:
        points = [
            image.TransformContinuousIndexToPhysicalPoint([float(v) - 0.5 for v in (x, y, z)])
            for x in (start_xyz[0], stop_xyz[0])
            for y in (start_xyz[1], stop_xyz[1])
            for z in (start_xyz[2], stop_xyz[2])
        ]
        return np.min(points, axis=0), np.max(points, axis=0)

    origin, _ = bounds((0, 0, 0), image.GetSize())
    found = []
    pieces, number = ndimage.label(mask_DHW)
    for piece in range(1, number + 1):
        index = np.argwhere(pieces == piece)[:, ::-1]
        low, high = bounds(index.min(axis=0), index.max(axis=0) + 1)
        found.append([*(low - origin), *(high - low)])
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 6)] * 3),
)
def test_boxes_of_masks_equal_itks_geometry_in_any_direction(seed: int, angles, spacing) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((5, 6, 7)) > 0.85
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = rng.normal(size=3) * 200
    found = in_order([list(box.bbox_mm) for box in boxes_of_mask(mask, affine)])
    np.testing.assert_allclose(found, in_order(itk_boxes(mask, affine)) or np.empty((0,)), atol=1e-6)


def test_pieces_that_touch_at_an_edge_are_two_boxes_and_probabilities_are_their_means() -> None:
    mask = np.zeros((2, 4, 4), dtype=bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 1, 2] = True
    probability = np.zeros(mask.shape)
    probability[0, 0, 0], probability[0, 1, 1], probability[0, 1, 2] = 0.9, 0.5, 0.7
    canonical = np.array([[0.0, 0, -2, 10], [0, -2, 0, 20], [3, 0, 0, 30], [0, 0, 0, 1]])
    first, second = boxes_of_mask(mask, canonical, probability_DHW=probability)
    assert first == LesionBox((0, 0, 0, 2, 2, 3), 0.9)
    assert second.bbox_mm == (2, 2, 0, 4, 2, 3)
    assert second.probability == pytest.approx(0.6)
    assert boxes_of_mask(np.zeros((2, 2, 2)), canonical) == []


def test_box_files_hold_five_lesions_and_come_back(tmp_path: Path) -> None:
    box = LesionBox((1.0, 2.0, 3.0, 4.5, 5.0, 6.25), 0.75)
    write_boxes(
        tmp_path / "b.json", {"x.mha": {"ground_glass_opacity": [box]}, "y.mha": {}}, expected_ids=["x", "y"]
    )
    content = json.loads((tmp_path / "b.json").read_text())
    (output,) = content[0]["outputs"]
    assert output["type"] == "predictions"
    first = output["value"]["predictions"][0]
    assert first["input_image_name"] == "x.mha"
    assert first["Ground glass opacity"] == [
        {"bbox_mm": [1.0, 2.0, 3.0, 4.5, 5.0, 6.25], "probability": 0.75}
    ]
    assert len(first) == 6
    found = read_boxes(tmp_path / "b.json", expected_ids=["x.mha", "y.mha"])
    assert found["x"]["ground_glass_opacity"] == [box]
    assert found["y"] == {key: [] for key in LESION_KEYS}


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"bbox_mm": [0, 0, 0, 1, 1]}, InputError),
        ({"bbox_mm": [0, 0, 0, 1, 1, 0]}, InputError),
        ({"bbox_mm": [0, 0, 0, 1, 1, float("nan")]}, InputError),
        ({"bbox_mm": [0, 0, "0", 1, 1, 1]}, InputError),
        ({"bbox_mm": [0, 0, 0, 1, 1, 1], "probability": 2}, InputError),
        ({"bbox_mm": [0, 0, 0, 1, 1, 1], "probability": None}, InputError),
        ({"box": []}, UnreadableFileError),
    ],
)
def test_bad_boxes_are_refused_with_their_case(tmp_path: Path, entry: dict, error: type[VLM3DError]) -> None:
    write_boxes(tmp_path / "b.json", {"case_8.mha": {}})
    content = json.loads((tmp_path / "b.json").read_text())
    content[0]["outputs"][0]["value"]["predictions"][0]["Lung nodule"] = [entry]
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(error, match="case_8"):
        read_boxes(tmp_path / "b.json")


def test_lesions_that_are_missing_or_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tumor"):
        write_boxes(tmp_path / "b.json", {"a": {"tumor": []}})
    (tmp_path / "b.json").write_text('{"predictions": [{"input_image_name": "case_8", "Lung nodule": []}]}')
    with pytest.raises(InputError, match=r"case_8 lacks.*Pleural effusion"):
        read_boxes(tmp_path / "b.json")


def test_ids_are_names_without_folder_and_ending() -> None:
    assert case_id_of("a/b\\valid_1_a_2.nii.gz") == "valid_1_a_2"
    assert case_id_of("1.2.840.6_B_Toraks.nii.gz") == "1.2.840.6_B_Toraks"
    assert case_id_of("1.2.840.113704") == "1.2.840.113704"
    assert patient_id_of("valid_12_a_2") == patient_id_of("valid_12_b_1") == "valid_12"
    assert patient_id_of("phantom_000012") == "phantom_000012"
