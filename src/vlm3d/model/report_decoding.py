"""Write reports, any number of them side by side; each is a generator of `vlm3d.model.report_writing`.

Shapes: P prompt tokens, M width of the language model, V vocabulary, R reports that are still written, T tokens told of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from vlm3d.model.beam_search import BeamWriting
from vlm3d.model.decoding_engine import DecodingEngine, Step, TransformersEngine, log_softmax_rows
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.llama_engine import LlamaEngine
from vlm3d.model.llama_weights import fits
from vlm3d.model.phrase_memory import PhraseMemory
from vlm3d.model.report_sections import HEADINGS, SEPARATOR
from vlm3d.model.report_writing import GeneratedReport, ReportWriting, Result, Writing
from vlm3d.model.token_choice import DecodingSettings, TokenChooser


class ReportDecoder:
    """Writes reports after prompts.

    Args:
        llm: The language model, in evaluation mode.
        settings: How words are chosen.
        on_text: Told of each report's text as it grows: number of the scan, of the sample, text so far. The
            last words of a section may be taken back.
        phrases: Of reports written before; in float32 they make this one faster and change none of its words.
    """

    def __init__(
        self,
        llm: LanguageModel,
        settings: DecodingSettings,
        on_text: Callable[[int, int, str], None] | None = None,
        phrases: PhraseMemory | None = None,
    ) -> None:
        self._llm = llm
        self._settings = settings
        self._on_text = on_text
        self._phrases = phrases or PhraseMemory()
        self._headings = [
            llm.encode(heading if index == 0 else SEPARATOR + heading)
            for index, heading in enumerate(HEADINGS)
        ]

    def write(self, prompt_1PM: Tensor) -> GeneratedReport:
        """Write the report that follows a prompt.

        Args:
            prompt_1PM: The prompt's embeddings: request, image and findings.
        """
        return self.write_all([prompt_1PM[0]])[0][0]

    @torch.inference_mode()
    def write_all(self, prompts: Sequence[Tensor], num_samples: int = 1) -> list[list[GeneratedReport]]:
        """Write ``num_samples`` reports after each prompt; each prompt is read once.

        Args:
            prompts: Embeddings (P, M), one a scan, as long as each is.
            num_samples: Reports a prompt. They differ where the temperature is above 0.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
        engine = open_engine(self._llm)
        opening_TM = self._llm.embed_ids(self._headings[0])
        room = max(self._settings.max_new_tokens, len(HEADINGS)) + sum(map(len, self._headings)) + 1
        opened = [torch.cat([prompt, opening_TM]) for prompt in prompts]
        if self._settings.num_beams > 1:
            return [
                [self._likeliest(engine, prompt_PM, room, scan)] * num_samples
                for scan, prompt_PM in enumerate(opened)
            ]
        logits_BV = engine.start(opened, num_samples, room)
        writings = [
            ReportWriting(self._llm, self._settings, self._headings, sample, self._teller(scan, sample)).run()
            for scan in range(len(prompts))
            for sample in range(num_samples)
        ]
        logits_RV = logits_BV.repeat_interleave(num_samples, dim=0)
        reports = run_in_step(engine, writings, logits_RV, self._phrases, room)
        return [reports[first : first + num_samples] for first in range(0, len(reports), num_samples)]

    def _likeliest(self, engine: DecodingEngine, prompt_PM: Tensor, room: int, scan: int) -> GeneratedReport:
        """One report by beam search; its beams are the engine's rows."""
        logits_1V = engine.start([prompt_PM], 1, room)
        writing = BeamWriting(self._llm, self._settings, self._headings, engine, self._teller(scan, 0))
        return run_in_step(engine, [writing.run()], logits_1V)[0]

    def _teller(self, scan: int, sample: int) -> Callable[[str], None] | None:
        tell = self._on_text
        return None if tell is None else lambda text: tell(scan, sample, text)


def open_engine(llm: LanguageModel) -> DecodingEngine:
    """The fastest way to run this model that is exact."""
    return LlamaEngine(llm) if fits(llm) else TransformersEngine(llm)


@torch.inference_mode()
def continue_prompts(
    engine: DecodingEngine,
    prompts: Sequence[Tensor],
    settings: DecodingSettings,
    num_samples: int = 1,
    phrases: PhraseMemory | None = None,
) -> list[list[list[int]]]:
    """Write exactly ``max_new_tokens`` tokens after each prompt, in no form and past any end token.

    Args:
        engine: That of the language model.
        prompts: Embeddings (P, M), one a scan.
        settings: How tokens are chosen; repetition is not watched.
        num_samples: Continuations a prompt.
        phrases: As in `ReportDecoder`.
    """
    logits_BV = engine.start(prompts, num_samples, settings.max_new_tokens)
    writings = [_continue(settings, sample) for _ in prompts for sample in range(num_samples)]
    logits_RV = logits_BV.repeat_interleave(num_samples, dim=0)
    written = run_in_step(engine, writings, logits_RV, phrases, settings.max_new_tokens)
    return [written[first : first + num_samples] for first in range(0, len(written), num_samples)]


def _continue(settings: DecodingSettings, sample: int) -> Writing[list[int]]:
    chooser, tokens = TokenChooser(settings, sample), list[int]()
    log_p_V = yield Step(0, [])
    while True:
        tokens.append(chooser.choose(log_p_V, set(), lambda _: True))
        if len(tokens) == settings.max_new_tokens:
            return tokens
        log_p_V = yield Step(len(tokens) - 1, tokens[-1:])


def run_in_step(
    engine: DecodingEngine,
    writings: Sequence[Writing[Result]],
    logits_RV: Tensor,
    phrases: PhraseMemory | None = None,
    room: int = 0,
) -> list[Result]:
    """Run writings until all are done, one forward pass for a step of each.

    Args:
        engine: With an open row for each writing.
        writings: Not yet begun.
        logits_RV: Of each one's first token.
        phrases: Guesses tokens, which the model reads along and which count where a writing chooses them itself.
        room: Most tokens that a row holds after its prompt; only guesses need to be told.
    """
    results: dict[int, Result] = {}
    rows = [_Row(writing, phrases) for writing in writings]
    running = list(range(len(rows)))
    told = log_softmax_rows(logits_RV).split(1)
    while running:
        steps, still = [], []
        for row, index in enumerate(running):
            try:
                steps.append(rows[index].advance(told[row]))
                still.append(row)
            except StopIteration as done:
                results[index] = done.value
        if len(still) < len(running):
            engine.keep_rows(still)
            running = [running[row] for row in still]
        if running:
            most = engine.guesses(len(running)) if phrases is not None else 0
            steps = [rows[index].guess(step, most, room) for index, step in zip(running, steps, strict=True)]
            told = log_softmax_rows(engine.feed(steps)).split([1 + step.guessed for step in steps])
    return [results[index] for index in range(len(writings))]


class _Row(Generic[Result]):
    """A writing, what has been read of it, and what the model already said of guessed tokens."""

    def __init__(self, writing: Writing[Result], phrases: PhraseMemory | None) -> None:
        self._writing = writing
        self._phrases = phrases
        self._text: list[int] = []
        self._guessed: list[int] = []
        next(writing)

    def advance(self, log_p_TV: Tensor) -> Step:
        """Go on until a token is chosen that was not guessed.

        Args:
            log_p_TV: After what was read for sure, and after each guess.

        Raises:
            StopIteration: With what was written.
        """
        try:
            for place, log_p_V in enumerate(log_p_TV):
                step = self._writing.send(log_p_V)
                known = min(step.keep, len(self._text))
                read = len(self._text)
                self._text[step.keep :] = step.token_ids
                if self._phrases is not None:
                    self._phrases.note(self._text, known)
                expected = self._guessed[place : place + 1]
                if step.token_ids != expected or step.keep != read:
                    return step
        except StopIteration:
            if self._phrases is not None:
                self._phrases.close(self._text)
            raise
        raise AssertionError("the last of the tokens told has no guess after it")

    def guess(self, step: Step, most: int, room: int) -> Step:
        """The step with guesses after it, as far as there are any and they find room."""
        free = room - step.keep - len(step.token_ids)
        if self._phrases is None or min(most, free) < 1:
            self._guessed = []
            return step
        self._guessed = self._phrases.guess(self._text, min(most, free))
        return Step(step.keep, [*step.token_ids, *self._guessed], len(self._guessed))
