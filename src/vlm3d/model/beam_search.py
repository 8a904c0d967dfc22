"""A report whose sections are each the likeliest of several that are followed at once.

Shapes: V vocabulary, R beams that are followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlm3d.model.decoding_engine import DecodingEngine, Step, log_softmax_rows
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_writing import ReportWriting, ended
from vlm3d.model.token_choice import DecodingSettings


@dataclass(frozen=True)
class Beam:
    """The beginning of a section, or a whole one.

    Attributes:
        tokens: Without the one that stopped it.
        log_probs: Of them and, where it was stopped by a token, of that one.
        end: The token that stopped it, if one did.
    """

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    end: int | None = None

    @property
    def total(self) -> float:
        """Log-probability of all."""
        return sum(self.log_probs)

    def score(self, length_penalty: float) -> float:
        """What beams are compared by: at a penalty of 1 the mean log-probability of a token."""
        return self.total / max(len(self.log_probs), 1) ** length_penalty


class BeamWriting(ReportWriting):
    """Writes a report section by section, each by beam search (Graves 2012).

    Of all ways to go on from the beams, the likeliest ``num_beams`` are followed. A section is finished where a greedy one
    would be; search ends when as many are finished and none that goes on scores higher than the worst of them now (with a
    mean over tokens it still might later).

    Args:
        llm: The language model, for its tokenizer.
        settings: How words are chosen.
        headings: As in `ReportWriting`.
        engine: With one open row.
        tell: As in `ReportWriting`; told of finished sections only.
    """

    def __init__(
        self,
        llm: LanguageModel,
        settings: DecodingSettings,
        headings: Sequence[list[int]],
        engine: DecodingEngine,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(llm, settings, headings, tell=tell)
        self._engine = engine

    def _section(
        self, log_p_V: Tensor, budget: int, after_prompt: int
    ) -> Generator[Step, Tensor, tuple[list[int], list[float], int]]:
        yield from ()  # the beams take their steps here, not in step with other reports
        penalty, most = self._settings.length_penalty, self._settings.num_beams
        beams, finished, log_p_RV = [Beam()], list[Beam](), log_p_V[None]
        while beams:
            grown, parents = list[Beam](), list[int]()
            for beam, parent in self._continued(beams, log_p_RV):
                if beam.end is not None or self._whole(beam, budget):
                    finished.append(beam)
                elif len(grown) < most:
                    grown.append(beam)
                    parents.append(parent)
            finished = sorted(finished, key=lambda beam: beam.score(penalty), reverse=True)[:most]
            hope = max((beam.score(penalty) for beam in grown), default=-math.inf)
            if len(finished) == most and finished[-1].score(penalty) >= hope:
                break
            beams = grown
            if beams:
                self._engine.keep_rows(parents)
                place = after_prompt + len(beams[0].tokens) - 1
                steps = [Step(place, [beam.tokens[-1]]) for beam in beams]
                log_p_RV = log_softmax_rows(self._engine.feed(steps))
        best = finished[0]
        if best.end is not None:
            self._end = best.end
        if self._tell is not None:
            self._tell(self._text_so_far(list(best.tokens)))
        self._engine.keep_rows([0])  # what the section says is read again, with the heading that follows
        return list(best.tokens), list(best.log_probs), 0

    def _continued(self, beams: Sequence[Beam], log_p_RV: Tensor) -> Iterator[tuple[Beam, int]]:
        """The likeliest ways to go on, each with the row it comes from; twice as many as beams, as some will end."""
        found = []
        for row, beam in enumerate(beams):
            for token, log_p in self._likeliest(log_p_RV[row], list(beam.tokens)):
                log_probs = (*beam.log_probs, log_p)
                stops = token in self._llm.stop_token_ids
                tokens = beam.tokens if stops else (*beam.tokens, token)
                found.append((Beam(tokens, log_probs, token if stops else None), row))
        found.sort(key=lambda one: one[0].total, reverse=True)
        yield from found[: 2 * self._settings.num_beams]

    def _likeliest(self, log_p_V: Tensor, tokens: list[int]) -> Iterator[tuple[int, float]]:
        """Tokens that may follow, the likeliest first, and their log-probabilities."""
        banned, wanted = self._banned(tokens), 2 * self._settings.num_beams
        log_ps, ids = log_p_V.topk(min(len(log_p_V), wanted + len(banned) + 64))
        for token, log_p in zip(ids.tolist(), log_ps.tolist(), strict=True):
            if token not in banned and self._leaves_text(tokens, token):
                yield token, log_p
                wanted -= 1
                if not wanted:
                    return

    def _whole(self, beam: Beam, budget: int) -> bool:
        """Whether a section ends with the last token of a beam."""
        if len(beam.tokens) == budget:
            return True
        return self._may_end(beam.tokens[-1]) and ended(self._llm.decode(list(beam.tokens))) is not None
