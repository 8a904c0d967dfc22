"""The clinical report as plain text, and the cleaning of text that comes from files or a language model."""

from __future__ import annotations

import re

from vlm3d.inference.prediction import TRAINING_NOTES, Prediction

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters: a terminal obeys some of them
    "\u202a-\u202e\u2066-\u2069"  # bidirectional overrides: they make text read other than it is
    "\ud800-\udfff]"  # lone surrogates: no file can hold them
)


def printable(text: str) -> str:
    """The text without characters that act instead of being read; tabs and line breaks stay."""
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def warning_line(prediction: Prediction) -> str:
    """How far the weights can be trusted, in one line; empty for a model of which every task was trained."""
    return prediction.training_note or TRAINING_NOTES[prediction.model.training]


def report_sections(prediction: Prediction) -> list[tuple[str, str]]:
    """The report's headings with their text, in the order in which they are read."""
    report = prediction.report
    if not report.generated:
        return [("Report", "No report was written: report generation was switched off.")]
    sections = [
        ("Findings", report.findings),
        ("Impression", report.impression),
        ("Recommendations", report.recommendations),
    ]
    if not any(text.strip() for _, text in sections):
        sections = [("Findings", report.text), *sections[1:]]
    return [(heading, printable(text).strip() or "None stated.") for heading, text in sections]
