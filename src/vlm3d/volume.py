"""A scan in memory: voxels with the affine that says where in the patient they lie.

Arrays are (D, H, W). The affine maps an array index (d, h, w, 1) to RAS+ millimeters, as NIfTI counts them: +x to the
patient's right, +y anterior, +z superior. Its columns stand in the array's own axis order, so transposing the array and
permuting the affine's columns are one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

CANONICAL_AXES = ("S", "P", "L")
"""Where the array's axes point in canonical orientation: D to superior, H to posterior, W to the patient's left.

An axial slice then prints as radiologists look at it: the table below, the patient's right on the left.
"""


def spacing_from_affine(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Length in mm of one step along each array axis."""
    d, h, w = np.linalg.norm(affine[:3, :3], axis=0)
    return float(d), float(h), float(w)


@dataclass(frozen=True)
class Volume:
    """A CT scan, immutable.

    Attributes:
        voxels_DHW: int16 or float32, in HU once `vlm3d.io` has read it. Not writeable.
        affine: (4, 4) float64; ``affine @ (d, h, w, 1)`` is the voxel's center in RAS+ mm.
        source: What a person calls it: the file's or folder's name, nothing out of its header.
        notes: Lines about what reading had to do (slope applied, duplicate slices dropped …), shown to the user.
        acquisition: Scanner facts without patient data, such as ``{"modality": "CT", "kernel": "B30f"}``.
    """

    voxels_DHW: NDArray[Any]
    affine: NDArray[np.float64]
    source: str = "volume"
    notes: tuple[str, ...] = ()
    acquisition: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.voxels_DHW.ndim != 3:
            raise ValueError(f"a Volume is 3D, got shape {self.voxels_DHW.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine is 4x4, got shape {self.affine.shape}")
        affine = np.array(self.affine, dtype=np.float64)
        affine.setflags(write=False)
        voxels = self.voxels_DHW.view()
        voxels.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "voxels_DHW", voxels)

    @property
    def shape_DHW(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        d, h, w = self.voxels_DHW.shape
        return d, h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along (D, H, W)."""
        return spacing_from_affine(self.affine)

    def with_voxels(self, voxels_DHW: NDArray[Any], affine: NDArray[np.float64] | None = None) -> Volume:
        """The same scan with other voxels, and another affine where the grid changed."""
        return replace(self, voxels_DHW=voxels_DHW, affine=self.affine if affine is None else affine)

    def with_notes(self, *notes: str) -> Volume:
        """The same scan with lines added to what the user is told."""
        return replace(self, notes=self.notes + notes)


@dataclass(frozen=True)
class RegionMap:
    """Anatomical regions on a scan's grid; ids as in `vlm3d.anatomy.regions`, 0 is background.

    Attributes:
        labels_DHW: uint8 region ids. Not writeable.
        affine: As in `Volume`.
        method: Where it comes from: ``"classical"``, ``"totalsegmentator"``, ``"file"``, ``"phantom"``.
    """

    labels_DHW: NDArray[np.uint8]
    affine: NDArray[np.float64]
    method: str = "file"

    def __post_init__(self) -> None:
        if self.labels_DHW.ndim != 3 or self.labels_DHW.dtype != np.uint8:
            raise ValueError(f"a RegionMap is 3D uint8, got {self.labels_DHW.shape} {self.labels_DHW.dtype}")
        affine = np.array(self.affine, dtype=np.float64)
        affine.setflags(write=False)
        labels = self.labels_DHW.view()
        labels.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "labels_DHW", labels)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along (D, H, W)."""
        return spacing_from_affine(self.affine)
