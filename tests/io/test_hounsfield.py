"""What a CT in HU looks like, and what the reader says of everything else."""

from __future__ import annotations

import numpy as np
import pytest

from support.scan_files import affine_of, reoriented, small_chest
from vlm3d.errors import NotAChestCTError
from vlm3d.io.hounsfield import checked_hounsfield, enclosed_air_ml, rescaled
from vlm3d.volume import Volume

CHEST = small_chest()
AFFINE = affine_of()


def checked(voxels: np.ndarray) -> Volume:
    """The check, on the small chest's grid."""
    return checked_hounsfield(Volume(voxels, AFFINE, source="ct.nii.gz"))


def test_a_chest_passes_unchanged_and_without_a_word() -> None:
    scan = checked(CHEST)
    assert scan.voxels_DHW is CHEST or np.shares_memory(scan.voxels_DHW, CHEST)
    assert scan.notes == ()


@pytest.mark.parametrize("padding", [-2048, -3024, -2000, -32768])
def test_padding_is_replaced_and_named(padding: int) -> None:
    voxels = CHEST.copy()
    voxels[:, :4] = padding
    scan = checked(voxels)
    assert (scan.voxels_DHW[:, :4] == -1024).all()
    assert str(padding) in scan.notes[0]
    assert voxels.min() == padding, "the input stays as it was"


def test_noise_below_air_is_leveled_without_a_note() -> None:
    voxels = CHEST.copy()
    voxels[::5, ::7, ::11] = -1090
    scan = checked(voxels)
    assert scan.voxels_DHW.min() == -1024
    assert scan.notes == ()


@pytest.mark.parametrize(
    ("voxels", "words"),
    [
        (np.full_like(CHEST, 40), "constant"),
        ((CHEST.astype(np.float32) + 1024) / 4024, "scaled to 0..1"),
        (np.clip(CHEST / 1000.0, -1, 1).astype(np.float32), "scaled to -1..1"),
        (np.clip((CHEST + 1000) / 6.0, 0, 255).astype(np.int16), "windowed to 0..255"),
        (((CHEST - CHEST.mean()) / CHEST.std()).astype(np.float32), "normalized"),
        ((CHEST.astype(np.int32) + 1024).astype(np.int16), "not yet applied"),
        (np.clip(CHEST, -160, 240), "narrow window"),
        (CHEST - 1024, "applied twice"),
        ((2 * CHEST.astype(np.int32) - 1024).astype(np.int16), "applied twice"),
        (np.where(CHEST > -500, 1500, CHEST).astype(np.int16), "no soft tissue"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_in_hu_is_refused_by_its_kind(voxels: np.ndarray, words: str) -> None:
    with pytest.raises(NotAChestCTError, match=words) as caught:
        checked(voxels)
    assert str(caught.value).startswith("ct.nii.gz ")


def test_air_scattered_by_a_sharp_kernel_at_low_dose_is_not_taken_for_a_twofold_intercept() -> None:
    noise = np.random.default_rng(1).normal(0, 150, CHEST.shape)
    scan = checked(np.rint(CHEST + noise).astype(np.int16))
    assert scan.voxels_DHW.min() == -1024


def test_one_bright_voxel_does_not_hide_scaled_values() -> None:
    voxels = ((CHEST.astype(np.float32) + 1024) / 4024).astype(np.float32)
    voxels[3, 3, 3] = 3000
    with pytest.raises(NotAChestCTError):
        checked(voxels)


def test_a_twofold_intercept_is_found_beside_padding() -> None:
    voxels = CHEST - 1024
    voxels[:, :8] = -3072
    with pytest.raises(NotAChestCTError, match="applied twice"):
        checked(voxels)


def test_a_noise_free_phantom_with_a_twofold_intercept_is_refused() -> None:
    with pytest.raises(NotAChestCTError, match="rescale"):
        checked(np.where(CHEST > -500, -984, np.where(CHEST > -930, -1874, -2024)).astype(np.int16))


def test_a_body_without_lungs_is_noted_not_refused() -> None:
    head = CHEST.copy()
    head[(head > -930) & (head < -500)] = 35
    scan = checked(head)
    assert any("may not be a scan of a chest" in note for note in scan.notes)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_enclosed_air_is_measured_in_the_axial_plane_whatever_the_axes(order: tuple[int, ...]) -> None:
    lungs_ml = float(((CHEST > -930) & (CHEST < -500)).sum() * 8 * 7 * 6.5 / 1000)
    found = enclosed_air_ml(*reoriented(CHEST, AFFINE, order, (True, False, True)))
    assert found == pytest.approx(lungs_ml, rel=0.05)


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "dtype"),
    [
        (np.uint16, 1, -1024, np.int16),
        (np.int16, 2, 0, np.int16),
        (np.int32, 1, 0, np.int16),
        (np.uint8, 0.5, 0, np.float32),
        (np.float64, 1, 0.5, np.float32),
        (np.uint16, 100, 0, np.float32),
        (np.float32, 1, 0, np.int16),
    ],
)
def test_rescaling_is_exact_and_takes_the_smallest_type(
    stored: type, slope: float, intercept: float, dtype: type
) -> None:
    values = np.arange(0, 240, dtype=stored).reshape(4, 6, 10) * stored(1 if stored == np.uint8 else 4)
    result = rescaled(values, slope, intercept)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, values.astype(np.float64) * slope + intercept)


def test_values_beyond_int16_stay_true() -> None:
    values = np.array([[[-1000.0, 40_000.0]]])
    np.testing.assert_array_equal(rescaled(values), values.astype(np.float32))
