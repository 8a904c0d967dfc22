"""Pictures of slices as radiologists look at them: windowed, in true proportions, with outlines and side markers.

All arrays here are canonical (D superior, H posterior, W left). An axial slice shows the patient's right on the left and
anterior on top; coronal and sagittal ones show the head on top, the sagittal one anterior on the left.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from vlm3d.outputs.outlines import UNITS_PER_MM, outline_path

Plane = Literal["axial", "coronal", "sagittal"]
Box = tuple[slice, slice, slice]

_BODY_HU = -300
_BODY_MARGIN_MM = 8.0
_COARSE_MM = 4.0
_TABLE_COARSE_VOXELS = 2  # an opening this deep parts the table and clothes from the body
_WITHIN_SLICE = ndimage.generate_binary_structure(2, 1)[None]
_AIR_HU = -1024.0


@dataclass(frozen=True)
class Window:
    """A display window in HU.

    Attributes:
        key: Identifier on the page.
        name: What a person calls it.
        width: HU from black to white.
        level: HU of middle gray.
    """

    key: str
    name: str
    width: int
    level: int

    @property
    def label(self) -> str:
        """Name with width and level, as it stands in a picture's corner."""
        return f"{self.name} W {self.width} L {self.level}".replace("-", "\u2212")


LUNG = Window("lung", "Lung", 1500, -600)
MEDIASTINUM = Window("mediastinum", "Mediastinum", 400, 40)


@dataclass(frozen=True)
class Outline:
    """A lesion's edge on a picture: its key, the SVG path, and how it is drawn (``main``, ``other``, ``filled`` …)."""

    lesion: str
    path: str
    style: str


@dataclass(frozen=True)
class Figure:
    """One picture of the page with everything drawn on it.

    Attributes:
        image: Data URI.
        alt: What it shows, for those who cannot see it.
        width_mm: True width; with `height_mm` it fixes the proportions, whatever the pixels.
        height_mm: True height.
        markers: Letters at the (left, right, top, bottom) edges.
        label: Window or plane, in the top left corner.
        outlines: Drawn over the image, can be switched off.
        bar_mm: Length of the scale bar.
    """

    image: str
    alt: str
    width_mm: float
    height_mm: float
    markers: tuple[str, str, str, str]
    label: str
    outlines: tuple[Outline, ...] = ()
    bar_mm: int = 50

    @property
    def view_box(self) -> str:
        """The picture's extent in the units of its outlines."""
        return f"0 0 {self.width_mm * UNITS_PER_MM:.0f} {self.height_mm * UNITS_PER_MM:.0f}"


MARKERS: dict[Plane, tuple[str, str, str, str]] = {
    "axial": ("R", "L", "A", "P"),
    "coronal": ("R", "L", "S", "I"),
    "sagittal": ("A", "P", "S", "I"),
}


def slice_of(array_DHW: NDArray[Any], plane: Plane, index: int, box: Box) -> NDArray[Any]:
    """One slice, cropped and turned as it is looked at: row 0 is the top of the picture."""
    if plane == "axial":
        return array_DHW[index, box[1], box[2]]
    if plane == "coronal":
        return array_DHW[box[0], index, box[2]][::-1]
    return array_DHW[box[0], box[1], index][::-1]


def pixel_mm(spacing_mm: tuple[float, float, float], plane: Plane) -> tuple[float, float]:
    """Size of a slice's pixel, (down, across)."""
    depth, height, width = spacing_mm
    return {"axial": (height, width), "coronal": (depth, width), "sagittal": (depth, height)}[plane]


def to_gray(slice_hu_HW: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """HU to 0..255; values outside the window, padding and NaN become black or white, never noise."""
    hu = np.nan_to_num(slice_hu_HW.astype(np.float32), nan=_AIR_HU)
    low = window.level - window.width / 2
    gray = (hu - low) * (255.0 / window.width)
    return np.rint(np.clip(gray, 0, 255)).astype(np.uint8)


def jpeg(gray_HW: NDArray[np.uint8], quality: int = 82) -> str:
    """A gray picture as base64 JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(gray_HW).save(buffer, format="JPEG", quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def resized(
    slice_hu_HW: NDArray[Any], spacing_mm: tuple[float, float], longest_px: int
) -> NDArray[np.float32]:
    """A slice with square pixels, its longer side at most `longest_px`; averages where it shrinks."""
    height_mm, width_mm = (size * step for size, step in zip(slice_hu_HW.shape, spacing_mm, strict=True))
    finest_px = max(height_mm, width_mm) / min(spacing_mm)
    per_mm = min(longest_px, finest_px) / max(height_mm, width_mm)
    size_px = (max(1, round(width_mm * per_mm)), max(1, round(height_mm * per_mm)))
    hu = np.ascontiguousarray(np.nan_to_num(slice_hu_HW.astype(np.float32), nan=_AIR_HU))
    return np.asarray(Image.fromarray(hu).resize(size_px, Image.Resampling.BILINEAR))


def body_box(voxels_hu_DHW: NDArray[Any], spacing_mm: tuple[float, float, float]) -> Box:
    """The part of the scan that holds the body, with a margin; all of it where no body is found."""
    shape = voxels_hu_DHW.shape
    steps = [max(1, round(_COARSE_MM / spacing)) for spacing in spacing_mm]
    body = voxels_hu_DHW[:: steps[0], :: steps[1], :: steps[2]] > _BODY_HU
    labels, count = ndimage.label(
        ndimage.binary_opening(body, _WITHIN_SLICE, iterations=_TABLE_COARSE_VOXELS)
    )
    if count == 0:
        return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
    largest = int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
    found = ndimage.find_objects(labels)[largest - 1]
    sides = [slice(0, shape[0])]
    for axis in (1, 2):
        margin = steps[axis] + round(_BODY_MARGIN_MM / spacing_mm[axis])
        start, stop = found[axis].start * steps[axis] - margin, found[axis].stop * steps[axis] + margin
        sides.append(slice(max(0, start), min(shape[axis], stop)))
    return sides[0], sides[1], sides[2]


def outlines_on(
    masks_DHW: Mapping[str, NDArray[np.bool_]],
    plane: Plane,
    index: int,
    box: Box,
    spacing_mm: tuple[float, float, float],
    styles: Mapping[str, str],
    max_chars: int = 12_000,
) -> tuple[Outline, ...]:
    """The edges of all lesions on one slice; `styles` names how each lesion is drawn."""
    pixel = pixel_mm(spacing_mm, plane)
    found = []
    for key, mask_DHW in masks_DHW.items():
        path = outline_path(slice_of(mask_DHW, plane, index, box), pixel, max_chars=max_chars)
        if path:
            found.append(Outline(key, path, styles[key]))
    return tuple(found)


def figure(
    voxels_hu_DHW: NDArray[Any],
    plane: Plane,
    index: int,
    box: Box,
    spacing_mm: tuple[float, float, float],
    window: Window,
    *,
    alt: str,
    outlines: tuple[Outline, ...] = (),
    label: str | None = None,
    bar_mm: int = 50,
    longest_px: int = 640,
) -> Figure:
    """One slice in one window as a finished picture."""
    pixel = pixel_mm(spacing_mm, plane)
    hu_HW = slice_of(voxels_hu_DHW, plane, index, box)
    height_mm, width_mm = hu_HW.shape[0] * pixel[0], hu_HW.shape[1] * pixel[1]
    if max(hu_HW.shape) > longest_px:
        hu_HW = resized(hu_HW, pixel, longest_px)
    return Figure(
        image=f"data:image/jpeg;base64,{jpeg(to_gray(hu_HW, window))}",
        alt=alt,
        width_mm=width_mm,
        height_mm=height_mm,
        markers=MARKERS[plane],
        label=label or window.label,
        outlines=outlines,
        bar_mm=bar_mm,
    )
