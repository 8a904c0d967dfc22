"""One report as it is written: three sections under forced headings, none empty, nothing stuttered.

A writing is a generator that yields what the language model has to read next and receives the log-probabilities of the
token that follows; `vlm3d.model.report_decoding` runs many of them in step.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from vlm3d.model.decoding_engine import Step
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_sections import HEADING_PATTERN, HEADINGS, SEPARATOR, format_report
from vlm3d.model.token_choice import DecodingSettings, TokenChooser, repeating_tokens

SECTION_SHARES = (0.65, 0.25, 0.10)
"""Of the token budget; what a section leaves over goes to the next."""

_SENTENCE_END = re.compile(r"(?<!^\d)(?<!^\d\d)[.!?](?=\s|$)", re.MULTILINE)
_ENDING_CHARACTERS = frozenset("\n:*_")
"""A section ends at a blank line or a heading, so with one of these."""


@dataclass(frozen=True)
class GeneratedReport:
    """A written report.

    Attributes:
        text: The report, in the form of `vlm3d.model.report_sections`.
        mean_surprisal_bits: Mean of -log2 p over its words, headings aside, under the model at temperature 1.
        num_tokens: Tokens written, headings aside.
        token_ids: All that stands after the prompt, as the model read it: headings, words and, where the model
            ended the report by itself, the end token.
        log_probs: Natural log-probability of each of them at temperature 1; 0 where it was forced.
        chosen: True where the model chose the token, False where it was forced, as headings are.
    """

    text: str
    mean_surprisal_bits: float
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    chosen: tuple[bool, ...] = ()


Result = TypeVar("Result")
Writing = Generator[Step, Tensor, Result]
"""Yields what the model reads next, receives log-probabilities (V,), returns what it wrote."""


class ReportWriting:
    """One report as it is written.

    Args:
        llm: The language model, for its tokenizer.
        settings: How words are chosen.
        headings: Token ids of the three headings, blank lines before them included.
        sample: Number of this report among those of the same scan.
        tell: Told of the text as it grows.
    """

    def __init__(
        self,
        llm: LanguageModel,
        settings: DecodingSettings,
        headings: Sequence[list[int]],
        sample: int = 0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self._headings = headings
        self._chooser = TokenChooser(settings, sample)
        self._tell = tell
        self._bodies: list[str] = []
        self._token_ids = list(headings[0])
        self._log_probs = [0.0] * len(headings[0])
        self._chosen = [False] * len(headings[0])
        self._pieces: dict[int, str] = {}

    def run(self) -> Writing[GeneratedReport]:
        """Write the three sections; the first heading has been read with the prompt."""
        log_p_V = yield Step(0, [])
        budget, shares, surprisal, written = self._settings.max_new_tokens, list(SECTION_SHARES), 0.0, 0
        after_prompt = 0
        for index in range(len(HEADINGS)):
            following = len(HEADINGS) - 1 - index  # each section that follows needs a token
            allowed = max(1, min(round(budget * shares[index] / sum(shares[index:])), budget - following))
            tokens, log_probs, read = yield from self._section(log_p_V, allowed, after_prompt)
            finished = len(log_probs) > len(tokens) or ended(self._llm.decode(tokens)) is not None
            body, kept = self._trim(tokens, finished)
            self._bodies.append(body)
            self._record(tokens[:kept], log_probs[:kept], chosen=True)
            surprisal -= sum(log_probs[:kept]) / math.log(2)
            written += kept
            budget -= kept
            read = min(read, kept)
            if following:
                heading = self._headings[index + 1]
                pending = [*tokens[read:kept], *heading]
                self._record_heading(heading, tokens[kept:], log_probs[kept:])
                log_p_V = yield Step(after_prompt + read, pending)
                after_prompt += kept + len(heading)
            elif len(log_probs) > len(tokens) == kept:
                self._record([self._end], log_probs[-1:], chosen=True)
        return GeneratedReport(
            format_report(*self._bodies),
            surprisal / written,
            written,
            tuple(self._token_ids),
            tuple(self._log_probs),
            tuple(self._chosen),
        )

    def _section(
        self, log_p_V: Tensor, budget: int, after_prompt: int
    ) -> Generator[Step, Tensor, tuple[list[int], list[float], int]]:
        """Write one section's tokens.

        Returns:
            The tokens without the one that stopped it, their log-probabilities with that one's, and how many
            tokens of the section the model has read.
        """
        tokens: list[int] = []
        log_probs: list[float] = []
        while True:
            banned = self._banned(tokens)
            token = self._chooser.choose(log_p_V, banned, lambda token: self._leaves_text(tokens, token))
            log_probs.append(float(log_p_V[token]))
            if token in self._llm.stop_token_ids:
                self._end = token
                return tokens, log_probs, len(tokens)
            tokens.append(token)
            if self._tell is not None:
                self._tell(self._text_so_far(tokens))
            if self._may_end(token) and ended(self._llm.decode(tokens)) is not None:
                return tokens, log_probs, len(tokens) - 1
            if len(tokens) == budget:
                return tokens, log_probs, len(tokens) - 1
            log_p_V = yield Step(after_prompt + len(tokens) - 1, [token])

    def _banned(self, tokens: list[int]) -> set[int]:
        """Tokens that may not follow these of a section."""
        controls = self._llm.control_token_ids - self._llm.stop_token_ids
        return controls | set(repeating_tokens(tokens, self._settings.no_repeat_ngram))

    def _record(self, tokens: Sequence[int], log_probs: Sequence[float], *, chosen: bool) -> None:
        self._token_ids += tokens
        self._log_probs += log_probs
        self._chosen += [chosen] * len(tokens)

    def _record_heading(self, heading: list[int], dropped: list[int], log_probs: list[float]) -> None:
        """Record a forced heading; what the model began of it by itself counts as chosen."""
        own = next(
            (n for n, (a, b) in enumerate(zip(heading, dropped, strict=False)) if a != b),
            min(len(heading), len(dropped)),
        )
        self._record(heading[:own], log_probs[:own], chosen=True)
        self._record(heading[own:], [0.0] * (len(heading) - own), chosen=False)

    def _text_so_far(self, tokens: list[int]) -> str:
        text = self._llm.decode(tokens)
        parts = zip(HEADINGS, [*self._bodies, text[: ended(text)].strip()], strict=False)
        return SEPARATOR.join(heading + body for heading, body in parts)

    def _trim(self, tokens: list[int], finished: bool) -> tuple[str, int]:
        """Cut what follows the section's end, and a last sentence that the budget broke off."""
        text = self._llm.decode(tokens)
        end = ended(text)
        body = (text if end is None else text[:end]).rstrip("\ufffd").rstrip()
        if not finished:
            body = whole_sentences(body)
        kept = len(tokens)
        while kept > 1 and len(self._llm.decode(tokens[: kept - 1]).rstrip()) >= len(body):
            kept -= 1
        return body.strip(), kept

    def _may_end(self, token: int) -> bool:
        """Whether a section can end with this token: it holds a character that blank lines and headings need."""
        if token not in self._pieces:
            self._pieces[token] = self._llm.decode([token])
        return not _ENDING_CHARACTERS.isdisjoint(self._pieces[token])

    def _leaves_text(self, tokens: list[int], token: int) -> bool:
        """Whether the section holds text after this token; none may be empty."""
        if token in self._llm.stop_token_ids:
            return bool(tokens)
        text = self._llm.decode([*tokens, token])
        return bool(text[: ended(text)].strip("\ufffd \n\r\t"))


def ended(text: str) -> int | None:
    """Where a section's text ends: at a blank line or the next heading; None while it goes on."""
    body = text.lstrip()
    ends = [match.start() for match in HEADING_PATTERN.finditer(body)]
    if SEPARATOR in body:
        ends.append(body.index(SEPARATOR))
    return min(ends) + len(text) - len(body) if ends else None


def whole_sentences(text: str) -> str:
    """The text up to its last complete sentence; the whole text where there is none.

    A number with a point ('3.') begins an item of a list and ends no sentence.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else text
