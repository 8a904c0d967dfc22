"""From image features to a language model's tokens: learned queries that read the scan.

Shapes: B scans, Q queries, R regions, N patches, C width of the image features, E inner width, M width of the
language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

TOKEN_TYPES = ("global", "region", "patch")


class EmbeddingScale(nn.Module):
    """Give each vector the root mean square of the language model's word embeddings.

    A vector far longer or shorter than a word drowns the words beside it, or is drowned by them.

    Args:
        rms: Root mean square to start from; 0 means not yet known, see `set_rms`.
    """

    def __init__(self, rms: float) -> None:
        super().__init__()
        self.register_buffer("rms", torch.tensor(float(rms)))
        self.rms: Tensor

    @property
    def known(self) -> bool:
        """Whether the language model's scale was measured, or came with a checkpoint."""
        return bool(self.rms > 0)

    def set_rms(self, rms: float) -> None:
        """Set the scale, measured by `LanguageModel.embedding_rms`."""
        self.rms.fill_(rms)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scale the last axis."""
        return functional.rms_norm(tokens, tokens.shape[-1:]) * self.rms


class ProjectorLayer(nn.Module):
    """One layer: the queries attend to the image tokens and to one another, then pass an MLP.

    Args:
        dim: Inner width.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.to_output = nn.Linear(dim, dim)
        for projection in (self.to_query, self.to_key_value):  # logits of spread 1 choose among many patches
            nn.init.normal_(projection.weight, std=dim**-0.5)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, round(dim * mlp_ratio)),
            nn.GELU(),
            nn.Linear(round(dim * mlp_ratio), dim),
        )

    def forward(self, queries_BQE: Tensor, context_BTE: Tensor, keep_B11T: Tensor | None = None) -> Tensor:
        """Update the queries.

        Args:
            queries_BQE: The queries.
            context_BTE: The image tokens, normalized.
            keep_B11T: False for image tokens and queries (T, then Q) that must not be read.
        """
        normed = self.query_norm(queries_BQE)
        query = self._heads(self.to_query(normed))
        key, value = self.to_key_value(torch.cat([context_BTE, normed], dim=1)).chunk(2, dim=-1)
        attended = functional.scaled_dot_product_attention(
            query, self._heads(key), self._heads(value), attn_mask=keep_B11T
        )
        queries_BQE = queries_BQE + self.to_output(attended.transpose(1, 2).flatten(2))
        return queries_BQE + self.mlp(queries_BQE)

    def _heads(self, tokens_BTE: Tensor) -> Tensor:
        return tokens_BTE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class VisionToLLMProjector(nn.Module):
    """Condense a scan's global, region and patch features into a few tokens of the language model.

    Args:
        vision_dim: Width of the image features.
        llm_dim: Width of the language model.
        num_queries: Tokens that the language model receives.
        depth: Layers.
        num_heads: Attention heads; must divide ``inner_dim``.
        inner_dim: Width inside; None takes ``vision_dim``.
        output_rms: Scale of the output, see `EmbeddingScale`.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        num_queries: int = 32,
        depth: int = 4,
        num_heads: int = 8,
        inner_dim: int | None = None,
        output_rms: float = 0.02,
    ) -> None:
        super().__init__()
        inner_dim = inner_dim or vision_dim
        if inner_dim % num_heads:
            raise ValueError(f"inner_dim {inner_dim} is not a multiple of num_heads {num_heads}")
        self.queries = nn.Parameter(torch.empty(num_queries, inner_dim))
        self.token_types = nn.Parameter(torch.empty(len(TOKEN_TYPES), inner_dim))
        self.input_norm = nn.LayerNorm(vision_dim)
        self.input_projection = nn.Linear(vision_dim, inner_dim)
        self.context_norm = nn.LayerNorm(inner_dim)
        self.layers = nn.ModuleList(ProjectorLayer(inner_dim, num_heads) for _ in range(depth))
        self.output_norm = nn.LayerNorm(inner_dim)
        self.output_projection = nn.Linear(inner_dim, llm_dim)
        self.output_scale = EmbeddingScale(output_rms)
        nn.init.normal_(self.queries, std=1.0)
        nn.init.normal_(self.token_types, std=0.02)

    def forward(
        self,
        global_BC: Tensor,
        region_BRC: Tensor | None,
        patch_BNC: Tensor,
        region_present_BR: Tensor | None = None,
    ) -> Tensor:
        """Make the visual tokens.

        Args:
            global_BC: One vector a scan.
            region_BRC: One vector a region, or None.
            patch_BNC: One vector a patch.
            region_present_BR: False for regions that the scan lacks; they are not read.

        Returns:
            (B, Q, M) tokens of the language model's scale.
        """
        kinds = [global_BC[:, None], region_BRC, patch_BNC]
        context = torch.cat(
            [
                self.input_projection(self.input_norm(tokens)) + self.token_types[index]
                for index, tokens in enumerate(kinds)
                if tokens is not None
            ],
            dim=1,
        )
        context = self.context_norm(context)
        queries = self.queries + context[:, :1]  # from the first step on, every token depends on the scan
        keep = None
        if region_BRC is not None and region_present_BR is not None:
            keep = torch.ones(
                len(global_BC), context.shape[1] + queries.shape[1], dtype=torch.bool, device=context.device
            )
            keep[:, 1 : 1 + region_BRC.shape[1]] = region_present_BR.bool()
            keep = keep[:, None, None]
        for layer in self.layers:
            queries = layer(queries, context, keep)
        output: Tensor = self.output_scale(self.output_projection(self.output_norm(queries)))
        return output
