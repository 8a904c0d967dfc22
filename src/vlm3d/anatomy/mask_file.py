"""A user's anatomy mask: read, checked against the scan's grid, turned to the scan's axes, mapped to our regions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import LUNG_IDS, NUM_REGIONS, REGION_BY_ID, REGIONS
from vlm3d.anatomy.totalsegmentator import map_totalsegmentator
from vlm3d.errors import MaskError
from vlm3d.io import read_mask
from vlm3d.preprocessing.orientation import axis_codes, canonical_affine, canonical_view, from_canonical
from vlm3d.volume import RegionMap, Volume, spacing_from_affine

GRID_TOLERANCE_MM = 0.1
AIR_HU = -400.0
MIN_AIR_OF_LUNG, MAX_AIR_ELSEWHERE = 0.05, 0.5
MAX_APART_MM = 70.0
"""Between the middles of what lies on one side; those of two lungs lie twice as far apart."""
MIN_VOXELS = 8
SAMPLE_STRIDE = 3


def read_region_mask(
    path: str | Path, volume: Volume, labels: Literal["auto", "vlm3d", "totalsegmentator"] = "auto"
) -> RegionMap:
    """Read an anatomy mask that belongs to a scan.

    Args:
        path: NIfTI, MetaImage or NRRD; its axes may be ordered and flipped otherwise than the scan's.
        volume: The scan.
        labels: Whose ids they are. ``"auto"`` takes a mask with ids above 20 for TotalSegmentator's, and any other for
            ours; a TotalSegmentator mask of low ids only (its lobes alone, say) must be named.

    Raises:
        MaskError: It lies on another grid, is empty, holds labels that are not in its table, or cannot mean what its table
            says: lungs without air, or the right side's labels to the left of the left side's.
    """
    mask = read_mask(path)
    labels_DHW = _on_scan_axes(mask.labels_DHW, mask.affine, volume, Path(path).name)
    low, high = int(labels_DHW.min()), int(labels_DHW.max())
    if high == 0 and low == 0:
        raise MaskError(f"{path}: the mask is empty")
    foreign = labels == "totalsegmentator" or (labels == "auto" and high > NUM_REGIONS)
    try:
        if foreign:
            regions_DHW = map_totalsegmentator(labels_DHW)
        elif low < 0 or high > NUM_REGIONS:
            foreign_labels = [int(label) for label in np.unique(labels_DHW) if not 0 <= label <= NUM_REGIONS]
            named = ", ".join(str(label) for label in foreign_labels[:5])
            raise MaskError(f"the mask holds the labels {named}; vlm3d's regions are 0..{NUM_REGIONS}")
        else:
            regions_DHW = labels_DHW.astype(np.uint8)
        _check_anatomy(regions_DHW, volume)
    except MaskError as error:
        raise MaskError(f"{path}: {error}") from error
    return RegionMap(np.ascontiguousarray(regions_DHW), volume.affine, "file")


def _on_scan_axes(
    labels_DHW: NDArray[np.integer], affine: NDArray[np.float64], volume: Volume, name: str
) -> NDArray[np.integer]:
    """The mask's array on the scan's axes, after checking that both cover the same voxels of the patient."""
    mask_affine, mask_shape = canonical_affine(affine, labels_DHW.shape)
    scan_affine, scan_shape = canonical_affine(volume.affine, volume.shape_DHW)
    last = np.array([*scan_shape, 1.0]) - (1, 1, 1, 0)
    apart_mm = max(
        float(np.abs((mask_affine - scan_affine) @ corner)[:3].max())
        for corner in (np.array([0, 0, 0, 1.0]), last)
    )
    if tuple(mask_shape) != tuple(scan_shape) or apart_mm > GRID_TOLERANCE_MM:
        raise MaskError(
            f"{name} lies on another grid than the scan: {_grid_words(labels_DHW.shape, affine)} against "
            f"{_grid_words(volume.shape_DHW, volume.affine)}; resample it to the scan"
        )
    return from_canonical(canonical_view(labels_DHW, affine), volume.affine)


def _check_anatomy(regions_DHW: NDArray[np.uint8], volume: Volume) -> None:
    """Refuse ids of another table, which would put findings into other lobes, or on the other side."""
    whose = "are its ids another tool's? --mask-labels says whose they are"
    sampled = (slice(None, None, SAMPLE_STRIDE),) * 3
    ids_DHW = canonical_view(regions_DHW, volume.affine)[sampled]
    air_DHW = canonical_view(np.asarray(volume.voxels_DHW), volume.affine)[sampled] < AIR_HU
    lung_DHW = np.isin(ids_DHW, LUNG_IDS)
    if lung_DHW.any() and air_DHW[lung_DHW].mean() < MIN_AIR_OF_LUNG:
        raise MaskError(f"what the mask calls lung holds no air; {whose}")
    if not lung_DHW.any() and air_DHW[ids_DHW > 0].mean() > MAX_AIR_ELSEWHERE:
        raise MaskError(f"what the mask labels is mostly air, and none of it is called lung; {whose}")
    step_mm = SAMPLE_STRIDE * spacing_from_affine(canonical_affine(volume.affine, volume.shape_DHW)[0])[2]
    middle_mm = {
        region.id: float(np.nonzero(place_DHW)[2].mean()) * step_mm
        for region in REGIONS
        if region.side is not None and np.count_nonzero(place_DHW := ids_DHW == region.id) >= MIN_VOXELS
    }
    right, left = (
        {number: mm for number, mm in middle_mm.items() if REGION_BY_ID[number].side == side}
        for side in ("right", "left")
    )
    if right and left and max(right.values()) > min(left.values()):
        first, second = max(right, key=right.__getitem__), min(left, key=left.__getitem__)
        words = f"the {REGION_BY_ID[first].name} to the left of the {REGION_BY_ID[second].name}"
        raise MaskError(f"the mask puts {words}; {whose}")
    for side, found in (("right", right), ("left", left)):
        if found and max(found.values()) - min(found.values()) > MAX_APART_MM:
            raise MaskError(f"what the mask puts on the {side} lies on both sides; {whose}")


def _grid_words(shape: tuple[int, ...], affine: NDArray[np.float64]) -> str:
    spacing = " x ".join(f"{side:.3g}" for side in spacing_from_affine(affine))
    origin = ", ".join(f"{x:.1f}" for x in affine[:3, 3])
    size = " x ".join(str(n) for n in shape)
    return f"{size} voxels of {spacing} mm, axes {''.join(axis_codes(affine))}, origin ({origin})"
