"""DICOM as it comes: any order, several series, gaps, duplicates, tilt, compression, padding."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from support.scan_files import affine_of, canonical, set_pixels, small_chest, with_values, write_dicom
from vlm3d.errors import NotAChestCTError, SeriesError, UnreadableFileError
from vlm3d.io import list_series, read_volume

CHEST = small_chest((16, 40, 44))
AFFINE = affine_of()
OTHER = "1.2.826.0.1.3680043.8.498.2"


def without(*indices: int) -> Callable[[Dataset, int], Dataset | None]:
    """Leave slices out."""
    return lambda dataset, index: None if index in indices else dataset


def test_slices_are_sorted_by_position_not_by_name_or_number(tmp_path: Path) -> None:
    def shuffled(dataset: Dataset, index: int) -> Dataset:
        dataset.InstanceNumber = (index * 7) % 16
        return dataset

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=shuffled))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.notes == ()
    assert scan.acquisition["kernel"] == "B30f"


def test_nested_folders_with_other_files_in_them(tmp_path: Path) -> None:
    write_dicom(tmp_path / "study" / "a", CHEST[:8], AFFINE)
    upper = AFFINE.copy()
    upper[2, 3] += 8 * 8
    write_dicom(tmp_path / "study" / "b", CHEST[8:], upper)
    (tmp_path / "study" / "readme.txt").write_text("not an image")
    (tmp_path / "study" / ".hidden").write_bytes(bytes(128) + b"DICM")
    np.testing.assert_array_equal(read_volume(tmp_path / "study").voxels_DHW, CHEST)


def test_one_file_stands_for_its_series(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    write_dicom(folder, CHEST[:, ::-1], AFFINE, series=OTHER, prefix="X")
    scan = read_volume(sorted(folder.glob("IM*"))[3])
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)


def test_a_zip_is_read_like_its_folder(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    with zipfile.ZipFile(tmp_path / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.iterdir():
            archive.write(path, f"study/series/{path.name}")
    scan = read_volume(tmp_path / "scan.zip")
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.source == "scan.zip"
    assert [item.slices for item in list_series(tmp_path / "scan.zip")] == [16]


def test_files_without_preamble(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        meta = dataset.file_meta
        del dataset.file_meta, dataset.preamble
        assert meta.TransferSyntaxUID.is_little_endian
        dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False, overwrite=True)
        assert path.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read_volume(folder).voxels_DHW, CHEST)


def test_the_likeliest_chest_ct_is_picked_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    write_dicom(folder, CHEST, AFFINE, series=f"{OTHER}.1", prefix="A")
    write_dicom(
        folder, CHEST[:1], AFFINE, series=f"{OTHER}.2", prefix="B",
        change=with_values(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    )  # fmt: skip
    more = small_chest((40, 40, 44))
    write_dicom(
        folder, more, affine_of((3, 7, 6.5)), series=f"{OTHER}.3", prefix="C",
        change=with_values(ImageType=["DERIVED", "SECONDARY", "MPR"]),
    )  # fmt: skip
    write_dicom(folder, CHEST, AFFINE, series=f"{OTHER}.4", prefix="D", change=with_values(Modality="PT"))
    scan = read_volume(folder)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    note = next(note for note in scan.notes if "4 series" in note)
    assert "localizer" in note
    assert "derived" in note
    assert f"{OTHER}.1" not in note, "UIDs are shown only shortened"
    infos = list_series(folder)
    assert [info.number for info in infos] == [1, 2, 3, 4]
    assert [info.plane for info in infos].count("localizer") == 1


def test_the_softer_kernel_breaks_a_tie(tmp_path: Path) -> None:
    lung = small_chest((16, 40, 44), seed=1)
    write_dicom(
        tmp_path, lung, AFFINE, series=f"{OTHER}.9", prefix="A", change=with_values(ConvolutionKernel="B70f")
    )
    write_dicom(tmp_path, CHEST, AFFINE, series=f"{OTHER}.1", prefix="B")
    np.testing.assert_array_equal(read_volume(tmp_path).voxels_DHW, CHEST)


@pytest.mark.parametrize("by", ["number", "uid"])
def test_the_user_can_choose_a_series(tmp_path: Path, by: str) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A")
    write_dicom(tmp_path, CHEST[:12], AFFINE, series=OTHER, prefix="B")
    second = list_series(tmp_path)[1]
    assert second.slices == 12
    scan = read_volume(tmp_path, series=str(second.number) if by == "number" else second.uid)
    assert len(scan.voxels_DHW) == 12
    with pytest.raises(SeriesError, match="no series '7'"):
        read_volume(tmp_path, series="7")


def test_two_patients_with_one_series_uid_are_never_merged(tmp_path: Path) -> None:
    upper = AFFINE.copy()
    upper[2, 3] += 16 * 8
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A", patient="first^person")
    write_dicom(tmp_path, CHEST[:10], upper, prefix="B", patient="second^person")
    scan = read_volume(tmp_path)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    told = " ".join(scan.notes) + str(scan.acquisition) + repr(list_series(tmp_path))
    assert "2 different patients" in told
    assert "person" not in told


def test_duplicate_positions_are_dropped_with_a_note(tmp_path: Path) -> None:
    write_dicom(tmp_path, CHEST, AFFINE, prefix="A")
    write_dicom(tmp_path, CHEST[3:6], AFFINE @ shifted_up(3), prefix="B")
    scan = read_volume(tmp_path)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert any(note.startswith("3 slices") for note in scan.notes)


def shifted_up(slices: int) -> np.ndarray:
    """Start a number of slices higher."""
    shift = np.eye(4)
    shift[0, 3] = slices
    return shift


@pytest.mark.parametrize("missing", [(5,), (5, 6), (3, 9)])
def test_few_missing_slices_are_interpolated_with_a_note(tmp_path: Path, missing: tuple[int, ...]) -> None:
    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=without(*missing)))
    assert scan.shape_DHW == CHEST.shape
    np.testing.assert_array_equal(scan.affine, AFFINE)
    there = [i for i in range(16) if i not in missing]
    np.testing.assert_array_equal(scan.voxels_DHW[there], CHEST[there])
    assert any(f"{len(missing)} missing slices" in note for note in scan.notes)
    if missing == (5,):
        between = (CHEST[4].astype(np.float32) + CHEST[6]) / 2
        assert np.abs(scan.voxels_DHW[5] - between).max() <= 0.5


@pytest.mark.parametrize("missing", [(5, 6, 7), (2, 4, 6, 8, 12)])
def test_many_missing_slices_are_refused(tmp_path: Path, missing: tuple[int, ...]) -> None:
    with pytest.raises(SeriesError, match=r"lacks|uneven"):
        read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=without(*missing)))


def positions(heights: np.ndarray, sideways: np.ndarray | None = None) -> np.ndarray:
    """First-pixel positions in LPS for heights in mm."""
    start = (np.diag([-1, -1, 1, 1]) @ AFFINE)[:3, 3]
    result = np.tile(start, (len(heights), 1))
    result[:, 2] += heights
    if sideways is not None:
        result[:, 1] += sideways
    return result


def test_slightly_uneven_slices_are_resampled_with_a_note(tmp_path: Path) -> None:
    ramp = CHEST.copy()
    heights = np.arange(16) * 8.0
    heights[5:10] += 1.2
    ramp[:, 20, 22] = np.round(heights * 10)
    scan = read_volume(write_dicom(tmp_path / "s", ramp, AFFINE, positions_lps=positions(heights)))
    assert any("unevenly" in note for note in scan.notes)
    np.testing.assert_allclose(scan.voxels_DHW[:, 20, 22], np.arange(16) * 80.0, atol=1)
    np.testing.assert_array_equal(scan.affine, AFFINE)


def test_positions_rounded_by_the_scanner_are_even(tmp_path: Path) -> None:
    heights = np.arange(16) * 8.0 + np.tile([0, 0.05], 8)
    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, positions_lps=positions(heights)))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.notes == ()


def test_badly_uneven_slices_are_refused(tmp_path: Path) -> None:
    heights = np.arange(16) * 8.0
    heights[7] += 3.5
    with pytest.raises(SeriesError, match="unevenly"):
        read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, positions_lps=positions(heights)))


def test_slices_that_jump_sideways_are_refused(tmp_path: Path) -> None:
    sideways = np.where(np.arange(16) < 8, 0.0, 30.0)
    with pytest.raises(SeriesError, match="sideways"):
        read_volume(
            write_dicom(tmp_path / "s", CHEST, AFFINE, positions_lps=positions(np.arange(16) * 8.0, sideways))
        )


def test_gantry_tilt_is_corrected_in_the_patients_space(tmp_path: Path) -> None:
    """Tilted planes through a smooth field: after correction the field is where it was, on right-angled axes."""
    angle = np.radians(15)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), np.sin(angle)])
    spacing, step = 5.0, np.array([0, 0, 5.0])
    shape = (24, 44, 40)
    d, h, w = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    places = d[..., None] * step + spacing * (h[..., None] * column + w[..., None] * row)
    lps = np.eye(4)
    lps[:3, :3] = np.stack([step, spacing * column, spacing * row], axis=1)
    affine = np.diag([-1.0, -1, 1, 1]) @ lps
    folder = write_dicom(tmp_path / "s", field_at(places), affine)
    for path in folder.iterdir():  # the helper takes directions for unit vectors along each column
        assert pydicom.dcmread(path).ImageOrientationPatient[4] == pytest.approx(np.cos(angle))
    scan = read_volume(folder)
    assert any("tilt of 15.0 degrees" in note for note in scan.notes)
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_array_equal(np.abs(axes), np.eye(3)[::-1])
    index = np.argwhere(scan.voxels_DHW > -1024)
    seen = (scan.affine @ np.c_[index, np.ones(len(index))].T).T[:, :3] * [-1, -1, 1]
    inside = np.abs(scan.voxels_DHW[tuple(index.T)] - field_at(seen))
    assert np.percentile(inside, 95) < 25
    volume_before = places[..., 0].size * 5.0**3 * np.cos(angle)
    volume_after = len(index) * np.prod(scan.spacing_mm)
    assert volume_after == pytest.approx(volume_before, rel=0.06)


def field_at(places: np.ndarray) -> np.ndarray:
    """A smooth picture of the patient's space with air and tissue in it."""
    wave = np.cos(places[..., 0] / 30) * np.cos((places[..., 1] - 60) / 35) * np.cos(places[..., 2] / 40)
    return np.rint(wave * 500 - 480).astype(np.int16)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.name)
def test_compressed_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, syntax=syntax))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.voxels_DHW.dtype == np.int16


def test_jpeg_lossless_is_decoded_too(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        image = sitk.GetImageFromArray(dataset.pixel_array[None])
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "jpeg.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.Execute(image)
        encoded = pydicom.dcmread(tmp_path / "jpeg.dcm")
        assert encoded.file_meta.TransferSyntaxUID.name.startswith("JPEG Lossless")
        dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
        dataset.PixelData = encoded.PixelData
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path, overwrite=True)
    scan = read_volume(folder)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.voxels_DHW.dtype == np.int16


def test_an_unknown_transfer_syntax_is_named(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, syntax=RLELossless)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
        dataset.save_as(path, overwrite=True)
    with pytest.raises(UnreadableFileError, match="MPEG2"):
        read_volume(folder)


def test_slope_and_intercept_of_each_slice(tmp_path: Path) -> None:
    def own_rescale(dataset: Dataset, index: int) -> Dataset:
        slope, intercept = 1 + index % 3, -1024 - index
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        stored = (CHEST[index].astype(np.int32) - intercept) // slope
        return set_pixels(dataset, stored.astype(np.uint16))

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=own_rescale))
    assert np.abs(scan.voxels_DHW.astype(int) - CHEST).max() <= 2
    np.testing.assert_array_equal(scan.voxels_DHW[::3], np.maximum(CHEST[::3], -1024))


def test_fractional_slope_gives_float32(tmp_path: Path) -> None:
    def halves(dataset: Dataset, index: int) -> Dataset:
        dataset.RescaleSlope = "0.5"
        return set_pixels(dataset, (2 * (CHEST[index].astype(np.int32) + 1024) + 1).astype(np.uint16))

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=halves))
    assert scan.voxels_DHW.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST + np.float32(0.5))


@pytest.mark.parametrize("vr", ["US", "SS"])
def test_signed_pixels_with_padding_in_either_sign(tmp_path: Path, vr: str) -> None:
    def padded(dataset: Dataset, index: int) -> Dataset:
        stored = CHEST[index].copy()
        stored[:5] = -2000
        dataset.RescaleIntercept = "0"
        dataset.add_new("PixelPaddingValue", vr, -2000 if vr == "SS" else 65536 - 2000)
        return set_pixels(dataset, stored)

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=padded))
    assert (scan.voxels_DHW[:, :5] == -1024).all()
    np.testing.assert_array_equal(scan.voxels_DHW[:, 5:], CHEST[:, 5:])


def test_padding_above_all_tissue_becomes_minus_1024(tmp_path: Path) -> None:
    def padded(dataset: Dataset, index: int) -> Dataset:
        stored = (CHEST[index].astype(np.int32) + 1024).astype(np.uint16)
        stored[:5] = 65535
        dataset.PixelPaddingValue = 65535
        return set_pixels(dataset, stored)

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=padded))
    assert (scan.voxels_DHW[:, :5] == -1024).all()
    np.testing.assert_array_equal(scan.voxels_DHW[:, 5:], CHEST[:, 5:])


def test_a_damaged_file_beside_the_series_is_noted(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    (folder / "broken").write_bytes(bytes(128) + b"DICM" + b"\xff" * 60)
    scan = read_volume(folder)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert any("1 damaged" in note for note in scan.notes)


def test_an_enhanced_multi_frame_ct(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST[:1], AFFINE)
    dataset = pydicom.dcmread(next(folder.iterdir()))
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    dataset.NumberOfFrames = len(CHEST)
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = Sequence([subset(dataset, "PixelSpacing", "SliceThickness")])
    shared.PlaneOrientationSequence = Sequence([subset(dataset, "ImageOrientationPatient")])
    shared.PixelValueTransformationSequence = Sequence([subset(dataset, "RescaleSlope", "RescaleIntercept")])
    order = np.random.default_rng(3).permutation(len(CHEST))
    for index in order:
        place, frame = Dataset(), Dataset()
        place.ImagePositionPatient = [float(v) for v in positions(np.array([index * 8.0]))[0]]
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for key in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope"):
        delattr(dataset, key)
    dataset.RescaleIntercept = None
    dataset.PixelData = (CHEST[order].astype(np.int32) + 1024).astype(np.uint16).tobytes()
    shutil.rmtree(folder)
    dataset.save_as(tmp_path / "enhanced.dcm", enforce_file_format=True)
    scan = read_volume(tmp_path / "enhanced.dcm")
    voxels, affine = canonical(scan.voxels_DHW, scan.affine)
    np.testing.assert_array_equal(voxels, CHEST)
    np.testing.assert_array_equal(affine, AFFINE)


def subset(dataset: Dataset, *keys: str) -> Dataset:
    """Some elements of a data set."""
    part = Dataset()
    for key in keys:
        setattr(part, key, dataset.get(key))
    return part


@pytest.mark.parametrize("spacing", [["-7", "6.5"], ["7", "-6.5"], ["0", "6.5"], ["1e4", "6.5"]])
def test_a_pixel_spacing_that_no_scanner_has_is_refused(tmp_path: Path, spacing: list[str]) -> None:
    """A negative one would mirror the patient."""
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(PixelSpacing=spacing))
    with pytest.raises(SeriesError, match="pixel spacing"):
        read_volume(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", ["1e300", "-9e4", "6000"])
def test_absurd_positions_are_one_short_line(tmp_path: Path, far: str) -> None:
    def moved(dataset: Dataset, index: int) -> Dataset:
        if index > 5:
            dataset.ImagePositionPatient[2] = far
        return dataset

    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, change=moved)
    with pytest.raises(SeriesError) as refused:
        read_volume(folder)
    assert len(str(refused.value)) < 300


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("slope", ["1e30", "1e300"])
def test_an_absurd_slope_is_refused_without_warnings(tmp_path: Path, slope: str) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(RescaleSlope=slope))
    with pytest.raises(NotAChestCTError):
        read_volume(folder)


def test_a_slice_without_an_image_is_noted(tmp_path: Path) -> None:
    def emptied(dataset: Dataset, index: int) -> Dataset:
        return set_pixels(dataset, np.zeros((40, 44), np.uint16)) if index in (6, 7) else dataset

    scan = read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=emptied))
    assert any("2 slices without an image" in note for note in scan.notes)


def test_another_modality_is_no_ct(tmp_path: Path) -> None:
    with pytest.raises(NotAChestCTError, match="modality MR"):
        read_volume(write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(Modality="MR")))
