"""Painters of the lungs' findings that have no mask of their own: airways, interstitium, scars, emphysema.

They work as those of `vlm3d.datasets.phantom.lesions`. A scan without known bronchi gets some, grown into its lobes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom.collapse import paint_lobar_collapse
from vlm3d.datasets.phantom.frame import Array, Box, Canvas, Slices, bounds, coverage, smooth_noise
from vlm3d.datasets.phantom.lesions import RngType, choose_lobes
from vlm3d.datasets.phantom.trees import Tubes, grow, join, sample_in_region, tube_coverage
from vlm3d.datasets.phantom.truth import FindingSpec, Painted, Side, is_lung


def bronchi_of(canvas: Canvas, rng: RngType) -> Tubes | None:
    """The scan's bronchi; grown from the middle of the chest into every lobe where they are not known."""
    if canvas.airways is not None:
        return canvas.airways
    lungs = is_lung(canvas.regions_DHW)
    index = bounds(lungs)
    if index is None:
        return None
    hilum = canvas.frame.points_at([(cut.start + cut.stop) / 2 for cut in index])
    trees = []
    for region in LUNG_IDS:
        points = sample_in_region(canvas.frame, canvas.regions_DHW, region, rng, spacing_mm=10.0)
        if len(points) >= 4:
            root = points[np.argmin(np.linalg.norm(points - hilum, axis=1))]
            trees.append(grow(points, root, points.mean(0) - root, rng, leaf_radius_mm=0.4, region=region))
    canvas.airways = join(trees) if trees else None
    return canvas.airways


def _whole_lungs(
    canvas: Canvas, finding: str, touched: NDArray[np.bool_], index: Slices, kind: str
) -> list[Painted]:
    """One piece for a diffuse finding, on both sides or on the side that has nearly all of it."""
    ids = canvas.regions_DHW[index][touched]
    if len(ids) == 0:
        return []
    counts = np.bincount(ids, minlength=21)
    right, left = counts[1:4].sum(), counts[4:6].sum()
    total = max(right + left, 1)
    side: Side = "right" if right > 0.95 * total else "left" if left > 0.95 * total else "bilateral"
    return [Painted(finding, index, touched, None, kind, side=side)]


def _box_of_lobes(canvas: Canvas, lobes: list[int]) -> Box | None:
    index = bounds(np.isin(canvas.regions_DHW, lobes))
    return None if index is None else canvas.frame.cut(index)


def _wanted_lobes(spec: FindingSpec) -> list[int]:
    lobes = [REGION_IDS[spec.region]] if spec.region else list(LUNG_IDS)
    return [lobe for lobe in lobes if spec.side in (None, REGION_BY_ID[lobe].side)]


def paint_emphysema(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Emphysema: holes without walls, centrilobular, mostly in the upper lobes; bullae below the pleura if severe."""
    box = _box_of_lobes(canvas, _wanted_lobes(spec))
    if box is None:
        return []
    lungs = np.isin(canvas.regions_DHW[box.index], _wanted_lobes(spec))
    span = float(np.ptp(box.z)) or 1.0
    height = (box.z - box.z.min()) / span
    holes = smooth_noise(canvas.frame, box, 6.5, rng) + 0.5 * smooth_noise(canvas.frame, box, 13.0, rng)
    zone = smooth_noise(canvas.frame, box, 45.0, rng)
    threshold = 2.0 - 1.6 * spec.severity - 1.1 * (height - 0.55) * (1.2 - 0.6 * spec.severity) - 0.25 * zone
    alpha = np.clip((holes - threshold) * 1.6, 0, 1) * lungs
    if spec.severity > 0.5:
        for _ in range(int(rng.integers(2, 7))):
            _bulla(canvas, box, alpha, lungs, rng, spec.severity)
    hu = canvas.hu_DHW[box.index]
    soft = np.clip((-500.0 - hu) / 250.0, 0, 1)
    hu += alpha * soft * (np.float32(-978.0) - hu)
    hu -= lungs * soft * np.float32(25.0 * spec.severity)
    kind = "centrilobular and bullous" if spec.severity > 0.5 else "centrilobular"
    return _whole_lungs(canvas, "Emphysema", (alpha > 0.5) & (soft > 0.5), box.index, kind)


def _bulla(
    canvas: Canvas, box: Box, alpha: Array, lungs: NDArray[np.bool_], rng: RngType, severity: float
) -> None:
    upper = np.flatnonzero(lungs & (box.z > np.quantile(box.z, 0.7)))
    if len(upper) == 0:
        return
    d, h, w = np.unravel_index(int(upper[rng.integers(len(upper))]), lungs.shape)
    radius = rng.uniform(5, 8 + 14 * severity)
    gap = np.sqrt(
        (box.z - box.z[d, 0, 0]) ** 2 + (box.y - box.y[0, h, 0]) ** 2 + (box.x - box.x[0, 0, w]) ** 2
    )
    np.maximum(alpha, coverage(gap - radius, canvas.frame.edge_mm) * lungs, out=alpha)


def paint_mosaic(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Mosaic attenuation: lobules with sharp borders, dark beside bright."""
    lobes = _wanted_lobes(spec)
    box = _box_of_lobes(canvas, lobes)
    if box is None:
        return []
    shade, _ = _lobules(box, canvas.frame.step_mm, rng, size_mm=17.0)
    patch = smooth_noise(canvas.frame, box, 38.0, rng)
    darkness = np.clip((shade + 0.35 * patch - 0.35) * 2.5 + 0.5, 0, 1)
    lungs = np.isin(canvas.regions_DHW[box.index], lobes)
    hu = canvas.hu_DHW[box.index]
    soft = np.clip((-450.0 - hu) / 250.0, 0, 1) * np.clip((hu + 985.0) / 40.0, 0, 1)
    depth = 58.0 + 47.0 * spec.severity
    hu += lungs * soft * np.float32(depth) * (1.25 - 1.85 * darkness)
    return _whole_lungs(canvas, "Mosaic attenuation pattern", (darkness > 0.5) & lungs, box.index, "lobular")


def _lobules(box: Box, step_mm: NDArray[np.float64], rng: RngType, size_mm: float) -> tuple[Array, Array]:
    """Secondary lobules: a random shade (-1..1) a lobule, and the distance in mm to the nearest septum."""
    stride = np.maximum(np.floor(3.1 / step_mm).astype(int), 1)
    axes = [
        axis.ravel()[::s].astype(np.float64) for axis, s in zip((box.z, box.y, box.x), stride, strict=True)
    ]
    low, high = np.array([a[0] for a in axes]), np.array([a[-1] for a in axes])
    cells = [np.arange(lo - size_mm, hi + 2 * size_mm, size_mm) for lo, hi in zip(low, high, strict=True)]
    seeds = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1).reshape(-1, 3)
    seeds += rng.uniform(-0.45, 0.45, seeds.shape) * size_mm
    shades = rng.uniform(-1, 1, len(seeds)).astype(np.float32)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    distance, nearest = cKDTree(seeds).query(points, k=2)
    between = np.linalg.norm(seeds[nearest[:, 1]] - seeds[nearest[:, 0]], axis=1)
    septum = (distance[:, 1] ** 2 - distance[:, 0] ** 2) / np.maximum(2 * between, 1e-6)
    shape = tuple(len(axis) for axis in axes)
    shade = _finer(shades[nearest[:, 0]].reshape(shape), stride, box.shape)
    return shade, _finer(septum.astype(np.float32).reshape(shape), stride, box.shape)


def _finer(coarse: Array, stride: NDArray[np.intp], shape: tuple[int, int, int]) -> Array:
    """A field on every ``stride``-th voxel, interpolated to all of them."""
    for axis in range(3):
        if stride[axis] == 1:
            continue
        position = np.arange(shape[axis]) / stride[axis]
        low = np.minimum(position.astype(int), coarse.shape[axis] - 1)
        high = np.minimum(low + 1, coarse.shape[axis] - 1)
        t = (position - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        coarse = coarse.take(low, axis) * (1 - t) + coarse.take(high, axis) * t
    return coarse


def paint_septal_thickening(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Interlobular septal thickening: a net of fine lines around the lobules, near the pleura and at the bases."""
    lobes = _wanted_lobes(spec)
    box = _box_of_lobes(canvas, lobes)
    if box is None:
        return []
    lungs = np.isin(canvas.regions_DHW[box.index], lobes)
    _, septum = _lobules(box, canvas.frame.step_mm, rng, size_mm=19.0)
    stride = np.maximum(np.floor(3.5 / canvas.frame.step_mm).astype(int), 1)
    depth = distance_transform_edt(
        lungs[:: stride[0], :: stride[1], :: stride[2]], sampling=stride * canvas.frame.step_mm
    )
    depth = _finer(depth.astype(np.float32), stride, box.shape)
    height = (box.z - box.z.min()) / max(float(np.ptp(box.z)), 1.0)
    zone = np.clip((26.0 - depth) / 10.0, 0, 1) * np.clip(
        (0.45 + 0.45 * spec.severity - height) * 5.0, 0.0, 1
    )
    zone *= np.clip(smooth_noise(canvas.frame, box, 40, rng) * 0.8 + 0.7 + 0.5 * spec.severity, 0, 1)
    half = 0.4 + 0.45 * spec.severity
    share = np.clip(1.0 - (septum - half) / canvas.frame.edge_mm, 0, 1) * min(
        1.0, 1.6 * half / canvas.frame.edge_mm
    )
    alpha = (share * zone * lungs).astype(np.float32)
    canvas.blend(box.index, alpha, np.maximum(canvas.hu_DHW[box.index], -60.0))
    touched = (alpha > min(0.25, 0.5 * float(alpha.max()))) & lungs
    return _whole_lungs(canvas, "Interlobular septal thickening", touched, box.index, "reticular")


def _airway_targets(canvas: Canvas, rng: RngType, spec: FindingSpec, count: int) -> list[int]:
    return list(dict.fromkeys(choose_lobes(canvas, rng, spec, count, lower=0.4)))


def _paint_bronchi(
    canvas: Canvas, tubes: Tubes, wall_mm: NDArray[np.float64]
) -> tuple[Slices, NDArray[np.bool_]] | None:
    outer = tube_coverage(canvas.frame, tubes.with_radius(tubes.radius_N2 + wall_mm), 4)
    lumen = tube_coverage(canvas.frame, tubes, 4)
    if outer is None or lumen is None:
        return None
    canvas.blend(outer[0], outer[1] * is_lung(canvas.regions_DHW[outer[0]]), 35.0)
    canvas.blend(lumen[0], lumen[1] * is_lung(canvas.regions_DHW[lumen[0]]), -985.0)
    touched = (outer[1] > 0.4) & is_lung(canvas.regions_DHW[outer[0]])
    return outer[0], touched


def paint_bronchiectasis(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Bronchiectasis: bronchi wider than the artery beside them that do not taper toward the pleura."""
    airways = bronchi_of(canvas, rng)
    if airways is None:
        return []
    painted = []
    for region in _airway_targets(canvas, rng, spec, spec.count or 1 + int(round(2.4 * spec.severity))):
        own = airways.pick((airways.region_N == region) & (airways.radius_N2[:, 1] > 0.55))
        own = own.pick(own.generation_N >= 2)
        if len(own) == 0:
            continue
        origin = own.start_N3[int(rng.integers(len(own)))]
        near = np.linalg.norm(own.start_N3 - origin, axis=1) < 28 + 30 * spec.severity
        own = own.pick(near)
        wide = np.maximum(own.radius_N2 * (1.7 + 0.8 * spec.severity), 2.1 + 1.5 * spec.severity)
        beads = 1.0 + 0.18 * rng.standard_normal(wide.shape)
        own = own.with_radius(np.clip(wide * beads.clip(0.7, 1.4), 1.2, 7.0))
        done = _paint_bronchi(canvas, own, np.full_like(own.radius_N2, 1.0))
        if done is not None and done[1].any():
            kind = "cylindrical" if spec.severity < 0.6 else "varicose"
            painted.append(
                Painted("Bronchiectasis", done[0], done[1], "bronchiectasis", kind, REGION_BY_ID[region].key)
            )
    return painted


def paint_peribronchial_thickening(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Peribronchial thickening: thick walls around bronchi of normal width."""
    airways = bronchi_of(canvas, rng)
    if airways is None:
        return []
    lobes = _wanted_lobes(spec)
    own = airways.pick(np.isin(airways.region_N, lobes) & (airways.radius_N2[:, 1] > 0.7))
    if len(own) == 0:
        return []
    done = _paint_bronchi(canvas, own, 1.1 + (0.4 + 0.6 * spec.severity) * np.minimum(own.radius_N2, 2.5))
    if done is None:
        return []
    return _whole_lungs(canvas, "Peribronchial thickening", done[1], done[0], "diffuse")


def _plate(
    canvas: Canvas,
    rng: RngType,
    region: int,
    *,
    thick_mm: float,
    long_mm: float,
    wide_mm: float,
    flat: float,
    anchor: NDArray[np.float64] | None = None,
) -> tuple[Box, Array] | None:
    """A slightly bent plate within a lobe, around a drawn or given point; ``flat`` is how level it lies."""
    if anchor is None:
        index = bounds(canvas.regions_DHW == region)
        if index is None:
            return None
        inner = np.argwhere(canvas.regions_DHW[index] == region)
        low = inner[inner[:, 0] <= np.quantile(inner[:, 0], 0.6)] if flat > 0.5 else inner
        start = [cut.start for cut in index]
        anchor = canvas.frame.points_at(low[int(rng.integers(len(low)))] + start)
    normal = rng.standard_normal(3) * [1, 1 - 0.75 * flat, 1 - 0.75 * flat]
    normal[0] += np.sign(normal[0]) * 2 * flat
    normal /= np.linalg.norm(normal)
    along = np.cross(normal, rng.standard_normal(3))
    along /= np.linalg.norm(along)
    across = np.cross(normal, along)
    reach = max(long_mm, wide_mm)
    box = canvas.frame.around(anchor, np.maximum(reach, canvas.frame.step_mm * 1.01))
    if box is None:
        return None
    dz, dy, dx = box.z - anchor[0], box.y - anchor[1], box.x - anchor[2]
    n, u, v = (row[0] * dz + row[1] * dy + row[2] * dx for row in (normal, along, across))
    n = (
        n
        + 0.006 * (u * u - v * v) * rng.uniform(-1, 1)
        + thick_mm * 0.4 * smooth_noise(canvas.frame, box, 11, rng)
    )
    edge_taper = np.clip(1.25 - np.sqrt((u / (long_mm / 2)) ** 2 + (v / (wide_mm / 2)) ** 2), 0, 1)
    half = thick_mm / 2 * np.sqrt(edge_taper)
    share = np.minimum(coverage(np.abs(n) - half, canvas.frame.edge_mm), 2.4 * half / canvas.frame.edge_mm)
    share = share * (edge_taper > 0) * (canvas.regions_DHW[box.index] == region)
    return box, share.astype(np.float32)


def paint_atelectasis(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Atelectasis: plates of collapsed lung, level and near the bases, or a whole lobe that has lost its volume."""
    lobar = rng.random() < 0.15 + 0.4 * spec.severity
    if spec.kind == "lobar" or (spec.kind is None and spec.size_mm is None and spec.count is None and lobar):
        lobes = choose_lobes(canvas, rng, spec, 1, lower=0.8)
        collapsed = [piece for lobe in lobes for piece in paint_lobar_collapse(canvas, rng, spec, lobe)]
        if collapsed:
            return collapsed
    count = spec.count or 1 + int(round(2.2 * spec.severity * rng.uniform(0.6, 1.2)))
    painted = []
    for region in choose_lobes(canvas, rng, spec, count, lower=1.2):
        thick = 3.0 + 6.0 * spec.severity * rng.uniform(0.6, 1.2)
        long_mm = spec.size_mm or rng.uniform(35, 50 + 40 * spec.severity)
        plate = _plate(canvas, rng, region, thick_mm=thick, long_mm=long_mm, wide_mm=long_mm * 0.7, flat=0.7)
        if plate is None or not (plate[1] > 0.3).any():
            continue
        box, alpha = plate
        canvas.blend(box.index, alpha, np.maximum(canvas.hu_DHW[box.index], 35.0))
        kind = "linear" if thick < 6 else "plate-like"
        mask = alpha > min(0.5, float(alpha.max()) * 0.6)
        painted.append(Painted("Atelectasis", box.index, mask, "atelectasis", kind, REGION_BY_ID[region].key))
    return painted


def paint_fibrotic_sequela(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Fibrotic sequela: a thickened patch of pleura from which thin irregular bands run inward, often in the apices."""
    count = spec.count or 1 + int(round(3 * spec.severity * rng.uniform(0.6, 1.2)))
    painted = []
    for region in choose_lobes(canvas, rng, spec, count, lower=-0.7):
        anchor = _pleural_point(canvas, rng, region)
        if anchor is None:
            continue
        reach = 22.0 + 16.0 * spec.severity
        box = canvas.frame.around(anchor, np.maximum(reach * 1.2, canvas.frame.step_mm * 1.01))
        assert box is not None, "the anchor is a voxel of the grid"
        scar = _pleural_cap(canvas, box, anchor, reach * 0.5, 2.5 + 3.0 * spec.severity, region)
        bands = 3 + int(round(3 * spec.severity))
        for _ in range(bands):
            plate = _plate(
                canvas,
                rng,
                region,
                thick_mm=2.0 + 1.8 * spec.severity,
                long_mm=reach * rng.uniform(1.2, 2.0),
                wide_mm=reach * rng.uniform(0.5, 0.9),
                flat=0.1,
                anchor=anchor + rng.normal(0, 0.12, 3) * reach,
            )
            if plate is not None:
                _merge(scar, box, *plate)
        if not (scar > 0.3).any():
            continue
        canvas.blend(box.index, scar, np.maximum(canvas.hu_DHW[box.index], 45.0))
        mask = scar > min(0.5, float(scar.max()) * 0.6)
        painted.append(
            Painted(
                "Pulmonary fibrotic sequela",
                box.index,
                mask,
                "pulmonary_fibrotic_sequela",
                "band",
                REGION_BY_ID[region].key,
            )
        )
    return painted


def _merge(share: Array, box: Box, other: Box, other_share: Array) -> None:
    """Raise the shares of a box to those of another where the two overlap."""
    here, there = [], []
    for mine, its in zip(box.index, other.index, strict=True):
        start, stop = max(mine.start, its.start), min(mine.stop, its.stop)
        here.append(slice(start - mine.start, max(stop - mine.start, 0)))
        there.append(slice(start - its.start, max(stop - its.start, 0)))
    view = share[here[0], here[1], here[2]]
    if view.size:
        np.maximum(view, other_share[there[0], there[1], there[2]], out=view)


def _pleural_point(canvas: Canvas, rng: RngType, region: int) -> NDArray[np.float64] | None:
    """A voxel of a lobe beside the chest wall."""
    index = bounds(canvas.regions_DHW == region)
    if index is None:
        return None
    lobe = canvas.regions_DHW[index] == region
    sideways = np.flatnonzero(lobe.any(axis=1))
    d, w = np.divmod(sideways[int(rng.integers(len(sideways)))], lobe.shape[2])
    rows = np.flatnonzero(lobe[d, :, w])
    h = rows[0] if rng.random() < 0.5 else rows[-1]
    return canvas.frame.points_at(np.array([d, h, w]) + [cut.start for cut in index])


def _pleural_cap(
    canvas: Canvas, box: Box, anchor: NDArray[np.float64], reach_mm: float, thick_mm: float, region: int
) -> Array:
    """Share of each voxel of a lobe that a patch of thickened pleura takes."""
    lungs = is_lung(canvas.regions_DHW[box.index])
    depth = distance_transform_edt(np.pad(lungs, 1, mode="edge"), sampling=canvas.frame.step_mm)[
        1:-1, 1:-1, 1:-1
    ]
    dz, dy, dx = box.z - anchor[0], box.y - anchor[1], box.x - anchor[2]
    near = np.clip(1.3 - np.sqrt(dz * dz + dy * dy + dx * dx) / np.float32(reach_mm), 0, 1)
    cap = coverage(depth.astype(np.float32) - thick_mm * np.sqrt(near), canvas.frame.edge_mm) * (near > 0)
    return (cap * (canvas.regions_DHW[box.index] == region)).astype(np.float32)
