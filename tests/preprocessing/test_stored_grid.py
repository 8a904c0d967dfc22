"""What a store keeps of a scan: HU without a window, and lesion masks that do not lose small lesions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from support.small_cases import GRID, SHAPE, ball, small_data
from vlm3d.config import PreprocessingConfig
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE, window_in_place
from vlm3d.preprocessing.masks import filled_box
from vlm3d.preprocessing.preprocessor import Preprocessor


@pytest.mark.parametrize("window", [(-1000.0, 1000.0), (-1350.0, 150.0), (-160.0, 240.0)])
def test_padding_is_outside_in_every_window(window: tuple[float, float]) -> None:
    config = GRID.model_copy(update={"hu_window": window, "fixed_shape": True})
    scan = Preprocessor(config).apply_hu(small_data().volume)
    assert scan.geometry.content_DHW[2][0] > 0
    corner = scan.hu_DHW[0, 0, :1].astype(np.float32)
    assert window_in_place(corner, window)[0] == OUTSIDE_VALUE


def test_metal_is_cut_to_twelve_bits() -> None:
    volume = small_data().volume
    bright = volume.with_voxels(np.full(SHAPE, 20_000, np.int16))
    assert Preprocessor(GRID).apply_hu(bright).hu_DHW.max() == 3071


def test_a_mask_lies_where_the_scan_shows_it() -> None:
    """Scan and mask with the same ball, on axes of their own, still cover each other on the model's grid."""
    data = small_data()
    mask_DHW = ball(SHAPE, (25, 12, 30), 7)
    volume = data.volume.with_voxels(np.where(mask_DHW, 1000, -1000).astype(np.int16))
    preprocessor = Preprocessor(GRID)
    scan = preprocessor.apply_hu(volume)
    found = preprocessor.apply_masks({"lung_nodule": mask_DHW}, scan.geometry)["lung_nodule"]
    bright = scan.hu_DHW > 0
    assert 2 * (found & bright).sum() / (found.sum() + bright.sum()) > 0.95
    ml = mask_DHW.sum() * np.prod(volume.spacing_mm)
    assert found.sum() * np.prod(scan.geometry.model_spacing_mm) == pytest.approx(ml, rel=0.08)


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, size - 2) for size in SHAPE]), st.sampled_from([0.0, 1.0, 1.5]))
def test_a_lesion_of_a_few_voxels_survives_a_coarse_grid(center: tuple[int, int, int], radius: float) -> None:
    config = PreprocessingConfig(spacing_mm=(6.0, 5.0, 5.0), max_shape=(32, 32, 32), crop="center")
    preprocessor = Preprocessor(config)
    geometry = preprocessor.plan(small_data().volume, None)
    mask_DHW = ball(SHAPE, center, radius)
    found = preprocessor.apply_masks({"x": mask_DHW}, geometry)["x"]
    assert 1 <= found.sum() <= 8
    middle = preprocessor.invert_labels(found.astype(np.uint8), geometry)
    nearest = np.abs(np.argwhere(middle) - center).max(axis=1).min()
    assert nearest <= 2


def test_two_small_lesions_side_by_side_both_survive() -> None:
    config = PreprocessingConfig(spacing_mm=(6.0, 6.0, 6.0), max_shape=(32, 32, 32), crop="center")
    preprocessor = Preprocessor(config)
    geometry = preprocessor.plan(small_data().volume, None)
    mask_DHW = ball(SHAPE, (20, 10, 10), 0.5) | ball(SHAPE, (20, 18, 10), 0.5) | ball(SHAPE, (20, 26, 30), 5)
    found = preprocessor.apply_masks({"x": mask_DHW}, geometry)["x"]
    assert ndimage.label(found, np.ones((3, 3, 3)))[1] == 3


def test_an_empty_mask_and_one_beyond_the_view_are_empty() -> None:
    config = PreprocessingConfig(spacing_mm=(1.5, 1.5, 1.5), max_shape=(8, 16, 16), crop="center")
    preprocessor = Preprocessor(config)
    geometry = preprocessor.plan(small_data().volume, None)
    masks = {"none": np.zeros(SHAPE, bool), "far": ball(SHAPE, (1, 1, 1), 1)}
    assert not any(mask.any() for mask in preprocessor.apply_masks(masks, geometry).values())
    assert filled_box(masks["none"]) is None
    assert filled_box(masks["far"]) == (slice(0, 3), slice(0, 3), slice(0, 3))
