"""BLEU and CIDEr: how many runs of one to four words a report shares with its reference.

Words of all reports are numbered, runs of n words become numbers by sorting, and everything after that is counting in
arrays. Formulas and small constants are pycocoevalcap's, which the VLM3D challenge uses: BLEU over the whole corpus with
1e-15 added to matches and 1e-9 to runs; CIDEr with clipped tf-idf, a Gaussian of sigma 6 over the difference in length
(counted in word pairs), mean over n, times 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LONGEST = 4
_TINY, _SMALL = 1e-15, 1e-9
_CIDER_SIGMA = 6.0


@dataclass(frozen=True)
class RunCounts:
    """How often each report holds each run of n words; one row a report and run.

    Attributes:
        report: 0 to N - 1 predicted, N to 2N - 1 their references.
        run: Number of the run.
        count: How often.
        runs: How many different ones there are.
    """

    report: Integers
    run: Integers
    count: Integers
    runs: int


@dataclass(frozen=True)
class SharedRuns:
    """Runs of one to four words in N predicted reports and their references.

    Attributes:
        reports: N.
        length_2N: Words in each predicted report, then in each reference.
        of_length: For n = 1 to 4, what each report holds.
    """

    reports: int
    length_2N: Integers
    of_length: tuple[RunCounts, ...]


def shared_runs(predicted: Sequence[str], truth: Sequence[str]) -> SharedRuns:
    """Count all runs; words are what white space separates."""
    number: dict[str, int] = {}
    words = [[number.setdefault(word, len(number)) for word in text.split()] for text in (*predicted, *truth)]
    length = np.array([len(one) for one in words], dtype=np.int64)
    word = np.fromiter((one for report in words for one in report), dtype=np.int64, count=int(length.sum()))
    report = np.repeat(np.arange(len(words)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(
        word.size
    )  # words up to the report's end, this one too
    start, run, counted = np.arange(word.size), word, [_counts(report, word)]
    for n in range(2, LONGEST + 1):
        goes_on = left[start] >= n
        start = start[goes_on]
        code = run[goes_on] * len(number) + word[start + n - 1]
        run = np.unique(code, return_inverse=True)[1]
        counted.append(_counts(report[start], run))
    return SharedRuns(len(predicted), length, tuple(counted))


def _counts(report: Integers, run: Integers) -> RunCounts:
    runs = int(run.max()) + 1 if run.size else 1
    code, count = np.unique(report * runs + run, return_counts=True)
    return RunCounts(code // runs, code % runs, count, runs)


def _common(counts: RunCounts, reports: int) -> tuple[Integers, Integers, Integers]:
    """Rows of a predicted report and of its reference that hold the same run, and the report."""
    code = counts.report * counts.runs + counts.run
    border = int(np.searchsorted(counts.report, reports))
    wanted = code[:border] + reports * counts.runs
    place = np.searchsorted(code, wanted)
    found = place < code.size
    found[found] = code[place[found]] == wanted[found]
    predicted = np.flatnonzero(found)
    return predicted, place[found], counts.report[predicted]


def bleu_counts(shared: SharedRuns) -> Integers:
    """(N, 10): matched runs of 1 to 4 words, runs of 1 to 4 words, words of the report, words of its reference."""
    n = shared.reports
    table = np.zeros((n, 2 * LONGEST + 2), dtype=np.int64)
    for place, counts in enumerate(shared.of_length):
        mine, theirs, report = _common(counts, n)
        matched = np.minimum(counts.count[mine], counts.count[theirs])
        table[:, place] = np.bincount(report, weights=matched, minlength=n)
        table[:, LONGEST + place] = np.maximum(shared.length_2N[:n] - place, 0)
    table[:, -2], table[:, -1] = shared.length_2N[:n], shared.length_2N[n:]
    return table


def bleu(counts: NDArray[Any]) -> Floats:
    """BLEU-1 to 4 from `bleu_counts`, of single reports (..., 10) or summed over a corpus: (..., 4)."""
    counts = np.asarray(counts, dtype=np.float64)
    matched, runs = counts[..., :LONGEST], counts[..., LONGEST : 2 * LONGEST]
    precision = np.cumprod((matched + _TINY) / (runs + _SMALL), axis=-1)
    mean = precision ** (1 / np.arange(1, LONGEST + 1))
    ratio = (counts[..., -2] + _TINY) / (counts[..., -1] + _SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    result: Floats = mean * brevity[..., None]
    return result


def cider(shared: SharedRuns) -> Floats:
    """(N,) CIDEr of each report; the corpus figure is their mean. Rarity is counted in the references."""
    n = shared.reports
    score_N = np.zeros(n)
    pairs = shared.of_length[1]
    length_2N = np.bincount(pairs.report, weights=pairs.count, minlength=2 * n)
    penalty_N = np.exp(-((length_2N[:n] - length_2N[n:]) ** 2) / (2 * _CIDER_SIGMA**2))
    for counts in shared.of_length:
        holders = np.bincount(counts.run[counts.report >= n], minlength=counts.runs)
        weight = counts.count * (np.log(n) - np.log(np.maximum(holders, 1)))[counts.run]
        norm_2N = np.sqrt(np.bincount(counts.report, weights=weight**2, minlength=2 * n))
        mine, theirs, report = _common(counts, n)
        product = np.minimum(weight[mine], weight[theirs]) * weight[theirs]
        value_N = np.bincount(report, weights=product, minlength=n)
        norms_N = norm_2N[:n] * norm_2N[n:]
        score_N += np.divide(value_N, norms_N, out=value_N.astype(np.float64), where=norms_N > 0)
    result: Floats = 10 * penalty_N * score_N / LONGEST
    return result
