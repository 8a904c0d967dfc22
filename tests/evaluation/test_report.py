"""Text figures against pycocoevalcap and nltk, over random and degenerate reports."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm3d.evaluation.report import BLEU_NAMES, plain_words, read_texts, report_scores
from vlm3d.evaluation.word_alignment import METEOR_NAME, longest_common_subsequence, meteor_exact_stem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import single_meteor_score
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

TEXT = "No pleural effusion effusions . Nodule nodules, in the right lower lobe of 5 mm is not observed"
WORDS = TEXT.split()


def sentences(seed: int, reports: int, longest: int = 25) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(0, longest))) for _ in range(reports)]


def assert_equal_to_pycocoevalcap(predicted: list[str], truth: list[str], reading: str) -> None:
    scores = report_scores(predicted, truth, reading)  # type: ignore[arg-type]
    read_predicted, read_truth = read_texts(predicted, truth, reading)  # type: ignore[arg-type]
    generated = {place: [text] for place, text in enumerate(read_predicted)}
    reference = {place: [text] for place, text in enumerate(read_truth)}
    corpus, single = Bleu(4).compute_score(reference, generated, verbose=0)
    for n, name in enumerate(BLEU_NAMES):
        assert scores.figures[name] == pytest.approx(corpus[n], abs=1e-9)
        np.testing.assert_allclose(scores.per_report[name], single[n], atol=1e-9)
    assert scores.figures["BLEU_mean"] == pytest.approx(sum(corpus) / 4, abs=1e-9)
    for name, peer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        mean, each = peer.compute_score(reference, generated)
        assert scores.figures[name] == pytest.approx(mean, abs=1e-9)
        np.testing.assert_allclose(scores.per_report[name], each, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reading", ["official", "words"])
def test_equal_to_pycocoevalcap(seed: int, reading: str) -> None:
    truth, predicted = sentences(seed, 20), sentences(seed + 100, 20)
    predicted[3], truth[5], predicted[7], truth[7] = "", "", "", ""
    predicted[9], predicted[11] = truth[9], truth[11] + '<|eot_id|> "the"  __end\n . Lobe .'
    assert_equal_to_pycocoevalcap(predicted, truth, reading)


@given(
    st.lists(
        st.tuples(st.text("ab .\n", max_size=12), st.text("ab .\n", max_size=12)), min_size=1, max_size=5
    )
)
@settings(max_examples=40, deadline=None)
def test_equal_to_pycocoevalcap_on_tiny_texts(pairs: list[tuple[str, str]]) -> None:
    predicted, truth = ([pair[side] for pair in pairs] for side in (0, 1))
    if not any(text.split() for text in read_texts(predicted, truth, "official")[1]):
        truth[0] = "a"  # pycocoevalcap's CIDEr fails on a corpus without a word
    assert_equal_to_pycocoevalcap(predicted, truth, "official")


class NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, _: str) -> Iterable[object]:
        return ()


@pytest.mark.parametrize("seed", range(3))
def test_meteor_equals_nltk_without_wordnet(seed: int) -> None:
    stemmer = PorterStemmer(PorterStemmer.ORIGINAL_ALGORITHM)
    truth, predicted = [*sentences(seed, 15), "a", "", ""], [*sentences(seed + 50, 15), "", "a", ""]
    expected = [
        single_meteor_score(t.split(), p.split(), stemmer=stemmer, wordnet=NoSynonyms())
        for p, t in zip(predicted, truth, strict=True)
    ]
    np.testing.assert_allclose(meteor_exact_stem(predicted, truth), expected, atol=1e-9)


def test_stems_match_after_equal_words() -> None:
    # three of three matched in one chunk; the stem of nodules is that of nodule
    assert meteor_exact_stem(["Small Nodules seen"], ["small nodule seen"])[0] == pytest.approx(1 - 0.5 / 27)
    assert meteor_exact_stem(["fluid"], ["effusion"])[0] == 0  # no synonyms


@given(st.text("abc", max_size=40), st.text("abc", max_size=40))
@settings(max_examples=60, deadline=None)
def test_longest_common_subsequence_equals_its_recurrence(first: str, second: str) -> None:
    length = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            length[i + 1, j + 1] = length[i, j] + 1 if a == b else max(length[i, j + 1], length[i + 1, j])
    assert longest_common_subsequence(first, second) == length[-1, -1]


def test_the_two_readings() -> None:
    predicted, truth = ["No Effusion."], ["no effusion ."]
    assert report_scores(predicted, truth).figures["BLEU_1"] == pytest.approx(
        0, abs=1e-9
    )  # "Effusion." is its own word
    words = report_scores(predicted, truth, "words")
    assert words.figures["ROUGE_L"] == pytest.approx(1)
    assert words.reading == "words"
    assert plain_words("A 3.5x2 cm well-defined nodule, Patient's left_lung (Ø 4,5)!") == (
        "a 3.5 x 2 cm well-defined nodule patient's left lung ø 4,5"
    )
    with pytest.raises(ValueError, match="no reading"):
        report_scores(predicted, truth, "loose")  # type: ignore[arg-type]


def test_no_reports_and_empty_reports() -> None:
    with pytest.raises(ValueError, match="0 generated reports against 0"):
        report_scores([], [])
    with pytest.raises(ValueError, match="1 generated reports against 2"):
        report_scores(["a"], ["a", "b"])
    empty = report_scores(["", ""], ["no effusion", "a nodule"])
    assert all(value == pytest.approx(0, abs=1e-9) for value in empty.figures.values())
    assert report_scores(["", ""], ["", ""]).figures["CIDEr"] == 0


def test_resamples_equal_copied_reports() -> None:
    truth, predicted = sentences(0, 12), sentences(1, 12)
    scores = report_scores(predicted, truth)
    drawn = scores.resampled(resamples=5, seed=3, patient_ids=[f"p{n // 2}" for n in range(12)])
    assert set(drawn) == set(scores.figures)
    from vlm3d.evaluation.bootstrap import draw_counts

    counts = next(draw_counts(12, 5, 3, [f"p{n // 2}" for n in range(12)])).astype(int)
    for r in range(5):
        rows = np.repeat(np.arange(12), counts[:, r])
        copied = report_scores([predicted[row] for row in rows], [truth[row] for row in rows])
        for name in (*BLEU_NAMES, "BLEU_mean", "ROUGE_L", METEOR_NAME):
            assert drawn[name][r] == pytest.approx(copied.figures[name], abs=1e-12)
        assert drawn["CIDEr"][r] == pytest.approx(scores.per_report["CIDEr"][rows].mean(), abs=1e-12)
