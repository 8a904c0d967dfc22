"""Where in a scan a disease can be seen, as far as masks and stated places tell: what a classifier's gaze is taught by.

A lesion's mask says it to the voxel. A stated place (an entry of ``facts["findings"]``: a phantom's truth, or what was
read from a report) says it coarsely: the region, and within it the ball around the center where center and size are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS
from vlm3d.datasets.store import PreparedCase
from vlm3d.labels import DISEASE_NAMES, IMPLIED, STORED_LESIONS

MARGIN_MM = 4.0
"""Added to a stated radius: sizes are rounded, and an edge is seen from both sides."""

DIFFUSE_MM = 200.0
"""A finding of the lungs that is stated larger than this is everywhere in them."""

Bits = NDArray[np.uint32]


def guidance_bits(
    case: PreparedCase, regions_DHW: NDArray[np.uint8] | None, lesion_bits_DHW: NDArray[np.uint8]
) -> Bits:
    """Mark where each disease of a case can be seen.

    Args:
        case: Its affine, lesions and facts.
        regions_DHW: Region ids on its grid, or None.
        lesion_bits_DHW: As in `vlm3d.datasets.prepared.PreparedArrays`.

    Returns:
        uint32 (D, H, W): bit k is disease k of `vlm3d.labels.DISEASES`. A disease without a mark was not placed.
    """
    bits_DHW = np.zeros(lesion_bits_DHW.shape, np.uint32)
    masked = set()
    for number, lesion in enumerate(STORED_LESIONS):
        if case.lesion_voxels.get(lesion.key):
            masked.add(lesion.disease)
            flag = np.uint32(1 << DISEASE_NAMES.index(lesion.disease))
            bits_DHW |= ((lesion_bits_DHW >> number) & 1).astype(np.uint32) * flag
    for fact in case.facts.get("findings", ()):
        if fact["finding"] in DISEASE_NAMES and fact["finding"] not in masked:
            _mark(bits_DHW, case, regions_DHW, fact)
    for finding, broader in IMPLIED.items():
        narrow_at, broad_at = (np.uint32(DISEASE_NAMES.index(name)) for name in (finding, broader))
        if _label(case, broader) != 1:
            continue
        if all(_place_is_known(case, bits_DHW, name) for name in (finding, broader)):
            bits_DHW |= ((bits_DHW >> narrow_at) & np.uint32(1)) << broad_at
        else:  # it may lie in places without a mark, so that none of its marks tells where it is not
            bits_DHW &= ~(np.uint32(1) << broad_at)
    return bits_DHW


def _label(case: PreparedCase, disease: str) -> float:
    return float("nan") if case.labels_K is None else case.labels_K[DISEASE_NAMES.index(disease)]


def _place_is_known(case: PreparedCase, bits_DHW: Bits, disease: str) -> bool:
    """Whether nothing of a disease lies where it is not marked."""
    annotated = any(
        lesion.disease == disease and lesion.key in case.known_lesions for lesion in STORED_LESIONS
    )
    marked = bool((bits_DHW & np.uint32(1 << DISEASE_NAMES.index(disease))).any())
    return annotated or marked or _label(case, disease) == 0


def patch_guidance(bits_DHW: Bits, patch_size: tuple[int, int, int], num_diseases: int) -> NDArray[np.bool_]:
    """Patches (K, Z, Y, X) that a mark of each disease touches; the grid is one of whole patches."""
    (d, h, w), (pd, ph, pw) = bits_DHW.shape, patch_size
    patches = bits_DHW.reshape(d // pd, pd, h // ph, ph, w // pw, pw)
    touched_ZYX = np.bitwise_or.reduce(patches, axis=(1, 3, 5))
    return np.stack([(touched_ZYX >> np.uint32(k)) & 1 for k in range(num_diseases)]).astype(bool)


def _mark(
    bits_DHW: Bits, case: PreparedCase, regions_DHW: NDArray[np.uint8] | None, fact: Mapping[str, Any]
) -> None:
    """Mark one stated place; a place that is not on the grid, or not stated, leaves no mark."""
    flag = np.uint32(1 << DISEASE_NAMES.index(fact["finding"]))
    region = REGION_IDS.get(fact.get("region") or "")
    size_mm, center_mm = fact.get("size_mm"), fact.get("center_zyx_mm")
    diffuse = region in LUNG_IDS and size_mm is not None and size_mm > DIFFUSE_MM
    if center_mm is None or size_mm is None or diffuse:
        if regions_DHW is not None and region is not None:
            inside = np.isin(regions_DHW, LUNG_IDS) if diffuse else regions_DHW == region
            bits_DHW[inside] |= flag
        return
    index, ball = _ball(case, center_mm, size_mm / 2 + MARGIN_MM)
    if regions_DHW is not None and region is not None:
        within = ball & (regions_DHW[index] == region)
        ball = within if within.any() else ball
    bits_DHW[index] |= ball * flag


def _ball(
    case: PreparedCase, center_zyx_mm: tuple[float, float, float], radius_mm: float
) -> tuple[tuple[slice, slice, slice], NDArray[np.bool_]]:
    """The part of the grid around a center (mm to superior, posterior, left), and the ball there."""
    z, y, x = center_zyx_mm
    center = np.linalg.solve(np.array(case.affine), np.array([-x, -y, z, 1.0]))[:3]
    axes, cuts = [], []
    for middle, size, step in zip(center, case.shape_DHW, case.spacing_mm, strict=True):
        first = int(np.clip(np.floor(middle - radius_mm / step), 0, size))
        last = int(np.clip(np.ceil(middle + radius_mm / step) + 1, first, size))
        cuts.append(slice(first, last))
        axes.append(((np.arange(first, last) - middle) * step) ** 2)
    inside = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :] <= radius_mm**2
    return (cuts[0], cuts[1], cuts[2]), inside
