"""Painters of findings outside the lungs: calcified walls, lymph nodes, hernia, heart size, devices.

They work as those of `vlm3d.datasets.phantom.lesions`, from the regions of any scan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, map_coordinates

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.frame import Canvas, Slices, bounds, coverage, ellipsoid, spline, tube
from vlm3d.datasets.phantom.lesions import RngType
from vlm3d.datasets.phantom.truth import FindingSpec, Painted, Side, is_lung, midline

Point = NDArray[np.float64]


def paint_arterial_calcification(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Arterial wall calcification: plaques that follow the wall of the aorta, most at the arch."""
    index = bounds(canvas.regions_DHW == REGION_IDS["aorta"], margin=1)
    if index is None:
        return []
    aorta = canvas.regions_DHW[index] == REGION_IDS["aorta"]
    wall = np.zeros(canvas.frame.shape_DHW, bool)
    wall[index] = aorta & ~binary_erosion(aorta)
    spots = np.argwhere(wall)
    touched = np.zeros_like(wall)
    for _ in range(spec.count or 4 + int(round(12 * spec.severity))):
        center = canvas.frame.points_at(spots[int(rng.integers(len(spots)))])
        radii = rng.uniform(3.0, 5.0 + 5.0 * spec.severity, 3)
        box = canvas.frame.around(center, np.maximum(radii + 2, canvas.frame.step_mm * 1.01))
        assert box is not None, "the center is a voxel of the grid"
        alpha = coverage(ellipsoid(box, center, radii), canvas.frame.edge_mm) * wall[box.index]
        canvas.blend(box.index, alpha.astype(np.float32) * 0.9, np.float32(rng.uniform(700, 1300)))
        touched[box.index] |= alpha > 0.5
    mask = touched[index]
    if not mask.any():
        return []
    return [Painted("Arterial wall calcification", index, mask, None, "aortic", "aorta", "midline")]


def coronary_courses(canvas: Canvas) -> dict[str, Point]:
    """Courses of the coronary arteries: the phantom's own, else great circles over the heart region's surface."""
    if canvas.coronaries:
        return canvas.coronaries
    index = bounds(canvas.regions_DHW == REGION_IDS["heart"], margin=1)
    if index is None:
        return {}
    heart = canvas.regions_DHW[index] == REGION_IDS["heart"]
    start = np.array([cut.start for cut in index])
    center = canvas.frame.points_at(np.argwhere(heart).mean(axis=0) + start)
    courses = {
        "left anterior descending": [
            [0.75, -0.2, 0.25],
            [0.35, -0.75, 0.45],
            [-0.3, -0.75, 0.6],
            [-0.6, -0.4, 0.7],
        ],
        "circumflex": [[0.75, -0.1, 0.3], [0.5, 0.3, 0.75], [0.0, 0.7, 0.7]],
        "right": [[0.7, -0.4, -0.3], [0.2, -0.7, -0.7], [-0.5, -0.5, -0.7], [-0.8, 0.1, -0.4]],
    }
    paths = {}
    for name, control in courses.items():
        heading = spline(control, 0.06)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        steps = np.arange(5.0, 160.0, 1.0)
        rays = canvas.frame.index_of((center + heading[:, None] * steps[None, :, None]).reshape(-1, 3))
        inside = canvas.regions_DHW[tuple(rays.T)] == REGION_IDS["heart"]
        last = inside.reshape(len(heading), -1) * np.arange(len(steps))
        paths[name] = center + heading * steps[last.max(axis=1)][:, None]
    return paths


def paint_coronary_calcification(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Coronary artery wall calcification: dense beads along the coronary arteries, the anterior one first."""
    courses = coronary_courses(canvas)
    wanted = ["left anterior descending", "circumflex", "right"][: 1 + int(round(2 * spec.severity))]
    painted = []
    for name in wanted:
        path = courses.get(name)
        if path is None or len(path) < 4:
            continue
        pieces = []
        for _ in range(2 + int(round(4 * spec.severity))):
            first = int(rng.integers(0, max(int(len(path) * 0.7), 1)))
            length = int(rng.integers(2, 4 + int(5 * spec.severity) + 1))
            part = path[first : first + length + 1]
            if len(part) < 2:
                continue
            radius = np.full((len(part), 1), rng.uniform(1.6, 2.1 + 0.8 * spec.severity))
            box, distance = tube(canvas.frame, np.hstack([part, radius]), 3.0)
            if box is not None:
                alpha = coverage(distance, canvas.frame.edge_mm)
                canvas.blend(box.index, alpha, np.float32(rng.uniform(700, 1400)))
                pieces.append((box, alpha > min(0.5, 0.7 * float(alpha.max()))))
        if pieces:
            box, mask = max(pieces, key=lambda piece: int(piece[1].sum()))
            painted.append(
                Painted("Coronary artery wall calcification", box.index, mask, None, name, "heart", "midline")
            )
    return painted


def paint_hiatal_hernia(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Hiatal hernia: a pouch of stomach behind the heart with fluid and air, air in front."""
    esophagus = np.argwhere(canvas.regions_DHW == REGION_IDS["esophagus"])
    heart = np.flatnonzero((canvas.regions_DHW == REGION_IDS["heart"]).any(axis=(1, 2)))
    if len(esophagus) == 0 or len(heart) == 0:
        return []
    diameter = spec.size_mm or 26.0 + 42.0 * spec.severity * float(rng.uniform(0.7, 1.1))
    level = float(canvas.frame.z_D[heart[0]]) + 4.0 + 0.3 * diameter
    z = canvas.frame.z_D[esophagus[:, 0]]
    near = esophagus[np.abs(z - level) <= np.abs(z - level).min() + canvas.frame.step_mm[0]]
    center = canvas.frame.points_at(near.mean(axis=0))
    center[0] = level
    center[1] += 0.12 * diameter
    box = canvas.frame.around(center, diameter * 0.85)
    if box is None:
        return []
    pouch = ellipsoid(box, center, diameter / 2 * np.array([0.95, 0.72, 1.0]))
    ids = canvas.regions_DHW[box.index]
    keep_out = np.isin(
        ids, [REGION_IDS[key] for key in ("spine", "aorta", "heart", "airways", "ribs", "liver")]
    )
    alpha = coverage(pouch, canvas.frame.edge_mm) * ~keep_out
    rim = coverage(pouch - 2.0, canvas.frame.edge_mm) * (is_lung(ids) | (ids == REGION_IDS["mediastinum"]))
    canvas.blend(box.index, rim, -95.0, REGION_IDS["mediastinum"])
    canvas.blend(box.index, alpha, 45.0, REGION_IDS["mediastinum"])
    lumen = coverage(pouch + 3.5, canvas.frame.edge_mm) * ~keep_out
    canvas.blend(box.index, lumen, np.float32(rng.uniform(10, 35)))
    surface = center[1] - diameter * rng.uniform(-0.05, 0.16)
    gas = lumen * coverage(np.broadcast_to(box.y - np.float32(surface), lumen.shape), canvas.frame.edge_mm)
    canvas.blend(box.index, gas, -985.0)
    kind = "small sliding" if diameter < 40 else "large"
    mask = alpha > 0.5
    if not mask.any():
        return []
    return [
        Painted("Hiatal hernia", box.index, mask, None, kind, "mediastinum", "midline", round(diameter, 1))
    ]


def carina(canvas: Canvas) -> Point | None:
    """Where the trachea divides: the highest slice in which the airways are clearly wider than a trachea."""
    airways = canvas.regions_DHW == REGION_IDS["airways"]
    for d in np.flatnonzero(airways.any(axis=(1, 2)))[::-1]:
        columns = np.flatnonzero(airways[d].any(axis=0))
        if (columns[-1] - columns[0]) * canvas.frame.step_mm[2] > 32:
            h, w = np.argwhere(airways[d]).mean(axis=0)
            return canvas.frame.points_at([d, h, w])
    return None


# stations against the carina, in mm (z, y, x), and their side
_STATIONS: dict[str, tuple[tuple[float, float, float], str]] = {
    "right lower paratracheal": ((16, -10, -16), "right"),
    "prevascular": ((22, -44, 6), "midline"),
    "aortopulmonary": ((8, -6, 30), "left"),
    "subcarinal": ((-20, 6, -1), "midline"),
    "right hilar": ((-30, -8, -46), "right"),
    "left hilar": ((-26, 2, 58), "left"),
}


def paint_lymphadenopathy(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Lymphadenopathy: oval nodes of over 10 mm in short axis at the usual stations of mediastinum and hila."""
    fork = carina(canvas)
    if fork is None:
        return []
    stations = [name for name, (_, side) in _STATIONS.items() if spec.side in (None, side)]
    count = min(spec.count or 2 + int(round(3.0 * spec.severity * rng.uniform(0.6, 1.2))), len(stations))
    hard = (
        "aorta",
        "pulmonary_vessels",
        "great_veins",
        "airways",
        "heart",
        "esophagus",
        "spine",
        "ribs",
        "sternum_shoulder_girdle",
    )
    painted = []
    for pick in rng.permutation(len(stations))[:count]:
        offset, side = _STATIONS[stations[pick]]
        center = _into_mediastinum(canvas, fork + np.array(offset) + rng.normal(0, 1.5, 3))
        if center is None:
            continue
        short = (spec.size_mm or 12.0 + 11.0 * spec.severity * rng.uniform(0.6, 1.2)) / 2
        radii = short * np.array([rng.uniform(1.2, 1.6), 1.0, rng.uniform(1.0, 1.5)])
        box = canvas.frame.around(center, np.maximum(radii + 4, canvas.frame.step_mm * 1.01))
        if box is None:
            continue
        ids = canvas.regions_DHW[box.index]
        free = ~np.isin(ids, [REGION_IDS[key] for key in hard])
        node = ellipsoid(box, center, radii)
        rim = coverage(node - 2.0, canvas.frame.edge_mm) * is_lung(ids)
        canvas.blend(box.index, rim, -70.0, REGION_IDS["mediastinum"])
        alpha = coverage(node, canvas.frame.edge_mm) * free
        canvas.blend(box.index, alpha, np.float32(rng.uniform(35, 60)), REGION_IDS["mediastinum"])
        mask = alpha > 0.5
        if mask.any():
            where: Side = "right" if side == "right" else "left" if side == "left" else "midline"
            size = round(float(2 * short), 1)
            painted.append(
                Painted("Lymphadenopathy", box.index, mask, None, stations[pick], "mediastinum", where, size)
            )
    return painted


def _into_mediastinum(canvas: Canvas, wanted_zyx: Point, reach_mm: float = 25.0) -> Point | None:
    """The nearest point of mediastinal fat, so that no node hangs free in the lung; None if it is far."""
    box = canvas.frame.around(wanted_zyx, reach_mm)
    if box is None:
        return None
    fat = np.argwhere(canvas.regions_DHW[box.index] == REGION_IDS["mediastinum"])
    if len(fat) == 0:
        return None
    points = canvas.frame.points_at(fat + [cut.start for cut in box.index])
    return points[np.argmin(np.linalg.norm(points - wanted_zyx, axis=1))]


def enlarge_heart(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Cardiomegaly in a scan with a normal heart: the heart is stretched, what lies around it squeezed aside."""
    index = bounds(canvas.regions_DHW == REGION_IDS["heart"])
    if index is None:
        return []
    growth = 1.15 + 0.25 * spec.severity
    inner = np.argwhere(canvas.regions_DHW[index] == REGION_IDS["heart"])
    center = inner.mean(axis=0) + [cut.start for cut in index]
    half = np.array([(cut.stop - cut.start) / 2 for cut in index])
    reach = half * growth * 1.35
    low = np.maximum(np.floor(center - reach), 0).astype(int)
    high = np.minimum(np.ceil(center + reach) + 1, canvas.frame.shape_DHW).astype(int)
    part: Slices = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    offset = [
        np.arange(a, b, dtype=np.float32).reshape([-1 if axis == k else 1 for axis in range(3)]) - center[k]
        for k, (a, b) in enumerate(zip(low, high, strict=True))
    ]
    radius = np.sqrt(sum((off / r) ** 2 for off, r in zip(offset, reach, strict=True)))
    inside = np.clip(radius, 1e-3, 1.0)
    # identity at the rim, magnified in the middle
    ratio = np.clip(1.0 / growth + (1 - 1.0 / growth) * inside**3, 0, 1)
    points = np.stack(
        [np.broadcast_to(off * ratio + c, ratio.shape) for off, c in zip(offset, center, strict=True)]
    )
    points -= np.array(low)[:, None, None, None]
    canvas.hu_DHW[part] = map_coordinates(canvas.hu_DHW[part], points, order=1, mode="nearest")
    canvas.regions_DHW[part] = map_coordinates(canvas.regions_DHW[part], points, order=0, mode="nearest")
    return heart_size(canvas)


def heart_size(canvas: Canvas) -> list[Painted]:
    """The piece of truth that says that the heart is enlarged; its size is the heart's width."""
    index = bounds(canvas.regions_DHW == REGION_IDS["heart"])
    if index is None:
        return []
    mask = canvas.regions_DHW[index] == REGION_IDS["heart"]
    width = (index[2].stop - index[2].start) * float(canvas.frame.step_mm[2])
    return [Painted("Cardiomegaly", index, mask, None, "global", "heart", "midline", round(width, 1))]


def paint_medical_material(canvas: Canvas, rng: RngType, spec: FindingSpec) -> list[Painted]:
    """Medical material: a port with its catheter, a pacemaker with its leads, or wires through the sternum."""
    kinds = ("port", "pacemaker", "sternal wires")
    kind = spec.kind or kinds[int(rng.integers(3))]
    if kind == "sternal wires":
        return _sternal_wires(canvas, rng)
    return _device(canvas, rng, kind, spec.side or ("right" if kind == "port" else "left"))


def _region_center(canvas: Canvas, region: str, low: float, high: float) -> Point | None:
    """Middle of a region between two shares of its height."""
    index = bounds(canvas.regions_DHW == REGION_IDS[region])
    if index is None:
        return None
    depth = index[0].stop - index[0].start
    cut = slice(
        index[0].start + int(low * depth),
        max(index[0].start + int(high * depth), index[0].start + int(low * depth) + 1),
    )
    where = np.argwhere(canvas.regions_DHW[cut] == REGION_IDS[region])
    if len(where) == 0:
        return None
    return canvas.frame.points_at(where.mean(axis=0) + [cut.start, 0, 0])


def _skin_front(canvas: Canvas, z_mm: float, x_mm: float, reach_mm: float) -> float | None:
    """y below which the skin in front lies everywhere within a reach of a height and side."""
    deepest = None
    for dz, dx in ((0, 0), (reach_mm, 0), (-reach_mm, 0), (0, reach_mm), (0, -reach_mm)):
        d, _, w = canvas.frame.index_of([z_mm + dz, 0, x_mm + dx])[0]
        rows = np.flatnonzero(canvas.regions_DHW[d, :, w] > 0)
        if len(rows):
            y = float(canvas.frame.y_H[rows[0]])
            deepest = y if deepest is None else max(deepest, y)
    return deepest


def _device(canvas: Canvas, rng: RngType, kind: str, side: str) -> list[Painted]:
    fork, heart = carina(canvas), _region_center(canvas, "heart", 0.3, 0.6)
    if fork is None or heart is None:
        return []
    sign = 1.0 if side == "left" else -1.0
    middle = midline(canvas)
    z, x = fork[0] + rng.uniform(12, 28), middle + sign * rng.uniform(68, 84)
    radius = 24.0 if kind == "pacemaker" else 12.0
    skin = _skin_front(canvas, z, x, 0.7 * radius)
    if skin is None:
        return []
    pocket = np.array([z, skin + 9.0, x])
    cava = np.array([fork[0] + 22, fork[1] - 38, fork[2] - 25])
    course: list[Any] = [
        pocket,
        [fork[0] + 62, skin + 26, middle + sign * 72],
        [fork[0] + 66, fork[1] - 34, middle + sign * 36],
        cava,
    ]
    atrium = np.array([fork[0] - 42, fork[1] - 36, fork[2] - 31])
    if kind == "pacemaker":
        course += [
            atrium,
            [heart[0] - 18, heart[1] - 14, heart[2] - 14],
            [heart[0] - 26, heart[1] - 24, heart[2] + 16],
        ]
    else:
        course += [[fork[0] - 28, fork[1] - 34, fork[2] - 30]]
    path = np.hstack([spline(course, 5.0), np.full((len(spline(course, 5.0)), 1), 1.3)])
    box, lead = tube(canvas.frame, path, 3.0)
    if box is not None:
        thin = np.minimum(coverage(lead, canvas.frame.edge_mm) * 1.3, 1.0)
        canvas.blend(box.index, thin, np.float32(1900.0 if kind == "pacemaker" else 650.0))
    local = canvas.frame.around(pocket, radius * 1.3)
    if local is None:
        return []
    body = ellipsoid(local, pocket, (radius, 5.5 if kind == "pacemaker" else 6.5, radius))
    alpha = coverage(body, canvas.frame.edge_mm)
    canvas.blend(local.index, alpha, 3000.0, REGION_IDS["body_wall"])
    return [
        Painted(
            "Medical material",
            local.index,
            alpha > 0.5,
            None,
            kind,
            "body_wall",
            "left" if sign > 0 else "right",
        )
    ]


def _sternal_wires(canvas: Canvas, rng: RngType) -> list[Painted]:
    fork = carina(canvas)
    if fork is None:
        return []
    middle = midline(canvas)
    bone = canvas.regions_DHW == REGION_IDS["sternum_shoulder_girdle"]
    near = np.abs(canvas.frame.x_W - middle) < 30
    painted = []
    touched = None
    for z in fork[0] + np.arange(30, -95, -22) + rng.normal(0, 2):
        d = int(canvas.frame.index_of([z, 0, 0])[0, 0])
        where = np.argwhere(bone[d] & near[None])
        if len(where) == 0:
            continue
        y, x = canvas.frame.y_H[where[:, 0]], canvas.frame.x_W[where[:, 1]]
        angle = np.linspace(0, 2 * np.pi, 17)
        ring = np.stack(
            [
                z + 2 * np.sin(angle * 2),
                y.mean() + (np.ptp(y) / 2 + 2.5) * np.sin(angle),
                x.mean() + min(np.ptp(x) / 2 + 2.0, 16.0) * np.cos(angle),
                np.full(17, 0.9),
            ],
            axis=1,
        )
        box, wire = tube(canvas.frame, ring, 3.0)
        if box is None:
            continue
        alpha = coverage(wire, canvas.frame.edge_mm)
        canvas.blend(box.index, alpha, 2800.0)
        touched = (box.index, alpha > min(0.5, 0.8 * float(alpha.max())))
        painted.append(touched)
    if not painted:
        return []
    index, mask = painted[len(painted) // 2]
    return [
        Painted("Medical material", index, mask, None, "sternal wires", "sternum_shoulder_girdle", "midline")
    ]
