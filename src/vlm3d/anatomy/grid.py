"""The coarse isotropic grid on which anatomy is searched, and the way back to the scan's own grid.

Organs are centimeters wide, so their search needs no more than 2.5 mm; edges that matter (lung, airway, bone) are
redrawn on the scan's grid afterwards. Everything here is in canonical axes: D superior, H posterior, W left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.volume import Volume

Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

STEP_MM = 2.5
AIR_FLOOR_HU = -1024
BONE_CEILING_HU = 3071


@dataclass(frozen=True)
class WorkGrid:
    """A scan on the coarse grid.

    Attributes:
        hu_DHW: float32 HU, clipped to -1024..3071, averaged where the scan is finer than the grid.
        padding_DHW: True where the scanner filled in a value outside its field of view.
        step_mm: Edge of a coarse voxel; the three axes differ from it by less than half a voxel over the whole scan.
        full_shape_DHW: The scan's own grid.
    """

    hu_DHW: NDArray[np.float32]
    padding_DHW: Mask
    step_mm: float
    full_shape_DHW: tuple[int, int, int]

    @property
    def shape_DHW(self) -> tuple[int, int, int]:
        """Number of coarse voxels along each axis."""
        d, h, w = self.hu_DHW.shape
        return d, h, w

    @property
    def voxel_ml(self) -> float:
        """Volume of a coarse voxel in milliliters."""
        return self.step_mm**3 / 1000.0

    def voxels(self, length_mm: float) -> int:
        """A length as a whole number of coarse voxels, at least one."""
        return max(1, round(length_mm / self.step_mm))

    def full_index(self, axis: int, scale: int = 1) -> NDArray[np.intp]:
        """For each index of the scan's grid along an axis, the nearest coarse index (of a grid `scale` times finer)."""
        n_full, n_work = self.full_shape_DHW[axis], self.shape_DHW[axis] * scale
        nearest = np.floor((np.arange(n_full) + 0.5) * n_work / n_full).astype(np.intp)
        return np.clip(nearest, 0, n_work - 1)

    def labels_to_full(self, labels_DHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Coarse labels on the scan's grid, nearest voxel."""
        return labels_DHW[np.ix_(*(self.full_index(axis) for axis in range(3)))]

    def mask_to_full(self, mask_DHW: Mask, fine: FineBox | None = None) -> tuple[Box, Mask]:
        """A mask on the scan's grid with smooth edges: the box that holds it, and the mask inside the box.

        Args:
            mask_DHW: On the coarse grid, or on the finer grid of `fine`.
            fine: The finer grid, where the mask is on one.
        """
        scale = fine.scale if fine else 1
        found = ndimage.find_objects(mask_DHW.view(np.uint8))
        if not found:
            return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), dtype=bool)
        soft = mask_DHW[found[0]].astype(np.float32)
        box = []
        for axis, extent in enumerate(found[0]):
            n_full, n_work = self.full_shape_DHW[axis], self.shape_DHW[axis] * scale
            first = extent.start + (fine.start_DHW[axis] * scale if fine else 0)
            last = first + extent.stop - extent.start
            start = max((first - 1) * n_full // n_work, 0)
            stop = min(-(-(last + 1) * n_full // n_work), n_full)
            position = (np.arange(start, stop) + 0.5) * n_work / n_full - 0.5 - first
            soft = _interpolated(soft, axis, position, first == 0, last == n_work)
            box.append(slice(start, stop))
        return (box[0], box[1], box[2]), soft > 0.5

    def finer(self, volume: Volume, box: Box, scale: int = 2) -> FineBox:
        """The scan inside a box of the coarse grid, sampled `scale` times finer."""
        start = tuple(s.start for s in box)
        size = [(s.stop - s.start) * scale for s in box]
        ratio = [n / m for n, m in zip(self.full_shape_DHW, self.shape_DHW, strict=True)]
        low = [max(0, int(s.start * r) - 2) for s, r in zip(box, ratio, strict=True)]
        high = [
            min(n, int(np.ceil(s.stop * r)) + 2)
            for s, r, n in zip(box, ratio, self.full_shape_DHW, strict=True)
        ]
        voxels = np.asarray(volume.voxels_DHW)[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        step = [r / scale for r in ratio]
        origin = [s.start * r - a + t / 2 for s, r, a, t in zip(box, ratio, low, step, strict=True)]
        hu = _resample(_clipped(voxels), size, origin, step)
        return FineBox(hu, (start[0], start[1], start[2]), scale)


@dataclass(frozen=True)
class FineBox:
    """A part of the scan on a grid finer than the coarse one.

    Attributes:
        hu_DHW: float32 HU.
        start_DHW: The first coarse voxel of the box.
        scale: Fine voxels a coarse voxel, along each axis.
    """

    hu_DHW: NDArray[np.float32]
    start_DHW: tuple[int, int, int]
    scale: int

    def from_coarse(self, mask_DHW: Mask) -> Mask:
        """The part of a coarse mask inside the box, nearest voxel."""
        part = mask_DHW[self.box]
        for axis in range(3):
            part = np.repeat(part, self.scale, axis)
        return part

    def to_coarse(self, mask_DHW: Mask, shape_DHW: tuple[int, int, int]) -> Mask:
        """A fine mask on the whole coarse grid: voxels of which at least half is in the mask."""
        d, h, w = (n // self.scale for n in mask_DHW.shape)
        s = self.scale
        share = mask_DHW.reshape(d, s, h, s, w, s).mean((1, 3, 5))
        whole = np.zeros(shape_DHW, dtype=bool)
        whole[self.box] = share >= 0.5
        return whole

    @property
    def box(self) -> Box:
        """The box on the coarse grid."""
        d, h, w = (
            slice(a, a + n // self.scale) for a, n in zip(self.start_DHW, self.hu_DHW.shape, strict=True)
        )
        return d, h, w


def to_work_grid(volume: Volume, step_mm: float = STEP_MM) -> WorkGrid:
    """Bring a canonical scan onto the coarse grid."""
    spacing_mm = volume.spacing_mm
    shape = volume.shape_DHW
    voxels = np.asarray(volume.voxels_DHW)
    size = [max(1, round(n * s / step_mm)) for n, s in zip(shape, spacing_mm, strict=True)]
    step = [n / m for n, m in zip(shape, size, strict=True)]
    origin = [s / 2 for s in step]
    hu = _resample(_clipped(voxels), size, origin, step)
    padding = np.less(voxels, AIR_FLOOR_HU)
    coarse_padding = np.zeros(hu.shape, dtype=bool)
    if padding.any():
        coarse_padding = _resample(padding.view(np.uint8) * np.uint8(100), size, origin, step) > 50
    return WorkGrid(hu, coarse_padding, step_mm, shape)


def _clipped(voxels_DHW: NDArray[np.generic]) -> NDArray[np.int16]:
    if voxels_DHW.dtype.kind == "f":
        voxels_DHW = np.nan_to_num(voxels_DHW, nan=AIR_FLOOR_HU, posinf=BONE_CEILING_HU, neginf=AIR_FLOOR_HU)
    return np.clip(voxels_DHW, AIR_FLOOR_HU, BONE_CEILING_HU).astype(np.int16, copy=False)


def _resample(
    values_DHW: NDArray[np.generic], size: Sequence[int], origin: Sequence[float], step: Sequence[float]
) -> NDArray[np.float32]:
    """Sample an array linearly, averaged first where it is much finer than the step.

    The unit is one voxel of the array, and its outer corner is the origin of coordinates.
    """
    image = sitk.GetImageFromArray(values_DHW)
    image.SetOrigin([0.5, 0.5, 0.5])
    shrink = [max(1, min(int(s), n)) for s, n in zip(step, values_DHW.shape, strict=True)]
    if max(shrink) > 1:
        image = sitk.BinShrink(image, shrink[::-1])
    resampled = sitk.Resample(
        sitk.Cast(image, sitk.sitkFloat32),
        [int(n) for n in size[::-1]],
        sitk.Transform(),
        sitk.sitkLinear,
        [float(o) for o in origin[::-1]],
        [float(s) for s in step[::-1]],
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        0.0,
        sitk.sitkFloat32,
        True,
    )
    values: NDArray[np.float32] = sitk.GetArrayFromImage(resampled)
    return values


def _interpolated(
    soft: NDArray[np.float32], axis: int, position: NDArray[np.float64], at_start: bool, at_end: bool
) -> NDArray[np.float32]:
    """Linear interpolation along an axis; beyond the ends the values fall to 0, but not at the volume's border."""
    n = soft.shape[axis]
    low = 0.0 if at_start else -1.0
    high = n - 1.0 if at_end else float(n)
    padded = np.pad(soft, [(1, 1) if a == axis else (0, 0) for a in range(3)])
    position = np.clip(position, low, high) + 1
    below = np.minimum(np.floor(position).astype(np.intp), n)
    share = (position - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return padded.take(below, axis) * (1 - share) + padded.take(below + 1, axis) * share
