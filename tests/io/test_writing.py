"""A file is written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from support.scan_files import affine_of
from vlm3d.errors import OutputError
from vlm3d.io import atomic_writer, settle_folder, whole_folder, write_atomically, write_nifti_mask


def test_text_and_bytes_arrive(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "Befund: unauffällig")
    write_atomically(tmp_path / "b.bin", b"\0\1")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Befund: unauffällig"
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.bin"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "old")

    def fail_midway() -> None:
        with atomic_writer(tmp_path / "a.txt") as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_midway()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with atomic_writer(tmp_path / "mask.nii.gz") as file:
            file.write(b"some")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OutputError, match=r"^mask\.nii\.gz cannot be written: no space left on device"
    ) as caught:
        fill_the_disk()
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_device_is_refused() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("target", ["missing/mask.nii.gz", "folder", "file/mask.nii.gz"])
def test_places_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("in the way")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_nifti_mask(np.ones((2, 3, 4), bool), affine_of(), tmp_path / target)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_programming_fault_is_not_dressed_as_the_users() -> None:
    with pytest.raises(ValueError, match="3D and integer"):
        write_nifti_mask(np.ones((2, 3, 4)), affine_of(), "mask.nii.gz")


def test_a_kill_between_old_and_new_folder_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    with whole_folder(folder) as fresh:
        (fresh / "a").write_text("kept")
    folder.replace(tmp_path / ".last.abc.old")  # the kill came after the first of two renames
    (tmp_path / ".last.abc").mkdir()
    (tmp_path / ".lasting.x.old").mkdir()  # another folder's
    settle_folder(folder)
    assert (folder / "a").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lasting.x.old", "last"]
    settle_folder(folder)
    assert (folder / "a").read_text() == "kept"


def test_what_was_set_aside_goes_once_the_new_folder_stands(tmp_path: Path) -> None:
    (tmp_path / ".last.abc.old").mkdir()
    (tmp_path / "last").mkdir()
    settle_folder(tmp_path / "last")
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
