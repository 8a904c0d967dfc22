"""Lesions of known size and place, measured."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import (
    bounding_box,
    drop_small_pieces,
    find_landmarks,
    measure_lesion,
    unsure_pieces,
)
from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.anatomy.totalsegmentator import map_totalsegmentator
from vlm3d.io import read_mask, read_volume
from vlm3d.labels import LESIONS
from vlm3d.preprocessing.orientation import canonical_view, to_canonical

PERICARDIAL_EFFUSION, PLEURAL_EFFUSION, CONSOLIDATION, _, NODULE = LESIONS


def ball(
    shape: tuple[int, int, int],
    center: tuple[float, float, float],
    radius_mm: float,
    spacing: tuple[float, float, float],
) -> NDArray[np.bool_]:
    grids = np.ogrid[tuple(slice(n) for n in shape)]
    distance2 = sum(((g - c) * s) ** 2 for g, c, s in zip(grids, center, spacing, strict=True))
    return np.asarray(distance2 <= radius_mm**2)


def chest() -> NDArray[np.uint8]:
    """Right lung at low W, left lung at high W, heart between, shifted off the array's middle."""
    regions = np.zeros((60, 40, 80), np.uint8)
    regions[6:54, 4:36, 4:70] = REGION_IDS["body_wall"]
    regions[10:50, 8:32, 8:28] = REGION_IDS["right_lower_lobe"]
    regions[30:50, 8:32, 8:28] = REGION_IDS["right_upper_lobe"]
    regions[10:50, 8:32, 42:62] = REGION_IDS["left_lower_lobe"]
    regions[30:50, 8:32, 42:62] = REGION_IDS["left_upper_lobe"]
    regions[12:30, 10:26, 28:42] = REGION_IDS["heart"]
    return regions


def test_a_ball_has_its_volume_diameter_and_center() -> None:
    spacing = (2.5, 0.7, 0.7)
    (piece,) = measure_lesion(ball((40, 80, 80), (18, 40, 30), 15.0, spacing), None, spacing)
    assert piece.volume_ml == pytest.approx(4 / 3 * math.pi * 1.5**3, rel=0.02)
    assert piece.max_diameter_mm == pytest.approx(30.0, abs=0.7)
    assert piece.centroid_index_dhw == (18, 40, 30)
    assert piece.key_slice == 18
    assert piece.region == ""
    assert piece.side == "right"


@pytest.mark.parametrize("angle_deg", range(0, 180, 15))
def test_diameter_does_not_depend_on_direction(angle_deg: int) -> None:
    h, w = np.mgrid[:200, :200] - 100.0
    along = h * math.cos(math.radians(angle_deg)) + w * math.sin(math.radians(angle_deg))
    across = -h * math.sin(math.radians(angle_deg)) + w * math.cos(math.radians(angle_deg))
    mask = ((along / 80) ** 2 + (across / 6) ** 2 <= 1)[None]
    (piece,) = measure_lesion(mask, None, (1.0, 0.5, 0.5))
    assert piece.max_diameter_mm == pytest.approx(80.0, abs=0.6)


def test_diameter_equals_the_literal_largest_distance() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((1, 12, 12), bool)
    mask[0, rng.integers(0, 12, 30), rng.integers(0, 12, 30)] = True
    spacing_hw = np.array([0.8, 0.8])
    for piece in measure_lesion(mask, None, (3.0, 0.8, 0.8)):
        points = np.argwhere(mask[0][piece.bounding_box[1:]])
        if mask[piece.bounding_box].sum() * 3.0 * 0.64 / 1000 > piece.volume_ml + 1e-9:
            continue  # another piece reaches into the box
        literal = max(spacing_hw)
        for a, b in itertools.combinations(points, 2):
            step = (a - b) * spacing_hw
            unit = step / np.linalg.norm(step)
            literal = max(literal, float(np.linalg.norm(step) + np.linalg.norm(unit * spacing_hw)))
        assert piece.max_diameter_mm == pytest.approx(literal, rel=2e-3)


def test_one_voxel_and_one_row() -> None:
    mask = np.zeros((3, 5, 9), bool)
    mask[1, 2, 0:3] = True
    mask[1, 2, 8] = True
    row, voxel = measure_lesion(mask, None, (2.0, 1.0, 1.0))
    assert (row.max_diameter_mm, voxel.max_diameter_mm) == (pytest.approx(3.0), pytest.approx(1.0))
    assert (row.volume_ml, voxel.volume_ml) == (pytest.approx(0.006), pytest.approx(0.002))


def test_pieces_come_largest_first_with_boxes_that_cut_them_out() -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((20, 30, 30)) < 0.04
    pieces = measure_lesion(mask, None, (1.0, 1.0, 1.0), connectivity=6)
    volumes = [piece.volume_ml for piece in pieces]
    assert volumes == sorted(volumes, reverse=True)
    assert sum(volumes) == pytest.approx(mask.sum() / 1000)
    for piece in pieces:
        cut = mask[piece.bounding_box]
        assert cut.any(axis=(1, 2)).all()
        assert cut.sum() / 1000 >= piece.volume_ml - 1e-9
        inside = [
            s.start <= c < s.stop for s, c in zip(piece.bounding_box, piece.centroid_index_dhw, strict=True)
        ]
        assert all(inside)


def test_connectivity_and_smallest_volume() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    spacing = (10.0, 10.0, 10.0)
    assert [piece.volume_ml for piece in measure_lesion(mask, None, spacing)] == [2.0]
    assert [piece.volume_ml for piece in measure_lesion(mask, None, spacing, connectivity=6)] == [1.0, 1.0]
    assert measure_lesion(mask, None, spacing, connectivity=6, min_volume_ml=1.5) == []
    assert len(measure_lesion(mask, None, spacing, connectivity=6, min_volume_ml=1.0)) == 2


def test_side_region_and_level_come_from_the_regions_under_it() -> None:
    regions = chest()
    places = {
        (46, 20, 18): ("right", "right upper lobe", "upper"),
        (30, 20, 52): ("left", "left upper lobe", "middle"),
        (13, 20, 52): ("left", "left lower lobe", "lower"),
        (20, 20, 36): ("midline", "heart", "lower"),
        (40, 34, 60): ("left", "body wall", "upper"),
        (40, 34, 10): ("right", "body wall", "upper"),
        (40, 34, 38): ("left", "body wall", "upper"),  # right of the array's middle, left of the lungs'
        (40, 38, 10): ("right", "", "upper"),
    }
    for (d, h, w), expected in places.items():
        mask = np.zeros(regions.shape, bool)
        mask[d, h, w] = True
        (piece,) = measure_lesion(mask, regions, (2.0, 1.0, 1.0))
        assert (piece.side, piece.region, piece.level) == expected
        (piece,) = measure_lesion(mask, regions, (2.0, 1.0, 1.0), lesion=PERICARDIAL_EFFUSION)
        assert piece.side == "midline"


def test_dense_lung_that_an_anatomy_takes_for_something_else_lies_in_its_lobe() -> None:
    regions = chest()
    lobe = np.argwhere(regions == REGION_IDS["left_lower_lobe"])
    d, h, w = lobe[len(lobe) // 2]
    mask = np.zeros(regions.shape, bool)
    mask[d - 2 : d + 3, h - 2 : h + 3, w - 2 : w + 3] = True
    regions[mask] = REGION_IDS["left_pleural_space"]  # a consolidation as the classical anatomy sees it
    spacing = (2.0, 1.0, 1.0)
    assert measure_lesion(mask, regions, spacing)[0].region == "left pleural space"
    assert (
        measure_lesion(mask, regions, spacing, lesion=CONSOLIDATION)[0].region == "left lower lobe"
    )  # from around it
    regions[d, h, w] = REGION_IDS["left_upper_lobe"]
    assert (
        measure_lesion(mask, regions, spacing, lesion=CONSOLIDATION)[0].region == "left upper lobe"
    )  # from within
    regions[:] = REGION_IDS["left_pleural_space"]
    assert (
        measure_lesion(mask, regions, spacing, lesion=CONSOLIDATION)[0].region == "left pleural space"
    )  # no lobe far and wide


def test_a_piece_that_spreads_over_lobes_is_measured_lobe_by_lobe() -> None:
    regions, spacing = chest(), (2.0, 1.0, 1.0)
    mask = np.zeros(regions.shape, bool)
    mask[22:38, 10:30, 46:58] = True  # both left lobes
    core = mask.copy()
    mask[22:38, 10:30, 42:46] = True
    hidden = mask.copy()
    hidden[24:36, 14:26, 48:56] = False
    regions[mask & ~hidden] = REGION_IDS["mediastinum"]  # dense lung that lies in no lobe
    whole = measure_lesion(mask, regions, spacing)
    parts = measure_lesion(mask, regions, spacing, lesion=CONSOLIDATION)
    assert len(whole) == 1
    assert {part.region for part in parts} == {"left upper lobe", "left lower lobe"}
    assert sum(part.volume_ml for part in parts) == pytest.approx(whole[0].volume_ml)
    upper = next(part for part in parts if part.region == "left upper lobe")
    border = np.argwhere(chest() == REGION_IDS["left_lower_lobe"])[:, 0].max() + 1
    assert upper.volume_ml == pytest.approx(mask[border:].sum() * 0.002, rel=0.15)
    assert upper.bounding_box[0].stop == 38
    assert len(measure_lesion(core, regions, spacing, lesion=NODULE)) == 1
    rim = ball(
        regions.shape, (border - 4, 20, 52), 9.0, spacing
    )  # next to nothing of it is in the upper lobe
    assert [part.region for part in measure_lesion(rim, chest(), spacing, lesion=CONSOLIDATION)] == [
        "left lower lobe"
    ]


@pytest.mark.parametrize(("only", "w", "side"), [("left", 45, "left"), ("right", 25, "right")])
def test_a_mask_of_one_lungs_lobes_alone_puts_nothing_in_it_on_the_other_side(
    only: str, w: int, side: str
) -> None:
    lobes = [number for key, number in REGION_IDS.items() if key.startswith(only) and key.endswith("lobe")]
    regions = np.where(np.isin(chest(), lobes), chest(), 0).astype(np.uint8)
    mask = np.zeros(regions.shape, bool)
    mask[20, 33, w] = True  # beside the lung's medial part, behind it
    (piece,) = measure_lesion(mask, regions, (2.0, 1.0, 1.0))
    assert (piece.side, piece.region) == (side, "")


@pytest.mark.parametrize("with_regions", [True, False])
def test_fluid_on_both_sides_is_measured_side_by_side_however_thin_the_bridge(with_regions: bool) -> None:
    regions = chest() if with_regions else None
    mask = np.zeros((60, 40, 80), bool)
    mask[4:8, 36:39, 4:20] = mask[4:8, 36:39, 50:74] = True
    mask[5, 37, 20:50] = True
    right, left = sorted(
        measure_lesion(mask, regions, (2.0, 2.0, 2.0), lesion=PLEURAL_EFFUSION),
        key=lambda part: part.volume_ml,
    )
    assert (right.side, left.side) == ("right", "left")
    assert right.volume_ml + left.volume_ml == pytest.approx(mask.sum() * 0.008)
    assert len(measure_lesion(mask, regions, (2.0, 2.0, 2.0), lesion=PERICARDIAL_EFFUSION)) == 1


def test_mirrored_scan_swaps_sides_only() -> None:
    regions = chest()
    mask = ball(regions.shape, (40, 20, 18), 4.0, (2.0, 1.0, 1.0))
    (piece,) = measure_lesion(mask, regions, (2.0, 1.0, 1.0))
    (mirrored,) = measure_lesion(mask[:, :, ::-1], None, (2.0, 1.0, 1.0))
    assert (piece.side, mirrored.side) == ("right", "left")
    assert mirrored.max_diameter_mm == pytest.approx(piece.max_diameter_mm)


def test_landmarks_without_lungs_fall_back_to_the_body() -> None:
    regions = np.zeros((30, 40, 80), np.uint8)
    regions[:, :, 20:41] = REGION_IDS["body_wall"]
    landmarks = find_landmarks(regions, regions.shape)
    assert landmarks.midline_index_w == pytest.approx(30, abs=2)
    assert (landmarks.bottom_index_d, landmarks.top_index_d) == (0, 29)


def test_mean_probability_is_taken_inside_each_piece() -> None:
    mask = np.zeros((2, 4, 8), bool)
    mask[:, 1:3, 0:3] = mask[:, 1:3, 5:7] = True
    probability = np.where(np.arange(8) < 4, 0.8, 0.6) * np.ones(mask.shape, np.float32)
    first, second = measure_lesion(mask, None, (1.0, 1.0, 1.0), probability_DHW=probability)
    assert (first.mean_probability, second.mean_probability) == (pytest.approx(0.8), pytest.approx(0.6))
    assert measure_lesion(mask, None, (1.0, 1.0, 1.0))[0].mean_probability is None


def test_empty_mask_and_bad_arguments() -> None:
    empty = np.zeros((3, 4, 5), bool)
    assert measure_lesion(empty, None, (1.0, 1.0, 1.0)) == []
    assert bounding_box(empty) is None
    with pytest.raises(ValueError, match="regions"):
        measure_lesion(empty, np.zeros((3, 4, 6), np.uint8), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="connectivity"):
        measure_lesion(empty, None, (1.0, 1.0, 1.0), connectivity=8)


def test_a_mask_of_many_thousand_specks_is_measured_in_seconds() -> None:
    mask = np.random.default_rng(2).random((64, 128, 128)) < 0.02
    start = time.perf_counter()
    pieces = measure_lesion(mask, None, (1.5, 0.75, 0.75))
    assert len(pieces) > 8_000
    assert time.perf_counter() - start < 10


def test_small_pieces_are_dropped_in_place() -> None:
    mask = np.zeros((3, 6, 12), bool)
    mask[1, 1:3, 1:3] = mask[1, 4, 8] = mask[2, 5, 9] = True
    kept = mask.copy()
    drop_small_pieces(mask, 1)
    np.testing.assert_array_equal(mask, kept)
    drop_small_pieces(mask, 2, connectivity=26)  # the two single voxels touch at a corner
    np.testing.assert_array_equal(mask, kept)
    drop_small_pieces(mask, 2, connectivity=6)
    kept[:, :, 8:] = False
    np.testing.assert_array_equal(mask, kept)
    drop_small_pieces(mask, 5)
    assert not mask.any()


def test_pieces_are_unsure_by_their_mean_chance() -> None:
    mask = np.zeros((3, 6, 12), bool)
    mask[1, 1:3, 1:3] = mask[1, 4, 8] = mask[2, 5, 9] = True
    chance = np.where(mask, 0.9, 0.0).astype(np.float32)
    chance[1, 1, 1:3], chance[2, 5, 9] = 0.2, 0.0  # the first piece has a mean of 0.55, the other two of 0.45
    unsure = unsure_pieces(mask, chance, 0.5)
    expected = mask.copy()
    expected[:, :, :8] = False
    np.testing.assert_array_equal(unsure, expected)
    expected[1, 4, 8] = False
    np.testing.assert_array_equal(unsure_pieces(mask, chance, 0.5, connectivity=6), expected)
    assert not unsure_pieces(np.zeros_like(mask), chance, 0.5).any()
    assert not unsure_pieces(mask, chance, 0.4).any()


@pytest.mark.real_data
def test_a_real_mass_is_found_in_its_lobe(real_data: Path) -> None:
    scan = read_volume(real_data / "lidc0001" / "ct.nii.gz")
    organs = read_mask(real_data / "lidc0001" / "organs.nii.gz")
    classes = canonical_view(organs.labels_DHW, organs.affine)
    regions = map_totalsegmentator(np.where(classes == 118, 117, classes))  # this file's costal cartilages
    nodule = read_mask(real_data / "lidc0001" / "nodule.nii.gz")
    spacing = to_canonical(scan).spacing_mm
    mask = canonical_view(nodule.labels_DHW > 0, nodule.affine)
    piece = measure_lesion(mask, regions, spacing)[0]
    assert (piece.side, piece.region) == ("left", "left lower lobe")
    assert piece.volume_ml == pytest.approx(8, abs=0.5)
    assert 25 < piece.max_diameter_mm < 40
