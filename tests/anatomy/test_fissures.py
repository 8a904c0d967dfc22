"""Fissures are found where vessels stay away from a surface, and where a phantom has them; else they are the usual ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.fissures import USUAL, Surface, find_fissures
from vlm3d.anatomy.lobes import divide_lung
from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.anatomy.segmentation import segment_anatomy
from vlm3d.datasets.phantom import generate_phantom

SHAPE = (88, 64, 44)
STEP_MM = 2.5


def lung() -> NDArray[np.bool_]:
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    return np.pad(z**2 + y**2 + x**2 < 1, 4)


def shares() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    height, depth, across = np.meshgrid(*((np.arange(-4, n + 4) + 0.5) / n for n in SHAPE), indexing="ij")
    return height, depth, across


def vessels_around(surface: Surface, seed: int = 0) -> NDArray[np.float32]:
    """HU of a lung full of small vessels, but for 8 mm on both sides of a surface."""
    rng = np.random.default_rng(seed)
    height, depth, across = shares()
    hu = np.full(height.shape, -850.0, np.float32)
    dots = ndimage.binary_dilation(rng.random(hu.shape) < 0.004)
    hu[dots & (np.abs(height - surface.height(depth, across)) * SHAPE[0] * STEP_MM > 8)] = -100.0
    return hu + rng.normal(0, 20, hu.shape).astype(np.float32)


@pytest.mark.parametrize("surface", [Surface(0.15, 0.7, 0.1), Surface(-0.1, 0.9, -0.05, 0.08, 0.03)])
def test_a_surface_that_vessels_avoid_is_found(surface: Surface) -> None:
    found = find_fissures(vessels_around(surface), lung(), "left", STEP_MM)
    assert found.horizontal is None
    _, depth, across = (part[lung()] for part in shares())
    off_mm = (found.oblique.height(depth, across) - surface.height(depth, across)) * SHAPE[0] * STEP_MM
    assert np.abs(off_mm).mean() < 4


def test_a_lung_that_shows_nothing_keeps_the_usual_ones() -> None:
    even = np.full(lung().shape, -850.0, np.float32)
    for side in ("right", "left"):
        assert find_fissures(even, lung(), side, STEP_MM) == USUAL[side]
        assert find_fissures(even, np.zeros_like(lung()), side, STEP_MM) == USUAL[side]
    tiny = np.zeros_like(lung())
    tiny[40:43, 30:32, 20] = True
    assert find_fissures(even, tiny, "right", STEP_MM) == USUAL["right"]


def test_lobes_lie_between_the_fissures() -> None:
    ids = np.zeros(lung().shape, np.uint8)
    divide_lung(lung(), "right", USUAL["right"], ids)
    assert not ids[~lung()].any()
    assert set(ids[lung()]) == {REGION_IDS[f"right_{part}_lobe"] for part in ("upper", "middle", "lower")}
    low, high = ids[8], ids[-9]
    assert set(low[low > 0]) <= {REGION_IDS["right_lower_lobe"], REGION_IDS["right_middle_lobe"]}
    assert set(high[high > 0]) == {REGION_IDS["right_upper_lobe"]}
    assert ids[50, 8, 26] == REGION_IDS["right_upper_lobe"]
    assert ids[30, 20, 26] == REGION_IDS["right_middle_lobe"]
    assert ids[50, 62, 26] == REGION_IDS["right_lower_lobe"]


@pytest.mark.parametrize("seed", [7, 8])
def test_the_lobes_of_a_phantom_are_found(seed: int) -> None:
    phantom = generate_phantom(seed, findings={}, spacing_mm=(2.5, 1.5, 1.5))
    found, true = segment_anatomy(phantom.volume).labels_DHW, phantom.regions.labels_DHW
    both = np.isin(found, LUNG_IDS) & np.isin(true, LUNG_IDS)
    assert (found == true)[both].mean() > 0.97
