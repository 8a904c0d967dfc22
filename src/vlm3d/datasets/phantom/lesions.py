"""Painters of the five lesions that have masks: into a phantom, or into any scan with a region map.

A painter takes a `Canvas` (HU, regions, coordinates in mm; axes to superior, posterior, left), a source of randomness
and a `FindingSpec`, changes the canvas in place, and returns what it painted. A mask holds the voxels of which more
than half was painted. A painter returns nothing where the scan has no room for its lesion.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt

from vlm3d.anatomy.regions import LEFT_LUNG_IDS, LUNG_IDS, REGION_BY_ID, REGION_IDS, RIGHT_LUNG_IDS
from vlm3d.datasets.phantom.frame import (
    Array,
    Box,
    Canvas,
    Slices,
    bounds,
    coverage,
    ellipsoid,
    smooth_noise,
)
from vlm3d.datasets.phantom.trees import Tubes, tube_coverage
from vlm3d.datasets.phantom.truth import FindingSpec, Painted, Side, is_lung

RngType = np.random.Generator
AERATED_HU = -400.0


def choose_lobes(
    canvas: Canvas, rng: RngType, spec: FindingSpec, count: int, lower: float = 0.0
) -> list[int]:
    """Draw lobes by the volume of air in them; ``lower`` over 0 favors the lower lobes, under 0 the upper ones."""
    wanted = [REGION_IDS[spec.region]] if spec.region else list(LUNG_IDS)
    if spec.side:
        wanted = [region for region in wanted if REGION_BY_ID[region].side == spec.side]
    coarse = (slice(None, None, 2), slice(None, None, 4), slice(None, None, 4))
    aerated = canvas.hu_DHW[coarse] < AERATED_HU
    sizes = np.bincount(canvas.regions_DHW[coarse][aerated], minlength=21)
    weights = np.array([float(sizes[region]) if region in LUNG_IDS else 0.0 for region in wanted])
    for place, region in enumerate(wanted):
        key = REGION_BY_ID[region].key
        weights[place] *= np.exp(lower if "lower" in key else -lower if "upper" in key else 0.0)
    if weights.sum() <= 0:
        return []
    return [wanted[pick] for pick in rng.choice(len(wanted), count, p=weights / weights.sum())]


def room_in_lobe(canvas: Canvas, rng: RngType, region: int, radius_mm: float) -> NDArray[np.float64] | None:
    """A random voxel of a lobe around which a ball of aerated lung of that lobe fits; None where there is none."""
    where = np.flatnonzero(canvas.regions_DHW == region)
    if len(where) == 0:
        return None
    picks = where[rng.integers(len(where), size=600)]
    centers = canvas.frame.points_at(np.stack(np.unravel_index(picks, canvas.frame.shape_DHW), axis=1))
    good = np.ones(len(centers), bool)
    angle = np.arange(14) * 2.399963
    height = np.linspace(-1, 1, 14)
    ring = np.sqrt(1 - height**2)
    directions = np.stack([height, ring * np.cos(angle), ring * np.sin(angle)], axis=1)
    density = np.zeros(len(centers))
    for direction in directions:
        index = tuple(canvas.frame.index_of(centers + direction * radius_mm).T)
        good &= canvas.regions_DHW[index] == region
        density += canvas.hu_DHW[tuple(canvas.frame.index_of(centers + direction * radius_mm * 0.6).T)]
    good &= density < len(directions) * AERATED_HU
    if not good.any():
        return None
    clear = np.where(good, density, np.inf)
    candidates = np.flatnonzero(clear <= np.quantile(clear[good], 0.3))
    return centers[candidates[int(rng.integers(len(candidates)))]]


def paint_nodules(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Lung nodules of 5 to 30 mm: round or lobulated, solid, part-solid or calcified, some with spicules."""
    count = spec.count or 1 + int(rng.poisson(1.8 * spec.severity))
    painted = []
    for region in choose_lobes(canvas, rng, spec, count):
        drawn = float(np.exp(rng.normal(np.log(6 + 15 * spec.severity), 0.3)))
        diameter = float(np.clip(spec.size_mm or drawn, 5, 30))
        center = room_in_lobe(canvas, rng, region, diameter / 2 + 2)
        while center is None and diameter > 5:
            diameter = max(diameter * 0.85, 5.0)
            center = room_in_lobe(canvas, rng, region, diameter / 2 + 2)
        kinds = ["solid", "part-solid", "calcified"]
        drawn_kind = kinds[int(rng.choice(3, p=[0.72, 0.2, 0.08]))]
        kind = spec.kind or ("solid" if drawn_kind == "part-solid" and diameter < 8 else drawn_kind)
        if center is not None:
            painted.append(_nodule(canvas, rng, center, diameter, kind, region))
    return painted


def _nodule(
    canvas: Canvas, rng: RngType, center: NDArray[np.float64], diameter: float, kind: str, region: int
) -> Painted:
    radius = diameter / 2
    box = canvas.frame.around(center, np.maximum(radius * 2.2, canvas.frame.step_mm * 1.01))
    assert box is not None, "the center is a voxel of the grid"
    radii = radius * np.array([rng.uniform(0.75, 1.0), 1.0, rng.uniform(0.75, 1.0)])
    surface = ellipsoid(box, center, radii)
    surface += smooth_noise(canvas.frame, box, max(radius * 0.8, 2.5), rng).clip(-1.5, 1.5) * radius * 0.09
    alpha = coverage(surface, canvas.frame.edge_mm)
    before = canvas.hu_DHW[box.index].copy()
    if kind == "part-solid":
        haze = np.maximum(before, -560.0 + 30 * smooth_noise(canvas.frame, box, 4, rng))
        core = coverage(ellipsoid(box, center, radii * rng.uniform(0.35, 0.6)), canvas.frame.edge_mm)
        canvas.blend(box.index, alpha, haze)
        canvas.blend(box.index, core, 25.0)
    else:
        density = rng.uniform(250, 600) if kind == "calcified" else rng.uniform(15, 55)
        canvas.blend(box.index, alpha, np.maximum(np.float32(density), before * 0.3))
        if diameter > 14 and rng.random() < 0.5:
            _spicules(canvas, rng, center, radius)
    return Painted(
        "Lung nodule",
        box.index,
        alpha > 0.5,
        "lung_nodule",
        kind,
        REGION_BY_ID[region].key,
        size_mm=round(float(2 * radii.max()), 1),
    )


def _spicules(canvas: Canvas, rng: RngType, center: NDArray[np.float64], radius: float) -> None:
    count = 14
    direction = rng.standard_normal((count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    reach = radius * rng.uniform(1.3, 1.9, (count, 1))
    width = np.tile([[0.9, 0.25]], (count, 1))
    spikes = Tubes(
        center + direction * radius * 0.8,
        center + direction * reach,
        width,
        np.zeros(count, int),
        np.zeros(count, int),
    )
    covered = tube_coverage(canvas.frame, spikes)
    if covered is not None:
        canvas.blend(covered[0], covered[1] * is_lung(canvas.regions_DHW[covered[0]]), 20.0)


def lobe_patch(
    canvas: Canvas, rng: RngType, region: int, radius_mm: float, *, rough: float = 0.28, edge_mm: float = 0.0
) -> tuple[Box, Array] | None:
    """An irregular patch within a lobe, up to the pleura: where, and its share of each voxel."""
    where = np.flatnonzero((canvas.regions_DHW == region) & (canvas.hu_DHW < AERATED_HU))
    if len(where) == 0:
        return None
    center_index = np.array(np.unravel_index(int(where[rng.integers(len(where))]), canvas.frame.shape_DHW))
    center = canvas.frame.points_at(center_index)
    radii = radius_mm * rng.uniform(0.75, 1.25, 3)
    box = canvas.frame.around(center, np.maximum(radii * 1.6, canvas.frame.step_mm * 1.01))
    assert box is not None, "the center is a voxel of the grid"
    surface = ellipsoid(box, center, radii)
    ripple = smooth_noise(canvas.frame, box, max(radius_mm * 0.5, 4.0), rng).clip(-1.8, 1.8)
    ripple += 0.5 * smooth_noise(canvas.frame, box, 6.0, rng).clip(-1.5, 1.5)
    surface += ripple * radius_mm * rough
    alpha = coverage(surface, max(edge_mm, canvas.frame.edge_mm))
    return box, alpha * airspace(canvas, box.index, (region,))


def airspace(canvas: Canvas, index: Slices, regions: tuple[int, ...]) -> NDArray[np.bool_]:
    """Voxels of some lobes, and those half filled by them at their border to the pleura."""
    ids = canvas.regions_DHW[index]
    inside = np.isin(ids, regions)
    rim = binary_dilation(inside) & ~inside & (canvas.hu_DHW[index] < -150) & ~is_lung(ids)
    return inside | (rim & (ids != REGION_IDS["airways"]))


def paint_ground_glass(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Ground-glass opacity: hazy patches in which vessels and bronchi stay visible."""
    count = spec.count or 1 + int(round(4 * spec.severity * rng.uniform(0.5, 1.2)))
    painted = []
    for region in choose_lobes(canvas, rng, spec, count, lower=0.4):
        radius = (spec.size_mm or 2 * (12 + 18 * spec.severity * rng.uniform(0.5, 1.2))) / 2
        patch = lobe_patch(canvas, rng, region, radius, edge_mm=6.0)
        if patch is None or not (patch[1] > 0.5).any():
            continue
        box, alpha = patch
        hu = canvas.hu_DHW[box.index]
        tissue = np.clip((-250.0 - hu) / 350.0, 0, 1) * np.clip((hu + 990.0) / 60.0, 0.15, 1)
        haze = rng.uniform(190, 320) + 25.0 * smooth_noise(canvas.frame, box, 7, rng)
        hu += alpha * tissue * haze.astype(np.float32)
        painted.append(
            Painted(
                "Lung opacity",
                box.index,
                alpha > 0.5,
                "ground_glass_opacity",
                "ground-glass",
                REGION_BY_ID[region].key,
            )
        )
    return painted


def paint_consolidation(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Consolidation: airless lung within a lobe, vessels hidden, bronchi still full of air."""
    count = spec.count or 1 + int(rng.random() < 0.5 * spec.severity)
    painted = []
    for region in dict.fromkeys(choose_lobes(canvas, rng, spec, count, lower=0.5)):
        radius = (spec.size_mm or 2 * (16 + 30 * spec.severity * rng.uniform(0.6, 1.2))) / 2
        patch = lobe_patch(canvas, rng, region, radius, rough=0.18, edge_mm=3.0)
        if patch is None or not (patch[1] > 0.5).any():
            continue
        box, alpha = patch
        density = rng.uniform(25, 50) + 8.0 * smooth_noise(canvas.frame, box, 6, rng)
        canvas.blend(box.index, alpha, density.astype(np.float32))
        _air_bronchograms(canvas, box, alpha, region)
        painted.append(
            Painted(
                "Consolidation", box.index, alpha > 0.5, "consolidation", "airspace", REGION_BY_ID[region].key
            )
        )
    return painted


def _air_bronchograms(canvas: Canvas, box: Box, alpha: Array, region: int) -> None:
    if canvas.airways is None:
        return
    tubes = canvas.airways.pick((canvas.airways.region_N == region) & (canvas.airways.radius_N2[:, 1] > 0.95))
    covered = tube_coverage(canvas.frame, tubes.with_radius(np.minimum(tubes.radius_N2, 2.2)))
    if covered is None:
        return
    air = np.zeros(canvas.frame.shape_DHW, np.float32)
    air[covered[0]] = covered[1]
    canvas.blend(box.index, air[box.index] * alpha, -950.0)


def paint_pleural_effusion(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Pleural effusion: fluid that lies at the back, with a meniscus up the wall, and presses on the lung."""
    if spec.side:
        sides = [spec.side]
    else:
        draw = rng.random()
        sides = ["right", "left"] if draw < 0.45 else ["right"] if draw < 0.75 else ["left"]
    return [piece for side in sides if (piece := _effusion(canvas, rng, spec, side)) is not None]


def _effusion(canvas: Canvas, rng: RngType, spec: FindingSpec, side: str) -> Painted | None:
    lobes = RIGHT_LUNG_IDS if side == "right" else LEFT_LUNG_IDS
    pleura = REGION_IDS[f"{side}_pleural_space"]
    index = bounds(np.isin(canvas.regions_DHW, lobes), margin=2)
    if index is None:
        return None
    box = canvas.frame.cut(index)
    ids, hu = canvas.regions_DHW[index], canvas.hu_DHW[index]
    space = airspace(canvas, index, lobes) | (ids == pleura)
    share = 0.03 + 0.36 * spec.severity * float(rng.uniform(0.7, 1.1))
    to_wall = _distance_to_wall(space, canvas.frame.step_mm)
    pull = box.y - 0.14 * box.z + 13.0 * np.exp(-to_wall / 7.0)
    pull += 1.5 * smooth_noise(canvas.frame, box, 30, rng)
    level = float(np.quantile(pull[space], 1 - share))
    alpha = coverage(level - pull, canvas.frame.edge_mm) * space
    mask = alpha > 0.5
    if not mask.any():
        return None
    squeezed = np.exp(-np.clip(level - pull, 0, 60) / 7.0) * space * np.clip((-200.0 - hu) / 400.0, 0, 1)
    hu += squeezed.astype(np.float32) * np.float32(330.0 * (0.5 + 0.5 * spec.severity))
    canvas.blend(index, alpha, np.float32(rng.uniform(2, 18)), pleura)
    thickness = float(to_wall[mask].max() + canvas.frame.step_mm[1])
    kind = "small" if share < 0.12 else "moderate" if share < 0.25 else "large"
    side_name: Side = "right" if side == "right" else "left"
    return Painted(
        "Pleural effusion",
        index,
        mask,
        "pleural_effusion",
        kind,
        f"{side}_pleural_space",
        side_name,
        thickness,
    )


def _distance_to_wall(space: NDArray[np.bool_], step_mm: NDArray[np.float64]) -> Array:
    """Distance in mm to the border of the pleural cavity, on a coarser grid where the scan is fine."""
    stride = np.maximum(np.floor(3.5 / step_mm).astype(int), 1)
    coarse = distance_transform_edt(
        space[:: stride[0], :: stride[1], :: stride[2]], sampling=stride * step_mm
    )
    for axis in range(3):
        coarse = np.repeat(coarse, stride[axis], axis=axis)
    d, h, w = space.shape
    return coarse[:d, :h, :w].astype(np.float32)


def paint_pericardial_effusion(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Pericardial effusion: a shell of fluid around the heart, deepest behind and below the left ventricle."""
    heart = canvas.regions_DHW == REGION_IDS["heart"]
    depth_mm = spec.size_mm or 5.0 + 17.0 * spec.severity
    margin = int(np.ceil((depth_mm + 8.0) / canvas.frame.step_mm.min()))
    index = bounds(heart, margin)
    if index is None:
        return []
    box, inner = canvas.frame.cut(index), heart[index]
    away = distance_transform_edt(~inner, sampling=canvas.frame.step_mm).astype(np.float32)
    z, y, x = canvas.frame.points_at(np.argwhere(inner).mean(axis=0) + [cut.start for cut in index])
    dz, dy, dx = box.z - z, box.y - y, box.x - x
    radius = np.sqrt(dz * dz + dy * dy + dx * dx) + 1.0
    weight = np.clip(0.55 + 0.1 * spec.severity + (0.4 * dy + 0.18 * dx - 0.22 * dz) / radius, 0.2, 1.0)
    weight *= 1.0 + 0.12 * smooth_noise(canvas.frame, box, 35, rng)
    top = float(canvas.frame.z_D[index[0]][inner.any(axis=(1, 2))].max())
    weight *= np.clip((top - 12.0 - box.z) / 22.0, 0, 1)
    fat_mm = 2.5
    shell = np.maximum(fat_mm - away, away - fat_mm - depth_mm * weight)
    ids = canvas.regions_DHW[index]
    yields = is_lung(ids) | (ids == REGION_IDS["mediastinum"])
    yields |= (ids == REGION_IDS["right_pleural_space"]) | (ids == REGION_IDS["left_pleural_space"])
    alpha = coverage(shell, canvas.frame.edge_mm) * yields * (weight > 0)
    mask = alpha > 0.5
    if not mask.any():
        return []
    canvas.blend(index, alpha, np.float32(rng.uniform(5, 20)), REGION_IDS["mediastinum"])
    kind = "small" if depth_mm < 10 else "moderate" if depth_mm < 20 else "large"
    return [
        Painted(
            "Pericardial effusion", index, mask, "pericardial_effusion", kind, "heart", "midline", depth_mm
        )
    ]
