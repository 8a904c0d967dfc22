"""Training scans vary, and what is known about them moves along: masks, sides, words."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.regions import MIRRORED_REGION_IDS, NUM_REGIONS, REGION_IDS
from vlm3d.config import AugmentationConfig, load_config
from vlm3d.datasets.augmentation import (
    NO_AUGMENTATION,
    OUTSIDE_HU,
    Augmenter,
    Geometry,
    TrainingSample,
)
from vlm3d.datasets.augmentation_text import mirrored_report

SHAPE = (20, 48, 56)
SPACING_MM = (3.0, 1.5, 1.2)
BLOB_LESION = 1 << 4


def blob_sample(
    middle: tuple[float, float, float] = (10, 20, 24), dtype: Any = np.float32, report: str | None = None
) -> TrainingSample:
    """A bright ball of soft tissue in lung, a lesion of one bit and a region of one id where it is bright."""
    grid = np.indices(SHAPE).astype(np.float64)
    offset_mm = (grid - np.reshape(middle, (3, 1, 1, 1))) * np.reshape(SPACING_MM, (3, 1, 1, 1))
    ball = np.linalg.norm(offset_mm, axis=0) <= 11
    hu = np.where(ball, 60, -800).astype(dtype)
    regions = np.where(ball, REGION_IDS["right_lower_lobe"], REGION_IDS["right_upper_lobe"]).astype(np.uint8)
    return TrainingSample(
        hu, regions, (ball * BLOB_LESION).astype(np.uint8), np.zeros(18, np.float32), report, "c1", SPACING_MM
    )


def only(**changed: Any) -> AugmentationConfig:
    """Nothing but the settings named."""
    return NO_AUGMENTATION.model_copy(update=changed)


def center(mask_DHW: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.array(ndimage.center_of_mass(mask_DHW))


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


geometries = st.builds(
    Geometry,
    degrees=st.floats(-30, 30),
    scale_DHW=st.tuples(*[st.floats(0.8, 1.25)] * 3),
    shift_DHW=st.tuples(st.floats(-2, 2), st.floats(-5, 5), st.floats(-5, 5)),
    flip=st.booleans(),
)


class TestGeometry:
    @settings(max_examples=60, deadline=None)
    @given(geometry=geometries, dtype=st.sampled_from([np.int16, np.float32]))
    def test_the_image_its_regions_and_its_lesions_stay_together(
        self, geometry: Geometry, dtype: Any
    ) -> None:
        moved = Augmenter(NO_AUGMENTATION).move(blob_sample(dtype=dtype), geometry)
        bright = moved.hu_DHW > -370
        lesion = moved.lesion_bits_DHW > 0
        assert lesion.any()
        assert moved.hu_DHW.dtype == dtype
        # the nearest voxel is off by half a voxel at most
        assert np.abs(center(bright) - center(lesion)).max() < 0.55
        overlap = 2 * (bright & lesion).sum() / (bright.sum() + lesion.sum())
        assert overlap > 0.9
        own_region = REGION_IDS["left_lower_lobe" if geometry.flip else "right_lower_lobe"]
        assert moved.regions_DHW is not None
        assert np.array_equal(moved.regions_DHW == own_region, lesion)

    @settings(max_examples=40, deadline=None)
    @given(geometry=geometries)
    def test_the_ball_goes_where_the_geometry_says_in_millimeters(self, geometry: Geometry) -> None:
        start = np.array([10.0, 20.0, 24.0])
        moved = Augmenter(NO_AUGMENTATION).move(blob_sample(tuple(start)), geometry)
        middle = (np.array(SHAPE) - 1) / 2
        d_mm, h_mm, w_mm = (start - middle) * SPACING_MM
        if geometry.flip:
            w_mm = -w_mm
        scale_d, scale_h, scale_w = geometry.scale_DHW
        turn = np.deg2rad(geometry.degrees)
        h_mm, w_mm = h_mm * scale_h, w_mm * scale_w
        h_mm, w_mm = (
            np.cos(turn) * h_mm + np.sin(turn) * w_mm,
            np.cos(turn) * w_mm - np.sin(turn) * h_mm,
        )
        expected = np.array([d_mm * scale_d, h_mm, w_mm]) / SPACING_MM + middle + geometry.shift_DHW
        assert np.abs(center(moved.lesion_bits_DHW > 0) - expected).max() < 0.45

    def test_a_ball_turns_without_being_sheared_though_pixels_are_not_square(self) -> None:
        moved = Augmenter(NO_AUGMENTATION).move(blob_sample((10, 23, 27)), Geometry(degrees=40))
        lesion = moved.lesion_bits_DHW > 0
        extent_mm = [
            np.ptp(axis) * spacing for axis, spacing in zip(np.nonzero(lesion), SPACING_MM, strict=True)
        ]
        assert extent_mm[1] == pytest.approx(extent_mm[2], abs=2.5)

    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_a_whole_voxel_shift_is_exact_and_fills_with_air(self, dtype: Any) -> None:
        rng = seeded()
        sample = replace(
            blob_sample(dtype=dtype),
            hu_DHW=rng.integers(-1000, 1500, SHAPE).astype(dtype),
            lesion_bits_DHW=rng.integers(0, 32, SHAPE).astype(np.uint8),
        )
        moved = Augmenter(NO_AUGMENTATION).move(sample, Geometry(shift_DHW=(2.0, -3.0, 5.0)))
        assert np.allclose(moved.hu_DHW[2:, :-3, 5:], sample.hu_DHW[:-2, 3:, :-5], atol=0.02)
        assert np.array_equal(moved.lesion_bits_DHW[2:, :-3, 5:], sample.lesion_bits_DHW[:-2, 3:, :-5])
        for outside in (np.s_[:2], np.s_[:, -3:], np.s_[:, :, :5]):
            assert np.allclose(moved.hu_DHW[outside], OUTSIDE_HU, atol=0.02)
            assert not moved.lesion_bits_DHW[outside].any()
            assert moved.regions_DHW is not None
            assert not moved.regions_DHW[outside].any()

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_ids_and_bits_are_never_mixed(self, seed: int) -> None:
        rng = seeded(seed)
        regions = rng.integers(0, NUM_REGIONS + 1, SHAPE).astype(np.uint8)
        bits = rng.choice(np.array([0, 1, 4, 21], np.uint8), SHAPE)
        sample = replace(blob_sample(), regions_DHW=regions, lesion_bits_DHW=bits)
        config = AugmentationConfig(
            geometry_probability=1, flip_probability=0.5, rotate_degrees=45, scale=0.5
        )
        moved = Augmenter(config)(sample, rng)
        assert moved.regions_DHW is not None
        assert set(np.unique(moved.regions_DHW)) <= set(range(NUM_REGIONS + 1))
        assert set(np.unique(moved.lesion_bits_DHW)) <= {0, 1, 4, 21}

    def test_a_scan_without_regions_and_one_of_a_single_slice_are_moved(self) -> None:
        sample = blob_sample()
        flat = replace(
            sample,
            hu_DHW=sample.hu_DHW[10:11],
            regions_DHW=None,
            lesion_bits_DHW=sample.lesion_bits_DHW[10:11],
        )
        moved = Augmenter(NO_AUGMENTATION).move(flat, Geometry(degrees=10, flip=True))
        assert moved.regions_DHW is None
        assert moved.hu_DHW.shape == (1, *SHAPE[1:])
        assert moved.lesion_bits_DHW.any()

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_what_is_drawn_stays_within_the_settings(self, seed: int) -> None:
        config = AugmentationConfig(
            geometry_probability=1, rotate_degrees=7, scale=0.1, translate_voxels=(1, 2, 0)
        )
        geometry = Augmenter(config).draw_geometry(seeded(seed))
        assert abs(geometry.degrees) <= 7
        assert all(1 / 1.1 <= factor <= 1.1 for factor in geometry.scale_DHW)
        assert all(abs(move) <= most for move, most in zip(geometry.shift_DHW, (1, 2, 0), strict=True))
        assert not geometry.flip


class TestIntensity:
    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_no_augmentation_is_bit_identical(self, dtype: Any) -> None:
        sample = replace(
            blob_sample(dtype=dtype, report="Right."), hu_DHW=seeded().normal(0, 500, SHAPE).astype(dtype)
        )
        for seed in range(20):
            varied = Augmenter(NO_AUGMENTATION)(sample, seeded(seed))
            assert varied.hu_DHW.dtype == dtype
            assert varied.hu_DHW.tobytes() == sample.hu_DHW.tobytes()
            assert varied.report == "Right."

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([np.int16, np.float32]))
    def test_a_seed_says_everything_and_the_stored_scan_is_left_alone(self, seed: int, dtype: Any) -> None:
        config = AugmentationConfig(
            noise_probability=0.5,
            blur_probability=0.5,
            lowres_probability=0.5,
            motion_probability=0.5,
            cutout_boxes=1,
        )
        sample = blob_sample(dtype=dtype)
        before = (sample.hu_DHW.tobytes(), sample.lesion_bits_DHW.tobytes())
        first, second = (Augmenter(config)(sample, seeded(seed)) for _ in range(2))
        assert first.hu_DHW.tobytes() == second.hu_DHW.tobytes()
        assert first.lesion_bits_DHW.tobytes() == second.lesion_bits_DHW.tobytes()
        assert first.hu_DHW.dtype == dtype
        assert np.isfinite(first.hu_DHW).all()
        assert (sample.hu_DHW.tobytes(), sample.lesion_bits_DHW.tobytes()) == before

    def test_what_one_scan_needs_does_not_shift_the_next_ones_numbers(self) -> None:
        rngs = seeded(5), seeded(5)
        Augmenter(NO_AUGMENTATION)(blob_sample(), rngs[0])
        Augmenter(AugmentationConfig(noise_probability=1, blur_probability=1))(blob_sample(), rngs[1])
        assert rngs[0].random() == rngs[1].random()

    def test_masks_are_untouched_by_intensity_alone(self) -> None:
        config = only(
            intensity_probability=1,
            noise_probability=1,
            blur_probability=1,
            lowres_probability=1,
            motion_probability=1,
        )
        sample = blob_sample()
        varied = Augmenter(config)(sample, seeded())
        assert varied.lesion_bits_DHW is sample.lesion_bits_DHW
        assert varied.regions_DHW is sample.regions_DHW
        assert np.abs(varied.hu_DHW - sample.hu_DHW).mean() > 1

    def test_noise_has_at_most_the_configured_deviation_and_no_bias(self) -> None:
        sample = replace(blob_sample(), hu_DHW=np.zeros(SHAPE, np.float32))
        sigmas = []
        for seed in range(10):
            noise = Augmenter(only(noise_probability=1, noise_hu=30))(sample, seeded(seed)).hu_DHW
            assert abs(noise.mean()) < 0.6
            sigmas.append(float(noise.std()))
        assert 15 < max(sigmas) < 31

    def test_the_kernel_softens_or_sharpens_edges_within_slices_only(self) -> None:
        sample = replace(blob_sample(), hu_DHW=np.zeros(SHAPE, np.float32))
        sample.hu_DHW[10, 24, 28] = 1000
        peaks = []
        for seed in range(10):
            varied = Augmenter(only(blur_probability=1, blur_mm=2.0))(sample, seeded(seed)).hu_DHW
            assert varied.sum() == pytest.approx(1000, rel=1e-3)
            assert not varied[[9, 11]].any()
            peaks.append(varied[10, 24, 28])
        assert min(peaks) < 500
        assert max(peaks) > 1300

    def test_thick_slices_keep_the_mean_and_blend_neighbors_only_along_depth(self) -> None:
        stripes = np.where(np.arange(SHAPE[0]) % 2, 100.0, -100.0)[:, None, None]
        sample = replace(blob_sample(), hu_DHW=np.broadcast_to(stripes, SHAPE).astype(np.float32).copy())
        varied = Augmenter(only(lowres_probability=1, lowres_slices=4))(sample, seeded(1)).hu_DHW
        assert abs(varied.mean()) < 8
        assert varied.std() < 80
        assert np.ptp(varied, axis=(1, 2)).max() < 0.01

    def test_a_breath_leaves_a_second_contour_along_the_body_at_the_bases_only(self) -> None:
        slices = np.arange(SHAPE[0])
        belly = np.where((slices < 6) | (slices >= 18), 60.0, -800.0)[:, None, None]  # and a neck
        still = replace(
            blob_sample(), hu_DHW=np.broadcast_to(belly, SHAPE).astype(np.float32).copy(), regions_DHW=None
        )
        reached = []
        for seed in range(20):
            varied = Augmenter(only(motion_probability=1, breath_mm=9.0))(still, seeded(seed)).hu_DHW
            assert np.ptp(varied, axis=(1, 2)).max() < 0.01
            assert varied.min() >= -800.01
            assert varied.max() <= 60.01
            change_D = np.abs(varied[:, 0, 0] - belly[:, 0, 0])
            assert not change_D[[*range(3), *range(9, 15), 18, 19]].any()  # 9 mm are three slices
            reached.append(float(change_D.max()))
        assert min(reached) > 0
        assert max(reached) < 0.45 * 860

    def test_a_heartbeat_leaves_a_second_heart_beside_the_first_in_the_plane(self) -> None:
        still = blob_sample()
        heart = still.lesion_bits_DHW > 0
        regions = np.where(heart, REGION_IDS["heart"], 0).astype(np.uint8)
        beating = Augmenter(only(motion_probability=1, breath_mm=0.0, heartbeat_mm=6.0))
        moved = 0
        for seed in range(20):
            varied = beating(replace(still, regions_DHW=regions), seeded(seed)).hu_DHW
            changed = np.abs(varied - still.hu_DHW) > 0.01
            assert not changed[~heart.any(axis=(1, 2))].any()
            near = ndimage.binary_dilation(heart, np.ones((1, 3, 3)), iterations=8)
            assert not changed[~near].any()
            assert varied.min() >= -800.01
            assert varied.max() <= 60.01
            beside = ndimage.binary_dilation(heart, np.ones((1, 3, 3))) & ~heart
            moved += bool((varied - still.hu_DHW)[beside].max() > 80)
        assert moved == 20
        without = replace(still, regions_DHW=None)
        assert np.array_equal(beating(without, seeded()).hu_DHW, without.hu_DHW)

    def test_the_hu_scale_moves_fluid_less_than_fluid_lies_from_soft_tissue(self) -> None:
        sample = replace(blob_sample(), hu_DHW=np.full(SHAPE, 10, np.float32))
        moves = [
            abs(Augmenter(only(intensity_probability=1))(sample, seeded(s)).hu_DHW[0, 0, 0] - 10)
            for s in range(50)
        ]
        assert 5 < max(moves) < 40

    def test_a_box_is_blanked_but_never_over_a_lesion(self) -> None:
        sample = replace(blob_sample(), hu_DHW=seeded().normal(0, 100, SHAPE).astype(np.float32))
        lesion = sample.lesion_bits_DHW > 0
        changed = 0
        for seed in range(20):
            varied = Augmenter(only(cutout_boxes=2, cutout_mm=15))(sample, seeded(seed)).hu_DHW
            assert np.array_equal(varied[lesion], sample.hu_DHW[lesion])
            changed += int((varied != sample.hu_DHW).any())
        assert changed > 10

    def test_shapes_and_types_that_do_not_fit_are_refused(self) -> None:
        sample = blob_sample()
        with pytest.raises(ValueError, match="lesion bits"):
            replace(sample, lesion_bits_DHW=sample.lesion_bits_DHW[1:])
        with pytest.raises(ValueError, match="int16 or float32"):
            replace(sample, hu_DHW=sample.hu_DHW.astype(np.float64))

    def test_settings_are_checked(self) -> None:
        with pytest.raises(ValueError, match="negative"):
            AugmentationConfig(translate_voxels=(-1, 0, 0))
        assert load_config("tiny").model_dump()  # the shipped sizes still load beside the new section


class TestFlip:
    def test_no_scan_is_mirrored_unless_asked_for(self) -> None:
        assert AugmentationConfig().flip_probability == 0

    def test_sided_regions_change_sides_and_the_rest_keeps_its_name(self) -> None:
        def mirror(key: str) -> int:
            return MIRRORED_REGION_IDS[REGION_IDS[key]]

        assert mirror("right_upper_lobe") == REGION_IDS["left_upper_lobe"]
        assert mirror("left_upper_lobe") == REGION_IDS["right_upper_lobe"]
        assert mirror("right_middle_lobe") == REGION_IDS["left_upper_lobe"]
        assert mirror("left_lower_lobe") == REGION_IDS["right_lower_lobe"]
        assert mirror("right_pleural_space") == REGION_IDS["left_pleural_space"]
        for key in ("heart", "aorta", "liver", "airways", "spine"):
            assert mirror(key) == REGION_IDS[key]
        assert MIRRORED_REGION_IDS[0] == 0

    def test_a_mirrored_scan_is_the_scan_read_backwards(self) -> None:
        sample = blob_sample(report="Mass in the right lower lobe.", dtype=np.int16)
        mirrored = Augmenter(only(flip_probability=1))(sample, seeded())
        assert np.array_equal(mirrored.hu_DHW, sample.hu_DHW[:, :, ::-1])
        assert np.array_equal(mirrored.lesion_bits_DHW, sample.lesion_bits_DHW[:, :, ::-1])
        assert mirrored.report == "Mass in the left lower lobe."

    def test_twice_mirrored_is_the_scan_again(self) -> None:
        sample = blob_sample(report="Right-sided effusion.", dtype=np.int16)
        flip = Augmenter(only(flip_probability=1))
        again = flip(flip(sample, seeded(1)), seeded(2))
        assert np.array_equal(again.hu_DHW, sample.hu_DHW)
        assert np.array_equal(again.regions_DHW, sample.regions_DHW)
        assert again.report == sample.report

    def test_a_report_that_cannot_be_mirrored_keeps_its_scan_as_it_is(self) -> None:
        sample = blob_sample(report="Consolidation of the lingula.")
        kept = Augmenter(only(flip_probability=1))(sample, seeded())
        assert kept is sample


class TestWords:
    @pytest.mark.parametrize(
        ("said", "mirrored"),
        [
            ("A nodule is seen in the right upper lobe.", "A nodule is seen in the left upper lobe."),
            ("LEFT LOWER LOBE: clear. Right lung: clear.", "RIGHT LOWER LOBE: clear. Left lung: clear."),
            ("Left-sided effusion, right greater than left.", "Right-sided effusion, left greater than right."),
            ("left-facing scoliosis, shifted rightward", "right-facing scoliosis, shifted leftward"),
            ("Bilateral effusion, bright upright copyright.", "Bilateral effusion, bright upright copyright."),
            ("upper lobe of the left lung, on the right", "upper lobe of the right lung, on the left"),
            ("right_lower_lobe and left_pleural_space", "left_lower_lobe and right_pleural_space"),
            ("A 6 mm nodule (RUL) and one in LLL.", "A 6 mm nodule (LUL) and one in RLL."),
            ("Nodule in the right middle lobe.", "Nodule in the left upper lobe."),
            ("RIGHT MIDDLE LOBE atelectasis.", "LEFT UPPER LOBE atelectasis."),
            ("In the right lung middle lobe, a scar.", "In the left upper lobe, a scar."),
            ("Middle lobe of the right lung is airless.", "Left upper lobe is airless."),
            ("Atelectasis in the middle lobe.", "Atelectasis in the left upper lobe."),
            ("Opacities in the right upper lobe, right middle lobe and right lower lobe.",
             "Opacities in the left upper lobe and left lower lobe."),
            ("The left ventricle is dilated.", "The left ventricle is dilated."),
            ("Left and right atria are normal; left pleural effusion.",
             "Left and right atria are normal; right pleural effusion."),
            ("Calcified left main coronary artery and left anterior descending; left main bronchus open.",
             "Calcified left main coronary artery and left anterior descending; right main bronchus open."),
            ("Cyst in the right lobe of the liver, left kidney normal.",
             "Cyst in the right lobe of the liver, right kidney normal."),
            ("Liver cyst in its left lobe.", "Liver cyst in its left lobe."),
            ("Left lobe lateral segment of the liver.", "Left lobe lateral segment of the liver."),
            ("Left main and right coronary arteries.", "Left main and right coronary arteries."),
            ("Nodule in the right lobe of the thyroid.", "Nodule in the left lobe of the thyroid."),
            ("The tube was left in place on the left.", "The tube was left in place on the right."),
            ("", ""),
        ],
    )  # fmt: skip
    def test_side_words_change_places(self, said: str, mirrored: str) -> None:
        assert mirrored_report(said) == mirrored

    @pytest.mark.parametrize(
        "said",
        [
            "Consolidation of the lingula.",
            "LINGULAR segment of the left lung",
            "inferiolingular band",
            "Situs inversus.",
            "Dextrocardia, right lung clear.",
            "Right lung middle and lower lobes are clear.",
            "Nodules in the right upper, middle lobes.",
            "upper and middle lobes of the right lung",
            "A scar in the middle lobe medial segment of the right lung",
            "middle lobe of the right lung, lateral segment",
            "thickening of the minor fissure",
            "An azygos lobe on the right.",
            "R upper lobe nodule",
            "Nodule in the Rt lower lobe.",
            "Effusion on both sides (R>L).",
        ],
    )
    def test_what_has_no_counterpart_is_refused(self, said: str) -> None:
        assert mirrored_report(said) is None

    words = st.sampled_from(
        ["left", "right", "Left", "RIGHT", "lung", "lobe", "upper", "lower", "effusion", "bilateral"]
        + ["bright", "left-sided", ",", ".", ";", "of", "the", "kidney", "and", "RUL", "LLL"]
    )

    @settings(max_examples=200, deadline=None)
    @given(words=st.lists(words, max_size=25))
    def test_twice_mirrored_is_the_text_again(self, words: list[str]) -> None:
        text = " ".join(words)
        once = mirrored_report(text)
        assert once is not None
        assert once.lower().split().count("left") == text.lower().split().count("right")
        assert mirrored_report(once) == text

    @pytest.mark.real_data
    def test_real_reports_are_mirrored_whole_or_refused(self, real_data: Path) -> None:
        with (real_data / "ct_rate_layout" / "validation_reports.csv").open(encoding="utf-8") as file:
            reports = [f"{row['Findings_EN']} {row['Impressions_EN']}" for row in csv.DictReader(file)][::4]
        kept = 0
        for report in reports:
            mirrored = mirrored_report(report)
            if mirrored is None or "middle lobe" in report.lower():
                continue
            kept += 1
            assert mirrored_report(mirrored) == report
            assert len(mirrored.split()) == len(report.split())
        assert kept > len(reports) / 3
