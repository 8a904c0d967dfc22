"""From a region mask to what attention needs: the share of each patch a region covers, and a token a region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm3d.model.patch_embedding import Grid, extract_patches, pad_to_patches


@dataclass
class Anatomy:
    """The anatomy of a batch, background being region 0.

    Attributes:
        region_B1RC: Region tokens (B, R + 1, C).
        share_BNR: Share of each patch (B, N, R + 1) that each region covers, rows summing to 1; None without a mask.
    """

    region_BRC: Tensor
    share_BNR: Tensor | None


def region_shares(mask_BDHW: Tensor, patch_size: Grid, num_regions: int) -> Tensor:
    """Share of each patch that each region covers.

    Args:
        mask_BDHW: Region ids 0..num_regions, any integer type.
        patch_size: Voxels a patch.
        num_regions: Regions without background.

    Returns:
        (B, N, num_regions + 1) float32; each row sums to 1. Voxels past the volume's edge count as background.

    Raises:
        ValueError: An id lies outside 0..num_regions.
    """
    if mask_BDHW.numel() and not mask_BDHW.is_meta:
        low, high = int(mask_BDHW.min()), int(mask_BDHW.max())
        if low < 0 or high > num_regions:
            raise ValueError(f"region ids lie between 0 and {num_regions}, the mask holds {low}..{high}")
    padded = pad_to_patches(mask_BDHW.unsqueeze(1), patch_size, value=0)
    ids_BNV = extract_patches(padded, patch_size)
    shares = [(ids_BNV == region).sum(dim=-1) for region in range(num_regions + 1)]
    return torch.stack(shares, dim=-1).float() / ids_BNV.shape[-1]


class AnatomicalStructureEncoder(nn.Module):
    """A token a region: a learned embedding plus, with a mask, what the region's size and place say.

    Geometry is (log of the covered share of the volume, centroid z, y, x in -1..1, extent z, y, x), all from patch shares.
    """

    NUM_GEOMETRY = 7

    def __init__(self, num_regions: int, embed_dim: int, patch_size: Grid) -> None:
        super().__init__()
        self.num_regions = num_regions
        self.patch_size = patch_size
        self.embedding = nn.Parameter(torch.empty(num_regions + 1, embed_dim))
        self.geometry = nn.Linear(self.NUM_GEOMETRY, embed_dim)
        nn.init.trunc_normal_(self.embedding, std=0.02)

    def forward(self, mask_BDHW: Tensor | None, batch: int, grid: Grid) -> Anatomy:
        """Region tokens and patch shares of a batch; ``mask_BDHW`` may also be (B, 1, D, H, W), or None."""
        region_BRC = self.embedding.expand(batch, -1, -1)
        if mask_BDHW is None:
            return Anatomy(region_BRC, None)
        if mask_BDHW.ndim == 5:
            mask_BDHW = mask_BDHW.squeeze(1)
        share_BNR = region_shares(mask_BDHW, self.patch_size, self.num_regions)
        geometry_BRG = self._geometry(share_BNR, grid).to(region_BRC.dtype)
        return Anatomy(region_BRC + self.geometry(geometry_BRG), share_BNR)

    def _geometry(self, share_BNR: Tensor, grid: Grid) -> Tensor:
        axes = [
            torch.linspace(-1, 1, n, device=share_BNR.device) if n > 1 else share_BNR.new_zeros(1)
            for n in grid
        ]
        position_N3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        covered_BR1 = share_BNR.sum(dim=1).unsqueeze(-1)
        weight_BRN = share_BNR.transpose(1, 2) / covered_BR1.clamp(min=1e-6)
        centroid_BR3 = weight_BRN @ position_N3
        variance_BR3 = (weight_BRN @ position_N3.square() - centroid_BR3.square()).clamp(min=0)
        size_BR1 = torch.log1p(covered_BR1)
        return torch.cat([size_BR1, centroid_BR3, variance_BR3.sqrt()], dim=-1)
