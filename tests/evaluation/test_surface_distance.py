"""Surface figures against MONAI and against all pairs of surface voxels."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlm3d.evaluation.surface_distance import bounding_box, surface_distances, surface_voxels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from monai.metrics import (
        compute_average_surface_distance,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

SPACING_MM = (2.5, 0.7, 0.9)


def blobs(seed: int, shape: tuple[int, int, int] = (14, 20, 18)) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping lumps, some of them cut by the scan's border."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).transpose(1, 2, 3, 0)
    masks = [np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)]
    for _ in range(3):
        center, radius = rng.uniform(0, shape), rng.uniform(2, 7, 3)
        for mask in masks:
            shifted = center + rng.normal(0, 1, 3)
            mask |= (((grid - shifted) / radius) ** 2).sum(axis=-1) <= 1
    return masks[0], masks[1]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_monai(seed: int) -> None:
    predicted, truth = blobs(seed)
    found = surface_distances(predicted, truth, SPACING_MM)
    batch = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    options = {"include_background": True, "spacing": list(SPACING_MM)}
    for percentile in (95, 100):
        peer = compute_hausdorff_distance(*batch, percentile=percentile, **options)
        assert found.hausdorff_mm(percentile) == pytest.approx(float(peer), rel=1e-6)
    peer = compute_average_surface_distance(*batch, symmetric=True, **options)
    assert found.average_mm() == pytest.approx(float(peer), rel=1e-6)
    for tolerance in (0.75, 2.0):
        peer = compute_surface_dice(*batch, class_thresholds=[tolerance], **options)
        assert found.surface_dice(tolerance) == pytest.approx(float(peer), abs=1e-6)


masks = arrays.arrays(bool, st.tuples(*[st.integers(1, 5)] * 3), elements=st.booleans())


@given(masks, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_equal_to_all_pairs(truth: np.ndarray, random: object) -> None:
    predicted = np.roll(truth, 1, axis=random.randint(0, 2)) ^ (
        truth & (np.indices(truth.shape).sum(0) % 3 == 0)
    )  # type: ignore[attr-defined]
    found = surface_distances(predicted, truth, SPACING_MM)
    padded = [np.pad(mask, 1) for mask in (predicted, truth)]
    points = []
    for mask in padded:
        surface = [
            index
            for index in np.argwhere(mask)
            if not all(mask[tuple(index + step)] for axis in np.eye(3, dtype=int) for step in (axis, -axis))
        ]
        points.append(np.array(surface).reshape(-1, 3) * SPACING_MM)
    if len(points[0]) and len(points[1]):
        apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
        np.testing.assert_allclose(found.to_truth_mm, apart.min(axis=1), atol=1e-9)
        np.testing.assert_allclose(found.to_prediction_mm, apart.min(axis=0), atol=1e-9)
    else:
        assert np.isinf(np.r_[found.to_truth_mm, found.to_prediction_mm]).all()


def test_empty_masks() -> None:
    nothing, something = np.zeros((4, 4, 4), dtype=bool), np.ones((4, 4, 4), dtype=bool)
    both = surface_distances(nothing, nothing, SPACING_MM)
    assert math.isnan(both.hausdorff_mm())
    assert math.isnan(both.average_mm())
    assert math.isnan(both.surface_dice(1))
    for one in (
        surface_distances(nothing, something, SPACING_MM),
        surface_distances(something, nothing, SPACING_MM),
    ):
        assert (one.hausdorff_mm(), one.average_mm(), one.surface_dice(1)) == (math.inf, math.inf, 0)
    same = surface_distances(something, something, SPACING_MM)
    assert (same.hausdorff_mm(), same.average_mm(), same.surface_dice(0)) == (0, 0, 1)
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) against \(4, 4, 3\)"):
        surface_distances(nothing, something[:, :, 1:], SPACING_MM)


def test_boxes_and_surfaces_of_simple_masks() -> None:
    mask = np.zeros((6, 7, 8), dtype=bool)
    assert bounding_box(mask) is None
    assert bounding_box(mask[:0]) is None
    assert surface_voxels(mask).shape == (0, 3)
    mask[1:4, 2:5, 3:6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 5), slice(3, 6))
    assert len(surface_voxels(mask)) == 26
    mask[:] = True
    assert len(surface_voxels(mask)) == 6 * 7 * 8 - 4 * 5 * 6  # the scan's border is a surface
