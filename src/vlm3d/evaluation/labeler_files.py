"""Reports from text files and tables, and their labels as a table in CT-RATE's form."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vlm3d.errors import UnreadableFileError
from vlm3d.evaluation.labeler import ReportLabels
from vlm3d.io.wording import shown
from vlm3d.labels import DISEASE_NAMES

TEXT_COLUMNS = ("report_text", "report", "text", "Findings_EN", "Impressions_EN", "findings", "impression")
"""Columns that hold a report's words; all that a table has are read, in this order."""

MAX_FILE_BYTES = 1 << 30


class NamedReport(NamedTuple):
    """A report and the name that it is told by: its file's, or what stands in its row's first column."""

    name: str
    text: str


def read_reports(paths: Iterable[Path], text_columns: Sequence[str] = ()) -> list[NamedReport]:
    """Read reports.

    Args:
        paths: Text files of one report each, or CSV tables of one report a row under a header.
        text_columns: Columns that hold the words, joined in this order; else those of `TEXT_COLUMNS` that are there.

    Raises:
        UnreadableFileError: A file is missing, no UTF-8 text, or a table without such columns.
    """
    reports: list[NamedReport] = []
    for path in paths:
        content = _content(path)
        if path.suffix.lower() == ".csv":
            reports.extend(_rows(path, content, text_columns))
        else:
            reports.append(NamedReport(path.stem, content))
    return reports


def labels_table(
    names: Sequence[str],
    labels: Sequence[ReportLabels],
    *,
    evidence: bool = True,
    name_column: str = "VolumeName",
) -> str:
    """A CSV of one report a row: its name, 18 labels of 0 and 1, and the sentences that decided them.

    Args:
        names: Of the reports.
        labels: Of the reports.
        evidence: Whether to add a column of sentences for every label.
        name_column: Header of the first column.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    sentences = [f"{name} sentence" for name in DISEASE_NAMES] if evidence else []
    writer.writerow([name_column, *DISEASE_NAMES, *sentences])
    for name, found in zip(names, labels, strict=True):
        row: list[str | int] = [name, *(int(label) for label in found.labels_K)]
        if evidence:
            told = [found.evidence.get(disease) for disease in DISEASE_NAMES]
            row += [f"{item.status}: {item.sentence}" if item else "" for item in told]
        writer.writerow(row)
    return buffer.getvalue()


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableFileError(f"{shown(path)} is larger than 1 GiB; split it")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(
            f"{shown(path)} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UnreadableFileError(
            f"{shown(path)} cannot be read: {(error.strerror or 'unknown reason').lower()}"
        ) from error


def _rows(path: Path, content: str, text_columns: Sequence[str]) -> list[NamedReport]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    reports = []
    try:
        header = list(reader.fieldnames or [])
        columns = [column for column in (text_columns or TEXT_COLUMNS) if column in header]
        absent = [column for column in text_columns if column not in header]
        if absent or not columns:
            wanted = f"'{absent[0]}'" if absent else f"any of {', '.join(TEXT_COLUMNS)}"
            raise UnreadableFileError(
                f"{shown(path)} has no column {wanted}; name the report's columns with --text-column"
            )
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise UnreadableFileError(
                    f"{shown(path)}: row {number} has another number of fields than the header's {len(header)}"
                )
            name = row[header[0]] if header[0] not in columns else f"{path.stem}_{number}"
            reports.append(NamedReport(name, "\n".join(row[column] for column in columns)))
    except csv.Error as error:
        raise UnreadableFileError(
            f"{shown(path)} is no CSV table: line {reader.line_num}, {error}"
        ) from error
    return reports
