"""What joining files and tables met on the way: every oddity is counted and named, none is silent."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

_NAMED = 5


@dataclass
class JoinSummary:
    """Counts of what was found, and the names behind each problem.

    Attributes:
        counts: What was found, such as ``{"volumes": 1921, "studies": 992}``.
        problems: What was wrong or missing -> the names of the files or rows that it concerns.
    """

    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def note(self, problem: str, names: Iterable[str]) -> None:
        """Remember whom a problem concerns; no names, no problem."""
        names = list(names)
        if names:
            self.problems.setdefault(problem, []).extend(names)

    def count_of(self, problem: str) -> int:
        """How many files or rows a problem concerns."""
        return len(self.problems.get(problem, ()))

    def lines(self) -> list[str]:
        """The summary for a person: one line of counts, then one a problem with its first names."""
        told = [", ".join(f"{count} {what}" for what, count in self.counts.items())]
        for problem, names in self.problems.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            told.append(f"{len(names)} {problem}: {', '.join(names[:_NAMED])}{more}")
        return told

    def log(self, logger: logging.Logger, source: str) -> None:
        """Log the counts as information and each problem as a warning."""
        first, *problems = self.lines()
        logger.info("%s: %s", source, first)
        for line in problems:
            logger.warning("%s: %s", source, line)
