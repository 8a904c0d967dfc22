"""ROUGE-L and METEOR: how far the words of a report follow those of its reference.

ROUGE-L is the longest common subsequence (beta 1.2, as pycocoevalcap). METEOR here matches equal words and equal stems
only: the formula of Lavie and Agarwal (2007) as nltk computes it without WordNet. The challenge's METEOR 1.5 also knows
synonyms and paraphrases and needs Java; its figures are higher, so this one carries its variant in its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import snowballstemmer
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METEOR_NAME = "METEOR_exact_stem"
_BETA = 1.2
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA = 0.9, 3.0, 0.5


def rouge_l(predicted: Sequence[str], truth: Sequence[str]) -> Floats:
    """(N,) ROUGE-L of each report; the corpus figure is their mean.

    Words are what single spaces separate, so that an empty report is one empty word, as pycocoevalcap reads it.
    """
    return np.array(
        [_rouge_l(one.split(" "), other.split(" ")) for one, other in zip(predicted, truth, strict=True)]
    )


def _rouge_l(predicted: list[str], truth: list[str]) -> float:
    common = longest_common_subsequence(predicted, truth)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(truth)
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by one addition of long integers a word (Hyyrö's bit-parallel recurrence)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    open_places = full
    for word in second:
        here = open_places & places.get(word, 0)
        if here:
            open_places = ((open_places + here) | (open_places - here)) & full
    return len(first) - open_places.bit_count()


def meteor_exact_stem(predicted: Sequence[str], truth: Sequence[str]) -> Floats:
    """(N,) METEOR of each report with exact and stem matches; the corpus figure is their mean.

    With m matched words: precision P = m / predicted words, recall R = m / true words, F = PR / (0.9 P + 0.1 R), and the
    score is F (1 - 0.5 (chunks / m)^3), where a chunk is a run of matches that are adjacent in both texts. Words are
    compared in lower case; equal words are matched from the end of the text first, then equal Porter stems.
    """
    return np.array(
        [
            _meteor(one.lower().split(), other.lower().split())
            for one, other in zip(predicted, truth, strict=True)
        ]
    )


def _meteor(predicted: list[str], truth: list[str]) -> float:
    partner = _match(enumerate(predicted), enumerate(truth))
    taken = set(partner.values())
    partner |= _match(
        ((place, _stem(word)) for place, word in enumerate(predicted) if place not in partner),
        ((place, _stem(word)) for place, word in enumerate(truth) if place not in taken),
    )
    matched = len(partner)
    if not matched:
        return 0.0
    precision, recall = matched / len(predicted), matched / len(truth)
    mean = precision * recall / (_METEOR_ALPHA * precision + (1 - _METEOR_ALPHA) * recall)
    chunks = sum(partner.get(place - 1, -2) != other - 1 for place, other in partner.items())
    return (1 - _METEOR_GAMMA * (chunks / matched) ** _METEOR_BETA) * mean


def _match(predicted: Iterable[tuple[int, str]], truth: Iterable[tuple[int, str]]) -> dict[int, int]:
    """Place of a predicted word -> place of its equal in the truth, last words first."""
    places: dict[str, list[int]] = {}
    for place, word in truth:
        places.setdefault(word, []).append(place)
    partner = {}
    for place, word in reversed(list(predicted)):
        if free := places.get(word):
            partner[place] = free.pop()
    return partner


_porter = snowballstemmer.stemmer("porter")


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    stem: str = _porter.stemWord(word)
    return stem
