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
from vlm3d.model.report_decoding import ReportDecoder, ended, whole_sentences
from vlm3d.model.report_sections import HEADING_PATTERN, SECTIONS, format_report, parse_report, tidy
from vlm3d.model.token_choice import DecodingSettings, TokenChooser, repeating_tokens

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
    assert (
        sum(llm.calls) == 4 + len(llm.encode(report.text)) + 1
    )  # only one line break was read and forgotten
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


def draw(p: torch.Tensor, times: int = 1, **settings: float) -> list[int]:
    chooser = TokenChooser(DecodingSettings(**settings))  # type: ignore[arg-type]
    return [chooser.choose(p.log(), set(), lambda _: True) for _ in range(times)]


def test_the_nucleus_is_kept_to() -> None:
    p = torch.tensor([0.05, 0.3, 0.15, 0.5])
    drawn = draw(p, 400, temperature=1.0, top_p=0.75)
    assert set(drawn) == {1, 3}
    assert 0.5 < drawn.count(3) / 400 < 0.75
    wide = draw(torch.full((1000,), 1e-3), 99, temperature=1.0, top_p=0.9)  # wider than the first guess
    assert 256 < max(wide) < 900
    assert set(draw(p, 20, temperature=1.0, top_p=0.01)) == {3}
    assert set(draw(p, 400, temperature=9.0, top_p=1.0)) == {0, 1, 2, 3}


@given(
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=9), st.floats(0.05, 1.0), st.sets(st.integers(0, 8))
)
def test_what_is_drawn_is_allowed_and_needed_for_the_nucleus(
    weights: list[float], top_p: float, banned: set[int]
) -> None:
    p = torch.tensor(weights) / sum(weights)
    banned = {token for token in banned if 0 < token < len(weights)}
    chooser = TokenChooser(DecodingSettings(temperature=1.0, top_p=top_p))
    token = chooser.choose(p.log(), banned, lambda _: True)
    assert token not in banned
    allowed = p[[index for index in range(len(p)) if index not in banned]]
    assert float(allowed[allowed > p[token]].sum()) < top_p * float(allowed.sum()) + 1e-6


def test_a_token_that_does_not_fit_gives_way_to_the_next() -> None:
    p = torch.tensor([0.1, 0.6, 0.3])
    greedy = TokenChooser(DecodingSettings())
    assert greedy.choose(p.log(), set(), lambda _: True) == 1
    assert greedy.choose(p.log(), {1}, lambda _: True) == 2
    assert greedy.choose(p.log(), {1}, lambda token: token != 2) == 0
    with pytest.raises(RuntimeError, match="no token"):
        greedy.choose(p.log(), set(), lambda _: False)


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
