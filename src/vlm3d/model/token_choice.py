"""Choosing the next word: the likeliest, or one drawn from the nucleus, and never one that stutters.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LONGEST_STUTTER = 32
_FIRST_CANDIDATES = 256
"""These mostly hold the nucleus; sorting the whole vocabulary is slow."""


@dataclass(frozen=True)
class DecodingSettings:
    """How words are chosen.

    Attributes:
        max_new_tokens: Budget over the three sections, headings not counted; each gets one token at least.
        temperature: 0 takes the likeliest word.
        top_p: Sample from the smallest set of words that holds this probability.
        seed: Of the sampling.
        no_repeat_ngram: No run of this many tokens comes twice in a section; 0 lifts the guard.
        num_beams: Above 1 each section is the likeliest that so many beams find; only at temperature 0.
        length_penalty: Power of the length that a beam's log-probability is divided by.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0
    no_repeat_ngram: int = 16
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"decoding needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got {self}"
            )
        if self.num_beams < 1 or (self.num_beams > 1 and self.temperature):
            raise ValueError(f"num_beams is 1 or more, and 1 where words are sampled, got {self}")


class TokenChooser:
    """Chooses one report's tokens; the same seed and sample number draw the same ones.

    Args:
        settings: How words are chosen.
        sample: Number of this report among those of the same scan; each draws differently.
    """

    def __init__(self, settings: DecodingSettings, sample: int = 0) -> None:
        self._settings = settings
        self._random = np.random.default_rng([settings.seed % 2**64, sample])

    def choose(self, log_p_V: Tensor, banned: set[int], fits: Callable[[int], bool]) -> int:
        """Pick a token that is not banned and that fits.

        Args:
            log_p_V: Log-probabilities; left as they are.
            banned: Tokens that may not come.
            fits: Whether a token may stand here; asked only about tokens about to be taken.
        """
        if self._settings.temperature == 0:
            likeliest = int(log_p_V.argmax())
            if likeliest not in banned and fits(likeliest):
                return likeliest
            weight_V = log_p_V.clone()
            none = -math.inf
        else:
            weight_V = torch.softmax(log_p_V / self._settings.temperature, dim=0).cpu()
            none = 0.0
        if banned:
            weight_V[torch.tensor(sorted(banned), device=weight_V.device)] = none
        for _ in range(len(weight_V)):
            token = self._draw(weight_V)
            if fits(token):
                return token
            weight_V[token] = none
        raise RuntimeError("no token of the language model begins a section's text")

    def _draw(self, weight_V: Tensor) -> int:
        """The likeliest token, or one from the nucleus of weights that need not add up to 1."""
        if self._settings.temperature == 0:
            return int(weight_V.argmax())
        enough = self._settings.top_p * float(weight_V.sum())
        weights, tokens = weight_V.topk(min(_FIRST_CANDIDATES, len(weight_V)))
        sums = weights.double().cumsum(0)
        if float(sums[-1]) < enough:
            weights, tokens = weight_V.sort(descending=True, stable=True)
            sums = weights.double().cumsum(0)
        size = min(int(torch.searchsorted(sums, enough)) + 1, len(sums))
        target = self._random.random() * float(sums[size - 1])
        return int(tokens[min(int(torch.searchsorted(sums[:size], target, right=True)), size - 1)])


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
