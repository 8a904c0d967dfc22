"""One block of the encoder: slice-aware attention, in some blocks region-aware attention, and an MLP."""

from __future__ import annotations

from torch import Tensor, nn

from vlm3d.model.attention import RegionAwareAttention, SliceAwareAttention
from vlm3d.model.patch_embedding import Grid


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(embed_dim, hidden_dim)
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        return self.contract(self.activation(self.expand(tokens)))


class TransformerBlock(nn.Module):
    """Pre-norm block on [global, patches]; exchanges with anatomical regions where ``region_dim`` is given."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        max_slice_distance: int,
        region_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(embed_dim)
        self.attention = SliceAwareAttention(embed_dim, num_heads, max_slice_distance)
        self.region_attention = None if region_dim is None else RegionAwareAttention(embed_dim, region_dim)
        self.norm_mlp = nn.LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, round(embed_dim * mlp_ratio))

    def forward(
        self, tokens_BNC: Tensor, region_BRC: Tensor, share_BNR: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, C), global first, and region tokens (B, R + 1, C); shares have a row for the global token."""
        tokens_BNC = tokens_BNC + self.attention(self.norm_attention(tokens_BNC), grid)
        if self.region_attention is not None:
            tokens_BNC, region_BRC = self.region_attention(tokens_BNC, region_BRC, share_BNR)
        return tokens_BNC + self.mlp(self.norm_mlp(tokens_BNC)), region_BRC
