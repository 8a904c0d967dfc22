"""Writing word by word: the form is always valid, nothing stutters, sampling keeps to its nucleus."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.small_models import small_language_model
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_decoding import (
    DecodingSettings,
    ReportDecoder,
    ended,
    repeating_tokens,
    whole_sentences,
)
from vlm3d.model.report_sections import HEADING_PATTERN, SECTIONS, format_report, parse_report, tidy

BODY = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], include_characters="\n")).filter(
    lambda text: not HEADING_PATTERN.search(text)
)


class Scripted(LanguageModel):
    """Wants to write a given text, whatever stands before, and remembers what it was fed."""

    def __init__(self, script: str) -> None:
        base = small_language_model(lora=False)
        super().__init__(base.model, base.tokenizer, "scripted")
        self.wanted = [*self.encode(script), self.end_token_id]
        self.calls: list[int] = []

    def forward(self, inputs_embeds: torch.Tensor, **options: object) -> SimpleNamespace:
        real = super().forward(inputs_embeds, **options)
        self.calls.append(inputs_embeds.shape[1])
        logits = torch.zeros_like(real.logits)
        wanted = self.wanted.pop(0) if self.wanted else self.end_token_id
        logits[..., wanted] = 9.0
        return SimpleNamespace(logits=logits)


def write(llm: LanguageModel, **settings: object) -> str:
    decoder = ReportDecoder(llm, DecodingSettings(**settings))  # type: ignore[arg-type]
    return decoder.write(torch.zeros(1, 4, 32)).text


@given(BODY, BODY, BODY)
def test_any_report_reads_back_as_it_was_written(findings: str, impression: str, advice: str) -> None:
    written = format_report(findings, impression, advice)
    assert parse_report(written) == (tidy(findings), tidy(impression), tidy(advice))


def test_reading_is_lenient() -> None:
    assert parse_report("") == ("", "", "")
    assert parse_report("IMPRESSIONS : x\nRecommendation:y\nfindings:z") == ("z", "x", "y")
    assert parse_report("## **Findings**:\na\n__Impression:__ b") == ("a", "b", "")
    assert parse_report("The findings: none of note.").findings == "The findings: none of note."
    assert parse_report("Findings: a\nImpression: b\nFindings: c").findings == "a\nc"


def test_a_section_ends_at_a_blank_line_or_the_end_token() -> None:
    llm = Scripted("Clear lungs.\n\n")
    llm.wanted = [
        *llm.encode("Clear lungs.\n\n"),
        *llm.encode("Normal."),
        llm.end_token_id,
        *llm.encode("None."),
    ]
    text = write(llm, max_new_tokens=90)
    assert text == "Findings:\nClear lungs.\n\nImpression:\nNormal.\n\nRecommendations:\nNone."


def test_what_comes_after_the_end_is_forgotten_by_the_cache() -> None:
    llm = Scripted("")
    llm.wanted = [
        *llm.encode("A.\n\n"),
        *llm.encode("B."),
        llm.end_token_id,
        *llm.encode("C."),
        llm.end_token_id,
    ]
    decoder = ReportDecoder(llm, DecodingSettings(max_new_tokens=90))
    report = decoder.write(torch.zeros(1, 4, 32))
    whole = 4 + len(llm.encode(report.text))
    assert decoder._cache.get_seq_length() == whole
    assert sum(llm.calls) == whole + 1  # only the first line break was read and forgotten
    assert report.num_tokens == 6


@pytest.mark.parametrize(
    "script",
    ["", "\n\n\n\n", "Impression: x\nRecommendations: y", "  Findings:\n\n", "Impression:", "</s></s>"],
)
def test_no_script_breaks_the_form(script: str) -> None:
    sections = parse_report(text := write(Scripted(script), max_new_tokens=24))
    assert all(sections)
    assert [match.group(1) for match in HEADING_PATTERN.finditer(text)] == list(SECTIONS)


@pytest.mark.parametrize("budget", [1, 3, 7, 40])
def test_the_budget_holds(budget: int) -> None:
    decoder = ReportDecoder(Scripted("word " * 40), DecodingSettings(max_new_tokens=budget))
    assert decoder.write(torch.zeros(1, 4, 32)).num_tokens <= max(3, budget)


def test_surprisal_is_the_models_own() -> None:
    llm = Scripted("")
    llm.wanted = [*llm.encode("A"), llm.end_token_id] * 3
    report = ReportDecoder(llm, DecodingSettings()).write(torch.zeros(1, 4, 32))
    vocabulary = len(llm.tokenizer)
    p = math.exp(9) / (math.exp(9) + vocabulary - 1)
    assert report.mean_surprisal_bits == pytest.approx(-math.log2(p), rel=1e-4)


def test_the_nucleus_is_kept_to() -> None:
    decoder = ReportDecoder(small_language_model(), DecodingSettings(temperature=1.0, top_p=0.75))
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [decoder._sample(logits) for _ in range(400)]
    assert set(drawn) == {0, 1}
    assert 0.5 < drawn.count(0) / 400 < 0.75
    flat = torch.zeros(1000)  # a nucleus wider than the first guess
    wide = {
        ReportDecoder(decoder._llm, DecodingSettings(temperature=1.0, top_p=0.9, seed=s))._sample(flat)
        for s in range(99)
    }
    assert max(wide) > 256
    assert max(wide) < 900
    narrow = ReportDecoder(small_language_model(), DecodingSettings(temperature=1.0, top_p=0.01))
    assert {narrow._sample(logits) for _ in range(20)} == {0}


def test_stutter_is_banned_and_legitimate_repeats_are_not() -> None:
    assert list(repeating_tokens([1, 1], 16)) == [1]
    assert list(repeating_tokens([5, 1, 2, 3, 4, 1, 2, 3], 16)) == [4]
    assert list(repeating_tokens([1, 2, 1, 2, 1], 16)) == [2]
    assert list(repeating_tokens([7, 1], 16)) == []
    assert list(repeating_tokens([1, 2, 3, 9, 1, 2], 3)) == [3]
    assert list(repeating_tokens([1, 1, 1, 1], 0)) == []
    text = write(Scripted("la " * 60), max_new_tokens=60)
    assert "la la la la" not in text


def test_broken_off_sentences_are_cut() -> None:
    assert whole_sentences("A nodule of 3.5 mm. The hea") == "A nodule of 3.5 mm."
    assert whole_sentences("1. A nodule.\n2. An effusion.\n3.") == "1. A nodule.\n2. An effusion."
    assert whole_sentences("no end") == "no end"
    assert ended("\n\nText") is None
    assert ended(" a\n\nb") == 2
    assert ended("a\nImpression: b") == 2


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="decoding needs"):
            DecodingSettings(**wrong)  # type: ignore[arg-type]
