"""DICOM headers: one `Slice` a file or frame, with what sorting and placing need and no patient data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydicom
from numpy.typing import NDArray

from vlm3d.io.body_part import coded_part, named_parts
from vlm3d.io.dicom_files import (
    files_in,
    first_bytes,
    has_dicom_magic,
    is_named_dicom,
    lost_slices,
    quiet_pydicom,
    read_elements,
)
from vlm3d.io.limits import FARTHEST_MM
from vlm3d.io.wording import counted, printable

MAX_ROWS = 8192
SAME_PLACE_MM = 0.01
"""Slices closer than this lie at one place."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_T = TypeVar("_T")

_TAGS = [
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "PatientID",
    "PatientName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "AcquisitionNumber",
    "InstanceNumber",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "SamplesPerPixel",
    "NumberOfFrames",
    "PixelRepresentation",
    "PixelPaddingValue",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "BodyPartExamined",
    "SeriesDescription",
    "ProtocolName",
    "ConvolutionKernel",
    "Manufacturer",
    "KVP",
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DirectoryRecordSequence",
]


@dataclass(frozen=True, eq=False)
class Slice:
    """One image plane as its header describes it.

    Attributes:
        path: The file.
        frame: Index in a multi-frame file, else None.
        series_uid: The series; shown to users only shortened.
        owner: A digest of patient and study, to keep two people's slices apart without naming them.
        body_part: As the header codes it, where it does.
        named_parts: What the words of the header name, as `body_part.named_parts` tells it; the words are not kept.
        acquisition: Its number, where the header has one.
        position_lps: Center of the first pixel, LPS mm; None where the header has none.
        orientation_lps: Unit vectors along a row and along a column, (2, 3); None where the header has none.
        pixel_spacing_mm: Between rows, between columns.
        rescale_type: The unit that slope and intercept lead to, as stated.
        padding: Stored value that marks pixels outside the field of view.
    """

    path: Path
    frame: int | None
    series_uid: str
    owner: str
    sop_class: str
    modality: str
    body_part: str
    named_parts: frozenset[str]
    image_type: tuple[str, ...]
    kernel: str
    manufacturer: str
    kvp: float | None
    thickness_mm: float | None
    acquisition: int | None
    instance: int
    rows: int
    columns: int
    samples: int
    position_lps: NDArray[np.float64] | None
    orientation_lps: NDArray[np.float64] | None
    pixel_spacing_mm: tuple[float, float] | None
    slope: float
    intercept: float
    rescale_type: str
    padding: int | None

    @property
    def normal_lps(self) -> NDArray[np.float64] | None:
        """Unit vector through the plane."""
        return None if self.orientation_lps is None else np.cross(*self.orientation_lps)

    @property
    def is_localizer(self) -> bool:
        """A scout view, or a picture of a screen or a form."""
        types = {word.upper() for word in self.image_type}
        return "LOCALIZER" in types or "SCREEN SAVE" in types or self.sop_class == SECONDARY_CAPTURE

    @property
    def is_derived(self) -> bool:
        """Computed from other images: reformats, projections, fusions."""
        types = [word.upper() for word in self.image_type[:2]]
        return types[:1] == ["DERIVED"] or types[1:2] == ["SECONDARY"]

    @property
    def is_axial(self) -> bool:
        """Within 45 degrees of a plane across the patient's long axis."""
        normal = self.normal_lps
        return normal is not None and abs(float(normal[2])) > 0.7


@dataclass(frozen=True)
class FolderHeaders:
    """What the files of a folder gave.

    Attributes:
        slices: Of all images.
        damaged: Files that start as DICOM does, or are named so, and cannot be parsed.
        unusable: Files in the place of slices that cannot be opened, are empty or hold only zeros.
        closed: Subfolders that may not be opened.
    """

    slices: list[Slice]
    damaged: int = 0
    unusable: int = 0
    closed: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What of it may be missing in a scan."""
        notes = []
        if self.damaged:
            notes.append(f"{counted(self.damaged, 'damaged DICOM file')} left out; slices may be missing")
        if self.unusable:
            notes.append(
                f"{counted(self.unusable, 'file')} could not be read or "
                f"{'is' if self.unusable == 1 else 'are'} empty; slices may be missing"
            )
        if self.closed:
            notes.append(f"{counted(self.closed, 'folder')} could not be opened; slices may be missing")
        return tuple(notes)


def read_headers(folder: Path, *, nested: bool = True) -> FolderHeaders:
    """Headers of all DICOM images in a folder.

    Raises:
        SeriesError: More files than are accepted.
        UnreadableFileError: The folder may not be opened.
    """
    slices: list[Slice] = []
    unusable: list[Path] = []
    closed: list[Path] = []
    damaged = 0
    for path in files_in(folder, nested=nested, closed=closed):
        head = first_bytes(path)
        if not any(head):
            unusable.append(path)
        elif has_dicom_magic(head):
            try:
                slices.extend(slices_of(path))
            except (
                Exception
            ):  # pydicom raises a dozen kinds on hostile bytes; any of them means a damaged file
                damaged += 1
        elif is_named_dicom(path):
            damaged += 1
    lost = lost_slices(unusable, {item.path for item in slices})
    return FolderHeaders(slices, damaged, len(lost), len(closed))


def slices_of(path: Path) -> list[Slice]:
    """The slices of one file: one, or one a frame, or none where it holds no image.

    Raises:
        UnreadableFileError: It is deflated and too large.
        Exception: Whatever pydicom makes of a damaged file.
    """
    with quiet_pydicom():
        dataset = read_elements(path, _TAGS, pixels=False)
        if "DirectoryRecordSequence" in dataset:
            return []  # a DICOMDIR
        if "SOPClassUID" not in dataset:
            raise ValueError("no SOP class")
        if "Rows" not in dataset:
            return []
        frames = int(dataset.get("NumberOfFrames") or 1)
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        if not groups:
            return [_slice_of(dataset, path, None, [dataset])] if frames == 1 else []
        if len(groups) != frames:
            raise ValueError("frames and functional groups differ")
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
        return [_slice_of(dataset, path, i, [group, *shared]) for i, group in enumerate(groups)]


def _slice_of(
    dataset: pydicom.Dataset, path: Path, frame: int | None, places: Sequence[pydicom.Dataset]
) -> Slice:
    rescale = _nested(
        places, "PixelValueTransformationSequence", "RescaleSlope", "RescaleIntercept", "RescaleType"
    )
    position = _numbers(_nested(places, "PlanePositionSequence", "ImagePositionPatient")[0], 3)
    orientation = _numbers(_nested(places, "PlaneOrientationSequence", "ImageOrientationPatient")[0], 6)
    spacing = _numbers(_nested(places, "PixelMeasuresSequence", "PixelSpacing")[0], 2)
    slope = 1.0 if rescale[0] in (None, "") else float(rescale[0])
    intercept = 0.0 if rescale[1] in (None, "") else float(rescale[1])
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ValueError("rescale is not a number")
    body_part, *words = (
        _text(dataset, key) for key in ("BodyPartExamined", "SeriesDescription", "ProtocolName")
    )
    return Slice(
        path=path,
        frame=frame,
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        owner=_owner(dataset),
        sop_class=str(dataset.SOPClassUID),
        modality=printable(str(dataset.get("Modality", "")))[:16],
        body_part=coded_part(body_part),
        named_parts=named_parts(body_part, *words),
        image_type=tuple(str(word) for word in _listed(dataset.get("ImageType"))),
        kernel=printable(" ".join(str(word) for word in _listed(dataset.get("ConvolutionKernel"))))[:40],
        manufacturer=printable(str(dataset.get("Manufacturer", "") or ""))[:40],
        kvp=_optional(dataset, "KVP", float),
        thickness_mm=_optional(dataset, "SliceThickness", float),
        acquisition=_acquisition(dataset, places),
        instance=_optional(dataset, "InstanceNumber", int) or 0 if frame is None else frame,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        position_lps=position,
        orientation_lps=_directions(orientation),
        pixel_spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        slope=slope,
        intercept=intercept,
        rescale_type=str(rescale[2] or "").strip().upper(),
        padding=_padding(dataset),
    )


def _owner(dataset: pydicom.Dataset) -> str:
    """A digest of patient and study; the name counts only where there is no number, since names are corrected."""
    patient = str(dataset.get("PatientID") or "").strip() or str(dataset.get("PatientName") or "")
    owner = f"{patient}|{dataset.get('StudyInstanceUID', '')}"
    return hashlib.sha256(owner.encode()).hexdigest()[:16]


def _acquisition(dataset: pydicom.Dataset, places: Sequence[pydicom.Dataset]) -> int | None:
    """The number of a frame's acquisition in an enhanced image, of the file's in a classic one."""
    content = places[0].get("FrameContentSequence")
    frame = _optional(content[0], "FrameAcquisitionNumber", int) if content else None
    return _optional(dataset, "AcquisitionNumber", int) if frame is None else frame


def _nested(places: Sequence[pydicom.Dataset], sequence: str, *keys: str) -> list[Any]:
    """Values from a functional group of an enhanced image, or from the top level of a classic one."""
    for place in places:
        items = place.get(sequence)
        if items:
            return [items[0].get(key) for key in keys]
    return [next((place.get(key) for place in places if key in place), None) for key in keys]


def _directions(orientation: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    if orientation is None:
        return None
    pair = orientation.reshape(2, 3)
    lengths = np.linalg.norm(pair, axis=1)
    if (np.abs(lengths - 1) > 1e-2).any() or abs(float(pair[0] @ pair[1])) > 1e-2:
        raise ValueError("orientation is no pair of right-angled unit vectors")
    return pair / lengths[:, None]


def _padding(dataset: pydicom.Dataset) -> int | None:
    """The padding value in the sign of the pixels; headers often carry it in the other one."""
    value = dataset.get("PixelPaddingValue")
    if value is None or isinstance(value, bytes | str):
        return None
    bits = int(dataset.get("BitsAllocated") or 16)
    wrapped = int(value) % (1 << bits)
    signed = int(dataset.get("PixelRepresentation") or 0) == 1
    return wrapped - (1 << bits) if signed and wrapped >= 1 << (bits - 1) else wrapped


def _listed(value: Any) -> list[Any]:
    if value in (None, ""):
        return []
    return [value] if isinstance(value, str) else list(value)


def _numbers(value: Any, count: int) -> NDArray[np.float64] | None:
    if value in (None, "") or isinstance(value, str):
        return None
    numbers = np.array([float(part) for part in value], dtype=np.float64)
    if len(numbers) != count:
        return None
    if not (np.abs(numbers) <= FARTHEST_MM).all():
        raise ValueError("a number is not finite, or absurdly large")
    return numbers


def _text(dataset: pydicom.Dataset, key: str) -> str:
    return _optional(dataset, key, str) or ""


def _optional(dataset: pydicom.Dataset, key: str, kind: Callable[[Any], _T]) -> _T | None:
    """An element that no slice needs; absent where it cannot be parsed."""
    try:
        value = dataset.get(key)
        return None if value in (None, "") else kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
