"""The report held against the model's own heads: what it affirms, denies, misplaces or leaves out.

| kind | what the report does |
|---|---|
| ``unsupported`` | affirms a finding that neither reaches its threshold nor shows in a mask |
| ``denied`` | denies a finding that reaches its threshold or shows in its lesion's mask |
| ``wrong_side``, ``wrong_lobe`` | places a finding where its mask, or else the classifier's gaze, has next to nothing |
| ``wrong_size`` | gives the one nodule of a sentence a size that the mask's nodule there does not have |
| ``called_normal`` | calls the whole chest, or the lungs, normal although a finding of them reaches its threshold |
| ``not_mentioned`` | does not name a finding that reaches its threshold |

The heads may disagree with each other; a sentence that one of them supports contradicts neither. The third of the lung, and
the size of what is no nodule, are linked, not judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vlm3d.anatomy.regions import REGIONS
from vlm3d.evaluation.labeler_patterns import RULES
from vlm3d.evaluation.location_words import Place, places_in, sizes_in
from vlm3d.evaluation.sentences import plain
from vlm3d.inference.grounding import agreement, ground_report, lesions_showing, tells_ground_glass
from vlm3d.inference.prediction import (
    Contradiction,
    DiseaseFinding,
    LesionFinding,
    ReportSentence,
    SentenceFinding,
    ToldPlace,
)
from vlm3d.labels import COUNTED_LESION_KEYS, IMPLIED, ORGAN_OF

SIZE_OFF_SHARE, SIZE_OFF_MM = 0.5, 5.0
"""A nodule's size may be off by this share of what the mask measures, and by this much in any case."""

_READABLE = {rule.name for rule in RULES}
_REGION_NAME = {region.key: region.name for region in REGIONS}
_OPACITY = "Lung opacity"

_QUALIFIED = re.compile(
    r"\b(?:other|others|further|additional|another|new|newly|second|more|elsewhere|remaining|contralateral|else)\b"
)
"""What such a denial denies is a finding besides the one that is there."""

_NORMAL = re.compile(
    r"""(?:this[ ]is[ ])?(?:an?[ ])?(?:entirely[ ]|otherwise[ ])?(?:normal|unremarkable)[ ]
        (?:chest[ ]|thoracic[ ]|thorax[ ])?(?:ct|computed[ ]tomography|study|examination|scan)
        (?:[ ](?:of[ ]the[ ](?:chest|thorax)|examination|scan|study))?
      | (?:the[ ])?(?:chest[ ]|thoracic[ ])?(?:ct|examination|study|scan)[ ]is[ ](?:normal|unremarkable)
      | no[ ](?:(?:acute|significant|pathological|relevant|abnormal|active|cardiopulmonary)[ ])*
        (?:abnormality|abnormalities|pathology|finding|findings|disease)
        (?:[ ](?:of|in|within)[ ]the[ ](?:chest|thorax))?(?:[ ](?:is|are|was|were)[ ](?:seen|found|detected|present|
        identified|observed))?
      | normal""",
    re.VERBOSE,
)


_CLEAR_LUNGS = re.compile(
    r"""(?:both[ ]|the[ ])*lungs?(?:[ ](?:fields?|parenchyma))?[ ](?:is|are|appears?|looks?)[ ]
        (?:clear|normal|unremarkable|free[ ]of[ ](?:findings|disease))(?:[ ](?:on[ ]both[ ]sides|bilaterally))?
      | clear[ ]lungs | lungs[ ]clear""",
    re.VERBOSE,
)


class CheckedReport(NamedTuple):
    """A report's sentences with what they rest on, and what contradicts the heads.

    Attributes:
        sentences: `ReportSentence.supported` is set.
        contradictions: In the order of the text, omissions last.
    """

    sentences: list[ReportSentence]
    contradictions: list[Contradiction]


def check_report(
    text: str, diseases: Sequence[DiseaseFinding], lesions: Sequence[LesionFinding]
) -> CheckedReport:
    """Link a report to the heads' findings and list everything in it that contradicts them.

    Args:
        text: The whole report.
        diseases: The classifier's findings with their thresholds.
        lesions: The localizer's findings.
    """
    sentences = ground_report(text, diseases, lesions)
    found = list(_of_sentences(sentences, diseases, lesions))
    found += _omissions(sentences, diseases, {item.finding for item in found if item.kind == "denied"})
    flagged = {item.sentence for item in found}
    checked = [
        sentence.model_copy(update={"supported": _supported(sentence, index in flagged)})
        for index, sentence in enumerate(sentences)
    ]
    return CheckedReport(checked, found)


def _supported(sentence: ReportSentence, flagged: bool) -> bool | None:
    if flagged:
        return False
    told = [item for item in sentence.findings if item.status != "historical"]
    return True if any(item.probability is not None or item.in_mask for item in told) else None


def _of_sentences(
    sentences: Sequence[ReportSentence],
    diseases: Sequence[DiseaseFinding],
    lesions: Sequence[LesionFinding],
) -> Iterator[Contradiction]:
    affirmed = {item.name for sentence in sentences for item in sentence.findings if item.affirmed}
    positive = [disease.name for disease in diseases if disease.positive]
    of_lungs = [name for name in positive if ORGAN_OF.get(name) == "lungs"]
    for index, sentence in enumerate(sentences):
        words = plain(sentence.text).rstrip(" .;!")
        for normal, called, found in (
            (_NORMAL, "the scan normal", positive),
            (_CLEAR_LUNGS, "the lungs clear", of_lungs),
        ):
            if found and normal.fullmatch(words):
                names = f"{len(found)} findings reach" if len(found) > 1 else f"{found[0]} reaches"
                message = f"Calls {called}; {names} the classifier's threshold"
                yield Contradiction(kind="called_normal", finding="", sentence=index, message=message)
        for item in sentence.findings:
            if item.affirmed:
                yield from _against_affirmed(item, index)
                yield from _against_sizes(item, sentence, index, lesions)
            elif item.status == "negative" and sentence.section != "recommendations":
                yield from _against_denied(item, sentence, index, lesions, item.name in affirmed)


def _against_affirmed(item: SentenceFinding, index: int) -> Iterator[Contradiction]:
    if not item.in_mask and item.positive is False:
        message = f"Affirms {item.name}; the classifier gives {_number(item)} and no mask shows it"
        yield Contradiction(kind="unsupported", finding=item.name, sentence=index, message=message)
        return
    against = "its mask shows next to nothing there" if item.in_mask else "the classifier looked elsewhere"
    told: set[str] = set()
    for place in item.places:
        if place.agreement == "wrong_side" or place.agreement == "wrong_lobe":
            message = f"Places {item.name} in the {_place_name(place)}; {against}"
            if message not in told:
                told.add(message)
                yield Contradiction(kind=place.agreement, finding=item.name, sentence=index, message=message)


def _against_sizes(
    item: SentenceFinding, sentence: ReportSentence, index: int, lesions: Sequence[LesionFinding]
) -> Iterator[Contradiction]:
    if len(item.places) != 1 or len(sizes_in(sentence.text, 0, len(sentence.text))) != 1:
        return  # of several nodules in a sentence, words do not say for sure whose size is which
    (place,) = item.places
    if place.lesion not in COUNTED_LESION_KEYS or place.agreement != "agrees" or not place.size_mm:
        return
    assert place.component is not None, "a place in a mask is one of its pieces"
    pieces = next(lesion.components for lesion in lesions if lesion.key == place.lesion)
    measured_mm = pieces[place.component].max_diameter_mm
    if abs(place.size_mm - measured_mm) > max(SIZE_OFF_MM, SIZE_OFF_SHARE * measured_mm):
        message = f"Gives {item.name} {place.size_mm:.0f} mm; its mask measures {measured_mm:.0f} mm there"
        yield Contradiction(kind="wrong_size", finding=item.name, sentence=index, message=message)


def _against_denied(
    item: SentenceFinding,
    sentence: ReportSentence,
    index: int,
    lesions: Sequence[LesionFinding],
    affirmed_elsewhere: bool,
) -> Iterator[Contradiction]:
    words = plain(sentence.text)
    if _QUALIFIED.search(words) and affirmed_elsewhere:
        return
    own = lesions_showing(item.name, lesions, words)
    places = [place for place in places_in(words, 0, len(words)) if _is_place(place)]
    if places:
        there = [place for place in places if own and agreement(place.side, place.region, own) == "agrees"]
        if there:
            where = _REGION_NAME.get(there[0].region or "", f"{there[0].side} side")
            message = f"Denies {item.name} in the {where}; its mask shows some there"
            yield Contradiction(kind="denied", finding=item.name, sentence=index, message=message)
        return
    if item.positive and not (item.name == _OPACITY and tells_ground_glass(words)):
        message = f"Denies {item.name}; the classifier gives {_number(item)}"
    elif own:
        message = f"Denies {item.name}; the mask of {own[0].name.lower()} shows {own[0].volume_ml:.1f} ml"
    else:
        return
    yield Contradiction(kind="denied", finding=item.name, sentence=index, message=message)


def _omissions(
    sentences: Sequence[ReportSentence], diseases: Sequence[DiseaseFinding], denied: set[str]
) -> Iterator[Contradiction]:
    affirmed = {item.name for sentence in sentences for item in sentence.findings if item.affirmed}
    affirmed |= {IMPLIED[name] for name in affirmed & set(IMPLIED)}
    for disease in diseases:
        if disease.positive and disease.name in _READABLE and disease.name not in affirmed | denied:
            message = (
                f"Does not mention {disease.name}; the classifier gives {disease.probability:.2f}, "
                f"threshold {disease.threshold:.2f}"
            )
            yield Contradiction(kind="not_mentioned", finding=disease.name, message=message)


def _is_place(place: Place) -> bool:
    return place.side in ("right", "left") or (place.region or "").endswith("_lobe")


def _place_name(place: ToldPlace) -> str:
    return _REGION_NAME.get(place.region or "", f"{place.side} side")


def _number(item: SentenceFinding) -> str:
    return f"{item.probability:.2f}, threshold {item.threshold:.2f}"
