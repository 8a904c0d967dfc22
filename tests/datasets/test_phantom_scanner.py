"""Kernels, noise, motion and metal of the phantom's scanner, and the protocol that training never sees."""

from __future__ import annotations

import numpy as np
import pytest

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom import generate_phantom
from vlm3d.datasets.phantom.frame import Canvas, Frame
from vlm3d.datasets.phantom.motion import GHOST_SHARE, add_streaks, move_diaphragm, move_heart
from vlm3d.datasets.phantom.scanner import (
    DEFAULT_PROTOCOL,
    KERNELS,
    SHIFTED_PROTOCOL,
    Scanner,
    protocol_of,
    sample_scanner,
    scan,
)

STILL = {
    "noise_hu": 20.0,
    "field_of_view_mm": 300.0,
    "circular": False,
    "offset_mm": (0.0, 0.0),
    "table_gap_mm": 5.0,
}
SHAPE = (20, 40, 44)


def water(hu: float = 30.0, region: int = 0) -> Canvas:
    frame = Frame.regular(SHAPE, (3.0, 1.5, 1.5))
    return Canvas(np.full(SHAPE, hu, np.float32), np.full(SHAPE, region, np.uint8), frame)


def test_shifted_lies_outside_of_what_training_sees() -> None:
    rng = np.random.default_rng(0)
    usual = [sample_scanner(rng, 390.0, DEFAULT_PROTOCOL) for _ in range(300)]
    other = [sample_scanner(rng, 390.0, SHIFTED_PROTOCOL) for _ in range(300)]
    assert {s.kernel for s in usual} == set(DEFAULT_PROTOCOL.kernels)
    assert {s.kernel for s in other} == set(SHIFTED_PROTOCOL.kernels)
    assert not {s.kernel for s in usual} & {s.kernel for s in other}
    blurs = [KERNELS[kernel].blur_mm for kernel in DEFAULT_PROTOCOL.kernels]
    assert all(not min(blurs) <= KERNELS[k].blur_mm <= max(blurs) for k in SHIFTED_PROTOCOL.kernels)
    assert max(s.noise_hu for s in usual) < min(s.noise_hu for s in other)
    assert max(s.slice_blur for s in usual) <= min(s.slice_blur for s in other)
    for pick in (lambda s: abs(s.breath_mm), lambda s: np.hypot(*(s.heart_shift_mm or (0.0, 0.0)))):
        assert max(map(pick, usual)) <= min(size for s in other if (size := pick(s)))
        assert np.mean([pick(s) > 0 for s in other]) > 2 * np.mean([pick(s) > 0 for s in usual])


def test_a_protocol_changes_the_scan_and_not_the_findings() -> None:
    spacing = (12.0, 8.0, 8.0)
    usual, other, again = (
        generate_phantom(8, spacing_mm=spacing, protocol=p) for p in (None, "shifted", "shifted")
    )
    assert np.array_equal(other.volume.voxels_DHW, again.volume.voxels_DHW)
    assert other.truth == again.truth
    assert other.patient["protocol"] == "shifted"
    assert other.patient["kernel"] in SHIFTED_PROTOCOL.kernels
    assert usual.patient["kernel"] in DEFAULT_PROTOCOL.kernels
    assert {item.finding for item in usual.truth} == {item.finding for item in other.truth}
    assert usual.patient["sex"] == other.patient["sex"]
    with pytest.raises(ValueError, match="'shifted'"):
        generate_phantom(8, spacing_mm=spacing, protocol="odd")
    assert protocol_of(None) is DEFAULT_PROTOCOL


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_noise_is_that_of_the_kernel_and_the_slice(kernel: str) -> None:
    noisy = scan(water(), Scanner(kernel=kernel, **STILL), np.random.default_rng(0))  # type: ignore[arg-type]
    level = 20.0 / np.sqrt(3.0) * KERNELS[kernel].noise  # type: ignore[index]
    assert noisy[5:15, 8:-8, 8:-8].std() == pytest.approx(level, rel=0.15)
    assert noisy.mean() == pytest.approx(30.0, abs=2.0)


def test_sharper_kernels_keep_finer_detail() -> None:
    contrast = {}
    for kernel in KERNELS:
        canvas = water()
        canvas.hu_DHW[:, :, ::4] = 400.0
        quiet = Scanner(kernel=kernel, **{**STILL, "noise_hu": 0.0})  # type: ignore[arg-type]
        image = scan(canvas, quiet, np.random.default_rng(0)).astype(float)
        contrast[kernel] = image[10, 20, 12:32].std()
    order = ["very soft", "soft", "standard", "sharp", "very sharp"]
    assert [contrast[kernel] for kernel in order] == sorted(contrast.values())


def test_thick_slices_blur_along_z_only() -> None:
    canvas = water(0.0)
    canvas.hu_DHW[10] = 1000.0
    canvas.hu_DHW[:, 20:] = 0.0
    thick = Scanner(kernel="sharp", **{**STILL, "noise_hu": 0.0}, slice_blur=0.4)  # type: ignore[arg-type]
    image = scan(canvas, thick, np.random.default_rng(0))
    assert 20 < image[9, 10, 20] < 200
    assert image[9, 10, 20] == image[11, 10, 20]
    assert abs(int(image[5, 10, 20])) <= 1


def test_the_heart_beats_and_the_rest_stands_still() -> None:
    canvas = water(-800.0)
    heart = (slice(6, 14), slice(14, 26), slice(14, 28))
    canvas.hu_DHW[heart] = 50.0
    canvas.regions_DHW[heart] = REGION_IDS["heart"]
    before = canvas.hu_DHW.copy()
    move_heart(canvas, (0.0, 3.0))
    change = canvas.hu_DHW - before
    assert np.abs(change).max() <= 850 * GHOST_SHARE + 1e-3, "the first contour keeps most of the weight"
    assert change[9, 20, 28] > 100, "the second contour lies 3 mm to the left"
    assert change[9, 20, 14] < -100
    assert not change[:2].any()
    assert not change[:, :8].any()
    still = water(-800.0)
    move_heart(still, (3.0, 3.0))
    assert (still.hu_DHW == -800).all(), "no heart, no motion"


@pytest.mark.parametrize("shift_mm", [4.5, -4.5])
def test_breath_moves_the_bases(shift_mm: float) -> None:
    canvas = water(-850.0, REGION_IDS["right_lower_lobe"])
    canvas.hu_DHW[:5] = 50.0
    canvas.regions_DHW[:5] = REGION_IDS["liver"]
    before = canvas.hu_DHW.copy()
    move_diaphragm(canvas, shift_mm)
    change = canvas.hu_DHW - before
    assert (change[5].mean() > 50) == (shift_mm > 0), "a rising diaphragm shows above itself"
    assert (change[4].mean() < -50) == (shift_mm < 0)
    assert not change[14:].any()
    assert np.abs(change).max() <= 900 * GHOST_SHARE + 1e-3


def test_metal_casts_rays_in_its_own_slices() -> None:
    canvas = water()
    canvas.hu_DHW[10, 18:24, 18:24] = 3000.0
    canvas.hu_DHW[3, 5, 5] = 3000.0
    before = canvas.hu_DHW.copy()
    add_streaks(canvas, 80.0, np.random.default_rng(0))
    change = canvas.hu_DHW - before
    assert change[10].std() > 10
    assert not change[10, 18:24, 18:24].any()
    assert not np.delete(change, 10, axis=0).any(), "a wire of one voxel is too small"
    near, far = np.abs(change[10, 12:30, 12:30]).mean(), np.abs(change[10, :4]).mean()
    assert near > far
