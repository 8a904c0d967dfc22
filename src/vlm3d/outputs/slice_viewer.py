"""The page's scrollable viewer: all slices, small, in two windows, with outlines that stay sharp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.outputs.outlines import runs
from vlm3d.outputs.slice_images import (
    LUNG,
    MEDIASTINUM,
    UNITS_PER_MM,
    Box,
    jpeg,
    outlines_on,
    pixel_mm,
    resized,
    slice_of,
    to_gray,
)

MAX_SLICES = 80
LONGEST_PX = 320
_QUALITY = 72
_OUTLINE_CHARS = 3_000


@dataclass(frozen=True)
class Track:
    """Where along the scan a lesion lies, as (left, width) in percent from head to feet."""

    lesion: str
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Viewer:
    """What the viewer needs.

    Attributes:
        slices: One entry a slice, head first: ``index`` (canonical), ``z`` in mm, the pictures ``lung`` and
            ``mediastinum`` as base64 JPEG, and ``outlines`` by lesion key.
        start: Position in `slices` that is shown first.
        width_mm: True width of a picture.
        height_mm: True height of a picture.
        total: Slices of the scan.
        tracks: For the strip under the slider.
    """

    slices: list[dict[str, Any]]
    start: int
    width_mm: float
    height_mm: float
    total: int
    tracks: tuple[Track, ...]

    @property
    def view_box(self) -> str:
        """A picture's extent in the units of its outlines."""
        return f"0 0 {self.width_mm * UNITS_PER_MM:.0f} {self.height_mm * UNITS_PER_MM:.0f}"


def build_viewer(
    voxels_hu_DHW: NDArray[Any],
    affine: NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    masks_DHW: Mapping[str, NDArray[np.bool_]],
    box: Box,
    key_slices: Sequence[int],
    start_slice: int,
) -> Viewer:
    """Draw the viewer's slices from a canonical scan.

    Args:
        voxels_hu_DHW: Canonical HU.
        affine: Canonical; gives each slice its z in mm.
        spacing_mm: (D, H, W).
        masks_DHW: Canonical bool masks by lesion key.
        box: The part that is shown.
        key_slices: Slices that must be among those shown, most important first.
        start_slice: The slice that is shown first.
    """
    depth = voxels_hu_DHW.shape[0]
    shown = choose_slices(depth, key_slices)[::-1]
    pixel = pixel_mm(spacing_mm, "axial")
    present_D = {key: np.asarray(mask.any(axis=(1, 2))) for key, mask in masks_DHW.items()}
    center_HW = [(side.start + side.stop - 1) / 2 for side in box[1:]]
    slices = []
    for index in shown:
        small = resized(slice_of(voxels_hu_DHW, "axial", index, box), pixel, LONGEST_PX)
        here = {key: mask for key, mask in masks_DHW.items() if present_D[key][index]}
        outlines = outlines_on(
            here, "axial", index, box, spacing_mm, dict.fromkeys(here, "main"), max_chars=_OUTLINE_CHARS
        )
        slices.append(
            {
                "index": index,
                "z": round(float(affine[2] @ [index, *center_HW, 1.0]), 1),
                LUNG.key: jpeg(to_gray(small, LUNG), _QUALITY),
                MEDIASTINUM.key: jpeg(to_gray(small, MEDIASTINUM), _QUALITY),
                "outlines": {outline.lesion: outline.path for outline in outlines},
            }
        )
    tracks = tuple(
        Track(
            key,
            tuple(
                (100.0 * first / depth, 100.0 * (last - first) / depth) for first, last in runs(flags[::-1])
            ),
        )
        for key, flags in present_D.items()
        if flags.any()
    )
    return Viewer(
        slices=slices,
        start=int(np.argmin([abs(index - start_slice) for index in shown])),
        width_mm=(box[2].stop - box[2].start) * pixel[1],
        height_mm=(box[1].stop - box[1].start) * pixel[0],
        total=depth,
        tracks=tracks,
    )


def choose_slices(depth: int, key_slices: Sequence[int], at_most: int = MAX_SLICES) -> list[int]:
    """Evenly spaced slices, ascending, in which the key slices take their nearest neighbors' places."""
    chosen = np.unique(np.rint(np.linspace(0, depth - 1, min(depth, at_most))).astype(int)).tolist()
    kept: set[int] = set()
    for key in dict.fromkeys(key_slices):
        if key in chosen or len(kept) == len(chosen):
            kept.add(key)
            continue
        free = [index for index in chosen if index not in kept]
        chosen[chosen.index(min(free, key=lambda index: abs(index - key)))] = key
        kept.add(key)
    return sorted(chosen)
