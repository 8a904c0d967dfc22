"""Axes are turned and turned back; no voxel leaves its place in the patient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vlm3d.preprocessing.orientation import (
    axis_codes,
    canonical_affine,
    canonical_view,
    from_canonical,
    regions_to_canonical,
    to_canonical,
)
from vlm3d.volume import CANONICAL_AXES, RegionMap, Volume

ORDERS = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
TO_RAS = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float)  # columns: superior, posterior, left


def canonical_scan(
    shape: tuple[int, int, int], spacing: NDArray[np.float64], tilt_deg: NDArray[np.float64]
) -> Volume:
    """A scan in canonical axes whose voxels are all different."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt_deg, degrees=True).as_matrix() @ TO_RAS * spacing
    affine[:3, 3] = (-31.0, 17.5, 402.25)
    return Volume(np.arange(np.prod(shape), dtype=np.int32).reshape(shape), affine)


def turned(volume: Volume, order: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same scan with other axes, worked out by hand."""
    affine = volume.affine.copy()
    voxels = volume.voxels_DHW
    for axis in range(3):
        if flips[axis]:
            voxels = np.flip(voxels, axis)
            affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(voxels.transpose(order), affine[:, [*order, 3]])


def place_of(value: int, volume: Volume) -> NDArray[np.float64]:
    """Where in the patient a voxel value lies, in RAS+ mm."""
    (index,) = np.argwhere(volume.voxels_DHW == value)
    return (volume.affine @ [*index, 1.0])[:3]


@pytest.mark.parametrize(("order", "flips"), ORDERS)
def test_every_axis_order_comes_to_the_same_canonical_scan_and_back(
    order: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    scan = canonical_scan((3, 4, 5), np.array([2.5, 0.7, 0.8]), np.array([10.0, -8.0, 6.0]))
    other = turned(scan, order, flips)
    back = to_canonical(other)
    np.testing.assert_array_equal(back.voxels_DHW, scan.voxels_DHW)
    np.testing.assert_allclose(back.affine, scan.affine, atol=1e-9)
    assert axis_codes(back.affine) == CANONICAL_AXES
    assert np.shares_memory(back.voxels_DHW, other.voxels_DHW)
    np.testing.assert_array_equal(from_canonical(back.voxels_DHW, other.affine), other.voxels_DHW)
    affine, shape = canonical_affine(other.affine, other.shape_DHW)
    assert shape == scan.shape_DHW
    np.testing.assert_allclose(affine, scan.affine, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 10)] * 3),
    tilt=st.tuples(*[st.floats(-20, 20)] * 3),
    turn=st.sampled_from(ORDERS),
    data=st.data(),
)
def test_no_voxel_moves_in_the_patient(
    shape: tuple[int, int, int],
    spacing: tuple[float, ...],
    tilt: tuple[float, ...],
    turn: tuple[tuple[int, ...], tuple[bool, ...]],
    data: st.DataObject,
) -> None:
    scan = turned(canonical_scan(shape, np.array(spacing), np.array(tilt)), *turn)
    value = data.draw(st.integers(0, int(np.prod(shape)) - 1))
    canonical = to_canonical(scan)
    np.testing.assert_allclose(place_of(value, canonical), place_of(value, scan), atol=1e-6)
    assert axis_codes(canonical.affine) == CANONICAL_AXES


@pytest.mark.parametrize(("order", "flips"), ORDERS)
def test_left_stays_left(order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> None:
    scan = turned(canonical_scan((4, 6, 8), np.ones(3), np.zeros(3)), order, flips)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in scan.shape_DHW), indexing="ij"))
    x_mm = np.tensordot(scan.affine[0, :3], grid, 1)
    heart_on_the_left = Volume(np.where(x_mm < np.median(x_mm), 1, 0), scan.affine)  # RAS+: left is low x
    canonical = to_canonical(heart_on_the_left).voxels_DHW
    assert canonical[:, :, 4:].all()
    assert not canonical[:, :, :4].any()


def test_regions_turn_with_the_scan_and_a_canonical_view_writes_through() -> None:
    scan = turned(canonical_scan((3, 4, 5), np.ones(3), np.zeros(3)), (2, 0, 1), (True, False, True))
    regions = RegionMap((scan.voxels_DHW % 21).astype(np.uint8), scan.affine, "phantom")
    canonical = regions_to_canonical(regions)
    np.testing.assert_array_equal(canonical.labels_DHW, to_canonical(scan).voxels_DHW % 21)
    assert canonical.method == "phantom"
    array = np.zeros(scan.shape_DHW, int)
    canonical_view(array, scan.affine)[...] = to_canonical(scan).voxels_DHW
    np.testing.assert_array_equal(array, scan.voxels_DHW)


def test_a_singular_affine_is_refused() -> None:
    with pytest.raises(ValueError, match="singular"):
        axis_codes(np.diag([1.0, 0.0, 1.0, 1.0]))
