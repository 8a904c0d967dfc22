"""Heart, great vessels, esophagus and central airways of the phantom, in the reference body's coordinates.

Every organ is drawn twice: first the fat around it, which pushes the lung aside, then the organ itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.datasets.phantom.frame import (
    Array,
    Box,
    Canvas,
    Frame,
    coverage,
    ellipsoid,
    smooth_intersection,
    smooth_noise,
    smooth_union,
    spline,
    tube,
)
from vlm3d.datasets.phantom.patient import Patient
from vlm3d.datasets.phantom.thorax import FAT_HU

Path = NDArray[np.float64]
_HEART_PIVOT = np.array([-52.0, 6.0, 0.0])  # the base of the heart, which stays in place when it grows
_LONG = np.array([-0.42, -0.52, 0.74])
_LONG = _LONG / np.linalg.norm(_LONG)
_SIDE = np.cross(_LONG, [1.0, 0.0, 0.0])
_SIDE = _SIDE / np.linalg.norm(_SIDE)
HEART_AXES = np.stack([_LONG, _SIDE, np.cross(_LONG, _SIDE)])

# name: points (z, y, x, radius)
Waypoints = list[list[float]]
"""Points (z, y, x, radius) in mm from the carina."""

_ARTERIES: dict[str, Waypoints] = {
    "aorta": [
        [-54, -14, 4, 14.5], [-30, -26, -9, 15.5], [0, -27, -15, 15], [20, -19, -11, 14.5], [30, -2, 0, 13.5],
        [30, 16, 11, 13], [20, 32, 20, 12.5], [-5, 41, 25, 12], [-60, 43, 25, 11.5], [-110, 44, 18, 11],
        [-150, 42, 10, 10.5], [-230, 38, 3, 10],
    ],
    "brachiocephalic": [[30, -6, -4, 6.5], [62, -6, -14, 6], [88, 2, -30, 5], [96, 4, -60, 4.5], [92, 2, -100, 4]],
    "left carotid": [[32, 6, 6, 4.5], [70, 6, 16, 4], [125, 6, 24, 4]],
    "left subclavian": [[32, 16, 14, 5.5], [70, 19, 28, 5], [92, 12, 50, 4.5], [92, 2, 100, 4]],
    "right carotid": [[72, -4, -19, 4], [125, 6, -24, 4]],
}  # fmt: skip
_PULMONARY: dict[str, Waypoints] = {
    "trunk and left": [
        [-52, -46, 14, 14], [-34, -36, 18, 13.5], [-20, -16, 19, 12.5], [-14, 2, 30, 10.5], [-14, 15, 43, 9.5],
        [-28, 28, 52, 8], [-46, 30, 54, 6],
    ],
    "right": [[-20, -14, 17, 11], [-21, 1, -2, 10.5], [-23, 4, -24, 9.5], [-32, 9, -41, 8], [-54, 16, -47, 6]],
    "right upper": [[-22, 3, -26, 7], [-12, 4, -44, 4.5]],
}  # fmt: skip
_PULMONARY_VEINS: dict[str, Waypoints] = {
    "right superior": [[-50, 6, -18, 8], [-48, 0, -32, 6.5], [-42, -4, -48, 4.5]],
    "right inferior": [[-62, 14, -16, 8], [-64, 20, -30, 6.5], [-68, 26, -44, 4.5]],
    "left superior": [[-50, 6, 26, 8], [-46, 0, 40, 6.5], [-38, -6, 54, 4.5]],
    "left inferior": [[-60, 14, 26, 8], [-62, 22, 38, 6.5], [-66, 30, 50, 4.5]],
}  # fmt: skip
_VEINS: dict[str, Waypoints] = {
    "superior cava": [
        [100, 2, -42, 6], [74, -12, -34, 7], [46, -20, -23, 8.5], [10, -14, -28, 9.5], [-20, -12, -31, 10],
        [-52, -14, -33, 11],
    ],
    "left brachiocephalic": [[100, 0, 40, 6], [76, -18, 36, 6.5], [58, -32, 14, 7], [45, -22, -18, 8]],
    "right subclavian": [[78, -12, -36, 6], [86, -22, -70, 5.5], [92, -8, -110, 5]],
    "left subclavian": [[78, -18, 36, 6], [86, -22, 70, 5.5], [92, -8, 110, 5]],
    "azygos": [[-190, 48, -7, 3], [-20, 49, -9, 3.5], [8, 42, -13, 4], [15, 22, -22, 4], [12, -4, -27, 4]],
    "inferior cava": [[-74, -6, -30, 12], [-108, 6, -28, 13], [-140, 20, -24, 12], [-230, 26, -22, 12]],
}  # fmt: skip
_ESOPHAGUS: Waypoints = [
    [130, 34, 3, 6.5], [50, 36, 4, 7], [10, 38, 8, 6.5], [-40, 35, 5, 7], [-80, 34, 8, 7], [-112, 28, 12, 7.5],
    [-138, 14, 20, 9], [-150, 4, 38, 9],
]  # fmt: skip
_BRONCHI: dict[str, Waypoints] = {
    "right main": [[-1, 22, 0, 7], [-13, 20, -15, 6.8], [-22, 18, -28, 6]],
    "left main": [[-1, 22, 0, 6.5], [-14, 22, 19, 6.2], [-27, 20, 43, 5.8]],
    "right upper": [[-17, 19, -21, 4.6], [-14, 17, -42, 4.2]],
    "intermediate": [[-22, 18, -28, 5.4], [-46, 16, -34, 5]],
    "right middle": [[-46, 15, -34, 3.6], [-54, -4, -48, 3.2]],
    "right lower": [[-46, 16, -34, 4.6], [-64, 24, -43, 4.2]],
    "left upper": [[-27, 20, 43, 4.7], [-24, 5, 55, 4.3]],
    "left lower": [[-27, 20, 43, 4.7], [-50, 29, 51, 4.3]],
}  # fmt: skip

# where each lobe's bronchus, artery and vein enter it: (z, y, x) and heading
LOBE_ROOTS: dict[str, tuple[ArrayLike, ArrayLike, ArrayLike]] = {
    "right_upper_lobe": ([-14, 17, -42], [0.5, -0.2, -0.8], [-42, -4, -48]),
    "right_middle_lobe": ([-54, -4, -48], [-0.2, -0.8, -0.5], [-46, -3, -44]),
    "right_lower_lobe": ([-64, 24, -43], [-0.8, 0.4, -0.4], [-68, 26, -44]),
    "left_upper_lobe": ([-24, 5, 55], [0.4, -0.5, 0.7], [-38, -6, 54]),
    "left_lower_lobe": ([-50, 29, 51], [-0.8, 0.4, 0.3], [-66, 30, 50]),
}


@dataclass
class Organ:
    """A body to paint: where, its signed distance, its density and region."""

    box: Box
    distance_mm: Array
    hu: float
    region: int


@dataclass
class Heart:
    """The heart's surfaces on the grid, for the painters that follow.

    Attributes:
        box: Where the distances are given.
        surface_mm: Signed distance to the muscle's outer surface.
        sac_mm: Signed distance to the pericardium.
        coronaries: Paths (N, 3) in mm of the three arteries.
    """

    box: Box
    surface_mm: Array
    sac_mm: Array
    coronaries: dict[str, Path]


def paint_mediastinum(
    canvas: Canvas, patient: Patient, diaphragm_HW: Array, rng: np.random.Generator
) -> Heart | None:
    """Paint all organs between the lungs.

    Returns:
        The heart's surfaces, or None where the grid does not reach the heart.
    """
    heart, chambers = _heart(canvas, patient, diaphragm_HW, rng)
    organs = _vessels(canvas.frame, patient)
    trachea = _airways(canvas.frame, patient)
    for organ in organs + trachea:
        _cuff(canvas, organ.box, organ.distance_mm - 2.2)
    if heart is not None:
        _cuff(canvas, heart.box, heart.sac_mm - 1.2)
        canvas.paint(heart.box, heart.sac_mm - 0.8, 25.0)
        canvas.paint(heart.box, heart.sac_mm + 0.6, FAT_HU + 8)
    for organ in organs[: len(organs) - 1]:
        canvas.paint(organ.box, organ.distance_mm, organ.hu, organ.region)
    for organ in chambers:
        canvas.paint(organ.box, organ.distance_mm, organ.hu, organ.region)
    _coronaries(canvas, heart, patient)
    esophagus = organs[-1]
    canvas.paint(esophagus.box, esophagus.distance_mm, esophagus.hu, esophagus.region)
    _esophageal_air(canvas, rng)
    for organ in trachea:
        canvas.paint(organ.box, organ.distance_mm - 1.3, 35.0, organ.region)
    for organ in trachea:
        canvas.paint(organ.box, organ.distance_mm, -1000.0, organ.region)
    return heart


def _cuff(canvas: Canvas, box: Box, distance: Array) -> None:
    """Fat around an organ takes the place of lung."""
    regions = canvas.regions_DHW[box.index]
    soft = coverage(distance, canvas.frame.edge_mm)
    yields = np.isin(
        regions, [*LUNG_IDS, REGION_IDS["right_pleural_space"], REGION_IDS["left_pleural_space"]]
    )
    canvas.blend(box.index, soft * yields, FAT_HU + 15)
    regions[yields & (soft > 0.5)] = REGION_IDS["mediastinum"]


def _heart_point(z: float, y: float, x: float, scale: float) -> NDArray[np.float64]:
    return _HEART_PIVOT + (np.array([z, y, x]) - _HEART_PIVOT) * scale


def _heart(
    canvas: Canvas, patient: Patient, diaphragm_HW: Array, rng: np.random.Generator
) -> tuple[Heart | None, list[Organ]]:
    s = patient.heart_scale
    noise_state = rng.integers(2**31)
    box = canvas.frame.box(_heart_point(-150, -110, -90, s), _heart_point(-14, 60, 120, s))
    if box is None:
        return None, []

    def part(z: float, y: float, x: float, radii: ArrayLike, turned: bool = True) -> Array:
        axes = HEART_AXES if turned else None
        return ellipsoid(box, _heart_point(z, y, x, s), np.multiply(radii, s), axes)

    left_ventricle = part(-88, -16, 40, (50, 33, 34))
    right_ventricle = part(-88, -44, 6, (46, 34, 30))
    outflow = part(-50, -48, 12, (20, 18, 20), turned=False)
    right_atrium = part(-78, -16, -34, (35, 29, 25), turned=False)
    left_atrium = part(-58, 8, 4, (23, 17, 33), turned=False)
    surface = left_ventricle
    for other, blend in ((right_ventricle, 14), (outflow, 14), (right_atrium, 12), (left_atrium, 10)):
        surface = smooth_union(surface, other, blend)
    floor = diaphragm_HW[None, box.index[1], box.index[2]] + 3.0 - box.z
    surface = smooth_intersection(surface, floor * 0.8, 8)
    fat = 3.0 + 0.06 * patient.fat_mm + np.clip(-(box.y + 30) / 14.0, 0, 3.0)
    fat = fat + 1.0 * smooth_noise(canvas.frame, box, 22, np.random.default_rng(noise_state))
    sac = np.minimum(surface - np.maximum(fat, 1.5), smooth_union(surface, surface, 0.1) - 1.5)
    sac = smooth_intersection(sac, (floor - 1.0) * 0.8, 6)
    muscle = 52.0 if patient.contrast == "none" else 105.0
    right, left, _ = patient.blood_hu
    heart_id = REGION_IDS["heart"]
    inner_left = np.maximum(part(-86, -15, 38, (40, 22, 23)), surface + 8)
    septum = -(left_ventricle + 1.5)
    right_heart = smooth_union(right_ventricle, outflow, 10)
    chambers = [
        Organ(box, surface, muscle, heart_id),
        Organ(box, np.maximum(np.maximum(right_heart + 4.0, septum), surface + 3), right, heart_id),
        Organ(box, np.maximum(np.maximum(right_atrium + 2.5, right_ventricle + 1), surface + 2), right, heart_id),
        Organ(box, np.maximum(np.maximum(left_atrium + 2.5, left_ventricle * -1 - 2), surface + 2), left, heart_id),
        Organ(box, inner_left, left, heart_id),
    ]  # fmt: skip
    heart = Heart(box, surface, sac, {})
    heart.coronaries = _coronary_paths(canvas.frame, heart, s)
    return heart, chambers


def _coronary_paths(frame: Frame, heart: Heart, scale: float) -> dict[str, Path]:
    """Courses on the heart's surface: rays from its middle, marched outward until they leave the muscle."""
    center = _heart_point(-80, -20, 12, scale)
    courses = {
        "left anterior descending": [[-46, -24, 22], [-58, -52, 34], [-78, -62, 44], [-100, -60, 56], [-118, -48, 66]],
        "circumflex": [[-46, -22, 24], [-52, -6, 44], [-64, 8, 56], [-86, 20, 52]],
        "right": [[-48, -30, -6], [-56, -52, -22], [-78, -50, -36], [-100, -34, -34], [-114, -8, -16]],
    }  # fmt: skip
    start = np.array([cut.start for cut in heart.box.index])
    shape = np.array(heart.box.shape)
    paths: dict[str, Path] = {}
    for name, control in courses.items():
        points = spline([_heart_point(z, y, x, scale) for z, y, x in control], 3.0)
        heading = points - center
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        steps = np.arange(10.0, 110.0, 1.0)
        rays = center + heading[:, None] * steps[None, :, None]
        index = np.clip(frame.index_of(rays.reshape(-1, 3)) - start, 0, shape - 1)
        outside = (heart.surface_mm[tuple(index.T)] > 1.2).reshape(len(points), -1)
        reach = steps[np.argmax(outside, axis=1)]
        kernel = np.ones(5) / 5
        reach = np.convolve(np.pad(reach, 2, mode="edge"), kernel, mode="valid")
        paths[name] = center + heading * reach[:, None]
    return paths


def _coronaries(canvas: Canvas, heart: Heart | None, patient: Patient) -> None:
    if heart is None:
        return
    for path in heart.coronaries.values():
        radius = np.linspace(1.8, 1.0, len(path))[:, None]
        box, distance = tube(canvas.frame, np.hstack([path, radius])[::2], 2.0)
        canvas.paint(box, distance, patient.blood_hu[1] * 0.9)


def _vessels(frame: Frame, patient: Patient) -> list[Organ]:
    """The great vessels in painting order, and the esophagus last."""
    right, left, veins = patient.blood_hu
    groups = (
        (_PULMONARY_VEINS, left, "pulmonary_vessels", 1.0),
        (_VEINS, veins, "great_veins", 1.0),
        (_PULMONARY, right, "pulmonary_vessels", 1.0),
        (_ARTERIES, left, "aorta", patient.aorta_scale),
    )
    organs = []
    for table, hu, region, width in groups:
        for points in table.values():
            path = spline(np.asarray(points, float) * [1, 1, 1, width], 6.0)
            box, distance = tube(frame, path, 5.0)
            if box is not None:
                organs.append(Organ(box, distance, hu, REGION_IDS[region]))
    box, distance = tube(frame, spline(_ESOPHAGUS, 8.0), 5.0, flatten=1.3)
    if box is not None:
        organs.append(Organ(box, distance, 38.0, REGION_IDS["esophagus"]))
    return organs


def _esophageal_air(canvas: Canvas, rng: np.random.Generator) -> None:
    centers = rng.uniform(-90, 80, 3)
    amount = rng.uniform(0, 3.5, 3)
    for center, radius in zip(centers, amount, strict=True):
        at = np.interp(center, [p[0] for p in _ESOPHAGUS[::-1]], [p[1] for p in _ESOPHAGUS[::-1]])
        across = np.interp(center, [p[0] for p in _ESOPHAGUS[::-1]], [p[2] for p in _ESOPHAGUS[::-1]])
        box = canvas.frame.around((center, at - 1, across), 16)
        if box is not None and radius > 1.2:
            canvas.paint(box, ellipsoid(box, (center, at - 1, across), (13, radius, radius * 1.2)), -900.0)


def _airways(frame: Frame, patient: Patient) -> list[Organ]:
    width = 0.88 if patient.sex == "female" else 1.0
    organs = []
    trachea = spline(np.array([[135, 14, -1, 8.6], [60, 18, -1, 8.6], [6, 22, 0, 8.8], [-3, 22, 0, 7.4]]), 12)
    for path in [trachea, *(spline(points, 6.0) for points in _BRONCHI.values())]:
        box, distance = tube(frame, path * [1, 1, 1, width], 5.0)
        if box is not None:
            organs.append(Organ(box, distance, -1000.0, REGION_IDS["airways"]))
    return organs
