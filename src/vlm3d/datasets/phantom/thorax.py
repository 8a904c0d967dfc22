"""The trunk: skin, fat, muscle, the cavity of the chest, the diaphragm, the lungs and their fissures, and the ribs.

Coordinates are those of the reference body, in mm: z = 0 at the carina, y = 0 in mid chest, x = 0 in the midline;
z to superior, y to posterior, x to the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.frame import Array, Box, Canvas, Frame, bounds, coverage, ellipsoid, smooth_noise
from vlm3d.datasets.phantom.patient import Patient

FAT_HU = -100.0
MUSCLE_HU = 55.0
SHELL_MM = 11.0  # ribs and the muscles between them
EXPONENT = 2.4  # of the superellipse that the chest's cross-section follows

# z, then the cavity's half-width, front and back, and the body's side, front and back walls outside it
_PROFILE = np.array(
    [
        [-260, 128, -80, 80, 24, 16, 34],
        [-200, 130, -80, 86, 24, 16, 34],
        [-150, 134, -86, 91, 24, 17, 34],
        [-100, 133, -87, 92, 25, 18, 34],
        [-50, 129, -82, 91, 31, 20, 36],
        [0, 118, -70, 88, 46, 24, 42],
        [40, 98, -47, 77, 78, 30, 50],
        [70, 77, -23, 63, 104, 34, 58],
        [88, 55, 0, 52, 124, 46, 60],
        [97, 22, 16, 34, 150, 58, 72],
        [101, 8, 24, 28, 158, 62, 76],
        [140, 6, 24, 28, 150, 66, 76],
    ],
    dtype=np.float64,
)
_RIB_PITCH, _RIB_DROP, _RIB_DROP_STEP, _RIB_TOP = 22.5, 38.0, 8.0, 79.0
_BONY_ANGLE = 2.3


@dataclass
class Trunk:
    """What later steps need to know about the chest's shape.

    Attributes:
        cavity_DHW: Signed distance to the inside of the chest wall, negative inside.
        skin_DHW: Signed distance to the skin, negative inside.
        diaphragm_HW: Height z of the diaphragm.
        lung_DHW: Signed distance to the lungs, negative inside.
    """

    cavity_DHW: Array
    skin_DHW: Array
    diaphragm_HW: Array
    lung_DHW: Array


def profile(z: Array) -> tuple[Array, ...]:
    """Half-width, center and half-depth of the chest's cavity, and thickness of the side, front and back wall."""
    width, front, back, side, before, behind = (
        np.interp(z, _PROFILE[:, 0], _PROFILE[:, column]).astype(np.float32) for column in range(1, 7)
    )
    return width, (front + back) / 2, (back - front) / 2, side, before, behind


def superellipse(x: Array, y: Array, half_x: Array, half_y: Array) -> Array:
    """Signed distance to a rounded rectangle ``|x/a|^p + |y/b|^p = 1`` in each slice."""
    u, v = np.abs(x) / half_x, np.abs(y) / half_y
    u_slope, v_slope = u ** np.float32(EXPONENT - 1), v ** np.float32(EXPONENT - 1)
    # with s = |x/a|^p + |y/b|^p and level = s^(1/p): (level - 1) * level^(p - 1) = s - s / level
    distance = u * u_slope + (v * v_slope + np.float32(1e-6))
    distance -= distance ** np.float32((EXPONENT - 1) / EXPONENT)
    slope = (u_slope / half_x) ** 2 + (v_slope / half_y) ** 2
    np.sqrt(slope, out=slope)
    np.maximum(slope, np.float32(1e-5), out=slope)
    distance /= slope
    return distance


def build_trunk(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Trunk:
    """Paint skin, fat, muscle, abdominal fat, mediastinal fat and the two lungs; ribs and organs come on top."""
    frame = canvas.frame
    trunk = Trunk(
        np.empty(frame.shape_DHW, np.float32),
        np.empty(frame.shape_DHW, np.float32),
        diaphragm_height(frame, patient),
        np.empty(frame.shape_DHW, np.float32),
    )
    planes = smooth_noise(frame, None, (40, 16, 16), rng)
    for start in range(0, frame.shape_DHW[0], 8):
        box = frame.cut((slice(start, start + 8), slice(None), slice(None)))
        _paint_slab(canvas, box, patient, trunk, planes[box.index])
    _label_lobes(canvas, trunk)
    return trunk


def _paint_slab(canvas: Canvas, box: Box, patient: Patient, trunk: Trunk, planes: Array) -> None:
    width, middle, depth, side, before, behind = (part[:, None, None] for part in profile(box.z.ravel()))
    cavity = superellipse(box.x, box.y - middle, width, depth)
    skin = _skin(box, patient, width, middle, depth, (side, before, behind))
    fat_mm = patient.fat_mm * _fat_pattern(box)
    edge = canvas.frame.edge_mm
    hu = coverage(skin, edge)
    hu *= np.float32(1025.0)
    hu -= np.float32(1000.0)
    _mix(hu, coverage(skin + np.float32(2.0), edge), FAT_HU)
    shell = cavity - np.float32(SHELL_MM)
    muscle = coverage(np.maximum(skin + (fat_mm + np.float32(2.0)), -shell - np.float32(4.0)), edge)
    np.maximum(muscle, coverage(np.maximum(shell, skin + np.float32(4.0)), edge), out=muscle)
    _mix(hu, muscle.copy(), MUSCLE_HU)
    septa = np.abs(planes)
    septa *= np.float32(-14.0)
    septa += np.float32(1.0)
    np.maximum(septa, 0, out=septa)
    septa *= muscle
    septa *= shell > 2
    _mix(hu, septa, FAT_HU * 0.8)
    canvas.hu_DHW[box.index] = hu
    canvas.regions_DHW[box.index] = (skin < 0) * np.uint8(REGION_IDS["body_wall"])
    trunk.cavity_DHW[box.index] = cavity
    trunk.skin_DHW[box.index] = skin
    trunk.lung_DHW[box.index] = 99.0
    margin, reach = edge + 1.0, float(width.max()) + edge + 1.0
    low = (-1e4, float((middle - depth).min()) - margin, -reach)
    high = (1e4, float((middle + depth).max()) + margin, reach)
    across = canvas.frame.box(low, high)
    if across is not None:
        _paint_cavity(canvas, canvas.frame.cut((box.index[0], *across.index[1:])), patient, trunk)


def _mix(hu: Array, share: Array, density: float | Array) -> None:
    """Mix a density in by a share a voxel; the share is used up."""
    share *= np.asarray(density, np.float32) - hu
    hu += share


def _paint_cavity(canvas: Canvas, box: Box, patient: Patient, trunk: Trunk) -> None:
    """What lies inside the ribs: fat, the diaphragm's muscle, pleura and air."""
    edge = canvas.frame.edge_mm
    hu, cavity = canvas.hu_DHW[box.index], trunk.cavity_DHW[box.index]
    regions = canvas.regions_DHW[box.index]
    inside = coverage(cavity, edge)
    lung = _lung_distance(box, cavity, trunk.diaphragm_HW[box.index[1:]])
    above = box.z - trunk.diaphragm_HW[None, box.index[1], box.index[2]]
    content = np.where(above > 0, np.float32(FAT_HU + 10), np.float32(FAT_HU - 5))
    _mix(hu, inside, content)
    muscle_sheet = coverage(np.abs(above + 1.2) - 1.4, edge) * coverage(cavity + 1.0, edge)
    _mix(hu, muscle_sheet, 45.0)
    within = cavity < 0
    abdomen = np.uint8(REGION_IDS["diaphragm_upper_abdomen"])
    regions[within] = np.where(above > 0, np.uint8(REGION_IDS["mediastinum"]), abdomen)[within]
    air = coverage(lung, edge)
    gravity = patient.lung_hu + 0.28 * box.y - 0.06 * box.z
    pleura = (lung > 0) & (lung < 2.6) & (np.maximum(cavity, -above - 1.0) > -2.6) & (above > -0.5)
    pleura &= cavity < 0.6
    hu += pleura * 0.6 * (20.0 - hu)
    _mix(hu, air, gravity)
    right, left = np.uint8(REGION_IDS["right_pleural_space"]), np.uint8(REGION_IDS["left_pleural_space"])
    regions[pleura] = np.broadcast_to(np.where(box.x < 0, right, left), pleura.shape)[pleura]
    trunk.lung_DHW[box.index] = lung


def _fat_pattern(box: Box) -> Array:
    """Fat is thickest in front of the belly and at the flanks, thin over the back of the chest and the shoulders."""
    lower = np.clip((-box.z - 40.0) / 140.0, 0, 1)
    shoulder = np.clip((box.z - 20.0) / 60.0, 0, 1)
    front = np.clip(-box.y / 80.0, -1, 1)
    return (0.75 + 0.35 * front + 0.35 * lower - 0.3 * shoulder).astype(np.float32)


def _skin(
    box: Box, patient: Patient, width: Array, middle: Array, depth: Array, wall: tuple[Array, Array, Array]
) -> Array:
    side, before, behind = wall
    extra = patient.fat_mm * 0.85
    lean = SHELL_MM + (side - SHELL_MM) * (0.6 + 0.4 * patient.muscle)
    front, back = before + extra * 0.8, behind + extra * 0.55
    half_y = depth + (front + back) / 2
    center = middle + (back - front) / 2
    body = superellipse(box.x, box.y - center, width + lean + extra, half_y)
    if patient.sex == "female":
        size = 24.0 + 1.1 * patient.fat_mm
        for sign in (-1.0, 1.0):
            if box.z.max() > -95 - size * 1.5 and box.z.min() < -15 + size * 1.5:
                breast = ellipsoid(
                    box, (-55, -92, sign * (72 + 0.3 * size)), (size * 1.3, size * 0.9, size * 1.35)
                )
                h = np.maximum(14.0 - np.abs(body - breast), 0) / 14.0
                body = np.minimum(body, breast) - h * h * 3.5
    return body.astype(np.float32)


def diaphragm_height(frame: Frame, patient: Patient) -> Array:
    """Height z (H, W) of the diaphragm: two domes that fall steeply to the wall, the right one higher."""
    y, x = frame.y_H[:, None], frame.x_W[None, :]
    height = np.full((len(frame.y_H), len(frame.x_W)), -400.0, np.float32)
    for sign, top, more in ((-1, -106.0, patient.elevation_mm[0]), (1, -116.0, patient.elevation_mm[1])):
        side = sign * x - 60.0
        u = side / np.where(side > 0, 76.0, 170.0)
        v = (y + 4.0) / np.where(y > -4, 98.0, 84.0)
        radius = np.sqrt(u * u + v * v)
        fall = 62.0 + 24.0 * np.clip(v, -1, 1)
        dome = top + more + patient.diaphragm_mm - fall * np.minimum(radius, 1.25) ** 2.2
        height = np.maximum(height, dome.astype(np.float32))
    return height


def core_half_width(y: Array, z: Array) -> Array:
    """Half-width of the mediastinum without its organs: narrow in front, wide between the apices and at the spine."""
    low = np.interp(
        y.ravel(), [-90, -75, -55, -35, -10, 20, 45, 62, 80, 95], [16, 9, 5, 9, 16, 20, 19, 20, 25, 30]
    )
    high = np.interp(y.ravel(), [-50, -30, -10, 15, 40, 60, 80], [30, 30, 30, 28, 24, 22, 26])
    share = np.clip((z - 8.0) / 40.0, 0, 1)
    return (low.reshape(y.shape) * (1 - share) + high.reshape(y.shape) * share).astype(np.float32)


def _lung_distance(box: Box, cavity: Array, diaphragm_HW: Array) -> Array:
    core = core_half_width(box.y, box.z) - np.abs(box.x - 2.0)
    floor = (diaphragm_HW[None] + 2.0 - box.z) * np.float32(0.75)
    lung = _round_and(cavity + 1.8, floor, 3.0)
    return _round_and(lung, core, 8.0)


def _round_and(first: Array, second: Array, blend_mm: float) -> Array:
    h = np.maximum(blend_mm - np.abs(first - second), 0) / np.float32(blend_mm)
    return np.maximum(first, second) + h * h * np.float32(blend_mm * 0.25)


def oblique_fissure(y: Array, x: Array) -> Array:
    """Height z of the oblique fissure: from T4 at the back to the sixth rib in front."""
    return -46.0 + 1.08 * y - 0.0035 * y * y - 0.06 * np.abs(np.abs(x) - 60.0)


def horizontal_fissure(y: Array, x: Array) -> Array:
    """Height z of the right horizontal fissure, at the fourth rib."""
    return -34.0 - 0.0022 * (x + 70.0) ** 2 - 0.05 * y


def _label_lobes(canvas: Canvas, trunk: Trunk) -> None:
    frame = canvas.frame
    index = bounds(trunk.lung_DHW < 0)
    if index is None:
        return
    y, x = frame.y_H[index[1], None], frame.x_W[None, index[2]]
    oblique, horizontal = oblique_fissure(y, x), horizontal_fissure(y, x)
    edge = frame.edge_mm
    lung_DHW, regions_DHW, hu_DHW = (
        part[index] for part in (trunk.lung_DHW, canvas.regions_DHW, canvas.hu_DHW)
    )
    ids = {key: np.uint8(REGION_IDS[key]) for key in REGION_IDS}
    middle = int(np.searchsorted(frame.x_W[index[2]], 2.0))
    for sides, upper, lower in (
        (slice(0, middle), ids["right_upper_lobe"], ids["right_lower_lobe"]),
        (slice(middle, None), ids["left_upper_lobe"], ids["left_lower_lobe"]),
    ):
        for d, z in enumerate(frame.z_D[index[0]]):
            lung = lung_DHW[d, :, sides] < 0
            over = z - oblique[:, sides]
            lobes = np.where(over > 0, upper, lower)
            line = np.clip(1.0 - np.abs(over) * 0.7 / edge, 0, 1)
            if sides.start == 0:
                above = z - horizontal[:, sides]
                lobes[(over > 0) & (above < 0)] = ids["right_middle_lobe"]
                line = np.maximum(line, np.clip(1.0 - np.abs(above) / edge, 0, 1) * (over > 0))
            regions_DHW[d, :, sides][lung] = lobes[lung]
            hu_DHW[d, :, sides] += np.where(lung, line * np.float32(110.0 * min(1.0, 1.2 / edge)), 0)


def paint_ribs(canvas: Canvas, trunk: Trunk, patient: Patient) -> None:
    """Paint twelve pairs of ribs, their cartilages in front, and the muscle between them."""
    frame = canvas.frame
    shell = np.flatnonzero(
        (trunk.cavity_DHW > -0.5) & (trunk.cavity_DHW < SHELL_MM + 1.5) & (trunk.skin_DHW < -3)
    )
    d, h, w = np.unravel_index(shell, frame.shape_DHW)
    z, y, x = frame.z_D[d], frame.y_H[h], frame.x_W[w]
    width, middle, depth, *_ = (part[d] for part in profile(frame.z_D))
    angle = np.arctan2(np.abs(x) / width, (y - middle) / depth)
    drop = _rib_drop(angle)
    pitch = _RIB_PITCH + _RIB_DROP_STEP * drop
    number = (_RIB_TOP + 4.0 - _RIB_DROP * drop - z) / pitch
    rib = np.rint(number)
    radial = (trunk.cavity_DHW.ravel()[shell] - 5.5) / np.float32(4.2)
    vertical = (number - rib) * pitch / np.float32(7.0)
    rho = np.sqrt(radial * radial + vertical * vertical)
    bony_end = np.select([rib <= 6, rib <= 9, rib == 10], [_BONY_ANGLE, 2.2, 1.75], 1.25)
    cartilage_end = np.select([rib <= 6, rib <= 9], [np.pi, 2.75], 0.0)
    exists = (rib >= 0) & (rib <= 11) & (np.abs(x) > 14)
    bone = np.clip((1.0 - rho) * 5.5 / frame.edge_mm + 0.5, 0, 1) * exists * (angle < bony_end)
    cartilage = np.clip((1.0 - rho) * 5.5 / frame.edge_mm + 0.5, 0, 1) * exists
    cartilage *= (angle >= bony_end) & (angle < cartilage_end)
    flat_hu, flat_regions = canvas.hu_DHW.reshape(-1), canvas.regions_DHW.reshape(-1)
    hu = flat_hu[shell]
    hu += coverage(-trunk.cavity_DHW.ravel()[shell], frame.edge_mm) * (40.0 - hu)
    marrow = np.float32(patient.bone_hu * 1.1)
    cortex = np.clip((rho - 0.45) * 4.0, 0, 1)
    hu += bone * (marrow + (820.0 - marrow) * cortex - hu)
    hu += cartilage * (105.0 - hu)
    flat_hu[shell] = hu
    flat_regions[shell[(bone > 0.5) | (cartilage > 0.5)]] = REGION_IDS["ribs"]


def _rib_drop(angle: NDArray[np.floating]) -> Array:
    """Share of a rib's whole descent at an angle around the chest, 0 at the spine and pi at the sternum."""
    down = np.clip((angle - 0.15) / (_BONY_ANGLE - 0.15), 0, 1)
    rise = np.clip((angle - _BONY_ANGLE) / (np.pi - _BONY_ANGLE), 0, 1)
    return (down**1.15 - 0.42 * rise**1.1).astype(np.float32)
