"""A small chest in HU, and writers that put it on disk in every format, so that tests need no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CANONICAL = np.array([[0, 0, -1.0], [0, -1, 0], [1, 0, 0]])
"""Directions of the canonical (S, P, L) axes, as columns in RAS."""


def small_chest(shape: tuple[int, int, int] = (12, 40, 44), seed: int = 0) -> np.ndarray:
    """int16 HU: air, an oval body, two unequal lungs, a spine, noise; no symmetry in any axis."""
    d, h, w = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(h / 0.75) ** 2 + (w / 0.9) ** 2 < 1] = 40
    for center, height, width in ((-0.4, 0.5, 0.32), (0.42, 0.42, 0.26)):
        hu[((w - center) / width) ** 2 + ((h + 0.05) / height) ** 2 + (d / 1.6) ** 2 < 0.9] = -850
    hu[(w / 0.1) ** 2 + ((h - 0.5) / 0.12) ** 2 < 1] = 400
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    return np.clip(np.rint(hu + noise), -1024, 3000).astype(np.int16)


def affine_of(
    spacing_mm: Sequence[float] = (8.0, 7.0, 6.5), origin: Sequence[float] = (140.5, 138.25, -310.0)
) -> np.ndarray:
    """A canonical affine: D superior, H posterior, W left."""
    affine = np.eye(4)
    affine[:3, :3] = CANONICAL * np.asarray(spacing_mm)
    affine[:3, 3] = origin
    return affine


def reoriented(
    voxels: np.ndarray, affine: np.ndarray, order: Sequence[int], flips: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """The same scan with its axes permuted, then some of them reversed."""
    result = np.transpose(voxels, order)
    matrix = affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            result = np.flip(result, axis)
            matrix[:3, 3] += matrix[:3, axis] * (result.shape[axis] - 1)
            matrix[:3, axis] *= -1
    return np.ascontiguousarray(result), matrix


def canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Back to (S, P, L); exact for axis-aligned affines."""
    alignment = CANONICAL.T @ affine[:3, :3]
    order = [int(np.argmax(np.abs(alignment[world]))) for world in range(3)]
    flips = [bool(alignment[world, order[world]] < 0) for world in range(3)]
    return reoriented(voxels, affine, order, flips)


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, **changes: Any) -> Path:
    """NIfTI through nibabel; `changes` are header fields set as they are (uncompressed files only)."""
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.T), affine[:, [2, 1, 0, 3]], dtype=voxels.dtype)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    nib.save(image, path)
    if changes:
        content = path.read_bytes()
        header = nib.Nifti1Header(content[:348], check=False)
        for field, value in changes.items():
            header[field] = value
        path.write_bytes(header.binaryblock + content[348:])
    return path


def sitk_image(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """The scan as SimpleITK holds it."""
    lps = (LPS_TO_RAS @ affine)[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def write_itk(path: Path, voxels: np.ndarray, affine: np.ndarray, *, compressed: bool = False) -> Path:
    """MetaImage, NRRD or NIfTI through SimpleITK."""
    sitk.WriteImage(sitk_image(voxels, affine), str(path), compressed)
    return path


def write_npz(path: Path, voxels: np.ndarray, spacing_mm: Sequence[float], **changes: Any) -> Path:
    """A MedSAM2-style case in the window -1000..500 HU."""
    gray = np.clip((voxels.astype(np.float32) + 1000) / 1500 * 255, 0, 255)
    arrays = {
        "imgs": np.rint(gray).astype(np.uint8),
        "gts": (voxels > 200).astype(np.uint8),
        "spacing": np.array(spacing_mm),
        "window": np.array([-1000.0, 500.0]),
    }
    arrays |= changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_dicom(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    change: Callable[[Dataset, int], Dataset | None] | None = None,
    positions_lps: np.ndarray | None = None,
    series: str = "1.2.826.0.1.3680043.8.498.1",
    patient: str = "phantom",
    syntax: str | None = None,
    prefix: str = "",
) -> Path:
    """A classic CT series, one file a slice, in file names that say nothing about the order.

    Args:
        change: Called with each data set and its index; may change it, or return None to leave the slice out.
        positions_lps: Center of the first pixel of each slice, instead of the affine's.
        syntax: Transfer syntax to compress with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    names = np.random.default_rng(7).permutation(len(voxels))
    for index, plane in enumerate(voxels):
        position = (lps @ [index, 0, 0, 1])[:3] if positions_lps is None else positions_lps[index]
        dataset = ct_slice(plane, position, lps[:3, :3] / spacing, spacing, series, index)
        dataset.PatientID = dataset.PatientName = patient
        dataset.StudyInstanceUID = f"{series}.9"
        changed = change(dataset, index) if change else dataset
        if changed is None:
            continue
        if syntax is not None:
            changed.compress(syntax, generate_instance_uid=False)
        changed.save_as(folder / f"{prefix}IM{names[index]:04d}", enforce_file_format=True)
    return folder


def with_values(**values: object) -> Callable[[Dataset, int], Dataset]:
    """Set elements of every slice."""

    def change(dataset: Dataset, index: int) -> Dataset:
        for key, value in values.items():
            setattr(dataset, key, value)
        return dataset

    return change


def ct_slice(
    plane: np.ndarray,
    position_lps: np.ndarray,
    directions_lps: np.ndarray,
    spacing: np.ndarray,
    series: str,
    index: int,
) -> Dataset:
    """One CT image, stored as 12-bit unsigned with intercept -1024."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"{series}.{index + 1}"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID = series
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ConvolutionKernel = "B30f"
    dataset.InstanceNumber = index + 1
    dataset.ImagePositionPatient = [f"{value:.10g}" for value in position_lps]
    row, column = directions_lps[:, 2], directions_lps[:, 1]
    dataset.ImageOrientationPatient = [f"{value:.10g}" for value in (*row, *column)]
    dataset.PixelSpacing = [f"{spacing[1]:.10g}", f"{spacing[2]:.10g}"]
    dataset.SliceThickness = f"{spacing[0]:.6g}"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = plane.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.PixelData = (plane.astype(np.int32) + 1024).astype(np.uint16).tobytes()
    return dataset


def set_pixels(dataset: Dataset, stored: np.ndarray) -> Dataset:
    """Replace the stored values."""
    dataset.PixelRepresentation = 1 if stored.dtype.kind == "i" else 0
    dataset.PixelData = stored.tobytes()
    return dataset


def read_one(folder: Path) -> pydicom.Dataset:
    """Any data set of a folder."""
    return pydicom.dcmread(sorted(folder.iterdir())[0])
