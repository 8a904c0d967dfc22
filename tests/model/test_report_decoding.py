"""Writing word by word: the form is always valid, nothing stutters, sampling keeps to its nucleus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from support.small_models import small_language_model
from vlm3d.model.decoding_engine import Step, TransformersEngine, cache_argument
from vlm3d.model.language_model import LanguageModel, load_language_model
from vlm3d.model.llama_engine import LlamaEngine
from vlm3d.model.llama_weights import llama_weights, transformers_model
from vlm3d.model.phrase_memory import CONTEXTS, TEXTS, PhraseMemory
from vlm3d.model.report_decoding import ReportDecoder, continue_prompts, open_engine
from vlm3d.model.report_sections import HEADING_PATTERN, SECTIONS, format_report, parse_report, tidy
from vlm3d.model.report_writing import ended, whole_sentences
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


def prompts_of(lengths: list[int], width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, width, generator=generator) * 0.05 for length in lengths]


def adapted_language_model() -> LanguageModel:
    """With adapters that change what it writes."""
    llm = small_language_model()
    for parameter in llm.adapter_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return llm


def generated(llm: LanguageModel, prompt: torch.Tensor, count: int) -> list[int]:
    """What transformers' generate writes greedily."""
    found = llm.model.generate(
        inputs_embeds=prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=llm.end_token_id,
    )
    return [int(token) for token in found[0]]


@pytest.mark.parametrize("make", [LlamaEngine, TransformersEngine])
@pytest.mark.parametrize("samples", [1, 3])
def test_greedy_tokens_are_those_of_transformers_generate(make: type, samples: int) -> None:
    llm, prompts = adapted_language_model().eval(), prompts_of([7, 3, 12])
    written = continue_prompts(make(llm), prompts, DecodingSettings(max_new_tokens=24), samples)
    for prompt, group in zip(prompts, written, strict=True):
        assert group == [generated(llm, prompt, 24)] * samples
    assert written[0] != written[2]


@pytest.mark.parametrize("make", [LlamaEngine, TransformersEngine])
def test_rows_of_any_length_read_as_if_alone(make: type) -> None:
    """Rows that read several tokens, forget some, or close give the logits of one pass over their tokens."""
    llm, prompts = adapted_language_model().eval(), prompts_of([5, 9])
    engine = make(llm)
    first = engine.start(prompts, 2, 20)
    told: list[list[int]] = [[] for _ in range(4)]
    rows = [0, 1, 2, 3]
    rounds = [
        [Step(0, [7]), Step(0, [8, 9, 10]), Step(0, [11]), Step(0, [12, 13])],
        [Step(1, [14]), Step(1, [15, 16]), Step(1, [17]), Step(2, [18])],
        [Step(2, [19, 20]), Step(3, [21]), Step(0, [22])],
    ]
    with torch.no_grad():
        alone = [llm(prompt[None]).logits[0, -1] for prompt in prompts]
        torch.testing.assert_close(first, torch.stack(alone), atol=1e-5, rtol=1e-4)
        for steps in rounds:
            if len(steps) < len(rows):
                engine.keep_rows([0, 1, 3])
                rows = [0, 1, 3]
            logits = engine.feed(steps)
            for row, step, found in zip(rows, steps, logits, strict=True):
                told[row] = [*told[row][: step.keep], *step.token_ids]
                whole = torch.cat([prompts[row // 2], llm.embed_ids(told[row])])
                torch.testing.assert_close(found, llm(whole[None]).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_other_architectures_are_run_by_transformers() -> None:
    """Gemma-2 with soft caps and, in every other layer, a window: refused where the text would outgrow it."""
    torch.manual_seed(0)
    tokenizer = small_language_model().tokenizer
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=40,
        pad_token_id=0,
        eos_token_id=2,
    )
    llm = LanguageModel(Gemma2ForCausalLM(config).eval(), tokenizer, "small-gemma")
    engine, prompts = open_engine(llm), prompts_of([7, 4])
    assert isinstance(engine, TransformersEngine)
    written = continue_prompts(engine, prompts, DecodingSettings(max_new_tokens=12), 2)
    assert written == [[generated(llm, prompt, 12)] * 2 for prompt in prompts]
    with pytest.raises(ValueError, match="attention window of 40"):
        continue_prompts(engine, prompts, DecodingSettings(max_new_tokens=40))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_either_name_of_the_cache_argument_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 renamed it; the old name warns there, and a warning is an error here."""
    llm = adapted_language_model().eval()
    base = transformers_model(llm)
    real, own = base.forward, cache_argument(llm)

    def old(*args: Any, past_key_values: Any = None, **options: Any) -> Any:
        return real(*args, **{own: past_key_values}, **options)

    def new(*args: Any, cache: Any = None, **options: Any) -> Any:
        return real(*args, **{own: cache}, **options)

    prompts, wanted = prompts_of([4]), DecodingSettings(max_new_tokens=6)
    expected = continue_prompts(TransformersEngine(llm), prompts, wanted)
    monkeypatch.setattr(base, "forward", {"past_key_values": old, "cache": new}[name])
    assert cache_argument(llm) == name
    assert continue_prompts(TransformersEngine(llm), prompts, wanted) == expected


def test_changed_adapters_are_noticed() -> None:
    """By an optimizer, through .data and switched off: the layout is that of the weights as they are."""
    llm = adapted_language_model().eval()
    prompt = prompts_of([6])[0]

    def compare() -> torch.Tensor:
        found = LlamaEngine(llm).start([prompt], 1, 4)[0]
        with torch.no_grad():
            torch.testing.assert_close(found, llm(prompt[None]).logits[0, -1], atol=1e-5, rtol=1e-4)
        return found

    before = compare()
    assert llama_weights(llm) is llama_weights(llm)
    parameters = list(llm.adapter_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    llm(prompt[None]).logits.square().mean().backward()
    optimizer.step()
    after = compare()
    parameters[1].data.mul_(3.0)
    later = compare()
    with llm.model.disable_adapter():
        off = compare()
    for one, other in ((before, after), (after, later), (later, off)):
        assert not torch.allclose(one, other, atol=1e-4)


def test_samples_differ_and_the_first_is_the_single_one() -> None:
    llm, prompts = small_language_model().eval(), prompts_of([6, 4])
    decoder = ReportDecoder(llm, DecodingSettings(max_new_tokens=20, temperature=1.0, top_p=1.0, seed=3))
    groups = decoder.write_all(prompts, 3)
    assert [len(group) for group in groups] == [3, 3]
    assert len({report.text for group in groups for report in group}) == 6
    again = decoder.write_all(prompts, 3)  # now guessed from the first ones: the same words
    assert [[r.token_ids for r in group] for group in again] == [
        [r.token_ids for r in group] for group in groups
    ]
    assert [group[0].text for group in groups] == [decoder.write(prompt[None]).text for prompt in prompts]
    with pytest.raises(ValueError, match="num_samples"):
        decoder.write_all(prompts, 0)


def test_tokens_and_log_probabilities_are_what_the_model_says_of_them() -> None:
    llm, prompt = small_language_model().eval(), prompts_of([6])[0]
    settings = DecodingSettings(max_new_tokens=60, temperature=1.0, top_p=1.0)
    for report in ReportDecoder(llm, settings).write_all([prompt], 4)[0]:
        assert len(report.token_ids) == len(report.log_probs) == len(report.chosen)
        whole = torch.cat([prompt, llm.embed_ids(list(report.token_ids))])
        with torch.no_grad():
            log_p = llm(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        own = log_p[torch.arange(len(report.token_ids)), torch.tensor(report.token_ids)]
        chosen = torch.tensor(report.chosen)
        torch.testing.assert_close(torch.tensor(report.log_probs)[chosen], own[chosen], atol=1e-4, rtol=1e-4)
        assert int(chosen.sum()) >= report.num_tokens
        assert not any(report.chosen[: len(llm.encode("Findings:\n"))])
        assert parse_report(llm.decode(list(report.token_ids))) == parse_report(report.text)


def test_what_ends_a_report_or_begins_a_heading_counts_as_chosen() -> None:
    llm = Scripted("")
    llm.wanted = [
        *llm.encode("A.\n\n"),
        *llm.encode("B."),
        llm.end_token_id,
        *llm.encode("C."),
        llm.end_token_id,
    ]
    report = ReportDecoder(llm, DecodingSettings(max_new_tokens=90)).write(torch.zeros(1, 4, 32))
    chosen = [token for token, own in zip(report.token_ids, report.chosen, strict=True) if own]
    assert chosen == [*llm.encode("A.\n\n"), *llm.encode("B."), *llm.encode("C."), llm.end_token_id]
    assert report.token_ids == (*llm.encode(report.text), llm.end_token_id)


def test_text_is_told_as_it_grows() -> None:
    told: list[tuple[int, int, str]] = []
    llm = small_language_model().eval()
    decoder = ReportDecoder(llm, DecodingSettings(max_new_tokens=9), lambda *news: told.append(news))
    (group,) = decoder.write_all(prompts_of([4]), 2)
    assert {(scan, sample) for scan, sample, _ in told} == {(0, 0), (0, 1)}
    assert all(text.startswith("Findings:\n") for *_, text in told)
    assert len(told) >= sum(report.num_tokens for report in group)


@pytest.mark.slow
def test_a_real_language_model_writes_what_generate_writes() -> None:
    llm = load_language_model("HuggingFaceTB/SmolLM2-135M-Instruct", use_lora=False)
    prompts = [llm.embed_ids(llm.encode(text)) for text in ("The capital of France is", "Water boils")]
    written = continue_prompts(open_engine(llm), prompts, DecodingSettings(max_new_tokens=24), 2)
    for prompt, group in zip(prompts, written, strict=True):
        assert group == [generated(llm, prompt, 24)] * 2


class CountingEngine(LlamaEngine):
    """Counts its passes and the tokens in them."""

    passes = 0
    tokens = 0

    def feed(self, steps: Sequence[Step]) -> torch.Tensor:
        self.passes += 1
        self.tokens += sum(len(step.token_ids) for step in steps)
        return super().feed(steps)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_guesses_save_passes_and_change_no_word(temperature: float, samples: int) -> None:
    llm, prompts = small_language_model().eval(), prompts_of([6, 4])
    settings = DecodingSettings(max_new_tokens=24, temperature=temperature, seed=5)
    plain, first, second = CountingEngine(llm), CountingEngine(llm), CountingEngine(llm)
    expected = continue_prompts(plain, prompts, settings, samples)
    assert plain.passes == 23
    phrases = PhraseMemory()
    assert continue_prompts(first, prompts, settings, samples, phrases) == expected
    assert continue_prompts(second, prompts, settings, samples, phrases) == expected
    assert first.passes <= 23
    assert second.passes < 16  # all of it stood before, but for its first tokens
    assert second.tokens > second.passes * 2 * samples


def test_reports_are_written_with_the_same_words_from_memory() -> None:
    llm, prompt = small_language_model().eval(), prompts_of([6])[0]
    for temperature in (0.0, 0.8):
        settings = DecodingSettings(max_new_tokens=60, temperature=temperature)
        decoder = ReportDecoder(llm, settings)
        alone, again = decoder.write(prompt[None]), decoder.write(prompt[None])
        assert again.token_ids == alone.token_ids
        assert again.chosen == alone.chosen
        torch.testing.assert_close(
            torch.tensor(again.log_probs), torch.tensor(alone.log_probs), atol=1e-4, rtol=1e-4
        )


def test_what_follows_is_told_after_each_guess() -> None:
    llm, prompts = small_language_model().eval(), prompts_of([6, 3])
    for make in (LlamaEngine, TransformersEngine):
        engine, alone = make(llm), make(llm)
        for opened in (engine, alone):
            opened.start(prompts, 1, 20)
        told = engine.feed([Step(0, [7, 8, 9], 2), Step(0, [11, 12], 0)])
        assert len(told) == 4
        rows = [alone.feed([Step(n, [7 + n]), Step(min(n, 1), [11 + min(n, 1)])]) for n in range(3)]
        for place in range(3):
            torch.testing.assert_close(told[place], rows[place][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told[3], rows[1][1], atol=1e-4, rtol=1e-4)
        # what was guessed wrongly is forgotten
        told = engine.feed([Step(1, [5]), Step(2, [6])])
        rows_after = alone.feed([Step(1, [5]), Step(2, [6])])
        torch.testing.assert_close(told, rows_after, atol=1e-4, rtol=1e-4)


def test_a_memory_guesses_what_followed_and_forgets_the_oldest() -> None:
    phrases = PhraseMemory()
    text = list(range(10, 20))
    phrases.note(text, 0)
    assert phrases.guess([3, 11, 12], 4) == [13, 14, 15, 16]
    assert phrases.guess([3, 17, 18], 4) == [19]
    assert phrases.guess([12, 11], 4) == []
    assert phrases.guess([11], 4) == []
    text += [11, 12]
    phrases.note(text, 10)
    assert phrases.guess(text, 2) == [
        13,
        14,
    ]  # as where they stood first: nothing follows them yet at the end
    phrases.close(text)
    for number in range(TEXTS):
        other = [100 + number] * 3
        phrases.note(other, 0)
        phrases.close(other)
    assert phrases.guess([13, 14], 4) == []
    assert max(CONTEXTS) > min(CONTEXTS) > 1


def test_no_word_is_guessed_in_half_precision() -> None:
    """There a report would hang on the reports written before it."""
    llm, settings = small_language_model().to(torch.bfloat16).eval(), DecodingSettings(max_new_tokens=24)
    prompts = [prompt.to(torch.bfloat16) for prompt in prompts_of([6])]
    phrases = PhraseMemory()
    for _ in range(2):
        engine = CountingEngine(llm)
        continue_prompts(engine, prompts, settings, 1, phrases)
        assert engine.passes == engine.tokens == 23
