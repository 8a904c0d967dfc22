"""The phantom's findings painted into a scan that exists, by the same painters: what a model sees of reality and truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from vlm3d.datasets.phantom.chest_signs import enlarge_heart
from vlm3d.datasets.phantom.cohort import PAINTERS, as_specs
from vlm3d.datasets.phantom.frame import Array, Canvas, Frame
from vlm3d.datasets.phantom.truth import (
    FindingTruth,
    Landmarks,
    Painted,
    lesion_masks,
    measure,
    still_visible,
)
from vlm3d.labels import DISEASE_NAMES
from vlm3d.preprocessing.orientation import from_canonical, regions_to_canonical, to_canonical
from vlm3d.volume import RegionMap, Volume


@dataclass(frozen=True)
class PaintedScan:
    """A scan with painted findings.

    Attributes:
        volume: int16 HU on the scan's own grid and axes.
        lesion_masks: Lesion key -> bool mask on that grid; all keys of `vlm3d.labels.STORED_LESIONS`.
        truth: Every painted piece that is left to be seen; positions on the canonical grid, from its first voxel.
    """

    volume: Volume
    lesion_masks: dict[str, NDArray[np.bool_]]
    truth: list[FindingTruth]


def paint_into_scan(
    volume: Volume, regions: RegionMap, findings: Mapping[str, Any], *, seed: int
) -> PaintedScan:
    """Paint findings into a scan.

    Args:
        volume: A chest CT in HU, in any orientation.
        regions: Its regions, on the same grid.
        findings: As for `generate_phantom`; a finding for which the scan has no room is left out.
        seed: The same scan, findings and seed give the same result.

    Raises:
        ValueError: The regions lie on another grid, or a finding is unknown.
    """
    if volume.voxels_DHW.shape != regions.labels_DHW.shape:
        raise ValueError(
            f"the regions' grid {regions.labels_DHW.shape} is not the scan's {volume.voxels_DHW.shape}; "
            "read the mask with read_region_mask(path, scan)"
        )
    specs = as_specs(findings)
    scan, ids = to_canonical(volume), regions_to_canonical(regions)
    before = np.clip(scan.voxels_DHW.astype(np.float32), -1024, 3071)
    canvas = Canvas(before.copy(), ids.labels_DHW.copy(), Frame.regular(scan.shape_DHW, scan.spacing_mm))
    landmarks = Landmarks.of(canvas)
    children = np.random.SeedSequence(seed).spawn(len(PAINTERS) + 2)
    pieces: dict[str, list[Painted]] = {}
    if "Cardiomegaly" in specs:
        pieces["Cardiomegaly"] = enlarge_heart(
            canvas, np.random.default_rng(children[-1]), specs["Cardiomegaly"]
        )
        before = canvas.hu_DHW.copy()
    for child, (name, painter) in zip(children, PAINTERS.items(), strict=False):
        if name in specs:
            pieces[name] = painter(canvas, np.random.default_rng(child), specs[name])
    masks = lesion_masks(pieces, canvas.frame.shape_DHW)
    pieces = {name: still_visible(painted, masks) for name, painted in pieces.items()}
    _grain(canvas, before, np.random.default_rng(children[-2]))
    truth = [
        measure(canvas, landmarks, piece, specs[name].severity)
        for name in DISEASE_NAMES
        for piece in pieces.get(name, [])
    ]
    hu_DHW = np.rint(np.clip(canvas.hu_DHW, -1024, 3071)).astype(np.int16)
    return PaintedScan(
        volume.with_voxels(from_canonical(hu_DHW, volume.affine)),
        {key: from_canonical(mask, volume.affine) for key, mask in masks.items()},
        truth,
    )


def _grain(canvas: Canvas, before_DHW: Array, rng: np.random.Generator) -> None:
    """Give what was painted the scan's own noise, as strong as in its soft tissue, where air or lung was replaced."""
    changed = np.abs(canvas.hu_DHW - before_DHW) > 150
    tissue = (before_DHW > 0) & (before_DHW < 90)
    if not changed.any() or tissue.sum() < 1000:
        return
    fine = before_DHW - gaussian_filter(before_DHW, (0, 1, 1), truncate=2)
    level = 1.48 * float(np.median(np.abs(fine[tissue])))
    white = gaussian_filter(
        rng.standard_normal(canvas.frame.shape_DHW, dtype=np.float32), (0, 0.6, 0.6), truncate=2
    )
    white *= 0.85 * level / max(float((white - gaussian_filter(white, (0, 1, 1), truncate=2)).std()), 1e-6)
    canvas.hu_DHW += np.where(changed & (canvas.hu_DHW > -900), white, np.float32(0))
