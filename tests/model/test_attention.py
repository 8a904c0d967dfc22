"""Slice-aware and region-aware attention against their formulas, written out with all their matrices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm3d.model.attention import RegionAwareAttention, SliceAwareAttention


def literal_slice_attention(layer: SliceAwareAttention, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """softmax(q k / sqrt(d) + b_h(|z_i - z_j|)) v, with the N x N bias in full."""
    batch, count, width = tokens.shape
    heads, dim = layer.num_heads, width // layer.num_heads
    query, key, value = layer.qkv(tokens).view(batch, count, 3, heads, dim).permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-1, -2) / math.sqrt(dim)
    prefix = count - math.prod(grid)
    z = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
    for i in range(len(z)):
        for j in range(len(z)):
            distance = min(abs(int(z[i]) - int(z[j])), layer.slice_bias.shape[1] - 1)
            logits[:, :, prefix + i, prefix + j] += layer.slice_bias[:, distance]
    return layer.out((logits.softmax(-1) @ value).transpose(1, 2).reshape(batch, count, width))


@pytest.mark.parametrize("grid", [(1, 2, 3), (4, 2, 2), (9, 2, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_slice_attention_equals_the_literal_formula(grid: tuple[int, int, int], prefix: int) -> None:
    torch.manual_seed(0)
    layer = SliceAwareAttention(24, 3, max_slice_distance=6)
    torch.nn.init.normal_(layer.slice_bias, std=2.0)
    tokens = torch.randn(2, prefix + math.prod(grid), 24)
    assert torch.allclose(layer(tokens, grid), literal_slice_attention(layer, tokens, grid), atol=1e-5)


def test_fused_kernels_get_a_head_width_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, widths = SliceAwareAttention(24, 3), set()
    plain = F.scaled_dot_product_attention

    def attention(*parts: torch.Tensor, **options: float) -> torch.Tensor:
        widths.update(part.shape[-1] for part in parts)
        return plain(*parts, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for slices in range(1, 20):
        layer(torch.randn(1, slices, 24), (slices, 1, 1))
    assert len(widths) == 3
    assert all(width % 8 == 0 for width in widths)


def test_slice_attention_gradients_equal_the_literal_formulas() -> None:
    torch.manual_seed(1)
    layer = SliceAwareAttention(16, 2, max_slice_distance=4)
    torch.nn.init.normal_(layer.slice_bias)
    tokens = torch.randn(1, 1 + 12, 16)
    gradients = []
    for forward in (layer, lambda x, grid: literal_slice_attention(layer, x, grid)):
        layer.zero_grad()
        forward(tokens, (3, 2, 2)).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for fast, literal in zip(*gradients, strict=True):
        assert torch.allclose(fast, literal, atol=1e-4)


def test_a_far_slice_can_be_switched_off() -> None:
    """With a bias of minus a lot on every other slice, patches mix within their own slice only."""
    layer = SliceAwareAttention(8, 1, max_slice_distance=8)
    torch.nn.init.constant_(layer.slice_bias, -1e4)
    layer.slice_bias.data[:, 0] = 0.0
    tokens = torch.randn(1, 3 * 4, 8)
    before = layer(tokens, (3, 2, 2))
    tokens[:, 8:] += 5.0
    after = layer(tokens, (3, 2, 2))
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-5)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-2)


def literal_weights(query: Tensor, key: Tensor, share: Tensor) -> Tensor:
    """share x exp(q . k / sqrt(d)), normalized."""
    weight = share * torch.exp(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]))
    return weight / weight.sum(-1, keepdim=True)


def test_region_attention_weighs_by_share() -> None:
    torch.manual_seed(0)
    layer = RegionAwareAttention(16, 8, head_dim=8)
    patches, regions = torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    share = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.25, 0.25, 0.5], [0, 0, 1]]])
    moved, updated = layer(patches, regions, share)

    normed = layer.norm_patch(patches)
    key, value = layer.gather_key_value(normed).chunk(2, -1)
    query = layer.gather_query(layer.norm_region(regions))
    gathered = regions + layer.gather_out(literal_weights(query, key, share.transpose(1, 2)) @ value)
    assert torch.allclose(updated, gathered, atol=1e-5)
    key, value = layer.scatter_key_value(layer.norm_gathered(gathered)).chunk(2, -1)
    scattered = literal_weights(layer.scatter_query(normed), key, share) @ value
    assert torch.allclose(moved, patches + layer.scatter_out(scattered), atol=1e-5)


def test_a_patch_of_one_region_attends_to_that_region_only() -> None:
    """A one-hot share must not become uniform attention."""
    torch.manual_seed(0)
    layer = RegionAwareAttention(16, 8)
    patches, regions = torch.randn(1, 2, 16), torch.randn(1, 3, 16)
    share = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    before, _ = layer(patches, regions, share)
    other = regions.clone()
    other[:, [0, 2]] += 3.0
    after, _ = layer(patches, other, share)
    assert torch.equal(before, after)


def test_region_pooling_is_a_mean() -> None:
    """A region that covers the same patches twice over gathers the same feature."""
    torch.manual_seed(0)
    layer = RegionAwareAttention(16, 8)
    patches, regions = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    share = torch.tensor([[[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2])
    _, once = layer(patches, regions, share)
    _, twice = layer(patches.repeat(1, 2, 1), regions, share.repeat(1, 2, 1))
    assert torch.allclose(once, twice, atol=1e-5)


def test_an_absent_region_gathers_nothing_and_gives_no_nan() -> None:
    layer = RegionAwareAttention(16, 8)
    patches, regions = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    share = torch.zeros(1, 4, 3)
    share[..., 0] = 1.0
    moved, updated = layer(patches, regions, share)
    assert moved.isfinite().all()
    assert torch.equal(updated[:, 1:], regions[:, 1:])
