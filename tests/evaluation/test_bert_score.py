"""BERTScore against its formula, written out; long, empty and repeated texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.small_models import small_text_encoder
from vlm3d.evaluation.bert_score import bert_score
from vlm3d.model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return small_text_encoder()


def literal(predicted: str, truth: str, encoder: TextEncoder) -> tuple[float, float]:
    rows = []
    for text in (predicted, truth):
        read = encoder.tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        with torch.no_grad():
            hidden = encoder.model(
                input_ids=read["input_ids"], attention_mask=read["attention_mask"]
            ).last_hidden_state[0]
        kept = hidden[read["special_tokens_mask"][0] == 0]
        rows.append((kept / kept.norm(dim=-1, keepdim=True)).numpy())
    cosine = rows[0] @ rows[1].T
    return float(cosine.max(axis=1).mean()), float(cosine.max(axis=0).mean())


def test_equal_to_its_formula(encoder: TextEncoder) -> None:
    predicted = ["no effusion", "a nodule of 5 mm", "no effusion"] * 12  # more than a block
    truth = ["no pleural effusion", "nodule", "no effusion"] * 12
    found = bert_score(predicted, truth, encoder)
    for row in (0, 1, 35):
        precision, recall = literal(predicted[row], truth[row], encoder)
        assert found.precision_N[row] == pytest.approx(precision, abs=1e-5)
        assert found.recall_N[row] == pytest.approx(recall, abs=1e-5)
        assert found.f1_N[row] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert found.f1_N[2] == pytest.approx(1, abs=1e-6)
    assert found.figures()["BERTScore_encoder"] == encoder.name
    assert found.figures()["BERTScore_f1"] == pytest.approx(found.f1_N.mean())


def test_long_texts_are_read_whole(encoder: TextEncoder) -> None:
    longest = int(encoder.model.config.max_position_embeddings)
    start = "ab " * longest
    found = bert_score([start + "xyz", start], [start + "xyz", start + "xyz"], encoder)
    assert found.f1_N[0] == pytest.approx(1, abs=1e-6)
    assert found.recall_N[1] < 1 - 1e-6  # the end past the first window is missed


def test_empty_texts_score_nothing(encoder: TextEncoder) -> None:
    found = bert_score(["", "a", ""], ["a", "", ""], encoder)
    np.testing.assert_array_equal(found.f1_N, [0, 0, 0])
    with pytest.raises(ValueError, match="0 generated reports against 0"):
        bert_score([], [], encoder)
