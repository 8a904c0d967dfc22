"""Who trains and who tests: splits by patient, the same on every machine and whoever joins later.

A patient's split follows from a hash of the patient's identifier and a salt alone, so that a case added tomorrow moves no
one. What a source says is kept: CT-RATE's validation patients stay validation.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from vlm3d.datasets.case import Case, Split
from vlm3d.errors import ConfigError, DataError


class HasSplit(Protocol):
    """A case, read or prepared."""

    @property
    def patient_id(self) -> str:
        """All scans of a patient share it."""

    @property
    def split(self) -> Split | None:
        """Where the case belongs, or None."""


DEFAULT_FRACTIONS: Mapping[Split, float] = {"train": 0.8, "valid": 0.1, "test": 0.1}
DEFAULT_SALT = "vlm3d"
_NAMED = 5


def assign_splits(
    cases: Sequence[Case],
    fractions: Mapping[Split, float] = DEFAULT_FRACTIONS,
    *,
    salt: str = DEFAULT_SALT,
) -> list[Case]:
    """Give every case a split; all cases of a patient get the same.

    Args:
        cases: Those that have a split keep it, and their patients' other cases follow it.
        fractions: Share of patients in each split; they sum to 1.
        salt: Another salt gives another draw.

    Raises:
        ConfigError: The fractions are no shares.
        DataError: The sources put a patient into two splits.
    """
    _check_fractions(fractions)
    check_no_leak(cases)
    given = {case.patient_id: case.split for case in cases if case.split is not None}
    return [
        case
        if case.split is not None
        else replace(
            case, split=given.get(case.patient_id) or split_of_patient(case.patient_id, fractions, salt)
        )
        for case in cases
    ]


def split_of_patient(
    patient_id: str, fractions: Mapping[Split, float] = DEFAULT_FRACTIONS, salt: str = DEFAULT_SALT
) -> Split:
    """The split that a patient's identifier falls into, whoever else there is."""
    digest = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    upper = 0.0
    named = [split for split, fraction in fractions.items() if fraction > 0]
    for split in named:
        upper += fractions[split]
        if draw < upper:
            return split
    return named[-1]  # rounding left a sliver above the sum


def check_no_leak(cases: Iterable[HasSplit]) -> None:
    """Make sure that no patient is in two splits; cases without a split do not count.

    Raises:
        DataError: Some are; names the first of them.
    """
    splits: dict[str, set[Split]] = defaultdict(set)
    for case in cases:
        if case.split is not None:
            splits[case.patient_id].add(case.split)
    leaking = sorted(patient for patient, found in splits.items() if len(found) > 1)
    if leaking:
        told = ", ".join(
            f"{patient} ({' and '.join(sorted(splits[patient]))})" for patient in leaking[:_NAMED]
        )
        more = f" and {len(leaking) - _NAMED} more" if len(leaking) > _NAMED else ""
        raise DataError(
            f"{len(leaking)} patients are in two splits: {told}{more}; keep each patient in one split"
        )


def check_unique_ids(cases: Iterable[Case]) -> None:
    """Make sure that no identifier names two cases.

    Raises:
        DataError: One does; names the first of them.
    """
    seen: set[str] = set()
    twice: set[str] = set()
    for case in cases:
        (twice if case.case_id in seen else seen).add(case.case_id)
    if twice:
        told = ", ".join(sorted(twice)[:_NAMED])
        raise DataError(f"{len(twice)} identifiers name more than one case: {told}; give each case once")


def _check_fractions(fractions: Mapping[Split, float]) -> None:
    if not all(0 <= share <= 1 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(f"split fractions are shares that sum to 1, got {dict(fractions)}")
