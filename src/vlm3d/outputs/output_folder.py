"""An output folder that appears complete or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm3d.errors import OutputError

logger = logging.getLogger(__name__)

PREDICTION_FILE = "prediction.json"
REPORT_FILE = "report.txt"
PAGE_FILE = "report.html"
MASK_FOLDER = "masks"

_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EINVAL)  # a mounted folder stays where it is


def check_out_dir(out_dir: Path, *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, a folder that could not be written in the end.

    Raises:
        OutputError: It is a file, holds files already (and `overwrite` is off, or some are not vlm3d's), or may not
            be written to.
    """
    try:
        if _exists(out_dir):
            _check_existing(out_dir, overwrite)
            return
        nearest = next(parent for parent in out_dir.absolute().parents if _exists(parent))
        if not nearest.is_dir():
            raise OutputError(
                f"{nearest} is a file, so {out_dir} cannot be a folder in it: choose another folder"
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"no permission to create {out_dir} in {nearest}: choose another folder")
    except OSError as error:
        raise _one_line(error, out_dir) from error


@contextmanager
def complete_folder(out_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a fresh folder to write into; when the block ends well, it becomes `out_dir` in one rename.

    A failure leaves what was there before, and nothing else. An earlier output is set aside, replaced and only then
    removed. Where `out_dir` cannot be renamed (a mounted folder, the working directory), the files are written inside
    it and moved up one by one, ``prediction.json`` last.

    Args:
        out_dir: The folder to create.
        overwrite: Replace an earlier output of vlm3d. Folders with anything else in them are refused.

    Yields:
        The folder to write into.

    Raises:
        OutputError: The folder is refused or cannot be written; `OSError` in the block becomes one too.
    """
    check_out_dir(out_dir, overwrite=overwrite)
    final = out_dir.resolve()
    created: list[Path] = []
    staging: Path | None = None
    try:
        inside = final.is_dir() and not _can_be_renamed(final)
        parent = final if inside else final.parent
        created = _create_parents(parent)
        staging = parent / f".vlm3d-{secrets.token_hex(6)}"
        staging.mkdir()
        yield staging
        if final.exists():  # again: minutes may have passed
            _check_existing(final, overwrite, staging_name=staging.name)
        if inside:
            _move_into(staging, final)
        else:
            _swap(staging, final)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise _one_line(error, out_dir) from error
        raise


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _check_existing(out_dir: Path, overwrite: bool, staging_name: str = "") -> None:
    if not out_dir.is_dir():
        raise OutputError(f"{out_dir} is a file, not a folder: choose another folder")
    names = sorted(path.name for path in out_dir.iterdir() if path.name != staging_name)
    if names and not overwrite:
        raise OutputError(
            f"{out_dir} is not empty ({_list(names)}): choose a new folder, or overwrite an earlier output"
        )
    foreign = [name for name in _foreign_files(out_dir) if name.split("/")[0] != staging_name]
    if foreign:
        raise OutputError(
            f"{out_dir} holds files that vlm3d did not write ({_list(foreign)}), so it is not replaced: "
            "choose another folder"
        )
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write into {out_dir}: choose another folder")


def _foreign_files(folder: Path) -> list[str]:
    """What in an earlier output is not vlm3d's own; all of it where no prediction says which masks belong."""
    own_files = {PREDICTION_FILE, REPORT_FILE, PAGE_FILE} | _own_masks(folder / PREDICTION_FILE)
    if not (folder / PREDICTION_FILE).is_file():
        own_files = set()
    own_folders = {MASK_FOLDER} if own_files else set()
    foreign = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        plain_folder = path.is_dir() and not path.is_symlink()
        plain_file = path.is_file() and not path.is_symlink()
        if not (plain_folder and name in own_folders) and not (plain_file and name in own_files):
            foreign.append(name)
    return foreign


def _own_masks(prediction_file: Path) -> set[str]:
    try:
        lesions = json.loads(prediction_file.read_text(encoding="utf-8"))["lesions"]
        return {str(lesion["mask_file"]) for lesion in lesions if lesion["mask_file"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _can_be_renamed(folder: Path) -> bool:
    working = Path.cwd().resolve()
    return (
        not os.path.ismount(folder)
        and os.access(folder.parent, os.W_OK | os.X_OK)
        and folder != working
        and folder not in working.parents
    )


def _create_parents(folder: Path) -> list[Path]:
    """Create a folder with its parents; returns those that were missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _swap(staging: Path, final: Path) -> None:
    """Put the complete folder in its place; an earlier one is moved aside first and removed last."""
    if not final.exists():
        staging.rename(final)
        return
    aside = final.parent / f".vlm3d-{secrets.token_hex(6)}"
    try:
        final.rename(aside)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
        inner = final / staging.name
        try:
            shutil.copytree(staging, inner)
            _move_into(inner, final)
        finally:
            shutil.rmtree(inner, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)
        return
    try:
        staging.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    _remove_earlier(aside)


def _move_into(staging: Path, final: Path) -> None:
    """Put complete entries into a folder that must stay, in place of an earlier output's; undone where a move fails.

    ``prediction.json``, the proof of completeness, goes last.
    """
    aside = final / f".vlm3d-{secrets.token_hex(6)}"
    earlier = [path for path in final.iterdir() if path != staging]
    entries = sorted(staging.iterdir(), key=lambda entry: entry.name == PREDICTION_FILE)
    aside.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for folder, paths in ((aside, earlier), (final, entries)):
            for path in paths:
                path.rename(folder / path.name)
                moved.append((path, folder / path.name))
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        aside.rmdir()
        raise
    _remove_earlier(aside)
    staging.rmdir()


def _remove_earlier(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("the earlier output, now %s, could not be removed: %s", folder, error.strerror)


def _list(names: list[str], at_most: int = 3) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _one_line(error: OSError, out_dir: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"the disk is full: {out_dir} was not written; free some space or choose another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"no permission to write {out_dir}: choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(f"{out_dir} lies under a file, not a folder: choose another folder")
    if error.errno == errno.ENAMETOOLONG:
        return OutputError(
            f"the path of the output has {len(str(out_dir))} characters, too long: choose a shorter one"
        )
    return OutputError(f"{out_dir} cannot be written: {error.strerror or type(error).__name__}")
