"""The one way from a path on disk to a scan or a mask in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import MaskError, SeriesError, UnreadableFileError
from vlm3d.io.archive import unpacked
from vlm3d.io.detection import Format, detect_format
from vlm3d.io.dicom import list_dicom_series, read_dicom
from vlm3d.io.dicom_files import looks_like_dicom
from vlm3d.io.dicom_series import SeriesInfo
from vlm3d.io.geometry import normalize_affine
from vlm3d.io.hounsfield import checked_hounsfield, rescaled
from vlm3d.io.limits import check_scan_size
from vlm3d.io.metaimage import read_metaimage
from vlm3d.io.nifti import read_nifti
from vlm3d.io.npz import read_npz, read_npz_case
from vlm3d.io.nrrd import read_nrrd
from vlm3d.io.wording import reason, shown
from vlm3d.volume import Volume, spacing_from_affine

_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".npz", ".hdr")


@dataclass(frozen=True)
class Mask:
    """A label mask on its own grid.

    Attributes:
        labels_DHW: uint8, uint16 or int32 labels, 0 is background.
        affine: Index (d, h, w, 1) to RAS+ mm, made exact as those of scans are.
        source: File name.
    """

    labels_DHW: NDArray[Any]
    affine: NDArray[np.float64]
    source: str


def read_volume(
    path: str | Path,
    *,
    series: str | None = None,
    npz_window: tuple[float, float] | None = None,
    rescale: tuple[float, float] | None = None,
    spacing_mm: Sequence[float] | None = None,
) -> Volume:
    """Read a chest CT of any supported format, in HU, on its own grid and axes.

    Args:
        path: NIfTI, MetaImage, NRRD or NPZ file; DICOM file, folder or zip.
        series: Which DICOM series, by number or UID as `list_series` gives them.
        npz_window: HU that an NPZ case's gray values 0 and 255 stand for.
        rescale: Slope and intercept that the file lacks (CT-RATE's first release holds raw values). Given for
            a file that is in HU already, it is refused as applied twice.
        spacing_mm: Voxel size along (D, H, W) that the file lacks.

    Returns:
        The scan; its notes say what reading had to do.

    Raises:
        InputError: What is wrong with the file, in one line; its subclasses say of which kind.
    """
    path = Path(path)
    try:
        scan = _load(path, series, npz_window)
        if spacing_mm is not None:
            scan = _with_spacing(scan, spacing_mm)
        if rescale is not None:
            scan = scan.with_voxels(rescaled(scan.voxels_DHW, *rescale))
        check_scan_size(scan.source, scan.shape_DHW, scan.spacing_mm)
        return checked_hounsfield(scan)
    except OSError as error:
        raise UnreadableFileError(f"{shown(path)} cannot be read: {reason(error)}.") from error


def list_series(path: str | Path) -> list[SeriesInfo]:
    """The DICOM series of a folder, zip, or file's folder, the likeliest chest CT first.

    Raises:
        SeriesError: There is no DICOM image.
        InputError: The path cannot be read.
    """
    path = Path(path)
    kind = detect_format(path)
    if kind is Format.ZIP:
        with unpacked(path) as folder:
            return list_dicom_series(folder, shown(path))
    if kind is not Format.DICOM:
        raise SeriesError(f"{shown(path)} is a {kind.value} file and has no series to choose from.")
    return list_dicom_series(path)


def read_mask(path: str | Path) -> Mask:
    """Read a label mask: anatomy of a scan, or lesions.

    Args:
        path: NIfTI, MetaImage, NRRD (3D Slicer's .seg.nrrd with one layer too), or NPZ with ``gts``.

    Raises:
        MaskError: The values are no labels.
        InputError: The file cannot be read.
    """
    path = Path(path)
    name = shown(path)
    kind = detect_format(path)
    if kind in (Format.DICOM, Format.ZIP):
        raise MaskError(f"{name} is {kind.value}; give a mask as NIfTI, MetaImage or NRRD.")
    if kind is Format.NPZ:
        case = read_npz_case(path)
        if case.gts_DHW is None:
            raise MaskError(f"{name} has no array 'gts', so no mask.")
        affine = normalize_affine(case.affine, case.gts_DHW.shape, name)
        return Mask(case.gts_DHW, affine, name)
    image = _READERS[kind](path)
    return Mask(_as_labels(image.voxels_DHW, name), image.affine, name)


_READERS = {Format.NIFTI: read_nifti, Format.METAIMAGE: read_metaimage, Format.NRRD: read_nrrd}


def _load(path: Path, series: str | None, npz_window: tuple[float, float] | None) -> Volume:
    """Any format, without the checks on what the image shows."""
    kind = detect_format(path)
    if kind is Format.ZIP:
        with unpacked(path) as folder:
            return _load_folder(folder, series, npz_window, shown(path))
    if path.is_dir():
        return _load_folder(path, series, npz_window, shown(path))
    if kind is Format.DICOM:
        return read_dicom(path, series)
    if series is not None:
        raise SeriesError(f"{shown(path)} is a {kind.value} file and has no series to choose from.")
    if kind is Format.NPZ:
        return read_npz(path, npz_window)
    return _READERS[kind](path)


def _load_folder(
    folder: Path, series: str | None, npz_window: tuple[float, float] | None, name: str
) -> Volume:
    """DICOM, else the one other image that a folder holds."""
    try:
        return read_dicom(folder, series, name)
    except SeriesError:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        images = [path for path in files if path.name.lower().endswith(_IMAGE_SUFFIXES)]
        if len(images) != 1 or series is not None or any(looks_like_dicom(path) for path in files):
            raise
        scan = _load(images[0], None, npz_window)
        return replace(scan, source=name).with_notes(
            f"{name} holds no DICOM; read its file {shown(images[0])}"
        )


def _with_spacing(scan: Volume, spacing_mm: Sequence[float]) -> Volume:
    wanted = np.array([float(s) for s in spacing_mm])
    if wanted.shape != (3,) or not np.isfinite(wanted).all() or wanted.min() <= 0:
        raise ValueError(f"spacing_mm is three positive numbers (D, H, W), got {spacing_mm}")
    affine = np.array(scan.affine)
    affine[:3, :3] *= wanted / np.array(spacing_from_affine(affine))
    return scan.with_voxels(scan.voxels_DHW, normalize_affine(affine, scan.shape_DHW, scan.source))


def _as_labels(values_DHW: NDArray[Any], name: str) -> NDArray[Any]:
    if values_DHW.dtype.kind == "f" and not all(
        (np.isfinite(plane) & (plane == np.rint(plane))).all() for plane in values_DHW
    ):
        raise MaskError(f"{name} holds values that are no whole numbers; a mask has labels 0, 1, 2 …")
    low, high = int(values_DHW.min()), int(values_DHW.max())
    if low < 0:
        raise MaskError(f"{name} holds negative values (down to {low}); a mask has labels 0, 1, 2 …")
    if high > np.iinfo(np.int32).max:
        raise MaskError(f"{name} holds values up to {high:.3g}; a mask has labels 0, 1, 2 …")
    return values_DHW.astype(np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.int32)
