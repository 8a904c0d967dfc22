"""The 3D vision encoder: a chest CT and its anatomy become global, patch and region features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm3d.config import VisionConfig
from vlm3d.model.anatomical_encoder import AnatomicalStructureEncoder
from vlm3d.model.patch_embedding import Grid, PatchBox, PatchEmbedding, Place, cut_boxes
from vlm3d.model.transformer_block import TransformerBlock


@dataclass
class VisionFeatures:
    """What the encoder hands to the heads.

    Attributes:
        global_BC: One vector a scan.
        patch_BNC: One vector a patch, N = Z*Y*X with z slowest.
        region_BRC: One vector an anatomical region, without background.
        region_present_BR: False where a region covers nothing; all True without a mask.
        grid: (Z, Y, X).
    """

    global_BC: Tensor
    patch_BNC: Tensor
    region_BRC: Tensor
    region_present_BR: Tensor
    grid: Grid

    def within(self, boxes: Sequence[PatchBox]) -> VisionFeatures:
        """The same features with only the patches of one box a scan; all boxes have one shape."""
        cut = cut_boxes(self.patch_BNC.unflatten(1, self.grid).movedim(-1, 1), boxes)
        z, y, x = cut.shape[-3:]
        return replace(self, patch_BNC=cut.flatten(2).transpose(1, 2), grid=(z, y, x))


class ThreeDVisionEncoder(nn.Module):
    """Vision transformer over 3D patches with slice-aware and region-aware attention.

    Any grid of voxels is accepted, and so is a scan without an anatomy mask.

    Args:
        config: Sizes; see `vlm3d.config.VisionConfig`.
    """

    def __init__(self, config: VisionConfig | None = None) -> None:
        super().__init__()
        config = config or VisionConfig()
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.in_channels,
            config.embed_dim,
            config.patch_size,
            config.position_grid,
            config.stem_channels,
            config.bands,
            config.region_groups,
            config.peak_shells,
        )
        self.anatomy = AnatomicalStructureEncoder(config.num_regions, config.embed_dim, config.patch_size)
        self.global_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                config.max_slice_distance,
                region_dim=config.region_dim if self._exchanges_regions(index) else None,
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.embed_dim)
        self.norm_region = nn.LayerNorm(config.embed_dim)
        nn.init.trunc_normal_(self.global_token, std=0.02)
        self.apply(_init_linear)
        if self.patch_embedding.histogram is not None:
            self.patch_embedding.histogram.reset_parameters()

    def _exchanges_regions(self, index: int) -> bool:
        """Every n-th block, counted so that the last block always does."""
        return (self.config.depth - 1 - index) % self.config.region_every == 0

    def forward(
        self,
        volume_BCDHW: Tensor,
        segmentation_mask: Tensor | None = None,
        places: Sequence[Place] | None = None,
    ) -> VisionFeatures:
        """Encode scans.

        Args:
            volume_BCDHW: Intensities in -1..1, (B, in_channels, D, H, W), axes to superior, posterior, left.
            segmentation_mask: Region ids (B, D, H, W) or (B, 1, D, H, W) on the same grid, or None.
            places: For cut-outs: where each lies in its scan.

        Raises:
            ValueError: Shapes do not fit each other or the configuration.
        """
        self._check(volume_BCDHW, segmentation_mask)
        if segmentation_mask is not None and segmentation_mask.ndim == 5:
            segmentation_mask = segmentation_mask.squeeze(1)
        batch = len(volume_BCDHW)
        patch_BNC, grid = self.patch_embedding(volume_BCDHW, places, segmentation_mask)
        anatomy = self.anatomy(segmentation_mask, batch, grid)
        share = anatomy.share_BNR
        if share is not None:  # the global token counts as covered by each region as the whole volume is
            share = torch.cat([share.mean(dim=1, keepdim=True), share], dim=1)
        tokens_BNC = torch.cat([self.global_token.expand(batch, -1, -1), patch_BNC], dim=1)
        del patch_BNC
        region_BRC = anatomy.region_BRC
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training and torch.is_grad_enabled():
                tokens_BNC, region_BRC = checkpoint(
                    block, tokens_BNC, region_BRC, share, grid, use_reentrant=False
                )
            else:
                tokens_BNC, region_BRC = block(tokens_BNC, region_BRC, share, grid)
        tokens_BNC = self.norm(tokens_BNC)
        present = (
            torch.ones(batch, self.config.num_regions, dtype=torch.bool, device=tokens_BNC.device)
            if share is None
            else share[:, 0, 1:] > 0
        )
        return VisionFeatures(
            global_BC=tokens_BNC[:, 0],
            patch_BNC=tokens_BNC[:, 1:],
            region_BRC=self.norm_region(region_BRC[:, 1:]),
            region_present_BR=present,
            grid=grid,
        )

    def _check(self, volume_BCDHW: Tensor, mask: Tensor | None) -> None:
        if volume_BCDHW.ndim != 5 or volume_BCDHW.shape[1] != self.config.in_channels:
            raise ValueError(
                f"a volume is (B, {self.config.in_channels}, D, H, W), got {tuple(volume_BCDHW.shape)}"
            )
        if mask is None:
            return
        expected = (len(volume_BCDHW), *volume_BCDHW.shape[2:])
        found = tuple(mask.squeeze(1).shape if mask.ndim == 5 and mask.shape[1] == 1 else mask.shape)
        if found != expected:
            raise ValueError(f"the mask's grid {found} differs from the volume's {expected}")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
