"""Vary a training scan as patients and scanners vary: turned, scaled, breathing, noisier, softer; masks go along.

Two steps, each with all its random numbers drawn before it starts, so that a seed says everything:

1. **Geometry** in one interpolation: the image linearly, regions and lesions by the nearest voxel from the same
   coordinates. Turning happens in the axial plane only, scaling and moving along all axes. A patient lies turned about
   the long axis more than any other, all slices share the weights of one turn, which costs a fraction of a free 3D one,
   and a turn out of that plane would smear thick slices into one another.
2. **Intensity**, on the image alone: motion, noise, then the kernel that shapes it, then thick slices, then the HU scale.

Arrays are canonical (D superior, H posterior, W left), as `vlm3d.datasets.prepared` stores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from vlm3d.anatomy.regions import MIRRORED_REGION_IDS, REGION_IDS
from vlm3d.config import AugmentationConfig
from vlm3d.datasets.augmentation_text import mirrored_report

NO_AUGMENTATION = AugmentationConfig(
    geometry_probability=0.0, intensity_probability=0.0, noise_probability=0.0, blur_probability=0.0,
    lowres_probability=0.0, motion_probability=0.0,
)  # fmt: skip
"""Leaves every scan as it is, to the bit."""

OUTSIDE_HU = -1024.0
"""What lies beyond the scan, as `vlm3d.io` fills it."""

_SLAB = 8  # slices worked on at once: they stay in the processor's cache
_BEND_HU = (-1000.0, 1000.0)
_CUTOUT_TRIES = 8
_MIRRORED_REGION = np.array(MIRRORED_REGION_IDS, np.uint8)
_GHOST_SHARE = (0.2, 0.45)  # weight of a second contour


@dataclass(frozen=True)
class TrainingSample:
    """One scan with all that is known about it, on one grid.

    Attributes:
        hu_DHW: int16 or float32, in HU.
        regions_DHW: uint8 region ids, or None.
        lesion_bits_DHW: uint8; bit l is lesion l of `vlm3d.labels.STORED_LESIONS`. Or uint32, with marks of the caller's in
            the bits from 8 on.
        labels_K: 0, 1 or NaN (unknown), a disease each.
        report: Text, or None.
        case_id: Names the case in logs.
        spacing_mm: Voxel size along (D, H, W).
    """

    hu_DHW: NDArray[Any]
    regions_DHW: NDArray[np.uint8] | None
    lesion_bits_DHW: NDArray[Any]
    labels_K: NDArray[np.float32]
    report: str | None
    case_id: str
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        shape = self.hu_DHW.shape
        for name, mask, dtypes in (
            ("regions", self.regions_DHW, (np.uint8,)),
            ("lesion bits", self.lesion_bits_DHW, (np.uint8, np.uint32)),
        ):
            if mask is not None and (mask.shape != shape or mask.dtype not in dtypes):
                raise ValueError(f"{name} are {mask.dtype} {mask.shape}, the scan needs uint8 {shape}")
        if len(shape) != 3 or self.hu_DHW.dtype not in (np.int16, np.float32):
            raise ValueError(f"a scan is 3D int16 or float32, got {self.hu_DHW.dtype} {shape}")


@dataclass(frozen=True)
class Geometry:
    """How a scan is moved about its middle.

    Attributes:
        degrees: Turn in the axial plane, from H towards W.
        scale_DHW: Above 1 the patient grows.
        shift_DHW: Voxels that the patient moves.
        flip: Mirrored left to right.
    """

    degrees: float = 0.0
    scale_DHW: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift_DHW: tuple[float, float, float] = (0.0, 0.0, 0.0)
    flip: bool = False

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return self == Geometry()


class Augmenter:
    """Varies training scans.

    Args:
        config: What varies, and how much.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config

    def __call__(self, sample: TrainingSample, rng: np.random.Generator) -> TrainingSample:
        """A variation of a scan; the sample given is not changed.

        Args:
            sample: The scan as it is stored.
            rng: Decides everything; the same state gives the same scan.

        Returns:
            The same shapes and dtypes. Where nothing was drawn the sample itself comes back.
        """
        geometry = self.draw_geometry(rng)
        changed = self.move(sample, geometry)
        intensity_seed = int(rng.integers(2**63))  # what one scan needs does not shift the next one's numbers
        return self._vary_intensity(changed, intensity_seed)

    def draw_geometry(self, rng: np.random.Generator) -> Geometry:
        """Draw how a scan is moved; takes as many random numbers whatever the settings."""
        config = self.config
        moved, flipped = rng.random(2) < (config.geometry_probability, config.flip_probability)
        draw = rng.uniform(-1, 1, 7)
        if not moved:
            return Geometry(flip=bool(flipped))
        grow = 1 + config.scale * np.abs(draw[1:4])
        d, h, w = np.where(draw[1:4] < 0, 1 / grow, grow).tolist()
        z, y, x = (draw[4:] * config.translate_voxels).tolist()
        return Geometry(config.rotate_degrees * float(draw[0]), (d, h, w), (z, y, x), bool(flipped))

    def move(self, sample: TrainingSample, geometry: Geometry) -> TrainingSample:
        """Move the scan, its regions, its lesions and its report's side words together.

        A scan whose report cannot be mirrored is moved without the flip.
        """
        report = sample.report
        if geometry.flip and report is not None:
            mirrored = mirrored_report(report)
            if mirrored is None:
                geometry = replace(geometry, flip=False)
            else:
                report = mirrored
        if geometry.is_identity:
            return sample
        coordinates = _Coordinates(geometry, sample.hu_DHW.shape, sample.spacing_mm)
        regions = sample.regions_DHW
        if regions is not None:
            regions = coordinates.nearest(regions)
            regions = _MIRRORED_REGION[regions] if geometry.flip else regions
        return replace(
            sample,
            hu_DHW=_as_stored(coordinates.linear(sample.hu_DHW), sample.hu_DHW.dtype),
            regions_DHW=regions,
            lesion_bits_DHW=coordinates.nearest(sample.lesion_bits_DHW),
            report=report,
        )

    def _vary_intensity(self, sample: TrainingSample, seed: int) -> TrainingSample:
        config, rng = self.config, np.random.default_rng(seed)
        motion_rng = np.random.default_rng(
            [seed, 1]
        )  # a scan that moves is otherwise varied as one that does not
        chances = np.array(
            [
                config.noise_probability if config.noise_hu else 0,
                config.blur_probability if config.blur_mm else 0,
                config.lowres_probability if config.lowres_slices > 1 else 0,
                config.intensity_probability,
            ]
        )
        noise, kernel, lowres, scale = rng.random(4) < chances
        breath, heartbeat = motion_rng.random(2) < config.motion_probability
        if not (noise or kernel or lowres or scale or breath or heartbeat or config.cutout_boxes):
            return sample
        hu_DHW = np.array(sample.hu_DHW, dtype=np.float32)
        if breath:
            _breathe(hu_DHW, config.breath_mm / sample.spacing_mm[0], motion_rng)
        if heartbeat and sample.regions_DHW is not None:
            reach_HW = [config.heartbeat_mm / side for side in sample.spacing_mm[1:]]
            _beat(hu_DHW, sample.regions_DHW == REGION_IDS["heart"], reach_HW, motion_rng)
        if noise:
            _add_noise(hu_DHW, float(rng.uniform(0, config.noise_hu)), rng)
        if kernel:
            sigma_mm, sharpen = float(rng.uniform(0.25, 1) * config.blur_mm), float(rng.uniform(0.3, 1))
            _change_kernel(hu_DHW, sigma_mm, sample.spacing_mm, sharpen if rng.random() < 0.5 else None)
        if lowres:
            _thicken_slices(hu_DHW, float(rng.uniform(1, config.lowres_slices)))
        if scale:
            gamma = float(np.exp(rng.uniform(-config.gamma, config.gamma)))
            factor = 1 + float(rng.uniform(-config.contrast, config.contrast))
            shift = float(rng.uniform(-config.brightness_hu, config.brightness_hu))
            _scale_hu(hu_DHW, gamma, factor, shift)
        for _ in range(config.cutout_boxes):
            _cut_out(hu_DHW, sample.lesion_bits_DHW, config.cutout_mm, sample.spacing_mm, rng)
        return replace(sample, hu_DHW=_as_stored(hu_DHW, sample.hu_DHW.dtype))


class _Coordinates:
    """Where each voxel of the moved scan comes from: a depth for each slice, and one (H, W) map for all slices."""

    def __init__(
        self, geometry: Geometry, shape_DHW: tuple[int, ...], spacing_mm: tuple[float, float, float]
    ) -> None:
        depth, height, width = shape_DHW
        centers = [(size - 1) / 2 for size in shape_DHW]
        self.source_D = (np.arange(depth) - centers[0] - geometry.shift_DHW[0]) / geometry.scale_DHW[
            0
        ] + centers[0]
        down_mm = (np.arange(height) - centers[1] - geometry.shift_DHW[1])[:, None] * spacing_mm[1]
        across_mm = (np.arange(width) - centers[2] - geometry.shift_DHW[2])[None] * spacing_mm[2]
        angle = np.deg2rad(geometry.degrees)
        source_down_mm = (np.cos(angle) * down_mm - np.sin(angle) * across_mm) / geometry.scale_DHW[1]
        source_across_mm = (np.sin(angle) * down_mm + np.cos(angle) * across_mm) / geometry.scale_DHW[2]
        self.row_HW = source_down_mm / spacing_mm[1] + centers[1]
        self.column_HW = (-1 if geometry.flip else 1) * source_across_mm / spacing_mm[2] + centers[2]
        self.shape_DHW = (depth, height, width)

    def linear(self, hu_DHW: NDArray[Any]) -> NDArray[np.float32]:
        """The image there, interpolated linearly; `OUTSIDE_HU` beyond the scan."""
        depth, height, width = self.shape_DHW
        grid = np.stack([(2 * self.column_HW + 1) / width - 1, (2 * self.row_HW + 1) / height - 1], axis=-1)
        grid_1HW2 = torch.from_numpy(grid.astype(np.float32))[None]
        moved_DHW = np.empty(self.shape_DHW, np.float32)
        between_DHW = np.empty((min(_SLAB, depth), height, width), np.float32)
        for slab in _slabs(depth):
            count = slab.stop - slab.start
            for place, source in enumerate(self.source_D[slab]):
                self._between_slices(hu_DHW, float(source), between_DHW[place])
            sampled = functional.grid_sample(
                torch.from_numpy(between_DHW[:count])[None], grid_1HW2, align_corners=False
            )
            np.add(sampled[0].numpy(), OUTSIDE_HU, out=moved_DHW[slab])
        return moved_DHW

    def nearest(self, mask_DHW: NDArray[Any]) -> NDArray[Any]:
        """The mask there, from the nearest voxel; 0 beyond the scan."""
        depth, height, width = self.shape_DHW
        rows, columns = np.rint(self.row_HW).astype(np.int64), np.rint(self.column_HW).astype(np.int64)
        beyond_HW = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        index_HW = np.clip(rows, 0, height - 1) * width + np.clip(columns, 0, width - 1)
        flat_DN = np.ascontiguousarray(mask_DHW).reshape(depth, -1)
        moved_DHW = np.zeros(self.shape_DHW, mask_DHW.dtype)
        for moved_HW, source in zip(moved_DHW, np.rint(self.source_D).astype(np.int64).tolist(), strict=True):
            if 0 <= source < depth and flat_DN[source].any():
                np.take(flat_DN[source], index_HW, out=moved_HW, mode="clip")
                moved_HW[beyond_HW] = 0
        return moved_DHW

    @staticmethod
    def _between_slices(hu_DHW: NDArray[Any], source: float, out_HW: NDArray[np.float32]) -> None:
        """HU above `OUTSIDE_HU` at a depth between two slices."""
        out_HW[:] = 0
        lower = int(np.floor(source))
        for index, weight in ((lower, 1 - (source - lower)), (lower + 1, source - lower)):
            if weight > 0 and 0 <= index < hu_DHW.shape[0]:
                out_HW += np.float32(weight) * (hu_DHW[index].astype(np.float32) - np.float32(OUTSIDE_HU))


def _slabs(depth: int) -> Iterator[slice]:
    for start in range(0, depth, _SLAB):
        yield slice(start, min(depth, start + _SLAB))


def _as_stored(hu_DHW: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Back to the dtype that came in; whole HU are rounded to."""
    if dtype != np.int16:
        return hu_DHW
    stored_DHW = np.empty(hu_DHW.shape, np.int16)
    for slab in _slabs(len(hu_DHW)):
        stored_DHW[slab] = np.clip(np.rint(hu_DHW[slab]), -32768, 32767)
    return stored_DHW


def _breathe(hu_DHW: NDArray[np.float32], reach: float, rng: np.random.Generator) -> None:
    """A breath leaves a second, weaker scan `reach` slices away at most: full at the bases, gone further up."""
    depth = len(hu_DHW)
    shift, share = float(rng.uniform(0.3, 1) * reach * rng.choice([-1, 1])), float(rng.uniform(*_GHOST_SHARE))
    stop = float(rng.uniform(0.4, 0.9)) * depth
    weight_D = share * np.clip((stop - np.arange(depth)) / (0.5 * stop), 0, 1)
    still_DHW, source_D = hu_DHW.copy(), np.clip(np.arange(depth) + shift, 0, depth - 1)
    for d in np.flatnonzero(weight_D):
        low = min(int(source_D[d]), depth - 2) if depth > 1 else 0
        between, high = np.float32(source_D[d] - low), min(low + 1, depth - 1)
        ghost_HW = still_DHW[low] + between * (still_DHW[high] - still_DHW[low])
        hu_DHW[d] += np.float32(weight_D[d]) * (ghost_HW - still_DHW[d])


def _beat(
    hu_DHW: NDArray[np.float32], heart_DHW: NDArray[np.bool_], reach_HW: list[float], rng: np.random.Generator
) -> None:
    """A heartbeat leaves a second, weaker heart beside the first, in the plane; it fades in the margin around the heart."""
    angle, length = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.3, 1))
    share = float(rng.uniform(*_GHOST_SHARE))
    found = ndimage.find_objects(heart_DHW.astype(np.uint8))
    if not found:
        return
    margin = [2, *(2 * int(np.ceil(reach)) + 1 for reach in reach_HW)]
    box = tuple(
        slice(max(0, cut.start - more), min(size, cut.stop + more))
        for cut, more, size in zip(found[0], margin, hu_DHW.shape, strict=True)
    )
    part = hu_DHW[box]
    shift = [0.0, np.sin(angle) * length * reach_HW[0], np.cos(angle) * length * reach_HW[1]]
    ghost = ndimage.shift(part, shift, order=1, mode="nearest")
    fade = np.ones(part.shape, np.float32)
    for axis, (size, more) in enumerate(zip(part.shape, margin, strict=True)):
        from_edge = np.minimum(np.arange(size), np.arange(size)[::-1]).astype(np.float32)
        fade *= np.clip(from_edge / more, 0, 1).reshape([-1 if place == axis else 1 for place in range(3)])
    part += np.float32(share) * fade * (ghost - part)


def _add_noise(hu_DHW: NDArray[np.float32], sigma_hu: float, rng: np.random.Generator) -> None:
    for slab in _slabs(len(hu_DHW)):
        hu_DHW[slab] += np.float32(sigma_hu) * rng.standard_normal(hu_DHW[slab].shape, dtype=np.float32)


def _change_kernel(
    hu_DHW: NDArray[np.float32],
    sigma_mm: float,
    spacing_mm: tuple[float, float, float],
    sharpen: float | None,
) -> None:
    """A softer kernel within the slice, or with `sharpen` a sharper one: what softening takes away, added."""
    for slab in _slabs(len(hu_DHW)):
        soft = hu_DHW[slab]
        for axis in (1, 2):
            soft = ndimage.gaussian_filter1d(
                soft, sigma_mm / spacing_mm[axis], axis=axis, mode="nearest", truncate=3.0
            )
        if sharpen is None:
            hu_DHW[slab] = soft
        else:
            hu_DHW[slab] += np.float32(sharpen) * (hu_DHW[slab] - soft)


def _thicken_slices(hu_DHW: NDArray[np.float32], slices: float) -> None:
    """Average slices into thick ones and interpolate back, as a thick reconstruction that was resampled."""
    depth = hu_DHW.shape[0]
    count = max(1, int(depth / slices))
    edges = np.linspace(0, depth, count + 1)
    first, last = np.arange(depth)[None], np.arange(1, depth + 1)[None]
    share_TD = np.clip(np.minimum(last, edges[1:, None]) - np.maximum(first, edges[:-1, None]), 0, None)
    share_TD /= share_TD.sum(axis=1, keepdims=True)
    middles_T, at_D = (edges[1:] + edges[:-1]) / 2, np.arange(depth) + 0.5
    back_DT = np.stack([np.interp(at_D, middles_T, row) for row in np.eye(count)], axis=1)
    blend_DD = (back_DT @ share_TD).astype(np.float32)
    hu_DHW[:] = (blend_DD @ hu_DHW.reshape(depth, -1)).reshape(hu_DHW.shape)


def _scale_hu(hu_DHW: NDArray[np.float32], gamma: float, factor: float, shift_hu: float) -> None:
    """Bend HU between air and 1000 by a power, then scale them about water and shift them."""
    low, high = _BEND_HU
    for slab in _slabs(len(hu_DHW)):
        part = torch.from_numpy(hu_DHW[slab])
        share = ((part - low) / (high - low)).clamp_(0, 1)
        bent = share.pow(gamma) - share
        part.add_(bent, alpha=high - low).mul_(factor).add_(shift_hu)


def _cut_out(
    hu_DHW: NDArray[np.float32],
    lesion_bits_DHW: NDArray[Any],
    longest_mm: float,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Blank a box to its mean where no lesion lies; after some tries without such a place, none is."""
    edges = [
        min(size, max(1, round(longest_mm * float(share) / spacing)))
        for size, share, spacing in zip(hu_DHW.shape, rng.uniform(0.4, 1, 3), spacing_mm, strict=True)
    ]
    for _ in range(_CUTOUT_TRIES):
        starts = [int(rng.integers(size - edge + 1)) for size, edge in zip(hu_DHW.shape, edges, strict=True)]
        box = tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))
        if not lesion_bits_DHW[box].any():
            hu_DHW[box] = hu_DHW[box].mean()
            return
