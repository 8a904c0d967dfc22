"""Case ids as files spell them, and what is said where two lists of them do not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vlm3d.errors import InputError

_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".npz", ".zip", ".dcm", ".gz", ".json")
_CT_RATE = re.compile(r"(?P<patient>(?:train|valid|test)(?:_fixed)?_\d+)_[a-z]+_\d+")
_NAMED_AT_MOST = 5


def case_id_of(file_name: str) -> str:
    """The id that a file's name holds: the name without folders and without the ending of an image file."""
    name = re.split(r"[\\/]", file_name.strip())[-1]
    for ending in _ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def patient_id_of(case_id: str) -> str:
    """The patient of a CT-RATE volume (``valid_12`` of ``valid_12_a_2``); any other case is its own patient."""
    found = _CT_RATE.fullmatch(case_id)
    return found["patient"] if found else case_id


def named(ids: Iterable[str]) -> str:
    """The first few ids, and how many more there are."""
    listed = sorted(ids)
    shown = ", ".join(_one_line(item) for item in listed[:_NAMED_AT_MOST])
    return shown + (f" and {len(listed) - _NAMED_AT_MOST} more" if len(listed) > _NAMED_AT_MOST else "")


def check_unique(ids: Sequence[str], source: str) -> None:
    """Refuse a list that names a case twice.

    Raises:
        InputError: It does; the message names them.
    """
    twice = [item for item, times in Counter(ids).items() if times > 1]
    if twice:
        raise InputError(f"{source} names {count(len(twice), 'case')} more than once: {named(twice)}")


def check_same_cases(
    found: Iterable[str], expected: Iterable[str], source: str, expected_source: str
) -> None:
    """Refuse ids that are missing or that nothing is known of.

    Raises:
        InputError: The two lists are not of the same cases; the message names those that differ.
    """
    found, expected = set(found), set(expected)
    missing, foreign = expected - found, found - expected
    complaints = []
    if missing:
        complaints.append(f"lacks {count(len(missing), 'case')} of {expected_source}: {named(missing)}")
    if foreign:
        complaints.append(f"has {count(len(foreign), 'case')} that {expected_source} lacks: {named(foreign)}")
    if complaints:
        raise InputError(f"{source} " + "; it ".join(complaints))


def count(number: int, noun: str) -> str:
    """A number with its noun, plural where it is not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _one_line(text: str, at_most: int = 80) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in text)
    return printable if len(printable) <= at_most else printable[: at_most - 1] + "…"
