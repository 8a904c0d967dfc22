"""The one place that makes affines exact, so that one grid read from two formats is the same to the last bit.

NIfTI stores affines as float32, DICOM as decimal text, MetaImage as whatever was printed. Three steps:

1. every number goes through float32, the coarsest of the formats;
2. direction cosines within 1e-4 of an axis become that axis exactly;
3. voxel sizes are rounded to 2^-17 mm (below 1e-5 mm) and the corner that the canonical array starts at to
   2^-10 mm (below 1e-3 mm). Powers of two, because flips and permutations of such an affine then lose nothing
   in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import UnreadableFileError
from vlm3d.io.limits import FARTHEST_MM
from vlm3d.volume import CANONICAL_AXES

SPACING_QUANTUM_MM = 2.0**-17
ORIGIN_QUANTUM_MM = 2.0**-10
SNAP_TOLERANCE = 1e-4
SKEW_TOLERANCE = 1e-3

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM, MetaImage and NRRD count to Left, Posterior, Superior; `Volume` to Right, Anterior, Superior."""

_CANONICAL_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def normalize_affine(
    affine: NDArray[np.float64], shape_DHW: tuple[int, int, int], name: str
) -> NDArray[np.float64]:
    """Make an affine exact and refuse one that is no grid of boxes.

    Args:
        affine: Index (d, h, w, 1) to RAS+ mm.
        shape_DHW: The grid's size, which fixes where its corners lie.
        name: The file, as shown to the user.

    Raises:
        UnreadableFileError: Not finite, singular, sheared or absurdly far from the scanner.
    """
    with np.errstate(over="ignore"):
        affine = np.asarray(affine, dtype=np.float32).astype(np.float64)
    if not np.isfinite(affine).all() or np.abs(affine).max() > FARTHEST_MM:
        raise UnreadableFileError(
            f"{name} has an affine with impossible numbers in its header. Export it again."
        )
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 2 * SPACING_QUANTUM_MM:
        raise UnreadableFileError(
            f"{name} has a singular affine (voxel size {spacing.min():.3g} mm along one axis). Export it "
            "again."
        )
    directions = affine[:3, :3] / spacing
    skew = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if skew > SKEW_TOLERANCE:
        raise UnreadableFileError(
            f"{name} has a sheared affine (axes off the right angle by "
            f"{np.degrees(np.arcsin(min(skew, 1))):.1f} "
            "degrees). Resample it to a rectangular grid."
        )
    snapped = np.round(directions)
    if np.abs(directions - snapped).max() <= SNAP_TOLERANCE:
        directions = snapped + 0.0  # no negative zeros
    origin_shift_steps = np.where(_runs_against_canonical(directions), np.array(shape_DHW) - 1, 0)
    corner = affine[:3, 3] + directions @ (origin_shift_steps * spacing)
    corner = np.round(corner / ORIGIN_QUANTUM_MM) * ORIGIN_QUANTUM_MM
    spacing = np.round(spacing / SPACING_QUANTUM_MM) * SPACING_QUANTUM_MM
    exact = np.eye(4)
    exact[:3, :3] = directions * spacing
    exact[:3, 3] = corner - directions @ (origin_shift_steps * spacing)
    return exact + 0.0


def axial_axis(affine: NDArray[np.float64]) -> int:
    """The array axis that runs closest to the patient's long axis."""
    return int(np.argmax(np.abs(affine[2, :3]) / np.linalg.norm(affine[:3, :3], axis=0)))


def _runs_against_canonical(directions: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For each array axis, whether it runs opposite to the canonical direction of its nearest world axis."""
    wanted = dict(_CANONICAL_DIRECTIONS[code] for code in CANONICAL_AXES)
    nearest = np.argmax(np.abs(directions), axis=0)
    signs = np.sign(directions[nearest, np.arange(3)])
    return np.array([sign != wanted[int(world)] for world, sign in zip(nearest, signs, strict=True)])
