"""What moves during a scan, and what metal does to it: double contours of heart and diaphragm, streaks.

The densities are changed before reconstruction; masks stay those of the main contour, which keeps most of the weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.frame import Array, Canvas, bounds
from vlm3d.datasets.phantom.truth import is_lung

GHOST_SHARE = 0.38  # weight of the second contour


def move_heart(canvas: Canvas, shift_mm: tuple[float, float]) -> None:
    """The beating heart leaves a second contour of itself, shifted by (y, x) mm."""
    index = bounds(canvas.regions_DHW == REGION_IDS["heart"], margin=4)
    if index is None:
        return
    box = canvas.frame.cut(_inside(index, canvas))
    part = canvas.hu_DHW[box.index]
    ghost = _shifted(part, (0.0, *shift_mm), canvas.frame.step_mm)
    z, y, x = (np.linspace(-1, 1, size, dtype=np.float32) for size in part.shape)
    weight = np.clip(1.6 * (1 - np.abs(z)), 0, 1)[:, None, None] * np.clip(3 * (1 - np.abs(y)), 0, 1)[:, None]
    weight = weight * np.clip(3 * (1 - np.abs(x)), 0, 1) * np.float32(GHOST_SHARE)
    part += weight * (ghost - part)


def move_diaphragm(canvas: Canvas, shift_mm: float) -> None:
    """Breath leaves a second contour along z, strongest at the bases, gone in mid chest."""
    lungs = np.flatnonzero(is_lung(canvas.regions_DHW[:, ::4, ::4]).any(axis=(1, 2)))
    if len(lungs) < 4:
        return
    stop = int(lungs[0] + 0.5 * (lungs[-1] - lungs[0])) + 1
    part = canvas.hu_DHW[:stop]
    ghost = _shifted(part, (shift_mm, 0.0, 0.0), canvas.frame.step_mm)
    share = np.clip((stop - np.arange(stop)) / max(0.35 * (stop - lungs[0]), 1.0), 0, 1)
    ghost -= part
    ghost *= (GHOST_SHARE * share).astype(np.float32)[:, None, None]
    part += ghost


def add_streaks(canvas: Canvas, strength_hu: float, rng: np.random.Generator) -> None:
    """Bright and dark rays in the plane, from metal of more than 2500 HU and 0.4 square centimeters."""
    table = rng.standard_normal(240).astype(np.float32)
    area = float(np.prod(canvas.frame.step_mm[1:]))
    metal = canvas.hu_DHW > 2500.0
    rows = np.flatnonzero(metal.any(axis=(1, 2)))
    for d in rows:
        where = np.argwhere(metal[d])
        if len(where) * area < 40.0:
            continue
        h, w = where.mean(axis=0)
        y = (np.arange(metal.shape[1], dtype=np.float32) - np.float32(h))[:, None] * canvas.frame.step_mm[1]
        x = (np.arange(metal.shape[2], dtype=np.float32) - np.float32(w))[None] * canvas.frame.step_mm[2]
        place = (np.arctan2(y, x) / (2 * np.pi) + 0.5) * len(table)
        low = place.astype(np.intp)
        t = (place - low).astype(np.float32)
        ray = table[low % len(table)] * (1 - t) + table[(low + 1) % len(table)] * t
        fall = np.exp(-np.sqrt(y * y + x * x) / 55.0).astype(np.float32)
        canvas.hu_DHW[d] += np.float32(strength_hu) * ray * fall * ~metal[d]


def _inside(index: tuple[slice, slice, slice], canvas: Canvas) -> tuple[slice, slice, slice]:
    d, h, w = (
        slice(cut.start, min(cut.stop, size)) for cut, size in zip(index, canvas.hu_DHW.shape, strict=True)
    )
    return d, h, w


def _shifted(part: Array, by_mm: tuple[float, float, float], step_mm: NDArray[np.float64]) -> Array:
    """The densities moved by some mm along each axis, interpolated between neighbors."""
    for axis, (mm, side) in enumerate(zip(by_mm, step_mm, strict=True)):
        whole, share = divmod(-mm / float(side), 1.0)
        place = np.arange(part.shape[axis]) + int(whole)
        last = part.shape[axis] - 1
        if mm:
            first = part.take(np.clip(place, 0, last), axis)
            second = part.take(np.clip(place + 1, 0, last), axis)
            part = first + np.float32(share) * (second - first)
    return part
