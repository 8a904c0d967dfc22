"""Which slices belong together, and which of several series is the chest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from support.scan_files import affine_of, small_chest, with_values, write_dicom
from vlm3d.errors import NotAChestCTError, SeriesError
from vlm3d.io import list_series, read_volume

CHEST = small_chest((16, 40, 44))
TALL = small_chest((20, 40, 44), seed=2)
AFFINE = affine_of()
OTHER = "1.2.826.0.1.3680043.8.498.2"
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def raised(slices: float) -> np.ndarray:
    """The same grid some slices higher."""
    affine = AFFINE.copy()
    affine[2, 3] += 8 * slices
    return affine


@pytest.mark.parametrize("shift", [0.0, 0.5], ids=["same places", "interleaved"])
def test_two_breathing_states_in_one_series_are_two_series(tmp_path: Path, shift: float) -> None:
    """Instance numbers alternate, as they do where a scanner sends both at once."""
    for number, voxels, affine in ((1, CHEST, AFFINE), (2, TALL[:15], raised(shift))):

        def numbered(dataset: Dataset, index: int, number: int = number) -> Dataset:
            dataset.AcquisitionNumber, dataset.InstanceNumber = number, 2 * index + number
            return dataset

        write_dicom(tmp_path, voxels, affine, prefix=f"{number}", change=numbered)
    first, second = list_series(tmp_path)
    assert (first.slices, second.slices) == (16, 15)
    assert "acquisition 1" in str(first)
    assert "acquisition 2" in str(second)
    scan = read_volume(tmp_path)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert any("2 series" in note for note in scan.notes)
    np.testing.assert_array_equal(read_volume(tmp_path, series="2").voxels_DHW, TALL[:15])
    with pytest.raises(SeriesError, match="by its number"):
        read_volume(tmp_path, series=first.uid)


@pytest.mark.parametrize("shared", [0, 1, 3], ids=["end to end", "one place in common", "three"])
def test_acquisitions_that_continue_each_other_are_joined_with_a_note(tmp_path: Path, shared: int) -> None:
    write_dicom(tmp_path, CHEST[:9], AFFINE, prefix="A", change=with_values(AcquisitionNumber=1))
    write_dicom(
        tmp_path, CHEST[9 - shared :], raised(9 - shared), prefix="B", change=with_values(AcquisitionNumber=2)
    )
    scan = read_volume(tmp_path)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert any("2 acquisitions" in note for note in scan.notes)
    assert len(list_series(tmp_path)) == 1


def test_acquisitions_that_share_places_out_of_step_are_apart(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST[:9], AFFINE, prefix="A", change=with_values(AcquisitionNumber=1))
    write_dicom(tmp_path, CHEST[6:], raised(6.4), prefix="B", change=with_values(AcquisitionNumber=2))
    assert sorted(info.slices for info in list_series(tmp_path)) == [9, 10]


def test_an_acquisition_number_for_each_slice_splits_nothing(tmp_path: Path) -> None:
    def numbered(dataset: Dataset, index: int) -> Dataset:
        dataset.AcquisitionNumber = index + 1
        return dataset

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=numbered))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)


@pytest.mark.parametrize(
    ("key", "chest", "other"),
    [
        ("BodyPartExamined", "CHEST", "HEAD"),
        ("BodyPartExamined", "CHESTABDPELVIS", "ABDOMEN"),
        ("SeriesDescription", "CAP 5.0 B30f", "Brain 5.0"),
        ("SeriesDescription", "Thorax 1.0", "T-Spine 1.0"),
        ("SeriesDescription", "Lung nodule", "somebody's"),
        ("ProtocolName", "TAP", "pelvis"),
    ],
)
def test_words_for_the_chest_beat_a_longer_series(tmp_path: Path, key: str, chest: str, other: str) -> None:
    write_dicom(tmp_path, TALL, AFFINE, series=OTHER, prefix="A", change=with_values(**{key: other}))
    write_dicom(tmp_path, CHEST, AFFINE, prefix="B", change=with_values(**{key: chest}))
    scan = read_volume(tmp_path)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    told = " ".join(scan.notes) + " ".join(str(info) for info in list_series(tmp_path))
    if key == "BodyPartExamined":
        assert f"axial, {chest.lower()}" in told
    else:
        assert chest not in told, "free text is not shown"
        assert other not in told


def test_lung_may_be_the_name_of_a_kernel(tmp_path: Path) -> None:
    sharp = with_values(SeriesDescription="LUNG 1.0", ConvolutionKernel="B70f")
    write_dicom(tmp_path, small_chest((16, 40, 44), seed=1), AFFINE, series=OTHER, prefix="A", change=sharp)
    write_dicom(tmp_path, CHEST, AFFINE, prefix="B", change=with_values(SeriesDescription="SOFT 1.0"))
    np.testing.assert_array_equal(read_volume(tmp_path).voxels_DHW, CHEST)


def test_a_single_series_of_another_part_of_the_body_is_noted(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, change=with_values(BodyPartExamined="HEAD"))
    assert any("another part of the body" in note for note in read_volume(tmp_path).notes)


@pytest.mark.parametrize("stated", ["DOE JOHN", "CHEST\\HEAD", "chest of Mr Doe 17"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_body_part_that_is_no_code_is_not_shown(
    tmp_path: Path, stated: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, change=with_values(BodyPartExamined=stated))
    caplog.clear()
    assert [info.body_part for info in list_series(tmp_path)] == [""]
    read_volume(tmp_path)
    assert not caplog.records, "a library's log lines quote values"


def test_a_name_corrected_in_the_midst_of_a_series_splits_nothing(tmp_path: Path) -> None:
    def corrected(dataset: Dataset, index: int) -> Dataset:
        dataset.PatientName = "Smith^Jon" if index < 8 else "Smith^John"
        return dataset

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=corrected))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.notes == ()


def test_names_keep_patients_without_a_number_apart(tmp_path: Path) -> None:
    for name, voxels, affine in (("A", CHEST, AFFINE), ("B", CHEST[:10], raised(16))):
        write_dicom(tmp_path, voxels, affine, prefix=name, change=with_values(PatientID="", PatientName=name))
    assert [info.slices for info in list_series(tmp_path)] == [16, 10]


def test_one_uid_of_two_patients_is_chosen_by_number_alone(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A", patient="first")
    write_dicom(tmp_path, TALL, AFFINE, prefix="B", patient="second")
    uid = list_series(tmp_path)[0].uid
    with pytest.raises(SeriesError, match="2 series of that UID") as refused:
        read_volume(tmp_path, series=uid)
    assert uid not in str(refused.value)
    np.testing.assert_array_equal(read_volume(tmp_path, series="2").voxels_DHW, CHEST)


def test_a_uid_shared_with_a_scout_means_the_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A")
    write_dicom(tmp_path, TALL[:1], AFFINE, prefix="B", change=with_values(ImageType=LOCALIZER))
    uid = list_series(tmp_path)[0].uid
    np.testing.assert_array_equal(read_volume(tmp_path, series=uid).voxels_DHW, CHEST)


def test_what_is_no_ct_volume_cannot_be_chosen(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A")
    write_dicom(tmp_path, CHEST, AFFINE, series=f"{OTHER}.1", prefix="B", change=with_values(Modality="PT"))
    scout = with_values(ImageType=LOCALIZER)
    write_dicom(tmp_path, CHEST, AFFINE, series=f"{OTHER}.2", prefix="C", change=scout)
    number = {info.uid: str(info.number) for info in list_series(tmp_path)}
    for choice in (number[f"{OTHER}.1"], f"{OTHER}.1"):
        with pytest.raises(NotAChestCTError, match="modality PT"):
            read_volume(tmp_path, series=choice)
    with pytest.raises(SeriesError, match="scout"):
        read_volume(tmp_path, series=number[f"{OTHER}.2"])
