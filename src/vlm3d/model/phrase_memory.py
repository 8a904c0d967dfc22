"""Guessing the next words from where the same ones stood before, so that one pass of the model can check several.

A report repeats itself and the reports before it: "No pleural effusion." is six tokens, of which the first two tell the
rest. A pass over a few tokens costs a language model hardly more than over one, as it reads the same weights. A guess
is kept only where the model chooses that very token itself, so words and, but for rounding, their probabilities are the
model's (prompt lookup decoding, Saxena 2023; speculative decoding, Leviathan 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

CONTEXTS = (6, 4, 3, 2)
"""Tokens that must agree, the longest first."""
TEXTS = 64
"""Texts that are remembered, besides those that are being written."""


class PhraseMemory:
    """Remembers texts, those that still grow included."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._texts: deque[list[int]] = deque(maxlen=TEXTS)

    def note(self, text: list[int], known: int) -> None:
        """Remember what follows what in a text that has grown.

        Args:
            text: Token ids; the same list again whenever it has grown.
            known: Its length when it was last noted.
        """
        for end in range(max(known, 1), len(text)):
            for size in CONTEXTS:
                if size <= end:
                    self._after[tuple(text[end - size : end])] = (text, end)

    def close(self, text: list[int]) -> None:
        """Keep a text that is finished; the oldest are forgotten."""
        if len(self._texts) == TEXTS:
            oldest = self._texts[0]
            self._after = {key: place for key, place in self._after.items() if place[0] is not oldest}
        self._texts.append(text)

    def guess(self, text: Sequence[int], at_most: int) -> list[int]:
        """Tokens that may follow a text; none where nothing like its end is remembered."""
        for size in CONTEXTS:
            place = self._after.get(tuple(text[-size:])) if size <= len(text) else None
            if place is not None:
                found, end = place
                return found[end : end + at_most]
        return []
