"""From densities to a scan: couch, reconstruction kernel, noise, field of view, rounding to HU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from vlm3d.datasets.phantom.frame import Array, Canvas, coverage
from vlm3d.datasets.phantom.motion import add_streaks, move_diaphragm, move_heart

Kernel = Literal["soft", "standard", "sharp", "very soft", "very sharp"]


@dataclass(frozen=True)
class KernelShape:
    """What a reconstruction kernel does.

    Attributes:
        blur_mm: Standard deviation of its blur in the plane.
        sharpen: How much of what a blur of 1.1 mm takes away is added back.
        grain_mm: Standard deviation of the blur of its noise.
        noise: Its noise against the standard kernel's.
    """

    blur_mm: float
    sharpen: float
    grain_mm: float
    noise: float


KERNELS: dict[Kernel, KernelShape] = {
    "soft": KernelShape(0.85, 0.0, 1.0, 0.6),
    "standard": KernelShape(0.6, 0.15, 0.7, 1.0),
    "sharp": KernelShape(0.4, 0.75, 0.35, 1.8),
    "very soft": KernelShape(1.2, 0.0, 1.35, 0.5),
    "very sharp": KernelShape(0.3, 1.0, 0.3, 1.9),
}


@dataclass(frozen=True)
class Protocol:
    """The ranges from which a scanner is drawn.

    Attributes:
        kernels: Each with its probability.
        noise_hu: Lowest and highest standard deviation of the noise, see `Scanner`.
        noise_scale_hu: Scale of the gamma distribution (shape 4) that draws it.
        tilt_deg: Largest angle of the patient about each axis.
        motion_share: Share of scans in which the heart moves, and in which breath does.
        heart_mm: Least and largest shift of the heart's second contour.
        breath_mm: The same for the diaphragm's.
        slice_blur: Least and largest blur along z, as a standard deviation in slices.
    """

    kernels: dict[Kernel, float]
    noise_hu: tuple[float, float]
    noise_scale_hu: float
    tilt_deg: float
    motion_share: float
    heart_mm: tuple[float, float]
    breath_mm: tuple[float, float]
    slice_blur: tuple[float, float]


DEFAULT_PROTOCOL = Protocol(
    kernels={"soft": 0.4, "standard": 0.35, "sharp": 0.25},
    noise_hu=(6.0, 45.0),
    noise_scale_hu=4.5,
    tilt_deg=4.0,
    motion_share=0.3,
    heart_mm=(1.5, 4.0),
    breath_mm=(2.0, 6.0),
    slice_blur=(0.0, 0.4),
)
SHIFTED_PROTOCOL = Protocol(
    kernels={"very soft": 0.5, "very sharp": 0.5},
    noise_hu=(46.0, 60.0),
    noise_scale_hu=13.5,
    tilt_deg=6.0,
    motion_share=0.8,
    heart_mm=(4.0, 6.0),
    breath_mm=(6.0, 9.0),
    slice_blur=(0.4, 0.55),
)
"""Harder than anything that the default protocol draws: other kernels, more noise, tilt and motion, thicker slices."""


def protocol_of(name: str | None) -> Protocol:
    """The protocol of a name; None is the default one.

    Raises:
        ValueError: There is no such protocol.
    """
    if name is None:
        return DEFAULT_PROTOCOL
    if name == "shifted":
        return SHIFTED_PROTOCOL
    raise ValueError(f"protocol is None or 'shifted', got '{name}'")


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
        slice_blur: Blur along z, as a standard deviation in slices.
        heart_shift_mm: Shift (y, x) of the heart's second contour; None where it stands still.
        breath_mm: Shift along z of the diaphragm's second contour, 0 where the breath is held.
        streak_hu: Strength of the rays beside metal.
    """

    kernel: Kernel
    noise_hu: float
    field_of_view_mm: float
    circular: bool
    offset_mm: tuple[float, float]
    table_gap_mm: float
    slice_blur: float = 0.0
    heart_shift_mm: tuple[float, float] | None = None
    breath_mm: float = 0.0
    streak_hu: float = 0.0


def sample_scanner(
    rng: np.random.Generator, body_width_mm: float, protocol: Protocol = DEFAULT_PROTOCOL
) -> Scanner:
    """Draw a scanner that covers a body of a given width."""
    kernels = list(protocol.kernels)
    kernel = kernels[int(rng.choice(len(kernels), p=list(protocol.kernels.values())))]
    wide = rng.random() < 0.75
    field = body_width_mm * (rng.uniform(1.0, 1.12) if wide else rng.uniform(0.88, 0.98))
    offset = rng.normal(0, 5, 2)
    moves, breathes = rng.random(2) < protocol.motion_share
    direction, heart_mm = rng.uniform(0, 2 * np.pi), rng.uniform(*protocol.heart_mm)
    breath_mm = rng.uniform(*protocol.breath_mm) * rng.choice([-1.0, 1.0])
    return Scanner(
        kernel=kernel,
        noise_hu=float(np.clip(rng.gamma(4.0, protocol.noise_scale_hu), *protocol.noise_hu)),
        field_of_view_mm=float(np.clip(field, 300, 500)),
        circular=bool(rng.random() < 0.3),
        offset_mm=(float(offset[0]), float(offset[1])),
        table_gap_mm=float(rng.uniform(2, 14)),
        slice_blur=float(rng.uniform(*protocol.slice_blur)),
        heart_shift_mm=(float(heart_mm * np.sin(direction)), float(heart_mm * np.cos(direction)))
        if moves
        else None,
        breath_mm=float(breath_mm) if breathes else 0.0,
        streak_hu=float(rng.uniform(20.0, 110.0)),
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
    step, kernel = canvas.frame.step_mm, KERNELS[scanner.kernel]
    if scanner.heart_shift_mm is not None:
        move_heart(canvas, scanner.heart_shift_mm)
    if scanner.breath_mm:
        move_diaphragm(canvas, scanner.breath_mm)
    streak_rng = np.random.default_rng(rng.integers(2**63))
    if scanner.streak_hu:
        add_streaks(canvas, scanner.streak_hu, streak_rng)
    hu = _blur(canvas.hu_DHW, kernel.blur_mm, step)
    if scanner.slice_blur > 0.15:
        hu = gaussian_filter1d(hu, scanner.slice_blur, axis=0, truncate=2.0, mode="nearest")
    if kernel.sharpen:
        hu += np.float32(kernel.sharpen) * (hu - _blur(hu, 1.1, step))
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
    kernel = KERNELS[scanner.kernel]
    colored = _blur(white, kernel.grain_mm, step)
    if kernel.sharpen > 0.5:
        colored = colored - 0.6 * _blur(colored, 1.6, step)
    colored /= max(float(colored[:: max(len(colored) // 4, 1)].std()), 1e-6)
    level = scanner.noise_hu / np.sqrt(max(step[0], 0.6)) * kernel.noise
    # photons are scarcest where the body is widest: shoulders and belly
    solid = (canvas.hu_DHW[:, ::4, ::4] > -300).mean(axis=(1, 2))
    across = np.clip(0.6 + 1.1 * solid / max(float(np.median(solid)), 1e-3), 0.7, 2.4) / 1.7
    colored *= (level * across)[:, None, None].astype(np.float32)
    return colored
