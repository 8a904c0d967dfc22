"""From densities to a scan: couch, reconstruction kernel, noise, field of view, rounding to HU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from vlm3d.datasets.phantom.frame import Array, Canvas, coverage

Kernel = Literal["soft", "standard", "sharp"]
_BLUR_MM: dict[Kernel, float] = {"soft": 0.85, "standard": 0.6, "sharp": 0.4}
_SHARPEN: dict[Kernel, float] = {"soft": 0.0, "standard": 0.15, "sharp": 0.75}
_NOISE_GRAIN_MM: dict[Kernel, float] = {"soft": 1.0, "standard": 0.7, "sharp": 0.35}


@dataclass(frozen=True)
class Scanner:
    """How the scan is taken.

    Attributes:
        kernel: Reconstruction kernel.
        noise_hu: Standard deviation of the noise in water for the standard kernel at 1 mm slices.
        field_of_view_mm: Diameter of what is reconstructed.
        circular: Everything outside the circle of that diameter is padding.
        offset_mm: How far the patient lies off the middle, (y, x).
        table_gap_mm: Distance of the couch from the skin.
    """

    kernel: Kernel
    noise_hu: float
    field_of_view_mm: float
    circular: bool
    offset_mm: tuple[float, float]
    table_gap_mm: float


def sample_scanner(rng: np.random.Generator, body_width_mm: float) -> Scanner:
    """Draw a scanner protocol that covers a body of a given width."""
    kernels: tuple[Kernel, ...] = ("soft", "standard", "sharp")
    kernel = kernels[int(rng.choice(3, p=[0.4, 0.35, 0.25]))]
    wide = rng.random() < 0.75
    field = body_width_mm * (rng.uniform(1.0, 1.12) if wide else rng.uniform(0.88, 0.98))
    offset = rng.normal(0, 5, 2)
    return Scanner(
        kernel=kernel,
        noise_hu=float(np.clip(rng.gamma(4.0, 4.5), 6, 45)),
        field_of_view_mm=float(np.clip(field, 300, 500)),
        circular=bool(rng.random() < 0.3),
        offset_mm=(float(offset[0]), float(offset[1])),
        table_gap_mm=float(rng.uniform(2, 14)),
    )


def paint_table(canvas: Canvas, scanner: Scanner, back_mm: float) -> None:
    """Paint the couch: a thin shell around light foam, curved like a shallow trough, in the air below the patient."""
    frame = canvas.frame
    x = frame.x_W[None, :]
    top = back_mm + scanner.table_gap_mm - (x / 95.0) ** 2 * 6.0
    below = frame.y_H[:, None] - top
    slab = np.maximum(np.maximum(-below, below - 32.0), np.abs(x) - 215.0).astype(np.float32)
    edge = frame.edge_mm
    shell = coverage(np.abs(slab + 1.5) - 1.0, edge) * 0.9
    foam = coverage(slab + 2.5, edge)
    flat = np.float32(-1000) + foam * 90.0
    flat += shell * (-150.0 - flat)
    air = canvas.regions_DHW == 0
    touched = (foam + shell) > 0
    rows = np.flatnonzero(touched.any(axis=1))
    if len(rows):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        view = canvas.hu_DHW[:, part]
        np.copyto(view, np.maximum(view, flat[part]), where=air[:, part] & touched[part])


def scan(canvas: Canvas, scanner: Scanner, rng: np.random.Generator) -> NDArray[np.int16]:
    """Turn painted densities into what a scanner would give, in HU from -1024 to 3071.

    The blur is that of the detector; the sharper kernels add back what a wider blur takes away, and leave more
    and finer noise. Noise grows in wide bodies and shrinks with thick slices.
    """
    step = canvas.frame.step_mm
    hu = _blur(canvas.hu_DHW, _BLUR_MM[scanner.kernel], step)
    if _SHARPEN[scanner.kernel]:
        hu += np.float32(_SHARPEN[scanner.kernel]) * (hu - _blur(hu, 1.1, step))
    hu += _noise(canvas, scanner, rng)
    if scanner.circular:
        y, x = canvas.frame.y_H, canvas.frame.x_W
        radius2 = ((y - (y[0] + y[-1]) / 2) ** 2)[:, None] + ((x - (x[0] + x[-1]) / 2) ** 2)[None]
        hu[:, radius2 > (scanner.field_of_view_mm / 2) ** 2] = -1024.0
    np.clip(hu, -1024, 3071, out=hu)
    return np.rint(hu, out=hu).astype(np.int16)


def _blur(hu_DHW: Array, sigma_mm: float, step_mm: NDArray[np.float64]) -> Array:
    for axis in (1, 2):
        sigma = sigma_mm / step_mm[axis]
        if sigma > 0.15:
            hu_DHW = gaussian_filter1d(hu_DHW, sigma, axis=axis, truncate=2.5, mode="nearest")
    return hu_DHW.copy() if not hu_DHW.flags.owndata else hu_DHW


def _noise(canvas: Canvas, scanner: Scanner, rng: np.random.Generator) -> Array:
    step = canvas.frame.step_mm
    white = rng.standard_normal(canvas.frame.shape_DHW, dtype=np.float32)
    grain = _NOISE_GRAIN_MM[scanner.kernel]
    colored = _blur(white, grain, step)
    if scanner.kernel == "sharp":
        colored = colored - 0.6 * _blur(colored, 1.6, step)
    colored /= max(float(colored[:: max(len(colored) // 4, 1)].std()), 1e-6)
    level = (
        scanner.noise_hu
        / np.sqrt(max(step[0], 0.6))
        * {"soft": 0.6, "standard": 1.0, "sharp": 1.8}[scanner.kernel]
    )
    # photons are scarcest where the body is widest: shoulders and belly
    solid = (canvas.hu_DHW[:, ::4, ::4] > -300).mean(axis=(1, 2))
    across = np.clip(0.6 + 1.1 * solid / max(float(np.median(solid)), 1e-3), 0.7, 2.4) / 1.7
    colored *= (level * across)[:, None, None].astype(np.float32)
    return colored
