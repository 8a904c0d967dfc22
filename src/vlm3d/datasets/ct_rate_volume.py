"""Read one CT-RATE volume in HU on its true grid, whichever release its file is of.

| | first release | second release |
|---|---|---|
| values | stored: HU = slope x value + intercept, from the metadata table | HU |
| header | blank: 1 mm, axes to Right, Anterior, Superior | true |

A file's values and header tell, each on its own: HU show air near -1000 and soft tissue near 0 as they are, stored
values only after slope and intercept. Where both would do, a blank header says that it is the first release. Applying
slope and intercept to HU again puts air near -2000, which no scan has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.datasets.ct_rate_tables import Acquisition
from vlm3d.errors import DataError, NotAChestCTError, UnreadableFileError
from vlm3d.io.detection import Format, detect_format
from vlm3d.io.geometry import LPS_TO_RAS, normalize_affine
from vlm3d.io.hounsfield import checked_hounsfield, rescaled
from vlm3d.io.limits import check_scan_size
from vlm3d.io.nifti import read_nifti
from vlm3d.volume import Volume

Release = Literal["v1", "v2"]
RELEASES: tuple[Release, ...] = ("v1", "v2")

AIR_HU = (-1200.0, -700.0)
TISSUE_HU = (-200.0, 300.0)
_AIR = -1000.0
_LEAST_SHARE = 0.01
_CLEAR_MARGIN = 4.0
_SAMPLE_VOXELS = 200_000
_BLANK_TOLERANCE = 1e-3
_ORIGIN_TOLERANCE_MM = 0.01  # making spacing exact moves the origin by some micrometers
_SPACING_TOLERANCE = 0.02


def read_ct_rate_volume(
    path: Path, acquisition: Acquisition | None, release: Release | None = None
) -> Volume:
    """Read a CT-RATE volume in HU on its true grid and axes.

    Args:
        path: NIfTI file.
        acquisition: The volume's row of the metadata table, or None where there is none.
        release: Which release the file must be of; None lets its content tell.

    Returns:
        The scan; its notes say what was applied.

    Raises:
        DataError: The values are of the other release than the one named, were rescaled twice, or need the metadata row
            that is missing.
        InputError: The file cannot be read, or is no chest CT.
    """
    try:
        if detect_format(path) is not Format.NIFTI:
            raise DataError(f"{path.name} is no NIfTI file; CT-RATE's volumes are .nii.gz")
        stored = read_nifti(path)
    except OSError as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {error.strerror}") from error
    scan = _in_hounsfield(stored, acquisition, release)
    scan = _on_true_grid(scan, acquisition)
    check_scan_size(scan.source, scan.shape_DHW, scan.spacing_mm)
    return checked_hounsfield(scan)


def tell_release(
    voxels_DHW: NDArray[Any], slope: float, intercept: float
) -> Literal["stored", "hounsfield", "twice", "either", "neither"]:
    """Tell from a file's values whether slope and intercept are still to be applied.

    Args:
        voxels_DHW: As they lie in the file.
        slope: Of the volume's row in the metadata table.
        intercept: Likewise, in HU.

    Returns:
        ``"stored"``: not yet applied. ``"hounsfield"``: applied once. ``"twice"``: applied twice. ``"either"``: they
        change nothing. ``"neither"``: no reading gives air and soft tissue.
    """
    if (slope, intercept) == (1.0, 0.0):
        return "either"
    sample = _sample(voxels_DHW)
    as_is = _likeness(sample)
    once = _likeness(sample * slope + intercept)
    undone = _likeness((sample - intercept) / slope)
    best = max(as_is, once, undone)
    if best < _LEAST_SHARE:
        return "neither"
    if as_is == best:
        return "hounsfield" if best > _CLEAR_MARGIN * once else "either"
    if once == best:
        return "stored" if best > _CLEAR_MARGIN * as_is else "either"
    return "twice" if best > _CLEAR_MARGIN * as_is else "neither"


def has_blank_header(scan: Volume) -> bool:
    """Whether the header tells no place: axes exactly to Right, Anterior and Superior from the origin itself."""
    directions = np.array([[0, 0, 1.0], [0, 1.0, 0], [1.0, 0, 0]])  # columns are D, H, W
    turned = np.abs(scan.affine[:3, :3] - directions * scan.spacing_mm).max()
    moved_mm = np.abs(scan.affine[:3, 3]).max()
    return bool(turned < _BLANK_TOLERANCE and moved_mm < _ORIGIN_TOLERANCE_MM)


def affine_of(acquisition: Acquisition, shape_DHW: tuple[int, int, int], name: str) -> NDArray[np.float64]:
    """Index (d, h, w, 1) to RAS+ mm, from the metadata: rows, columns, and slices along their cross product.

    So the second release was made from the first.
    """
    along_w, along_h = np.array(acquisition.directions[:3]), np.array(acquisition.directions[3:])
    lps = np.eye(4)
    lps[:3, :3] = np.stack([np.cross(along_w, along_h), along_h, along_w], axis=1) * acquisition.spacing_mm
    lps[:3, 3] = acquisition.position_mm
    return normalize_affine(LPS_TO_RAS @ lps, shape_DHW, name)


def _in_hounsfield(stored: Volume, acquisition: Acquisition | None, release: Release | None) -> Volume:
    name = stored.source
    if acquisition is None:
        _check_without_row(stored, release)
        return stored
    slope, intercept = acquisition.slope, acquisition.intercept
    found = tell_release(stored.voxels_DHW, slope, intercept)
    applied = f"slope {slope:g} and intercept {intercept:g}"
    if found == "twice":
        raise DataError(
            f"{name}: {applied} of the metadata were applied twice, air lies near {_AIR * slope + intercept:.0f} HU; "
            "download the file again and apply nothing"
        )
    if found == "neither":
        raise NotAChestCTError(
            f"{name} shows no air and soft tissue, neither as it is nor with {applied} of the metadata: "
            "is it this volume's row, and a chest?"
        )
    if found == "hounsfield" and release == "v1":
        raise DataError(
            f"{name} is in HU already, so it is no file of the first release: {applied} would be applied twice; "
            "leave out release=v1"
        )
    if found == "stored" and release == "v2":
        raise DataError(
            f"{name} holds stored values, so it is no file of the second release: {applied} of the metadata are not "
            "applied yet; leave out release=v2 or download train_fixed / valid_fixed"
        )
    unsure = found == "either" and (release == "v1" or (release is None and has_blank_header(stored)))
    if found != "stored" and not unsure:
        return stored
    return stored.with_voxels(rescaled(stored.voxels_DHW, slope, intercept)).with_notes(
        f"first release of CT-RATE: {applied} of the metadata applied"
    )


def _check_without_row(stored: Volume, release: Release | None) -> None:
    in_hounsfield = _likeness(_sample(stored.voxels_DHW)) >= _LEAST_SHARE
    if release == "v1" or not in_hounsfield:
        why = "holds no HU" if not in_hounsfield else "was named a file of the first release"
        raise DataError(
            f"{stored.source} {why} and has no usable row in the metadata table: slope and intercept are unknown; "
            "add the metadata table"
        )


def _on_true_grid(scan: Volume, acquisition: Acquisition | None) -> Volume:
    if acquisition is None:
        if not has_blank_header(scan) or np.abs(np.array(scan.spacing_mm) - 1).max() > _BLANK_TOLERANCE:
            return scan
        raise DataError(
            f"{scan.source} has a blank header (1 mm, no orientation) and no usable row in the metadata table: its voxel "
            "size is unknown; add the metadata table"
        )
    if not has_blank_header(scan):
        return _compared(scan, acquisition)
    affine = affine_of(acquisition, scan.shape_DHW, scan.source)
    return scan.with_voxels(scan.voxels_DHW, affine).with_notes(
        "blank header: voxel size and axes taken from CT-RATE's metadata"
    )


def _compared(scan: Volume, acquisition: Acquisition) -> Volume:
    """A true header is believed; where the table says otherwise, the user is told."""
    apart = np.abs(np.array(scan.spacing_mm) / _spacing_like(acquisition.spacing_mm, scan) - 1).max()
    if apart <= _SPACING_TOLERANCE:
        return scan
    header, table = (
        " x ".join(f"{side:.3g}" for side in sides) for sides in (scan.spacing_mm, acquisition.spacing_mm)
    )
    return scan.with_notes(
        f"voxels of {header} mm by the header, {table} by the metadata: the header is believed"
    )


def _spacing_like(spacing_mm: tuple[float, float, float], scan: Volume) -> NDArray[np.float64]:
    """The table's slice spacing on whichever axis of the scan runs along the patient."""
    axis = int(np.argmax(np.abs(scan.affine[2, :3]) / np.array(scan.spacing_mm)))
    sides = np.array(spacing_mm)
    return np.array([sides[0] if at == axis else sides[1] for at in range(3)])


def _likeness(sample: NDArray[np.float64]) -> float:
    """How much some values look like a CT in HU: the smaller of its shares of air and of soft tissue."""
    shares = [float(((sample > low) & (sample < high)).mean()) for low, high in (AIR_HU, TISSUE_HU)]
    return min(shares)


def _sample(voxels_DHW: NDArray[Any]) -> NDArray[np.float64]:
    step = max(1, int(np.ceil((voxels_DHW.size / _SAMPLE_VOXELS) ** (1 / 3))))
    axes = tuple(slice(None, None, step if size >= 4 * step else 1) for size in voxels_DHW.shape)
    return voxels_DHW[axes].ravel().astype(np.float64)
