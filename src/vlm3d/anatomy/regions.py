"""The 20 anatomical regions: ids, names, and the table from TotalSegmentator's classes onto them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """One anatomical region.

    Attributes:
        id: Value in a region mask, 1..20 (0 is background).
        key: Identifier in files.
        name: The name a person reads.
        side: ``"right"``, ``"left"`` or None.
        mirror: Key of the same region on the other side, where there is one.
    """

    id: int
    key: str
    name: str
    side: str | None = None
    mirror: str | None = None


REGIONS: tuple[Region, ...] = (
    Region(1, "right_upper_lobe", "right upper lobe", "right", "left_upper_lobe"),
    Region(2, "right_middle_lobe", "right middle lobe", "right"),
    Region(3, "right_lower_lobe", "right lower lobe", "right", "left_lower_lobe"),
    Region(4, "left_upper_lobe", "left upper lobe", "left", "right_upper_lobe"),
    Region(5, "left_lower_lobe", "left lower lobe", "left", "right_lower_lobe"),
    Region(6, "airways", "trachea and bronchi"),
    Region(7, "heart", "heart"),
    Region(8, "aorta", "aorta"),
    Region(9, "pulmonary_vessels", "pulmonary vessels"),
    Region(10, "great_veins", "great veins"),
    Region(11, "esophagus", "esophagus"),
    Region(12, "mediastinum", "remaining mediastinum"),
    Region(13, "right_pleural_space", "right pleural space", "right", "left_pleural_space"),
    Region(14, "left_pleural_space", "left pleural space", "left", "right_pleural_space"),
    Region(15, "ribs", "ribs"),
    Region(16, "spine", "spine"),
    Region(17, "sternum_shoulder_girdle", "sternum and shoulder girdle"),
    Region(18, "diaphragm_upper_abdomen", "diaphragm and upper abdomen"),
    Region(19, "liver", "liver"),
    Region(20, "body_wall", "body wall"),
)

_WITHOUT_MIRROR = {"right_middle_lobe": "left_upper_lobe"}

NUM_REGIONS = len(REGIONS)
REGION_IDS: dict[str, int] = {region.key: region.id for region in REGIONS}
REGION_BY_ID: dict[int, Region] = {region.id: region for region in REGIONS}
MIRRORED_REGION_IDS: tuple[int, ...] = (
    0,
    *(
        region.id if region.side is None else REGION_IDS[region.mirror or _WITHOUT_MIRROR[region.key]]
        for region in REGIONS
    ),
)
"""Region id -> id of what lies there in the scan mirrored left to right; a right middle lobe is part of an upper lobe."""
RIGHT_LUNG_IDS: tuple[int, ...] = (1, 2, 3)
LEFT_LUNG_IDS: tuple[int, ...] = (4, 5)
LUNG_IDS: tuple[int, ...] = RIGHT_LUNG_IDS + LEFT_LUNG_IDS
