"""A scan goes to the model's grid and its masks come back to where they belong in the patient."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.config import PreprocessingConfig, config_from_dict, load_config
from vlm3d.errors import ConfigError, MaskError
from vlm3d.io import read_mask, read_volume
from vlm3d.preprocessing.geometry import ScanGeometry
from vlm3d.preprocessing.orientation import canonical_view, from_canonical
from vlm3d.preprocessing.preprocessor import PreparedScan, Preprocessor
from vlm3d.volume import RegionMap, Volume, spacing_from_affine

ORDERS = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
TO_RAS = np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]], float)
SMALL = PreprocessingConfig(spacing_mm=(3.0, 1.5, 1.5), max_shape=(64, 96, 96), size_multiple=(4, 16, 16))


def grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], tilt_deg: float = 0.0
) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape and affine of a canonical grid, centered on the origin, tilted about all three axes."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [tilt_deg] * 3, degrees=True).as_matrix() @ TO_RAS * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


def turned(
    array: NDArray[np.generic], affine: NDArray[np.float64], order: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
    """The same voxels with other axes."""
    affine = affine.copy()
    for axis in range(3):
        if flips[axis]:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return np.ascontiguousarray(array.transpose(order)), affine[:, [*order, 3]]


def places_mm(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """RAS+ mm of every voxel center, (D, H, W, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ball(
    shape: tuple[int, ...], affine: NDArray[np.float64], center_mm: tuple[float, ...], radius_mm: float
) -> NDArray[np.bool_]:
    return np.asarray(np.linalg.norm(places_mm(shape, affine) - np.array(center_mm), axis=-1) <= radius_mm)


def two_lungs(
    shape: tuple[int, int, int], affine: NDArray[np.float64], center_mm: tuple[float, ...]
) -> RegionMap:
    """Two balls for lungs, 40 mm apart, around a place in the patient."""
    x, y, z = center_mm
    labels = np.zeros(shape, np.uint8)
    labels[ball(shape, affine, (x + 20, y, z), 18.0)] = REGION_IDS["right_upper_lobe"]
    labels[ball(shape, affine, (x - 20, y, z), 18.0)] = REGION_IDS["left_upper_lobe"]
    return RegionMap(labels, affine, "phantom")


def ct_clip_literal(
    hu: NDArray[np.int16], spacing: tuple[float, ...], config: PreprocessingConfig
) -> NDArray[np.float32]:
    """CT-CLIP's preparation step by step, in PyTorch."""
    x = torch.from_numpy(hu.astype(np.float32))
    size = [int(n * (s / t)) for n, s, t in zip(hu.shape, spacing, config.spacing_mm, strict=True)]
    x = F.interpolate(x[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    x = x.clamp(-1000, 1000) / 1000
    pads: list[int] = []
    for axis, wanted in enumerate(config.max_shape):
        start = max((x.shape[axis] - wanted) // 2, 0)
        x = x.narrow(axis, start, min(x.shape[axis] - start, wanted))
        before = (wanted - x.shape[axis]) // 2
        pads = [before, wanted - x.shape[axis] - before, *pads]
    return F.pad(x, pads, value=-1).numpy()


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((20, 90, 90), (2.5, 0.703125, 0.703125)),
        ((61, 50, 141), (1.0, 0.9, 0.68)),
        ((9, 64, 64), (5.0, 0.75, 0.75)),
    ],
)
def test_ct_clips_preparation_is_a_setting(
    shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    config = PreprocessingConfig(
        spacing_mm=(1.5, 0.75, 0.75),
        max_shape=(36, 80, 80),
        fixed_shape=True,
        crop="center",
        hu_window=(-1000, 1000),
        antialias=False,
        ctclip_sizes=True,
    )
    hu = np.random.default_rng(0).integers(-1200, 1500, shape).astype(np.int16)
    prepared = Preprocessor(config).apply(Volume(hu, grid(shape, spacing)[1]))
    assert prepared.intensity_DHW.shape == config.max_shape
    np.testing.assert_allclose(prepared.intensity_DHW, ct_clip_literal(hu, spacing, config), atol=1e-4)


GRIDS = {
    "isotropic": grid((60, 70, 70), (1.5, 1.5, 1.5)),
    "thick slices": grid((22, 120, 120), (5.0, 0.8, 0.8)),
    "thin slices": grid((120, 60, 60), (0.9, 1.9, 1.9)),
    "oblique": grid((50, 90, 90), (2.5, 1.1, 1.1), tilt_deg=10),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("turn", [ORDERS[0], ORDERS[7], ORDERS[21], ORDERS[34]])
def test_a_ball_on_the_model_grid_comes_back_in_place_and_size(
    name: str, turn: tuple[tuple[int, ...], tuple[bool, ...]]
) -> None:
    shape, affine = GRIDS[name]
    hu, affine = turned(np.zeros(shape, np.int16), affine, *turn)
    preprocessor = Preprocessor(SMALL)
    prepared = preprocessor.apply(Volume(hu, affine))
    center_mm, radius_mm = (6.3, -9.1, 4.7), 15.0
    model_ball = ball(prepared.intensity_DHW.shape, prepared.affine, center_mm, radius_mm)
    mask = preprocessor.invert_mask(model_ball.astype(np.float32), prepared.geometry, 0.5)
    assert mask.shape == hu.shape
    found_mm = places_mm(hu.shape, affine)[mask].mean(axis=0)
    half_voxel = np.abs(affine[:3, :3]) @ np.full(3, 0.5)
    assert (np.abs(found_mm - center_mm) < half_voxel).all()
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))
    model_mm3 = abs(np.linalg.det(prepared.affine[:3, :3]))
    assert mask.sum() * voxel_mm3 == pytest.approx(model_ball.sum() * model_mm3, rel=0.05)


@settings(max_examples=48, deadline=None)
@given(turn=st.sampled_from(ORDERS), seed=st.integers(0, 3), tilt=st.sampled_from([0.0, 10.0]))
def test_axis_order_changes_neither_input_nor_mask(
    turn: tuple[tuple[int, ...], tuple[bool, ...]], seed: int, tilt: float
) -> None:
    shape, affine = grid((14, 40, 44), (4.0, 1.7, 1.7), tilt)
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 1000, shape).astype(np.int16)
    labels = two_lungs(shape, affine, (2.0, 3.0, -1.0)).labels_DHW
    preprocessor = Preprocessor(SMALL)
    straight = preprocessor.apply(Volume(hu, affine), RegionMap(labels, affine))
    other_hu, other_affine = turned(hu, affine, *turn)
    other_labels, _ = turned(labels, affine, *turn)
    other = preprocessor.apply(Volume(other_hu, other_affine), RegionMap(other_labels, other_affine))
    np.testing.assert_allclose(other.intensity_DHW, straight.intensity_DHW, atol=1e-5)
    np.testing.assert_array_equal(other.regions_DHW, straight.regions_DHW)
    np.testing.assert_allclose(other.affine, straight.affine, atol=1e-6)
    probability = rng.random(straight.intensity_DHW.shape, np.float32)
    mask = preprocessor.invert_mask(probability, straight.geometry, 0.6)
    other_mask = preprocessor.invert_mask(probability, other.geometry, 0.6)
    assert np.mean(turned(mask, affine, *turn)[0] != other_mask) < 1e-4


def test_a_scan_too_large_is_cut_around_the_lungs_and_says_so() -> None:
    shape, affine = grid((100, 160, 160), (3.0, 1.5, 1.5))
    regions = two_lungs(shape, affine, (45.0, -40.0, 70.0))
    config = SMALL.model_copy(update={"max_shape": (16, 32, 64), "crop_margin_mm": 5.0})
    prepared = Preprocessor(config).apply(Volume(np.zeros(shape, np.int16), affine), regions)
    assert prepared.intensity_DHW.shape == (16, 32, 64)
    middle_mm = (prepared.affine @ [7.5, 15.5, 31.5, 1.0])[:3]
    np.testing.assert_allclose(middle_mm, (45.0, -40.0, 70.0), atol=3.0)
    assert prepared.regions_DHW is not None
    assert (prepared.regions_DHW > 0).mean() > 0.2
    assert prepared.geometry.notes == (
        "The model sees 48x48x96 mm around the lungs, of the scan's 300x240x240 mm.",
    )


def test_lungs_too_large_for_the_model_are_cut_evenly_and_the_user_is_told() -> None:
    shape, affine = grid((100, 160, 160), (3.0, 1.5, 1.5))
    regions = two_lungs(shape, affine, (45.0, -40.0, 70.0))
    config = SMALL.model_copy(update={"max_shape": (8, 32, 32)})
    prepared = Preprocessor(config).apply(Volume(np.zeros(shape, np.int16), affine), regions)
    np.testing.assert_allclose((prepared.affine @ [3.5, 15.5, 15.5, 1.0])[:3], (45.0, -40.0, 70.0), atol=3.0)
    head, side = prepared.geometry.notes[1:]
    assert head.startswith("The model sees at most 24 mm head to foot: 1")
    assert side.startswith("The model sees at most 48 mm right to left: 2")
    assert head.endswith("mm of the lungs are left out.")


def test_lungs_that_fit_are_whole_and_no_more_than_needed_is_resampled() -> None:
    shape, affine = grid((100, 160, 160), (3.0, 1.5, 1.5))
    regions = two_lungs(shape, affine, (45.0, -40.0, 70.0))
    prepared = Preprocessor(SMALL).apply(Volume(np.zeros(shape, np.int16), affine), regions)
    assert prepared.geometry.notes == (
        "The model sees 84x96x120 mm around the lungs, of the scan's 300x240x240 mm.",
    )
    assert prepared.regions_DHW is not None
    assert prepared.intensity_DHW.shape == (28, 64, 80)
    lung_ml = [
        (r > 0).sum() * np.prod(spacing_from_affine(a)) / 1000
        for r, a in ((regions.labels_DHW, affine), (prepared.regions_DHW, prepared.affine))
    ]
    assert lung_ml[1] == pytest.approx(lung_ml[0], rel=0.02)


@pytest.mark.parametrize("given_regions", [True, False])
def test_without_lungs_the_middle_is_used_and_the_user_is_told(given_regions: bool) -> None:
    shape, affine = grid((100, 160, 60), (3.0, 1.5, 1.5))
    regions = RegionMap(np.zeros(shape, np.uint8), affine) if given_regions else None
    prepared = Preprocessor(SMALL).apply(Volume(np.zeros(shape, np.int16), affine), regions)
    np.testing.assert_allclose((prepared.affine @ [31.5, 47.5, 31.5, 1.0])[:3], 0, atol=1.5)
    assert prepared.intensity_DHW.shape == (64, 96, 64)
    assert [note.split(":")[0] for note in prepared.geometry.notes] == [
        "No lungs to crop around",
        "The model sees at most 192 mm head to foot",
        "The model sees at most 144 mm front to back",
    ]


def test_padding_is_air_without_region_and_content_is_the_scan() -> None:
    shape, affine = grid((5, 10, 12), (3.0, 1.5, 1.5))
    regions = RegionMap(np.full(shape, REGION_IDS["heart"], np.uint8), affine)
    config = SMALL.model_copy(update={"max_shape": (8, 16, 32), "fixed_shape": True})
    prepared = Preprocessor(config).apply(Volume(np.full(shape, 40, np.int16), affine), regions)
    inside = tuple(slice(*content) for content in prepared.geometry.content_DHW)
    assert prepared.intensity_DHW[inside].shape == shape
    np.testing.assert_allclose(prepared.intensity_DHW[inside], 0.04, atol=1e-6)
    assert (prepared.intensity_DHW == -1).sum() == 8 * 16 * 32 - np.prod(shape)
    assert prepared.regions_DHW is not None
    assert (prepared.regions_DHW > 0).sum() == np.prod(shape)


def test_regions_lie_under_the_same_tissue_as_before() -> None:
    shape, affine = grid((30, 80, 80), (4.0, 1.1, 1.1), tilt_deg=8)
    regions = two_lungs(shape, affine, (0.0, 0.0, 0.0))
    hu = np.where(regions.labels_DHW > 0, -850, 40).astype(np.int16)
    prepared = Preprocessor(SMALL).apply(Volume(hu, affine), regions)
    inside = tuple(slice(*content) for content in prepared.geometry.content_DHW)
    dark = prepared.intensity_DHW[inside] < -0.4
    assert prepared.regions_DHW is not None
    lung = prepared.regions_DHW[inside] > 0
    assert 2 * (dark & lung).sum() / (dark.sum() + lung.sum()) > 0.95


def test_regions_on_other_axes_fit_and_on_another_grid_are_refused() -> None:
    shape, affine = grid((14, 40, 44), (4.0, 1.7, 1.7))
    scan = Volume(np.zeros(shape, np.int16), affine)
    regions = two_lungs(shape, affine, (0.0, 0.0, 0.0))
    preprocessor = Preprocessor(SMALL)
    labels, other_affine = turned(regions.labels_DHW, affine, (2, 0, 1), (True, False, True))
    np.testing.assert_array_equal(
        preprocessor.apply(scan, RegionMap(labels, other_affine)).regions_DHW,
        preprocessor.apply(scan, regions).regions_DHW,
    )
    with pytest.raises(MaskError, match=r"13x40x44 voxels of 4x1\.7x1\.7 mm, the scan 14x40x44"):
        preprocessor.apply(scan, RegionMap(regions.labels_DHW[1:], affine))
    shifted = affine.copy()
    shifted[0, 3] += 3.0
    with pytest.raises(MaskError, match="another place"):
        preprocessor.apply(scan, RegionMap(regions.labels_DHW, shifted))


@pytest.fixture(scope="module")
def prepared_crop() -> tuple[Preprocessor, PreparedScan, NDArray[np.float32]]:
    """A scan on turned axes of which the model sees a part, and noise for three lesions on its grid."""
    shape, affine = grid((40, 90, 90), (2.5, 1.2, 1.2), tilt_deg=10)
    regions = two_lungs(shape, affine, (10.0, -5.0, 5.0))
    hu, other_affine = turned(np.zeros(shape, np.int16), affine, (1, 2, 0), (False, True, True))
    labels, _ = turned(regions.labels_DHW, affine, (1, 2, 0), (False, True, True))
    config = SMALL.model_copy(update={"crop_margin_mm": 2.0})
    preprocessor = Preprocessor(config, threads=2)
    prepared = preprocessor.apply(Volume(hu, other_affine), RegionMap(labels, other_affine))
    noise = np.random.default_rng(0).random((3, *prepared.intensity_DHW.shape), np.float32)
    noise[1, :, : noise.shape[2] // 2] = 0
    noise[2] = 0
    return preprocessor, prepared, noise


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.93])
def test_masks_are_the_interpolated_probabilities_thresholded(
    prepared_crop: tuple[Preprocessor, PreparedScan, NDArray[np.float32]], threshold: float
) -> None:
    preprocessor, prepared, noise = prepared_crop
    masks = preprocessor.invert_probabilities(noise, prepared.geometry, threshold)
    assert masks.shape == (3, *prepared.geometry.source_shape_DHW)
    assert masks.dtype == bool
    for lesion in range(3):
        floats = preprocessor.invert_probability(noise[lesion], prepared.geometry)
        near_tie = np.abs(floats - threshold) < 1e-5
        assert ((masks[lesion] == (floats >= threshold)) | near_tie).all()
    assert masks[0].any()
    assert not masks[2].any()


def test_each_lesion_can_have_its_threshold(
    prepared_crop: tuple[Preprocessor, PreparedScan, NDArray[np.float32]],
) -> None:
    preprocessor, prepared, noise = prepared_crop
    masks = preprocessor.invert_probabilities(noise, prepared.geometry, [0.3, 0.8, 0.5])
    for lesion, threshold in enumerate((0.3, 0.8, 0.5)):
        np.testing.assert_array_equal(
            masks[lesion], preprocessor.invert_mask(noise[lesion], prepared.geometry, threshold)
        )
    with pytest.raises(ValueError, match="2 thresholds for 3 lesions"):
        preprocessor.invert_probabilities(noise, prepared.geometry, [0.3, 0.8])
    with pytest.raises(ValueError, match="model grid"):
        preprocessor.invert_mask(noise[0, 1:], prepared.geometry, 0.5)
    with pytest.raises(ValueError, match="model grid"):
        preprocessor.invert_labels(np.zeros((1, 2, 3), np.uint8), prepared.geometry)


def test_what_the_model_did_not_see_is_empty_and_what_it_saw_is_full(
    prepared_crop: tuple[Preprocessor, PreparedScan, NDArray[np.float32]],
) -> None:
    preprocessor, prepared, _ = prepared_crop
    geometry = prepared.geometry
    everything = np.ones(geometry.model_shape_DHW, np.float32)
    mask = preprocessor.invert_mask(everything, geometry, 0.5)
    places = places_mm(geometry.source_shape_DHW, np.array(geometry.source_affine))
    model_index = (places - geometry.model_affine[:3, 3]) @ np.linalg.inv(geometry.model_affine[:3, :3]).T
    low = np.array([content[0] for content in geometry.content_DHW]) - 0.5
    high = np.array([content[1] for content in geometry.content_DHW]) - 0.5
    expected = ((model_index > low - 1e-4) & (model_index < high - 1e-4)).all(axis=-1)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(
        preprocessor.invert_labels(everything.astype(np.uint8), geometry) > 0, expected
    )
    assert 0.02 < mask.mean() < 0.9


def test_a_whole_scan_comes_back_whole() -> None:
    for size in ((7, 33, 35), (31, 50, 47)):
        shape, affine = grid(size, (2.9, 1.37, 1.37))
        preprocessor = Preprocessor(SMALL)
        geometry = preprocessor.plan(Volume(np.zeros(shape, np.int16), affine), None)
        assert preprocessor.invert_mask(np.ones(geometry.model_shape_DHW, np.float32), geometry, 0.5).all()


def test_labels_survive_the_way_there_and_back() -> None:
    shape, affine = grid((40, 90, 90), (2.5, 1.2, 1.2), tilt_deg=10)
    regions = two_lungs(shape, affine, (10.0, -5.0, 5.0))
    labels, other_affine = turned(regions.labels_DHW, affine, (2, 1, 0), (True, True, False))
    preprocessor = Preprocessor(SMALL)
    prepared = preprocessor.apply(
        Volume(np.zeros(labels.shape, np.int16), other_affine), RegionMap(labels, other_affine)
    )
    assert prepared.regions_DHW is not None
    back = preprocessor.invert_labels(prepared.regions_DHW, prepared.geometry)
    for region in (REGION_IDS["right_upper_lobe"], REGION_IDS["left_upper_lobe"]):
        both = ((labels == region) & (back == region)).sum()
        assert 2 * both / ((labels == region).sum() + (back == region).sum()) > 0.95


def test_the_geometry_survives_json(
    prepared_crop: tuple[Preprocessor, PreparedScan, NDArray[np.float32]],
) -> None:
    _, prepared, _ = prepared_crop
    geometry = ScanGeometry.from_dict(json.loads(json.dumps(prepared.geometry.to_dict())))
    assert geometry == prepared.geometry
    np.testing.assert_allclose(geometry.model_spacing_mm, SMALL.spacing_mm)


def test_masks_need_little_memory_beyond_themselves() -> None:
    shape, affine = grid((200, 192, 192), (1.0, 1.0, 1.0))
    preprocessor = Preprocessor(PreprocessingConfig(max_shape=(136, 256, 256)), threads=2)
    geometry = preprocessor.plan(Volume(np.broadcast_to(np.int16(0), shape), affine), None)
    probability = np.ones(geometry.model_shape_DHW, np.float32)
    tracemalloc.start()
    mask = preprocessor.invert_mask(probability, geometry, 0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mask.all()
    assert peak - mask.nbytes < 0.4 * mask.size * 4  # a few slices a thread, never the float volume


def test_the_scan_is_left_as_it_was() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 32, 32)).astype(np.float32)
    kept = hu.copy()
    config = SMALL.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    Preprocessor(config).apply(Volume(hu, grid((8, 32, 32), (1.0, 1.0, 1.0))[1]))
    np.testing.assert_array_equal(hu, kept)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("max_shape", (30, 96, 96), "not a multiple"),
        ("hu_window", (100, -100), "lower, upper"),
        ("spacing_mm", (0.0, 1.0, 1.0), "positive"),
    ],
)
def test_impossible_settings_are_refused(setting: str, value: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"preprocessing": {setting: value}}, "test")


@pytest.mark.real_data
def test_a_real_mass_survives_the_way_there_and_back(real_data: Path) -> None:
    scan = read_volume(real_data / "lidc0001" / "ct.nii.gz")
    nodule = read_mask(real_data / "lidc0001" / "nodule.nii.gz")
    on_scan = from_canonical(canonical_view(nodule.labels_DHW > 0, nodule.affine), scan.affine)
    marked = RegionMap(on_scan.astype(np.uint8) * np.uint8(REGION_IDS["heart"]), scan.affine)
    for config, dice in ((PreprocessingConfig(), 0.95), (load_config("tiny").preprocessing, 0.85)):
        preprocessor = Preprocessor(config)
        prepared = preprocessor.apply(scan, marked)
        assert prepared.regions_DHW is not None
        back = preprocessor.invert_mask((prepared.regions_DHW > 0).astype(np.float32), prepared.geometry, 0.5)
        assert 2 * (back & on_scan).sum() / (back.sum() + on_scan.sum()) > dice
