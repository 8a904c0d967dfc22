"""CT-RATE's tables: labels, reports and acquisition by volume, whatever the files are called.

A table is known by its columns, so that neither its name, its folder nor its columns' order matters:

| table | columns |
|---|---|
| labels | ``VolumeName`` and the 18 diseases, 0 or 1 |
| reports | ``VolumeName``, ``Findings_EN``, ``Impressions_EN`` (and ``ClinicalInformation_EN``, ``Technique_EN``) |
| metadata | ``VolumeName``, ``RescaleSlope``, ``RescaleIntercept``, ``XYSpacing``, ``ZSpacing`` and 39 more |

Lists of volumes that show no chest are text files with ``no_chest`` in their name, one volume a line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from vlm3d.datasets.join_summary import JoinSummary
from vlm3d.errors import DataError
from vlm3d.labels import DISEASE_NAMES

NAME_COLUMN = "VolumeName"
FINDINGS, IMPRESSION = "Findings_EN", "Impressions_EN"
ACQUISITION_COLUMNS = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
GEOMETRY_COLUMNS = ("ImageOrientationPatient", "ImagePositionPatient")
NOT_GIVEN = frozenset({"", "not given", "not given.", "nan", "none"})

_LONGEST_FIELD = 1_000_000
_IMAGE_SUFFIX = re.compile(r"\.(nii\.gz|nii|npz)$", re.IGNORECASE)
Row = TypeVar("Row")


@dataclass(frozen=True)
class Acquisition:
    """How one volume was taken: what a first-release file lacks.

    Attributes:
        slope: HU = slope x stored + intercept.
        intercept: In HU.
        spacing_mm: Voxel size along (D, H, W).
        directions: Unit vectors (L, P, S) along which columns and rows are counted, six numbers as DICOM writes them.
        position_mm: (L, P, S) of the first voxel.
        manufacturer: Of the scanner, or empty.
        kernel: Of the reconstruction, or empty.
    """

    slope: float
    intercept: float
    spacing_mm: tuple[float, float, float]
    directions: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    position_mm: tuple[float, ...] = (0.0, 0.0, 0.0)
    manufacturer: str = ""
    kernel: str = ""


@dataclass
class CTRateTables:
    """Rows by volume, without the file's ending.

    Attributes:
        labels: 0, 1 or NaN for each of the 18 diseases.
        reports: "Findings: …" and "Impression: …", each on its own line.
        acquisitions: From the metadata.
        no_chest: Volumes that show no chest.
        files: Names of the tables that were read.
    """

    labels: dict[str, tuple[float, ...]] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    acquisitions: dict[str, Acquisition] = field(default_factory=dict)
    no_chest: set[str] = field(default_factory=set)
    files: list[str] = field(default_factory=list)


@lru_cache(maxsize=2**17)
def volume_key(name: str) -> str:
    """A volume's name without folder and ending: ``valid_2_a_1`` for ``…/valid_2_a_1.nii.gz``."""
    return _IMAGE_SUFFIX.sub("", name.strip().replace("\\", "/").rpartition("/")[2])


def read_tables(paths: Iterable[Path], summary: JoinSummary) -> CTRateTables:
    """Read all of CT-RATE's tables among some files; other tables are left alone.

    Args:
        paths: CSV and TXT files.
        summary: Gets what was odd: rows twice, rows that contradict each other, values that are no label …

    Raises:
        DataError: A table cannot be read, or lacks some of its columns.
    """
    tables = CTRateTables()
    dropped: dict[str, set[str]] = {"labels": set(), "reports": set(), "metadata": set()}
    for path in sorted(paths):
        if path.suffix.lower() == ".txt":
            if "no_chest" in path.name.lower():
                tables.no_chest |= {volume_key(line) for line in _text(path).splitlines() if line.strip()}
                tables.files.append(path.name)
            continue
        header, rows = _open_table(path, summary)
        if NAME_COLUMN not in header:
            continue
        if len(set(header) & set(DISEASE_NAMES)) > len(DISEASE_NAMES) // 2:
            _need(path, header, DISEASE_NAMES)
            _fill(tables.labels, rows, _label_reader(header, summary), "labels", dropped, summary)
        elif FINDINGS in header or IMPRESSION in header:
            _need(path, header, (FINDINGS, IMPRESSION))
            _fill(tables.reports, rows, _report_reader(header, summary), "reports", dropped, summary)
        elif set(header) & set(ACQUISITION_COLUMNS):
            _need(path, header, ACQUISITION_COLUMNS)
            _fill(
                tables.acquisitions, rows, _acquisition_reader(header, summary), "metadata", dropped, summary
            )
        else:
            continue
        tables.files.append(path.name)
    return tables


def report_text(findings: str, impression: str) -> str | None:
    """CT-RATE's two columns as one report, or None where neither says anything."""
    parts = {"Findings": _said(findings), "Impression": _said(impression)}
    return "\n".join(f"{heading}: {text}" for heading, text in parts.items() if text) or None


def _said(text: str) -> str:
    """A cell's text on one line; what only says that nothing is given is nothing."""
    text = " ".join(text.split())
    return "" if text.lower() in NOT_GIVEN else text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding=_encoding(path))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path.name} cannot be read as UTF-8 text: save it as UTF-8") from error


def _encoding(path: Path) -> str:
    """UTF-8 with or without its mark, or the UTF-16 that spreadsheets write."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _open_table(path: Path, summary: JoinSummary) -> tuple[list[str], Iterator[list[str]]]:
    """The header, and the rows of a table; rows of another length are counted and left out."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding=_encoding(path), newline="", errors="replace") as file:
            first = file.readline()
        separator = max(",;\t", key=first.count)
        header = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path.name} cannot be read as a UTF-8 table: {error}") from error
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if NAME_COLUMN in header and repeated:
        raise DataError(f"{path.name} has the column '{repeated[0]}' more than once: keep one")
    return header, _rows(path, separator, len(header), header, summary)


def _rows(
    path: Path, separator: str, width: int, header: Sequence[str], summary: JoinSummary
) -> Iterator[list[str]]:
    name_at = header.index(NAME_COLUMN) if NAME_COLUMN in header else 0
    broken: list[str] = []
    try:
        with path.open(encoding=_encoding(path), newline="") as file:
            reader = csv.reader(file, delimiter=separator)
            next(reader, None)
            for row in reader:
                if len(row) == width and row[name_at].strip():
                    yield row
                elif any(cell.strip() for cell in row):
                    broken.append(f"{path.name} line {reader.line_num}")
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(
            f"{path.name} cannot be read as a table: {error}; is a quotation mark unclosed?"
        ) from error
    summary.note("rows with another number of columns, left out", broken)


def _need(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path.name} lacks {len(missing)} of its columns: {', '.join(missing)}; give CT-RATE's own table"
        )


def _fill(
    into: dict[str, Row],
    rows: Iterator[list[str]],
    read: Callable[[list[str]], tuple[str, Row | None]],
    table: str,
    dropped: Mapping[str, set[str]],
    summary: JoinSummary,
) -> None:
    """Read a table's rows; a row twice counts once, and rows that contradict each other count not at all."""
    twice, contradicting = [], []
    out = dropped[table]
    for row in rows:
        name, value = read(row)
        if value is None or name in out:
            continue
        known = into.get(name)
        if known is None:
            into[name] = value
        elif repr(known) == repr(value):
            twice.append(name)
        else:
            contradicting.append(name)
            out.add(name)
            del into[name]
    summary.note(f"rows of {table} given twice alike, counted once", twice)
    summary.note(f"volumes whose rows of {table} contradict each other, left out", contradicting)


def _label_reader(
    header: Sequence[str], summary: JoinSummary
) -> Callable[[list[str]], tuple[str, tuple[float, ...]]]:
    name_at, columns = header.index(NAME_COLUMN), [header.index(name) for name in DISEASE_NAMES]
    known = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}

    def read(row: list[str]) -> tuple[str, tuple[float, ...]]:
        name = volume_key(row[name_at])
        values = tuple([known.get(row[column].strip(), math.nan) for column in columns])
        if math.nan in values:
            summary.note("volumes with labels that are neither 0 nor 1, taken as unknown", [name])
        return name, values

    return read


def _report_reader(
    header: Sequence[str], summary: JoinSummary
) -> Callable[[list[str]], tuple[str, str | None]]:
    name_at, findings_at, impression_at = (
        header.index(column) for column in (NAME_COLUMN, FINDINGS, IMPRESSION)
    )

    def read(row: list[str]) -> tuple[str, str | None]:
        name = volume_key(row[name_at])
        text = report_text(row[findings_at], row[impression_at])
        if text is None:
            summary.note("reports without a word, left out", [name])
        return name, text

    return read


def _acquisition_reader(
    header: Sequence[str], summary: JoinSummary
) -> Callable[[list[str]], tuple[str, Acquisition | None]]:
    at = {column: place for place, column in enumerate(header)}

    def cell(row: list[str], column: str) -> str:
        return row[at[column]].strip() if column in at else ""

    def read(row: list[str]) -> tuple[str, Acquisition | None]:
        name = volume_key(row[at[NAME_COLUMN]])
        try:
            across, along = _numbers(cell(row, "XYSpacing"), 2)  # equal in CT; x is a column's width
            spacing = (float(cell(row, "ZSpacing")), along, across)
            slope, intercept = float(cell(row, "RescaleSlope")), float(cell(row, "RescaleIntercept"))
            if not (all(0 < side < 100 for side in spacing) and 0 < slope < 1e4 and abs(intercept) < 1e6):
                raise ValueError
        except ValueError:
            summary.note("rows of metadata without usable slope, intercept or spacing, left out", [name])
            return name, None
        acquisition = Acquisition(
            slope,
            intercept,
            spacing,
            manufacturer=cell(row, "Manufacturer"),
            kernel=_kernel(cell(row, "ConvolutionKernel")),
            **_geometry(cell(row, GEOMETRY_COLUMNS[0]), cell(row, GEOMETRY_COLUMNS[1])),
        )
        return name, acquisition

    return read


def _geometry(orientation: str, position: str) -> dict[str, tuple[float, ...]]:
    """Orientation and position, where the table has them and the directions are at right angles."""
    told = {}
    directions = _directions(orientation)
    if directions is not None:
        told["directions"] = directions
    with contextlib.suppress(ValueError):
        told["position_mm"] = _numbers(position, 3)
    return told


@lru_cache(maxsize=1024)
def _directions(orientation: str) -> tuple[float, ...] | None:
    """Two unit vectors at right angles, or None."""
    try:
        directions = _numbers(orientation, 6)
    except ValueError:
        return None
    row, column = directions[:3], directions[3:]
    unit = all(abs(math.hypot(*vector) - 1) < 1e-2 for vector in (row, column))
    upright = abs(sum(a * b for a, b in zip(row, column, strict=True))) < 1e-2
    return directions if unit and upright else None


def _numbers(text: str, count: int) -> tuple[float, ...]:
    """``[0.34, 0.34]`` as numbers.

    Raises:
        ValueError: It is no such list, or not of that many finite numbers.
    """
    values = tuple(float(part) for part in text.strip("[]() ").split(","))
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise ValueError(f"not {count} numbers: {text}")
    return values


def _kernel(text: str) -> str:
    """``['Br36d', '3']`` as ``Br36d``."""
    if text.startswith("["):
        try:
            parts = json.loads(text.replace("'", '"'))
        except ValueError:
            return ""
        return str(parts[0]) if parts else ""
    return text
