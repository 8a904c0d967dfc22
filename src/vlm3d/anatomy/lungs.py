"""Right and left lung: air inside the chest, neither airway nor bowel gas, with vessels and small lesions filled in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.airways import Airways
from vlm3d.anatomy.body import Body
from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.morphology import closed, grow, hull_slices, medians_of, shrink, signed_distance
from vlm3d.volume import Volume

MIN_CHEST_ML = 150.0
MIN_PIECE_ML = 2.0
ROOM_AIR_HU = -985.0
GAS_HU = -955.0
CLOSING_MM = 9.0
EDGE_HU = -300.0
MAX_BETWEEN_LUNGS = 0.5
"""Of the smaller lung's largest sagittal section: how large the smallest between two lungs is at most."""


@dataclass(frozen=True)
class Lungs:
    """Both lungs on the coarse grid; either may be empty.

    Attributes:
        right_DHW: The patient's right lung.
        left_DHW: The patient's left lung.
        aerated_DHW: The part of both that holds air.
    """

    right_DHW: Mask
    left_DHW: Mask
    aerated_DHW: Mask

    @property
    def both_DHW(self) -> Mask:
        """Right and left lung."""
        return self.right_DHW | self.left_DHW

    @property
    def middle_w(self) -> float | None:
        """The place midway between both lungs, on the coarse grid; None when one is missing."""
        sides = [np.nonzero(side.any((0, 1)))[0] for side in (self.right_DHW, self.left_DHW)]
        return float(np.mean([side.mean() for side in sides])) if all(side.size for side in sides) else None


def find_lungs(grid: WorkGrid, body: Body, airways: Airways) -> Lungs | None:
    """Find both lungs; None when the scan holds no lung worth the name (not a chest, or not in HU)."""
    air = body.inner_air_DHW & ~ndimage.binary_dilation(airways.mask_DHW)
    pieces, sizes_ml = _lung_pieces(grid, air)
    if not pieces or sum(sizes_ml) < MIN_CHEST_ML:
        return None
    right, left = _sides(grid, body, airways, pieces, sizes_ml)
    aerated = right | left
    blocked = ndimage.binary_dilation(airways.mask_DHW) | ~body.mask_DHW
    radius = CLOSING_MM / grid.step_mm
    right, left = (_without_vessels(lung, radius, blocked) for lung in (right, left))
    both = right & left
    if both.any():
        nearer_right = signed_distance(right & ~both) <= signed_distance(left & ~both)
        right, left = right & (~both | nearer_right), left & (~both | ~nearer_right)
    return Lungs(right, left, aerated)


def _without_vessels(lung: Mask, radius: float, blocked: Mask) -> Mask:
    if not lung.any():
        return lung
    box = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in ndimage.find_objects(lung.view(np.uint8))[0])
    filled = lung.copy()
    filled[box] = ndimage.binary_fill_holes(closed(lung[box], radius)) & ~blocked[box]
    return filled | lung


def _lung_pieces(grid: WorkGrid, air: Mask) -> tuple[list[Mask], list[float]]:
    """Connected pieces of lung, largest first; bowel gas is left out."""
    labels, count = ndimage.label(air)
    if not count:
        return [], []
    sizes_ml = np.bincount(labels.ravel(), minlength=count + 1)[1:] * grid.voxel_ml
    candidates = np.flatnonzero(sizes_ml >= MIN_PIECE_ML) + 1
    if not candidates.size:
        return [], []
    bounds = ndimage.find_objects(labels)
    medians = medians_of(grid.hu_DHW, labels, bounds, candidates)
    kept = [int(i) for i, median in zip(candidates, medians, strict=True) if median > ROOM_AIR_HU]
    if not kept:
        return [], []
    main = max(kept, key=lambda i: sizes_ml[i - 1])
    kept = [
        i for i in kept if sizes_ml[i - 1] > 0.2 * sizes_ml[main - 1] or not _is_gas(grid, labels, bounds, i)
    ]
    lowest = min(bounds[i - 1][0].start for i in kept if sizes_ml[i - 1] >= 0.3 * sizes_ml[main - 1])
    kept = [i for i in kept if bounds[i - 1][0].stop > lowest]
    kept.sort(key=lambda i: -sizes_ml[i - 1])
    return [labels == i for i in kept], [float(sizes_ml[i - 1]) for i in kept]


def _is_gas(
    grid: WorkGrid, labels: NDArray[np.int32], bounds: list[tuple[slice, slice, slice]], index: int
) -> bool:
    """Whether a piece is pure gas inside (bowel, stomach), which lung with its vessels and septa is not."""
    box = bounds[index - 1]
    piece = np.pad(labels[box] == index, 1)
    core = ndimage.binary_erosion(piece)[1:-1, 1:-1, 1:-1]
    values = grid.hu_DHW[box][core if core.any() else labels[box] == index]
    return bool(np.percentile(values, 25) < GAS_HU)


def _midline_w(body: Body, airways: Airways) -> float:
    """The middle of the body from right to left, on the coarse grid."""
    if airways.trachea_w is not None:
        return airways.trachea_w
    return float(np.mean(np.nonzero(body.mask_DHW.any((0, 1)))[0]))


def _sides(
    grid: WorkGrid, body: Body, airways: Airways, pieces: list[Mask], sizes_ml: list[float]
) -> tuple[Mask, Mask]:
    """Right and left lung, from pieces of which one may hold both."""
    midline_w = _midline_w(body, airways)
    first, rest = pieces[0], pieces[1:]
    columns = first.sum((0, 1))
    share_right = columns[: round(midline_w)].sum() / columns.sum()
    seeds: list[Mask]
    if 0.15 < share_right < 0.85 and _holds_two(columns, round(midline_w)):
        seeds = list(_parted(first, midline_w))
    elif rest and sizes_ml[1] >= 0.1 * sizes_ml[0]:
        seeds = [first, rest.pop(0)]
    else:
        seeds = [first]
    centers = [float(ndimage.center_of_mass(seed)[2]) for seed in seeds]
    if len(seeds) == 2:
        if centers[0] > centers[1]:
            seeds, centers = seeds[::-1], centers[::-1]
        right, left = seeds[0].copy(), seeds[1].copy()
        midline_w = (centers[0] + centers[1]) / 2
    else:
        if airways.trachea_w is None and _is_cut(body):
            midline_w = _medial_w(first)
        empty = np.zeros_like(first)
        right, left = (first.copy(), empty) if centers[0] < midline_w else (empty, first.copy())
    for piece in rest:
        target = right if ndimage.center_of_mass(piece)[2] < midline_w else left
        target |= piece
    return right, left


def _holds_two(columns_W: NDArray[np.int64], middle_w: int) -> bool:
    """Whether a piece is two lungs that touch: what lies between them is much thinner than either."""
    right_w, left_w = int(columns_W[:middle_w].argmax()), middle_w + int(columns_W[middle_w:].argmax())
    thinnest = columns_W[right_w : left_w + 1].min()
    return bool(thinnest < MAX_BETWEEN_LUNGS * min(columns_W[right_w], columns_W[left_w]))


def _is_cut(body: Body) -> bool:
    """Whether the scan does not reach both flanks, so that its middle need not be the patient's."""
    return bool(body.mask_DHW[:, :, 0].any() or body.mask_DHW[:, :, -1].any())


def _medial_w(lung: Mask) -> float:
    """The edge of a lung that faces the mediastinum: heart, hilum and spine dent it, the ribs do not."""
    dents_w, lung_w = (np.nonzero(mask)[2] for mask in (hull_slices(lung) & ~lung, lung))
    faces_left = dents_w.size > 0 and dents_w.mean() > lung_w.mean()
    return float(lung_w.max() + 1 if faces_left else lung_w.min() - 1)


def _parted(joined: Mask, midline_w: float) -> tuple[Mask, Mask]:
    """Cut lungs that touch: erode until two large pieces come apart, then give each voxel to the nearer one."""
    depth = -signed_distance(joined)
    total = joined.sum()
    for radius in np.arange(1.0, 7.0):
        labels, count = ndimage.label(depth > radius)
        sizes = np.bincount(labels.ravel(), minlength=3)
        sizes[0] = 0
        second, first = np.argsort(sizes)[-2:]
        if sizes[second] > 0.08 * total:
            to_first, to_second = signed_distance(labels == first), signed_distance(labels == second)
            nearer = to_first <= to_second
            return joined & nearer, joined & ~nearer
    columns = np.arange(joined.shape[2])
    on_right = np.broadcast_to(columns < midline_w, joined.shape)
    return joined & on_right, joined & ~on_right


def refine_lungs(volume: Volume, grid: WorkGrid, lung_DHW: Mask) -> tuple[tuple[slice, slice, slice], Mask]:
    """A lung's outline on the scan's own grid: the coarse outline, redrawn where air meets tissue."""
    outer = grow(lung_DHW, 1.5)
    box, near = grid.mask_to_full(outer)
    if not near.size:
        return box, near
    inner = shrink(lung_DHW, 1.0)
    full = near & (np.asarray(volume.voxels_DHW)[box] < EDGE_HU)
    inner_box, core = grid.mask_to_full(inner)
    if core.size:
        offset = tuple(
            slice(i.start - b.start, i.stop - b.start) for i, b in zip(inner_box, box, strict=True)
        )
        full[offset] |= core
    return box, full


def lung_levels(lung_DHW: Mask) -> tuple[int, int] | None:
    """Lowest and highest level of a lung, on the grid of the mask."""
    levels: NDArray[np.intp] = np.nonzero(lung_DHW.any((1, 2)))[0]
    return (int(levels[0]), int(levels[-1])) if levels.size else None
