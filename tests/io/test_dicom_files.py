"""Files of a folder that are no good slices: told where a slice may be missing, passed over where none is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from support.scan_files import affine_of, small_chest, with_values, write_dicom
from vlm3d.errors import InputError, SeriesError, UnreadableFileError
from vlm3d.io import dicom_files, list_series, read_volume

CHEST = small_chest((16, 40, 44))
AFFINE = affine_of()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def top_slices(folder: Path, count: int) -> list[Path]:
    """The files of the highest slices."""
    return sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).InstanceNumber)[-count:]


@pytest.mark.parametrize("spoil", [emptied, zeroed, dangling])
@pytest.mark.parametrize("ending", ["", ".dcm", ".CT", ".17"])
def test_slices_that_cannot_be_used_are_counted(
    tmp_path: Path, spoil: Callable[[Path], None], ending: str
) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    lost = top_slices(folder, 4)
    for path in list(folder.iterdir()):
        path.rename(f"{path}{ending}")
    for path in lost:
        spoil(Path(f"{path}{ending}"))
    scan = read_volume(folder)
    assert scan.shape_DHW[0] == 12
    assert "4 files could not be read or are empty; slices may be missing" in scan.notes


def test_files_and_folders_without_permission_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    (folder / "locked").mkdir()
    forbidden = {*top_slices_but(folder, "locked"), folder / "locked"}
    forbid(monkeypatch, forbidden)
    notes = read_volume(folder).notes
    assert "1 file could not be read or is empty; slices may be missing" in notes
    assert "1 folder could not be opened; slices may be missing" in notes
    forbid(monkeypatch, {folder})
    with pytest.raises(UnreadableFileError, match="permission denied"):
        list_series(folder)


def top_slices_but(folder: Path, name: str) -> list[Path]:
    return [max(path for path in folder.iterdir() if path.name != name)]


def forbid(monkeypatch: pytest.MonkeyPatch, paths: set[Path]) -> None:
    """What a user without permission meets, for root as well."""
    opened, listed = Path.open, dicom_files.os.scandir

    def refuse(path: object) -> None:
        if Path(str(path)) in paths:
            raise PermissionError(13, "Permission denied", str(path))

    def open_checked(path: Path, *arguments: object, **options: object) -> object:
        refuse(path)
        return opened(path, *arguments, **options)  # type: ignore[call-overload]

    def list_checked(path: object) -> object:
        refuse(path)
        return listed(path)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_checked)
    monkeypatch.setattr(dicom_files.os, "scandir", list_checked)


def test_clutter_raises_no_note(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    for name in ("README.txt", ".DS_Store", "thumbs.db", "VERSION", "LOCKFILE", "index.html"):
        (folder / name).write_bytes(b"")
    (folder / "viewer.exe").write_bytes(bytes(500))
    directory = pydicom.dcmread(next(folder.glob("IM*")))
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.DirectoryRecordSequence = []
    for key in ("SOPClassUID", "Rows", "PixelData"):
        delattr(directory, key)
    directory.save_as(folder / "DICOMDIR")
    assert read_volume(folder).notes == ()


def test_a_file_named_dicom_that_is_none_is_damaged(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    (folder / "x.dcm").write_bytes(b"garbage" * 100)
    assert "1 damaged DICOM file left out; slices may be missing" in read_volume(folder).notes


def test_a_folder_of_nothing_but_lost_slices_says_why(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    for path in folder.iterdir():
        emptied(path)
    with pytest.raises(SeriesError, match="16 files could not be read"):
        read_volume(folder)


@pytest.mark.parametrize("key", ["InstanceNumber", "AcquisitionNumber", "KVP", "SliceThickness"])
def test_a_number_that_no_slice_needs_may_be_nonsense(tmp_path: Path, key: str) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE, change=with_values(**{key: "11"}))
    for path in sorted(folder.iterdir())[:3]:
        content = path.read_bytes()
        tag = pydicom.dcmread(path)[key].tag
        start = content.index(tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")) + 8
        assert content[start : start + 2] == b"11"
        path.write_bytes(content[:start] + b"x?" + content[start + 2 :])
    scan = read_volume(folder)
    np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
    assert scan.notes == ()


def deflate(path: Path, extra: bytes = b"") -> None:
    """Deflate a file's elements as DICOM does, with bytes after them."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path, overwrite=True)
    if extra:
        start = 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
        content = path.read_bytes()
        packed = zlib.compressobj(9, wbits=-15)
        plain = zlib.decompress(content[start:], wbits=-15) + extra
        path.write_bytes(content[:start] + packed.compress(plain) + packed.flush())


def test_deflated_slices_are_read_and_those_that_grow_without_end_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dicom(tmp_path / "s", CHEST, AFFINE)
    for path in folder.iterdir():
        deflate(path)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID != ExplicitVRLittleEndian
    np.testing.assert_array_equal(read_volume(folder).voxels_DHW, CHEST)
    monkeypatch.setattr(dicom_files, "MAX_INFLATED_BYTES", 2**20)
    deflate(path, extra=b"\xe0\x7f\x20\x00OB\0\0" + (2**22).to_bytes(4, "little") + bytes(2**22))
    assert path.stat().st_size < 2**15
    with pytest.raises(UnreadableFileError, match="deflated"):
        read_volume(path)
    monkeypatch.setattr(dicom_files, "MAX_INFLATED_BYTES", 100)
    with pytest.raises(InputError):
        read_volume(folder)
