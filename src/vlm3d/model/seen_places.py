"""Where the classifier saw a finding: side and lobe of the patches that it looked at, for what no mask shows.

In training the patches are those that are known to show the finding (`vlm3d.datasets.guidance`), in use those of the
classifier's attention; both are read alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import Level, LungLandmarks, Side, find_landmarks
from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID
from vlm3d.labels import DISEASES, STORED_LESIONS

IN_LOBES = frozenset(lesion.disease for lesion in STORED_LESIONS if lesion.lung)
"""Diseases whose place is a lobe."""

ON_SIDES = frozenset(disease.name for disease in DISEASES if disease.sided)
"""Diseases whose place is a side of the body."""

IN_LUNGS = frozenset(disease.name for disease in DISEASES if disease.diffuse)
"""Diseases whose place is a lung, or both."""

MIN_SHARE_OF_PATCH = 0.1
"""A patch counts if it is looked at this much of what the patch most looked at is."""
MIN_SHARE_OF_PLACE = 0.8
"""A place is told if it is looked at this much of what the place most looked at is."""
MIN_SHARE_OF_LUNG = 0.2
"""The same of a finding that fills lungs: the classifier need not look at all of it."""
MIN_SHARE_OF_KNOWN_PLACE = 0.3
"""The same where the patches are known to show the finding: attention strays, the truth does not."""


@dataclass(frozen=True)
class SeenPlace:
    """A place at which a finding was seen, without an outline.

    Attributes:
        side: Of the body.
        region: Name of a lobe, or empty.
        level: Third of the lungs' height.
        patch_z: Its center along Z, in patches.
    """

    side: Side
    region: str
    level: Level
    patch_z: float

    @property
    def words(self) -> str:
        """Such as 'right lower lobe, lower third', or 'right'."""
        return f"{self.region}, {self.level} third" if self.region else self.side


def seen_places(
    disease: str,
    weight_ZYX: NDArray[np.floating] | NDArray[np.bool_],
    regions_DHW: NDArray[np.uint8] | None,
    landmarks: LungLandmarks | None = None,
) -> list[SeenPlace]:
    """The places of a disease, the one most looked at first.

    Args:
        disease: Decides whether lobes, lungs or sides are told; one without a place has none.
        weight_ZYX: How much each patch is looked at, 0 or more; or, as bool, whether it is known to show the disease.
        regions_DHW: Region ids, canonical, in whole patches; None leaves sides alone to tell.
        landmarks: Of the regions, or of the grid of patches without them, to spare finding them for each disease.
    """
    if disease not in IN_LOBES | IN_LUNGS | ON_SIDES or not weight_ZYX.any():
        return []
    patches = _Patches.of(weight_ZYX.shape, regions_DHW, landmarks)
    votes: defaultdict[tuple[Side, str], list[tuple[float, float]]] = defaultdict(list)
    aside: defaultdict[tuple[Side, str], list[tuple[float, float]]] = defaultdict(list)
    for z, y, x in np.argwhere(weight_ZYX >= max(MIN_SHARE_OF_PATCH * weight_ZYX.max(), 1e-12)):
        weight = float(weight_ZYX[z, y, x])
        for region_id, share in patches.lobes(z, y, x) if disease in IN_LOBES | IN_LUNGS else ():
            region = REGION_BY_ID[region_id]
            side: Side = "right" if region.side == "right" else "left"
            votes[side, region.name if disease in IN_LOBES else ""].append((weight * share, float(z)))
        aside[patches.side(x), ""].append((weight, float(z)))
    votes = votes or aside
    total = {place: sum(weight for weight, _ in seen) for place, seen in votes.items()}
    share = MIN_SHARE_OF_LUNG if disease in IN_LUNGS else MIN_SHARE_OF_PLACE
    share = MIN_SHARE_OF_KNOWN_PLACE if weight_ZYX.dtype == bool else share
    told = sorted(
        (place for place in total if total[place] >= share * max(total.values())),
        key=lambda place: -total[place],
    )
    places = []
    for side, name in told:
        patch_z = sum(weight * z for weight, z in votes[side, name]) / total[side, name]
        level = patches.landmarks.level_of(patches.center(0, patch_z))
        places.append(SeenPlace(side, name, level, patch_z))
    return [place for place in places if place.side != "midline"]


@dataclass(frozen=True)
class _Patches:
    """The patches of a scan, in its voxels; without regions a patch is a voxel."""

    size: tuple[int, int, int]
    regions_DHW: NDArray[np.uint8] | None
    landmarks: LungLandmarks

    @classmethod
    def of(
        cls, grid: tuple[int, ...], regions_DHW: NDArray[np.uint8] | None, landmarks: LungLandmarks | None
    ) -> _Patches:
        d, h, w = grid if regions_DHW is None else regions_DHW.shape
        size = (d // grid[0], h // grid[1], w // grid[2])
        return cls(size, regions_DHW, landmarks or find_landmarks(regions_DHW, (d, h, w)))

    def center(self, axis: int, index: float) -> float:
        """Voxel index of a patch's center."""
        return (index + 0.5) * self.size[axis] - 0.5

    def side(self, x: int) -> Side:
        """Of a column of patches; one that the midline runs through is neither."""
        if abs(self.center(2, x) - self.landmarks.midline_index_w) < self.size[2] / 2:
            return "midline"
        return self.landmarks.side_of(self.center(2, x))

    def lobes(self, z: int, y: int, x: int) -> list[tuple[int, float]]:
        """Ids of the lobes in a patch, each with its share of all lobes there."""
        if self.regions_DHW is None:
            return []
        cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip((z, y, x), self.size, strict=True))
        voxels_R = np.bincount(self.regions_DHW[cut].ravel(), minlength=LUNG_IDS[-1] + 1)
        voxels = sum(int(voxels_R[i]) for i in LUNG_IDS)
        return [(i, float(voxels_R[i]) / voxels) for i in LUNG_IDS if voxels_R[i]]
