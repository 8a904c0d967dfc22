"""Real scans: known grids, and a DICOM series that equals the NIfTI made from it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from support.scan_files import canonical, write_nifti
from vlm3d.io import list_series, read_mask, read_volume

pytestmark = pytest.mark.real_data


def test_a_dicom_series_and_the_niftis_made_from_it_are_bit_identical(
    real_data: Path, tmp_path: Path
) -> None:
    folder = real_data / "lung_dx_a0001" / "dicom"
    series = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    by_itk = tmp_path / "itk.nii.gz"
    sitk.WriteImage(reader.Execute(), str(by_itk))
    by_nibabel = write_nifti(tmp_path / "nibabel.nii", series.voxels_DHW, series.affine)
    turned = nib.as_closest_canonical(nib.load(by_itk))
    nib.save(turned, tmp_path / "ras.nii")
    wanted = canonical(series.voxels_DHW, series.affine)
    for path in (by_itk, by_nibabel, tmp_path / "ras.nii"):
        scan = read_volume(path)
        assert scan.voxels_DHW.dtype == series.voxels_DHW.dtype
        for ours, theirs in zip(canonical(scan.voxels_DHW, scan.affine), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_dicom_series_says_what_it_is(real_data: Path) -> None:
    folder = real_data / "lung_dx_a0001" / "dicom"
    (info,) = list_series(folder)
    assert (info.modality, info.slices, info.shape, info.plane) == ("CT", 64, (512, 512), "axial")
    scan = read_volume(sorted(folder.iterdir())[10])
    assert scan.shape_DHW == (64, 512, 512)
    assert scan.spacing_mm[0] == 5.0
    assert set(scan.acquisition) <= {"modality", "kernel", "manufacturer", "kvp", "slice_thickness_mm"}


def test_padding_of_a_whole_chest_is_found(real_data: Path) -> None:
    scan = read_volume(real_data / "lidc0001" / "ct.nii.gz")
    assert scan.shape_DHW == (133, 512, 512)
    assert scan.spacing_mm == (2.5, 0.703125, 0.703125)
    assert scan.voxels_DHW.min() == -1024
    assert any("-2048" in note for note in scan.notes)
    organs = read_mask(real_data / "lidc0001" / "organs.nii.gz")
    np.testing.assert_array_equal(organs.affine, scan.affine)


def test_an_nrrd_and_its_segmentation_lie_on_one_grid(real_data: Path) -> None:
    scan = read_volume(real_data / "ctchest4" / "ct.nrrd")
    mask = read_mask(real_data / "ctchest4" / "segmentation.seg.nrrd")
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert any("-3024" in note for note in scan.notes)
    theirs = sitk.ReadImage(str(real_data / "ctchest4" / "ct.nrrd"))
    for index in ((0, 0, 0), (127, 20, 33)):
        lps = theirs.TransformIndexToPhysicalPoint(index)
        ours = scan.affine @ [*index[::-1], 1]
        np.testing.assert_allclose(ours[:3], np.array(lps) * [-1, -1, 1], atol=2e-3)
