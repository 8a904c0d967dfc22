"""The report's words in pieces: each sentence with the place that it leads to and the contradictions in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm3d.inference.grounding import section_bodies
from vlm3d.inference.prediction import (
    UNTRAINED_TASK_NOTES,
    Prediction,
    Report,
    ReportSentence,
    Section,
)
from vlm3d.labels import TASKS
from vlm3d.outputs.lesion_cards import LesionRow
from vlm3d.outputs.report_text import printable, report_sections, warning_line

_HEADINGS: tuple[tuple[Section, str], ...] = (
    ("findings", "Findings"),
    ("impression", "Impression"),
    ("recommendations", "Recommendations"),
)
_BASIS = {(True, True): "classifier and mask", (True, False): "classifier", (False, True): "mask only"}


@dataclass(frozen=True)
class TextPart:
    """A stretch of the report: one sentence, or what stands between two.

    Attributes:
        text: As written.
        number: Index of the sentence; None between sentences.
        sentence: What it rests on; None between sentences.
        rows: The pieces of lesions that it tells of, most important first.
        looked_at: Where no mask shows a finding that it tells: the finding's name and the canonical slice at which the
            classifier looked.
        conflicts: What contradicts the model's own findings, in words.
        finding: Name of the first disease that it names, or empty.
    """

    text: str
    number: int | None = None
    sentence: ReportSentence | None = None
    rows: tuple[LesionRow, ...] = ()
    looked_at: tuple[tuple[str, int], ...] = ()
    conflicts: tuple[str, ...] = ()
    finding: str = ""

    @property
    def evidence(self) -> str:
        """What the sentence rests on, in words: "Lung nodule: 0.83, threshold 0.50; classifier and mask"."""
        found = self.sentence.findings if self.sentence is not None else []
        return "; ".join(_basis(item.model_dump()) for item in found)

    @property
    def added(self) -> bool:
        """Whether a repair wrote it and not the language model."""
        return self.sentence is not None and self.sentence.origin == "repair"


@dataclass(frozen=True)
class Paragraph:
    """One section of the report."""

    section: Section
    heading: str
    parts: tuple[TextPart, ...]


@dataclass(frozen=True)
class CheckSummary:
    """What the check of the report against the heads found, in words.

    Attributes:
        headline: One line.
        count: Contradictions that remain.
        omissions: Findings that the report does not mention, one line each.
        notes: How the report came about, and what the check is worth.
        edits: What a repair changed, one line each.
    """

    headline: str
    count: int
    omissions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    edits: tuple[str, ...] = field(default=())


def report_paragraphs(report: Report, rows: Sequence[LesionRow] = ()) -> list[Paragraph]:
    """The report's sections in pieces; empty where its sentences are not known or do not fit the text.

    Args:
        report: With its sentences.
        rows: The lesions' pieces as the page lists them.
    """
    sentences = report.sentences
    if not sentences or any(report.text[item.start : item.end] != item.text for item in sentences):
        return []
    by_piece = {(row.lesion.key, row.place): row for row in rows}
    conflicts = _conflicts(report)
    bodies = section_bodies(report.text)
    paragraphs = []
    for section, heading in _HEADINGS:
        parts: list[TextPart] = []
        for body in bodies:
            if body.section == section:
                parts += [TextPart("\n")] if parts else []
                parts += _parts(report, body.start, body.end, by_piece, conflicts)
        paragraphs.append(Paragraph(section, heading, tuple(_trimmed(parts)) or (TextPart("None stated."),)))
    return paragraphs


def _parts(
    report: Report,
    start: int,
    end: int,
    by_piece: Mapping[tuple[str, int], LesionRow],
    conflicts: Mapping[int, tuple[str, ...]],
) -> Iterator[TextPart]:
    cursor = start
    for number, sentence in enumerate(report.sentences):
        if not cursor <= sentence.start <= sentence.end <= end:
            continue
        if sentence.start > cursor:
            yield TextPart(report.text[cursor : sentence.start])
        places = [place for finding in sentence.findings for place in finding.places]
        pieces = [
            (sentence.lesion, sentence.component),
            *((place.lesion, place.component) for place in places),
        ]
        rows = [by_piece[key, place] for key, place in dict.fromkeys(pieces) if (key, place) in by_piece]  # type: ignore[index]
        yield TextPart(
            sentence.text,
            number,
            sentence,
            tuple(rows),
            tuple(dict.fromkeys(_looked_at(sentence))),
            conflicts.get(number, ()),
            sentence.findings[0].name if sentence.findings else "",
        )
        cursor = sentence.end
    if cursor < end:
        yield TextPart(report.text[cursor:end])


def _looked_at(sentence: ReportSentence) -> Iterator[tuple[str, int]]:
    for finding in sentence.findings:
        for place in finding.places:
            if place.lesion is None and place.key_slice is not None:
                yield finding.name, place.key_slice


def _trimmed(parts: Sequence[TextPart]) -> Iterator[TextPart]:
    """Without the blank space at a section's ends."""
    kept = [part for part in parts if part.text]
    while kept and not kept[0].text.strip():
        kept = kept[1:]
    while kept and not kept[-1].text.strip():
        kept = kept[:-1]
    yield from kept


def _conflicts(report: Report) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for item in report.check.contradictions if report.check is not None else ():
        if item.sentence is not None:
            found[item.sentence] = (*found.get(item.sentence, ()), item.message)
    return found


def check_summary(prediction: Prediction) -> CheckSummary | None:
    """Tell what the check found; None where no report was checked."""
    check = prediction.report.check
    if check is None:
        return None
    headline = "No contradiction with the model's own probabilities and masks found"
    if check.count:
        plural = "s" if check.count > 1 else ""
        headline = f"{check.count} contradiction{plural} with the model's own probabilities and masks"
    return CheckSummary(
        headline,
        check.count,
        tuple(item.message for item in check.contradictions if item.sentence is None),
        tuple(_notes(prediction)),
        tuple(f"{edit.action} ({edit.section}): {edit.text} Reason: {edit.reason}." for edit in check.edits),
    )


def _notes(prediction: Prediction) -> Iterator[str]:
    check = prediction.report.check
    written = len(check.counts_by_attempt) if check is not None else 0
    if check is not None and written > 1:
        yield (
            f"Written {written} times, with {', '.join(map(str, check.counts_by_attempt))} contradictions in turn; "
            f"number {check.attempt + 1} is kept."
        )
    if check is not None and check.edits:
        yield "Changed after writing, to agree with the measurements; what was changed is listed below."
    untrained = prediction.model.training == "untrained"
    notes = [
        UNTRAINED_TASK_NOTES[task] for task in TASKS if untrained or task in prediction.model.untrained_tasks
    ]
    if notes:
        yield f"This check means nothing here. {' '.join(notes)}"


def _basis(finding: Mapping[str, Any]) -> str:
    words = [finding["name"], finding["status"]] if finding["status"] != "positive" else [finding["name"]]
    told = ", ".join(words)
    if finding["probability"] is not None and finding["threshold"] is not None:
        told += f": probability {finding['probability']:.2f}, threshold {finding['threshold']:.2f}"
    basis = _BASIS.get((bool(finding["positive"]), finding["in_mask"]))
    return f"{told} ({basis})" if basis and finding["affirmed"] else told


def report_as_text(prediction: Prediction) -> str:
    """The content of ``report.txt``: the warnings, the sections with contradictions marked, the check, the warnings."""
    warnings = "\n".join(line for line in (warning_line(prediction), prediction.disclaimer) if line)
    paragraphs = report_paragraphs(prediction.report)
    sections = [(item.heading, _marked(item)) for item in paragraphs] or report_sections(prediction)
    summary = check_summary(prediction)
    if summary is not None:
        lines = [f"{summary.headline}.", *(f"- {line}." for line in summary.omissions), *summary.notes]
        sections.append(
            ("Check of the report", "\n".join([*lines, *(f"- {line}" for line in summary.edits)]))
        )
    body = [f"{heading}\n{'-' * len(heading)}\n{text}" for heading, text in sections]
    return printable("\n\n".join([warnings, f"Scan: {prediction.scan.source}", *body, warnings])) + "\n"


def _marked(paragraph: Paragraph) -> str:
    return "".join(
        part.text + "".join(f" [CONTRADICTION: {line}]" for line in part.conflicts)
        for part in paragraph.parts
    )
