"""Folders that appear whole or not at all, also where they are mounted, in use, or somebody else's."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm3d.errors import OutputError
from vlm3d.outputs.output_folder import check_out_dir, complete_folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(folder: Path, text: str, masks: tuple[str, ...] = ("a",)) -> None:
    (folder / "masks").mkdir()
    for name in masks:
        (folder / "masks" / f"{name}.nii.gz").write_text(text)
    (folder / "report.txt").write_text(text)
    lesions = [{"mask_file": f"masks/{name}.nii.gz"} for name in masks]
    (folder / "prediction.json").write_text(json.dumps({"text": text, "lesions": lesions}))


def write(out: Path, text: str, *, overwrite: bool = False, masks: tuple[str, ...] = ("a",)) -> None:
    with complete_folder(out, overwrite=overwrite) as folder:
        fill(folder, text, masks)


def write_half(out: Path, fault: BaseException) -> None:
    with complete_folder(out, overwrite=True) as folder:
        (folder / "report.txt").write_text("half")
        raise fault


def write_while_another_does(out: Path) -> None:
    with complete_folder(out) as folder:
        fill(folder, "ours")
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")


@pytest.fixture(params=["beside", "mounted", "busy", "working directory"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An existing, empty output folder of each kind: free, known as mounted, found busy on renaming, in use."""
    folder = tmp_path / "out"
    folder.mkdir()
    if request.param == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    elif request.param == "busy":
        rename = Path.rename

        def busy(self: Path, target: Any) -> Path:
            if self == folder:
                raise OSError(errno.EBUSY, "Device or resource busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", busy)
    elif request.param == "working directory":
        monkeypatch.chdir(folder)
    return folder


def test_an_empty_folder_is_filled_and_nothing_lies_beside_it(out: Path) -> None:
    write(out, "new")
    assert sorted(contents(out)) == ["masks/a.nii.gz", "prediction.json", "report.txt"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["masks", "prediction.json", "report.txt"]


def test_an_earlier_output_goes_as_a_whole(out: Path) -> None:
    write(out, "old", masks=("a", "b"))
    write(out, "new", overwrite=True)
    assert sorted(contents(out)) == ["masks/a.nii.gz", "prediction.json", "report.txt"]
    assert contents(out)["report.txt"] == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_while_writing_changes_nothing(out: Path) -> None:
    write(out, "old")
    before = contents(out)
    with pytest.raises(OutputError, match="disk is full"):
        write_half(out, OSError(errno.ENOSPC, "No space left on device"))
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_while_moving_is_undone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, "old")
    before = contents(out)
    rename = Path.rename

    failed: list[Path] = []

    def failing(self: Path, target: Any) -> Path:
        if Path(target) in (out, out / "prediction.json") and not failed:
            failed.append(Path(target))
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written"):
        write(out, "new", overwrite=True)
    assert failed
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing_and_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a" / "b" / "out", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", "new")
    assert contents(tmp_path / "a" / "b" / "out")["report.txt"] == "new"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")["report.txt"] == "new"


def add_file(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def add_mask_of_another(folder: Path) -> None:
    (folder / "masks" / "mine.nii.gz").write_text("mine")


def add_folder(folder: Path) -> None:
    (folder / "mine").mkdir()


def replace_by_link(folder: Path) -> None:
    (folder / "report.txt").unlink()
    (folder / "report.txt").symlink_to(folder / "prediction.json")


def damage_the_prediction(folder: Path) -> None:
    (folder / "prediction.json").write_text("[")


def remove_the_prediction(folder: Path) -> None:
    (folder / "prediction.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        add_file,
        add_mask_of_another,
        add_folder,
        replace_by_link,
        damage_the_prediction,
        remove_the_prediction,
    ],
)
def test_a_folder_with_anything_else_is_never_replaced(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    change(out)
    before = contents(out)
    with pytest.raises(OutputError, match="did not write"):
        write(out, "new", overwrite=True)
    assert contents(out) == before


def test_what_appears_while_writing_is_respected(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"):
        write_while_another_does(out)
    assert contents(out) == {"theirs.txt": "theirs"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_permission_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(OutputError, match="no permission"):
            check_out_dir(folder)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "no permission"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_every_fault_is_one_line(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(OutputError, match=words) as caught:
        write_half(tmp_path / "out", OSError(number, os.strerror(number)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"):
        write(tmp_path / ("x" * 300), "new")
