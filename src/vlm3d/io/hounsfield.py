"""From stored numbers to Hounsfield units, and whether the result can be a chest CT at all.

Air is -1000 HU, water 0, soft tissue -150..250, bone above. Nothing real lies far below -1000: what does is
the scanner's padding outside its round field of view (-2048, -3024 …), or a rescale applied twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vlm3d.errors import NotAChestCTError
from vlm3d.io.geometry import axial_axis
from vlm3d.volume import Volume

AIR_HU = -1000
PADDING_HU = -1024
"""What padding outside the field of view becomes; also the lower end of a CT's usual range."""

INT16 = np.iinfo(np.int16)
SOFT_TISSUE_HU = (-150, 250)
AIR_BELOW_HU = -700
LUNG_BELOW_HU = -400

_SAMPLE_VOXELS = 400_000
_PLATEAU_SHARE = 0.005
_BELOW_NOISE_HU = -1400  # sharp kernels at low dose scatter air by up to 150 HU
_MIN_SHARE = 0.01
_MIN_RANGE_HU = 300
_LUNG_GRID_MM = 5.0
_MIN_LUNG_ML = 300.0


@np.errstate(over="ignore", invalid="ignore")  # what becomes infinite, `checked_hounsfield` refuses
def rescaled(stored_DHW: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> NDArray[Any]:
    """Apply slope and intercept; int16 where every value is a whole number that fits, else float32.

    Works slice by slice, so that the peak is the input and the output and one slice.
    """
    integer_in = stored_DHW.dtype.kind in "iub"
    whole = float(slope).is_integer() and float(intercept).is_integer()
    if stored_DHW.dtype == np.int16 and slope == 1 and intercept == 0:
        return stored_DHW
    if integer_in and whole:
        low, high = sorted(int(v) * int(slope) + int(intercept) for v in (stored_DHW.min(), stored_DHW.max()))
        fits = INT16.min <= low and high <= INT16.max
    else:
        fits = all(
            bool((np.abs(values) <= INT16.max).all() and (values == np.rint(values)).all())
            for values in _scaled_slices(stored_DHW, slope, intercept)
        )
    result = np.empty(stored_DHW.shape, np.int16 if fits else np.float32)
    for target, values in zip(result, _scaled_slices(stored_DHW, slope, intercept), strict=True):
        target[...] = values
    return result


def _scaled_slices(
    stored_DHW: NDArray[Any], slope: float, intercept: float
) -> Iterator[NDArray[np.float32] | NDArray[np.float64]]:
    # float32 holds every int16 and uint16 exactly; wider integers need float64
    kind = np.float32 if stored_DHW.dtype.itemsize <= 2 or stored_DHW.dtype == np.float32 else np.float64
    for plane in stored_DHW:
        values = plane.astype(kind)
        if slope != 1:
            values *= kind(slope)
        if intercept != 0:
            values += kind(intercept)
        yield values


def checked_hounsfield(scan: Volume) -> Volume:
    """Refuse what cannot be a CT in HU, set padding to -1024, and note what looks unlike a chest.

    Returns:
        The scan with voxels of at least -1024 HU and the notes that the user should see.

    Raises:
        NotAChestCTError: NaN or infinity, one constant value, scaled or windowed values, raw values without
            or with a twofold rescale, no air, or no soft tissue.
    """
    voxels = scan.voxels_DHW
    _refuse_non_finite(scan.source, voxels)
    low, high = float(voxels.min()), float(voxels.max())
    _refuse_foreign_range(scan.source, low, high)
    sample = _sample(voxels)
    padding = _padding_values(sample)
    measured = sample[~np.isin(sample, padding)] if padding.size else sample
    _refuse_twofold_rescale(scan.source, measured)
    notes: list[str] = []
    if low < PADDING_HU:
        voxels = np.maximum(voxels, voxels.dtype.type(PADDING_HU))
        if padding.size:
            values = ", ".join(f"{value:.0f}" for value in padding[:3])
            notes.append(f"padding outside the field of view ({values}) set to {PADDING_HU} HU")
    _refuse_without_contrast(scan.source, sample, measured)
    lung_ml = enclosed_air_ml(voxels, scan.affine)
    if lung_ml < _MIN_LUNG_ML:
        notes.append(
            f"only {lung_ml:.0f} ml of air lie inside the body: this may not be a scan of a chest; "
            "the results then mean nothing"
        )
    return scan.with_voxels(voxels).with_notes(*notes)


def enclosed_air_ml(voxels_DHW: NDArray[Any], affine: NDArray[np.float64]) -> float:
    """Volume of air that the body encloses in the axial plane: lungs, airways, bowel gas.

    Measured on a coarse grid of about 5 mm; a check on what is in the picture, not a measurement of lungs.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    steps = [max(1, round(_LUNG_GRID_MM / s)) for s in spacing]
    coarse = voxels_DHW[:: steps[0], :: steps[1], :: steps[2]]
    planes = np.moveaxis(coarse, axial_axis(affine), 0) < LUNG_BELOW_HU
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    components, _ = ndimage.label(padded, structure=in_plane)
    outside = np.unique(components[:, 0, :])
    enclosed = padded & ~np.isin(components, outside)
    return float(enclosed.sum() * np.prod(spacing) * np.prod(steps) / 1000)


def _sample(voxels_DHW: NDArray[Any]) -> NDArray[Any]:
    """Every n-th voxel along each axis, at most about 400,000."""
    step = max(1, int(np.ceil((voxels_DHW.size / _SAMPLE_VOXELS) ** (1 / 3))))
    return voxels_DHW[
        tuple(slice(None, None, step if size >= 4 * step else 1) for size in voxels_DHW.shape)
    ].ravel()


def _padding_values(sample: NDArray[Any]) -> NDArray[Any]:
    """Values below -1024 that so many voxels share that no measurement made them."""
    values, counts = np.unique(sample[sample < PADDING_HU], return_counts=True)
    return values[counts > _PLATEAU_SHARE * sample.size]


def _refuse_non_finite(name: str, voxels: NDArray[Any]) -> None:
    if voxels.dtype.kind != "f":
        return
    bad = sum(int(plane.size - np.isfinite(plane).sum()) for plane in voxels)
    if bad:
        raise NotAChestCTError(
            f"{name} holds {bad} voxels that are NaN or infinite; HU are finite. Export the scan again."
        )


def _refuse_foreign_range(name: str, low: float, high: float) -> None:
    found = f"values run from {low:.4g} to {high:.4g}"
    if low == high:
        raise NotAChestCTError(f"{name} is constant ({low:.4g} everywhere): there is no image in it.")
    if low >= -1.05 and high <= 1.05:
        scaled = "0..1" if low >= 0 else "-1..1"
        raise NotAChestCTError(
            f"{name} is already scaled to {scaled} ({found}); vlm3d needs HU. Give the scan as it was before."
        )
    if low >= 0 and high <= 255:
        raise NotAChestCTError(
            f"{name} is already windowed to 0..255 ({found}); vlm3d needs HU. Give the scan as it was before."
        )
    if high - low < _MIN_RANGE_HU:
        raise NotAChestCTError(
            f"{name} is not in HU: {found}, and air to bone spans over a thousand. Was it normalized?"
        )


def _refuse_twofold_rescale(name: str, measured: NDArray[Any]) -> None:
    """Air near -2024 instead of -1000: the intercept was added to values that were HU already."""
    if not measured.size:
        return
    impossible = measured[measured < _BELOW_NOISE_HU]
    if impossible.size > 0.05 * measured.size:
        raise NotAChestCTError(
            f"{name} has {impossible.size / measured.size:.0%} of its voxels at about "
            f"{np.median(impossible):.0f}, "
            "below air (-1000 HU): rescale slope and intercept look applied twice. Apply them once."
        )


def _refuse_without_contrast(name: str, sample: NDArray[Any], measured: NDArray[Any]) -> None:
    air = float((sample < AIR_BELOW_HU).mean())
    tissue = float(((measured > SOFT_TISSUE_HU[0]) & (measured < SOFT_TISSUE_HU[1])).mean())
    low, high = float(sample.min()), float(sample.max())
    if air < _MIN_SHARE:
        advice = (
            "Are these raw values, rescale slope and intercept not yet applied?"
            if low >= 0 and high > 1000
            else "Is it another modality, or a narrow window?"
        )
        raise NotAChestCTError(
            f"{name} shows no air (values run from {low:.4g} to {high:.4g}, air is {AIR_HU} HU): no chest "
            "CT in HU. " + advice
        )
    if tissue < _MIN_SHARE:
        raise NotAChestCTError(
            f"{name} shows no soft tissue ({tissue:.1%} of voxels in "
            f"{SOFT_TISSUE_HU[0]}..{SOFT_TISSUE_HU[1]} HU): "
            "no CT of a body in HU. Check its rescale slope and intercept."
        )
