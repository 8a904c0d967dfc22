"""Each sentence of a report, linked to the finding that it names, its probability, and the piece of a mask it tells of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vlm3d.anatomy.regions import REGIONS
from vlm3d.evaluation.labeler import Mention, mentions
from vlm3d.evaluation.location_facts import LocationFact, location_facts
from vlm3d.evaluation.sentences import Sentence, split_sentences
from vlm3d.inference.prediction import (
    Agreement,
    AttentionPlace,
    DiseaseFinding,
    LesionComponent,
    LesionFinding,
    ReportSentence,
    Section,
    SentenceFinding,
    ToldPlace,
)
from vlm3d.labels import COUNTED_LESION_KEYS, STORED_LESIONS
from vlm3d.model.location import told_pieces
from vlm3d.model.report_sections import HEADING_PATTERN

TOUCHES_SHARE = 0.05
"""A lesion lies in a region, too, if this share of its volume does."""

_SECTIONS: Mapping[str, Section] = {"f": "findings", "i": "impression", "r": "recommendations"}
_DISEASE_OF_LESION = {lesion.key: lesion.disease for lesion in STORED_LESIONS}
_REGION_KEY = {region.name: region.key for region in REGIONS}
_REGION_SIDE = {region.name: region.side for region in REGIONS}
_DENSE_TOO = "consolidation"
"""Lesion that shows a lung opacity too, unless the words say ground glass."""


class Body(NamedTuple):
    """A stretch of the report under one heading.

    Attributes:
        section: Whose it is.
        start: Index in the report of its first character, past the heading.
        end: Index past its last character.
    """

    section: Section
    start: int
    end: int


class Piece(NamedTuple):
    """One listed piece of a lesion's mask, with its place in the prediction."""

    lesion: LesionFinding
    place: int
    component: LesionComponent


def section_bodies(text: str) -> list[Body]:
    """The report's stretches under their headings, in the order of the text; what precedes all headings is findings."""
    headings = list(HEADING_PATTERN.finditer(text))
    first = headings[0].start() if headings else len(text)
    bodies = [Body("findings", 0, first)] if text[:first].strip() else []
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    for heading, end in zip(headings, ends, strict=False):
        bodies.append(Body(_SECTIONS[heading.group(1)[0].lower()], heading.end(), end))
    return bodies


def ground_report(
    text: str, diseases: Sequence[DiseaseFinding], lesions: Sequence[LesionFinding]
) -> list[ReportSentence]:
    """Link every sentence to what the model's heads found.

    Each disease that a sentence names gets its probability; each place at which it is told gets the piece of the
    lesion's mask that fits the words best, or, where no mask shows it, the place that the classifier looked at.
    `ReportSentence.supported` is left open: see `vlm3d.inference.contradictions.check_report`.

    Args:
        text: The whole report, with or without headings.
        diseases: The classifier's findings.
        lesions: The localizer's findings.
    """
    by_name = {disease.name: disease for disease in diseases}
    sentences: list[ReportSentence] = []
    for body in section_bodies(text):
        words = text[body.start : body.end]
        named: dict[int, list[Mention]] = {}
        for mention in mentions(words):
            named.setdefault(mention.sentence.start, []).append(mention)
        for sentence in split_sentences(words):
            found = [
                _finding(group, body, by_name, lesions)
                for group in _by_finding(named.get(sentence.start, []))
            ]
            sentences.append(_sentence(sentence, body, sorted(found, key=lambda item: item.start)))
    return sentences


def lesions_showing(disease: str, lesions: Sequence[LesionFinding], words: str = "") -> list[LesionFinding]:
    """The lesions whose masks show a disease and have at least one piece, its own lesion first.

    Args:
        disease: Name of the disease.
        lesions: The localizer's findings.
        words: As the report names it; "ground glass" leaves out consolidation, which is a lung opacity otherwise.
    """
    own = [lesion for lesion in lesions if lesion.components and _disease_of(lesion) == disease]
    if disease == _DISEASE_OF_LESION["ground_glass_opacity"] and not tells_ground_glass(words):
        own += [lesion for lesion in lesions if lesion.components and lesion.key == _DENSE_TOO]
    return own


def tells_ground_glass(words: str) -> bool:
    """Whether words name ground glass, which is only one kind of lung opacity."""
    plain = words.lower().replace("-", " ")
    return "ground glass" in plain or "ggo" in plain.split()


def agreement(
    side: str | None,
    region: str | None,
    lesions: Sequence[LesionFinding],
    piece: LesionComponent | None = None,
) -> Agreement:
    """Whether masks show anything at a place.

    Only sides and lobes can disagree. Where a piece has neither (no anatomy, or next to the midline) nothing speaks
    against the words; nor where pieces are not listed and no volume by region tells where they lie.

    Args:
        side: As told.
        region: Key, as told.
        lesions: Whose masks show the finding; none makes the place unmeasured.
        piece: Look at this piece alone.
    """
    if not lesions:
        return "unmeasured"
    pieces = [piece] if piece is not None else [c for lesion in lesions for c in _worth_telling(lesion)]
    sides: set[str | None] = {component.side for component in pieces}
    regions = {_REGION_KEY.get(component.region, "") for component in pieces}
    all_in_lobes = all(_is_lobe(region) for region in regions)
    if piece is None:
        for lesion in lesions:
            if lesion.components_left_out and not lesion.volume_ml_by_region:
                return "agrees"
            names = [name for name, ml in lesion.volume_ml_by_region.items() if _touches(ml, lesion)]
            sides |= {_REGION_SIDE.get(name) for name in names}
            regions |= {_REGION_KEY.get(name, "") for name in names}
    if side in ("right", "left") and not sides & {side, "midline"}:
        return "wrong_side"
    if _is_lobe(region) and region not in regions and all_in_lobes:
        return "wrong_lobe"
    return "agrees"


def _worth_telling(lesion: LesionFinding) -> Sequence[LesionComponent]:
    """The listed pieces but for spots in places that hold next to nothing of the lesion; every nodule is one."""
    if lesion.key in COUNTED_LESION_KEYS:
        return lesion.components
    return told_pieces(lesion.key, lesion.components, len(lesion.components))[0]


def _touches(volume_ml: float, lesion: LesionFinding) -> bool:
    return volume_ml > 0 and volume_ml >= TOUCHES_SHARE * lesion.volume_ml


def _is_lobe(region: str | None) -> bool:
    return region is not None and region.endswith("_lobe")


def _disease_of(lesion: LesionFinding) -> str:
    return _DISEASE_OF_LESION.get(lesion.key, lesion.name)


def _by_finding(found: Sequence[Mention]) -> list[list[Mention]]:
    groups: dict[str, list[Mention]] = {}
    for mention in found:
        groups.setdefault(mention.rule.name, []).append(mention)
    return list(groups.values())


def _finding(
    found: Sequence[Mention],
    body: Body,
    by_name: Mapping[str, DiseaseFinding],
    lesions: Sequence[LesionFinding],
) -> SentenceFinding:
    """All namings of one disease in one sentence; the weightiest says whether it is there."""
    best = max(found, key=lambda mention: mention.weight)
    offset = body.start + best.sentence.start
    disease = by_name.get(best.rule.name)
    sentence = best.sentence.text
    words = " ".join(sentence[mention.start : mention.end] for mention in found)
    showing = lesions_showing(best.rule.name, lesions, words)
    placed = best.counts and body.section != "recommendations"
    seen = disease.places if disease is not None and not showing else []
    return SentenceFinding(
        name=best.rule.name,
        status=best.status,
        affirmed=best.counts,
        start=offset + best.start,
        end=offset + best.end,
        probability=None if disease is None else disease.probability,
        threshold=None if disease is None else disease.threshold,
        positive=None if disease is None else disease.positive,
        in_mask=bool(showing),
        places=list(_places(best.rule.name, sentence, showing, seen)) if placed else [],
    )


def _places(
    name: str, sentence: str, showing: Sequence[LesionFinding], seen: Sequence[AttentionPlace]
) -> Iterator[ToldPlace]:
    facts = [fact for fact in location_facts(sentence) if fact.finding == name] or [LocationFact(name)]
    for fact in facts:
        for side in ("right", "left") if fact.side == "bilateral" else (fact.side,):
            yield _seen_place(side, fact, seen) if seen else _place(side, fact, showing)


def _place(side: str | None, fact: LocationFact, showing: Sequence[LesionFinding]) -> ToldPlace:
    piece = best_piece(showing, side, fact.region, fact.level, fact.size_mm)
    return ToldPlace(
        side=side,
        region=fact.region,
        level=fact.level,
        size_mm=fact.size_mm,
        agreement=agreement(side, fact.region, showing),
        lesion=None if piece is None else piece.lesion.key,
        component=None if piece is None else piece.place,
        key_slice=None if piece is None else piece.component.key_slice,
    )


def _seen_place(side: str | None, fact: LocationFact, seen: Sequence[AttentionPlace]) -> ToldPlace:
    def misfit(place: AttentionPlace) -> tuple[bool, bool]:
        other_side = side in ("right", "left") and place.side != side
        return other_side, _is_lobe(fact.region) and _REGION_KEY.get(place.region, fact.region) != fact.region

    best = min(seen, key=misfit)
    other_side, other_lobe = misfit(best)
    return ToldPlace(
        side=side,
        region=fact.region,
        level=fact.level,
        size_mm=fact.size_mm,
        agreement="wrong_side" if other_side else "wrong_lobe" if other_lobe else "agrees",
        key_slice=best.key_slice,
    )


def best_piece(
    showing: Sequence[LesionFinding],
    side: str | None,
    region: str | None,
    level: str | None,
    size_mm: float | None,
) -> Piece | None:
    """The piece that fits the words best: side first, then lobe, level, size; the larger one where several do."""
    pieces = [
        (order, Piece(lesion, index, component))
        for order, lesion in enumerate(showing)
        for index, component in enumerate(lesion.components)
    ]

    def misfit(entry: tuple[int, Piece]) -> tuple[float, ...]:
        order, (lesion, _, component) = entry
        fits = agreement(side, region, [lesion], component)
        other_region = region is not None and _REGION_KEY.get(component.region) != region
        other_level = level is not None and component.level != level
        off_mm = 0.0 if size_mm is None else abs(component.max_diameter_mm - size_mm)
        return (
            ("agrees", "wrong_lobe", "wrong_side").index(fits),
            other_region,
            other_level,
            off_mm,
            order,
            -component.volume_ml,
        )

    return min(pieces, key=misfit)[1] if pieces else None


def _sentence(sentence: Sentence, body: Body, found: list[SentenceFinding]) -> ReportSentence:
    places = [place for finding in found for place in finding.places if place.agreement != "unmeasured"]
    first = next((place for place in places if place.agreement == "agrees"), places[0] if places else None)
    return ReportSentence(
        text=sentence.text,
        section=body.section,
        start=body.start + sentence.start,
        end=body.start + sentence.end,
        findings=found,
        lesion=None if first is None else first.lesion,
        component=None if first is None else first.component,
        key_slice=None if first is None else first.key_slice,
    )
