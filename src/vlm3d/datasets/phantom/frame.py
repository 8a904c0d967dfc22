"""The grid that the phantom is drawn on: coordinates in mm, local boxes, and soft-edged painting.

Coordinates are always in the order (z, y, x), as arrays are (D, H, W): z to superior, y to posterior, x to the
patient's left. A signed distance is in mm, negative inside.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from vlm3d.datasets.phantom.trees import Tubes

Array = NDArray[np.floating]
Slices = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Box:
    """A rectangular part of the grid, with open coordinate arrays that broadcast to (D, H, W)."""

    index: Slices
    z: Array
    y: Array
    x: Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        return self.z.shape[0], self.y.shape[1], self.x.shape[2]


@dataclass(frozen=True)
class Frame:
    """Voxel centers of a grid in mm.

    Attributes:
        z_D: Ascending, to superior.
        y_H: Ascending, to posterior.
        x_W: Ascending, to the patient's left.
    """

    z_D: Array
    y_H: Array
    x_W: Array

    @classmethod
    def regular(
        cls, shape_DHW: tuple[int, int, int], step_mm: ArrayLike, origin_mm: ArrayLike = (0, 0, 0)
    ) -> Frame:
        """A grid whose first voxel's center lies at ``origin_mm``."""
        step, origin = np.broadcast_to(step_mm, 3), np.broadcast_to(origin_mm, 3)
        z, y, x = (
            (origin[axis] + step[axis] * np.arange(shape_DHW[axis])).astype(np.float32) for axis in range(3)
        )
        return cls(z, y, x)

    def scaled(self, factor_zyx: ArrayLike) -> Frame:
        """The same voxels with coordinates divided by a factor an axis: a patient's grid in reference size."""
        fz, fy, fx = np.broadcast_to(np.asarray(factor_zyx, np.float32), 3)
        return Frame(self.z_D / fz, self.y_H / fy, self.x_W / fx)

    @property
    def shape_DHW(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        return len(self.z_D), len(self.y_H), len(self.x_W)

    @cached_property
    def step_mm(self) -> NDArray[np.float64]:
        """Distance of neighboring voxels along (D, H, W); not to be written to."""
        step = np.array(
            [
                (axis[-1] - axis[0]) / max(len(axis) - 1, 1) if len(axis) > 1 else 1.0
                for axis in (self.z_D, self.y_H, self.x_W)
            ],
            dtype=np.float64,
        )
        step.flags.writeable = False
        return step

    @cached_property
    def _axes(self) -> tuple[list[float], list[float], list[float]]:
        return self.z_D.tolist(), self.y_H.tolist(), self.x_W.tolist()

    @cached_property
    def edge_mm(self) -> float:
        """Width over which an edge is blurred by the size of a voxel."""
        return float(np.prod(self.step_mm) ** (1 / 3))

    def box(self, low_zyx: ArrayLike, high_zyx: ArrayLike) -> Box | None:
        """The part of the grid between two corners in mm; None where it lies outside the grid."""
        cuts = []
        for axis, a, b in zip(self._axes, _three(low_zyx), _three(high_zyx), strict=True):
            start, stop = bisect_left(axis, a), bisect_right(axis, b)
            if start >= stop:
                return None
            cuts.append(slice(start, stop))
        return self.cut((cuts[0], cuts[1], cuts[2]))

    def cut(self, index: Slices) -> Box:
        """The part of the grid behind three slices."""
        return Box(
            index,
            self.z_D[index[0]][:, None, None],
            self.y_H[index[1]][None, :, None],
            self.x_W[index[2]][None, None, :],
        )

    def around(self, center_zyx: ArrayLike, radius_mm: ArrayLike) -> Box | None:
        """The part of the grid within a radius (one, or one an axis) of a point."""
        center, radius = np.asarray(center_zyx, np.float64), np.broadcast_to(radius_mm, 3)
        return self.box(center - radius, center + radius)

    def index_of(self, points_N3: ArrayLike) -> NDArray[np.intp]:
        """Nearest voxel of each point; points outside the grid get the nearest voxel inside."""
        points = np.atleast_2d(np.asarray(points_N3, np.float64))
        first = np.array([self.z_D[0], self.y_H[0], self.x_W[0]], np.float64)
        nearest = np.rint((points - first) / self.step_mm).astype(np.intp)
        return np.clip(nearest, 0, np.array(self.shape_DHW) - 1)

    def points_at(self, index_N3: ArrayLike) -> NDArray[np.float64]:
        """Coordinates in mm of voxels."""
        first = np.array([self.z_D[0], self.y_H[0], self.x_W[0]], np.float64)
        return first + np.asarray(index_N3, np.float64) * self.step_mm


def _three(values: ArrayLike) -> list[float]:
    """One number an axis, from three or from one for all."""
    array = np.asarray(values)
    return array.tolist() if array.ndim else [array.item()] * 3


@dataclass
class Canvas:
    """A scan that is being painted: HU, region ids, and the grid they lie on.

    Attributes:
        hu_DHW: float32, changed in place.
        regions_DHW: uint8 ids of `vlm3d.anatomy.regions`, changed in place.
        frame: Coordinates of the voxels in mm.
        airways: The bronchi inside the lobes, where they are known.
        coronaries: Courses (N, 3) in mm of the coronary arteries, where they are known.
    """

    hu_DHW: Array
    regions_DHW: NDArray[np.uint8]
    frame: Frame
    airways: Tubes | None = None
    coronaries: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def paint(
        self,
        box: Box | None,
        distance_mm: Array,
        hu: float | Array,
        region: int | None = None,
        edge_mm: float | None = None,
    ) -> None:
        """Fill the inside of a signed distance with a density; edges blend over one voxel."""
        if box is not None:
            self.blend(box.index, coverage(distance_mm, edge_mm or self.frame.edge_mm), hu, region)

    def blend(self, index: Slices, alpha: Array, hu: float | Array, region: int | None = None) -> None:
        """Mix a density in, by a share of 0..1 a voxel; shares over a half take the region's id."""
        view = self.hu_DHW[index]
        view += alpha * (hu - view)
        if region is not None:
            self.regions_DHW[index][alpha > 0.5] = region


def bounds(mask_DHW: NDArray[np.bool_], margin: int = 0) -> Slices | None:
    """Smallest part of the grid that holds a mask, widened by some voxels."""
    cuts = []
    for axis in range(3):
        hit = np.flatnonzero(mask_DHW.any(axis=tuple(other for other in range(3) if other != axis)))
        if len(hit) == 0:
            return None
        cuts.append(slice(max(int(hit[0]) - margin, 0), int(hit[-1]) + 1 + margin))
    return cuts[0], cuts[1], cuts[2]


def coverage(distance_mm: Array, edge_mm: float) -> Array:
    """Share of a voxel that lies inside a surface at a signed distance."""
    share = distance_mm * np.float32(-1.0 / edge_mm)
    share += np.float32(0.5)
    return np.clip(share, 0.0, 1.0, out=share)


def ellipsoid(
    box: Box, center_zyx: ArrayLike, radii_mm: ArrayLike, axes_33: NDArray[np.float64] | None = None
) -> Array:
    """Signed distance to an ellipsoid, exact at its surface.

    Args:
        box: Where to evaluate.
        center_zyx: Its center in mm.
        radii_mm: Half-axes, along z, y, x or along the rows of ``axes_33``.
        axes_33: Orthonormal rows in (z, y, x).
    """
    cz, cy, cx = np.asarray(center_zyx, np.float32)
    rz, ry, rx = np.broadcast_to(np.asarray(radii_mm, np.float32), 3)
    dz, dy, dx = box.z - cz, box.y - cy, box.x - cx
    if axes_33 is None:
        u, v, w = dz / rz, dy / ry, dx / rx
    else:
        rows = axes_33.astype(np.float32)
        u, v, w = (
            (row[0] * dz + row[1] * dy + row[2] * dx) / r for row, r in zip(rows, (rz, ry, rx), strict=True)
        )
    u, v, w = u * u, v * v, w * w
    level = np.sqrt(u + v + w)
    slope = np.sqrt(u / (rz * rz) + v / (ry * ry) + w / (rx * rx))
    return ((level - 1.0) * level / np.maximum(slope, 1e-6)).astype(np.float32)


def smooth_union(first: Array, second: Array, blend_mm: float) -> Array:
    """Signed distance to two bodies grown together over a fillet."""
    h = np.maximum(blend_mm - np.abs(first - second), 0.0) / blend_mm
    return (np.minimum(first, second) - h * h * (blend_mm * 0.25)).astype(np.float32)


def smooth_intersection(first: Array, second: Array, blend_mm: float) -> Array:
    """Signed distance to what two bodies share, with rounded edges."""
    return -smooth_union(-first, -second, blend_mm)


def spline(control_N3: ArrayLike, step_mm: float = 5.0) -> NDArray[np.float64]:
    """Points about ``step_mm`` apart on a smooth curve (Catmull-Rom) through control points; extra columns ride along."""
    control = np.asarray(control_N3, np.float64)
    padded = np.vstack([2 * control[0] - control[1], control, 2 * control[-1] - control[-2]])
    pieces = []
    for p0, p1, p2, p3 in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        count = max(int(np.ceil(np.linalg.norm(p2[:3] - p1[:3]) / step_mm)), 1)
        t = (np.arange(count) / count)[:, None]
        pieces.append(
            0.5
            * (
                2 * p1
                + (p2 - p0) * t
                + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
                + (3 * p1 - p0 - 3 * p2 + p3) * t**3
            )
        )
    return np.vstack([*pieces, control[-1:]])


def tube(
    frame: Frame, path_N4: NDArray[np.float64], margin_mm: float = 4.0, flatten: float = 1.0
) -> tuple[Box | None, Array]:
    """Signed distance to a tube along a path.

    Args:
        frame: The grid.
        path_N4: Points (z, y, x, radius) in mm; the radius changes linearly between them.
        margin_mm: How far outside the tube the distance is needed.
        flatten: Over 1 squeezes the tube front to back.

    Returns:
        The box around the tube, and the distance in it; `Box` is None where the tube lies outside the grid.
    """
    reach = path_N4[:, 3:] + margin_mm
    lowest, highest = (path_N4[:, :3] - reach).min(0), (path_N4[:, :3] + reach).max(0)
    box = frame.box(lowest, highest)
    if box is None:
        return None, np.empty((0, 0, 0), np.float32)
    distance = np.full(box.shape, margin_mm, np.float32)
    start = np.array([cut.start for cut in box.index])
    for a, b in zip(path_N4[:-1], path_N4[1:], strict=True):
        span = max(a[3], b[3]) + margin_mm
        low, high = np.minimum(a[:3], b[:3]) - span, np.maximum(a[:3], b[:3]) + span
        part = frame.box(np.maximum(low, lowest), np.minimum(high, highest))
        if part is None:
            continue
        local = tuple(slice(cut.start - at, cut.stop - at) for cut, at in zip(part.index, start, strict=True))
        view = distance[local]
        np.minimum(view, _capsule(part, a, b, flatten), out=view)
    return box, distance


def _capsule(box: Box, a: NDArray[np.float64], b: NDArray[np.float64], flatten: float) -> Array:
    az, ay, ax, ar = (np.float32(value) for value in a)
    bz, by, bx, br = (np.float32(value) for value in b)
    squeeze = np.float32(flatten)
    dz, dy, dx = box.z - az, (box.y - ay) * squeeze, box.x - ax
    ez, ey, ex = bz - az, (by - ay) * squeeze, bx - ax
    length2 = max(float(ez * ez + ey * ey + ex * ex), 1e-6)
    t = np.clip((dz * ez + dy * ey + dx * ex) / np.float32(length2), 0.0, 1.0)
    gap = np.sqrt((dz - t * ez) ** 2 + (dy - t * ey) ** 2 + (dx - t * ex) ** 2)
    return gap - (ar + t * (br - ar))


def smooth_noise(
    frame: Frame, box: Box | None, scale_mm: ArrayLike, rng: np.random.Generator, extent_mm: float = 520.0
) -> Array:
    """Random field of unit variance that changes over about ``scale_mm``; the same for any spacing.

    Args:
        frame: The grid.
        box: Where to evaluate, or None for the whole grid.
        scale_mm: Distance of the random knots, one or one an axis.
        rng: Source of randomness; always drawn from alike, whatever the grid.
        extent_mm: Length after which the field repeats.
    """
    scale = np.broadcast_to(np.asarray(scale_mm, np.float64), 3)
    knots = [max(int(extent_mm / s), 2) for s in scale]
    lattice = rng.standard_normal(knots).astype(np.float32)
    whole = box or frame.cut((slice(None), slice(None), slice(None)))
    axes = (whole.z.ravel(), whole.y.ravel(), whole.x.ravel())
    wz, wy, wx = (_knot_weights(axis, s, k) for axis, s, k in zip(axes, scale, knots, strict=True))
    d, h, w = len(axes[0]), len(axes[1]), len(axes[2])
    field_zyx = (wz @ lattice.reshape(knots[0], -1)).reshape(d, knots[1], knots[2])
    field_zyx = np.matmul(wy, field_zyx)
    return np.matmul(field_zyx.reshape(d * h, knots[2]), wx.T).reshape(d, h, w)


def _knot_weights(axis: Array, scale: float, knots: int) -> Array:
    position = axis.astype(np.float64) / scale
    low = np.floor(position)
    t = position - low
    t = t * t * (3 - 2 * t)
    norm = np.sqrt(t**2 + (1 - t) ** 2)
    weights = np.zeros((len(axis), knots), np.float32)
    rows = np.arange(len(axis))
    weights[rows, low.astype(np.intp) % knots] = (1 - t) / norm
    weights[rows, (low.astype(np.intp) + 1) % knots] += t / norm
    return weights
