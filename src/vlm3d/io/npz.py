"""MedSAM2-style NPZ cases: windowed uint8 images with object ids and voxel size."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io.geometry import LPS_TO_RAS, normalize_affine
from vlm3d.io.hounsfield import rescaled
from vlm3d.io.limits import MAX_VOXELS
from vlm3d.io.wording import reason, shape_words, shown
from vlm3d.volume import Volume

_ARRAYS = ("imgs", "gts", "spacing", "window")


@dataclass(frozen=True)
class NpzCase:
    """One MedSAM2-style case.

    Attributes:
        imgs_DHW: uint8 gray values of a CT window.
        gts_DHW: uint8 object ids, 0 is background; None where the case has no truth.
        spacing_mm: Voxel size along (D, H, W).
        window_hu: HU that gray values 0 and 255 stand for, where the file says so.
    """

    imgs_DHW: NDArray[np.uint8]
    gts_DHW: NDArray[np.uint8] | None
    spacing_mm: tuple[float, float, float]
    window_hu: tuple[float, float] | None

    @property
    def affine(self) -> NDArray[np.float64]:
        """Index (d, h, w, 1) to RAS+ mm; the format has no orientation, so (S, P, L) is assumed."""
        d, h, w = self.spacing_mm
        affine = LPS_TO_RAS @ np.array([[0, 0, w, 0], [0, h, 0, 0], [d, 0, 0, 0], [0, 0, 0, 1.0]])
        return np.asarray(affine)


def read_npz_case(path: str | Path) -> NpzCase:
    """Read a MedSAM2-style case: ``imgs`` and ``gts`` uint8 (D, H, W), ``spacing`` (z, y, x) in mm.

    Raises:
        UnreadableFileError: Damaged, an array missing, or of another type or size than the format says.
    """
    path = Path(path)
    name = shown(path)
    try:
        arrays = _load_checked(path, name)
    except UnreadableFileError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on hostile bytes
        raise UnreadableFileError(f"{name} is damaged or no NPZ case: {reason(error)}.") from error
    for key in ("imgs", "spacing"):
        if key not in arrays:
            raise UnreadableFileError(
                f"{name} has no array '{key}'; a case holds imgs, gts and spacing (z, y, x)."
            )
    imgs, gts = arrays["imgs"], arrays.get("gts")
    if imgs.dtype != np.uint8:
        raise UnreadableFileError(f"{name} has imgs of type {imgs.dtype}; the format says uint8.")
    if imgs.ndim != 3 or not imgs.size:
        raise NotAChestCTError(
            f"{name} has imgs of shape ({shape_words(imgs.shape)}); vlm3d needs (D, H, W)."
        )
    if gts is not None and gts.dtype != np.uint8:
        raise UnreadableFileError(f"{name} has gts of type {gts.dtype}; the format says uint8 object ids.")
    if gts is not None and gts.shape != imgs.shape:
        raise UnreadableFileError(
            f"{name} has gts of {shape_words(gts.shape)} on imgs of {shape_words(imgs.shape)}; they must "
            "agree."
        )
    spacing = _numbers(arrays["spacing"], 3, "spacing", name)
    if min(spacing) <= 0:
        raise UnreadableFileError(f"{name} has a spacing of {spacing} mm; it must be positive.")
    window = _numbers(arrays["window"], 2, "window", name) if "window" in arrays else None
    return NpzCase(
        imgs_DHW=imgs,
        gts_DHW=gts,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        window_hu=None if window is None else (window[0], window[1]),
    )


def read_npz(path: Path, window_hu: tuple[float, float] | None = None) -> Volume:
    """Read a case as a scan, its gray values mapped back to the HU of their window.

    Args:
        path: The case.
        window_hu: HU that gray values 0 and 255 stand for, where the file has no array ``window``.

    Raises:
        NotAChestCTError: Neither the file nor the caller says which window the gray values come from.
    """
    name = shown(path)
    case = read_npz_case(path)
    window = window_hu or case.window_hu
    if window is None:
        raise NotAChestCTError(
            f"{name} holds windowed gray values (uint8), not HU, and no array 'window': add one with the two HU that 0 "
            "and 255 stand for (in Python, read_volume(..., npz_window=...))."
        )
    low, high = window
    if not high > low:
        raise NotAChestCTError(
            f"{name} has a window of {low:g} to {high:g} HU; the upper end must be larger."
        )
    affine = normalize_affine(case.affine, case.imgs_DHW.shape, name)
    notes = (
        f"gray values 0..255 taken as {low:g}..{high:g} HU; what lay outside is lost",
        "the file has no orientation: axes taken as Superior, Posterior, Left",
    )
    return Volume(rescaled(case.imgs_DHW, (high - low) / 255, low), affine, source=shown(path), notes=notes)


def _load_checked(path: Path, name: str) -> dict[str, NDArray[Any]]:
    """The arrays by name; each header is read and bounded before its voxels are."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for key in _ARRAYS:
            if f"{key}.npy" not in archive.namelist():
                continue
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as stream:
                shape, dtype = _npy_header(stream)
                if dtype.hasobject:
                    raise UnreadableFileError(
                        f"{name} holds Python objects in '{key}', which may run code: refused."
                    )
                count = 1
                for size in shape:
                    count *= size
                if count > MAX_VOXELS:
                    raise UnreadableFileError(
                        f"{name} states an absurd {key} of {shape_words(shape)}; at most {MAX_VOXELS} "
                        "voxels are read."
                    )
                if entry.file_size - stream.tell() != count * dtype.itemsize:
                    raise UnreadableFileError(
                        f"{name} has a damaged array '{key}': its header and its size differ."
                    )
            with archive.open(entry) as stream:
                arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"npy version {version}")
    return shape, dtype


def _numbers(array: NDArray[Any], count: int, key: str, name: str) -> tuple[float, ...]:
    if array.size != count or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise UnreadableFileError(f"{name} has a damaged array '{key}': it must hold {count} finite numbers.")
    return tuple(float(value) for value in array.ravel())
