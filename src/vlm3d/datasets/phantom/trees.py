"""Branching trees of vessels and airways that fill a lobe, and their drawing with partial volume.

A tree grows toward the points that it has to supply: each branch runs some way to the middle of its points, then the
points are split in two by a plane through that middle, and each half gets a branch of its own, until a branch has one
point left. A branch's radius follows from the number of points behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm3d.datasets.phantom.frame import Array, Frame, Slices

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Tubes:
    """Straight tapering pieces of a tree; (z, y, x) in mm.

    Attributes:
        start_N3: Where each piece begins.
        end_N3: Where it ends.
        radius_N2: Radius at both ends.
        generation_N: 0 at the root.
        region_N: Region id of the lobe that the tree fills, 0 outside the lobes.
    """

    start_N3: Points
    end_N3: Points
    radius_N2: Points
    generation_N: NDArray[np.intp]
    region_N: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.start_N3)

    def pick(self, keep_N: NDArray[np.bool_]) -> Tubes:
        """Some of the pieces."""
        return Tubes(
            self.start_N3[keep_N],
            self.end_N3[keep_N],
            self.radius_N2[keep_N],
            self.generation_N[keep_N],
            self.region_N[keep_N],
        )

    def with_radius(self, radius_N2: Points) -> Tubes:
        """The same pieces with other radii."""
        return Tubes(self.start_N3, self.end_N3, radius_N2, self.generation_N, self.region_N)

    def scaled(self, factor_zyx: ArrayLike) -> Tubes:
        """The same tree in a patient of another size; radii stay."""
        factor = np.asarray(factor_zyx, np.float64)
        return Tubes(
            self.start_N3 * factor, self.end_N3 * factor, self.radius_N2, self.generation_N, self.region_N
        )


def join(trees: list[Tubes]) -> Tubes:
    """Several trees as one."""
    return Tubes(
        *(
            np.concatenate([getattr(tree, name) for tree in trees])
            for name in ("start_N3", "end_N3", "radius_N2", "generation_N", "region_N")
        )
    )


def _unit(vectors_N3: Points) -> Points:
    return vectors_N3 / np.maximum(np.linalg.norm(vectors_N3, axis=-1, keepdims=True), 1e-9)


def grow(
    points_P3: Points,
    root_3: ArrayLike,
    heading_3: ArrayLike,
    rng: np.random.Generator,
    *,
    leaf_radius_mm: float,
    exponent: float = 2.7,
    region: int = 0,
    share: float = 0.42,
) -> Tubes:
    """Grow a tree from a root to points.

    Args:
        points_P3: What to supply, in mm.
        root_3: Where the tree enters.
        heading_3: Direction in which it enters.
        rng: Source of the irregularities.
        leaf_radius_mm: Radius of a branch with one point behind it.
        exponent: A branch with n points is ``n ** (1 / exponent)`` times as wide (Murray's law: 3).
        region: Region id to carry along.
        share: How far a branch runs toward the middle of its points.
    """
    node_P = np.zeros(len(points_P3), np.intp)
    position = np.asarray(root_3, np.float64)[None]
    heading = _unit(np.asarray(heading_3, np.float64)[None])
    normal = _unit(np.cross(heading, rng.standard_normal((1, 3))))
    levels: list[tuple[Points, Points, Points, int]] = []
    parent_radius: Points | None = None
    for generation in range(24):
        nodes = len(position)
        count = np.bincount(node_P, minlength=nodes)
        middle = (
            np.stack([np.bincount(node_P, points_P3[:, axis], nodes) for axis in range(3)], axis=1)
            / np.maximum(count, 1)[:, None]
        )
        toward = middle - position
        reach = np.linalg.norm(toward, axis=1, keepdims=True)
        straight = np.where(count[:, None] > 1, 0.35, 0.1)
        heading = _unit((1 - straight) * _unit(toward) + straight * heading)
        jitter = np.clip(rng.normal(share, 0.06, (nodes, 1)), 0.25, 0.6)
        end = position + heading * np.where(count[:, None] > 1, jitter, 0.9) * reach
        radius = leaf_radius_mm * count ** (1 / exponent)
        before = radius if parent_radius is None else np.minimum(parent_radius, radius * 1.25)
        levels.append((position, end, np.stack([before, radius], axis=1), generation))
        if (count <= 1).all():
            break
        normal = np.cross(heading, normal) + 0.5 * rng.standard_normal((nodes, 3))
        normal = _unit(normal - (normal * heading).sum(1, keepdims=True) * heading)
        alive = count[node_P] > 1
        points_P3, node_P = points_P3[alive], node_P[alive]
        side = ((points_P3 - middle[node_P]) * normal[node_P]).sum(1) > 0
        keys, node_P = np.unique(2 * node_P + side, return_inverse=True)
        mother = keys // 2
        position, heading, normal, parent_radius = (
            end[mother],
            heading[mother],
            normal[mother],
            radius[mother],
        )
    start, end, radii = (np.concatenate([level[part] for level in levels]) for part in range(3))
    generations = np.concatenate([np.full(len(level[0]), level[3]) for level in levels])
    return Tubes(start, end, radii, generations, np.full(len(start), region))


def beside(tree: Tubes, gap_mm: float, reference_3: ArrayLike) -> Tubes:
    """A tree that runs along another without touching it, as an artery along its bronchus.

    Args:
        tree: The tree to follow.
        gap_mm: Space between the two walls.
        reference_3: The side to which the new tree keeps.
    """
    heading = _unit(tree.end_N3 - tree.start_N3)
    reference = np.asarray(reference_3, np.float64)
    offset = _unit(reference - (heading @ reference)[:, None] * heading + 1e-3)
    # the start of a piece takes the offset of the piece that ends there
    _, first = np.unique(np.round(tree.end_N3, 6), axis=0, return_index=True)
    ends = {tuple(point): index for point, index in zip(np.round(tree.end_N3[first], 6), first, strict=True)}
    mother = np.array([ends.get(tuple(point), -1) for point in np.round(tree.start_N3, 6)])
    before = np.where((mother >= 0)[:, None], offset[mother], offset)
    shift = 2 * tree.radius_N2 + gap_mm
    return Tubes(
        tree.start_N3 + before * shift[:, :1],
        tree.end_N3 + offset * shift[:, 1:],
        tree.radius_N2,
        tree.generation_N,
        tree.region_N,
    )


def sample_in_region(
    frame: Frame,
    regions_DHW: NDArray[np.uint8],
    region: int,
    rng: np.random.Generator,
    *,
    spacing_mm: float,
    margin_mm: float = 4.0,
) -> Points:
    """Points spread over a region, about one a cube of ``spacing_mm``, away from its border."""
    inside = regions_DHW == region
    spans = []
    for axis, coordinates in enumerate((frame.z_D, frame.y_H, frame.x_W)):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(inside.any(axis=others))
        if len(hit) == 0:
            return np.empty((0, 3))
        spans.append((float(coordinates[hit[0]]), float(coordinates[hit[-1]])))
    cells = [np.arange(low, high + spacing_mm, spacing_mm) for low, high in spans]
    grid = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1).reshape(-1, 3)
    points = grid + rng.uniform(-0.5, 0.5, grid.shape) * spacing_mm
    keep = inside[tuple(frame.index_of(points).T)]
    for axis in range(3):
        for sign in (-margin_mm, margin_mm):
            moved = points.copy()
            moved[:, axis] += sign
            keep &= inside[tuple(frame.index_of(moved).T)]
    return points[keep]


def tube_coverage(frame: Frame, tubes: Tubes, minimum_samples: int = 1) -> tuple[Slices, Array] | None:
    """Share of each voxel that lies inside a set of thin tubes.

    Every tube is filled with sample points that carry equal parts of its volume, and each point hands its part to the
    eight voxels around it. Right for any thickness, thinner than a voxel too.

    Returns:
        The part of the grid that the tubes touch and the shares (D, H, W) there; None where they touch nothing.
    """
    if len(tubes) == 0:
        return None
    step = frame.step_mm
    reach = tubes.radius_N2.max() + 2 * step
    low = np.minimum(tubes.start_N3.min(0), tubes.end_N3.min(0)) - reach
    high = np.maximum(tubes.start_N3.max(0), tubes.end_N3.max(0)) + reach
    box = frame.box(low, high)
    if box is None or min(box.shape) < 2:
        return None
    points, volume = _sample_tubes(tubes, float(step.min()) * 0.75, minimum_samples)
    origin = np.array([box.z[0, 0, 0], box.y[0, 0, 0], box.x[0, 0, 0]], np.float32)
    position = (points - origin) / step.astype(np.float32)
    shape = np.array(box.shape)
    inside = ((position >= 0) & (position < shape - 1)).all(axis=1)
    position, volume = position[inside], volume[inside] / np.float32(step.prod())
    corner = position.astype(np.int32)
    t = position - corner
    flat = (corner[:, 0] * shape[1] + corner[:, 1]) * shape[2] + corner[:, 2]
    voxels, weights = np.empty((8, len(flat)), np.intp), np.empty((8, len(flat)), np.float64)
    for number, (dz, dy, dx) in enumerate(np.ndindex(2, 2, 2)):
        wz = volume * (t[:, 0] if dz else 1 - t[:, 0])
        wy = wz * (t[:, 1] if dy else 1 - t[:, 1])
        np.multiply(wy, t[:, 2] if dx else 1 - t[:, 2], out=weights[number])
        np.add(flat, (dz * shape[1] + dy) * shape[2] + dx, out=voxels[number])
    total = np.bincount(voxels.ravel(), weights.ravel(), int(shape.prod()))
    np.minimum(total, 1.0, out=total)
    return box.index, total.astype(np.float32).reshape(box.shape)


def _sample_tubes(tubes: Tubes, pitch_mm: float, minimum_samples: int) -> tuple[Array, Array]:
    along = tubes.end_N3 - tubes.start_N3
    length = np.linalg.norm(along, axis=1)
    heading = along / np.maximum(length, 1e-9)[:, None]
    first = _unit(np.cross(heading, np.where(np.abs(heading[:, :1]) < 0.8, [[1.0, 0, 0]], [[0, 1.0, 0]])))
    second = np.cross(heading, first)
    area = np.pi * tubes.radius_N2.max(1) ** 2
    across = np.clip(np.ceil(area / pitch_mm**2), minimum_samples, 200).astype(np.intp)
    steps = np.maximum(np.ceil(length / pitch_mm), 1).astype(np.intp)
    total = across * steps
    piece = np.repeat(np.arange(len(tubes)), total)
    order = np.arange(len(piece)) - np.repeat(np.cumsum(total) - total, total)
    row, spot = np.divmod(order, across[piece])
    t = (row + 0.5) / steps[piece]
    radius = tubes.radius_N2[piece, 0] * (1 - t) + tubes.radius_N2[piece, 1] * t
    spread = radius * np.sqrt((spot + 0.5) / across[piece])
    angle = (spot * 2.399963 + row * 1.7).astype(np.float32)
    cosine, sine = spread * np.cos(angle), spread * np.sin(angle)
    points = np.empty((len(piece), 3), np.float32)
    for axis in range(3):
        points[:, axis] = tubes.start_N3[piece, axis] + along[piece, axis] * t
        points[:, axis] += first[piece, axis] * cosine + second[piece, axis] * sine
    volume = (length / steps * np.pi / across)[piece] * radius**2
    return points, volume.astype(np.float32)
