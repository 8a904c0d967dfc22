"""What happens to a report that contradicts the model's own heads: it is flagged, written again, or repaired."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from vlm3d.inference.contradictions import CheckedReport, check_report
from vlm3d.inference.grounding import ground_report, lesions_showing, tells_ground_glass
from vlm3d.inference.measured_sentences import ADVISED, DENIALS, advice, located_sentence, sided_line
from vlm3d.inference.prediction import (
    DiseaseFinding,
    LesionFinding,
    Policy,
    Report,
    ReportCheck,
    ReportEdit,
    ReportSentence,
    Section,
)
from vlm3d.labels import IMPLIED, ORGAN_OF
from vlm3d.model.report_sections import format_report, parse_report

_MISTOLD = ("wrong_side", "wrong_lobe", "wrong_size")
_ROUNDS = 3
_WITHOUT_NEWS = frozenset({"a", "an", "the", "is", "are", "in", "of", "on", "there", "seen", "lies", "prese"})
_ORDER: tuple[Section, ...] = ("findings", "impression", "recommendations")


class Draft(Protocol):
    """A report as the language model writes it; `vlm3d.model.report_decoding.GeneratedReport` is one."""

    @property
    def text(self) -> str: ...
    @property
    def mean_surprisal_bits(self) -> float: ...


def consistent_report(
    write: Callable[[int], Draft],
    diseases: Sequence[DiseaseFinding],
    lesions: Sequence[LesionFinding],
    policy: Policy = "flag",
    attempts: int = 3,
) -> Report:
    """Write a report, hold it against the heads, and do with its contradictions what the policy says.

    * ``flag`` keeps the report and lists them.
    * ``regenerate`` writes again until a report has none, at most ``attempts`` more times, and keeps the one with the
      fewest; the earliest of several.
    * ``repair`` takes out what contradicts and adds what is left out, in plain sentences made from the measurements; see
      `mend_report`.

    Args:
        write: Called with 0, 1, 2, …: the number of the attempt.
        diseases: The classifier's findings.
        lesions: The localizer's findings.
        policy: See above.
        attempts: Of ``regenerate``, besides the first report.
    """
    drafts = [write(0)]
    checks = [check_report(drafts[0].text, diseases, lesions)]
    while policy == "regenerate" and checks[-1].contradictions and len(drafts) <= attempts:
        drafts.append(write(len(drafts)))
        checks.append(check_report(drafts[-1].text, diseases, lesions))
    counts = [len(check.contradictions) for check in checks]
    kept = counts.index(min(counts))
    text, checked, edits = drafts[kept].text, checks[kept], list[ReportEdit]()
    if policy == "repair":
        text, edits = mend_report(text, diseases, lesions)
        checked = _with_origins(check_report(text, diseases, lesions), edits)
    sections = parse_report(text)
    return Report(
        text=text,
        findings=sections.findings,
        impression=sections.impression,
        recommendations=sections.recommendations,
        # to a thousandth: the last digits hang on how many words one pass of the model checked
        uncertainty=round(drafts[kept].mean_surprisal_bits, 3),
        generated=True,
        sentences=checked.sentences,
        check=ReportCheck(
            policy=policy,
            count=len(checked.contradictions),
            contradictions=checked.contradictions,
            counts_by_attempt=counts,
            attempt=kept,
            edits=edits,
            text_before_repair=drafts[kept].text if edits else None,
        ),
    )


def mend_report(
    text: str, diseases: Sequence[DiseaseFinding], lesions: Sequence[LesionFinding]
) -> tuple[str, list[ReportEdit]]:
    """`repair_report`, then what is said twice and what is left unsaid.

    A sentence that tells nothing and has no word beyond earlier ones of its section goes. A finding that only the
    impression tells is described, with its place. One of `DENIALS` that the report is silent on and both heads exclude is
    denied, since a reader cannot tell whether what goes unsaid was looked for: it has no piece in a mask and less than half
    of the probability from which it is positive. Recommendations that rest on findings which were changed are made anew.

    Returns:
        As `repair_report`.
    """
    before = check_report(text, diseases, lesions)
    text, edits = repair_report(text, diseases, lesions)
    sentences = ground_report(text, diseases, lesions)
    draft = _Draft()
    changes: list[ReportEdit] = []
    for sentence, again in zip(sentences, _say_it_again(sentences), strict=True):
        if again:
            reason = "Says again what was said before"
            changes.append(
                ReportEdit(action="removed", section=sentence.section, text=sentence.text, reason=reason)
            )
        else:
            draft.keep(sentence)
    for name, line, reason in _unsaid(sentences, diseases, lesions):
        draft.add("findings", name, line)
        changes.append(ReportEdit(action="added", section="findings", text=line, reason=reason))
    changed = ADVISED & (_affirmed(before.sentences) ^ _affirmed(sentences))
    changed |= {item.finding for item in before.contradictions if item.kind == "wrong_size"}
    if changed:
        changes += _advise_anew(draft, sentences, advice(_affirmed(sentences), lesions), changed)
    return draft.text if changes else text, edits + changes


def _affirmed(sentences: Sequence[ReportSentence]) -> frozenset[str]:
    return frozenset(
        item.name
        for sentence in sentences
        if sentence.section != "recommendations"
        for item in sentence.findings
        if item.affirmed
    )


def _advise_anew(
    draft: _Draft, sentences: Sequence[ReportSentence], lines: Sequence[str], changed: Set[str]
) -> Iterator[ReportEdit]:
    """Put other recommendations in place of a report's, and say so, where it has others."""
    old = [sentence.text for sentence in sentences if sentence.section == "recommendations"]
    if old == list(lines):
        return
    reason = f"Rests on what was changed: {', '.join(sorted(changed))}"
    draft.clear("recommendations")
    for action, texts in (("removed", old), ("added", lines)):
        for text in texts:
            yield ReportEdit(action=action, section="recommendations", text=text, reason=reason)
    for line in lines:
        draft.add("recommendations", "", line)


def _say_it_again(sentences: Sequence[ReportSentence]) -> Iterator[bool]:
    """For each sentence, whether earlier ones of its section tell all of it: findings, places, sizes, and its words."""
    told: dict[Section, set[tuple[object, ...]]] = {section: set() for section in _ORDER}
    said: dict[Section, set[str]] = {section: set() for section in _ORDER}
    for sentence in sentences:
        if sentence.section == "recommendations":
            yield False
            continue
        facts: set[tuple[object, ...]] = set()
        names: set[tuple[object, ...]] = set()
        for item in sentence.findings:
            name = (item.name, item.status, tells_ground_glass(sentence.text))
            names.add((*name, None, None, None))
            facts |= {(*name, place.side, place.region, place.size_mm) for place in item.places}
        # "spiculated" is no fact that is linked, and yet it is news; "opacities" after "opacity" is none
        words = {word[:5] for word in re.findall(r"\w+", sentence.text.lower())} - _WITHOUT_NEWS
        known = words <= said[sentence.section] and (facts or names) <= told[sentence.section]
        yield bool(names) and known
        told[sentence.section] |= facts | names
        said[sentence.section] |= words


def _unsaid(
    sentences: Sequence[ReportSentence],
    diseases: Sequence[DiseaseFinding],
    lesions: Sequence[LesionFinding],
) -> Iterator[tuple[str, str, str]]:
    """Lines that the findings lack, with name and reason of each: what is there first, then what is not."""
    named = {item.name for sentence in sentences for item in sentence.findings}
    told = {
        item.name
        for sentence in sentences
        if sentence.section == "findings"
        for item in sentence.findings
        if item.affirmed
    }
    told |= {IMPLIED[name] for name in told & set(IMPLIED)}
    for disease in diseases:
        if disease.positive and disease.name in named - told:
            line = located_sentence(disease.name, lesions, disease.places)
            yield disease.name, line, f"Only the impression tells of {disease.name}"
    for disease in diseases:
        excluded = disease.probability < 0.5 * disease.threshold and not lesions_showing(
            disease.name, lesions
        )
        if excluded and disease.name in DENIALS and disease.name not in named:
            yield (
                disease.name,
                DENIALS[disease.name],
                f"Says nothing of {disease.name}; the classifier gives {disease.probability:.2f}, "
                f"threshold {disease.threshold:.2f}",
            )


def repair_report(
    text: str, diseases: Sequence[DiseaseFinding], lesions: Sequence[LesionFinding]
) -> tuple[str, list[ReportEdit]]:
    """Take out the sentences that contradict the heads and add what the report leaves out.

    A sentence goes as a whole; what it said rightly besides is said again, from the measurements. A section that this
    leaves empty gets what the heads found, the recommendations "None."

    Returns:
        The report under its three headings, and what was changed; an untouched report comes back as it was.
    """
    edits: list[ReportEdit] = []
    for _ in range(_ROUNDS):
        checked = check_report(text, diseases, lesions)
        if not checked.contradictions:
            break
        text = _repaired(checked, diseases, lesions, edits)
    return text, edits


def _repaired(
    checked: CheckedReport,
    diseases: Sequence[DiseaseFinding],
    lesions: Sequence[LesionFinding],
    edits: list[ReportEdit],
) -> str:
    reasons = {item.sentence: item.message for item in reversed(checked.contradictions)}
    draft = _Draft()
    told: dict[Section, set[str]] = {section: set() for section in _ORDER}
    wanted = {
        item.finding: item.message
        for item in checked.contradictions
        if item.kind in ("not_mentioned", "denied", *_MISTOLD)
    }
    for index, sentence in enumerate(checked.sentences):
        if index in reasons:
            draft.take_out(sentence)
            edits.append(
                ReportEdit(
                    action="removed", section=sentence.section, text=sentence.text, reason=reasons[index]
                )
            )
            wanted |= dict.fromkeys(_said_rightly(sentence), reasons[index])
        else:
            draft.keep(sentence)
            told[sentence.section] |= {item.name for item in sentence.findings if item.affirmed}
    seen = {disease.name: disease.places for disease in diseases}
    for name in sorted(wanted, key=_place_in(diseases)):
        lines: tuple[tuple[Section, str], ...] = (
            ("findings", located_sentence(name, lesions, seen.get(name, ()))),
            ("impression", sided_line(name, lesions, seen.get(name, ()))),
        )
        for section, line in lines:
            if name not in told[section]:
                draft.add(section, name, line)
                edits.append(ReportEdit(action="added", section=section, text=line, reason=wanted[name]))
    for section in {sentence.section: None for sentence in checked.sentences}:
        if draft.is_empty(section):
            lines_left = _what_is_left_to_say(section, diseases, lesions)
            for line in lines_left:
                draft.add(section, "", line)
            reason = "Nothing else of the section was left"
            edits.append(
                ReportEdit(action="added", section=section, text=" ".join(lines_left), reason=reason)
            )
    return draft.text


@dataclass
class _Line:
    """A sentence and the findings that it names; without text, where one was that is taken out."""

    text: str | None
    names: frozenset[str]


class _Draft:
    """A report that is being mended: what is added stands where a reader looks for it."""

    def __init__(self) -> None:
        self._lines: dict[Section, list[_Line]] = {section: [] for section in _ORDER}

    def keep(self, sentence: ReportSentence) -> None:
        """Keep a sentence as it is."""
        self._lines[sentence.section].append(_Line(sentence.text, _names(sentence)))

    def take_out(self, sentence: ReportSentence) -> None:
        """Leave a sentence out, and remember its place."""
        self._lines[sentence.section].append(_Line(None, _names(sentence)))

    def add(self, section: Section, name: str, text: str) -> None:
        """Add a sentence about a finding: where it was named before, in the findings else beside those of its organ."""
        lines = self._lines[section]
        same = [place for place, line in enumerate(lines) if name in line.names]
        if not same and section == "findings":
            organ = ORGAN_OF.get(name)
            same = [
                place
                for place, line in enumerate(lines)
                if organ in {ORGAN_OF[other] for other in line.names if other in ORGAN_OF}
            ]
        lines.insert(same[-1] + 1 if same else len(lines), _Line(text, frozenset({name})))

    def clear(self, section: Section) -> None:
        """Leave a section out."""
        self._lines[section] = []

    def is_empty(self, section: Section) -> bool:
        """Whether nothing is left of a section."""
        return all(line.text is None for line in self._lines[section])

    @property
    def text(self) -> str:
        """The report under its three headings."""
        return format_report(
            *(
                " ".join(_closed(line.text) for line in self._lines[section] if line.text is not None)
                for section in _ORDER
            )
        )


def _names(sentence: ReportSentence) -> frozenset[str]:
    return frozenset(item.name for item in sentence.findings)


def _what_is_left_to_say(
    section: Section, diseases: Sequence[DiseaseFinding], lesions: Sequence[LesionFinding]
) -> list[str]:
    """A section of which every sentence was taken out, from the heads alone: no section of a report is empty."""
    if section == "recommendations":
        return ["None."]
    found = [disease for disease in diseases if disease.positive]
    if section == "impression":
        return [sided_line(disease.name, lesions, disease.places) for disease in found] or ["No finding."]
    return [located_sentence(disease.name, lesions, disease.places) for disease in found] or ["No finding."]


def _closed(sentence: str) -> str:
    """The sentence with a full stop where it ends with none, so that the next one stays apart."""
    return sentence if sentence[-1] in ".;!?:" else f"{sentence}."


def _said_rightly(sentence: ReportSentence) -> list[str]:
    return [
        item.name for item in sentence.findings if item.affirmed and (item.positive is True or item.in_mask)
    ]


def _place_in(diseases: Sequence[DiseaseFinding]) -> Callable[[str], int]:
    order = {disease.name: place for place, disease in enumerate(diseases)}
    return lambda name: order.get(name, len(order))


def _with_origins(checked: CheckedReport, edits: Sequence[ReportEdit]) -> CheckedReport:
    added = {(edit.section, edit.text) for edit in edits if edit.action == "added"}
    sentences = [
        sentence.model_copy(update={"origin": "repair"})
        if (sentence.section, sentence.text) in added
        else sentence
        for sentence in checked.sentences
    ]
    return CheckedReport(sentences, checked.contradictions)
