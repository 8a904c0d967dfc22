"""DICOM series to a scan: a folder, nested folders, or one file of a series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlm3d.errors import SeriesError, UnreadableFileError
from vlm3d.io.dicom_geometry import evenly_stacked, stack_affine, stack_slices, untilted
from vlm3d.io.dicom_headers import Slice, read_headers, slices_of
from vlm3d.io.dicom_pixels import check_units, decode_slices
from vlm3d.io.dicom_series import Series, SeriesInfo, choose_series, group_series
from vlm3d.io.geometry import normalize_affine
from vlm3d.io.wording import counted, shown
from vlm3d.volume import Volume


def read_dicom(path: Path, series: str | None = None, name: str | None = None) -> Volume:
    """Read the chest CT of a DICOM folder, or the series that a file belongs to; HU, on the scan's own grid.

    Where slices are missing or uneven, or the gantry was tilted, the grid is the corrected one, which a note says.

    Args:
        path: A folder (searched with its subfolders) or one file (its folder is searched).
        series: Number or UID as `list_dicom_series` gives them; the likeliest chest CT by default.
        name: What the user calls it, where `path` is a temporary folder.

    Raises:
        SeriesError: No series, or slices that make no volume.
        NotAChestCTError: Another modality, or color images.
        UnreadableFileError: A slice is damaged, or compressed in a way that no decoder here knows.
    """
    name = name or shown(path)
    found, folder_notes = _find(path, name)
    within = path if path.is_file() and series is None else None
    chosen, choice_notes = choose_series(found, name, series, within)
    unit_notes = check_units(chosen.slices, name)
    stack = stack_slices(chosen.slices, name)
    measured = decode_slices(stack.slices)
    notes = (*choice_notes, *folder_notes, *unit_notes, *_blank_notes(measured), *stack.notes)
    voxels = evenly_stacked(measured, stack)
    affine = stack_affine(stack)
    if stack.tilt_degrees:
        voxels, affine = untilted(voxels, affine, name)
    affine = normalize_affine(affine, voxels.shape, name)
    return Volume(
        voxels,
        affine,
        source=name,
        notes=notes,
        acquisition=_acquisition(stack.slices[0]),
    )


def list_dicom_series(path: Path, name: str | None = None) -> list[SeriesInfo]:
    """The series of a folder, or of a file's folder, the likeliest chest CT first.

    Raises:
        SeriesError: There is no DICOM image.
    """
    found, _ = _find(path, name or shown(path))
    return [item.info for item in found]


def _find(path: Path, name: str) -> tuple[list[Series], tuple[str, ...]]:
    """The series around a path, and what of them may be missing."""
    if path.is_file():
        try:
            own = slices_of(path)
        except UnreadableFileError:
            raise
        except Exception as error:  # pydicom raises a dozen kinds on hostile bytes
            raise UnreadableFileError(
                f"{name} is a damaged DICOM file (its header cannot be parsed). Copy it again."
            ) from error
        if own and own[0].frame is not None:
            return group_series(own), ()
        headers = read_headers(path.parent, nested=False)
    else:
        headers = read_headers(path)
    if not headers.slices:
        why = f" ({'; '.join(headers.notes)})" if headers.notes else ""
        raise SeriesError(f"{name} holds no DICOM image{why}. Give the folder of a CT series.")
    return group_series(headers.slices), headers.notes


def _blank_notes(voxels_DHW: NDArray[Any]) -> tuple[str, ...]:
    """A note where slices among others hold one value throughout, as files do that were copied in part."""
    blank = sum(bool(plane.min() == plane.max()) for plane in voxels_DHW)
    if not 0 < blank < len(voxels_DHW):
        return ()
    return (f"{counted(blank, 'slice')} without an image (one value throughout) in this series",)


def _acquisition(first: Slice) -> dict[str, Any]:
    """Scanner facts without patient data."""
    facts = {
        "modality": first.modality,
        "kernel": first.kernel,
        "manufacturer": first.manufacturer,
        "kvp": first.kvp,
        "slice_thickness_mm": first.thickness_mm,
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}
