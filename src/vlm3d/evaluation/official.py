"""The VLM3D challenge's files for probabilities and reports: written checked, read strictly.

Classification, ``results.json``::

    {"name": "Generated probabilities", "type": "Abnormality Classification", "version": {"major": 1, "minor": 0},
     "predictions": [{"input_image_name": "<stem>", "probabilities": {"Medical material": 0.12, … 18 names}}]}

Reports, ``results.json`` of 2025 and ``predictions.json`` of 2026::

    {"name": "Generated reports", "type": "Report generation", "version": {"major": 1, "minor": 0} or "1.0",
     "generated_reports": [{"input_image_name": "…", "report": "Findings: … Impression: …"}]}

The platform wraps a 2025 file as ``[{"outputs": [{"value": {…}}]}]``; a 2026 report file is written wrapped. Readers take
both. Truth is a table that `vlm3d.evaluation.prediction_files` reads.
"""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm3d.errors import InputError, UnreadableFileError
from vlm3d.evaluation.case_ids import case_id_of, check_same_cases, check_unique, count, named
from vlm3d.io import write_atomically
from vlm3d.labels import DISEASE_NAMES

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Year = Literal[2025, 2026]

MAX_FILE_BYTES = 2_000_000_000
_VERSION = {"major": 1, "minor": 0}


# --- classification --------------------------------------------------------------------------------------------


def write_classification(
    path: str | Path,
    probabilities: Mapping[str, Mapping[str, float] | Sequence[float] | Floats],
    *,
    expected_ids: Iterable[str] | None = None,
    wrapped: bool = False,
) -> None:
    """Write disease probabilities as the challenge reads them.

    Args:
        path: The file; its folder must exist.
        probabilities: Case id (or file name) -> 18 probabilities, by name or in CT-RATE's order.
        expected_ids: The cases that must be there, no more and no fewer.
        wrapped: As the platform hands it to the scorer, instead of as the container writes it.

    Raises:
        InputError: A case is missing, foreign or named twice, a label is missing or unknown, or a value is no probability.
        OutputError: The file cannot be written.
    """
    name = Path(path).name
    ids = _checked_ids(probabilities, expected_ids, name)
    rows = [
        {"input_image_name": case_id, "probabilities": _by_name(values, name, case_id)}
        for case_id, values in zip(ids, probabilities.values(), strict=True)
    ]
    content = {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": _VERSION,
        "predictions": rows,
    }
    write_json(path, [{"outputs": [{"value": content}]}] if wrapped else content)


def read_classification(path: str | Path, *, expected_ids: Iterable[str] | None = None) -> dict[str, Floats]:
    """Read a classification file, wrapped or not.

    A label that a case lacks counts 0, as the challenge counts it; a label that nobody knows is refused.

    Returns:
        Case id -> 18 probabilities in CT-RATE's order.

    Raises:
        UnreadableFileError: Missing, truncated, or not such a file.
        InputError: Cases or values do not fit.
    """
    name = Path(path).name
    items = _items(unwrapped(read_json(path), name), "predictions", name)
    ids, rows, lacking = [], [], 0
    for place, item in enumerate(items, start=1):
        case_id = case_id_of(_text(item, "input_image_name", name, place))
        values = item.get("probabilities")
        if not isinstance(values, dict):
            raise UnreadableFileError(f"{name}: case {place} has no 'probabilities' by label name")
        unknown = [label for label in values if label not in DISEASE_NAMES]
        if unknown:
            raise InputError(f"{name}: case {case_id} has unknown labels: {named(unknown)}")
        lacking += len(DISEASE_NAMES) - len(values)
        ids.append(case_id)
        rows.append(_probabilities([values.get(label, 0.0) for label in DISEASE_NAMES], name, case_id))
    if lacking:
        logger.warning("%s lacks %s; they count 0, as in the challenge", name, count(lacking, "probability"))
    check_unique(ids, name)
    if expected_ids is not None:
        check_same_cases(ids, map(case_id_of, expected_ids), name, "the truth")
    return dict(zip(ids, rows, strict=True))


# --- reports -----------------------------------------------------------------------------------------------------


def write_reports(
    path: str | Path,
    reports: Mapping[str, str],
    *,
    year: Year = 2026,
    expected_ids: Iterable[str] | None = None,
    wrapped: bool | None = None,
) -> None:
    """Write generated reports as the challenge of a year reads them.

    Args:
        path: The file; its folder must exist.
        reports: Case id (or file name, kept as given) -> text.
        year: 2025 (plain, version by numbers) or 2026 (wrapped, version "1.0").
        expected_ids: The cases that must be there, no more and no fewer.
        wrapped: Overrides the year's own.

    Raises:
        InputError: A case is missing, foreign or named twice, or a report is no text.
        OutputError: The file cannot be written.
    """
    name = Path(path).name
    _checked_ids(reports, expected_ids, name)
    for case_id, text in reports.items():
        if not isinstance(text, str):
            raise InputError(f"{name}: the report of {case_id} is {type(text).__name__}, not text")
    content = {
        "name": "Generated reports",
        "type": "Report generation",
        "version": _VERSION if year == 2025 else "1.0",
        "generated_reports": [
            {"input_image_name": case_id, "report": text} for case_id, text in reports.items()
        ],
    }
    wrap = year == 2026 if wrapped is None else wrapped
    write_json(path, [{"outputs": [{"value": content}]}] if wrap else content)


def read_reports(path: str | Path, *, expected_ids: Iterable[str] | None = None) -> dict[str, str]:
    """Read a report file of 2025 or 2026, wrapped or not, predictions or truth.

    Returns:
        Case id -> text as it stands in the file; see `clean_predicted_report` and `clean_true_report`.

    Raises:
        UnreadableFileError: Missing, truncated, or not such a file.
        InputError: Cases do not fit.
    """
    name = Path(path).name
    items = _items(unwrapped(read_json(path), name), "generated_reports", name)
    ids = [
        case_id_of(_text(item, "input_image_name", name, place)) for place, item in enumerate(items, start=1)
    ]
    texts = [_text(item, "report", name, place) for place, item in enumerate(items, start=1)]
    check_unique(ids, name)
    if expected_ids is not None:
        check_same_cases(ids, map(case_id_of, expected_ids), name, "the truth")
    return dict(zip(ids, texts, strict=True))


def clean_true_report(text: str) -> str:
    """A true report as the challenge's text scores read it: newlines vanish, spaces before full stops too."""
    return text.replace("\n", "").replace(" . ", ".").replace(" .", ".")


def clean_predicted_report(text: str) -> str:
    """A generated report as the challenge's text scores read it; end marks, double quotes and underscores vanish too."""
    for mark in ("\n", "<|eot_id|>", '"', "_"):
        text = text.replace(mark, "")
    return text.replace(" . ", ".").replace(" .", ".")


# --- what the formats share --------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """Parse a JSON file.

    Raises:
        UnreadableFileError: Missing, truncated or damaged.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnreadableFileError(f"{path.name} has {path.stat().st_size:,} bytes, more than are read")
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from error
    except _RepeatedKeyError as error:
        raise UnreadableFileError(f"{path.name} names '{error}' twice in one entry") from error
    except RecursionError as error:
        raise UnreadableFileError(f"{path.name} is nested too deep to be a result file") from error
    except json.JSONDecodeError as error:
        raise UnreadableFileError(
            f"{path.name} is truncated or not JSON (line {error.lineno}, column {error.colno}): write it again"
        ) from error
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{path.name} is not UTF-8 text: write it again") from error
    except ValueError as error:
        raise UnreadableFileError(f"{path.name} holds a number of thousands of digits") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN is refused, since other readers do not know it."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def unwrapped(content: Any, name: str) -> dict[str, Any]:
    """What the platform put into ``[{"outputs": [{"value": …}]}]``; a plain file as it is.

    Raises:
        UnreadableFileError: Neither.
    """
    try:
        value = content[0]["outputs"][0]["value"] if isinstance(content, list) else content
    except (IndexError, KeyError, TypeError) as error:
        raise UnreadableFileError(f'{name} is a list without [0]["outputs"][0]["value"] in it') from error
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{name} holds {type(value).__name__}, not results by name")
    return value


def read_table(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """A csv file's header and its rows; a byte order mark and empty lines are dropped.

    Raises:
        UnreadableFileError: Missing, empty, not text, or rows of another length than the header.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {(error.strerror or 'error').lower()}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFileError(f"{path.name} is truncated or no csv table of UTF-8 text") from error
    if not rows:
        raise UnreadableFileError(f"{path.name} is empty; a table with a header was expected")
    header = [cell.strip() for cell in rows[0]]
    if len(set(header)) != len(header):
        twice = {column for column in header if header.count(column) > 1}
        raise InputError(f"{path.name} has columns of the same name: {named(twice)}")
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise UnreadableFileError(
                f"{path.name}: row {line} has {count(len(row), 'cell')}, the header {len(header)}: is it truncated?"
            )
    return header, rows[1:]


class _RepeatedKeyError(ValueError):
    """One JSON object names a key twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return values


def _items(content: dict[str, Any], key: str, name: str) -> list[dict[str, Any]]:
    items = content.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UnreadableFileError(f"{name} has no list '{key}'; is it a file of another task?")
    return items


def _text(item: dict[str, Any], key: str, name: str, place: int) -> str:
    value = item.get(key)
    if not isinstance(value, str) or (key == "input_image_name" and not value.strip()):
        raise UnreadableFileError(f"{name}: case {place} has no text '{key}'")
    return value


def _checked_ids(cases: Mapping[str, Any], expected: Iterable[str] | None, name: str) -> list[str]:
    ids = [case_id_of(case) for case in cases]
    check_unique(ids, name)
    if expected is not None:
        check_same_cases(ids, map(case_id_of, expected), name, "the input")
    return ids


def _by_name(
    values: Mapping[str, float] | Sequence[float] | Floats, name: str, case_id: str
) -> dict[str, float]:
    if isinstance(values, Mapping):
        missing, unknown = set(DISEASE_NAMES) - set(values), set(values) - set(DISEASE_NAMES)
        if missing or unknown:
            words = f"lacks {named(missing)}" if missing else f"has unknown labels: {named(unknown)}"
            raise InputError(f"{name}: case {case_id} {words}")
        values = [values[label] for label in DISEASE_NAMES]
    found = _probabilities(values, name, case_id)
    return dict(zip(DISEASE_NAMES, found.tolist(), strict=True))


def _probabilities(values: Sequence[Any] | Floats, name: str, case_id: str) -> Floats:
    found = _numbers(values, name, case_id)
    wrong = ~((found >= 0) & (found <= 1))
    if wrong.any():
        place = int(np.argmax(wrong))
        raise InputError(
            f"{name}: case {case_id} has {found[place]} for '{DISEASE_NAMES[place]}'; probabilities lie in 0..1"
        )
    return found


def _numbers(values: Sequence[Any] | Floats, name: str, case_id: str) -> Floats:
    if len(values) != len(DISEASE_NAMES):
        raise InputError(f"{name}: case {case_id} has {len(values)} values for {len(DISEASE_NAMES)} labels")
    numbers = np.empty(len(values))
    for place, value in enumerate(values):
        try:
            numbers[place] = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{name}: case {case_id} has no number for '{DISEASE_NAMES[place]}'") from None
    return numbers
