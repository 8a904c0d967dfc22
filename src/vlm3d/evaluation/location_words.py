"""Places and sizes in the words of a report."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A place that a sentence names.

    Attributes:
        start: Index of its words.
        side: ``"right"``, ``"left"``, ``"bilateral"``, ``"midline"`` or None.
        region: Key of `vlm3d.anatomy.regions`, or None.
        level: ``"upper"``, ``"middle"``, ``"lower"`` third of the lungs, or None.
    """

    start: int
    side: str | None
    region: str | None
    level: str | None = None


_SIDE = r"(?P<{0}>right|left|both|bilateral)"
_LEVELS = r"(?P<{0}>(?:upper|middle|lower)(?:(?:,| and|, and| or| lobe and| lobe,)? (?:upper|middle|lower))*)"
_PLACE = re.compile(
    rf"""\b(?:
      {_SIDE.format("side_a")}[ ](?:lungs?[ ])?(?:the[ ])?{_LEVELS.format("level_a").replace(" ", "[ ]")}[ ]lobes?
    | {_LEVELS.format("level_b").replace(" ", "[ ]")}[ ]lobes?[ ](?:\w+[ ]){{0,5}}?(?:of|in|on)[ ](?:the[ ])?
      {_SIDE.format("side_b")}(?:[ ]lungs?|[ ]hemithora\w+|[ ]sides?)?
    | {_LEVELS.format("level_c").replace(" ", "[ ]")}[ ]lobes?(?P<after>[ ]bilaterally)?
    | (?P<lingula>lingul\w*)
    | {_SIDE.format("side_p")}[ ]pleural[ ](?:spaces?|cavit\w+)
    | (?P<third>upper|middle|lower)[ ](?:third|zone|lung[ ]zone|field)s?
    | (?P<apex>apex|apices|apical)\b | (?P<base>bases|basal|base\b)
    | (?P<aorta>aort\w*) | (?P<mediastinum>mediastin\w*|paratracheal|subcarinal|prevascular)
    | (?P<heart>(?:left|right)[ ](?:ventric\w*|atri\w*|heart|coronary|main[ ]bronch\w*|subclavian\w*|adrenal|kidney|
      breast|jugular)|heart)
    | (?P<sided>right|left|both|bilateral\w*|midline)\b
    )""",
    re.VERBOSE,
)
_SIZE = re.compile(
    r"(?<![\w.,])(\d+(?:[.,]\d+)?)((?: ?(?:x|×|-|–|to|by) ?\d+(?:[.,]\d+)?)*) ?(mm\b|cm\b|millimet|centimet)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


def places_in(words: str, start: int, end: int) -> list[Place]:
    """The places that a stretch of a sentence names, in order; lobes of both sides come as two places.

    Args:
        words: The sentence in the form of `vlm3d.evaluation.sentences.plain`.
        start: Index of the stretch.
        end: Index past it.
    """
    places: list[Place] = []
    for match in _PLACE.finditer(words, start, end):
        places.extend(_places(match, places))
    return places


def sizes_in(sentence: str, start: int, end: int) -> list[tuple[int, float]]:
    """Index and largest diameter in mm of every length that a stretch of a sentence gives, in order."""
    sizes = []
    for match in _SIZE.finditer(sentence, start, end):
        numbers = [
            float(number.replace(",", ".")) for number in _NUMBER.findall(match.group(1) + match.group(2))
        ]
        in_mm = max(numbers) * (10 if match.group(3).lower().startswith("c") else 1)
        sizes.append((match.start(), round(in_mm, 3)))
    return sizes


def _places(match: re.Match[str], before: list[Place]) -> list[Place]:
    words = match.groupdict()
    at = match.start()
    levels = words["level_a"] or words["level_b"] or words["level_c"]
    if levels:
        side = words["side_a"] or words["side_b"] or ("both" if words["after"] else None)
        if side is None and match.group().endswith("lobe") and before and before[-1].region is not None:
            side = before[-1].side  # "right upper and lower lobe" told as "right upper lobe, lower lobe"
        return _lobes(
            at, side, re.findall(r"upper|middle|lower", levels), many=match.group().endswith("lobes")
        )
    if words["lingula"]:
        if before and before[-1].region == "left_upper_lobe":
            return []
        return [Place(at, "left", "left_upper_lobe")]
    if words["side_p"]:
        sides = ("right", "left") if words["side_p"] in ("both", "bilateral") else (words["side_p"],)
        return [Place(at, side, f"{side}_pleural_space") for side in sides]
    level = words["third"] or ("upper" if words["apex"] else "lower" if words["base"] else None)
    if level:
        return _with_level(at, level, before)
    if words["aorta"] or words["mediastinum"]:
        return [Place(at, None, "aorta" if words["aorta"] else "mediastinum")]
    if words["heart"]:
        return []
    sided = words["sided"]
    return [Place(at, sided if sided in ("right", "left", "midline") else "bilateral", None)]


def _lobes(at: int, side: str | None, levels: list[str], *, many: bool) -> list[Place]:
    places = []
    for level in levels:
        if level == "middle":
            if side in (None, "right"):
                places.append(Place(at, "right", "right_middle_lobe"))
            elif side == "left":
                places.append(Place(at, "left", None))
            else:
                places.append(Place(at, "right", "right_middle_lobe"))
        elif side in ("both", "bilateral") or (side is None and many):
            places += [Place(at, s, f"{s}_{level}_lobe") for s in ("right", "left")]
        elif side is None:
            places.append(Place(at, None, None, level))
        else:
            places.append(Place(at, side, f"{side}_{level}_lobe"))
    return places


def _with_level(at: int, level: str, before: list[Place]) -> list[Place]:
    """'right upper lobe, upper third' is one place; a level that no place stands before is one of its own."""
    if before and before[-1].level is None and (before[-1].region or before[-1].side):
        last = before.pop()
        return [Place(last.start, last.side, last.region, level)]
    return [Place(at, None, None, level)]
