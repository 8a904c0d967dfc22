"""DICOM pixels: decoded, rescaled to HU slice by slice, padding marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
)

from vlm3d.errors import NotAChestCTError, UnreadableFileError
from vlm3d.io.codestream import codestream_size
from vlm3d.io.dicom_files import quiet_pydicom, read_elements
from vlm3d.io.dicom_headers import MAX_ROWS, Slice
from vlm3d.io.hounsfield import PADDING_HU, rescaled
from vlm3d.io.limits import MAX_VOXELS
from vlm3d.io.wording import printable, reason, shape_words, shown

_PIXEL_TAGS: list[Any] = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
]
"""No patient data among them, so an error about them can be shown."""
_CODESTREAMS = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes)
_PADDING_PLAUSIBLE_BELOW_HU = -900
_PADDING_PLAUSIBLE_ABOVE_HU = 3000


_OTHER_UNITS = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")
"""DICOM's terms of RescaleType that are no Hounsfield units (PS3.3, C.11.1.1.2)."""


def check_units(slices: Sequence[Slice], name: str) -> tuple[str, ...]:
    """A note where a series does not state Hounsfield units plainly; one without a unit is taken to be in HU.

    Raises:
        NotAChestCTError: Another unit, as of material density or an effective atomic number.
    """
    stated = {item.rescale_type for item in slices} - {"", "HU"}
    other = sorted(stated.intersection(_OTHER_UNITS))
    if other:
        raise NotAChestCTError(
            f"{name} holds values in {other[0]} (RescaleType), not in HU. Give the CT series."
        )
    if "HU_MOD" in stated:
        return ("the header states modified Hounsfield units (HU_MOD), taken as HU",)
    return ("the header states no Hounsfield units (RescaleType), taken as HU",) if stated else ()


def decode_slices(slices: list[Slice]) -> NDArray[Any]:
    """Voxels in HU of slices in their order, (D, H, W): int16 where all are whole numbers, else float32.

    Raises:
        UnreadableFileError: A file is truncated, damaged, or compressed in a way that no decoder here knows.
        NotAChestCTError: Color images.
    """
    first = slices[0]
    shape = (len(slices), first.rows, first.columns)
    if first.samples != 1:
        raise NotAChestCTError(
            f"{shown(first.path)} is a color image ({first.samples} samples a pixel), not a CT slice."
        )
    if min(shape) < 1 or max(shape[1:]) > MAX_ROWS or np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise UnreadableFileError(
            f"{shown(first.path)} states an absurd grid: {shape_words(shape)} voxels for the series. "
            "Is the header damaged?"
        )
    voxels = np.empty(shape, np.int16)
    index = 0
    for path, members in groupby(slices, key=lambda item: item.path):
        for plane in _planes(path, list(members)):
            if plane.dtype != voxels.dtype and voxels.dtype == np.int16:
                voxels = voxels.astype(np.float32)
            voxels[index] = plane
            index += 1
    return voxels


def _planes(path: Path, members: list[Slice]) -> Iterator[NDArray[Any]]:
    """HU of the slices that one file holds."""
    stored = _stored_pixels(path)
    if isinstance(stored, UID):
        if members[0].frame is not None:
            raise UnreadableFileError(_no_decoder(shown(path), stored))
        yield _decoded_by_gdcm(path, members[0], stored)
        return
    for item in members:
        plane = stored if item.frame is None else stored[item.frame] if stored.ndim == 3 else stored
        if plane.shape != (item.rows, item.columns):
            raise UnreadableFileError(
                f"{shown(path)} holds pixels of {shape_words(plane.shape)}, unlike its header says."
            )
        yield _in_hounsfield(plane, item)


def _stored_pixels(path: Path) -> NDArray[Any] | UID:
    """The pixels as stored, or the transfer syntax where pydicom has no decoder for it."""
    name = shown(path)
    with quiet_pydicom():
        try:
            dataset = read_elements(path, _PIXEL_TAGS, pixels=True)
            syntax = dataset.file_meta.get("TransferSyntaxUID")
            if syntax is None:
                syntax = dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            _check_layout(dataset, name)
            if syntax in _CODESTREAMS:
                _check_codestreams(dataset, name)
            if _has_decoder(syntax):
                return np.asarray(dataset.pixel_array)
            if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
                raise UnreadableFileError(
                    f"{name} stores inverted gray values (MONOCHROME1) in {printable(syntax.name)[:60]}, which is "
                    "not read. Convert it (for example with gdcmconv --raw)."
                )
            return UID(syntax)
        except UnreadableFileError:
            raise
        except Exception as error:  # pydicom and its decoders raise a dozen kinds on hostile bytes
            raise UnreadableFileError(
                f"{name} has truncated or damaged pixels: {reason(error)}. Copy it again."
            ) from error


def _check_layout(dataset: pydicom.Dataset, name: str) -> None:
    """Refuse stored bits that do not begin at bit 0, which no decoder here shifts."""
    high, stored = dataset.get("HighBit"), dataset.get("BitsStored")
    if high is not None and stored is not None and int(high) != int(stored) - 1:
        raise UnreadableFileError(
            f"{name} keeps {int(stored)} bits up to bit {int(high)} (HighBit); only bits from 0 on are read. "
            "Export it again."
        )


def _check_codestreams(dataset: pydicom.Dataset, name: str) -> None:
    """Refuse compressed frames of another size than the header's: a decoder takes memory for their own."""
    wanted = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    frames = int(dataset.get("NumberOfFrames") or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
        found = codestream_size(frame)
        if found is None:
            raise UnreadableFileError(f"{name} has damaged pixels: no compressed image. Copy it again.")
        if found != wanted:
            raise UnreadableFileError(f"{name} holds pixels of {shape_words(found)}, unlike its header says.")


def _has_decoder(syntax: UID) -> bool:
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _in_hounsfield(plane: NDArray[Any], item: Slice) -> NDArray[Any]:
    values = rescaled(plane[None], item.slope, item.intercept)[0]
    if item.padding is None:
        return values
    hu = item.padding * item.slope + item.intercept
    if _PADDING_PLAUSIBLE_BELOW_HU < hu < _PADDING_PLAUSIBLE_ABOVE_HU:
        return values  # a padding value in the range of tissue is a wrong header, not padding
    is_padding = plane == item.padding
    if is_padding.any():
        values = np.where(is_padding, values.dtype.type(PADDING_HU), values)
    return values


def _decoded_by_gdcm(path: Path, item: Slice, syntax: UID) -> NDArray[Any]:
    """JPEG lossless and what else pydicom cannot decode; GDCM, inside SimpleITK, rescales by itself."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    warns = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        plane = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise UnreadableFileError(_no_decoder(shown(path), syntax)) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(warns)
    plane = plane.reshape(plane.shape[-2:]) if plane.ndim == 3 and plane.shape[0] == 1 else plane
    if plane.shape != (item.rows, item.columns):
        raise UnreadableFileError(
            f"{shown(path)} holds pixels of {shape_words(plane.shape)}, unlike its header says."
        )
    values = rescaled(plane[None])[0]
    if item.padding is not None:
        hu = item.padding * item.slope + item.intercept
        if not _PADDING_PLAUSIBLE_BELOW_HU < hu < _PADDING_PLAUSIBLE_ABOVE_HU:
            values = np.where(values == hu, values.dtype.type(PADDING_HU), values)
    return values


def _no_decoder(name: str, syntax: UID) -> str:
    return (
        f"{name} cannot be decoded: its transfer syntax {printable(syntax.name)[:60]} has no decoder "
        "here, or its data are damaged. Copy it again, or convert it (for example with gdcmconv --raw)."
    )
