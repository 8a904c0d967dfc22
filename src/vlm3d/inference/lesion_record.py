"""A measured lesion, and a place that was looked at, in the form that `prediction.json` keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import Component, bounding_box
from vlm3d.anatomy.regions import REGION_BY_ID
from vlm3d.inference.prediction import AttentionPlace, LesionComponent
from vlm3d.model.seen_places import SeenPlace
from vlm3d.volume import Volume


def listed_piece(piece: Component, canonical: Volume) -> LesionComponent:
    """One piece, with its center in the patient's space (RAS, mm)."""
    d, h, w = piece.centroid_index_dhw
    x, y, z = (canonical.affine @ np.array([d, h, w, 1.0]))[:3]
    return LesionComponent(
        side=piece.side,
        region=piece.region,
        level=piece.level,
        volume_ml=piece.volume_ml,
        max_diameter_mm=piece.max_diameter_mm,
        centroid_ras_mm=(float(x), float(y), float(z)),
        centroid_index_dhw=piece.centroid_index_dhw,
        key_slice=piece.key_slice,
        mean_probability=float(np.clip(piece.mean_probability or 0.0, 0.0, 1.0)),
    )


def listed_places(
    places: Sequence[SeenPlace], slice_of: Callable[[float], int] | None = None
) -> list[AttentionPlace]:
    """Places of one disease; ``slice_of`` tells the canonical slice at a height in patches."""
    return [
        AttentionPlace(
            side="left" if place.side == "left" else "right",
            region=place.region,
            level=place.level,
            key_slice=None if slice_of is None else slice_of(place.patch_z),
        )
        for place in places
    ]


def volume_ml_by_region(
    mask_DHW: NDArray[np.bool_], regions_DHW: NDArray[np.uint8] | None, voxel_ml: float
) -> dict[str, float]:
    """How much of a mask lies in each anatomical region, most first."""
    box = None if regions_DHW is None else bounding_box(mask_DHW)
    if regions_DHW is None or box is None:
        return {}
    voxels_R = np.bincount(regions_DHW[box][mask_DHW[box]], minlength=1)
    order = np.argsort(-voxels_R, kind="stable")
    return {
        REGION_BY_ID[int(i)].name: float(voxels_R[i]) * voxel_ml
        for i in order
        if voxels_R[i] and int(i) in REGION_BY_ID
    }
