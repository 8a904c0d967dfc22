"""Which series of a DICOM folder is the chest CT."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm3d.errors import NotAChestCTError, SeriesError
from vlm3d.io.dicom_headers import Slice
from vlm3d.io.limits import MIN_SLICES
from vlm3d.io.wording import shape_words, short_uid

_LISTED = 6


@dataclass(frozen=True)
class SeriesInfo:
    """One series that can be chosen, without patient data.

    Attributes:
        number: 1 for the likeliest chest CT, then in falling likelihood; `read_volume` takes it as
        ``series="2"``.
        uid: Series instance UID; `read_volume` takes it, too. Shown to people only shortened.
        modality: Such as ``"CT"``.
        slices: Image planes.
        shape: Rows and columns.
        kernel: Reconstruction kernel, where stated.
        plane: ``"axial"``, ``"other"``, or ``"localizer"`` for scouts and screenshots.
        derived: Whether it was computed from other images.
    """

    number: int
    uid: str
    modality: str
    slices: int
    shape: tuple[int, int]
    kernel: str
    plane: str
    derived: bool

    def __str__(self) -> str:
        kernel = f", kernel {self.kernel}" if self.kernel else ""
        return (
            f"{self.number}: {self.modality or 'no modality'} {short_uid(self.uid)}, {self.slices} x "
            f"{shape_words(self.shape)} {'derived ' if self.derived else ''}{self.plane}{kernel}"
        )


@dataclass(frozen=True, eq=False)
class Series:
    """Slices that may form one volume: of one patient, series, orientation and grid."""

    info: SeriesInfo
    slices: tuple[Slice, ...]


def group_series(slices: list[Slice]) -> list[Series]:
    """Sort slices into series, the likeliest chest CT first."""
    groups: dict[tuple[object, ...], list[Slice]] = defaultdict(list)
    for item in slices:
        groups[_group_key(item)].append(item)
    ordered = sorted(groups.values(), key=_likelihood, reverse=True)
    return [Series(_info(number, group), tuple(group)) for number, group in enumerate(ordered, start=1)]


def choose_series(
    found: list[Series], name: str, wanted: str | None = None, within: Path | None = None
) -> tuple[Series, tuple[str, ...]]:
    """Pick the chest CT, or the one that the user asked for.

    Args:
        found: As `group_series` gives them.
        name: Folder or file as shown to the user.
        wanted: Number or UID of a series.
        within: A file that the series must hold.

    Returns:
        The series and the notes for the user.

    Raises:
        SeriesError: None fits, or `wanted` names none.
        NotAChestCTError: There are images but no CT.
    """
    if wanted is not None:
        matching = [s for s in found if wanted.strip() in (str(s.info.number), s.info.uid)]
        if not matching:
            raise SeriesError(f"{name} has no series '{short_uid(wanted)}'; it has {_listing(found)}.")
        return matching[0], _choice_notes(matching[0], found)
    if within is not None:
        found = [s for s in found if any(item.path == within for item in s.slices)]
    if not found:
        raise SeriesError(f"{name} holds no DICOM image. Give the folder of a CT series.")
    cts = [s for s in found if s.info.modality == "CT"]
    if not cts:
        modalities = ", ".join(sorted({s.info.modality or "unknown" for s in found}))
        raise NotAChestCTError(f"{name} holds DICOM of modality {modalities}, not CT. Give a chest CT.")
    volumes = [s for s in cts if s.info.plane != "localizer"]
    if not volumes:
        raise SeriesError(f"{name} holds only scout views or screenshots. Give the axial CT series.")
    best = volumes[0]
    if best.info.slices < MIN_SLICES:
        raise SeriesError(
            f"{name} has no series of at least {MIN_SLICES} slices ({_listing(found)}). Give the whole "
            "series."
        )
    patients = {item.owner for s in volumes for item in s.slices if s.info.slices >= MIN_SLICES}
    notes = _choice_notes(best, found)
    if len(patients) > 1:
        notes = (*notes, f"{len(patients)} different patients or studies lie here; only one of them was read")
    return best, notes


def kernel_is_sharp(kernel: str) -> bool:
    """Whether a reconstruction kernel is a lung or bone kernel, by the makers' naming."""
    word = kernel.upper()
    if any(part in word for part in ("LUNG", "BONE", "EDGE", "SHARP", "DETAIL")):
        return True
    siemens = re.match(r"(?:B|BR|BF|BL|BV|QR|I|J)(\d{2})", word)
    if siemens:
        return int(siemens.group(1)) >= 50
    canon = re.match(r"FC(\d{2})", word)
    if canon:
        return int(canon.group(1)) >= 30
    return word in ("L", "D", "E", "YA", "YB", "YC", "YD")


def _group_key(item: Slice) -> tuple[object, ...]:
    direction = (
        None if item.orientation_lps is None else tuple(np.round(item.orientation_lps.ravel(), 2) + 0.0)
    )
    spacing = None if item.pixel_spacing_mm is None else tuple(round(s, 4) for s in item.pixel_spacing_mm)
    grid = (item.rows, item.columns, item.samples, spacing)
    return item.owner, item.series_uid, item.modality, item.is_localizer, direction, grid


def _likelihood(group: list[Slice]) -> tuple[object, ...]:
    first = group[0]
    return (
        first.modality == "CT",
        not first.is_localizer,
        first.position_lps is not None and first.samples == 1,
        len(group) >= MIN_SLICES,
        first.is_axial,
        not first.is_derived,
        len(group),
        not kernel_is_sharp(first.kernel),
        first.series_uid,
        first.owner,
    )


def _info(number: int, group: list[Slice]) -> SeriesInfo:
    first = group[0]
    return SeriesInfo(
        number=number,
        uid=first.series_uid,
        modality=first.modality,
        slices=len(group),
        shape=(first.rows, first.columns),
        kernel=first.kernel,
        plane="localizer" if first.is_localizer else "axial" if first.is_axial else "other",
        derived=first.is_derived,
    )


def _choice_notes(chosen: Series, found: list[Series]) -> tuple[str, ...]:
    others = [s for s in found if s is not chosen]
    if not others:
        return ()
    return (f"{len(found)} series found; read {chosen.info}. Others: {_listing(others)}",)


def _listing(found: list[Series]) -> str:
    words = "; ".join(str(s.info) for s in found[:_LISTED])
    return words + (f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else "")
