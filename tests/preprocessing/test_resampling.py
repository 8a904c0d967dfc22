"""Resampling against PyTorch's own, against ramps whose values are known, and against aliasing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlm3d.preprocessing.resampling import linear_weights, resample_linear, resample_nearest, thread_count


def resampled(
    volume: NDArray[np.float32], shape: tuple[int, int, int], *, antialias: bool, threads: int = 1
) -> NDArray[np.float32]:
    """The whole volume at another size, with the alignment of ``align_corners=False``."""
    weights = []
    for size, wanted in zip(volume.shape, shape, strict=True):
        step = size / wanted
        weights.append(
            linear_weights(step * (np.arange(wanted) + 0.5) - 0.5, size, step if antialias else 1.0)
        )
    out = np.empty(shape, np.float32)
    resample_linear(volume, (weights[0], weights[1], weights[2]), out, threads=threads)
    return out


SIZES = st.tuples(*[st.integers(1, 24)] * 3)
PLANE_SIZES = st.tuples(*[st.integers(2, 24)] * 3)  # PyTorch's antialiasing reads a plane of width 1 wrongly


@settings(max_examples=50, deadline=None)
@given(size=SIZES, wanted=SIZES, seed=st.integers(0, 99))
def test_without_antialiasing_it_is_trilinear_interpolation(
    size: tuple[int, int, int], wanted: tuple[int, int, int], seed: int
) -> None:
    volume = np.random.default_rng(seed).standard_normal(size, np.float32)
    literal = F.interpolate(torch.from_numpy(volume)[None, None], wanted, mode="trilinear")[0, 0].numpy()
    np.testing.assert_allclose(resampled(volume, wanted, antialias=False), literal, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(size=PLANE_SIZES, wanted=st.tuples(*[st.integers(2, 24)] * 2), seed=st.integers(0, 99))
def test_antialiasing_is_the_triangle_filter_that_pytorch_uses_on_planes(
    size: tuple[int, int, int], wanted: tuple[int, int], seed: int
) -> None:
    volume = np.random.default_rng(seed).standard_normal(size, np.float32)
    literal = F.interpolate(torch.from_numpy(volume)[None], wanted, mode="bilinear", antialias=True)[0]
    ours = resampled(volume, (size[0], *wanted), antialias=True)
    np.testing.assert_allclose(ours, literal.numpy(), atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_a_ramp_keeps_its_values_in_place(antialias: bool) -> None:
    d, h, w = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in (20, 30, 40)), indexing="ij")
    volume = (3 * d - 2 * h + 5 * w).astype(np.int16)
    places = [np.arange(4.3, 15.0, 1.7), np.arange(5.1, 24.0, 2.9), np.arange(6.7, 33.0, 0.61)]
    weights = [
        linear_weights(place, size, step if antialias else 1.0)
        for place, size, step in zip(places, volume.shape, (1.7, 2.9, 0.61), strict=True)
    ]
    out = np.empty(tuple(place.size for place in places), np.float32)
    resample_linear(volume, (weights[0], weights[1], weights[2]), out)
    expected = 3 * places[0][:, None, None] - 2 * places[1][:, None] + 5 * places[2]
    tolerance = (
        0.9 if antialias else 1e-3
    )  # a sampled triangle is not quite symmetric about a place between voxels
    np.testing.assert_allclose(out, expected, atol=tolerance)


def test_stripes_finer_than_the_new_grid_average_out_instead_of_aliasing() -> None:
    stripes = np.tile(np.where(np.arange(96) % 2, 1000.0, -1000.0).astype(np.float32), (4, 4, 1))
    blurred = resampled(stripes, (4, 4, 40), antialias=True)[:, :, 2:-2]
    folded = resampled(stripes, (4, 4, 40), antialias=False)[:, :, 2:-2]
    assert np.abs(blurred).max() < 150
    assert np.abs(folded).max() > 700


def test_a_constant_stays_constant_up_to_the_border() -> None:
    out = resampled(np.full((7, 9, 11), -850, np.float32), (3, 20, 5), antialias=True)
    np.testing.assert_allclose(out, -850, rtol=1e-6)


def test_threads_strides_and_types_change_nothing() -> None:
    volume = np.random.default_rng(0).integers(-1000, 1000, (50, 20, 30)).astype(np.int16)
    one = resampled(volume, (70, 15, 40), antialias=True, threads=1)
    turned = np.ascontiguousarray(volume.transpose(2, 0, 1)[::-1]).transpose(1, 2, 0)[:, :, ::-1]
    np.testing.assert_array_equal(one, resampled(turned, (70, 15, 40), antialias=True, threads=3))
    np.testing.assert_array_equal(one, resampled(volume.astype(np.float32), (70, 15, 40), antialias=True))


def test_a_finished_slice_may_have_another_type() -> None:
    volume = np.random.default_rng(0).random((20, 8, 8), np.float32)
    weights = [linear_weights(np.arange(float(n)), n) for n in volume.shape]
    out = np.zeros(volume.shape, bool)
    resample_linear(volume, (weights[0], weights[1], weights[2]), out, lambda x: x >= 0.5, threads=2)
    np.testing.assert_array_equal(out, volume >= 0.5)


def test_nearest_takes_the_closest_label_and_repeats_the_border() -> None:
    labels = np.random.default_rng(0).integers(0, 21, (6, 7, 8)).astype(np.uint8)
    positions = (np.array([-0.4, 1.4, 1.45, 5.4]), np.array([0.0, 3.6, 6.4]), np.array([2.2, 7.49]))
    out = np.empty((4, 3, 2), np.uint8)
    resample_nearest(labels, positions, out)
    np.testing.assert_array_equal(out, labels[np.ix_([0, 1, 1, 5], [0, 4, 6], [2, 7])])


def test_thread_count_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert thread_count() >= 1
