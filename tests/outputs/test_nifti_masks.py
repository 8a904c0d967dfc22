"""Mask files: their place in mm, their header, their size."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from support.scan_files import affine_of
from vlm3d.outputs.nifti_masks import write_mask


def test_both_forms_say_the_same_place(tmp_path: Path) -> None:
    angle = np.deg2rad(17)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = affine_of()
    affine[:3, :3] = tilt @ affine[:3, :3]
    mask = np.zeros((4, 6, 8), bool)
    mask[1, 2, 3] = True
    write_mask(mask, affine, tmp_path / "a.nii.gz", description="vlm3d 1.0 untrained weights: lung_nodule")
    image = nib.load(tmp_path / "a.nii.gz")
    assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
    voxel = np.argwhere(np.asarray(image.dataobj))
    assert voxel.tolist() == [[3, 2, 1]]
    np.testing.assert_allclose(image.affine @ [3, 2, 1, 1], affine @ [1, 2, 3, 1], atol=1e-3)
    assert image.header["descrip"].tobytes().rstrip(b"\0") == b"vlm3d 1.0 untrained weights: lung_nodule"
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.get_data_dtype() == np.uint8


def test_a_sheared_grid_has_no_wrong_quaternion(tmp_path: Path) -> None:
    """A tilted gantry shears the grid, which a quaternion cannot say; the affine still can."""
    affine = affine_of()
    affine[:3, 0] += [0, 3, 0]
    write_mask(np.ones((4, 6, 8), bool), affine, tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert int(image.header["qform_code"]) == 0
    assert int(image.header["sform_code"]) == 1
    np.testing.assert_allclose(image.affine, affine[:, [2, 1, 0, 3]], atol=1e-3)


def test_any_layout_and_type_writes_the_same_bytes(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((5, 6, 7)) > 0.5
    for name, layout in (("a", mask), ("b", np.asfortranarray(mask)), ("c", mask.astype(np.int16) * 3)):
        write_mask(layout, affine_of(), tmp_path / f"{name}.nii.gz")
    written = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 1


def test_an_empty_mask_is_small(tmp_path: Path) -> None:
    write_mask(np.zeros((50, 256, 256), bool), affine_of(), tmp_path / "a.nii.gz")
    assert (tmp_path / "a.nii.gz").stat().st_size < 50_000
    assert not np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj).any()


def test_a_mask_is_three_dimensional(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3D"):
        write_mask(np.zeros((4, 4), bool), affine_of(), tmp_path / "a.nii.gz")
