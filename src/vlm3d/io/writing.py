"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vlm3d.errors import OutputError
from vlm3d.io.wording import shown


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only once everything in it is on disk.

    The bytes go to a hidden neighbor first, so a full disk, a crash or Ctrl-C leaves either the old file or
    none.

    Args:
        path: Where the file belongs; its folder must exist.

    Raises:
        OutputError: The operating system refuses (no permission, full disk, no such folder, a folder in its
        place).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        words = (error.strerror or type(error).__name__).lower()
        raise OutputError(
            f"{shown(path)} cannot be written: {words}. Choose another output folder or make room."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text is UTF-8.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_writer(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a hidden folder to fill; when the block ends well it takes its place under `folder`.

    What stood there before is set aside and removed last, so a failure leaves it as it was. Whether it may be replaced
    is the caller's to check.

    Raises:
        OutputError: The operating system refuses (no permission, full disk).
    """
    folder = Path(folder)
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name[:80]}.", dir=folder.parent))
        fresh.chmod(0o755)
        yield fresh
        _take_place(fresh, folder)
    except OSError as error:
        words = (error.strerror or str(error) or type(error).__name__).lower()
        raise OutputError(
            f"{shown(folder)} cannot be written: {words}. Choose another folder or make room."
        ) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def settle_folder(folder: str | Path) -> None:
    """Put right what a kill in the midst of `whole_folder` left: the earlier folder back, half-written ones gone.

    For a folder that no other process is writing.
    """
    folder = Path(folder)
    left = sorted(folder.parent.glob(f".{glob.escape(folder.name[:80])}.*"))
    for path in left:
        if path.suffix == ".old" and not folder.exists():
            path.replace(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def _take_place(fresh: Path, folder: Path) -> None:
    old = fresh.with_name(f"{fresh.name}.old")
    if folder.exists():
        folder.replace(old)
    try:
        fresh.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
