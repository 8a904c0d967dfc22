"""Samples of one scan follow the model's own distribution; the frozen model's perplexity knows no adapters."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from support.small_models import small_language_model, small_model
from vlm3d.model.decoding_engine import TransformersEngine
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_generator import LesionEvidence
from vlm3d.training import group_sampling
from vlm3d.training.group_sampling import (
    FrozenPerplexity,
    ReportContext,
    replaced_weights,
    row_log_probabilities,
    sample_group,
)

# --- sampling ----------------------------------------------------------------------------------------------------


def report_context(model: VLM3DMultiTask, seed: int = 0) -> ReportContext:
    volume = 0.3 * torch.randn(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = model.encode(volume)
        found = model.classify(features)["probabilities"]
        masks = model.localize(volume, None, features)["mask_logits"].sigmoid()
    evidence = LesionEvidence(found, masks, None, (4.0, 2.0, 2.0), features.grid)
    return ReportContext.of(model.report_generator, features, evidence)


@pytest.mark.parametrize("strategy", ["text", "embedding", "both", "none"])
def test_the_loss_sees_the_probabilities_that_were_drawn_from(strategy: str) -> None:
    model = small_model(location_strategy=strategy).eval()
    for parameter in model.part_parameters("adapters"):
        torch.nn.init.normal_(parameter, std=0.3)
    generator, llm = model.report_generator, model.report_generator.llm
    assert llm is not None
    context = report_context(model)
    with torch.no_grad():
        prompt = context.prompt(generator)
        group = sample_group(llm, prompt, 3, max_new_tokens=6, temperature=0.7, seed=5)
        scored = context.log_probabilities(generator, group.tokens_KT, group.mask_KT, temperature=0.7)
        torch.testing.assert_close(group.log_p_KT, scored, atol=1e-5, rtol=1e-4)
        for row, mask, found in zip(group.tokens_KT, group.mask_KT, scored, strict=True):
            words = llm.embed(row[mask])
            logits = llm(torch.cat([prompt, words])[None]).logits[0, len(prompt) - 1 : -1].float() / 0.7
            expected = logits.log_softmax(-1)[torch.arange(int(mask.sum())), row[mask]]
            torch.testing.assert_close(found[mask], expected, atol=1e-5, rtol=1e-4)
            assert not found[~mask].any()


def test_reports_after_one_prompt_learn_as_reports_with_a_prompt_each() -> None:
    model = small_model(location_strategy="both").eval()
    for parameter in model.part_parameters("adapters"):
        torch.nn.init.normal_(parameter, std=0.3)
    generator, context = model.report_generator, report_context(model)
    trained = [*model.part_parameters("adapters"), *model.part_parameters("projector")]
    draws = torch.Generator().manual_seed(0)
    tokens_KT = torch.randint(1, 50, (3, 7), generator=draws)
    mask_KT = torch.arange(7) < torch.tensor([[7], [1], [4]])
    worth_KT = torch.randn(3, 7, generator=draws)

    def gradients(log_p_KT: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad((log_p_KT * worth_KT).sum(), trained, allow_unused=True))

    together = context.log_probabilities(generator, tokens_KT, mask_KT)
    assert generator.llm is not None
    alone = torch.zeros(3, 7)
    for row, mask in enumerate(mask_KT):
        prompt, words = context.prompt(generator), tokens_KT[row][mask]
        logits = generator.llm(torch.cat([prompt, generator.llm.embed(words)])[None]).logits[0]
        log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(words)), words]
        alone = alone.index_put((torch.tensor([row]), torch.arange(len(words))), log_p)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    for one, other in zip(gradients(together), gradients(alone), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    assert any(
        gradient is not None and gradient.abs().max() > 0
        for gradient in gradients(context.log_probabilities(generator, tokens_KT, mask_KT))
    )


def test_the_temperature_is_not_rounded_to_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_language_model().eval()
    logits = (10 * torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    monkeypatch.setattr(llm, "forward", lambda *_, **__: SimpleNamespace(logits=logits))
    tokens, prompt = torch.arange(1, 6)[None], llm.embed_ids([1, 2]).detach()
    found = row_log_probabilities(llm, prompt, tokens, tokens > 0, temperature=0.7)
    expected = (logits[0, :5].float() / 0.7).log_softmax(-1)[torch.arange(5), tokens[0]]
    torch.testing.assert_close(found[0], expected)


def test_a_window_of_attention_is_not_exceeded() -> None:
    llm = small_language_model().eval()
    llm.config.sliding_window = 8
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    tokens = torch.ones(2, 9 - len(prompt), dtype=torch.long)
    with pytest.raises(ValueError, match="window of 8"):
        row_log_probabilities(llm, prompt, tokens, tokens > 0)


def test_samples_follow_the_models_distribution() -> None:
    llm = small_language_model().eval()
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    group = sample_group(llm, prompt, 4000, max_new_tokens=1, seed=1)
    with torch.no_grad():
        expected = llm(prompt[None]).logits[0, -1].softmax(0)
    share = torch.bincount(group.tokens_KT[:, 0], minlength=len(expected)) / 4000
    assert float((share - expected).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    assert float((share - expected).abs().sum() / 2) < 0.15


def test_a_seed_draws_the_same_reports_and_another_draws_others() -> None:
    llm = small_language_model().eval()
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    one, again, other = (sample_group(llm, prompt, 4, max_new_tokens=10, seed=seed) for seed in (1, 1, 2))
    assert one.texts == again.texts != other.texts
    assert len(set(one.texts)) > 1


def test_a_report_ends_at_its_end_token_and_counts_it() -> None:
    llm = small_language_model().eval()
    llm.stop_token_ids = set(range(130, len(llm.tokenizer)))  # type: ignore[arg-type]
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    group = sample_group(llm, prompt, 8, max_new_tokens=20, seed=0)
    for row, mask, done in zip(group.tokens_KT, group.mask_KT, group.finished_K, strict=True):
        ids = row[mask].tolist()
        assert bool(done) == (ids[-1] in llm.stop_token_ids)
        assert not set(ids[:-1]) & llm.stop_token_ids
        assert not row[~mask].any()
    assert bool(group.finished_K.any())


def test_models_that_transformers_runs_are_sampled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_language_model().eval()
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    fast = sample_group(llm, prompt, 4, max_new_tokens=10, seed=1)
    monkeypatch.setattr(group_sampling, "open_engine", TransformersEngine)
    other = sample_group(llm, prompt, 4, max_new_tokens=10, seed=1)
    assert fast.texts == other.texts
    torch.testing.assert_close(fast.log_p_KT, other.log_p_KT, atol=1e-5, rtol=1e-4)


def test_samples_are_those_of_float32_within_a_narrower_block() -> None:
    llm = small_language_model().eval()
    prompt = llm.embed_ids(llm.encode("Scan: ")).detach()
    whole = sample_group(llm, prompt, 4, max_new_tokens=10, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert sample_group(llm, prompt, 4, max_new_tokens=10, seed=1).texts == whole.texts


def test_probabilities_that_are_no_numbers_are_told() -> None:
    llm = small_language_model().eval()
    with pytest.raises(FloatingPointError, match="no numbers"):
        sample_group(llm, torch.full((3, 32), math.nan), 2, max_new_tokens=4)


# --- frozen weights ----------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_model_without_adapters_and_leaves_them_alone() -> None:
    plain, adapted = small_language_model(lora=False), small_language_model(lora=True)
    texts = ["The lungs are clear.", "", "No effusion"]
    expected = FrozenPerplexity(plain, rows=1)(texts)
    with torch.no_grad():
        for parameter in adapted.adapter_parameters().values():
            parameter.add_(0.3)
    before = {name: p.clone() for name, p in adapted.adapter_parameters().items()}
    assert FrozenPerplexity(adapted, rows=2)(texts) == pytest.approx(expected, rel=1e-4)
    assert expected[1] == math.inf
    for name, parameter in adapted.adapter_parameters().items():
        assert torch.equal(parameter, before[name])


def test_replaced_weights_come_back_even_after_an_error() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    storage = parameter.data_ptr()

    def fail() -> None:
        with replaced_weights({parameter: torch.zeros(2)}):
            assert not parameter.any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert parameter.data_ptr() == storage
    assert bool(parameter.all())
