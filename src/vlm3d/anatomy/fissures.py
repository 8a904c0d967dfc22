"""Where the fissures run: the smooth surface through a lung that fewest vessels cross and along which a thin line shows.

Vessels branch within their lobe and thin out towards its surface, so that a fissure lies in a valley of brightness some
15 mm wide, which even thick slices show. In its middle runs the fissure itself, a sheet of pleura a millimeter thick: a
voxel of a few millimeters hardly shows it, but thousands of voxels along it do. Each surface of a family is scored by what
it runs through, in standard errors, and the best one is taken. A scan that shows none keeps those of most lungs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from vlm3d.anatomy.grid import Mask

Floats = NDArray[np.float32]

AERATED_HU = (-1000.0, -500.0)
"""All that is brighter counts as vessel: how bright it is tells nothing of a fissure."""
THIN_HU = 40.0
"""A voxel of the thin line counts for no more."""
BORDER_MM = 4.0
"""Next to the chest's wall and the mediastinum nothing is judged."""
SEEN_FROM = 5.0
"""Standard errors from which a surface is a fissure."""
STARTS = 3
"""Surfaces of the coarse search that are refined."""


@dataclass(frozen=True)
class Surface:
    """Height of a fissure over a lung's floor plan; all lengths are shares of the lung's own box.

    Attributes:
        front: Height at the front.
        back: Height at the back.
        bow: How far the middle lies above the straight line from front to back.
        tilt: How much higher the box's right edge lies than its left one.
        dome: How far the middle, from side to side, lies above both edges.
    """

    front: float
    back: float
    bow: float = 0.0
    tilt: float = 0.0
    dome: float = 0.0

    def height(self, depth: NDArray[np.floating], across: NDArray[np.floating]) -> NDArray[np.floating]:
        """Height of points: ``depth`` runs from 0 at the front to 1 at the back, ``across`` from 0 to 1 leftwards."""
        from_front_to_back = (
            self.front + (self.back - self.front) * depth + self.bow * 4 * depth * (1 - depth)
        )
        return (
            from_front_to_back + self.tilt * (0.5 - across) + self.dome * (4 * across * (1 - across) - 2 / 3)
        )


@dataclass(frozen=True)
class Fissures:
    """The fissures of one lung.

    Attributes:
        oblique: Between the lower lobe and the rest.
        horizontal: Between upper and middle lobe of a right lung.
    """

    oblique: Surface
    horizontal: Surface | None


USUAL = {
    "right": Fissures(Surface(0.02, 0.80), Surface(0.50, 0.50)),
    "left": Fissures(Surface(-0.02, 0.82), None),
}
"""By side, where none is seen."""


@dataclass(frozen=True)
class _Family:
    """The surfaces that are tried.

    Attributes:
        offsets: From the usual surface, by the name of what is moved; all combinations are tried.
        spread: How far surfaces lie from the usual one, as standard deviations.
    """

    offsets: dict[str, Sequence[float]]
    spread: Surface


_OBLIQUE = _Family(
    {
        "front": np.arange(-0.24, 0.29, 0.04).tolist(),
        "back": np.arange(-0.24, 0.21, 0.04).tolist(),
        "bow": [-0.1, 0.0, 0.1, 0.2],
    },
    Surface(0.12, 0.12, 0.1, 0.08, 0.05),
)
_HORIZONTAL = _Family(
    {
        "front": np.arange(-0.2, 0.21, 0.04).tolist(),
        "back": np.arange(-0.28, 0.29, 0.08).tolist(),
        "dome": [-0.1, 0.0, 0.1],
    },
    Surface(0.1, 0.12, 0.05, 0.1, 0.08),
)


def find_fissures(hu_DHW: Floats, lung_DHW: Mask, side: str, step_mm: float) -> Fissures:
    """Search a lung's fissures.

    Args:
        hu_DHW: HU on an isotropic grid, canonical.
        lung_DHW: One lung on it.
        side: ``"right"`` or ``"left"``.
        step_mm: Edge of a voxel.
    """
    usual = USUAL[side]
    box = ndimage.find_objects(lung_DHW.view(np.uint8))
    if not box:
        return usual
    emptiness = _Emptiness.of(hu_DHW[box[0]], lung_DHW[box[0]], step_mm)
    oblique = emptiness.best(usual.oblique, _OBLIQUE)
    if usual.horizontal is None:
        return Fissures(oblique, None)
    return Fissures(oblique, emptiness.best(usual.horizontal, _HORIZONTAL, above=oblique))


@dataclass(frozen=True)
class _Emptiness:
    """How much each voxel of a lung's box looks like a fissure, in standard deviations within the lung.

    Attributes:
        close_DHW: The narrow valley and the thin line in it.
        wide_DHW: The wide valley, which a surface beside a fissure feels, too.
        inside_DHW: Where it can be judged.
    """

    close_DHW: Floats
    wide_DHW: Floats
    inside_DHW: Mask

    @classmethod
    def of(cls, hu_DHW: Floats, lung_DHW: Mask, step_mm: float) -> _Emptiness:
        inside = ndimage.binary_erosion(lung_DHW, iterations=max(1, round(BORDER_MM / step_mm)))
        weight = lung_DHW.astype(np.float32)
        hu = np.clip(hu_DHW, *AERATED_HU) * weight

        def mean(sigma_mm: float) -> Floats:
            sigma = sigma_mm / step_mm
            share = ndimage.gaussian_filter(weight, sigma, truncate=2.5)
            found: Floats = ndimage.gaussian_filter(hu, sigma, truncate=2.5) / np.maximum(share, 1e-3)
            return found

        def scaled(value_DHW: Floats) -> Floats:
            own = value_DHW[inside] if inside.any() else np.zeros(1, np.float32)
            found: Floats = (value_DHW - own.mean()) / max(float(own.std()), 1e-6)
            return found

        thin = np.clip(mean(1.0) - mean(3.5), -THIN_HU, THIN_HU)
        close = scaled(scaled(mean(12.0) - mean(3.0)) + scaled(thin))
        return cls(close, scaled(mean(15.0) - mean(5.0)), inside)

    def best(self, usual: Surface, family: _Family, above: Surface | None = None) -> Surface:
        """The surface of a family that stands out most, or the usual one where none does.

        Args:
            usual: Surfaces near it are likelier.
            family: What is tried.
            above: Judge only what lies above this surface.
        """
        wide, close = self._scorer(self.wide_DHW, 2, above), self._scorer(self.close_DHW, 1, above)
        center, spread = np.array(astuple(usual)), np.array(astuple(family.spread))
        names = list(Surface.__dataclass_fields__)
        points = []
        for offsets in product(*family.offsets.values()):
            point = center.copy()
            point[[names.index(name) for name in family.offsets]] += offsets
            points.append(point)

        def loss(score: Callable[[Surface], float]) -> Callable[[NDArray[np.float64]], float]:
            return lambda point: (
                0.5 * float((((point - center) / spread) ** 2).sum()) - score(Surface(*point))
            )

        found: list[tuple[float, Surface]] = []
        for start in sorted(points, key=loss(wide))[:STARTS]:
            rough = _minimum(loss(wide), start, 0.04, 150)
            fine = _minimum(loss(close), rough, 0.02, 250)
            found.append((loss(close)(fine), Surface(*fine.tolist())))
        surface = min(found, key=lambda item: item[0])[1]
        return surface if close(surface) >= SEEN_FROM else usual

    def _scorer(self, value_DHW: Floats, stride: int, above: Surface | None) -> Callable[[Surface], float]:
        """Scores a surface by the values that it runs through in every so many columns, in standard errors."""
        depth, rows, columns = value_DHW.shape
        plan = np.meshgrid(np.arange(0, rows, stride), np.arange(0, columns, stride), indexing="ij")
        y_C, x_C = (axis.ravel() for axis in plan)
        behind_C, across_C = (y_C + 0.5) / rows, (x_C + 0.5) / columns
        floor_C = None if above is None else above.height(behind_C, across_C)

        def score(surface: Surface) -> float:
            share_C = surface.height(behind_C, across_C)
            z_C = share_C * depth - 0.5
            low_C = np.floor(z_C).astype(np.intp)
            seen_C = (low_C >= 0) & (low_C < depth - 1)
            if floor_C is not None:
                seen_C &= share_C > floor_C
            low, part, y, x = low_C[seen_C], (z_C - low_C)[seen_C], y_C[seen_C], x_C[seen_C]
            judged = self.inside_DHW[low, y, x] | self.inside_DHW[low + 1, y, x]
            if not judged.any():
                return 0.0
            low, part, y, x = low[judged], part[judged], y[judged], x[judged]
            value = (1 - part) * value_DHW[low, y, x] + part * value_DHW[low + 1, y, x]
            return float(value.sum() / np.sqrt(len(value))) * stride

        return score


def _minimum(
    loss: Callable[[NDArray[np.float64]], float], start: NDArray[np.float64], size: float, most: int
) -> NDArray[np.float64]:
    simplex = np.vstack([start, start + size * np.eye(len(start))])
    options = {"initial_simplex": simplex, "maxfev": most}
    found: NDArray[np.float64] = optimize.minimize(loss, start, method="Nelder-Mead", options=options).x
    return found
