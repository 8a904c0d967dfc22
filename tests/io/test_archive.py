"""A zip is a guest: it may bring a scan, and nothing that leaves its folder."""

from __future__ import annotations

import contextlib
import errno
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from support.scan_files import affine_of, small_chest, write_dicom, write_itk, write_nifti
from vlm3d.errors import ArchiveError, ResourceError, SeriesError, VLM3DError
from vlm3d.io import archive, read_volume

CHEST, AFFINE = small_chest(), affine_of()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where archives are unpacked during the test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


def dicom_members(folder: Path) -> dict[str, bytes]:
    return {f"study/{p.name}": p.read_bytes() for p in write_dicom(folder, CHEST, AFFINE).iterdir()}


def test_nothing_stays_after_reading(tmp_path: Path, temporary: Path) -> None:
    path = zip_of(tmp_path / "scan.zip", dicom_members(tmp_path / "s"))
    np.testing.assert_array_equal(read_volume(path).voxels_DHW, CHEST)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/../../evil",
        "/evil",
        "..\\evil",
        "C:\\evil",
        "C:evil",
        "\\\\server\\share\\evil",
        "a" * 300,
    ],
)
def test_paths_that_leave_the_folder_are_refused_before_anything_is_written(
    tmp_path: Path, temporary: Path, name: str
) -> None:
    members = dicom_members(tmp_path / "s") | {name: b"evil"}
    with pytest.raises(ArchiveError):
        read_volume(zip_of(tmp_path / "scan.zip", members))
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]
    assert list(temporary.iterdir()) == []


def test_caps_on_files_bytes_and_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(tmp_path / "scan.zip", {f"{i}": bytes(1000) for i in range(6)})
    for cap, value, words in (
        ("MAX_FILES", 5, "6 files"),
        ("MAX_TOTAL_BYTES", 5999, "more than"),
        ("_RATIO_FREE_BYTES", 10, "zip bomb"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(archive, cap, value)
            patch.setattr(archive, "MAX_RATIO", 20)
            with pytest.raises(ArchiveError, match=words):
                read_volume(path)


def test_caps_on_folders_and_their_depth(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = zip_of(tmp_path / "scan.zip", {"a/" * 400 + "x": b"1"})
    with pytest.raises(ArchiveError, match="400 deep"):
        read_volume(deep)
    monkeypatch.setattr(archive, "MAX_FOLDERS", 50)
    with pytest.raises(ArchiveError, match="folders, more than the 50"):
        read_volume(zip_of(tmp_path / "scan.zip", {f"{i}/{j}/x": b"1" for i in range(10) for j in range(6)}))
    assert list(temporary.iterdir()) == []


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as packed:
        packed.writestr("a/b", b"1")
        packed.writestr("a\\b", b"2")
    with pytest.raises(ArchiveError, match="one name"):
        read_volume(tmp_path / "scan.zip")


def test_an_encrypted_zip_is_named(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "scan.zip", {"a": b"x"})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="encrypted"):
        read_volume(path)


def test_a_full_temporary_folder_is_not_the_archives_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zip_of(tmp_path / "scan.zip", {"a": b"x"})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "_write_entry", full)
    with pytest.raises(ResourceError, match="no space left on device"):
        read_volume(path)


def test_any_single_damaged_byte_is_found_or_harmless(tmp_path: Path) -> None:
    """Checksums of the archive: what is read is either the scan or an error, never another scan."""
    content = zip_of(tmp_path / "scan.zip", dicom_members(tmp_path / "s")).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(content), 25):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        (tmp_path / "scan.zip").write_bytes(damaged)
        with contextlib.suppress(VLM3DError):
            scan = read_volume(tmp_path / "scan.zip")
            np.testing.assert_array_equal(scan.voxels_DHW, CHEST)


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.mhd", "ct.nrrd"])
def test_a_zip_or_folder_around_one_image_of_another_format(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (write_nifti if name == "ct.nii.gz" else write_itk)(folder / name, CHEST, AFFINE)
    zip_of(tmp_path / "scan.zip", {p.name: p.read_bytes() for p in folder.iterdir()})
    for path in (folder, tmp_path / "scan.zip"):
        scan = read_volume(path)
        np.testing.assert_array_equal(scan.voxels_DHW, CHEST)
        assert scan.source == path.name
        assert any(name in note for note in scan.notes)


def test_a_broken_series_is_not_replaced_by_an_image_beside_it(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", CHEST, AFFINE, change=lambda d, i: d if i < 4 else None)
    write_nifti(tmp_path / "series" / "ct.nii.gz", CHEST, AFFINE)
    with pytest.raises(SeriesError, match="at least 8"):
        read_volume(tmp_path / "series")
