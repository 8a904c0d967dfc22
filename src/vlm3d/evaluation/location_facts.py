"""Which findings a report tells, and where: side, lobe, third of the lung, size. Facts of two reports can be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from vlm3d.evaluation.labeler import Mention, mentions
from vlm3d.evaluation.location_words import Place, places_in, sizes_in
from vlm3d.evaluation.sentences import plain
from vlm3d.labels import DISEASES


@dataclass(frozen=True)
class LocationFact:
    """One finding at one place, as a report tells it; what the report leaves open is None.

    Attributes:
        finding: Name of the disease, as in `vlm3d.labels`.
        side: ``"right"``, ``"left"``, ``"bilateral"`` or ``"midline"``.
        region: Key of `vlm3d.anatomy.regions`.
        level: ``"upper"``, ``"middle"`` or ``"lower"`` third of the lungs' height.
        size_mm: Largest diameter told.
        sentence: That tells it.
    """

    finding: str
    side: str | None = None
    region: str | None = None
    level: str | None = None
    size_mm: float | None = None
    sentence: str = ""

    @property
    def told(self) -> tuple[str, str | None, str | None, str | None, float | None]:
        """All but the sentence."""
        return self.finding, self.side, self.region, self.level, self.size_mm


class LocatedFinding(Protocol):
    """What facts are compared with: other facts, or `vlm3d.datasets.phantom.truth.FindingTruth`."""

    @property
    def finding(self) -> str: ...
    @property
    def side(self) -> str | None: ...
    @property
    def region(self) -> str | None: ...
    @property
    def level(self) -> str | None: ...
    @property
    def size_mm(self) -> float | None: ...


class FactComparison(NamedTuple):
    """Facts of a report against what is true.

    Attributes:
        right: Predicted facts that something true supports.
        wrong: Predicted facts that nothing true supports.
        missed: True findings that no predicted fact tells.
    """

    right: tuple[LocationFact, ...]
    wrong: tuple[LocationFact, ...]
    missed: tuple[LocatedFinding, ...]

    @property
    def precision(self) -> float:
        """Share of the predicted facts that are right; 1 where nothing was predicted."""
        predicted = len(self.right) + len(self.wrong)
        return len(self.right) / predicted if predicted else 1.0


_MIDLINE = {"Cardiomegaly", "Pericardial effusion", "Hiatal hernia"}
_LUNG = {disease.name for disease in DISEASES if disease.organ == "lungs"}
_CUT = re.compile(r", and |, |; | and | with | as well as | but | while ")
_RECOMMENDATIONS = re.compile(r"^[ \t#*]*recommendations?\b[ \t*]*:", re.IGNORECASE | re.MULTILINE)
_IMPRESSION = re.compile(r"^[ \t#*]*impressions?\b[ \t*]*:", re.IGNORECASE | re.MULTILINE)


def location_facts(text: str) -> list[LocationFact]:
    """Read the findings that a report affirms, with their places and sizes.

    A finding told at several places gives a fact for each. A fact is left out where others of the same finding say all
    of it and more, as the impression's "nodules on both sides" after the nodules themselves. Recommendations are not
    read.

    Args:
        text: The report in English, or the line that `vlm3d.model.location.describe_findings` writes.
    """
    end = _RECOMMENDATIONS.search(text)
    body = text[: end.start()] if end else text
    impression = _IMPRESSION.search(body)
    parts = [body[: impression.start()], body[impression.start() :]] if impression else [body]
    facts: list[LocationFact] = []
    for part in parts:
        told = {fact.told for fact in facts}
        sentences: set[tuple[str, str]] = set()
        for fact in _facts_of(part):
            if fact.told not in told and ((fact.finding, fact.sentence) not in sentences or impression):
                facts.append(fact)
    facts = [fact for index, fact in enumerate(facts) if not _is_told_by_others(fact, facts, index)]
    return _with_later_sides(facts)


def _facts_of(text: str) -> Iterator[LocationFact]:
    by_sentence: dict[int, list[Mention]] = {}
    for mention in mentions(text):
        by_sentence.setdefault(mention.sentence.start, []).append(mention)
    for start in sorted(by_sentence):
        yield from _facts_of_sentence(sorted(by_sentence[start], key=lambda mention: mention.start))


def _facts_of_sentence(found: list[Mention]) -> Iterator[LocationFact]:
    """Facts of one sentence: its words are shared out among the findings that it names."""
    sentence = found[0].sentence
    words = plain(sentence.text)
    groups = _groups(found, words)
    edges = [
        0,
        *(_edge(words, a[-1].end, b[0].start) for a, b in zip(groups, groups[1:], strict=False)),
        len(words),
    ]
    lead: list[Place] = []
    for index, group in enumerate(groups):
        begin, finish = edges[index], edges[index + 1]
        places = places_in(words, begin, finish)
        if index == 0:
            lead = [place for place in places if place.start < group[0].start and place.region is not None]
        elif not places:
            places = lead
        sizes = sizes_in(sentence.text, begin, finish)
        for name in dict.fromkeys(mention.rule.name for mention in group if mention.counts):
            own = [size for size in sizes if _owner(group, size[0]).rule.name == name]
            yield from _located(name, places, own, sentence.text)


def _groups(found: list[Mention], words: str) -> list[list[Mention]]:
    """Mentions that share what is said: 'bronchiectasis and peribronchial thickening in the lower lobes'."""
    groups: list[list[Mention]] = []
    for mention in found:
        if groups and _shares(groups[-1], mention, words):
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return groups


def _shares(group: list[Mention], mention: Mention, words: str) -> bool:
    """Whether a mention stands so near to the ones before it that one place and one size are meant for all."""
    last = max(other.end for other in group)
    if mention.start < last:
        return True
    if places_in(words, last, mention.start):
        return False
    if any(mention.rule.name == other.rule.name for other in group):
        return True
    return not sizes_in(words, last, mention.start) and len(words[last : mention.start].split()) <= 4


def _owner(group: list[Mention], place: int) -> Mention:
    """Whose a size is: the finding's named last before it, as in 'nodule of 5 mm', else the first one's."""
    before = [mention for mention in group if mention.start < place]
    return before[-1] if before else group[0]


def _edge(words: str, start: int, end: int) -> int:
    """Where what is said of one finding ends and that of the next begins: at the last cut between the two."""
    cuts = [match.start() for match in _CUT.finditer(words, start, end)]
    return cuts[-1] if cuts else end


def _located(
    finding: str, places: Sequence[Place], sizes: Sequence[tuple[int, float]], sentence: str
) -> Iterator[LocationFact]:
    """One fact a place. A single size belongs to the first place; as many sizes as places go in turn."""
    fitting = [_fitted(finding, place) for place in places]
    kept = list(dict.fromkeys(place for place in fitting if place is not None))
    specific = [place for place in kept if place.region or place.side in ("right", "left")]
    if len({place.side for place in specific}) > 1 or any(place.region for place in specific):
        kept = [place for place in kept if place in specific or (place.side is None and place.level)] or kept
        if any(place.region for place in specific):
            kept = [place for place in kept if place.region]
    if not kept:
        kept = [Place(0, "midline" if finding in _MIDLINE else None, None, None)]
    lengths = [size for _, size in sizes] if len(sizes) == len(kept) else [size for _, size in sizes[:1]]
    for index, place in enumerate(kept):
        size = lengths[index] if index < len(lengths) else None
        yield LocationFact(finding, place.side, place.region, place.level, size, sentence)


def _fitted(finding: str, place: Place) -> Place | None:
    """The place as this finding can lie in it, or None: the heart behind which a hernia lies is not the hernia's."""
    region, side = place.region, place.side
    if finding in _LUNG:
        if region is not None and not region.endswith("_lobe"):
            return replace(place, start=0, region=None) if side in ("right", "left") else None
    elif finding == "Pleural effusion":
        region = f"{side}_pleural_space" if side in ("right", "left") else None
    elif finding in _MIDLINE:
        return Place(0, "midline", None, place.level) if place.level else None
    elif finding == "Arterial wall calcification":
        region = "aorta" if region == "aorta" else None
    elif finding == "Lymphadenopathy":
        region = "mediastinum" if region == "mediastinum" else None
    else:
        region = None
    if side is None and region is None and place.level is None:
        return None
    return Place(0, side, region, place.level)


def _is_told_by_others(fact: LocationFact, facts: Sequence[LocationFact], index: int) -> bool:
    """Whether other facts of the finding say everything that this one says, and more."""
    others = [other for i, other in enumerate(facts) if i != index and other.finding == fact.finding]
    richer = [other for other in others if _detail(other) > _detail(fact)]
    if fact.side == "bilateral" and fact.region is None and fact.size_mm is None:
        return {"right", "left"} <= {other.side for other in others}
    return any(
        fact.side in (None, other.side)
        and fact.region in (None, other.region)
        and fact.level in (None, other.level)
        and fact.size_mm in (None, other.size_mm)
        for other in richer
    )


def _with_later_sides(facts: list[LocationFact]) -> list[LocationFact]:
    """Join 'nodes of up to 14 mm' and, later, 'lymphadenopathy on the right' to one fact."""
    joined: list[LocationFact] = []
    for fact in facts:
        own = [index for index, other in enumerate(joined) if other.finding == fact.finding]
        if len(own) == 1 and _detail(fact) == 1 and fact.side and joined[own[0]].side is None:
            joined[own[0]] = replace(joined[own[0]], side=fact.side)
        else:
            joined.append(fact)
    return joined


def _detail(fact: LocationFact) -> int:
    return sum(value is not None for value in (fact.side, fact.region, fact.level, fact.size_mm))


def compare_facts(
    predicted: Iterable[LocationFact], truth: Iterable[LocatedFinding], *, size_tolerance_mm: float = 1.0
) -> FactComparison:
    """Hold the facts of a report against what is true.

    A predicted fact is right if something true has the same finding and contradicts nothing that the fact tells; what
    either leaves open contradicts nothing. Something true is missed if no right fact is about it.

    Args:
        predicted: Facts of a report.
        truth: Facts of another report, or a phantom's truth.
        size_tolerance_mm: Sizes that differ by no more are equal.
    """
    facts, real = list(predicted), list(truth)
    agrees = [[_agree(fact, item, size_tolerance_mm) for item in real] for fact in facts]
    right = tuple(fact for fact, row in zip(facts, agrees, strict=True) if any(row))
    wrong = tuple(fact for fact, row in zip(facts, agrees, strict=True) if not any(row))
    missed = tuple(item for j, item in enumerate(real) if not any(row[j] for row in agrees))
    return FactComparison(right, wrong, missed)


def _agree(fact: LocationFact, item: LocatedFinding, tolerance_mm: float) -> bool:
    if fact.finding != item.finding:
        return False
    sides = {fact.side, item.side}
    if None not in sides and "bilateral" not in sides and len(sides) > 1:
        return False
    for one, other in ((fact.region, item.region), (fact.level, item.level)):
        if one is not None and other is not None and one != other:
            return False
    if fact.size_mm is None or item.size_mm is None:
        return True
    return abs(fact.size_mm - item.size_mm) <= tolerance_mm
