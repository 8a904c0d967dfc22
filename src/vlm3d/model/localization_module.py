"""Lesion localizer: prompts, denoised patch features and a U-Net become one mask a lesion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.config import LocalizerConfig
from vlm3d.labels import first_lesions
from vlm3d.model.attention_unet import TextGuidedAttentionUNet
from vlm3d.model.denoising import DenoisingTransformer
from vlm3d.model.patch_embedding import Grid
from vlm3d.model.patch_peaks import Shell
from vlm3d.model.text_encoder import TextEncoder


class TextEmbedder(nn.Module):
    """Stage 1: a feature for each lesion prompt, from embeddings that are computed once and kept.

    Args:
        prompts: One sentence a lesion, with its anatomical context.
        encoder_dim: Width of the frozen text encoder.
        text_dim: Width T of the features.
    """

    def __init__(self, prompts: Sequence[str], encoder_dim: int, text_dim: int) -> None:
        super().__init__()
        self.prompts = list(prompts)
        self.prompt_embedding: Tensor
        self.register_buffer("prompt_embedding", torch.zeros(len(self.prompts), encoder_dim))
        self.projection = nn.Sequential(
            nn.Linear(encoder_dim, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim), nn.LayerNorm(text_dim)
        )

    @torch.no_grad()
    def embed(self, encoder: TextEncoder) -> None:
        """Fill the kept embeddings with a frozen text encoder."""
        self.prompt_embedding.copy_(encoder.encode(self.prompts))

    def forward(self) -> Tensor:
        """Prompt features (L, T)."""
        return self.projection(self.prompt_embedding)


@dataclass
class LocalizationOutput:
    """What the localizer returns.

    Attributes:
        mask_logits_BLDHW: Logits on the volume's own grid.
        coarser_logits: Logits of coarser scales, finest first.
        patch_similarity_BLZYX: Cosine of each denoised patch with each prompt; None unless all scales were asked for.
    """

    mask_logits_BLDHW: Tensor
    coarser_logits: list[Tensor]
    patch_similarity_BLZYX: Tensor | None


class LesionLocalizationModule(nn.Module):
    """Three stages: `TextEmbedder`, `DenoisingTransformer`, `TextGuidedAttentionUNet`.

    The denoiser and the U-Net run once whatever the number of prompts.

    Args:
        config: Sizes.
        vision_dim: Width C of the patch features.
        encoder_dim: Width of the text encoder.
        in_channels: Image channels.
        patch_size: Voxels a patch.
        prompts: One sentence a lesion; the shipped ones by default.
        bands: As in `vlm3d.config.VisionConfig`.
        num_regions: Regions of the anatomy, without background.
        peak_shells: As in `vlm3d.config.VisionConfig`.
    """

    def __init__(
        self,
        config: LocalizerConfig,
        vision_dim: int,
        encoder_dim: int,
        in_channels: int = 1,
        patch_size: Grid = (4, 16, 16),
        prompts: Sequence[str] | None = None,
        bands: Sequence[tuple[float, float]] = (),
        num_regions: int = 20,
        peak_shells: Sequence[Shell] = (),
    ) -> None:
        super().__init__()
        self.config = config
        prompts = list(prompts or (lesion.prompt for lesion in first_lesions(config.num_lesion_diseases)))
        if len(prompts) != config.num_lesion_diseases:
            raise ValueError(f"{config.num_lesion_diseases} lesions need as many prompts, got {len(prompts)}")
        self.text_embedder = TextEmbedder(prompts, encoder_dim, config.text_dim)
        self.denoiser = DenoisingTransformer(
            vision_dim,
            config.text_dim,
            config.denoiser_depth,
            config.denoiser_heads,
            config.denoiser_mlp_ratio,
        )
        self.alignment = nn.Linear(vision_dim, config.text_dim)
        self.unet = TextGuidedAttentionUNet(
            in_channels,
            vision_dim,
            config.text_dim,
            patch_size,
            config.base_channels,
            config.bottleneck_channels,
            bands=bands,
            region_channels=config.region_channels,
            num_regions=num_regions,
            peak_shells=peak_shells,
        )

    def forward(
        self,
        volume_BCDHW: Tensor,
        patch_BNC: Tensor,
        grid: Grid,
        regions_BDHW: Tensor | None = None,
        *,
        all_scales: bool | None = None,
    ) -> LocalizationOutput:
        """Draw lesions.

        Args:
            volume_BCDHW: Intensities in -1..1.
            patch_BNC: The encoder's patch features.
            grid: Their grid (Z, Y, X).
            regions_BDHW: Region ids, or None for a scan without its anatomy.
            all_scales: Also return what only the losses need; by default in training mode.
        """
        all_scales = self.training if all_scales is None else all_scales
        text_LT = self.text_embedder()
        denoised_BNC = self.denoiser(patch_BNC, text_LT)
        masks = self.unet(volume_BCDHW, denoised_BNC, grid, text_LT, regions_BDHW, all_scales=all_scales)
        similarity = self._similarity(denoised_BNC, text_LT, grid) if all_scales else None
        return LocalizationOutput(masks.full_BLDHW, masks.coarser, similarity)

    def _similarity(self, denoised_BNC: Tensor, text_LT: Tensor, grid: Grid) -> Tensor:
        patch_BNT = F.normalize(self.alignment(denoised_BNC), dim=-1)
        return (patch_BNT @ F.normalize(text_LT, dim=-1).t()).transpose(1, 2).unflatten(2, grid)
