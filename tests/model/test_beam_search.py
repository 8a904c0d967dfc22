"""Beam search finds what a walk over all sections finds, in the form that greedy reports have."""

from __future__ import annotations

import pytest
import torch

from support.small_models import small_language_model
from vlm3d.model.decoding_engine import TransformersEngine
from vlm3d.model.report_decoding import ReportDecoder
from vlm3d.model.report_sections import HEADINGS, parse_report
from vlm3d.model.report_writing import ReportWriting
from vlm3d.model.token_choice import DecodingSettings

PROMPT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_many_beams_find_the_likeliest_section_of_two_tokens() -> None:
    llm = small_language_model().eval()
    vocabulary = len(llm.tokenizer)
    settings = DecodingSettings(max_new_tokens=4, num_beams=vocabulary)  # two, one and one token a section
    found = ReportDecoder(llm, settings).write(PROMPT)

    heading = llm.encode(HEADINGS[0])
    writing = ReportWriting(llm, settings, [heading])
    opened = torch.cat([PROMPT[0], llm.embed_ids(heading)])
    first_V = llm(opened[None]).logits[0, -1].log_softmax(-1)
    firsts = [t for t in range(vocabulary) if allowed(writing, [], t) and t not in llm.stop_token_ids]
    rows = torch.stack([torch.cat([opened, llm.embed_ids([token])]) for token in firsts])
    second_FV = llm(rows).logits[:, -1].log_softmax(-1)
    scores = {
        (first, second): float(first_V[first] + second_FV[row, second]) / 2
        for row, first in enumerate(firsts)
        for second in range(vocabulary)
        if allowed(writing, [first], second)
    }
    best = max(scores, key=lambda pair: scores[pair])
    own = found.log_probs[len(heading) : len(heading) + 2]
    assert sum(own) / len(own) == pytest.approx(scores[best], abs=1e-5)
    assert found.token_ids[len(heading)] == best[0]


def allowed(writing: ReportWriting, tokens: list[int], token: int) -> bool:
    """Whether a token may follow these of a section."""
    return token not in writing._banned(tokens) and writing._leaves_text(tokens, token)


@torch.no_grad()
def test_beams_write_a_whole_report_and_tell_its_true_log_probabilities() -> None:
    llm = small_language_model().eval()
    report = ReportDecoder(llm, DecodingSettings(max_new_tokens=40, num_beams=3)).write(PROMPT)
    assert all(parse_report(report.text))
    whole = torch.cat([PROMPT[0], llm.embed_ids(list(report.token_ids))])
    log_p = llm(whole[None]).logits[0, PROMPT.shape[1] - 1 : -1].log_softmax(dim=-1)
    own = log_p[torch.arange(len(report.token_ids)), torch.tensor(report.token_ids)]
    chosen = torch.tensor(report.chosen)
    torch.testing.assert_close(torch.tensor(report.log_probs)[chosen], own[chosen], atol=1e-4, rtol=1e-4)
    again = ReportDecoder(llm, DecodingSettings(max_new_tokens=40, num_beams=3)).write_all([PROMPT[0]] * 2, 2)
    assert [r.token_ids for group in again for r in group] == [report.token_ids] * 4


def test_beams_run_on_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, settings = small_language_model().eval(), DecodingSettings(max_new_tokens=12, num_beams=2)
    expected = ReportDecoder(llm, settings).write(PROMPT).token_ids
    monkeypatch.setattr("vlm3d.model.report_decoding.open_engine", TransformersEngine)
    assert ReportDecoder(llm, settings).write(PROMPT).token_ids == expected


def test_beams_and_sampling_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="num_beams"):
        DecodingSettings(num_beams=2, temperature=0.5)
    with pytest.raises(ValueError, match="num_beams"):
        DecodingSettings(num_beams=0)
