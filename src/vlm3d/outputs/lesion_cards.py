"""The page's pictures of lesions: key slices of the listed pieces, and the coronal and sagittal overview."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import LUNG_IDS, REGION_BY_ID
from vlm3d.inference.prediction import LesionComponent, LesionFinding
from vlm3d.outputs.outlines import outline_path
from vlm3d.outputs.slice_images import (
    LUNG,
    MEDIASTINUM,
    Box,
    Figure,
    Outline,
    Plane,
    figure,
    outlines_on,
    pixel_mm,
    slice_of,
)

MAX_CARDS = 10
MAX_CARDS_PER_LESION = 4
_CLOSE_UP_MM = 50.0
_CLOSE_UP_OF_DIAMETER = 2.2
_CLOSE_UP_SHARE = 0.5
_RING_MARGIN_MM = 5.0
_WIDEST_RING_MM = 60.0
_SOFT_TISSUE_LESIONS = ("pericardial_effusion", "pleural_effusion")


@dataclass(frozen=True)
class CanonicalScan:
    """All arrays of one scan in canonical orientation (D superior, H posterior, W left).

    Attributes:
        voxels_hu_DHW: HU.
        affine: (4, 4), index to RAS+ mm.
        spacing_mm: (D, H, W).
        masks_DHW: bool masks by lesion key; only lesions that are there.
        labels_DHW: Region ids, or None.
        box: The part that pictures show.
    """

    voxels_hu_DHW: NDArray[Any]
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    masks_DHW: Mapping[str, NDArray[np.bool_]]
    labels_DHW: NDArray[np.uint8] | None
    box: Box

    @property
    def center_dhw(self) -> tuple[int, int, int]:
        """The middle of the part that is shown."""
        d, h, w = ((side.start + side.stop - 1) // 2 for side in self.box)
        return d, h, w

    def inside(self, index_dhw: tuple[int, int, int]) -> tuple[int, int, int]:
        """The nearest voxel that pictures show."""
        d, h, w = (
            int(np.clip(index, side.start, side.stop - 1))
            for index, side in zip(index_dhw, self.box, strict=True)
        )
        return d, h, w


@dataclass(frozen=True)
class Ring:
    """A ring around a piece on axial pictures: its box in percent of the picture, and on how many slices it is shown."""

    left: float
    top: float
    width: float
    height: float
    reach: int

    @property
    def data(self) -> str:
        """For the page's script: "left top width height"."""
        return f"{self.left:.2f} {self.top:.2f} {self.width:.2f} {self.height:.2f}"


@dataclass(frozen=True)
class LesionRow:
    """One piece of a lesion, as a row of the measurement table.

    Attributes:
        anchor: Of its card.
        number: On the page.
        lesion: Whose piece it is.
        component: The piece.
        slice_index: Its key slice, inside the scan.
        has_card: Whether its pictures are on the page.
        place: Index in the lesion's components.
        ring: Where a ring around it lies on an axial picture.
    """

    anchor: str
    number: int
    lesion: LesionFinding
    component: LesionComponent
    slice_index: int
    has_card: bool
    place: int
    ring: Ring

    @property
    def name(self) -> str:
        """What the viewer calls it: "Lung nodule, right upper lobe, 17 mm"."""
        region = self.component.region or self.component.side
        return f"{self.lesion.name}, {region}, {self.component.max_diameter_mm:.0f} mm"


@dataclass(frozen=True)
class Card:
    """The pictures of one piece: its key slice in both windows, and a close-up where it is small."""

    row: LesionRow
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Overview:
    """A coronal or sagittal picture, and which slices (canonical, from top to bottom) its height covers."""

    plane: Plane
    figure: Figure
    top_slice: int
    bottom_slice: int


def lesion_rows(lesions: list[LesionFinding], scan: CanonicalScan) -> list[LesionRow]:
    """All listed pieces: the surest lesion first, its largest piece first; the first few of each get pictures."""
    ranked = sorted(
        (lesion for lesion in lesions if lesion.components), key=lambda lesion: -lesion.max_probability
    )
    with_card = _given_cards(ranked)
    rows: list[LesionRow] = []
    for lesion in ranked:
        for place, component in enumerate(lesion.components):
            index = scan.inside((component.key_slice, 0, 0))[0]
            rows.append(
                LesionRow(
                    anchor=f"lesion-{len(rows) + 1}",
                    number=len(rows) + 1,
                    lesion=lesion,
                    component=component,
                    slice_index=index,
                    has_card=(lesion.key, place) in with_card,
                    place=place,
                    ring=_ring(component, scan),
                )
            )
    return rows


def _ring(component: LesionComponent, scan: CanonicalScan) -> Ring:
    """Around the piece's center, a little wider than it but at most as a fist, on as many slices as it is wide."""
    depth_mm, height_mm, width_mm = scan.spacing_mm
    _, h, w = scan.inside(component.centroid_index_dhw)
    rows, columns = scan.box[1], scan.box[2]
    across_mm = min(component.max_diameter_mm, _WIDEST_RING_MM) + 2 * _RING_MARGIN_MM
    width = 100 * across_mm / ((columns.stop - columns.start) * width_mm)
    height = 100 * across_mm / ((rows.stop - rows.start) * height_mm)
    return Ring(
        left=100 * (w - columns.start + 0.5) / (columns.stop - columns.start) - width / 2,
        top=100 * (h - rows.start + 0.5) / (rows.stop - rows.start) - height / 2,
        width=width,
        height=height,
        reach=max(1, round(component.max_diameter_mm / 2 / depth_mm)),
    )


def _given_cards(lesions: list[LesionFinding]) -> set[tuple[str, int]]:
    """First the largest piece of every lesion, then the second ones, until the page is full."""
    turns = [
        (lesion.key, place)
        for place in range(MAX_CARDS_PER_LESION)
        for lesion in lesions
        if place < len(lesion.components)
    ]
    return set(turns[:MAX_CARDS])


def key_images(rows: list[LesionRow], scan: CanonicalScan) -> list[Card]:
    """The key slice in lung and mediastinal windows, and a close-up, for each row that has a card."""
    return [Card(row, _key_figures(row, scan)) for row in rows if row.has_card]


def _key_figures(row: LesionRow, scan: CanonicalScan) -> tuple[Figure, ...]:
    key, component = row.lesion.key, row.component
    styles = {other: "main" if other == key else "other" for other in scan.masks_DHW}
    what = f"{row.lesion.name}, {component.region or component.side}, axial slice {row.slice_index + 1}"

    def outlines(box: Box) -> tuple[Outline, ...]:
        return outlines_on(scan.masks_DHW, "axial", row.slice_index, box, scan.spacing_mm, styles)

    whole = outlines(scan.box)
    figures = [
        figure(
            scan.voxels_hu_DHW,
            "axial",
            row.slice_index,
            scan.box,
            scan.spacing_mm,
            window,
            alt=f"{what}, {window.name.lower()} window",
            outlines=whole,
        )
        for window in (LUNG, MEDIASTINUM)
    ]
    near = _close_up_box(row, scan)
    if near is not None:
        window = MEDIASTINUM if key in _SOFT_TISSUE_LESIONS else LUNG
        figures.append(
            figure(
                scan.voxels_hu_DHW,
                "axial",
                row.slice_index,
                near,
                scan.spacing_mm,
                window,
                alt=f"{what}, close-up in the {window.name.lower()} window",
                outlines=outlines(near),
                label=f"Close-up · {window.name.lower()}",
                bar_mm=10,
            )
        )
    return tuple(figures)


def _close_up_box(row: LesionRow, scan: CanonicalScan) -> Box | None:
    """A square around the piece; None where the whole slice shows it as well."""
    wanted_mm = max(_CLOSE_UP_MM, _CLOSE_UP_OF_DIAMETER * row.component.max_diameter_mm)
    center = scan.inside(row.component.centroid_index_dhw)
    sides = [slice(row.slice_index, row.slice_index + 1)]
    for axis in (1, 2):
        whole = scan.box[axis]
        half = max(1, round(wanted_mm / scan.spacing_mm[axis] / 2))
        if 2 * half > _CLOSE_UP_SHARE * (whole.stop - whole.start):
            return None
        start = int(np.clip(center[axis] - half, whole.start, whole.stop - 2 * half))
        sides.append(slice(start, start + 2 * half))
    return sides[0], sides[1], sides[2]


def overviews(rows: list[LesionRow], scan: CanonicalScan) -> list[Overview]:
    """A coronal and a sagittal picture through the first lesion, or through the middle of the body.

    Lesions are filled where the picture cuts them; a dashed line is the shadow of those before or behind it.
    """
    center = scan.inside(rows[0].component.centroid_index_dhw) if rows else scan.center_dhw
    planes: tuple[tuple[Plane, int], ...] = (("coronal", 1), ("sagittal", 2))
    return [
        Overview(
            plane,
            figure(
                scan.voxels_hu_DHW,
                plane,
                center[axis],
                scan.box,
                scan.spacing_mm,
                LUNG,
                alt=f"{plane} overview with the lesions' outlines",
                outlines=_overview_outlines(plane, axis, center[axis], scan),
                label=plane.capitalize(),
            ),
            top_slice=scan.box[0].stop - 1,
            bottom_slice=scan.box[0].start,
        )
        for plane, axis in planes
    ]


def _overview_outlines(plane: Plane, axis: int, index: int, scan: CanonicalScan) -> tuple[Outline, ...]:
    pixel = pixel_mm(scan.spacing_mm, plane)
    lobes = []
    if scan.labels_DHW is not None:
        labels_HW = slice_of(scan.labels_DHW, plane, index, scan.box)
        for region in LUNG_IDS:
            path = outline_path(labels_HW == region, pixel, max_chars=8_000)
            if path:
                lobes.append(Outline(REGION_BY_ID[region].key, path, "region"))
    shadows = {key: np.expand_dims(mask.any(axis=axis), axis) for key, mask in scan.masks_DHW.items()}
    flat_box = tuple(slice(0, 1) if place == axis else side for place, side in enumerate(scan.box))
    cut = outlines_on(
        scan.masks_DHW, plane, index, scan.box, scan.spacing_mm, dict.fromkeys(scan.masks_DHW, "filled")
    )
    shadow = outlines_on(
        shadows,
        plane,
        0,
        (flat_box[0], flat_box[1], flat_box[2]),
        scan.spacing_mm,
        dict.fromkeys(shadows, "shadow"),
        max_chars=6_000,
    )
    return (*lobes, *shadow, *cut)
