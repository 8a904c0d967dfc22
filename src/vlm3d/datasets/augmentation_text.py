"""A report about a scan that was mirrored left to right: its side words change places, or the report is refused.

A mirrored chest is one that no patient has, save in situs inversus: the lung of three lobes lies on the left. What has
a counterpart is renamed. The right middle lobe has none; mirrored it lies where the left upper lobe (with its lingula)
lies, so it takes that name, as `vlm3d.datasets.augmentation` does with its voxels. The lingula has none either, and a
right upper lobe has no such part: a report that names it is refused. The parts of the heart and of the liver keep their
names, since 'left ventricle' says which chamber it is, not on which side.
"""

from __future__ import annotations

import re

_MIDDLE_LOBE = "left upper lobe"

_CANNOT_BE_MIRRORED = re.compile(
    r"""
    lingul                                          # part of the left upper lobe only
    | \bsitus\b | dextro | la?evo | \bmirror        # the report is about sides themselves
    | \b(?:minor|horizontal|azygos)\s+(?:fissure|lobe)
    | \bmiddle\s*(?:,|/|-|and\b|or\b|lobes\b)       # 'middle and lower lobes'
    | \b(?:upper|lower)\W+(?:and\W+|or\W+)?middle\b
    | \bmiddle\s+lobe[^.;:]{0,40}(?:segment|medial|lateral)\b   # no such segment on the other side
    | \bleft\s+(?:lung\s+)?middle\s+lobe
    | \b(?:Rt|Lt)\b | (?-i:\b[RL]\s?[<>=]\s?[RL]\b)
    | (?<![\w-])[RL]\.?\s+(?:lung|upper|middle|lower|pleura|hil|side)
    """,
    re.IGNORECASE | re.VERBOSE,
)

_HEART_OR_LIVER = r"""
    (?:[-\s](?:sided|main))?(?:\s*(?:,|/|and|or)\s*(?:left|right))?[\s-]+
    (?:atri(?:um|a|al)|ventric\w+|auric\w+|heart|cardiac|coronar\w+|main\s+coronary|anterior\s+descending|circumflex
       |LAD|hepatic|portal|gastric|lobe\b[^.,;:]{0,30}?\s+of\s+(?:the\s+)?liver|liver\s+lobe|lobe\s+liver)\b
"""

_SIDED = re.compile(
    rf"""
    (?P<keep>
        (?<![^\W_])(?:left|right){_HEART_OR_LIVER}
        | \b(?:liver|hepatic)[^.;:]{{0,30}}?\b(?:left|right)\s+lobe\b
        | \bright\s+(?:angle\w*|away)\b | \ball\s+right\b
        | \bleft\s+(?:in\s+place|in\s+situ|behind|untreated|unchanged)\b
    )
    | (?P<middle>\b(?:right\s+middle\s+lobe|middle\s+lobe\s+of\s+(?:the\s+)?right\s+lung|right\s+lung\W+middle\s+lobe
        |middle\s+lobe)\b)
    | (?P<lobe>(?-i:\b(?:RUL|RML|RLL|LUL|LLL)\b))
    | (?P<side>(?<![^\W_])(?:left|right)(?=(?:wards?|sided|most)?(?![^\W_])))
    """,
    re.IGNORECASE | re.VERBOSE,
)

_OTHER = {"left": "right", "right": "left"}
_OTHER_LOBE = {"RUL": "LUL", "LUL": "RUL", "RLL": "LLL", "LLL": "RLL", "RML": "LUL"}
_NAMED_TWICE = re.compile(rf"\b({_MIDDLE_LOBE})(?:\s*,\s*|\s+and\s+){_MIDDLE_LOBE}\b", re.IGNORECASE)


def mirrored_report(text: str) -> str | None:
    """The report of the same scan mirrored left to right, or None where its words cannot say that truthfully.

    Args:
        text: An English report.

    Returns:
        The text with 'left' and 'right' (also in 'left-sided', 'Rightward', 'RLL', 'right_lower_lobe') in each other's
        place, written large as they were. None for reports about the lingula, segments of the middle lobe, several lobes
        in one breath ('middle and lower lobes'), the minor fissure or situs.
    """
    if _CANNOT_BE_MIRRORED.search(text):
        return None
    return _NAMED_TWICE.sub(r"\1", _SIDED.sub(_mirrored, text))


def _mirrored(match: re.Match[str]) -> str:
    found = match.group()
    if match.lastgroup == "keep":
        return found
    if match.lastgroup == "lobe":
        return _OTHER_LOBE[found]
    if match.lastgroup == "middle":
        return _written_as(found, _MIDDLE_LOBE)
    return _written_as(found, _OTHER[found.lower()])


def _written_as(pattern: str, word: str) -> str:
    """The word in capitals, with one, or without, as the pattern is."""
    if pattern.isupper():
        return word.upper()
    return word.capitalize() if pattern[0].isupper() else word
