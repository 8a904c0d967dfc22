"""Stage 2 of the localizer: patch features are refined under the guidance of the lesion prompts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.model.transformer_block import Mlp


class Attention(nn.Module):
    """Plain multi-head attention, self or cross, through the fused kernel."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key_value = nn.Linear(embed_dim, 2 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, query_BNC: Tensor, context_BMC: Tensor) -> Tensor:
        """(B, N, C) attends to (B, M, C)."""
        key, value = self.key_value(context_BMC).chunk(2, dim=-1)
        split = (len(query_BNC), -1, self.num_heads, query_BNC.shape[-1] // self.num_heads)
        heads = (part.reshape(split).transpose(1, 2) for part in (self.query(query_BNC), key, value))
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class DenoisingLayer(nn.Module):
    """Self-attention among patches, cross-attention to the prompts, MLP; all pre-norm."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(embed_dim)
        self.self_attention = Attention(embed_dim, num_heads)
        self.norm_cross = nn.LayerNorm(embed_dim)
        self.cross_attention = Attention(embed_dim, num_heads)
        self.norm_mlp = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, round(embed_dim * mlp_ratio))

    def forward(self, patch_BNC: Tensor, text_BLC: Tensor) -> Tensor:
        """Patches (B, N, C) under prompts (B, L, C)."""
        normed = self.norm_self(patch_BNC)
        patch_BNC = patch_BNC + self.self_attention(normed, normed)
        patch_BNC = patch_BNC + self.cross_attention(self.norm_cross(patch_BNC), text_BLC)
        return patch_BNC + self.mlp(self.norm_mlp(patch_BNC))


class DenoisingTransformer(nn.Module):
    """A few layers over patch features, run once for all prompts together."""

    def __init__(self, embed_dim: int, text_dim: int, depth: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.text_projection = nn.Linear(text_dim, embed_dim)
        self.layers = nn.ModuleList(DenoisingLayer(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, patch_BNC: Tensor, text_LT: Tensor) -> Tensor:
        """Refined patch features (B, N, C) from patches (B, N, C) and prompt features (L, T)."""
        text_BLC = self.text_projection(text_LT).expand(len(patch_BNC), -1, -1)
        for layer in self.layers:
            patch_BNC = layer(patch_BNC, text_BLC)
        return self.norm(patch_BNC)
