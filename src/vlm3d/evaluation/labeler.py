"""A report's words become the 18 findings, each with the sentence that says so. Rules only, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm3d.evaluation.labeler_context import Context, Status
from vlm3d.evaluation.labeler_patterns import RULES, FindingRule
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
    """Whatever turns reports into labels."""

    def label_reports(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Labels (N, 18) of N reports, in the order of `vlm3d.labels.DISEASE_NAMES`."""
        ...


class RuleLabeler:
    """The embedded labeler, as a `ReportLabeler`."""

    def label_reports(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Labels (N, 18) of N reports."""
        return label_reports(texts)


_PRIORITY: dict[Status, int] = {"positive": 3, "uncertain": 2, "negative": 1, "historical": 0}


def label_report(text: str) -> ReportLabels:
    """Read which of the 18 findings a report says are there.

    A finding is present if any sentence says so, or says so with doubt; a sentence that denies it, or tells of the
    past only, does not count against another that affirms it.

    Args:
        text: The report, in English; headings and sections may stand or lack.
    """
    best: dict[str, Evidence] = {}
    for mention in mentions(text):
        old = best.get(mention.rule.name)
        if old is None or _PRIORITY[mention.status] > _PRIORITY[old.status]:
            start = mention.sentence.start + mention.start
            best[mention.rule.name] = Evidence(
                mention.sentence.text, start, start + mention.end - mention.start, mention.status
            )
    evidence = {name: best[name] for name in DISEASE_NAMES if name in best}
    return ReportLabels(tuple(_counts(rule, best.get(rule.name)) for rule in RULES), evidence)


def label_reports(texts: Iterable[str]) -> NDArray[np.bool_]:
    """Labels (N, 18) of N reports, in the order of `vlm3d.labels.DISEASE_NAMES`."""
    rows = [label_report(text).labels_K for text in texts]
    return np.array(rows, dtype=np.bool_).reshape(len(rows), len(DISEASE_NAMES))


class Mention(NamedTuple):
    """One naming of a finding: the rule, its sentence, the words' place in the sentence, what is said."""

    rule: FindingRule
    sentence: Sentence
    start: int
    end: int
    status: Status


def mentions(text: str) -> Iterator[Mention]:
    """Every naming of every finding, sentence by sentence."""
    whole = plain(text)
    rules = [rule for rule in RULES if any(stem in whole for stem in rule.stems)]
    if not rules:
        return
    for sentence in split_sentences(text):
        words = whole[sentence.start : sentence.end]
        context: Context | None = None
        for rule in rules:
            if not any(stem in words for stem in rule.stems):
                continue
            for match in rule.mention.finditer(words):
                if not _applies(rule, words, match):
                    continue
                context = context or Context(words)
                yield Mention(rule, sentence, match.start(), match.end(), context.status(*match.span()))


def _applies(rule: FindingRule, words: str, match: re.Match[str]) -> bool:
    """Whether the words near a match let it be this finding."""
    before, after = rule.window
    start, end = max(0, match.start() - before), match.end() + after
    if rule.unless is not None and rule.unless.search(words, start, min(end, len(words))):
        return False
    return rule.needs is None or rule.needs.search(words, start, min(end, len(words))) is not None


def _counts(rule: FindingRule, evidence: Evidence | None) -> bool:
    if evidence is None:
        return False
    return evidence.status == "positive" or (evidence.status == "uncertain" and rule.counts_if_uncertain)
