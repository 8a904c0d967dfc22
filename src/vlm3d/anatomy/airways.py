"""The trachea and the large bronchi: a chain of round air-filled sections near the midline, then growth without leaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.body import Body
from vlm3d.anatomy.grid import FineBox, Mask, WorkGrid
from vlm3d.anatomy.morphology import closed, touching
from vlm3d.volume import Volume

TRACHEA_HU = -600.0
AREA_MM2 = (40.0, 900.0)
MAX_MIDLINE_OFFSET_MM = 60.0
MIN_CHAIN_MM = 20.0
GROWTH_HU = np.arange(-975.0, -649.0, 25.0)
MAX_BRONCHI_ML = 35.0
BELOW_CARINA_MM, BESIDE_MM, AROUND_MM = 90.0, 80.0, 60.0


@dataclass(frozen=True)
class Airways:
    """Trachea and bronchi.

    Attributes:
        mask_DHW: On the coarse grid.
        fine_DHW: On the finer grid of `box`, None when no trachea was found.
        box: The finer grid.
        carina_DHW: Where the trachea splits, on the coarse grid; None when unknown.
        trachea_w: Mean position of the trachea from right to left, on the coarse grid.
    """

    mask_DHW: Mask
    fine_DHW: Mask | None = None
    box: FineBox | None = None
    carina_DHW: tuple[float, float, float] | None = None
    trachea_w: float | None = None


@dataclass(frozen=True)
class _Section:
    """One axial section of a possible trachea."""

    d: int
    label: int
    area_mm2: float
    center_HW: tuple[float, float]


def find_airways(volume: Volume, grid: WorkGrid, body: Body) -> Airways:
    """Find trachea, carina and main bronchi."""
    nothing = Airways(np.zeros(grid.shape_DHW, dtype=bool))
    labels_DHW = np.zeros(grid.shape_DHW, dtype=np.int32)
    chain = _trachea_chain(grid, body, labels_DHW)
    if not chain:
        return nothing
    seed = np.zeros(grid.shape_DHW, dtype=bool)
    for section in chain:
        seed[section.d] = labels_DHW[section.d] == section.label
    bottom = chain[-1]
    box = _search_box(grid, chain)
    fine = grid.finer(volume, box)
    tree = _grow(grid, fine, fine.from_coarse(seed), bottom.d)
    carina_d = _split_level(tree, fine, chain, grid.step_mm)
    trachea_w = float(np.mean([section.center_HW[1] for section in chain]))
    carina = (carina_d, bottom.center_HW[0], bottom.center_HW[1])
    return Airways(fine.to_coarse(tree, grid.shape_DHW), tree, fine, carina, trachea_w)


def _trachea_chain(grid: WorkGrid, body: Body, labels_DHW: NDArray[np.int32]) -> list[_Section]:
    """The longest chain of round air sections near the body's midline, from superior to inferior."""
    air = body.inner_air_DHW & (grid.hu_DHW < TRACHEA_HU)
    profile = body.inner_air_DHW.sum((1, 2))
    if not profile.any():
        return []
    cumulated = np.cumsum(profile) / profile.sum()
    lowest = int(np.searchsorted(cumulated, 0.35))
    chains: list[list[_Section]] = []
    open_chains: list[list[_Section]] = []
    for d in range(grid.shape_DHW[0] - 1, lowest, -1):
        sections = _sections(grid, body, air[d], d, labels_DHW)
        still_open: list[list[_Section]] = []
        taken: set[int] = set()
        for chain in sorted(open_chains, key=len, reverse=True):
            match = _continuation(chain[-1], sections, taken, grid.step_mm)
            if match is not None:
                taken.add(match.label)
                still_open.append([*chain, match])
            elif chain[-1].d - d < 3:
                still_open.append(chain)
            else:
                chains.append(chain)
        still_open.extend([section] for section in sections if section.label not in taken)
        open_chains = still_open
    chains.extend(open_chains)
    best = max(chains, key=len, default=[])
    return best if len(best) * grid.step_mm >= MIN_CHAIN_MM else []


def _sections(
    grid: WorkGrid, body: Body, air_HW: Mask, d: int, labels_DHW: NDArray[np.int32]
) -> list[_Section]:
    if not air_HW.any():
        return []
    labels, count = ndimage.label(air_HW)
    labels_DHW[d] = labels
    midline_w = float(np.mean(np.nonzero(body.mask_DHW[d])[1]))
    sections = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        area_mm2 = float((labels[box] == index).sum()) * grid.step_mm**2
        height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
        if not AREA_MM2[0] <= area_mm2 <= AREA_MM2[1] or max(height, width) > 2.5 * min(height, width):
            continue
        h, w = ndimage.center_of_mass(labels[box] == index)
        center = (h + box[0].start, w + box[1].start)
        if abs(center[1] - midline_w) * grid.step_mm <= MAX_MIDLINE_OFFSET_MM:
            sections.append(_Section(d, index, area_mm2, center))
    return sections


def _continuation(
    last: _Section, sections: list[_Section], taken: set[int], step_mm: float
) -> _Section | None:
    """The section below that continues a chain: close by and of a similar size."""
    best, best_mm = None, 8.0
    for section in sections:
        moved_mm = float(np.hypot(*np.subtract(section.center_HW, last.center_HW))) * step_mm
        alike = 0.4 < section.area_mm2 / last.area_mm2 < 2.5
        if section.label not in taken and alike and moved_mm < best_mm:
            best, best_mm = section, moved_mm
    return best


def _search_box(grid: WorkGrid, chain: list[_Section]) -> tuple[slice, slice, slice]:
    bottom, top = chain[-1], chain[0]
    low = (
        bottom.d - grid.voxels(BELOW_CARINA_MM),
        int(min(s.center_HW[0] for s in chain)) - grid.voxels(AROUND_MM),
        int(bottom.center_HW[1]) - grid.voxels(BESIDE_MM),
    )
    high = (
        top.d + 2,
        int(max(s.center_HW[0] for s in chain)) + grid.voxels(AROUND_MM),
        int(bottom.center_HW[1]) + grid.voxels(BESIDE_MM),
    )
    d, h, w = (slice(max(0, a), min(n, b)) for a, b, n in zip(low, high, grid.shape_DHW, strict=True))
    return d, h, w


def _grow(grid: WorkGrid, fine: FineBox, seed: Mask, bottom_d: int) -> Mask:
    """The tree at the highest threshold that does not leak into the lungs."""
    voxel_ml = (grid.step_mm / fine.scale) ** 3 / 1000
    below = slice(0, max(0, bottom_d - fine.start_DHW[0]) * fine.scale)
    tree = seed & (fine.hu_DHW < TRACHEA_HU)
    for threshold in GROWTH_HU:
        grown = touching(fine.hu_DHW < threshold, seed)
        if grown[below].sum() * voxel_ml > MAX_BRONCHI_ML:
            break
        tree = tree | grown
    upper = slice(below.stop, None)
    wide = closed(tree, 2 * fine.scale)
    tree[upper] |= wide[upper] & (fine.hu_DHW[upper] < TRACHEA_HU + 200) & wide[upper]
    return closed(tree, 1.5)


def _split_level(tree: Mask, fine: FineBox, chain: list[_Section], step_mm: float) -> float:
    """The coarse level of the carina: the highest one below mid-trachea with two large sections side by side."""
    pixel_mm2 = (step_mm / fine.scale) ** 2
    middle = chain[len(chain) // 2].d
    for d in range((middle - fine.start_DHW[0]) * fine.scale, -1, -1):
        labels, count = ndimage.label(tree[d])
        if count < 2:
            continue
        areas = np.bincount(labels.ravel())[1:] * pixel_mm2
        large = np.flatnonzero(areas > 40.0)
        if large.size >= 2:
            w = [ndimage.center_of_mass(labels == i + 1)[1] for i in large]
            if (max(w) - min(w)) * step_mm / fine.scale > 12.0:
                return fine.start_DHW[0] + (d + 1) / fine.scale
    return float(chain[-1].d)
