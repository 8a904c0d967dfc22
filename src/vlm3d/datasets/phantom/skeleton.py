"""Spine, sternum, clavicles, shoulder blades and upper arms of the phantom, in the reference body's coordinates."""

from __future__ import annotations

import numpy as np

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.frame import Array, Box, Canvas, coverage, ellipsoid, spline, tube
from vlm3d.datasets.phantom.patient import Patient
from vlm3d.datasets.phantom.thorax import SHELL_MM, Trunk, profile

SPINE_ID = REGION_IDS["spine"]
GIRDLE_ID = REGION_IDS["sternum_shoulder_girdle"]
_VERTEBRA_TOP, _VERTEBRA_PITCH = 79.0, 22.5


def spine_front(z: Array) -> Array:
    """y of the vertebral bodies' middle: the kyphosis of the thoracic spine."""
    return (64.0 - 0.0011 * (z + 40.0) ** 2).astype(np.float32)


def paint_spine(canvas: Canvas, patient: Patient) -> None:
    """Paint vertebral bodies, discs, arches, spinous and transverse processes, and the canal."""
    frame = canvas.frame
    box = frame.box((-400, 5, -52), (400, 140, 52))
    if box is None:
        return
    number = (_VERTEBRA_TOP - box.z) / _VERTEBRA_PITCH
    phase = (number - np.rint(number)) * _VERTEBRA_PITCH  # mm below the middle of the nearest vertebra
    size = 1.0 + 0.0011 * np.clip(-box.z + 60, -60, 260) * 0.9
    y = box.y - spine_front(box.z)
    waist = 1.0 + 0.09 * (np.abs(phase) / 9.0) ** 2
    body = _rounded(box.x / (15.5 * size * waist), y / (13.0 * size * waist)) * 14.0 * size
    plate = np.abs(phase) - 8.9
    disc = np.maximum(body, 0 * plate)
    _soft_sleeve(canvas, box, body - 3.0)
    canvas.paint(box, np.broadcast_to(disc + 0.5, box.shape), 85.0, SPINE_ID)
    vertebra = np.maximum(body, plate)
    cortex = np.float32(520.0)
    canvas.paint(box, vertebra, cortex, SPINE_ID)
    canvas.paint(box, vertebra + 1.6, patient.bone_hu, SPINE_ID)

    canal_y = y - (21.5 * size)
    ring = np.sqrt(box.x**2 + canal_y**2)
    arch = np.maximum(np.abs(ring - 12.0) - 3.0, np.abs(phase + 1.0) - 9.5)
    arch = np.where(canal_y < -9, np.maximum(arch, 20.0 - np.abs(box.x) * 2.2), arch)
    spinous = np.maximum(np.abs(box.x) - 2.8, np.abs(phase - 0.28 * (canal_y - 12)) - 5.0)
    spinous = np.maximum(spinous, np.maximum(11.0 - canal_y, canal_y - 36.0))
    across = np.abs(box.x)
    transverse = np.sqrt((phase + 4.0) ** 2 + (canal_y - (across - 12) * 0.42) ** 2) - 5.0
    transverse = np.maximum(transverse, np.maximum(9.0 - across, across - 33.0))
    posterior = np.minimum(np.minimum(arch, spinous), transverse)
    canvas.paint(box, posterior, 560.0, SPINE_ID)
    canvas.paint(box, posterior + 2.2, patient.bone_hu * 1.1, SPINE_ID)
    canvas.paint(box, np.broadcast_to(ring - 9.2, box.shape), -20.0, SPINE_ID)
    canvas.paint(box, np.broadcast_to(ring - 7.8, box.shape), 32.0, SPINE_ID)


def _rounded(u: Array, v: Array) -> Array:
    return (u * u * np.abs(u) + v * v * np.abs(v)) ** np.float32(1 / 3) - 1.0


def _soft_sleeve(canvas: Canvas, box: Box, distance: Array) -> None:
    """Ligaments and fat around the vertebral bodies, where lung would touch the bone."""
    alpha = coverage(np.broadcast_to(distance, box.shape), canvas.frame.edge_mm)
    regions = canvas.regions_DHW[box.index]
    airy = (regions >= 1) & (regions <= 5)
    canvas.blend(box.index, alpha, np.float32(10.0))
    regions[airy & (alpha > 0.5)] = REGION_IDS["mediastinum"]


def paint_sternum(canvas: Canvas, patient: Patient) -> None:
    """Paint manubrium, body and xiphoid process just in front of the chest's cavity."""
    frame = canvas.frame
    box = frame.box((-128, -125, -45), (60, 20, 45))
    if box is None:
        return
    _, middle, depth, *_ = profile(box.z.ravel())
    front = (middle - depth)[:, None, None]
    z = box.z.ravel()
    half: Array = np.interp(z, [-125, -110, -98, -60, -5, 2, 8, 38, 46], [3, 6, 17, 17, 14, 13, 18, 28, 22])
    thick: Array = np.interp(z, [-125, -105, -90, 0, 5, 40], [2.5, 3.5, 5.0, 5.2, 6.2, 6.5])
    half, thick = (part[:, None, None].astype(np.float32) for part in (half, thick))
    plate = _rounded(box.x / half, (box.y - front + 6.5) / thick) * thick
    caps = np.maximum(box.z - 46.0, -122.0 - box.z)
    gap = 1.6 - np.abs(box.z - 3.0)
    bone = np.maximum(np.maximum(plate, caps), gap)
    canvas.paint(box, bone, 460.0, GIRDLE_ID)
    canvas.paint(box, bone + 1.7, patient.bone_hu * 0.8, GIRDLE_ID)


def paint_shoulders(canvas: Canvas, trunk: Trunk, patient: Patient) -> None:
    """Paint clavicles, shoulder blades, the heads of the upper arms, and arms beside the body."""
    lift = 14.0 if patient.arms == "up" else 0.0
    for side in (-1.0, 1.0):
        clavicle = spline(
            [
                [40, -46, side * 16, 8.5],
                [52, -44, side * 46, 5.8],
                [66 + lift * 0.4, -22, side * 90, 5.5],
                [76 + lift, 8, side * 138, 6.0],
            ]
        )
        _long_bone(canvas, clavicle, patient, 2.0)
        head = np.array([86 + lift, 18, side * 162])
        box = canvas.frame.around(head, 34)
        if box is not None:
            ball = ellipsoid(box, head, 24)
            canvas.paint(box, ball, 520.0, GIRDLE_ID)
            canvas.paint(box, ball + 1.8, patient.bone_hu * 0.9, GIRDLE_ID)
        ends = [[86, 18, side * 168, 12], [20, 20, side * 196, 11], [-200, 10, side * 214, 11]]
        if patient.arms == "up":
            ends = [[100, 18, side * 164, 13], [135, 6, side * 172, 12], [170, -4, side * 178, 11]]
        else:
            arm = np.array(ends) + [0, 0, 0, 34]
            sleeve, distance = tube(canvas.frame, spline(arm, 20), 4)
            canvas.paint(sleeve, distance, 20.0, REGION_IDS["body_wall"])
            canvas.paint(sleeve, distance + 2, -100.0)
            canvas.paint(sleeve, distance + 3 + patient.fat_mm * 0.4, 55.0)
        _long_bone(canvas, spline(ends, 15), patient, 3.5)
        _shoulder_blade(canvas, trunk, patient, side)


def _long_bone(canvas: Canvas, path: np.ndarray, patient: Patient, cortex_mm: float) -> None:
    box, distance = tube(canvas.frame, path)
    canvas.paint(box, distance, 780.0, GIRDLE_ID)
    canvas.paint(box, distance + cortex_mm, patient.bone_hu * 0.7, GIRDLE_ID)


def _shoulder_blade(canvas: Canvas, trunk: Trunk, patient: Patient, side: float) -> None:
    """A thin curved triangle behind the ribs, with its spine and the socket of the shoulder."""
    low, high = sorted((side * 40, side * 190))
    box = canvas.frame.box((-72, -40, low), (88, 135, high))
    if box is None:
        return
    width, middle, depth, *_ = (part[:, None, None] for part in profile(box.z.ravel()))
    angle = np.arctan2(np.abs(box.x) / width, (box.y - middle) / depth)
    height = np.clip((box.z + 70.0) / 150.0, 0, 1)
    inner, outer = 0.62 + 0.0 * height, 0.75 + 0.62 * height
    gap = SHELL_MM + 9.0 + 8.0 * height
    lateral = np.clip((angle - inner) / np.maximum(outer - inner, 0.05), 0, 1)
    thickness = 1.4 + 2.6 * lateral**4
    plate = np.abs(trunk.cavity_DHW[box.index] - gap) - thickness
    reach = np.maximum(inner - angle, angle - outer) * 90.0
    blade = np.maximum(np.maximum(plate, reach), np.abs(box.z - 5.0) - 74.0)
    blade = np.maximum(blade, trunk.skin_DHW[box.index] + 6.0)
    canvas.paint(box, blade, 620.0, GIRDLE_ID)
    canvas.paint(box, blade + 2.4, patient.bone_hu, GIRDLE_ID)
    ridge = spline([[42, 108, side * 72, 3.0], [56, 96, side * 115, 4.5], [78, 52, side * 152, 6.5]], 12)
    _long_bone(canvas, ridge, patient, 1.8)
    socket = spline([[62, 40, side * 130, 10], [76, 26, side * 143, 13]], 12)
    _long_bone(canvas, socket, patient, 2.0)
