"""How files and foreign exceptions are named in one line of text."""

from __future__ import annotations

from pathlib import Path

_LONGEST = 160


def shown(path: Path) -> str:
    """A file's or folder's name fit to print, without control characters."""
    return printable(path.name or path.absolute().name or str(path))


def printable(text: str) -> str:
    """Text from a file, fit to stand in one line: control characters become question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def reason(error: BaseException) -> str:
    """The first telling line of a library's exception, shortened and without the machine's paths."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0]) if lines else type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def shape_words(shape: tuple[int, ...]) -> str:
    """A grid as people write it: ``512 x 512 x 133``."""
    return " x ".join(str(size) for size in shape)


def counted(count: int, noun: str) -> str:
    """``1 file``, ``4 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def short_uid(uid: str) -> str:
    """The tail of a DICOM UID: enough to tell series apart, too little to look a patient up."""
    return printable(f"…{uid[-6:]}" if len(uid) > 6 else uid)
