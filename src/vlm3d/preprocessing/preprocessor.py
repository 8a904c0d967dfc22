"""From a scan to the model's input, and from the model's masks back to the scan.

The one place that orders the steps. There: turn to canonical axes, choose the part that the model sees,
resample only that part, pad, window (or keep HU, for a store). Back: the same in reverse. Both stream through the
slices, so memory beyond the result stays small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.config import PreprocessingConfig
from vlm3d.errors import MaskError
from vlm3d.preprocessing.cropping import AxisWindow, choose_window, cut_core, lung_box
from vlm3d.preprocessing.geometry import ScanGeometry
from vlm3d.preprocessing.intensity import OUTSIDE_VALUE, outside_hu, stored_hu, window_in_place
from vlm3d.preprocessing.masks import resample_mask
from vlm3d.preprocessing.orientation import canonical_view, regions_to_canonical, to_canonical
from vlm3d.preprocessing.resampling import Finish, linear_weights, resample_linear, resample_nearest
from vlm3d.volume import RegionMap, Volume, spacing_from_affine

_AXIS_WORDS = ("head to foot", "front to back", "right to left")


@dataclass(frozen=True)
class PreparedScan:
    """One scan as the model takes it.

    Attributes:
        intensity_DHW: float32 in -1 .. 1, canonical axes.
        regions_DHW: uint8 region ids on the same grid, or None if no anatomy was given.
        geometry: Where this grid lies in the scan; hand it to the ``invert`` methods.
    """

    intensity_DHW: NDArray[np.float32]
    regions_DHW: NDArray[np.uint8] | None
    geometry: ScanGeometry

    @property
    def affine(self) -> NDArray[np.float64]:
        """Affine of the model grid: ``(d, h, w, 1)`` to RAS+ mm."""
        return self.geometry.model_affine


@dataclass(frozen=True)
class HounsfieldScan:
    """One scan on the model's grid before windowing: what a store keeps.

    Attributes:
        hu_DHW: int16 HU, canonical axes; padding is `vlm3d.preprocessing.intensity.outside_hu`.
        regions_DHW: As in `PreparedScan`.
        geometry: As in `PreparedScan`.
    """

    hu_DHW: NDArray[np.int16]
    regions_DHW: NDArray[np.uint8] | None
    geometry: ScanGeometry


class Preprocessor:
    """Prepares scans for a model, and brings its masks back to the scan.

    Args:
        config: Grid, crop and window.
        threads: Slices worked on side by side; None decides by the machine.
    """

    def __init__(self, config: PreprocessingConfig, *, threads: int | None = None) -> None:
        self.config = config
        self.threads = threads

    def apply(self, volume: Volume, regions: RegionMap | None = None) -> PreparedScan:
        """Prepare a scan.

        Args:
            volume: In HU, on any axes.
            regions: Anatomy on the scan's grid, or on the same grid with other axes.

        Raises:
            MaskError: The anatomy lies on another grid.
        """
        window = partial(window_in_place, hu_window=self.config.hu_window)
        intensity_DHW, regions_DHW, geometry = self._resample(
            volume, regions, np.float32, OUTSIDE_VALUE, window
        )
        return PreparedScan(intensity_DHW, regions_DHW, geometry)

    def apply_hu(self, volume: Volume, regions: RegionMap | None = None) -> HounsfieldScan:
        """Bring a scan to the model's grid and keep its Hounsfield units; windowing them gives what `apply` gives.

        Args:
            volume: As for `apply`.
            regions: As for `apply`.

        Raises:
            MaskError: The anatomy lies on another grid.
        """
        outside = outside_hu(self.config.hu_window)
        store = partial(stored_hu, lowest=outside)
        hu_DHW, regions_DHW, geometry = self._resample(volume, regions, np.int16, outside, store)
        return HounsfieldScan(hu_DHW, regions_DHW, geometry)

    def apply_masks(
        self, masks: Mapping[str, NDArray[np.bool_]], geometry: ScanGeometry
    ) -> dict[str, NDArray[np.bool_]]:
        """Bring lesion masks to the model's grid, so that small lesions stay; see `resample_mask`.

        Args:
            masks: By name, on the scan's own grid and axes.
            geometry: From `apply` or `apply_hu`.

        Raises:
            MaskError: A mask has another shape than the scan.
        """
        return {
            name: resample_mask(mask_DHW, geometry, name, self.threads) for name, mask_DHW in masks.items()
        }

    def _resample(
        self,
        volume: Volume,
        regions: RegionMap | None,
        dtype: type[np.generic],
        outside: float,
        finish: Finish,
    ) -> tuple[NDArray[Any], NDArray[np.uint8] | None, ScanGeometry]:
        """The scan and its regions on the model grid; ``finish`` makes what is stored of a few resampled slices."""
        scan = to_canonical(volume)
        anatomy = None if regions is None else _matching_regions(scan, regions)
        geometry = self.plan(volume, anatomy)
        inside = tuple(slice(*content) for content in geometry.content_DHW)
        positions = tuple(geometry.scan_positions(axis) for axis in range(3))
        image_DHW = np.empty(geometry.model_shape_DHW, dtype)
        if image_DHW[inside].shape != image_DHW.shape:
            image_DHW.fill(outside)
        supports = geometry.step_DHW if self.config.antialias else (1.0, 1.0, 1.0)
        along_d, along_h, along_w = (
            linear_weights(*axis) for axis in zip(positions, scan.shape_DHW, supports, strict=True)
        )
        resample_linear(scan.voxels_DHW, (along_d, along_h, along_w), image_DHW[inside], finish, self.threads)
        regions_DHW = None
        if anatomy is not None:
            regions_DHW = np.zeros(geometry.model_shape_DHW, np.uint8)
            resample_nearest(anatomy.labels_DHW, positions, regions_DHW[inside])
        return image_DHW, regions_DHW, geometry

    def plan(self, volume: Volume, anatomy: RegionMap | None) -> ScanGeometry:
        """Decide which part of a scan the model sees, without touching its voxels.

        Args:
            volume: On any axes.
            anatomy: In canonical orientation, to find the lungs in, or None.
        """
        scan = to_canonical(volume)
        config = self.config
        box = lung_box(anatomy.labels_DHW) if anatomy is not None and config.crop == "lungs" else None
        steps, offsets, windows = [], [], []
        notes = (
            [] if box or config.crop == "center" else ["No lungs to crop around: the scan's middle is used."]
        )
        for axis in range(3):
            size, spacing_mm = scan.shape_DHW[axis], scan.spacing_mm[axis]
            full_size, step, offset = self._full_grid(size, spacing_mm, config.spacing_mm[axis])
            core = None
            if box is not None:
                start, stop = ((edge - 0.5 - offset) / step + 0.5 for edge in box[axis])
                core = (start, stop)
            window = choose_window(
                full_size,
                config.max_shape[axis],
                config.size_multiple[axis],
                fixed=config.fixed_shape,
                core=core,
                margin=config.crop_margin_mm / (step * spacing_mm),
            )
            notes += _cut_notes(axis, window, core, step * spacing_mm)
            steps.append(step)
            offsets.append(offset + step * window.start)
            windows.append(window)
        geometry = ScanGeometry(
            source_shape_DHW=volume.shape_DHW,
            source_affine=tuple(tuple(float(x) for x in row) for row in volume.affine),
            model_shape_DHW=(windows[0].size, windows[1].size, windows[2].size),
            step_DHW=(steps[0], steps[1], steps[2]),
            offset_DHW=(offsets[0], offsets[1], offsets[2]),
            content_DHW=(windows[0].content, windows[1].content, windows[2].content),
        )
        if box is not None:
            notes = [*_crop_notes(geometry), *notes]
        return replace(geometry, notes=tuple(notes))

    def _full_grid(self, size: int, spacing_mm: float, target_mm: float) -> tuple[int, float, float]:
        """Length, step and offset of one axis of the whole scan, resampled."""
        if self.config.ctclip_sizes:
            full_size = max(1, int(size * (spacing_mm / target_mm)))
            step = size / full_size
        else:
            step = target_mm / spacing_mm
            full_size = max(1, math.ceil(size / step - 1e-6))
        return full_size, step, (size - 1) / 2 - step * (full_size - 1) / 2

    def invert_mask(
        self, probability_DHW: NDArray[np.float32], geometry: ScanGeometry, threshold: float
    ) -> NDArray[np.bool_]:
        """Bring one lesion's probabilities back to the scan and threshold them there.

        Probabilities are interpolated linearly, then compared, so that the mask's edge is as smooth as the
        scan's grid allows. What the model did not see is False.

        Args:
            probability_DHW: On the model grid.
            geometry: From `apply`.
            threshold: Probabilities from here on are lesion.

        Returns:
            A mask on the scan's own grid and axes.
        """
        mask_DHW = np.zeros(geometry.source_shape_DHW, bool)
        self._invert_into(mask_DHW, probability_DHW, geometry, threshold)
        return mask_DHW

    def invert_probabilities(
        self,
        probability_LDHW: NDArray[np.float32],
        geometry: ScanGeometry,
        threshold: float | Sequence[float],
    ) -> NDArray[np.bool_]:
        """Bring all lesions back to the scan as masks, lesion by lesion.

        Args:
            probability_LDHW: On the model grid.
            geometry: From `apply`.
            threshold: One for all lesions, or one each.

        Returns:
            (L, D, H, W) on the scan's own grid and axes.
        """
        count = probability_LDHW.shape[0]
        thresholds = [float(threshold)] * count if isinstance(threshold, (int, float)) else list(threshold)
        if len(thresholds) != count:
            raise ValueError(f"{len(thresholds)} thresholds for {count} lesions")
        masks_LDHW = np.zeros((count, *geometry.source_shape_DHW), bool)
        for mask_DHW, probability_DHW, cut in zip(masks_LDHW, probability_LDHW, thresholds, strict=True):
            self._invert_into(mask_DHW, probability_DHW, geometry, cut)
        return masks_LDHW

    def invert_probability(
        self, probability_DHW: NDArray[np.float32], geometry: ScanGeometry
    ) -> NDArray[np.float32]:
        """Bring one lesion's probabilities back to the scan as they are; 0 where the model did not see."""
        result_DHW = np.zeros(geometry.source_shape_DHW, np.float32)
        self._invert_into(result_DHW, probability_DHW, geometry, None)
        return result_DHW

    def invert_labels(self, labels_DHW: NDArray[np.uint8], geometry: ScanGeometry) -> NDArray[np.uint8]:
        """Bring labels back to the scan's own grid and axes, nearest neighbor; 0 beyond the model's view."""
        _check_model_shape(labels_DHW, geometry)
        result_DHW = np.zeros(geometry.source_shape_DHW, labels_DHW.dtype)
        view = canonical_view(result_DHW, np.array(geometry.source_affine))
        seen = [geometry.seen(axis) for axis in range(3)]
        target = tuple(slice(indices.start, indices.stop) for indices in seen)
        inside = tuple(slice(*content) for content in geometry.content_DHW)
        positions = tuple(
            geometry.model_positions(axis, indices) - geometry.content_DHW[axis][0]
            for axis, indices in enumerate(seen)
        )
        resample_nearest(labels_DHW[inside], positions, view[target])
        return result_DHW

    def _invert_into(
        self,
        result_DHW: NDArray[Any],
        probability_DHW: NDArray[np.float32],
        geometry: ScanGeometry,
        threshold: float | None,
    ) -> None:
        """Interpolate probabilities into an array on the scan's axes, where they can reach the threshold.

        Without a threshold all that the model saw is interpolated and kept as probabilities.
        """
        _check_model_shape(probability_DHW, geometry)
        content_DHW = probability_DHW[tuple(slice(*content) for content in geometry.content_DHW)]
        reach = _box_reaching(content_DHW, threshold)
        if reach is None:
            return
        target, weights = [], []
        for axis, (first, last) in enumerate(reach):
            size = content_DHW.shape[axis]
            begin = geometry.content_DHW[axis][0]
            # An interpolated value reaches the threshold less than one voxel from one that does.
            start, stop = max(0.0, first - 0.5), min(float(size), last + 0.5)
            indices = geometry.seen(axis, begin + start, begin + stop)
            if len(indices) == 0:
                return
            target.append(slice(indices.start, indices.stop))
            weights.append(linear_weights(geometry.model_positions(axis, indices) - begin, size))
        view = canonical_view(result_DHW, np.array(geometry.source_affine))
        along_d, along_h, along_w = weights
        finish = None if threshold is None else partial(_reaching, threshold=threshold)
        resample_linear(content_DHW, (along_d, along_h, along_w), view[tuple(target)], finish, self.threads)


def _reaching(probability_DHW: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    return probability_DHW >= threshold


def _matching_regions(scan: Volume, regions: RegionMap) -> RegionMap:
    """The anatomy in canonical orientation, once it is known to lie on the scan's grid."""
    anatomy = regions_to_canonical(regions)
    tolerance_mm = 0.1 * min(scan.spacing_mm)
    corner = np.array([*(size - 1 for size in scan.shape_DHW), 1.0])
    same_place = all(
        np.allclose(anatomy.affine @ place, scan.affine @ place, atol=tolerance_mm, rtol=0)
        for place in (np.array([0.0, 0.0, 0.0, 1.0]), corner)
    )
    if anatomy.labels_DHW.shape == scan.shape_DHW and same_place:
        return anatomy
    raise MaskError(
        "the anatomy mask is on another grid or in another place: it has "
        f"{_grid_words(anatomy.labels_DHW.shape, anatomy.spacing_mm)}, the scan "
        f"{_grid_words(scan.shape_DHW, scan.spacing_mm)}; resample the mask onto the scan"
    )


def _grid_words(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> str:
    voxels = "x".join(str(size) for size in shape)
    return f"{voxels} voxels of {'x'.join(f'{length:.3g}' for length in spacing_mm)} mm"


def _check_model_shape(array_DHW: NDArray[Any], geometry: ScanGeometry) -> None:
    if array_DHW.shape != geometry.model_shape_DHW:
        raise ValueError(f"shape {array_DHW.shape} is not the model grid's {geometry.model_shape_DHW}")


def _box_reaching(
    probability_DHW: NDArray[np.float32], threshold: float | None
) -> list[tuple[int, int]] | None:
    """Start and stop along each axis of the voxels that reach a threshold, or None if none does."""
    if threshold is None:
        return [(0, size) for size in probability_DHW.shape]
    filled_D = np.zeros(probability_DHW.shape[0], bool)
    filled_HW = np.zeros(probability_DHW.shape[1:], bool)
    for d, slice_HW in enumerate(probability_DHW):
        reaching_HW = slice_HW >= threshold
        filled_D[d] = reaching_HW.any()
        filled_HW |= reaching_HW
    box = []
    for filled in (filled_D, filled_HW.any(axis=1), filled_HW.any(axis=0)):
        indices = np.flatnonzero(filled)
        if indices.size == 0:
            return None
        box.append((int(indices[0]), int(indices[-1]) + 1))
    return box


def _crop_notes(geometry: ScanGeometry) -> list[str]:
    """Tell the user that the model sees only the part around the lungs, where that is so."""
    spacing_mm = geometry.model_spacing_mm
    seen_mm = [
        (stop - start) * length
        for (start, stop), length in zip(geometry.content_DHW, spacing_mm, strict=True)
    ]
    source_mm = spacing_from_affine(geometry.canonical_affine)
    scan_mm = [size * length for size, length in zip(geometry.canonical_shape_DHW, source_mm, strict=True)]
    if all(seen > whole - length for seen, whole, length in zip(seen_mm, scan_mm, spacing_mm, strict=True)):
        return []
    seen, whole = ("x".join(f"{length:.0f}" for length in lengths) for lengths in (seen_mm, scan_mm))
    return [f"The model sees {seen} mm around the lungs, of the scan's {whole} mm."]


def _cut_notes(
    axis: int, window: AxisWindow, core: tuple[float, float] | None, spacing_mm: float
) -> list[str]:
    """Tell the user what is too large for the model: of the lungs or, without lungs, of the scan."""
    seen = f"The model sees at most {window.size * spacing_mm:.0f} mm {_AXIS_WORDS[axis]}"
    if core is None:
        missing = window.full_size - window.size
        if missing <= 0:
            return []
        return [f"{seen}: the scan's outer {missing * spacing_mm:.0f} mm are left out, its middle is used."]
    missing_mm = cut_core(window, core) * spacing_mm
    return [] if missing_mm < spacing_mm else [f"{seen}: {missing_mm:.0f} mm of the lungs are left out."]
