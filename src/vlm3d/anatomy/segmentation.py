"""The embedded anatomy: all regions of a chest CT by classical image processing, without weights.

The search runs on a coarse grid; lungs, airways and vertebrae are redrawn on finer ones. What is measured and what is only
an estimate is told in docs/decisions/0002-classical-anatomy.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.anatomy.airways import Airways, find_airways
from vlm3d.anatomy.body import Body, find_body
from vlm3d.anatomy.bones import find_other_bones
from vlm3d.anatomy.cavity import find_cavity
from vlm3d.anatomy.fissures import Fissures, find_fissures
from vlm3d.anatomy.grid import Box, Mask, WorkGrid, to_work_grid
from vlm3d.anatomy.lobes import divide_lung
from vlm3d.anatomy.lungs import Lungs, find_lungs, lung_levels, refine_lungs
from vlm3d.anatomy.mediastinum import (
    Frame,
    estimate_esophagus,
    estimate_great_veins,
    find_diaphragm,
    find_heart,
    find_hilar_vessels,
    find_liver,
)
from vlm3d.anatomy.morphology import grow, hull_slices
from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.anatomy.spine import Spine, find_spine
from vlm3d.anatomy.vessels import find_aorta, soft_tissue
from vlm3d.preprocessing.orientation import to_canonical
from vlm3d.volume import CANONICAL_AXES, RegionMap, Volume

logger = logging.getLogger(__name__)

CANAL_FROM_BACK_MM = 65.0
CARINA_BELOW_APEX, CARINA_FRONT_OF_CANAL_MM = 0.36, 70.0
MEDIAL_MM, PLEURA_MM = 45.0, 4.0
METHOD = "classical"


def segment_anatomy(volume: Volume) -> RegionMap:
    """Find the 20 regions in a chest CT.

    Args:
        volume: HU, in canonical orientation (axes to superior, posterior, left).

    Returns:
        Region ids on the scan's grid. A scan without lungs gets body wall only, and a warning in the log.
    """
    canonical = to_canonical(volume)
    if canonical.voxels_DHW.strides != volume.voxels_DHW.strides:
        raise ValueError(
            f"segment_anatomy takes a canonical volume, axes {CANONICAL_AXES}: use to_canonical first"
        )
    grid = to_work_grid(volume)
    body = find_body(grid)
    airways = find_airways(volume, grid, body)
    lungs = find_lungs(grid, body, airways)
    if lungs is None:
        logger.warning("no lungs found: is this a chest CT in HU?")
        coarse = np.where(body.mask_DHW, REGION_IDS["body_wall"], 0).astype(np.uint8)
        return RegionMap(grid.labels_to_full(coarse), volume.affine, METHOD)
    spine = find_spine(volume, grid, body, lungs)
    fissures = {
        side: find_fissures(grid.hu_DHW, lung, side, grid.step_mm)
        for side, lung in (("right", lungs.right_DHW), ("left", lungs.left_DHW))
    }
    coarse = _coarse_regions(grid, body, lungs, fissures, airways, spine)
    labels_DHW = grid.labels_to_full(coarse)
    _redraw_edges(labels_DHW, volume, grid, lungs, fissures, airways, spine)
    return RegionMap(labels_DHW, volume.affine, METHOD)


def _coarse_regions(
    grid: WorkGrid,
    body: Body,
    lungs: Lungs,
    fissures: Mapping[str, Fissures],
    airways: Airways,
    spine: Spine | None,
) -> NDArray[np.uint8]:
    """All regions on the coarse grid; a later one covers an earlier one."""
    frame = _frame(grid, body, lungs, airways, spine)
    cavity = find_cavity(grid, body, lungs, frame.canal_D)
    none = np.zeros(grid.shape_DHW, dtype=bool)
    column = none if spine is None else spine.mask_DHW | spine.canal_DHW
    blocked = ndimage.binary_dilation(column) | airways.mask_DHW | lungs.aerated_DHW
    soft = soft_tissue(grid, cavity, blocked)
    level = np.arange(grid.shape_DHW[0])[:, None, None]
    below = cavity & (level <= frame.diaphragm_HW[None]) & ~lungs.both_DHW
    aorta = find_aorta(grid, soft, frame.carina_DHW, frame.canal_D)
    heart = find_heart(grid, soft & ~below, frame, aorta)
    ribs, girdle = find_other_bones(grid, body, lungs, cavity, spine)

    ids = np.where(body.mask_DHW, REGION_IDS["body_wall"], 0).astype(np.uint8)

    def paint(mask: Mask, key: str) -> None:
        ids[mask] = REGION_IDS[key]

    paint(cavity & ~below, "mediastinum")
    paint(below, "diaphragm_upper_abdomen")
    paint(find_liver(grid, below & ~blocked, frame.canal_D), "liver")
    lateral_mm = (np.arange(grid.shape_DHW[2])[None] - frame.canal_D[:, 1:]) * grid.step_mm
    for side, lung, outward in (
        ("right", lungs.right_DHW, lateral_mm < -MEDIAL_MM),
        ("left", lungs.left_DHW, lateral_mm > MEDIAL_MM),
    ):
        room = cavity & ~below & outward[:, None, :] & ~heart
        shell = grow(lung, PLEURA_MM / grid.step_mm) & cavity if lung.any() else none
        paint(shell | (room & (hull_slices(lung) | soft)), f"{side}_pleural_space")
    paint(estimate_great_veins(grid, frame) & soft, "great_veins")
    paint(estimate_esophagus(grid, frame) & soft, "esophagus")
    paint(heart, "heart")
    paint(aorta, "aorta")
    paint(ribs, "ribs")
    paint(girdle, "sternum_shoulder_girdle")
    for side, lung in (("right", lungs.right_DHW), ("left", lungs.left_DHW)):
        divide_lung(lung, side, fissures[side], ids)
    paint(find_hilar_vessels(grid, lungs, airways.mask_DHW), "pulmonary_vessels")
    paint(airways.mask_DHW, "airways")
    paint(column, "spine")
    return ids


def _frame(grid: WorkGrid, body: Body, lungs: Lungs, airways: Airways, spine: Spine | None) -> Frame:
    """Landmarks; where trachea or spine were not found, they are placed from the body and the lungs."""
    middle_w = lungs.middle_w
    if middle_w is None:
        middle_w = float(np.mean(np.nonzero(body.mask_DHW.any((0, 1)))[0]))
    if spine is not None:
        canal_D = spine.canal_center_D
    else:
        back = float(np.nonzero(body.mask_DHW.any((0, 2)))[0][-1])
        canal_D = np.tile([back - CANAL_FROM_BACK_MM / grid.step_mm, middle_w], (grid.shape_DHW[0], 1))
    carina = airways.carina_DHW
    if carina is None:
        levels = lung_levels(lungs.both_DHW)
        assert levels is not None, "lungs were found"
        d = levels[1] - CARINA_BELOW_APEX * (levels[1] - levels[0])
        h, w = canal_D[round(d)]
        carina = (d, float(h) - CARINA_FRONT_OF_CANAL_MM / grid.step_mm, float(w))
    return Frame(carina, canal_D, find_diaphragm(grid, lungs))


def _redraw_edges(
    labels_DHW: NDArray[np.uint8],
    volume: Volume,
    grid: WorkGrid,
    lungs: Lungs,
    fissures: Mapping[str, Fissures],
    airways: Airways,
    spine: Spine | None,
) -> None:
    """Lungs, airways and vertebrae with the edges that the scan itself shows."""
    is_lung = np.zeros(256, dtype=bool)
    is_lung[[*LUNG_IDS, REGION_IDS["pulmonary_vessels"]]] = True
    for side, lung in (("right", lungs.right_DHW), ("left", lungs.left_DHW)):
        box, mask = refine_lungs(volume, grid, lung)
        if not mask.size:
            continue
        own = (REGION_IDS[f"{side}_pleural_space"], *(i for i in LUNG_IDS))
        lobes = np.zeros(mask.shape, np.uint8)
        divide_lung(mask, side, fissures[side], lobes)
        view = labels_DHW[box]
        stale = is_lung[view] & ~mask & _of_side(view, side)
        view[stale] = own[0]
        keep = view == REGION_IDS["pulmonary_vessels"]
        np.copyto(view, lobes, where=mask & ~keep)
    if airways.fine_DHW is not None:
        _draw(labels_DHW, grid.mask_to_full(airways.fine_DHW, airways.box), REGION_IDS["airways"])
    if spine is not None:
        box, mask = grid.mask_to_full(spine.fine_DHW, spine.box)
        if mask.size:
            view = labels_DHW[box]
            view[(view == REGION_IDS["spine"]) & ~mask] = REGION_IDS["body_wall"]
            view[mask] = REGION_IDS["spine"]


def _of_side(labels_DHW: NDArray[np.uint8], side: str) -> Mask:
    ids = [REGION_IDS[key] for key in REGION_IDS if key.startswith(side)]
    return np.isin(labels_DHW, ids)


def _draw(labels_DHW: NDArray[np.uint8], boxed: tuple[Box, Mask], region: int) -> None:
    box, mask = boxed
    if mask.size:
        labels_DHW[box][mask] = region
