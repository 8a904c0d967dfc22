"""Studies with a real report and labels made by hand, in a training and a held-out part."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm3d.errors import DataError, UnreadableFileError
from vlm3d.evaluation.case_ids import patient_id_of
from vlm3d.labels import DISEASE_NAMES

ID_COLUMN, TEXT_COLUMN = "AccessionNo", "report_text"
TRAINING_SHARE = 0.75


@dataclass(frozen=True)
class Case:
    """All that a writer is given of a study.

    Attributes:
        case_id: Name of the study.
        labels_K: Of the 18 diseases, in the order of `vlm3d.labels.DISEASE_NAMES`.
    """

    case_id: str
    labels_K: tuple[bool, ...]

    @property
    def present(self) -> list[str]:
        """Names of the diseases that are there."""
        return [name for name, label in zip(DISEASE_NAMES, self.labels_K, strict=True) if label]


@dataclass(frozen=True)
class Study:
    """A study with its report.

    Attributes:
        case: What a writer may see.
        text: The radiologist's report.
    """

    case: Case
    text: str


@dataclass(frozen=True)
class Split:
    """Studies to learn from, and studies to be judged on; no patient is on both sides."""

    training: list[Study]
    held_out: list[Study]


def read_studies(table: Path) -> list[Study]:
    """Read a table of reports and labels.

    Args:
        table: CSV with ``AccessionNo``, ``report_text`` and a column of 0 and 1 for each of the 18 diseases.

    Raises:
        UnreadableFileError: The file is missing or no such table.
        DataError: A study comes twice, or a label is neither 0 nor 1.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFileError(
            f"{table.name} cannot be read as a table of reports ({type(error).__name__}); fetch it again"
        ) from error
    absent = [
        name for name in (ID_COLUMN, TEXT_COLUMN, *DISEASE_NAMES) if not rows or rows[0].get(name) is None
    ]
    if absent:
        raise UnreadableFileError(
            f"{table.name} has no column or row with '{absent[0]}'; give CT-CLIP's reports with manual labels"
        )
    studies = [_study(row, number, table.name) for number, row in enumerate(rows, start=1)]
    if len({study.case.case_id for study in studies}) < len(studies):
        raise DataError(f"{table.name} names a study more than once; every study counts once")
    return studies


def _study(row: dict[str, str], number: int, source: str) -> Study:
    try:
        values = [float(row[name]) for name in DISEASE_NAMES]
    except (TypeError, ValueError):
        values = []
    if not values or any(value not in (0.0, 1.0) for value in values):
        raise DataError(f"{source}: row {number} has a label that is neither 0 nor 1; correct or remove it")
    return Study(Case(row[ID_COLUMN], tuple(value == 1.0 for value in values)), row[TEXT_COLUMN])


def split(studies: Sequence[Study]) -> Split:
    """Three quarters of the patients to learn from, in an order that depends on their names alone.

    Raises:
        DataError: There are too few patients for two parts.
    """
    ordered = sorted(studies, key=lambda study: (_digest(study), study.case.case_id))
    patients = list(dict.fromkeys(_digest(study) for study in ordered))
    if len(patients) < 2:
        raise DataError(f"{len(studies)} studies of {len(patients)} patient make no two parts; give more")
    learned = set(patients[: max(1, int(len(patients) * TRAINING_SHARE))])
    return Split(
        [study for study in ordered if _digest(study) in learned],
        [study for study in ordered if _digest(study) not in learned],
    )


def _digest(study: Study) -> str:
    return hashlib.sha256(patient_id_of(study.case.case_id).encode()).hexdigest()
