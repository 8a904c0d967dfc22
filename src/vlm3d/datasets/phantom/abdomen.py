"""Liver, stomach, spleen and kidneys below the diaphragm, in the reference body's coordinates."""

from __future__ import annotations

import numpy as np

from vlm3d.anatomy.regions import REGION_IDS
from vlm3d.datasets.phantom.frame import (
    Array,
    Box,
    Canvas,
    coverage,
    ellipsoid,
    smooth_intersection,
    smooth_noise,
    smooth_union,
)
from vlm3d.datasets.phantom.patient import Patient
from vlm3d.datasets.phantom.thorax import Trunk

UPPER_ABDOMEN_ID = REGION_IDS["diaphragm_upper_abdomen"]


def paint_abdomen(canvas: Canvas, trunk: Trunk, patient: Patient, rng: np.random.Generator) -> None:
    """Paint the organs under the diaphragm; they fill its domes."""
    frame = canvas.frame
    steatosis = float(np.clip(rng.normal(58, 9), 20, 72))
    contrast = {"none": 0.0, "arterial": 12.0, "venous": 50.0}[patient.contrast]
    lowest = max(float(frame.z_D[0]) - 1, -400.0)
    box = frame.box((lowest, -110, -150), (float(trunk.diaphragm_HW.max()) + 3, 120, 150))
    texture_seed, stomach_seed = (int(value) for value in rng.integers(2**31, size=2))
    if box is None:
        return
    under = (box.z - trunk.diaphragm_HW[None, box.index[1], box.index[2]] + 3.5) * np.float32(0.75)
    wall = trunk.cavity_DHW[box.index] + 3.0
    inside = smooth_intersection(under, wall, 6)

    _stomach(canvas, box, inside, np.random.default_rng(stomach_seed))
    spleen = smooth_intersection(ellipsoid(box, (-158, 52, 102), (44, 44, 36)), inside, 5)
    canvas.paint(box, spleen, 48 + contrast * 1.3, UPPER_ABDOMEN_ID)
    for side in (-1, 1):
        kidney = ellipsoid(box, (-232, 58, side * 62), (48, 24, 26))
        canvas.paint(box, np.maximum(kidney, inside), 32 + contrast * 2.2, UPPER_ABDOMEN_ID)
    adrenal = ellipsoid(box, (-182, 50, 38), (12, 9, 4))
    canvas.paint(box, adrenal, 30 + contrast, UPPER_ABDOMEN_ID)

    right_lobe = ellipsoid(box, (-172, -4, -66), (86, 96, 84))
    left_lobe = ellipsoid(box, (-146, -44, 14), (34, 34, 62))
    liver = smooth_union(right_lobe, left_lobe, 26)
    behind = -ellipsoid(box, (-190, 74, -34), (60, 42, 30))
    liver = smooth_intersection(smooth_intersection(liver, behind, 12), inside, 5)
    texture = 4.0 * smooth_noise(frame, box, 9, np.random.default_rng(texture_seed))
    canvas.paint(box, liver, (steatosis + contrast + texture).astype(np.float32), REGION_IDS["liver"])
    gall = ellipsoid(box, (-222, -52, -48), (22, 15, 14))
    canvas.paint(box, gall, 8.0, UPPER_ABDOMEN_ID)
    for half in (-1.0, 1.0):  # crura beside the aorta
        crus = ellipsoid(box, (-178, 42, half * 17 + 4), (54, 15, 5))
        canvas.paint(box, crus, 50.0, UPPER_ABDOMEN_ID)


def _stomach(canvas: Canvas, box: Box, inside: Array, rng: np.random.Generator) -> None:
    """The fundus under the left dome: fluid behind, air in front, as the patient lies on the back."""
    z, y, x = rng.normal([-152, -2, 62], [4, 5, 5])
    outer = smooth_union(
        ellipsoid(box, (z, y, x), (36, 40, 34)), ellipsoid(box, (z - 34, y - 22, x - 22), (36, 26, 42)), 16
    )
    outer = smooth_intersection(outer, inside, 5)
    canvas.paint(box, outer, 45.0, UPPER_ABDOMEN_ID)
    lumen = outer + 4.0
    canvas.paint(box, lumen, float(rng.uniform(8, 40)), UPPER_ABDOMEN_ID)
    level = y - 8 + rng.uniform(-18, 14)
    alpha = coverage(lumen, canvas.frame.edge_mm) * coverage(
        np.broadcast_to(box.y - np.float32(level), lumen.shape), canvas.frame.edge_mm
    )
    canvas.blend(box.index, alpha, -990.0, UPPER_ABDOMEN_ID)
