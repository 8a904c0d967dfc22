"""Lobar atelectasis: a collapsed lobe, and the volume that it loses, seen on what moves into its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom.frame import Array, Box, Canvas, bounds, coverage, smooth_noise
from vlm3d.datasets.phantom.lesions import airspace
from vlm3d.datasets.phantom.truth import FindingSpec, Painted, is_lung, midline

_FIXED = ("body_wall", "ribs", "spine", "sternum_shoulder_girdle")
_EXPANDS = {
    "right_lower_lobe": "right_upper_lobe",
    "right_middle_lobe": "right_upper_lobe",
    "right_upper_lobe": "right_lower_lobe",
    "left_lower_lobe": "left_upper_lobe",
    "left_upper_lobe": "left_lower_lobe",
}
"""The lobe that expands into the place of a collapsed one."""


def paint_lobar_collapse(
    canvas: Canvas, rng: np.random.Generator, spec: FindingSpec, region: int
) -> list[Painted]:
    """Collapse a lobe to a dense wedge beside spine and mediastinum.

    In a phantom the half of the diaphragm rises and the mediastinum moves to that side; a real scan stays as it lies.
    """
    index = bounds(canvas.regions_DHW == region)
    if index is None:
        return []
    key = REGION_BY_ID[region].key
    if canvas.airways is not None:
        sign = 1.0 if REGION_BY_ID[region].side == "left" else -1.0
        rise = (8.0 + 18.0 * spec.severity) * (1.0 if "lower" in key else 0.5)
        _shift_organs(canvas, sign, rise, 4.0 + 9.0 * spec.severity)
        index = bounds(canvas.regions_DHW == region)
        if index is None:
            return []
    d, h, w = (slice(max(cut.start - 1, 0), cut.stop + 1) for cut in index)
    box = canvas.frame.cut((d, h, w))
    lobe = canvas.regions_DHW[box.index] == region
    room = airspace(canvas, box.index, (region,))
    far = _away_from_hilum(box, key, midline(canvas))
    far += 2.5 * smooth_noise(canvas.frame, box, 14, rng)
    share = 0.42 - 0.2 * spec.severity * float(rng.uniform(0.7, 1.0))
    edge = float(np.quantile(far[lobe], share))
    alpha = coverage(far - edge, max(canvas.frame.edge_mm, 3.0)) * room
    mask = alpha > 0.5
    if not mask.any():
        return []
    density = float(rng.uniform(35, 65)) + 6.0 * smooth_noise(canvas.frame, box, 7, rng)
    canvas.blend(box.index, alpha, np.maximum(canvas.hu_DHW[box.index], density).astype(np.float32))
    canvas.regions_DHW[box.index][lobe & ~mask] = REGION_IDS[_EXPANDS[key]]
    return [Painted("Atelectasis", box.index, mask, "atelectasis", "lobar", key)]


def _away_from_hilum(box: Box, key: str, middle_mm: float) -> Array:
    """How late each voxel of a lobe loses its air, in mm: a collapsing lobe shrinks toward one corner."""
    aside = np.abs(box.x - np.float32(middle_mm))
    from_back, from_front = box.y[:, -1:, :] - box.y, box.y - box.y[:, :1, :]
    from_top, from_base = box.z[-1:] - box.z, box.z - box.z[:1]
    if "lower" in key:
        return (aside + 0.6 * from_back + 0.25 * from_base).astype(np.float32)
    if "middle" in key:
        return (aside + 0.3 * from_front + 0.3 * from_base).astype(np.float32)
    if "right" in key:
        return (aside + 0.2 * from_front + 0.6 * from_top).astype(np.float32)
    return (aside + 0.7 * from_front + 0.15 * from_top).astype(np.float32)


def _shift_organs(canvas: Canvas, sign: float, rise_mm: float, aside_mm: float) -> None:
    """Raise one half of the diaphragm and move the mediastinum to that side; chest wall and spine stay.

    Args:
        canvas: Changed in place, with its airways and coronary arteries.
        sign: 1 for the left side, -1 for the right.
        rise_mm: Largest rise of the diaphragm.
        aside_mm: Largest shift of the mediastinum.
    """
    lungs = np.flatnonzero(is_lung(canvas.regions_DHW[:, ::2, ::2]).any(axis=(1, 2)))
    frame, middle = canvas.frame, midline(canvas)
    base, top = float(frame.z_D[lungs[0]]), float(frame.z_D[lungs[-1]])

    def field(z: NDArray[np.floating], x: NDArray[np.floating]) -> tuple[Array, Array]:
        """Upward and sideward displacement in mm at heights and sides."""
        above = np.clip((top - z) / max(top - base - 30.0, 1.0), 0, 1)
        below = np.clip((z - float(frame.z_D[0])) / max(base + 20.0 - float(frame.z_D[0]), 1.0), 0, 1)
        half = np.clip((sign * (x - middle) - 8.0) / 40.0, 0, 1)
        height = np.minimum(above, below) ** 0.8
        return rise_mm * height * half, sign * aside_mm * height * np.clip(
            1.25 - np.abs(x - middle) / 95.0, 0, 1
        )

    stop = int(lungs[-1]) + 1
    up, aside = field(frame.z_D[:stop, None], frame.x_W[None])
    z_at = (np.arange(stop)[:, None] - up / frame.step_mm[0]).clip(0, len(frame.z_D) - 1.001)
    x_at = (np.arange(len(frame.x_W))[None] - aside / frame.step_mm[2]).clip(0, len(frame.x_W) - 1.001)
    low, left = z_at.astype(np.intp), x_at.astype(np.intp)
    t, s = ((at - first).astype(np.float32)[:, :, None] for at, first in ((z_at, low), (x_at, left)))
    hu, ids = canvas.hu_DHW, canvas.regions_DHW
    rows = bounds(is_lung(ids))
    assert rows is not None, "there are lungs"
    cut = slice(max(rows[1].start - 4, 0), rows[1].stop + 4)
    moved = (1 - t) * ((1 - s) * hu[low, cut, left] + s * hu[low, cut, left + 1])
    moved += t * ((1 - s) * hu[low + 1, cut, left] + s * hu[low + 1, cut, left + 1])
    moved_ids = ids[np.rint(z_at).astype(np.intp), cut, np.rint(x_at).astype(np.intp)].transpose(0, 2, 1)
    fixed = np.zeros(256, bool)
    fixed[[0, *(REGION_IDS[key] for key in _FIXED)]] = True
    free = ~fixed[ids[:stop, cut]] & ~fixed[moved_ids]
    np.copyto(hu[:stop, cut], moved.transpose(0, 2, 1), where=free)
    np.copyto(ids[:stop, cut], moved_ids, where=free)

    def follow(points_N3: NDArray[np.float64]) -> NDArray[np.float64]:
        rise, shift = field(points_N3[:, 0], points_N3[:, 2])
        return points_N3 + np.stack([rise, np.zeros(len(points_N3)), shift], axis=1)

    if canvas.airways is not None:
        tubes = canvas.airways
        canvas.airways = replace(tubes, start_N3=follow(tubes.start_N3), end_N3=follow(tubes.end_N3))
    canvas.coronaries = {name: follow(path) for name, path in canvas.coronaries.items()}
