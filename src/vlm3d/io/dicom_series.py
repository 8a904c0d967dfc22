"""Which series of a DICOM folder is the chest CT."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import NotAChestCTError, SeriesError
from vlm3d.io.body_part import CHEST, LUNG, OTHER
from vlm3d.io.dicom_headers import SAME_PLACE_MM, Slice
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
        body_part: As the header codes it, where it does.
        acquisition: Its number where one series UID holds several acquisitions of the same place, else None.
        plane: ``"axial"``, ``"other"``, or ``"localizer"`` for scouts and screenshots.
        derived: Whether it was computed from other images.
    """

    number: int
    uid: str
    modality: str
    slices: int
    shape: tuple[int, int]
    kernel: str
    body_part: str
    acquisition: int | None
    plane: str
    derived: bool

    def __str__(self) -> str:
        words = (
            f"{self.number}: {self.modality or 'no modality'} {short_uid(self.uid)}, {self.slices} x "
            f"{shape_words(self.shape)} {'derived ' if self.derived else ''}{self.plane}"
        )
        if self.body_part:
            words += f", {self.body_part}"
        if self.acquisition is not None:
            words += f", acquisition {self.acquisition}"
        return words + (f", kernel {self.kernel}" if self.kernel else "")


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
    parts = [
        (part, len(apart) > 1)
        for group in groups.values()
        for apart in [_acquisitions_apart(group)]
        for part in apart
    ]
    parts.sort(key=lambda part: _likelihood(part[0]), reverse=True)
    return [
        Series(_info(number, part, several), tuple(part))
        for number, (part, several) in enumerate(parts, start=1)
    ]


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
        SeriesError: None fits, or `wanted` names none or, by its UID, several.
        NotAChestCTError: There are images but no CT, or `wanted` is none.
    """
    candidates, what = found, name
    if wanted is not None:
        candidates = [s for s in found if wanted.strip() in (str(s.info.number), s.info.uid)]
        what = f"series {short_uid(wanted.strip())} of {name}"
        if not candidates:
            raise SeriesError(f"{name} has no series '{short_uid(wanted)}'; it has {_listing(found)}.")
    elif within is not None:
        found = candidates = [s for s in found if any(item.path == within for item in s.slices)]
    if not candidates:
        raise SeriesError(f"{name} holds no DICOM image. Give the folder of a CT series.")
    volumes = _ct_volumes(candidates, what)
    if wanted is not None and len(volumes) > 1:
        raise SeriesError(
            f"{name} has {len(volumes)} series of that UID ({_listing(volumes)}). Choose one by its number."
        )
    best = volumes[0]
    notes = _choice_notes(best, found)
    if _names_another_part(best.slices[0]):
        notes = (*notes, "the header names another part of the body than the chest")
    patients = {item.owner for s in volumes for item in s.slices}
    if len(patients) > 1:
        notes = (*notes, f"{len(patients)} different patients or studies lie here; only one of them was read")
    return best, notes


def _ct_volumes(candidates: list[Series], what: str) -> list[Series]:
    """Those that may be a chest CT, at least one, in their order."""
    cts = [s for s in candidates if s.info.modality == "CT"]
    if not cts:
        modalities = ", ".join(sorted({s.info.modality or "unknown" for s in candidates}))
        raise NotAChestCTError(f"{what} holds DICOM of modality {modalities}, not CT. Give a chest CT.")
    pictures = [s for s in cts if s.info.plane != "localizer"]
    if not pictures:
        raise SeriesError(f"{what} holds only scout views or screenshots. Give the axial CT series.")
    volumes = [s for s in pictures if s.info.slices >= MIN_SLICES]
    if not volumes:
        raise SeriesError(
            f"{what} has no series of at least {MIN_SLICES} slices ({_listing(candidates)}). Give the whole "
            "series."
        )
    return volumes


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
        not _names_another_part(first),
        first.is_axial,
        not first.is_derived,
        _names_the_chest(first),
        len(group),
        not kernel_is_sharp(first.kernel),
        first.series_uid,
        first.owner,
    )


def _names_the_chest(item: Slice) -> bool:
    """By the header's words; "lung" in those of a sharp kernel's series may mean the kernel."""
    return CHEST in item.named_parts or (LUNG in item.named_parts and not kernel_is_sharp(item.kernel))


def _names_another_part(item: Slice) -> bool:
    return OTHER in item.named_parts and not item.named_parts & {CHEST, LUNG}


def _acquisitions_apart(group: list[Slice]) -> list[list[Slice]]:
    """A series' slices in parts within which no acquisition lies over another.

    Breathing states and contrast phases lie over each other, and mixed they are no volume; acquisitions that continue
    each other, with some slices in common at the seam, are one.
    """
    normal = group[0].normal_lps
    if normal is None or any(item.position_lps is None for item in group):
        return [group]
    acquisitions: dict[int, list[Slice]] = defaultdict(list)
    without_number = [item for item in group if item.acquisition is None]
    for item in group:
        if item.acquisition is not None:
            acquisitions[item.acquisition].append(item)
    parts: list[list[Slice]] = []
    for members in sorted(acquisitions.values(), key=lambda members: _heights(members, normal)[0]):
        part = next((part for part in parts if _continues(part, members, normal)), None)
        if part is None:
            parts.append(list(members))
        else:
            part.extend(members)
    if not parts:
        return [group]
    max(parts, key=len).extend(without_number)
    return parts


def _continues(part: list[Slice], members: list[Slice], normal: NDArray[np.float64]) -> bool:
    """Whether slices go on where a part ends, or share less than half of the shorter with it, place by place."""
    first, then = _heights(part, normal), _heights(members, normal)
    if then[0] >= first[-1] - SAME_PLACE_MM:
        return True
    twice, again = first[first >= then[0] - SAME_PLACE_MM], then[then <= first[-1] + SAME_PLACE_MM]
    return (
        2 * len(twice) < min(len(first), len(then))
        and len(twice) == len(again)
        and bool(np.abs(twice - again).max() <= SAME_PLACE_MM)
    )


def _heights(members: list[Slice], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places along a normal, from the lowest up."""
    return np.sort([float(item.position_lps @ normal) for item in members if item.position_lps is not None])


def _info(number: int, group: list[Slice], several: bool) -> SeriesInfo:
    first = group[0]
    return SeriesInfo(
        number=number,
        uid=first.series_uid,
        modality=first.modality,
        slices=len(group),
        shape=(first.rows, first.columns),
        kernel=first.kernel,
        body_part=first.body_part,
        acquisition=first.acquisition if several else None,
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
