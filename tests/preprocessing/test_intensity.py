"""The window keeps what a radiologist must see."""

from __future__ import annotations

import numpy as np
import pytest

from vlm3d.config import PreprocessingConfig
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE, window_in_place

DEFAULT = PreprocessingConfig().hu_window


def windowed(*hu: float, window: tuple[float, float] = DEFAULT) -> list[float]:
    return window_in_place(np.array(hu, np.float32), window).tolist()


def test_the_window_maps_its_ends_to_minus_one_and_one_and_clips() -> None:
    assert windowed(-3024, -1000, 0, 500, 1000, 3071) == pytest.approx([-1, -1, 0, 0.5, 1, 1])
    assert windowed(-160, 40, 240, window=(-160, 240)) == pytest.approx([-1, 0, 1])
    assert windowed(-2048)[0] == OUTSIDE_VALUE


@pytest.mark.parametrize(
    ("darker", "brighter"),
    [(-950, -850), (-850, -700), (-700, -300), (-100, 40), (0, 60), (60, 400), (400, 900)],
)
def test_lungs_soft_tissue_and_bone_keep_their_contrast(darker: float, brighter: float) -> None:
    low, high = windowed(darker, brighter)
    assert high - low == pytest.approx((brighter - darker) / 1000, rel=1e-4)
    assert high - low > 0.05


def test_it_works_in_place() -> None:
    hu = np.array([[-500.0, 500.0]], np.float32)
    assert window_in_place(hu, DEFAULT) is hu
