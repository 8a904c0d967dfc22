"""Which part of the body a scan's own words name: the chest, another part, or none."""

from __future__ import annotations

import re

_THORACIC_SPINE = re.compile(r"(?:thora\w*|\bt|\bth|\bbws)[\W_]*(?:spine|wirbel\w*|ws\b)", re.IGNORECASE)
_CHEST = re.compile(
    r"chest|thora|torax|tórax|mediast|brust|(?<![a-z])(?:cap|tap|hrct|ctpa)(?![a-z])", re.IGNORECASE
)
_LUNG = re.compile(r"lung|pulm|poumon|pulmón", re.IGNORECASE)
_OTHER = re.compile(
    r"head|brain|skull|neck|sinus|orbit|dental|kopf|hals|schädel|crane|abd[oa]|pelvi|becken|liver|kidney|spine|wirbel|"
    r"extrem|shoulder|elbow|wrist|hand|hip(?![a-z])|femur|knee|ankle|foot|(?<![a-z])(?:leg|arm)s?(?![a-z])",
    re.IGNORECASE,
)
_CODED = re.compile(r"[A-Z][A-Z _]{1,15}")

CHEST, LUNG, OTHER = "chest", "lung", "other"


def named_parts(*texts: str) -> frozenset[str]:
    """`CHEST`, `LUNG` (the word may mean a kernel, too) and `OTHER`, each where a text names it.

    The thoracic spine is another part: its series show the chest in a small field of view.
    """
    text = " ".join(texts)
    rest = _THORACIC_SPINE.sub(" spine ", text)
    patterns = ((CHEST, _CHEST), (LUNG, _LUNG), (OTHER, _OTHER))
    return frozenset(part for part, pattern in patterns if pattern.search(rest))


def coded_part(text: str) -> str:
    """The element BodyPartExamined fit to print: empty where it is no code of a known part."""
    word = text.strip().upper()
    return word.lower() if _CODED.fullmatch(word) and named_parts(word) else ""
