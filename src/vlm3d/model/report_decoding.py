"""Write a report word by word under three forced headings, with one cache from the first to the last word."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_sections import HEADING_PATTERN, HEADINGS, SEPARATOR, format_report

SECTION_SHARES = (0.65, 0.25, 0.10)
"""Of the token budget; what a section leaves over goes to the next."""

_SENTENCE_END = re.compile(r"(?<!^\d)(?<!^\d\d)[.!?](?=\s|$)", re.MULTILINE)
_LONGEST_STUTTER = 32


@dataclass(frozen=True)
class DecodingSettings:
    """How words are chosen.

    Attributes:
        max_new_tokens: Budget over the three sections, headings not counted; each gets one token at least.
        temperature: 0 takes the likeliest word.
        top_p: Sample from the smallest set of words that holds this probability.
        seed: Of the sampling.
        no_repeat_ngram: No run of this many tokens comes twice in a section; 0 lifts the guard.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0
    no_repeat_ngram: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"decoding needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got {self}"
            )


@dataclass(frozen=True)
class GeneratedReport:
    """A written report.

    Attributes:
        text: The report, in the form of `vlm3d.model.report_sections`.
        mean_surprisal_bits: Mean of -log2 p over its words, headings aside, under the model at temperature 1.
        num_tokens: Tokens written, headings aside.
    """

    text: str
    mean_surprisal_bits: float
    num_tokens: int


class ReportDecoder:
    """Writes one report after a prompt.

    Args:
        llm: The language model, in evaluation mode.
        settings: How words are chosen.
    """

    def __init__(self, llm: LanguageModel, settings: DecodingSettings) -> None:
        from transformers import DynamicCache

        self._llm = llm
        self._settings = settings
        self._cache = DynamicCache(config=llm.config)
        self._generator = torch.Generator().manual_seed(settings.seed)

    @torch.inference_mode()
    def write(self, prompt_1PM: Tensor) -> GeneratedReport:
        """Write the report that follows a prompt.

        Args:
            prompt_1PM: The prompt's embeddings: request, image and findings.
        """
        budget, shares = self._settings.max_new_tokens, list(SECTION_SHARES)
        bodies, surprisals = [], []
        pending = prompt_1PM
        for index, heading in enumerate(HEADINGS):
            text = heading if index == 0 else SEPARATOR + heading
            pending = torch.cat([pending, self._llm.embed_ids(self._llm.encode(text))[None]], dim=1)
            after = len(HEADINGS) - 1 - index  # each section that follows needs a token
            allowed = max(1, min(round(budget * shares[index] / sum(shares[index:])), budget - after))
            body, kept, bits, pending = self._write_section(pending, allowed)
            budget -= len(kept)
            bodies.append(body)
            surprisals += bits
        return GeneratedReport(format_report(*bodies), sum(surprisals) / len(surprisals), len(surprisals))

    def _write_section(self, pending_1TM: Tensor, budget: int) -> tuple[str, list[int], list[float], Tensor]:
        """Write one section's text.

        Returns:
            The text, its tokens, their surprisals in bits, and embeddings that the cache still lacks.
        """
        logits = self._feed(pending_1TM)
        start = self._cache.get_seq_length()
        tokens: list[int] = []
        bits: list[float] = []
        finished = False
        while True:
            token, surprisal = self._choose(logits, tokens)
            if token in self._llm.stop_token_ids:
                finished = True
                break
            tokens.append(token)
            bits.append(surprisal)
            if ended(self._llm.decode(tokens)) is not None:
                finished = True
                break
            if len(tokens) == budget:
                break
            logits = self._feed(self._llm.embed_ids([token])[None])
        body, kept = self._trim(tokens, finished)
        cached = min(self._cache.get_seq_length() - start, kept)
        self._rewind(start + cached)
        return body, tokens[:kept], bits[:kept], self._llm.embed_ids(tokens[cached:kept])[None]

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

    def _feed(self, embeddings_1TM: Tensor) -> Tensor:
        """Run the model on further embeddings; returns the logits (V,) of the next token."""
        output = self._llm(embeddings_1TM, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _rewind(self, length: int) -> None:
        if length < self._cache.get_seq_length():
            self._cache.crop(length - self._cache.get_seq_length())  # negative: tokens to forget

    def _choose(self, logits_V: Tensor, tokens: list[int]) -> tuple[int, float]:
        """Pick the next token; returns it with its surprisal in bits under the untouched model."""
        log_p_V = torch.log_softmax(logits_V, dim=0)
        allowed_V = logits_V.clone()
        banned = self._llm.control_token_ids - self._llm.stop_token_ids
        banned = banned | set(repeating_tokens(tokens, self._settings.no_repeat_ngram))
        if banned:
            allowed_V[torch.tensor(sorted(banned), device=allowed_V.device)] = -math.inf
        for _ in range(len(allowed_V)):
            token = self._sample(allowed_V)
            if self._leaves_text(tokens, token):
                return token, float(-log_p_V[token] / math.log(2))
            allowed_V[token] = -math.inf
        raise RuntimeError("no token of the language model begins a section's text")

    def _leaves_text(self, tokens: list[int], token: int) -> bool:
        """Whether the section holds text after this token; none may be empty."""
        if token in self._llm.stop_token_ids:
            return bool(tokens)
        text = self._llm.decode([*tokens, token])
        return bool(text[: ended(text)].strip("\ufffd \n\r\t"))

    def _sample(self, logits_V: Tensor) -> int:
        if self._settings.temperature == 0:
            return int(logits_V.argmax())
        p_V = torch.softmax(logits_V / self._settings.temperature, dim=0).cpu()
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= self._settings.top_p
        sorted_V[beyond_V] = 0
        return int(order_V[torch.multinomial(sorted_V, 1, generator=self._generator)])


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


def repeating_tokens(tokens: list[int], ngram: int) -> Iterator[int]:
    """Tokens that would make the text stutter.

    Those are tokens that would complete a run of ``ngram`` tokens already written, a block of four to 32
    tokens directly after itself, or a block of one to three tokens a third time in a row (a number such as
    11 may repeat a digit).
    """
    if ngram <= 0:
        return
    tail = tokens[len(tokens) - ngram + 1 :] if len(tokens) >= ngram else None
    if tail is not None:
        for start in range(len(tokens) - ngram + 1):
            if tokens[start : start + ngram - 1] == tail:
                yield tokens[start + ngram - 1]
    for period in range(1, _LONGEST_STUTTER + 1):
        length = period * (2 if period >= 4 else 3) - 1
        if len(tokens) < length:
            continue
        recent = tokens[-length:]
        if recent[period:] == recent[:-period]:
            yield tokens[-period]
