"""Each format comes back as it was written: values, type, place, notes."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support.scan_files import (
    affine_of,
    canonical,
    small_chest,
    write_dicom,
    write_itk,
    write_nifti,
    write_npz,
)
from vlm3d.errors import InputError, MaskError, NotAChestCTError, SeriesError, UnreadableFileError
from vlm3d.io import list_series, read_mask, read_npz_case, read_volume, write_nifti_mask

CHEST = small_chest()
AFFINE = affine_of()


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.hdr", "a name with spaces.nii.gz"])
def test_nifti(tmp_path: Path, name: str) -> None:
    if name.endswith(".hdr"):
        image = nib.Nifti1Pair(np.ascontiguousarray(CHEST.T), AFFINE[:, [2, 1, 0, 3]])
        nib.save(image, tmp_path / "ct.img")
    else:
        write_nifti(tmp_path / name, CHEST, AFFINE)
    scan = read_volume(tmp_path / name)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.voxels_DHW.dtype == np.int16
    assert scan.source == name
    assert not scan.voxels_DHW.flags.writeable


def test_the_img_of_a_pair_leads_to_its_header(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.ascontiguousarray(CHEST.T), AFFINE[:, [2, 1, 0, 3]]), tmp_path / "ct.img")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.img").voxels_DHW, CHEST)


def test_content_decides_before_the_name(tmp_path: Path) -> None:
    write_nifti(tmp_path / "ct.nii.gz", CHEST, AFFINE)
    (tmp_path / "ct.nii.gz").rename(tmp_path / "ct.dcm")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.dcm").voxels_DHW, CHEST)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_byte_orders_and_versions(tmp_path: Path, kind: type, order: str) -> None:
    header = (nib.Nifti2Header if kind is nib.Nifti2Image else nib.Nifti1Header)(endianness=order)
    header.set_data_dtype(np.int16)
    nib.save(kind(np.ascontiguousarray(CHEST.T), AFFINE[:, [2, 1, 0, 3]], header), tmp_path / "ct.nii")
    scan = read_volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.voxels_DHW.dtype.isnative


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float32, np.float64])
def test_whole_numbers_are_kept_as_int16(tmp_path: Path, dtype: type) -> None:
    scan = read_volume(write_nifti(tmp_path / "ct.nii", CHEST.astype(dtype), AFFINE))
    assert scan.voxels_DHW.dtype == np.int16
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)


def test_fractions_are_kept_as_float32(tmp_path: Path) -> None:
    scan = read_volume(write_nifti(tmp_path / "ct.nii", CHEST.astype(np.float32) + 0.25, AFFINE))
    assert scan.voxels_DHW.dtype == np.float32
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST.astype(np.float32) + 0.25)


def test_nifti_slope_and_intercept_are_applied_once_and_said(tmp_path: Path) -> None:
    stored = (CHEST + 1024).astype(np.uint16)
    scan = read_volume(write_nifti(tmp_path / "ct.nii", stored, AFFINE, scl_slope=1, scl_inter=-1024))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.voxels_DHW.dtype == np.int16
    assert any("-1024" in note for note in scan.notes)


def test_4d_with_one_frame_is_a_volume(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ascontiguousarray(CHEST.T)[..., None], AFFINE[:, [2, 1, 0, 3]])
    nib.save(image, tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "ct.nii.gz").voxels_DHW, CHEST)


def test_qform_is_used_where_there_is_no_sform(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", CHEST, AFFINE, sform_code=0, srow_x=[9, 9, 9, 9])
    np.testing.assert_array_equal(read_volume(path).affine, AFFINE)


def test_a_header_without_orientation_is_noted(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", CHEST, AFFINE, sform_code=0, qform_code=0)
    scan = read_volume(path)
    assert any("no orientation" in note for note in scan.notes)
    np.testing.assert_allclose(scan.spacing_mm, (8.0, 7.0, 6.5))


def test_meters_in_a_nifti_header_become_millimeters(tmp_path: Path) -> None:
    meters = AFFINE.copy()
    meters[:3] /= 1000
    scan = read_volume(write_nifti(tmp_path / "ct.nii", CHEST, meters, xyzt_units=1))
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-3)


@pytest.mark.parametrize("name", ["ct.mha", "ct.mhd", "ct.nrrd", "ct.nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_metaimage_and_nrrd(tmp_path: Path, name: str, compressed: bool, dtype: type) -> None:
    scan = read_volume(write_itk(tmp_path / name, CHEST.astype(dtype), AFFINE, compressed=compressed))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.voxels_DHW.dtype == np.int16


def test_nrrd_in_ras_space(tmp_path: Path) -> None:
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 44 40 12\n"
        "space directions: (-6.5,0,0) (0,-7,0) (0,0,8)\nkinds: domain domain domain\nendian: big\n"
        "encoding: gzip\nspace origin: (140.5,138.25,-310)\n\n"
    )
    (tmp_path / "ct.nrrd").write_bytes(header.encode() + gzip.compress(CHEST.astype(">i2").tobytes()))
    scan = read_volume(tmp_path / "ct.nrrd")
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    np.testing.assert_array_equal(scan.affine, AFFINE)


META = "NDims = 3\nDimSize = 44 40 12\nElementType = MET_SHORT\n{more}\nElementDataFile = LOCAL\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 44 40 12\nencoding: raw\nendian: little\n{more}\n\n"


def write_by_hand(folder: Path, header: str, more: str) -> Path:
    path = folder / ("ct.mha" if header is META else "ct.nrrd")
    path.write_bytes(header.format(more=more).encode() + CHEST.tobytes())
    return path


@pytest.mark.parametrize(
    ("header", "more"), [(META, "ElementSpacing = 6.5 7 8"), (NRRD, "spacings: 6.5 7 8")]
)
def test_a_text_header_without_orientation_is_noted(tmp_path: Path, header: str, more: str) -> None:
    scan = read_volume(write_by_hand(tmp_path, header, more))
    assert any("no orientation" in note and "Left, Posterior, Superior" in note for note in scan.notes)
    assert scan.spacing_mm == (8.0, 7.0, 6.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("header", "more"),
    [
        (META, "ElementSpacing = -6.5 7 8"),
        (META, "ElementSize = 6.5 0 8"),
        (META, "ElementSpacing = 1e300 7 8\nTransformMatrix = 1e300 0 0 0 1 0 0 0 1"),
        (META, "ElementSpacing = 6.5 7 8\nOffset = nan 0 0"),
        (NRRD, "spacings: 6.5 -7 8"),
        (NRRD, "space: LPS\nspace directions: (1e300,1e300,0) (0,7,0) (0,0,8)"),
    ],
)
def test_a_text_header_with_impossible_lengths_is_one_line(tmp_path: Path, header: str, more: str) -> None:
    with pytest.raises(UnreadableFileError) as refused:
        read_volume(write_by_hand(tmp_path, header, more))
    assert len(str(refused.value)) < 200


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "fields", [{"scl_slope": 3e38}, {"scl_slope": 1e-30}, {"srow_x": [3e38, 0, 0, 0], "xyzt_units": 1}]
)
def test_a_nifti_header_with_absurd_numbers_raises_no_warning(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    with pytest.raises(InputError):
        read_volume(write_nifti(tmp_path / "ct.nii", CHEST, AFFINE, **fields))


@pytest.mark.filterwarnings("error")
def test_voxels_beyond_float32_raise_no_warning(tmp_path: Path) -> None:
    voxels = CHEST.astype(np.float64)
    voxels[3, 4, 5] = 1e300
    with pytest.raises(NotAChestCTError, match="1 voxels"):
        read_volume(write_nifti(tmp_path / "ct.nii", voxels, AFFINE))


def test_npz_is_mapped_back_to_hu(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "case.npz", CHEST, (8.0, 7.0, 6.5))
    scan = read_volume(path)
    inside = np.clip(CHEST, -1000, 500)
    assert np.abs(scan.voxels_DHW - inside).max() <= 1500 / 255
    assert scan.spacing_mm == (8.0, 7.0, 6.5)
    assert any("-1000..500" in note for note in scan.notes)
    np.testing.assert_array_equal(read_mask(path).labels_DHW, CHEST > 200)


def test_npz_takes_its_window_from_the_caller(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "case.npz", CHEST, (8.0, 7.0, 6.5), window=None)
    with pytest.raises(NotAChestCTError, match="npz_window"):
        read_volume(path)
    assert read_volume(path, npz_window=(-1000, 500)).voxels_DHW.min() == -1000


def test_npz_case_for_training_keeps_its_bytes(tmp_path: Path) -> None:
    case = read_npz_case(write_npz(tmp_path / "case.npz", CHEST, (8.0, 7.0, 6.5)))
    assert case.imgs_DHW.dtype == case.gts_DHW.dtype == np.uint8
    assert case.imgs_DHW.shape == CHEST.shape
    assert case.spacing_mm == (8.0, 7.0, 6.5)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, bool])
def test_npz_objects_of_another_type_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "case.npz"
    imgs = np.zeros((4, 5, 6), np.uint8)
    np.savez(path, imgs=imgs, gts=imgs.astype(dtype), spacing=np.ones(3))
    with pytest.raises(UnreadableFileError, match="gts of type"):
        read_npz_case(path)


def test_dicom_and_the_nifti_made_from_it_are_bit_identical(tmp_path: Path) -> None:
    # spacing and origin of a real protocol: neither is a short binary fraction
    chest, affine = (
        small_chest((14, 64, 80)),
        affine_of((5.0123, 4.842, 4.7), (158.0507, 211.3913, -124.7005)),
    )
    from_dicom = read_volume(write_dicom(tmp_path / "series", chest, affine))
    paths = [
        write_itk(tmp_path / "itk.nii.gz", chest, affine),
        write_nifti(tmp_path / "nibabel.nii", chest, affine),
        write_itk(tmp_path / "itk.mha", chest, affine),
        write_itk(tmp_path / "itk.nrrd", chest, affine),
    ]
    for path in paths:
        scan = read_volume(path)
        np.testing.assert_array_equal(scan.voxels_DHW, from_dicom.voxels_DHW)
        np.testing.assert_array_equal(scan.affine, from_dicom.affine)
        assert scan.voxels_DHW.dtype == from_dicom.voxels_DHW.dtype
    flipped = write_nifti(
        tmp_path / "flipped.nii",
        np.ascontiguousarray(chest[:, ::-1]),
        from_dicom.affine @ np.array([[1, 0, 0, 0], [0, -1, 0, 63], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    scan = read_volume(flipped)
    for ours, theirs in zip(
        canonical(scan.voxels_DHW, scan.affine),
        canonical(from_dicom.voxels_DHW, from_dicom.affine),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_padding_outside_the_field_of_view_becomes_minus_1024(tmp_path: Path) -> None:
    padded = CHEST.copy()
    padded[:, :4] = -3024
    scan = read_volume(write_nifti(tmp_path / "ct.nii", padded, AFFINE))
    assert scan.voxels_DHW.min() == -1024
    assert (scan.voxels_DHW[:, :4] == -1024).all()
    np.testing.assert_array_equal(scan.voxels_DHW[:, 4:], CHEST[:, 4:])
    assert any("-3024" in note for note in scan.notes)


def test_raw_values_of_ct_rates_first_release_take_rescale_and_spacing_from_outside(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "v1.nii.gz", (CHEST + 1024).astype(np.int16), np.eye(4))
    with pytest.raises(NotAChestCTError):
        read_volume(path)
    scan = read_volume(path, rescale=(1, -1024), spacing_mm=(8.0, 7.0, 6.5))
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    np.testing.assert_allclose(scan.spacing_mm, (8.0, 7.0, 6.5))


def test_rescaling_what_is_in_hu_already_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "v2.nii.gz", CHEST, AFFINE)
    with pytest.raises(NotAChestCTError, match="applied twice"):
        read_volume(path, rescale=(1, -1024))


@pytest.mark.parametrize("highest", [1, 200, 300, 70_000])
def test_masks_take_the_smallest_type_that_holds_their_labels(tmp_path: Path, highest: int) -> None:
    labels = np.zeros(CHEST.shape, np.int32)
    labels[2, 3, 4] = highest
    write_nifti_mask(labels, AFFINE, tmp_path / "mask.nii.gz")
    mask = read_mask(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(mask.labels_DHW, labels)
    assert nib.load(tmp_path / "mask.nii.gz").get_fdata()[4, 3, 2] == highest
    np.testing.assert_array_equal(nib.load(tmp_path / "mask.nii.gz").affine, AFFINE[:, [2, 1, 0, 3]])


@pytest.mark.parametrize(
    ("shape", "accepted"), [((340, 40, 40), True), ((700, 40, 40), False), ((110, 110, 110), False)]
)
def test_a_body_may_be_longer_than_a_chest_but_not_wider(
    tmp_path: Path, shape: tuple[int, int, int], accepted: bool
) -> None:
    voxels = np.full(shape, 40, np.int16)
    voxels[:, 5:-5, 5:-5] = -800
    affine = affine_of((3.27, 10.0, 10.0)) if shape[1] == 40 else affine_of((10.0, 10.0, 10.0))
    path = write_nifti(tmp_path / "ct.nii", voxels, affine)
    if accepted:
        assert read_volume(path).shape_DHW == shape
        return
    with pytest.raises(NotAChestCTError, match=r"measures \d{3,4} x \d{3,4} x \d{3,4} mm"):
        read_volume(path)


def test_masks_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti_mask(CHEST > 0, AFFINE, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("offset", [-5, 0.5, np.inf, np.nan, 5e9, 1e20])
def test_masks_hold_whole_numbers_from_zero(tmp_path: Path, offset: float) -> None:
    write_nifti(tmp_path / "mask.nii", (CHEST > 0).astype(np.float32) + np.float32(offset), AFFINE)
    with pytest.raises(MaskError, match=r"mask\.nii"):
        read_mask(tmp_path / "mask.nii")


def test_a_scan_that_is_a_file_has_no_series(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", CHEST, AFFINE)
    with pytest.raises(SeriesError, match="no series"):
        list_series(path)
    with pytest.raises(SeriesError, match="no series"):
        read_volume(path, series="1")
