"""What a phantom holds, in words and numbers: what was asked for, what was painted, and the truth measured from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import axial_diameter_mm
from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID, REGION_IDS
from vlm3d.datasets.phantom.frame import Canvas, Slices
from vlm3d.labels import STORED_LESION_KEYS

Side = Literal["right", "left", "midline", "bilateral"]
Level = Literal["upper", "middle", "lower"]


@dataclass(frozen=True)
class FindingSpec:
    """One finding to paint.

    Attributes:
        severity: 0 (just visible) to 1 (gross); sets number, size and density.
        side: Keep it to one side, where it has one.
        region: Keep it to one lobe: a key of `vlm3d.anatomy.regions`.
        count: Number of pieces (nodules, patches, bands, nodes) instead of a drawn one.
        size_mm: Diameter of every piece instead of a drawn one.
        kind: Variant, such as ``"part-solid"`` or ``"pacemaker"``, instead of a drawn one.
    """

    severity: float = 0.5
    side: Literal["right", "left"] | None = None
    region: str | None = None
    count: int | None = None
    size_mm: float | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.severity <= 1.0:
            raise ValueError(f"severity runs from 0 to 1, got {self.severity}")
        if self.region is not None and self.region not in REGION_IDS:
            raise ValueError(f"unknown region '{self.region}'; known: {', '.join(REGION_IDS)}")
        if self.side not in (None, "right", "left"):
            raise ValueError(f"side is 'right', 'left' or None, got '{self.side}'")


@dataclass(frozen=True)
class Painted:
    """One piece that a painter put into a scan.

    Attributes:
        finding: Name of the disease, as in `vlm3d.labels`.
        index: Part of the grid that it lies in.
        mask: The voxels there of which more than half was painted.
        lesion: Key of the lesion whose mask it belongs to, or None.
        kind: What sort of it, a word or two for the report.
        region: Key of its anatomical region; None to take the one that holds most of it.
        side: None to take the region's, or the half of the body that holds it.
        size_mm: Largest diameter; None to measure the mask.
    """

    finding: str
    index: Slices
    mask: NDArray[np.bool_]
    lesion: str | None = None
    kind: str = ""
    region: str | None = None
    side: Side | None = None
    size_mm: float | None = None


@dataclass(frozen=True)
class FindingTruth:
    """One finding that a phantom certainly has.

    Attributes:
        finding: Name of the disease, as in `vlm3d.labels`.
        lesion: Key of the lesion whose mask shows it, or None.
        region: Key of the region that holds most of it.
        side: Of the patient.
        level: Third of the lungs' height that its middle lies in.
        size_mm: Largest diameter.
        volume_ml: Of the painted voxels.
        severity: 0 to 1, as asked for.
        kind: What sort of it, a word or two.
        center_zyx_mm: Its middle on the phantom's frame (superior, posterior, left).
    """

    finding: str
    lesion: str | None
    region: str
    side: Side
    level: Level
    size_mm: float
    volume_ml: float
    severity: float
    kind: str
    center_zyx_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Landmarks:
    """Where the lungs lie, read from the regions before any finding is painted."""

    regions_DHW: NDArray[np.uint8]
    lung_low_mm: float
    lung_high_mm: float

    @classmethod
    def of(cls, canvas: Canvas) -> Landmarks:
        """Measure a canvas."""
        lungs = is_lung(canvas.regions_DHW)
        depth = np.flatnonzero(lungs.any(axis=(1, 2)))
        z = canvas.frame.z_D
        low, high = (z[depth[0]], z[depth[-1]]) if len(depth) else (z[0], z[-1])
        return cls(canvas.regions_DHW.copy(), float(low), float(high))

    def level(self, z_mm: float) -> Level:
        """Third of the lungs' height."""
        share = (z_mm - self.lung_low_mm) / max(self.lung_high_mm - self.lung_low_mm, 1e-6)
        return "lower" if share < 1 / 3 else "middle" if share < 2 / 3 else "upper"


def is_lung(regions_DHW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The five lobes."""
    return (regions_DHW >= LUNG_IDS[0]) & (regions_DHW <= LUNG_IDS[-1])


def midline(canvas: Canvas) -> float:
    """x of the patient's middle: that of the spine, else that of the grid."""
    columns = np.flatnonzero((canvas.regions_DHW == REGION_IDS["spine"]).any(axis=(0, 1)))
    x = canvas.frame.x_W
    return float((x[columns[0]] + x[columns[-1]]) / 2) if len(columns) else float((x[0] + x[-1]) / 2)


def measure(canvas: Canvas, landmarks: Landmarks, piece: Painted, severity: float) -> FindingTruth:
    """Truth of a painted piece; its mask holds at least one voxel."""
    step = canvas.frame.step_mm
    where = np.argwhere(piece.mask)
    start = np.array([cut.start or 0 for cut in piece.index])
    z, y, x = canvas.frame.points_at(where.mean(axis=0) + start)
    region = piece.region
    if region is None:
        ids = landmarks.regions_DHW[piece.index][piece.mask]
        counts = np.bincount(ids[ids > 0], minlength=21)
        lobes = counts[1 : LUNG_IDS[-1] + 1]
        best = int(np.argmax(lobes)) + 1 if lobes.any() else int(np.argmax(counts))
        region = REGION_BY_ID[max(best, 1)].key
    own = REGION_BY_ID[REGION_IDS[region]].side
    side: Side = piece.side or ("right" if own == "right" else "left" if own == "left" else "midline")
    size_mm = piece.size_mm
    if size_mm is None and piece.lesion is not None:
        size_mm = axial_diameter_mm(piece.mask, tuple(step.tolist()))
    elif size_mm is None:  # coarse: what no mask outlines is told without a size
        size_mm = float(np.hypot(*(np.ptp(where[:, 1:] * step[1:], axis=0) + step[1:])))
    return FindingTruth(
        finding=piece.finding,
        lesion=piece.lesion,
        region=region,
        side=side,
        level=landmarks.level(float(z)),
        size_mm=round(size_mm, 1),
        volume_ml=round(float(len(where) * step.prod() / 1000), 2),
        severity=round(float(severity), 3),
        kind=piece.kind,
        center_zyx_mm=(round(float(z), 1), round(float(y), 1), round(float(x), 1)),
    )


def lesion_masks(
    pieces: Mapping[str, list[Painted]], shape_DHW: tuple[int, int, int]
) -> dict[str, NDArray[np.bool_]]:
    """Masks (D, H, W) of all lesions; where two of the five lie over each other, the denser one has the voxel."""
    masks = {key: np.zeros(shape_DHW, bool) for key in STORED_LESION_KEYS}
    for painted in pieces.values():
        for piece in painted:
            if piece.lesion is not None:
                masks[piece.lesion][piece.index] |= piece.mask
    # What is airless or fluid now is no haze any more, whatever was painted there first.
    masks["ground_glass_opacity"] &= ~(masks["consolidation"] | masks["pleural_effusion"])
    masks["consolidation"] &= ~masks["pleural_effusion"]
    masks["lung_nodule"] &= ~(masks["consolidation"] | masks["pleural_effusion"])
    return masks


def still_visible(painted: list[Painted], masks: Mapping[str, NDArray[np.bool_]]) -> list[Painted]:
    """The pieces that later findings left to be seen, each with what is left of its mask."""
    left = [
        piece if piece.lesion is None else replace(piece, mask=piece.mask & masks[piece.lesion][piece.index])
        for piece in painted
    ]
    return [piece for piece in left if piece.mask.any()]


def names(truth: Iterable[FindingTruth]) -> set[str]:
    """The diseases of a truth."""
    return {item.finding for item in truth}
