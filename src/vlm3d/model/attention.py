"""The two attentions of the encoder: slice-aware among patches, region-aware between patches and anatomy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.model.patch_embedding import Grid

_FUSED_WIDTH = 8
"""CUDA's kernels in linear memory take head widths that are multiples of this, or of half of it in float32."""


class SliceAwareAttention(nn.Module):
    """Self-attention among patches that knows how many slices lie between two of them.

    The logits are ``q_i . k_j / sqrt(d) + b_h(|z_i - z_j|)``: one learned bias a head and slice distance. The bias depends
    on two slice indices only, so it is an inner product: one-hot(z_j) is appended to the key and row z_i of the bias
    table to the query, and plain fused attention returns the biased result without any N x N matrix. The value is padded
    to the same width because fused kernels ask for one head width, and all three to a multiple of `_FUSED_WIDTH`. Tokens
    before the patches (the global token) have no slice: their appended entries are zero, and so is their bias.
    """

    def __init__(self, embed_dim: int, num_heads: int, max_slice_distance: int = 64) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.slice_bias = nn.Parameter(torch.zeros(num_heads, max_slice_distance))

    def bias_HZZ(self, num_slices: int) -> Tensor:
        """Bias (heads, Z, Z) between slices; distances past the table share its last entry."""
        z = torch.arange(num_slices, device=self.slice_bias.device)
        distance_ZZ = (z[:, None] - z[None, :]).abs().clamp(max=self.slice_bias.shape[1] - 1)
        return self.slice_bias[:, distance_ZZ]

    def forward(self, tokens_BNC: Tensor, grid: Grid) -> Tensor:
        """Attend among tokens (B, P + Z*Y*X, C), of which the first P are not patches; same shape out."""
        batch, tokens, width = tokens_BNC.shape
        num_slices = grid[0]
        prefix = tokens - math.prod(grid)
        query, key, value = (
            self.qkv(tokens_BNC).view(batch, tokens, 3, self.num_heads, self.head_dim).unbind(2)
        )

        row_NHZ, onehot_NZ = self._slice_features(grid, prefix)
        row_NHZ, onehot_NZ = row_NHZ.to(query.dtype), onehot_NZ.to(query.dtype)
        extra = (batch, tokens, self.num_heads, num_slices)
        query = torch.cat([query, row_NHZ.expand(extra)], dim=-1)
        key = torch.cat([key, onehot_NZ[:, None].expand(extra)], dim=-1)
        width_left = -query.shape[-1] % _FUSED_WIDTH
        query, key = F.pad(query, (0, width_left)), F.pad(key, (0, width_left))
        value = F.pad(value, (0, num_slices + width_left))
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=self.head_dim**-0.5
        )
        return self.out(mixed.transpose(1, 2)[..., : self.head_dim].reshape(batch, tokens, width))

    def _slice_features(self, grid: Grid, prefix: int) -> tuple[Tensor, Tensor]:
        """What is appended to queries (N, heads, Z) and keys (N, Z); sqrt(d) undoes the scale of the logits."""
        num_slices, in_plane = grid[0], grid[1] * grid[2]
        rows_ZHZ = self.bias_HZZ(num_slices).transpose(0, 1) * math.sqrt(self.head_dim)
        row_NHZ = F.pad(rows_ZHZ.repeat_interleave(in_plane, dim=0), (0, 0, 0, 0, prefix, 0))
        onehot_ZZ = torch.eye(num_slices, device=row_NHZ.device)
        return row_NHZ, F.pad(onehot_ZZ.repeat_interleave(in_plane, dim=0), (0, 0, prefix, 0))


class RegionAwareAttention(nn.Module):
    """Exchange between patches and anatomical regions, weighted by the share of each patch that a region covers.

    Two steps, each a softmax whose logits get ``log(share)``, so that a weight is proportional to share x exp(q . k):

    1. *gather*: a region attends to the patches it covers (a weighted mean, which does not grow with their number);
    2. *scatter*: a patch attends to the regions that cover it.

    Without a mask the shares are equal and both steps are plain cross-attention. A region that covers nothing gathers
    nothing and is not attended to.
    """

    def __init__(self, embed_dim: int, region_dim: int, head_dim: int = 32) -> None:
        super().__init__()
        self.num_heads = max(1, region_dim // head_dim)
        if region_dim % self.num_heads:
            raise ValueError(f"region_dim {region_dim} is not a multiple of {self.num_heads} heads")
        self.norm_patch = nn.LayerNorm(embed_dim)
        self.norm_region = nn.LayerNorm(embed_dim)
        self.norm_gathered = nn.LayerNorm(embed_dim)
        self.gather_query = nn.Linear(embed_dim, region_dim)
        self.gather_key_value = nn.Linear(embed_dim, 2 * region_dim)
        self.gather_out = nn.Linear(region_dim, embed_dim)
        self.scatter_query = nn.Linear(embed_dim, region_dim)
        self.scatter_key_value = nn.Linear(embed_dim, 2 * region_dim)
        self.scatter_out = nn.Linear(region_dim, embed_dim)

    def forward(
        self, patch_BNC: Tensor, region_BRC: Tensor, share_BNR: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Updated patches (B, N, C) and regions (B, R, C).

        Args:
            patch_BNC: Patch tokens; a global token may stand among them.
            region_BRC: Region tokens, background first.
            share_BNR: Share of each patch that each region covers; rows sum to 1. None when there is no mask.
        """
        scatter_BNR = gather_BRN = covered_BR1 = None
        if share_BNR is not None:
            covered_BR1 = (share_BNR.amax(dim=1) > 0).unsqueeze(-1)
            scatter_BNR = share_BNR.log().to(patch_BNC.dtype)
            # A softmax over nothing is undefined: a region that covers nothing looks everywhere and is silenced below.
            gather_BRN = torch.where(covered_BR1, scatter_BNR.transpose(1, 2), 0.0)

        normed_patch = self.norm_patch(patch_BNC)
        query = self.gather_query(self.norm_region(region_BRC))
        gathered = self.gather_out(self._attend(query, self.gather_key_value(normed_patch), gather_BRN))
        if covered_BR1 is not None:
            gathered = gathered * covered_BR1
        region_BRC = region_BRC + gathered

        key_value = self.scatter_key_value(self.norm_gathered(region_BRC))
        scattered = self._attend(self.scatter_query(normed_patch), key_value, scatter_BNR)
        return patch_BNC + self.scatter_out(scattered), region_BRC

    def _attend(self, query: Tensor, key_value: Tensor, log_share: Tensor | None) -> Tensor:
        key, value = key_value.chunk(2, dim=-1)
        split = (*query.shape[:1], -1, self.num_heads, query.shape[-1] // self.num_heads)
        query, key, value = (part.reshape(split).transpose(1, 2) for part in (query, key, value))
        mask = None if log_share is None else log_share.unsqueeze(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
