"""DICOM headers: one `Slice` a file or frame, with what sorting and placing need and no patient data."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from vlm3d.errors import SeriesError
from vlm3d.io.wording import printable, shown

MAX_FILES = 50_000
MAX_ROWS = 8192
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

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
    "ConvolutionKernel",
    "Manufacturer",
    "KVP",
    "SliceThickness",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


@dataclass(frozen=True, eq=False)
class Slice:
    """One image plane as its header describes it.

    Attributes:
        path: The file.
        frame: Index in a multi-frame file, else None.
        series_uid: The series; shown to users only shortened.
        owner: A digest of patient and study, to keep two people's slices apart without naming them.
        position_lps: Center of the first pixel, LPS mm; None where the header has none.
        orientation_lps: Unit vectors along a row and along a column, (2, 3); None where the header has none.
        pixel_spacing_mm: Between rows, between columns.
        padding: Stored value that marks pixels outside the field of view.
    """

    path: Path
    frame: int | None
    series_uid: str
    owner: str
    sop_class: str
    modality: str
    image_type: tuple[str, ...]
    kernel: str
    manufacturer: str
    kvp: float | None
    thickness_mm: float | None
    acquisition: int
    instance: int
    rows: int
    columns: int
    samples: int
    position_lps: NDArray[np.float64] | None
    orientation_lps: NDArray[np.float64] | None
    pixel_spacing_mm: tuple[float, float] | None
    slope: float
    intercept: float
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


def read_headers(folder: Path, *, nested: bool = True) -> tuple[list[Slice], int]:
    """Headers of all DICOM images in a folder.

    Returns:
        The slices, and the number of files that look like DICOM but are damaged.

    Raises:
        SeriesError: More files than are accepted.
    """
    slices: list[Slice] = []
    damaged = 0
    for path in _files(folder, nested):
        if not looks_like_dicom(path):
            continue
        try:
            slices.extend(slices_of(path))
        except Exception:  # pydicom raises a dozen kinds on hostile bytes; any of them means a damaged file
            damaged += 1
    return slices, damaged


def looks_like_dicom(path: Path) -> bool:
    """Whether the file starts as DICOM does, with or without its preamble."""
    try:
        with path.open("rb") as file:
            return has_dicom_magic(file.read(132))
    except OSError:
        return False


def has_dicom_magic(head: bytes) -> bool:
    """``DICM`` after 128 bytes, or a first element of group 0008 (old files without preamble)."""
    without_preamble = head[:2] == b"\x08\x00" and head[2:4] in (
        b"\x00\x00",
        b"\x01\x00",
        b"\x05\x00",
        b"\x08\x00",
    )
    return head[128:132] == b"DICM" or without_preamble


def slices_of(path: Path) -> list[Slice]:
    """The slices of one file: one, or one a frame, or none where it holds no image.

    Raises:
        Exception: Whatever pydicom makes of a damaged file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
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


def _files(folder: Path, nested: bool) -> Iterator[Path]:
    count = 0
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")) if nested else []
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith(".") or not path.is_file():
                continue
            count += 1
            if count > MAX_FILES:
                raise SeriesError(
                    f"{shown(folder)} holds more than {MAX_FILES} files; give the folder of one study."
                )
            yield path


def _slice_of(
    dataset: pydicom.Dataset, path: Path, frame: int | None, places: Sequence[pydicom.Dataset]
) -> Slice:
    rescale = _nested(places, "PixelValueTransformationSequence", "RescaleSlope", "RescaleIntercept")
    position = _numbers(_nested(places, "PlanePositionSequence", "ImagePositionPatient")[0], 3)
    orientation = _numbers(_nested(places, "PlaneOrientationSequence", "ImageOrientationPatient")[0], 6)
    spacing = _numbers(_nested(places, "PixelMeasuresSequence", "PixelSpacing")[0], 2)
    slope = 1.0 if rescale[0] in (None, "") else float(rescale[0])
    intercept = 0.0 if rescale[1] in (None, "") else float(rescale[1])
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ValueError("rescale is not a number")
    owner = "|".join(str(dataset.get(key, "")) for key in ("PatientID", "PatientName", "StudyInstanceUID"))
    return Slice(
        path=path,
        frame=frame,
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        owner=hashlib.sha256(owner.encode()).hexdigest()[:16],
        sop_class=str(dataset.SOPClassUID),
        modality=printable(str(dataset.get("Modality", "")))[:16],
        image_type=tuple(str(word) for word in _listed(dataset.get("ImageType"))),
        kernel=printable(" ".join(str(word) for word in _listed(dataset.get("ConvolutionKernel"))))[:40],
        manufacturer=printable(str(dataset.get("Manufacturer", "") or ""))[:40],
        kvp=_number(dataset.get("KVP")),
        thickness_mm=_number(dataset.get("SliceThickness")),
        acquisition=int(dataset.get("AcquisitionNumber") or 0),
        instance=int(dataset.get("InstanceNumber") or 0) if frame is None else frame,
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        position_lps=position,
        orientation_lps=_directions(orientation),
        pixel_spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        slope=slope,
        intercept=intercept,
        padding=_padding(dataset),
    )


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
    if not np.isfinite(numbers).all():
        raise ValueError("a number is not finite")
    return numbers


def _number(value: Any) -> float | None:
    try:
        return None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        return None
