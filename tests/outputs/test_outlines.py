"""Outlines: true area and place, holes, any noise within its budget."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from vlm3d.outputs.outlines import UNITS_PER_MM, outline_path, runs


def rings(path: str) -> list[NDArray[np.int64]]:
    """The path's closed rings as points (x, y), read as a browser reads them."""
    found = []
    for subpath in path.split("z")[:-1]:
        head, steps = subpath[1:].split("l")
        start = np.array(head.split(), dtype=np.int64)
        moves = np.array(steps.split(), dtype=np.int64).reshape(-1, 2)
        found.append(np.vstack([start, start + np.cumsum(moves, axis=0)]))
    return found


def enclosed_mm2(path: str) -> float:
    total = 0.0
    for points in rings(path):
        x, y = points.T
        total += 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return abs(total) / UNITS_PER_MM**2


def ring_mask(outer: float = 40, inner: float = 15) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[:128, :128]
    squared = (rows - 60) ** 2 + (columns - 70) ** 2
    return (squared < outer**2) & (squared >= inner**2)


def test_no_lesion_no_path() -> None:
    assert outline_path(np.zeros((20, 20), bool), (1, 1)) == ""


def test_a_ring_keeps_its_hole_and_area() -> None:
    mask = ring_mask()
    path = outline_path(mask, (0.7, 0.7))
    assert len(rings(path)) == 2
    assert enclosed_mm2(path) == pytest.approx(mask.sum() * 0.49, rel=0.02)


def test_it_lies_where_the_pixels_lie() -> None:
    mask = np.zeros((30, 40), bool)
    mask[10:16, 20:30] = True
    points = np.vstack(rings(outline_path(mask, (2.0, 0.5)))) / UNITS_PER_MM
    np.testing.assert_allclose(points.min(axis=0), [20 * 0.5, 10 * 2.0], atol=0.11)
    np.testing.assert_allclose(points.max(axis=0), [30 * 0.5, 16 * 2.0], atol=0.11)


def test_a_single_pixel_and_a_lesion_at_the_border_are_closed() -> None:
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    assert len(rings(outline_path(mask, (1, 1)))) == 1
    assert enclosed_mm2(outline_path(np.ones((9, 9), bool), (1, 1))) == pytest.approx(81, rel=0.02)


def test_straight_edges_cost_nothing() -> None:
    assert len(rings(outline_path(np.ones((300, 300), bool), (1, 1)))[0]) == 8


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.7])
def test_noise_stays_within_its_budget_and_is_quick(share: float) -> None:
    mask = np.random.default_rng(0).random((512, 512)) < share
    started = time.perf_counter()
    path = outline_path(mask, (0.7, 0.7), max_chars=3_000)
    assert len(path) <= 3_000
    assert time.perf_counter() - started < 0.5


def test_a_coarser_outline_still_covers_the_lesion() -> None:
    mask = ring_mask(inner=0)
    fine, coarse = outline_path(mask, (1, 1)), outline_path(mask, (1, 1), max_chars=400)
    assert len(coarse) <= 400 < len(fine)
    assert enclosed_mm2(coarse) == pytest.approx(enclosed_mm2(fine), rel=0.1)


def test_runs_of_flags() -> None:
    assert runs(np.array([True, False, True, True, False])) == [(0, 1), (2, 4)]
    assert runs(np.array([], dtype=bool)) == []
