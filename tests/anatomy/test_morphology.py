"""Shapes worked out only around what is set are those of the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from vlm3d.anatomy.morphology import closed, grow, medians_of, opened, shrink

SHAPE = (9, 12, 11)


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Of every voxel to the nearest that is set."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(~mask)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A few boxes and specks, at the border too; nothing or all of it at times."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    mask = rng.random(SHAPE) < draw(st.sampled_from([0.0, 0.0, 0.02, 0.5, 1.0]))
    for _ in range(draw(st.integers(0, 3))):
        start = rng.integers(0, SHAPE)
        z, y, x = (slice(int(a), int(a) + int(n)) for a, n in zip(start, rng.integers(1, 7, 3), strict=True))
        mask[z, y, x] = True
    return mask


@settings(deadline=None, max_examples=60)
@given(masks(), st.sampled_from([1.0, 1.5, 2.0, 3.3]))
def test_shapes_are_those_of_distances_over_the_whole_volume(mask: np.ndarray, radius: float) -> None:
    before = mask.copy()
    grown, shrunk = grow(mask, radius), shrink(mask, radius)
    np.testing.assert_array_equal(grown, distance_to(mask) <= radius)
    np.testing.assert_array_equal(shrunk, mask & ~(distance_to(~mask) <= radius))
    np.testing.assert_array_equal(opened(mask, radius), mask & (distance_to(shrunk) <= radius))
    wide = np.pad(mask, 6)
    filled = distance_to(~(distance_to(wide) <= radius)) > radius
    np.testing.assert_array_equal(closed(mask, radius), mask | filled[6:-6, 6:-6, 6:-6])
    np.testing.assert_array_equal(mask, before)


def test_medians_are_those_of_each_piece() -> None:
    rng = np.random.default_rng(0)
    labels, values = rng.integers(0, 5, SHAPE).astype(np.int32), rng.normal(size=SHAPE).astype(np.float32)
    found = medians_of(values, labels, ndimage.find_objects(labels), np.array([1, 4]))
    assert found.tolist() == pytest.approx(ndimage.median(values, labels, [1, 4]))
