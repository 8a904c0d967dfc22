"""A voxel's place in the patient survives every axis order and flip, through every reader."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scan_files import (
    affine_of,
    canonical,
    reoriented,
    small_chest,
    write_dicom,
    write_itk,
    write_nifti,
)
from vlm3d.io import read_mask, read_volume, write_nifti_mask

CHEST = small_chest((10, 36, 40))
AXIS_ORDERS = list(itertools.permutations(range(3)))
FLIPS = list(itertools.product((False, True), repeat=3))

Writer = Callable[[Path, np.ndarray, np.ndarray], Path]
WRITERS: dict[str, Writer] = {
    "nifti": lambda folder, v, a: write_nifti(folder / "ct.nii", v, a),
    "nifti_gz_by_itk": lambda folder, v, a: write_itk(folder / "ct.nii.gz", v, a),
    "metaimage": lambda folder, v, a: write_itk(folder / "ct.mha", v, a, compressed=True),
    "nrrd": lambda folder, v, a: write_itk(folder / "ct.nrrd", v, a, compressed=True),
    "dicom": lambda folder, v, a: write_dicom(folder / "series", v, a),
}


@pytest.mark.parametrize("writer", WRITERS, ids=str)
@pytest.mark.parametrize("order", AXIS_ORDERS, ids=str)
def test_all_48_orientations_are_the_same_scan_to_the_last_bit(writer: str, order: tuple[int, ...]) -> None:
    affine = affine_of((8.125, 7.0, 6.5))
    for flips in FLIPS:
        with tempfile.TemporaryDirectory() as folder:
            scan = read_volume(WRITERS[writer](Path(folder), *reoriented(CHEST, affine, order, flips)))
        voxels, back = canonical(scan.voxels_DHW, scan.affine)
        np.testing.assert_array_equal(voxels, CHEST)
        np.testing.assert_array_equal(back, affine)


@given(
    writer=st.sampled_from(sorted(WRITERS)),
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    spacing=st.tuples(*[st.integers(7_000, 12_000).map(lambda n: n / 1000)] * 3),
    origin=st.tuples(*[st.integers(-400_000, 400_000).map(lambda n: n / 1000)] * 3),
)
@settings(max_examples=40, deadline=None)
def test_voxels_keep_their_place_in_the_patient(
    writer: str,
    order: list[int],
    flips: tuple[bool, ...],
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
) -> None:
    affine = affine_of(spacing, origin)
    with tempfile.TemporaryDirectory() as folder:
        scan = read_volume(WRITERS[writer](Path(folder), *reoriented(CHEST, affine, order, flips)))
    voxels, back = canonical(scan.voxels_DHW, scan.affine)
    np.testing.assert_array_equal(voxels, CHEST)
    corners = np.array([[0, 0, 0, 1], [9, 35, 39, 1], [9, 0, 39, 1]]).T
    np.testing.assert_allclose(back @ corners, affine @ corners, atol=2e-3)


@given(order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3))
@settings(max_examples=20, deadline=None)
def test_a_mask_written_on_a_scans_grid_comes_back_on_it(order: list[int], flips: tuple[bool, ...]) -> None:
    voxels, affine = reoriented(CHEST, affine_of((8.0, 7.1, 6.3)), order, flips)
    with tempfile.TemporaryDirectory() as folder:
        scan = read_volume(write_nifti(Path(folder, "ct.nii.gz"), voxels, affine))
        write_nifti_mask(scan.voxels_DHW > 200, scan.affine, Path(folder, "mask.nii.gz"))
        mask = read_mask(Path(folder, "mask.nii.gz"))
    np.testing.assert_array_equal(mask.labels_DHW, voxels > 200)
    np.testing.assert_array_equal(mask.affine, scan.affine)
    assert mask.labels_DHW.dtype == np.uint8


def test_an_oblique_grid_stays_oblique(tmp_path: Path) -> None:
    angle = np.radians(12)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine_of()
    scans = [read_volume(write(tmp_path, CHEST, affine)) for write in WRITERS.values()]
    corners = np.array([[0, 0, 0, 1], [9, 35, 39, 1]]).T
    for scan in scans:
        np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
        np.testing.assert_allclose(scan.affine @ corners, affine @ corners, atol=3e-3)
