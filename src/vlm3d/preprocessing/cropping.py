"""Choose which part of a scan the model sees: around the lungs, or the middle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.regions import LUNG_IDS, REGION_IDS

CHEST_CAVITY_IDS: tuple[int, ...] = (
    *LUNG_IDS,
    REGION_IDS["right_pleural_space"],
    REGION_IDS["left_pleural_space"],
)
"""Lung lobes and pleural spaces: an effusion or a collapsed lung still counts as lung here."""

_STRIDE = 2


@dataclass(frozen=True)
class AxisWindow:
    """The model's window along one axis of the resampled scan.

    Attributes:
        start: First index; negative where the window begins before the scan.
        size: Length; the window may reach beyond the scan's end.
        full_size: Length of the resampled scan.
    """

    start: int
    size: int
    full_size: int

    @property
    def content(self) -> tuple[int, int]:
        """Start and stop, counted in the window, of what lies inside the scan; the rest is padding."""
        return max(0, -self.start), min(self.size, self.full_size - self.start)


def lung_box(regions_DHW: NDArray[np.uint8]) -> tuple[tuple[int, int], ...] | None:
    """Start and stop along (D, H, W) of the box around lungs and pleural spaces; None without any."""
    table = np.zeros(256, bool)
    table[list(CHEST_CAVITY_IDS)] = True
    inside_DHW = table[regions_DHW[:, ::_STRIDE, ::_STRIDE]]
    box = []
    for axis, step in enumerate((1, _STRIDE, _STRIDE)):
        others = tuple(other for other in range(3) if other != axis)
        indices = np.flatnonzero(inside_DHW.any(axis=others))
        if indices.size == 0:
            return None
        size = regions_DHW.shape[axis]
        box.append((max(0, int(indices[0]) * step - step + 1), min(size, (int(indices[-1]) + 1) * step)))
    return tuple(box)


def choose_window(
    full_size: int,
    max_size: int,
    multiple: int,
    *,
    fixed: bool,
    core: tuple[float, float] | None = None,
    margin: float = 0.0,
) -> AxisWindow:
    """Choose the window along one axis.

    Without a core the whole axis is wanted, and the middle is kept where it is too long. With a core (the
    lungs) the core and its margin are wanted, and the core's middle is kept where they are too long. A window
    that must be longer than what is wanted takes in more of the scan, and is padded only where the scan ends.

    Args:
        full_size: Length of the resampled scan.
        max_size: Longest window; a multiple of ``multiple``.
        multiple: The window's length is one of its multiples.
        fixed: The window always has ``max_size``.
        core: Start and stop of the lungs, in resampled voxels.
        margin: Wanted on each side of the core, in resampled voxels.
    """
    start, stop = 0, full_size
    if core is not None:
        start = min(full_size - 1, max(0, int(np.floor(core[0] - margin))))
        stop = max(start + 1, min(full_size, int(np.ceil(core[1] + margin))))
    wanted = stop - start
    size = max_size if fixed else min(max_size, -(-wanted // multiple) * multiple)
    if size >= full_size:
        return AxisWindow(-((size - full_size) // 2), size, full_size)
    if core is not None and wanted > size:
        start = round((core[0] + core[1] - size) / 2)
    else:
        start += (wanted - size) // 2
    return AxisWindow(min(max(0, start), full_size - size), size, full_size)


def cut_core(window: AxisWindow, core: tuple[float, float]) -> float:
    """Length of the core, in resampled voxels, that the window leaves out."""
    return max(0.0, window.start - core[0]) + max(0.0, core[1] - (window.start + window.size))
