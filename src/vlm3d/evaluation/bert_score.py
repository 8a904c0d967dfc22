"""BERTScore: how near each word of a report is in meaning to some word of its reference.

Formula of Zhang et al. (2020) without rarity weights and without baseline rescaling: each token takes the highest cosine
similarity to a token of the other text; precision is the mean over the report's tokens, recall over the reference's, F1
their harmonic mean. Figures depend on the encoder, so its name is part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from vlm3d.model.text_encoder import TextEncoder, load_text_encoder

EMBEDDED_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_PAIRS_AT_A_TIME = 32
_WINDOWS_AT_A_TIME = 16
_LONGEST_WINDOW = 512

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BertScores:
    """BERTScore of N reports.

    Attributes:
        encoder: Name of the text encoder.
        precision_N: Of each report.
        recall_N: Of each report.
        f1_N: Of each report.
    """

    encoder: str
    precision_N: Floats
    recall_N: Floats
    f1_N: Floats

    def figures(self) -> dict[str, float | str]:
        """Means over reports, with the encoder's name."""
        return {
            "BERTScore_precision": float(self.precision_N.mean()),
            "BERTScore_recall": float(self.recall_N.mean()),
            "BERTScore_f1": float(self.f1_N.mean()),
            "BERTScore_encoder": self.encoder,
        }


def bert_score(
    predicted: Sequence[str], truth: Sequence[str], encoder: TextEncoder | None = None
) -> BertScores:
    """Score reports by the meaning of their words.

    Texts of any length are read whole, in windows as long as the encoder takes. An empty text on either side scores 0.

    Args:
        predicted: N generated reports.
        truth: Their references.
        encoder: By default the embedded one.

    Raises:
        ValueError: There are no reports, or not as many of the one as of the other.
        WeightsUnavailableError: The embedded encoder is in none of the places looked in.
    """
    if not len(predicted) or len(predicted) != len(truth):
        raise ValueError(
            f"{len(predicted)} generated reports against {len(truth)} references; at least one pair is needed"
        )
    encoder = encoder or load_text_encoder(EMBEDDED_ENCODER)
    rows = []
    for start in range(0, len(predicted), _PAIRS_AT_A_TIME):
        block = slice(start, start + _PAIRS_AT_A_TIME)
        texts = list(dict.fromkeys((*predicted[block], *truth[block])))
        vectors = dict(zip(texts, _token_vectors(texts, encoder), strict=True))
        rows += [_score(vectors[p], vectors[t]) for p, t in zip(predicted[block], truth[block], strict=True)]
    precision_N, recall_N = np.array(rows, dtype=np.float64).T
    total_N = precision_N + recall_N
    f1_N = np.divide(2 * precision_N * recall_N, total_N, out=np.zeros_like(total_N), where=total_N > 0)
    return BertScores(encoder.name, precision_N, recall_N, f1_N)


def _score(predicted_PT: Tensor, truth_RT: Tensor) -> tuple[float, float]:
    if not len(predicted_PT) or not len(truth_RT):
        return 0.0, 0.0
    cosine_PR = predicted_PT @ truth_RT.T
    return float(cosine_PR.amax(dim=1).mean()), float(cosine_PR.amax(dim=0).mean())


@torch.no_grad()
def _token_vectors(texts: Sequence[str], encoder: TextEncoder) -> list[Tensor]:
    """Of each text (tokens, T) unit vectors in context, marks such as [CLS] left out."""
    longest = min(_LONGEST_WINDOW, int(encoder.model.config.max_position_embeddings))
    windows: list[tuple[int, Tensor, Tensor]] = []
    for number, text in enumerate(texts):
        read = encoder.tokenizer(
            text,
            truncation=True,
            max_length=longest,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        for ids, special in zip(read["input_ids"], read["special_tokens_mask"], strict=True):
            if not all(special):
                windows.append((number, torch.tensor(ids), torch.tensor(special) == 0))
    pieces: list[list[Tensor]] = [[] for _ in texts]
    order = sorted(range(len(windows)), key=lambda place: (len(windows[place][1]), place))
    for start in range(0, len(order), _WINDOWS_AT_A_TIME):
        batch = [windows[place] for place in order[start : start + _WINDOWS_AT_A_TIME]]
        width = max(len(ids) for _, ids, _ in batch)
        ids_BL = torch.stack([pad(ids, (0, width - len(ids))) for _, ids, _ in batch]).to(encoder.device)
        lengths_B = torch.tensor([len(ids) for _, ids, _ in batch], device=encoder.device)
        mask_BL = torch.arange(width, device=encoder.device)[None] < lengths_B[:, None]
        hidden = (
            encoder.model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state.float().cpu()
        )
        for (number, ids, word), vectors in zip(batch, hidden, strict=True):
            pieces[number].append(normalize(vectors[: len(ids)][word], dim=-1))
    return [torch.cat(piece) if piece else torch.zeros(0, encoder.dim) for piece in pieces]
