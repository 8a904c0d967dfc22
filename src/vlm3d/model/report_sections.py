"""The report's form: three headed sections, written and read back by pure functions."""

from __future__ import annotations

import re
from typing import NamedTuple

SECTIONS = ("Findings", "Impression", "Recommendations")
HEADINGS = tuple(f"{section}:\n" for section in SECTIONS)
SEPARATOR = "\n\n"

HEADING_PATTERN = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*|__)?[ \t]*(findings?|impressions?|recommendations?)[ \t]*"
    r"(?:(?:\*\*|__)[ \t]*:|:[ \t]*(?:\*\*|__)?)",
    re.IGNORECASE | re.MULTILINE,
)
"""A heading at the start of a line, plain or in Markdown, in singular or plural."""

_FINISHED = re.compile(r"[.!?]['\")\]]*$")


class ReportSections(NamedTuple):
    """A report in its three parts; a part that is absent is empty."""

    findings: str
    impression: str
    recommendations: str


def parse_report(text: str) -> ReportSections:
    """Split a report into findings, impression and recommendations.

    Text before the first heading counts as findings; a heading that comes twice adds to its section.

    >>> parse_report("Findings:\\nClear lungs.\\n\\nImpression: Normal.")
    ReportSections(findings='Clear lungs.', impression='Normal.', recommendations='')
    """
    bodies: dict[str, list[str]] = {section[0].lower(): [] for section in SECTIONS}
    headings = list(HEADING_PATTERN.finditer(text))
    first = headings[0].start() if headings else len(text)
    bodies["f"].append(text[:first].strip())
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    for heading, end in zip(headings, ends, strict=False):
        bodies[heading.group(1)[0].lower()].append(text[heading.end() : end].strip())
    return ReportSections(*("\n".join(part for part in parts if part) for parts in bodies.values()))


def format_report(findings: str, impression: str, recommendations: str) -> str:
    """Write a report from its three parts, in the form that generation forces and `parse_report` reads."""
    bodies = (findings, impression, recommendations)
    return SEPARATOR.join(
        f"{heading}{tidy(body)}".rstrip() for heading, body in zip(HEADINGS, bodies, strict=True)
    )


def tidy(body: str) -> str:
    """A section's text without blank lines and stray spaces, which would end the section early."""
    return re.sub(r"\n\s*\n", "\n", body.strip())


def form_score(text: str) -> float:
    """How well a report keeps its form: Findings, Impression, Recommendations, each once, in order, not empty.

    A fifth for each section that stands once with a text, a fifth for the order with nothing before it, a fifth for a
    last sentence that ends. 1 is a valid report.

    >>> form_score("Findings:\\nClear lungs.\\n\\nImpression:\\nNormal.\\n\\nRecommendations:\\nNone.")
    1.0
    """
    headings = [match.group(1)[0].lower() for match in HEADING_PATTERN.finditer(text)]
    expected = [section[0].lower() for section in SECTIONS]
    bodies = dict(zip(expected, parse_report(text), strict=True))
    good = sum(headings.count(letter) == 1 and bool(bodies[letter]) for letter in expected)
    first = HEADING_PATTERN.search(text)
    in_order = headings == expected and first is not None and not text[: first.start()].strip()
    return (good + in_order + bool(_FINISHED.search(text.rstrip()))) / 5
