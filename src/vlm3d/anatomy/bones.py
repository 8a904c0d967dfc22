"""Ribs, sternum and shoulder girdle: bone, told apart by where it lies around the lungs."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from vlm3d.anatomy.body import Body
from vlm3d.anatomy.grid import Mask, WorkGrid
from vlm3d.anatomy.lungs import Lungs
from vlm3d.anatomy.morphology import closed, signed_distance, without_small
from vlm3d.anatomy.spine import BONE_HU, CORTEX_HU, Spine


def find_other_bones(
    grid: WorkGrid, body: Body, lungs: Lungs, cavity_DHW: Mask, spine: Spine | None
) -> tuple[Mask, Mask]:
    """Ribs, and sternum with shoulder girdle, on the coarse grid.

    Ribs hug the chest's inner wall; the sternum lies in front between the lungs; shoulder blades, collarbones and
    arms lie farther out or above.
    """
    bone = body.mask_DHW & (grid.hu_DHW > BONE_HU)
    bone |= body.mask_DHW & closed(grid.hu_DHW > CORTEX_HU, 1.5)
    if spine is not None:
        bone &= ~ndimage.binary_dilation(spine.mask_DHW | spine.canal_DHW)
    outward_mm = signed_distance(cavity_DHW) * grid.step_mm
    bone &= outward_mm > -6.0
    bone = without_small(bone, grid.voxels(10.0))
    d, h, w = np.nonzero(lungs.both_DHW)
    top, bottom, front = int(d.max()), int(d.min()), np.percentile(h, 2)
    middle_w = float(spine.canal_center_D[:, 1].mean()) if spine is not None else float(w.mean())
    level, row, column = np.ogrid[: bone.shape[0], : bone.shape[1], : bone.shape[2]]
    middle_level = (top + bottom) / 2
    sternum = (
        (np.abs(column - middle_w) * grid.step_mm < 32) & (row < front + 30 / grid.step_mm) & (level > bottom)
    )
    outside_ribs = (outward_mm > 16.0) & (level > middle_level)
    above = level > top - 12 / grid.step_mm
    girdle = bone & (sternum | outside_ribs | (above & (outward_mm > 9.0)))
    return bone & ~girdle, girdle
