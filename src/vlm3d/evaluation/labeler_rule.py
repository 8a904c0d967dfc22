"""What a rule of the report labeler is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """One way to name a finding.

    Attributes:
        words: The words that name it.
        unless: Near these words something else is meant.
        needs: Without these words nearby something else is meant.
        window: Characters before and after the words in which `unless` and `needs` are looked for.
    """

    words: re.Pattern[str]
    unless: re.Pattern[str] | None = None
    needs: re.Pattern[str] | None = None
    window: tuple[int, int] = (60, 40)


@dataclass(frozen=True)
class FindingRule:
    """How one finding is recognized.

    Attributes:
        name: Of the disease.
        stems: A sentence without any of these substrings cannot name it.
        namings: The ways to name it.
        counts_if_asked: Whether the finding with a question mark right behind it is labeled as present, as other doubt
            always is.
    """

    name: str
    stems: tuple[str, ...]
    namings: tuple[Naming, ...]
    counts_if_asked: bool = True
