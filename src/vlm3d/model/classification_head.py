"""Disease classifier: an image and a sentence about a disease meet in one space, and their angle is the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.config import ClassifierConfig
from vlm3d.labels import first_diseases
from vlm3d.model.text_encoder import TextEncoder
from vlm3d.model.vision_encoder import VisionFeatures


class MultiLabelClassifier(nn.Module):
    """Probability of each disease from cosine similarity of image and prompt.

    Each disease has a prompt, read by a frozen biomedical text encoder behind a few learned soft prompt vectors. In the
    shared space its text feature attends to the region and patch features (what the prompt looks for may be small), which
    joins the global feature. ``logit_k = temperature * cos(image_k, text_k) + scale_k * seen_k + bias_k``, where seen_k is
    the evidence of region and patches in the mean that this attention takes, so that a patch which plainly shows a disease
    is heard past all others. Temperature, scale, bias and sharpness (a factor on a disease's evidence before the softmax)
    are learned.

    The prompt embeddings are a buffer, so predicting needs no text encoder; with one attached, training sends gradients
    through it to the soft prompts, and `refresh_prompts` brings the buffer up to date.

    Args:
        config: Sizes.
        vision_dim: Width C of the vision features.
        text_dim: Width T of the text encoder.
        prompts: One sentence a disease; the shipped ones by default.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        vision_dim: int,
        text_dim: int,
        prompts: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.prompts = list(prompts or (disease.sentence for disease in first_diseases(config.num_diseases)))
        if len(self.prompts) != config.num_diseases:
            raise ValueError(f"{config.num_diseases} diseases need as many prompts, got {len(self.prompts)}")
        shared = config.shared_dim
        self.soft_prompts = nn.Parameter(torch.empty(config.num_diseases, config.num_soft_prompts, text_dim))
        self.prompt_embedding: Tensor
        self.register_buffer("prompt_embedding", torch.zeros(config.num_diseases, text_dim))
        self._embedded: Tensor  # the soft prompts that `prompt_embedding` was made of
        self.register_buffer("_embedded", torch.full_like(self.soft_prompts, torch.nan), persistent=False)
        self.text_projection = nn.Linear(text_dim, shared)
        self.norm_image = nn.LayerNorm(vision_dim)
        self.global_projection = nn.Linear(vision_dim, shared)
        self.local_key = nn.Linear(vision_dim, shared)
        self.local_value = nn.Linear(vision_dim, shared)
        self.dropout = nn.Dropout(config.dropout)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.sharpness = nn.Parameter(torch.full((config.num_diseases,), 2.0))
        self.evidence_scale = nn.Parameter(torch.full((config.num_diseases,), 0.5))
        self.bias = nn.Parameter(torch.zeros(config.num_diseases))
        nn.init.normal_(self.soft_prompts, std=0.02)
        self._text_encoder: list[
            TextEncoder
        ] = []  # in a list, so that its frozen weights are not part of this module

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The attached frozen text encoder, if any."""
        return self._text_encoder[0] if self._text_encoder else None

    def attach_text_encoder(self, encoder: TextEncoder) -> None:
        """Let the soft prompts train through a frozen text encoder, and embed the prompts unless a checkpoint has them.

        Raises:
            ValueError: The encoder has another width than the prompts.
        """
        if encoder.dim != self.soft_prompts.shape[-1]:
            raise ValueError(
                f"prompts are {self.soft_prompts.shape[-1]} wide, the text encoder {encoder.dim}"
            )
        self._text_encoder = [encoder]
        self.soft_prompts.requires_grad_(True)
        self.refresh_prompts()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLabelClassifier:
        """Take the text encoder along to another device, as its weights are not part of this module."""
        super()._apply(fn, recurse)
        if self.text_encoder is not None:
            self.text_encoder.to(self.bias.device)
        return self

    def detach_text_encoder(self) -> None:
        """Go on with the stored prompt embeddings; the soft prompts stand still from here on."""
        self.refresh_prompts()
        self._text_encoder = []
        self.soft_prompts.requires_grad_(False)

    @torch.no_grad()
    def refresh_prompts(self) -> None:
        """Bring the stored prompt embeddings up to date with the soft prompts.

        Embeddings of soft prompts that did not change stay as they are: another processor would round them otherwise, and
        what was tuned for these weights would not know them again.
        """
        if self.text_encoder is not None and not torch.equal(self._embedded, self.soft_prompts):
            self.prompt_embedding.copy_(self._encode_prompts())
            self.keep_embeddings()

    @torch.no_grad()
    def keep_embeddings(self) -> None:
        """Take the stored prompt embeddings for those of the soft prompts, as in a checkpoint."""
        self._embedded.copy_(self.soft_prompts)

    def _encode_prompts(self) -> Tensor:
        assert self.text_encoder is not None
        return self.text_encoder.encode_with_soft_prompts(self.prompts, self.soft_prompts)

    def train(self, mode: bool = True) -> MultiLabelClassifier:
        """Switch between training and evaluation; on leaving training the prompt embeddings are refreshed."""
        if self.training and not mode:
            self.refresh_prompts()
        super().train(mode)
        return self

    def forward(self, features: VisionFeatures) -> dict[str, Tensor]:
        """Classify a batch.

        Returns:
            ``logits_BK``, ``probabilities_BK``, ``attention_BKM``: where each disease looked, over the M = R + N region and
            patch features, and ``evidence_BKM``: the logits of that attention.
        """
        through_encoder = self.training and self.text_encoder is not None and self.soft_prompts.requires_grad
        embedding_KT = self._encode_prompts() if through_encoder else self.prompt_embedding
        text_KS = F.normalize(self.text_projection(embedding_KT), dim=-1)

        local_BMC = self.norm_image(torch.cat([features.region_BRC, features.patch_BNC], dim=1))
        evidence_BKM = text_KS @ self.local_key(local_BMC).transpose(1, 2)
        sharp_BKM = self.sharpness.clamp(min=0.1)[:, None] * evidence_BKM
        attention_BKM = _over_what_is_there(sharp_BKM, features).softmax(dim=-1)
        looked_BKS = attention_BKM @ self.local_value(local_BMC)
        global_B1S = self.global_projection(self.norm_image(features.global_BC)).unsqueeze(1)
        image_BKS = F.normalize(self.dropout(global_B1S + looked_BKS), dim=-1)
        cosine_BK = (image_BKS * text_KS).sum(dim=-1)
        seen_BK = (attention_BKM * evidence_BKM).sum(dim=-1)
        logits_BK = (
            self.log_temperature.exp().clamp(max=100.0) * cosine_BK
            + self.evidence_scale * seen_BK
            + self.bias
        )
        return {
            "logits_BK": logits_BK,
            "probabilities_BK": logits_BK.sigmoid(),
            "attention_BKM": attention_BKM,
            "evidence_BKM": evidence_BKM,
        }


def _over_what_is_there(logits_BKM: Tensor, features: VisionFeatures) -> Tensor:
    """The logits with minus infinity at regions that a scan lacks."""
    absent_BR = ~features.region_present_BR
    absent_BM = F.pad(absent_BR, (0, logits_BKM.shape[-1] - absent_BR.shape[1]))
    return logits_BKM.masked_fill(absent_BM.unsqueeze(1), float("-inf"))
