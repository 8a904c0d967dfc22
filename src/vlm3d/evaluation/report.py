"""How close the words of generated reports are to the radiologist's: BLEU, ROUGE-L, METEOR, CIDEr.

Two readings of a text. ``"official"``, the VLM3D challenge's: its cleaning, then words as white space separates them,
punctuation attached, upper and lower case apart. ``"words"``, the usual one: lower case, words and numbers without
punctuation. Figures of the two are not comparable, so a result says which it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlm3d.evaluation.bootstrap import DEFAULT_RESAMPLES, draw_counts
from vlm3d.evaluation.ngrams import Floats, Integers, bleu, bleu_counts, cider, shared_runs
from vlm3d.evaluation.official import clean_predicted_report, clean_true_report
from vlm3d.evaluation.word_alignment import METEOR_NAME, meteor_exact_stem, rouge_l

Reading = Literal["official", "words"]

BLEU_NAMES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")


@dataclass(frozen=True)
class ReportScores:
    """Figures of N reports.

    Attributes:
        reading: How the texts were read.
        figures: ``BLEU_1`` to ``BLEU_4`` (over the corpus), ``BLEU_mean``, ``ROUGE_L``, ``CIDEr``, ``METEOR_exact_stem``.
        per_report: The same names -> (N,).
        bleu_counts_N10: Of which corpus BLEU is made.
    """

    reading: Reading
    figures: dict[str, float]
    per_report: dict[str, Floats]
    bleu_counts_N10: Integers

    def resampled(
        self,
        *,
        patient_ids: Sequence[str] | None = None,
        resamples: int = DEFAULT_RESAMPLES,
        seed: int = 0,
    ) -> dict[str, Floats]:
        """Each figure in each bootstrap resample: name -> (R,). CIDEr's rarity stays that of all references."""
        means = [name for name in self.per_report if name not in _BLEU_OF_CORPUS]
        value_NM = np.stack([self.per_report[name] for name in means], axis=1)
        bleu_R4, mean_RM = [], []
        for weight_NR in draw_counts(len(value_NM), resamples, seed, patient_ids):
            weight_RN = weight_NR.T.astype(np.float64)
            bleu_R4.append(bleu(weight_RN @ self.bleu_counts_N10))
            mean_RM.append(weight_RN @ value_NM / weight_RN.sum(axis=1, keepdims=True))
        bleus, columns = np.concatenate(bleu_R4), np.concatenate(mean_RM)
        drawn = _with_bleu(bleus) | {name: columns[:, m] for m, name in enumerate(means)}
        return {name: drawn[name] for name in self.figures}


_BLEU_OF_CORPUS = (*BLEU_NAMES, "BLEU_mean")


def _with_bleu(bleu_N4: Floats) -> dict[str, Floats]:
    columns = {name: bleu_N4[..., n] for n, name in enumerate(BLEU_NAMES)}
    return columns | {"BLEU_mean": bleu_N4.mean(axis=-1)}


def report_scores(
    predicted: Sequence[str], truth: Sequence[str], reading: Reading = "official"
) -> ReportScores:
    """Score generated reports against their references.

    Args:
        predicted: N generated reports; an empty one scores 0 wherever the reference is not empty.
        truth: Their references, in the same order.
        reading: See the module.

    Raises:
        ValueError: There are no reports, or not as many of the one as of the other.
    """
    if not len(predicted) or len(predicted) != len(truth):
        raise ValueError(
            f"{len(predicted)} generated reports against {len(truth)} references; at least one pair is needed"
        )
    predicted, truth = read_texts(predicted, truth, reading)
    shared = shared_runs(predicted, truth)
    counts = bleu_counts(shared)
    per_report = _with_bleu(bleu(counts)) | {
        "ROUGE_L": rouge_l(predicted, truth),
        "CIDEr": cider(shared),
        METEOR_NAME: meteor_exact_stem(predicted, truth),
    }
    of_corpus = _with_bleu(bleu(counts.sum(axis=0)))
    figures = {
        name: float(of_corpus[name]) if name in of_corpus else float(values.mean())
        for name, values in per_report.items()
    }
    return ReportScores(reading, figures, per_report, counts)


def read_texts(
    predicted: Sequence[str], truth: Sequence[str], reading: Reading
) -> tuple[list[str], list[str]]:
    """Texts as a reading sees them, words apart by single spaces in ``"words"``.

    Raises:
        ValueError: There is no such reading.
    """
    if reading == "official":
        return [clean_predicted_report(text) for text in predicted], [
            clean_true_report(text) for text in truth
        ]
    if reading == "words":
        return [plain_words(text) for text in predicted], [plain_words(text) for text in truth]
    raise ValueError(f"no reading '{reading}'; there are 'official' and 'words'")


def plain_words(text: str) -> str:
    """Lower-case words and numbers (3.5, well-defined), one space between them."""
    return " ".join(_WORD.findall(text.lower()))
