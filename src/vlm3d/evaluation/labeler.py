"""A report's words become the 18 findings, each with the sentence that says so. Rules only, no weights."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.labeler_context import Context, Status
from vlm3d.evaluation.labeler_patterns import RULES
from vlm3d.evaluation.labeler_rule import FindingRule, Naming
from vlm3d.evaluation.sentences import Sentence, plain, split_sentences
from vlm3d.labels import DISEASE_NAMES


class Evidence(NamedTuple):
    """The sentence that decided a finding.

    Attributes:
        sentence: As written.
        start: Index in the report of the words that name the finding.
        end: Index past them.
        status: What the sentence says about it.
    """

    sentence: str
    start: int
    end: int
    status: Status


@dataclass(frozen=True)
class ReportLabels:
    """What a report says about every disease.

    Attributes:
        labels_K: Present or not, in the order of `vlm3d.labels.DISEASE_NAMES`.
        evidence: The deciding sentence of each disease that the report names.
    """

    labels_K: tuple[bool, ...]
    evidence: dict[str, Evidence]

    @property
    def present(self) -> list[str]:
        """Names of the diseases that are there."""
        return [name for name, label in zip(DISEASE_NAMES, self.labels_K, strict=True) if label]


class ReportLabeler(Protocol):
    """Whatever turns reports into labels.

    Attributes:
        name: As figures name it.
    """

    name: str

    def label_reports(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Labels (N, 18) of N reports, in the order of `vlm3d.labels.DISEASE_NAMES`."""
        ...


class RuleLabeler:
    """The embedded labeler, as a `ReportLabeler`."""

    name = "vlm3d's rules"

    def label_reports(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Labels (N, 18) of N reports."""
        return label_reports(texts)


class Mention(NamedTuple):
    """One naming of a finding.

    Attributes:
        rule: Of the finding.
        sentence: That names it.
        start: Index in the sentence of the words that name it.
        end: Index past them.
        status: What the sentence says about it.
        asked: A question mark stands right behind it.
    """

    rule: FindingRule
    sentence: Sentence
    start: int
    end: int
    status: Status
    asked: bool

    @property
    def counts(self) -> bool:
        """Whether it makes the finding present."""
        if self.status == "uncertain":
            return self.rule.counts_if_asked or not self.asked
        return self.status == "positive"

    @property
    def weight(self) -> tuple[bool, int]:
        """The mention with the greatest weight decides the finding."""
        return self.counts, _ORDER.index(self.status)


_ORDER: tuple[Status, ...] = ("historical", "negative", "uncertain", "positive")
_ASKED = re.compile(r"\w{0,3} ?[(\[]?\?")


def label_report(text: str) -> ReportLabels:
    """Read which of the 18 findings a report says are there.

    A finding is present if any sentence says so, or says so with doubt; a sentence that denies it, or tells of the
    past only, does not count against another that affirms it.

    Args:
        text: The report, in English; headings and sections may stand or lack.
    """
    best: dict[str, Mention] = {}
    for mention in mentions(text):
        old = best.get(mention.rule.name)
        if old is None or mention.weight > old.weight:
            best[mention.rule.name] = mention
    evidence = {name: _evidence(best[name]) for name in DISEASE_NAMES if name in best}
    return ReportLabels(tuple(name in best and best[name].counts for name in DISEASE_NAMES), evidence)


def _evidence(mention: Mention) -> Evidence:
    start = mention.sentence.start
    return Evidence(mention.sentence.text, start + mention.start, start + mention.end, mention.status)


def label_reports(texts: Iterable[str]) -> NDArray[np.bool_]:
    """Labels (N, 18) of N reports, in the order of `vlm3d.labels.DISEASE_NAMES`."""
    rows = [label_report(text).labels_K for text in texts]
    return np.array(rows, dtype=np.bool_).reshape(len(rows), len(DISEASE_NAMES))


def mentions(text: str) -> Iterator[Mention]:
    """Every naming of every finding, finding by finding, each in the report's order."""
    whole = plain(text)
    sentences = split_sentences(text)
    starts = [sentence.start for sentence in sentences]
    contexts: dict[int, Context] = {}
    for rule in RULES:
        for index in _sentences_with(rule.stems, whole, starts):
            sentence = sentences[index]
            words = whole[sentence.start : sentence.end]
            for naming in rule.namings:
                for match in naming.words.finditer(words):
                    if not _applies(naming, words, match):
                        continue
                    context = contexts.get(index)
                    if context is None:
                        context = contexts[index] = Context(words, sentence.text)
                    start, end = match.span()
                    asked = _ASKED.match(words, end) is not None
                    yield Mention(rule, sentence, start, end, context.status(start, end), asked)


def _sentences_with(stems: tuple[str, ...], whole: str, starts: list[int]) -> list[int]:
    """Indices of the sentences that hold any of the stems, in the report's order."""
    found: set[int] = set()
    for stem in stems:
        place = whole.find(stem)
        while place >= 0:
            index = bisect_right(starts, place) - 1
            if index >= 0:
                found.add(index)
            following = starts[index + 1] if index + 1 < len(starts) else len(whole)
            place = whole.find(stem, max(following - len(stem), place + 1))
    return sorted(found)


def _applies(naming: Naming, words: str, match: re.Match[str]) -> bool:
    """Whether the words near a match let it be this finding."""
    if naming.unless is None and naming.needs is None:
        return True
    before, after = naming.window
    near = words[max(0, match.start() - before) : match.end() + after]
    if naming.unless is not None and naming.unless.search(near):
        return False
    return naming.needs is None or naming.needs.search(near) is not None
