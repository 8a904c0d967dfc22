"""Where the model's grid lies in the scan: all that is needed to bring a prediction back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.preprocessing.orientation import canonical_affine
from vlm3d.volume import spacing_from_affine

Affine = tuple[tuple[float, ...], ...]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class ScanGeometry:
    """How a model grid was cut out of a scan.

    Along each canonical axis, model index ``m`` lies at canonical scan index ``step * m + offset``.

    Attributes:
        source_shape_DHW: The scan's shape, on its own axes.
        source_affine: The scan's affine, on its own axes.
        model_shape_DHW: The model grid's shape.
        step_DHW: Scan voxels a model voxel, along each canonical axis.
        offset_DHW: Canonical scan index of model index 0.
        content_DHW: Start and stop of the model indices that lie inside the scan; the rest is padding.
        notes: Lines that tell the user what the model does not see.
    """

    source_shape_DHW: Triple
    source_affine: Affine
    model_shape_DHW: Triple
    step_DHW: tuple[float, float, float]
    offset_DHW: tuple[float, float, float]
    content_DHW: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    notes: tuple[str, ...] = ()

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """Affine of the whole scan after turning it to canonical orientation."""
        return canonical_affine(np.array(self.source_affine), self.source_shape_DHW)[0]

    @property
    def canonical_shape_DHW(self) -> Triple:
        """Shape of the whole scan after turning it to canonical orientation."""
        return canonical_affine(np.array(self.source_affine), self.source_shape_DHW)[1]

    @property
    def model_affine(self) -> NDArray[np.float64]:
        """Affine of the model grid: ``(d, h, w, 1)`` to RAS+ mm."""
        to_scan = np.diag([*self.step_DHW, 1.0])
        to_scan[:3, 3] = self.offset_DHW
        affine: NDArray[np.float64] = self.canonical_affine @ to_scan
        return affine

    @property
    def model_spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the model grid along (D, H, W)."""
        return spacing_from_affine(self.model_affine)

    def scan_positions(self, axis: int) -> NDArray[np.float64]:
        """Canonical scan index of each model index that lies inside the scan."""
        first, last = self.content_DHW[axis]
        return self.step_DHW[axis] * np.arange(first, last, dtype=np.float64) + self.offset_DHW[axis]

    def seen(self, axis: int, start: float | None = None, stop: float | None = None) -> range:
        """Canonical scan indices whose centers lie within a stretch of model voxels.

        Args:
            axis: 0, 1 or 2.
            start: First model voxel; the first inside the scan if None.
            stop: One past the last; None as for ``start``.
        """
        first, last = self.content_DHW[axis]
        low = self.step_DHW[axis] * ((first if start is None else start) - 0.5) + self.offset_DHW[axis]
        high = self.step_DHW[axis] * ((last if stop is None else stop) - 0.5) + self.offset_DHW[axis]
        size = self.canonical_shape_DHW[axis]
        return range(max(0, int(np.ceil(low - 1e-6))), min(size, int(np.floor(high - 1e-6)) + 1))

    def model_positions(self, axis: int, indices: range) -> NDArray[np.float64]:
        """Model index at which canonical scan indices lie."""
        scan_index = np.arange(indices.start, indices.stop, dtype=np.float64)
        return (scan_index - self.offset_DHW[axis]) / self.step_DHW[axis]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, lists and text only, fit for JSON."""
        return {key: _listed(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScanGeometry:
        """The geometry that `to_dict` described."""
        return cls(**{key: _tupled(value) for key, value in values.items()})


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (tuple, list)) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, (tuple, list)) else value
