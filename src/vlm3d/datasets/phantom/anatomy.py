"""A patient without findings: all organs on one grid, in the order in which they cover each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom.abdomen import paint_abdomen
from vlm3d.datasets.phantom.frame import Array, Canvas, Frame, Slices, bounds, smooth_noise
from vlm3d.datasets.phantom.mediastinum import LOBE_ROOTS, paint_mediastinum
from vlm3d.datasets.phantom.patient import Patient
from vlm3d.datasets.phantom.pose import Pose
from vlm3d.datasets.phantom.skeleton import paint_shoulders, paint_spine, paint_sternum
from vlm3d.datasets.phantom.thorax import build_trunk, paint_ribs
from vlm3d.datasets.phantom.trees import Tubes, beside, grow, join, sample_in_region, tube_coverage
from vlm3d.datasets.phantom.truth import is_lung

WALL_SHARE = 0.24  # a bronchus's wall against its lumen's radius


@dataclass
class Anatomy:
    """A painted patient.

    Attributes:
        canvas: HU, regions, bronchi and coronary arteries, on a frame in mm of the patient.
        patient: Who it is.
        arteries: The arteries beside the bronchi.
    """

    canvas: Canvas
    patient: Patient
    arteries: Tubes


def build_anatomy(
    frame: Frame, patient: Patient, seed: np.random.SeedSequence, pose: Pose | None = None
) -> Anatomy:
    """Paint a patient on a grid.

    Args:
        frame: Voxel centers in mm of the patient, (0, 0, 0) at the carina's height in mid chest.
        patient: Who it is.
        seed: Every part draws from its own child, so that one part's changes leave the others alone.
        pose: How the patient lies; straight without it.
    """
    pose = pose or Pose()
    rngs = [np.random.default_rng(child) for child in seed.spawn(5)]
    upright = pose.upright_frame(frame)
    reference = upright.scaled(patient.scale_zyx)
    canvas = Canvas(np.empty(upright.shape_DHW, np.float32), np.zeros(upright.shape_DHW, np.uint8), reference)
    trunk = build_trunk(canvas, patient, rngs[0])
    paint_ribs(canvas, trunk, patient)
    paint_spine(canvas, patient)
    paint_sternum(canvas, patient)
    paint_shoulders(canvas, trunk, patient)
    paint_abdomen(canvas, trunk, patient, rngs[1])
    heart = paint_mediastinum(canvas, patient, trunk.diaphragm_HW, rngs[2])
    _texture_lungs(canvas, rngs[3])
    factor = np.asarray(patient.scale_zyx)
    airways, arteries, veins = (
        pose.turn_tubes(tree.scaled(factor)) for tree in _grow_lung_trees(canvas, patient, rngs[4])
    )
    painted = pose.turn_canvas(replace(canvas, frame=upright), frame)
    right, left, _ = patient.blood_hu
    paint_vessels(painted, veins, left)
    paint_vessels(painted, arteries, right)
    paint_airways(painted, airways)
    painted.airways = airways if len(airways) else None
    if heart is not None:
        painted.coronaries = {name: pose.turn(path * factor) for name, path in heart.coronaries.items()}
    return Anatomy(painted, patient, arteries)


def _texture_lungs(canvas: Canvas, rng: np.random.Generator) -> None:
    """Lobules differ a little in density."""
    lungs = is_lung(canvas.regions_DHW)
    index = bounds(lungs)
    if index is None:
        return
    box = canvas.frame.cut(index)
    texture = smooth_noise(canvas.frame, box, 12, rng)
    texture *= np.float32(9.0)
    texture += np.float32(6.0) * smooth_noise(canvas.frame, box, 45, rng)
    texture *= lungs[index]
    canvas.hu_DHW[index] += texture


def _grow_lung_trees(
    canvas: Canvas, patient: Patient, rng: np.random.Generator
) -> tuple[Tubes, Tubes, Tubes]:
    """Bronchi, the arteries beside them, and veins, in the reference body's coordinates."""
    bronchi, arteries, veins = [], [], []
    for lobe, child in zip(LOBE_ROOTS, rng.spawn(len(LOBE_ROOTS)), strict=True):
        root, heading, vein_root = LOBE_ROOTS[lobe]
        region = REGION_IDS[lobe]
        draw = np.random.default_rng(child.integers(2**63))
        points = sample_in_region(canvas.frame, canvas.regions_DHW, region, draw, spacing_mm=9.5)
        others = sample_in_region(canvas.frame, canvas.regions_DHW, region, draw, spacing_mm=12.0)
        if min(len(points), len(others)) < 4:
            continue
        leaf = 0.55 * patient.vessel_scale
        tree = grow(points, root, heading, draw, leaf_radius_mm=leaf, exponent=2.95, region=region)
        bronchi.append(tree.with_radius(tree.radius_N2 * draw.normal(0.8, 0.03)))
        outward = -0.6 if REGION_BY_ID[region].side == "right" else 0.6
        arteries.append(beside(tree, 0.6, [0.7, -0.4, outward]))
        veins.append(
            grow(others, vein_root, heading, draw, leaf_radius_mm=0.58 * patient.vessel_scale, region=region)
        )
    if not bronchi:
        empty = Tubes(
            np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 2)), np.empty(0, int), np.empty(0, int)
        )
        return empty, empty, empty
    return join(bronchi), join(arteries), join(veins)


def paint_vessels(canvas: Canvas, vessels: Tubes, hu: float) -> None:
    """Paint vessels of the lungs; thick ones outside the lobes take the region of pulmonary vessels."""
    covered = tube_coverage(canvas.frame, vessels)
    if covered is not None:
        _blend_thin(canvas, *covered, hu)


def paint_airways(
    canvas: Canvas, airways: Tubes, wall_share: float = WALL_SHARE, wall_mm: float = 0.25
) -> None:
    """Paint bronchi: the wall first, then the air in it; those under 0.7 mm are left out, as CT shows none."""
    seen = airways.pick(airways.radius_N2.max(1) > 0.7)
    outer = tube_coverage(canvas.frame, seen.with_radius(seen.radius_N2 * (1 + wall_share) + wall_mm))
    lumen = tube_coverage(canvas.frame, seen)
    for covered, hu in ((outer, 30.0), (lumen, -1000.0)):
        if covered is not None:
            _blend_thin(canvas, *covered, hu)


def _blend_thin(canvas: Canvas, index: Slices, alpha: Array, hu: float) -> None:
    """Mix a density into the few voxels that a tree touches, in lungs, their vessels, airways and the mediastinum."""
    allowed = [*LUNG_IDS, *(REGION_IDS[key] for key in ("airways", "pulmonary_vessels", "mediastinum"))]
    table = np.zeros(256, bool)
    table[allowed] = True
    touched = np.unravel_index(np.flatnonzero(alpha > 0), alpha.shape)
    soft = table[canvas.regions_DHW[index][touched]]
    touched = tuple(axis[soft] for axis in touched)
    view, share = canvas.hu_DHW[index], alpha[touched]
    view[touched] += share * (np.float32(hu) - view[touched])
