"""Inputs that no chest CT should be: what each is, how it is made, and the error that names it.

Used at the reader's level and, over the same list, at the command line's.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from support.scan_files import affine_of, small_chest, write_dicom, write_itk, write_nifti, write_npz
from vlm3d.errors import ArchiveError, InputError, NotAChestCTError, SeriesError, UnreadableFileError

CHEST, AFFINE = small_chest(), affine_of()
Builder = Callable[[Path], Path]


@dataclass(frozen=True)
class BadInput:
    """One kind of bad input: its name, how to make it in a folder, and its error."""

    name: str
    build: Builder
    error: type[InputError]


def _bytes(name: str, content: bytes) -> Builder:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def _nifti(
    voxels: np.ndarray, name: str = "ct.nii", affine: np.ndarray = AFFINE, **header: object
) -> Builder:
    return lambda folder: write_nifti(folder / name, voxels, affine, **header)


def _raw_nifti(shape: tuple[int, ...], dtype: type = np.int16, **changes: object) -> Builder:
    """A NIfTI of any number of axes."""

    def build(folder: Path) -> Path:
        image = nib.Nifti1Image(np.zeros(shape, dtype), np.diag([7.0, 7.0, 8.0, 1.0]))
        nib.save(image, folder / "ct.nii")
        return folder / "ct.nii"

    return build


def _rgb(folder: Path) -> Path:
    colors = np.zeros((44, 40, 12), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colors, np.diag([7.0, 7.0, 8.0, 1.0])), folder / "ct.nii")
    return folder / "ct.nii"


def _cut(write: Builder, keep: float) -> Builder:
    def build(folder: Path) -> Path:
        path = write(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        return path

    return build


def _gzip_bomb(folder: Path) -> Path:
    """A valid header followed by far more zeros than it declares."""
    small = write_nifti(folder / "small.nii", CHEST, AFFINE).read_bytes()
    (folder / "ct.nii.gz").write_bytes(gzip.compress(small[:352] + bytes(200_000_000), 9))
    (folder / "small.nii").unlink()
    return folder / "ct.nii.gz"


def _gzip_flipped(folder: Path) -> Path:
    path = write_nifti(folder / "ct.nii.gz", CHEST, AFFINE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def _photo(name: str) -> Builder:
    def build(folder: Path) -> Path:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            folder / name, format="JPEG"
        )
        return folder / name

    return build


def _zip(members: dict[str, bytes]) -> Builder:
    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return folder / "scan.zip"

    return build


def _zip_with_link(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "scan.zip", "w") as archive:
        link = zipfile.ZipInfo("IM0001")
        link.create_system = 3
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return folder / "scan.zip"


def _dicom(change: Callable[..., object] | None = None, voxels: np.ndarray = CHEST) -> Builder:
    return lambda folder: write_dicom(folder / "series", voxels, AFFINE, change=change)  # type: ignore[arg-type]


def _set(**values: object) -> Callable[..., object]:
    def change(dataset: object, index: int) -> object:
        for name, value in values.items():
            setattr(dataset, name, value)
        return dataset

    return change


def _delete(name: str) -> Callable[..., object]:
    def change(dataset: object, index: int) -> object:
        delattr(dataset, name)
        return dataset

    return change


def _keep(indices: set[int]) -> Callable[..., object]:
    return lambda dataset, index: dataset if index in indices else None


def _sideways(dataset: object, index: int) -> object:
    if index >= 6:
        x, y, z = (float(v) for v in dataset.ImagePositionPatient)  # type: ignore[attr-defined]
        dataset.ImagePositionPatient = [x + 60, y, z]  # type: ignore[attr-defined]
    return dataset


def _short_pixels(dataset: object, index: int) -> object:
    if index == 5:
        dataset.PixelData = dataset.PixelData[:100]  # type: ignore[attr-defined]
    return dataset


def _unlike_sizes(dataset: object, index: int) -> object:
    dataset.Rows = 20 + index % 12  # type: ignore[attr-defined]
    dataset.PixelData = bytes(2 * dataset.Rows * dataset.Columns)  # type: ignore[attr-defined]
    return dataset


def _header(name: str, text: str, data: bytes = b"") -> Builder:
    return _bytes(name, text.encode() + data)


META = (
    "ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementSpacing = 7 7 8\n"
    "ElementType = MET_SHORT\nElementDataFile = {file}\n"
)
NRRD = (
    "NRRD0004\ntype: {type}\ndimension: 3\nsizes: {sizes}\nspace: left-posterior-superior\n"
    "space directions: (7,0,0) (0,7,0) (0,0,8)\nencoding: raw\nendian: little\n{more}\n"
)


def _npz(**changes: object) -> Builder:
    return lambda folder: write_npz(folder / "case.npz", CHEST, (8.0, 7.0, 6.5), **changes)


def _pickled_npz(folder: Path) -> Path:
    np.savez(folder / "case.npz", imgs=np.array([{"a": 1}], dtype=object), spacing=np.ones(3))
    return folder / "case.npz"


def _nan(voxels: np.ndarray, value: float) -> np.ndarray:
    result = voxels.astype(np.float32)
    result[5, 20, 20] = value
    return result


def _twice(voxels: np.ndarray) -> np.ndarray:
    """HU with the intercept of -1024 applied a second time."""
    return (voxels.astype(np.int32) - 1024).astype(np.int16)


def _scaled(low: float, high: float) -> np.ndarray:
    return (low + (CHEST.astype(np.float32) + 1024) / 4024 * (high - low)).astype(np.float32)


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BAD_INPUTS: tuple[BadInput, ...] = (
    BadInput("a missing file", lambda folder: folder / "absent.nii.gz", UnreadableFileError),
    BadInput("an empty file", _bytes("ct.nii.gz", b""), UnreadableFileError),
    BadInput("a text file named .nii", _bytes("ct.nii", b"hello " * 100), UnreadableFileError),
    BadInput("a photo named .nii.gz", _photo("ct.nii.gz"), UnreadableFileError),
    BadInput("a photo", _photo("scan.jpg"), UnreadableFileError),
    BadInput("a pickle", _bytes("scan.pt", b"\x80\x04\x95abc"), UnreadableFileError),
    BadInput("a truncated gzip", _cut(_nifti(CHEST, "ct.nii.gz"), 0.6), UnreadableFileError),
    BadInput("a gzip with a damaged byte", _gzip_flipped, UnreadableFileError),
    BadInput("a truncated nifti", _cut(_nifti(CHEST), 0.6), UnreadableFileError),
    BadInput("half a nifti header", _cut(_nifti(CHEST), 0.002), UnreadableFileError),
    BadInput("a gzip bomb", _gzip_bomb, InputError),
    BadInput("a 2D nifti", _raw_nifti((44, 40)), NotAChestCTError),
    BadInput("a 4D nifti", _raw_nifti((44, 40, 12, 3)), NotAChestCTError),
    BadInput("a nifti without slices", _nifti(CHEST, dim=[3, 44, 40, 0, 1, 1, 1, 1]), InputError),
    BadInput("a nifti of negative size", _nifti(CHEST, dim=[3, 44, -40, 12, 1, 1, 1, 1]), InputError),
    BadInput("a nifti of absurd size", _nifti(CHEST, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), InputError),
    BadInput("a colored nifti", _rgb, NotAChestCTError),
    BadInput("a nifti with NaN", _nifti(_nan(CHEST, np.nan)), InputError),
    BadInput("a nifti with infinity", _nifti(_nan(CHEST, np.inf)), InputError),
    BadInput("a singular affine", _nifti(CHEST, srow_x=[0, 0, 0, 0]), InputError),
    BadInput("an affine of NaN", _nifti(CHEST, srow_x=[np.nan, 0, 0, 0]), InputError),
    BadInput("two slices", _nifti(CHEST[:2]), InputError),
    BadInput("a stamp-sized scan", _nifti(CHEST[:, :20, :20]), NotAChestCTError),
    BadInput("a scan of 5 m", _nifti(CHEST, affine=affine_of((400.0, 7.0, 6.5))), NotAChestCTError),
    BadInput("a constant image", _nifti(np.full_like(CHEST, -1000)), NotAChestCTError),
    BadInput("values scaled to 0..1", _nifti(_scaled(0, 1)), NotAChestCTError),
    BadInput("values scaled to -1..1", _nifti(_scaled(-1, 1)), NotAChestCTError),
    BadInput("values scaled to 0..255", _nifti(_scaled(0, 255).astype(np.uint8)), NotAChestCTError),
    BadInput("an intercept applied twice", _nifti(_twice(CHEST)), NotAChestCTError),
    BadInput("an empty folder", _empty_folder, SeriesError),
    BadInput("a folder of text", lambda f: _bytes("notes.txt", b"see scan")(f).parent, SeriesError),
    BadInput("a DICOM of another modality", _dicom(_set(Modality="MR")), NotAChestCTError),
    BadInput("a DICOM without positions", _dicom(_delete("ImagePositionPatient")), SeriesError),
    BadInput("a DICOM without orientation", _dicom(_delete("ImageOrientationPatient")), SeriesError),
    BadInput("a DICOM without pixel spacing", _dicom(_delete("PixelSpacing")), SeriesError),
    BadInput("a DICOM without pixels", _dicom(_delete("PixelData")), InputError),
    BadInput("a DICOM with short pixels", _dicom(_short_pixels), InputError),
    BadInput("a DICOM of three slices", _dicom(_keep({3, 4, 5})), SeriesError),
    BadInput("a DICOM with half its slices gone", _dicom(_keep({0, 1, 2, 3, 8, 9, 10, 11})), SeriesError),
    BadInput("a DICOM that jumps sideways", _dicom(_sideways), SeriesError),
    BadInput("a DICOM of unlike sizes", _dicom(_unlike_sizes), SeriesError),
    BadInput("a DICOM localizer", _dicom(_set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])), InputError),
    BadInput("a truncated zip", _cut(_zip({"a": bytes(5000)}), 0.5), InputError),
    BadInput("a zip with ../ paths", _zip({"../../evil": b"x"}), ArchiveError),
    BadInput("a zip with absolute paths", _zip({"/etc/evil": b"x"}), ArchiveError),
    BadInput("a zip with a link", _zip_with_link, ArchiveError),
    BadInput("a zip bomb", _zip({"IM0001": bytes(300_000_000)}), ArchiveError),
    BadInput("a zip without images", _zip({"readme.txt": b"hello"}), InputError),
    BadInput(
        "a MetaImage that points elsewhere",
        _header("ct.mhd", META.format(size="44 40 12", file="/etc/passwd")),
        InputError,
    ),
    BadInput(
        "a MetaImage that climbs",
        _header("ct.mhd", META.format(size="44 40 12", file="../x.raw")),
        InputError,
    ),
    BadInput(
        "a MetaImage without data", _header("ct.mha", META.format(size="44 40 12", file="LOCAL")), InputError
    ),
    BadInput(
        "a MetaImage of absurd size",
        _header("ct.mha", META.format(size="99999 99999 9999", file="LOCAL")),
        InputError,
    ),
    BadInput(
        "a truncated MetaImage", _cut(lambda f: write_itk(f / "ct.mha", CHEST, AFFINE), 0.5), InputError
    ),
    BadInput(
        "an NRRD that points elsewhere",
        _header("ct.nhdr", NRRD.format(type="short", sizes="44 40 12", more="data file: /etc/passwd")),
        InputError,
    ),
    BadInput(
        "an NRRD without data",
        _header("ct.nrrd", NRRD.format(type="short", sizes="44 40 12", more="")),
        InputError,
    ),
    BadInput(
        "an NRRD of unknown type",
        _header("ct.nrrd", NRRD.format(type="quaternion", sizes="44 40 12", more="")),
        InputError,
    ),
    BadInput("a truncated NRRD", _cut(lambda f: write_itk(f / "ct.nrrd", CHEST, AFFINE), 0.5), InputError),
    BadInput("an NPZ with a pickle", _pickled_npz, InputError),
    BadInput("an NPZ without spacing", _npz(spacing=None), InputError),
    BadInput("an NPZ without images", _npz(imgs=None), InputError),
    BadInput("an NPZ without its window", _npz(window=None), NotAChestCTError),
    BadInput("an NPZ with a spacing of zero", _npz(spacing=np.zeros(3)), InputError),
    BadInput("a truncated NPZ", _cut(_npz(), 0.5), InputError),
    BadInput(
        "a nifti with a header size of nonsense",
        _bytes("ct.nii", struct.pack("<i", 12345) + bytes(2000)),
        InputError,
    ),
)
