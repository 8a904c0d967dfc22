"""The frozen text encoder: prompts become vectors, and learned soft prompts can stand in front of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlm3d.errors import WeightsUnavailableError
from vlm3d.pretrained import quiet_transformers, resolve_weights

logger = logging.getLogger(__name__)

_KNOWN_DIMS = {
    "emilyalsentzer/Bio_ClinicalBERT": 768,
    "dmis-lab/biobert-v1.1": 768,
    "sentence-transformers/all-MiniLM-L6-v2": 384,
}


class TextEncoder(nn.Module):
    """A BERT whose weights stand still.

    Args:
        model: A transformers encoder that takes ``inputs_embeds``.
        tokenizer: Its tokenizer.
        name: What it was loaded from.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name

    @property
    def dim(self) -> int:
        """Width T of the vectors."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode: a frozen encoder has no dropout."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Mean of the token vectors of each text, (N, T) float32."""
        return self.encode_with_soft_prompts(texts, torch.empty(len(texts), 0, self.dim, device=self.device))

    def encode_with_soft_prompts(self, texts: Sequence[str], soft_prompts_KST: Tensor) -> Tensor:
        """Encode texts behind learned vectors.

        The vectors stand right after the first token ([CLS]), as if they were words; gradients flow into them through the
        frozen encoder.

        Args:
            texts: K sentences.
            soft_prompts_KST: S vectors a sentence; S may be 0.

        Returns:
            (K, T) float32, mean over all tokens, the learned ones included.
        """
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        words_KLT = self.model.get_input_embeddings()(batch["input_ids"].to(self.device))
        soft_KST = soft_prompts_KST.to(device=self.device, dtype=words_KLT.dtype)
        embeds = torch.cat([words_KLT[:, :1], soft_KST, words_KLT[:, 1:]], dim=1)
        mask_KL = batch["attention_mask"].to(self.device)
        mask = torch.cat([mask_KL[:, :1].expand(-1, 1 + soft_KST.shape[1]), mask_KL[:, 1:]], dim=1)
        hidden = self.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        return pooled.float().to(soft_prompts_KST.device)


def load_text_encoder(name: str, device: torch.device | str | None = None) -> TextEncoder:
    """Load a frozen text encoder by folder or Hub name.

    Raises:
        WeightsUnavailableError: It is in none of the places looked in, or is no text encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_weights(name)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsUnavailableError(
            f"{folder} is not a text encoder that transformers loads ({reason})"
        ) from error
    logger.info("text encoder %s from %s", name, folder)
    return TextEncoder(model.to(torch.device(device or "cpu")), tokenizer, name)


def text_encoder_dim(name: str) -> int:
    """Width of a text encoder's vectors, without loading its weights."""
    if name in _KNOWN_DIMS:
        return _KNOWN_DIMS[name]
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(resolve_weights(name), local_files_only=True).hidden_size)
