"""The encoder depends on what it should depend on, at any grid, with and without anatomy."""

from __future__ import annotations

import math

import pytest
import torch

from vlm3d.config import VisionConfig, load_config
from vlm3d.model.anatomical_encoder import region_shares
from vlm3d.model.patch_embedding import PatchEmbedding, extract_patches, spread_bands
from vlm3d.model.vision_encoder import ThreeDVisionEncoder

CONFIG = VisionConfig(
    embed_dim=32,
    depth=2,
    num_heads=2,
    region_dim=16,
    region_every=1,
    position_grid=(3, 4, 4),
    max_slice_distance=4,
)


@pytest.fixture
def encoder() -> ThreeDVisionEncoder:
    torch.manual_seed(0)
    return ThreeDVisionEncoder(CONFIG).eval()


@pytest.mark.parametrize("shape", [(4, 16, 16), (8, 32, 48), (13, 50, 33), (40, 16, 16)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_any_grid_with_and_without_a_mask(
    encoder: ThreeDVisionEncoder, shape: tuple[int, int, int], with_mask: bool
) -> None:
    volume = torch.randn(2, 1, *shape)
    mask = torch.randint(0, 21, (2, *shape)) if with_mask else None
    features = encoder(volume, mask)
    patches = math.prod(math.ceil(n / p) for n, p in zip(shape, (4, 16, 16), strict=True))
    assert features.global_BC.shape == (2, 32)
    assert features.patch_BNC.shape == (2, patches, 32)
    assert features.region_BRC.shape == (2, 20, 32)
    assert all(t.isfinite().all() for t in (features.global_BC, features.patch_BNC, features.region_BRC))


def test_every_output_depends_on_the_image(encoder: ThreeDVisionEncoder) -> None:
    mask = torch.randint(0, 21, (1, 8, 32, 32))
    one, two = (encoder(torch.randn(1, 1, 8, 32, 32), mask) for _ in range(2))
    for name in ("global_BC", "patch_BNC", "region_BRC"):
        assert not torch.allclose(getattr(one, name), getattr(two, name), atol=1e-4), name


def test_region_features_depend_on_the_mask(encoder: ThreeDVisionEncoder) -> None:
    volume = torch.randn(1, 1, 8, 32, 32)
    mask = torch.zeros(1, 8, 32, 32, dtype=torch.uint8)
    mask[:, :, :16] = 7
    other = mask.flip(2)
    one, two = encoder(volume, mask), encoder(volume, other)
    assert not torch.allclose(one.region_BRC[:, 6], two.region_BRC[:, 6], atol=1e-4)
    assert one.region_present_BR[0, 6]
    assert not one.region_present_BR[0, 0]


def test_a_mask_may_have_a_channel_axis(encoder: ThreeDVisionEncoder) -> None:
    volume, mask = torch.randn(1, 1, 4, 16, 16), torch.randint(0, 21, (1, 4, 16, 16))
    assert torch.equal(encoder(volume, mask).global_BC, encoder(volume, mask[:, None]).global_BC)


@pytest.mark.parametrize("shape", [(1, 4, 16, 17), (2, 4, 16, 16)])
def test_a_mask_on_another_grid_is_refused(encoder: ThreeDVisionEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        encoder(torch.randn(1, 1, 4, 16, 16), torch.zeros(shape, dtype=torch.uint8))


def test_unknown_region_ids_are_refused(encoder: ThreeDVisionEncoder) -> None:
    with pytest.raises(ValueError, match="0 and 20"):
        encoder(torch.randn(1, 1, 4, 16, 16), torch.full((1, 4, 16, 16), 21))


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = ThreeDVisionEncoder(CONFIG)
    saving = ThreeDVisionEncoder(CONFIG.model_copy(update={"gradient_checkpointing": True}))
    saving.load_state_dict(plain.state_dict())
    volume, mask = torch.randn(1, 1, 8, 32, 32), torch.randint(0, 21, (1, 8, 32, 32))
    for encoder in (plain, saving):
        encoder(volume, mask).region_BRC.square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_shares_are_shares() -> None:
    mask = torch.zeros(1, 4, 16, 32, dtype=torch.uint8)
    mask[:, :2, :, :16] = 3
    shares = region_shares(mask, (4, 16, 16), 20)
    assert shares.shape == (1, 2, 21)
    assert torch.allclose(shares.sum(-1), torch.ones(1, 2))
    assert shares[0, 0, 3] == 0.5
    assert shares[0, 1, 3] == 0.0


def test_patches_are_cut_along_the_named_axes() -> None:
    """Each patch holds its own block: z slowest, then y, then x."""
    volume = torch.arange(8 * 32 * 32, dtype=torch.float32).reshape(1, 1, 8, 32, 32)
    patches = extract_patches(volume, (4, 16, 16))
    assert torch.equal(patches[0, 0].reshape(4, 16, 16), volume[0, 0, :4, :16, :16])
    assert torch.equal(patches[0, 1].reshape(4, 16, 16), volume[0, 0, :4, :16, 16:])
    assert torch.equal(patches[0, 4].reshape(4, 16, 16), volume[0, 0, 4:, :16, :16])


def test_positions_cost_three_tables_and_fit_any_grid() -> None:
    embedding = PatchEmbedding(1, 8, (4, 16, 16), (5, 3, 2))
    assert sum(table.numel() for table in embedding.positions) == (5 + 3 + 2) * 8
    at_home = embedding.position_ZYXC((5, 3, 2))
    assert torch.allclose(at_home[4, 2, 1], sum(table[-1] for table in embedding.positions))
    assert embedding.position_ZYXC((7, 9, 1)).shape == (7, 9, 1, 8)


def test_the_large_encoder_has_88_million_parameters() -> None:
    with torch.device("meta"):
        encoder = ThreeDVisionEncoder(load_config("large").model.vision)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert abs(count / 88e6 - 1) < 0.03


def test_a_convolutional_stem_gives_the_same_grid_and_trains() -> None:
    config = VisionConfig(
        embed_dim=32, depth=1, num_heads=2, region_dim=16, stem_channels=(4, 8, 16), position_grid=(4, 3, 3)
    )
    torch.manual_seed(0)
    encoder = ThreeDVisionEncoder(config)
    volume = torch.randn(2, 1, 10, 40, 33).clamp(-1, 1)
    features = encoder(volume)
    assert features.grid == (3, 3, 3)
    assert features.patch_BNC.shape == (2, 27, 32)
    features.patch_BNC.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.patch_embedding.parameters())


def test_features_within_boxes_are_those_of_their_patches() -> None:
    encoder = ThreeDVisionEncoder(
        VisionConfig(embed_dim=32, depth=1, num_heads=2, region_dim=16, position_grid=(4, 3, 3))
    )
    features = encoder(torch.randn(2, 1, 16, 48, 64).clamp(-1, 1))
    boxes = [((0, 2), (1, 3), (0, 1)), ((2, 4), (0, 2), (3, 4))]
    cut = features.within(boxes)
    assert cut.grid == (2, 2, 1)
    whole = features.patch_BNC.unflatten(1, features.grid)
    for index, (z, y, x) in enumerate(boxes):
        expected = whole[index, z[0] : z[1], y[0] : y[1], x[0] : x[1]].flatten(0, 2)
        torch.testing.assert_close(cut.patch_BNC[index], expected)


def test_bands_spread_a_range_over_the_whole_scale() -> None:
    volume = torch.tensor([-1.0, -0.95, -0.865, -0.5, 0.0, 1.0]).view(1, 1, 1, 1, 6)
    spread = spread_bands(volume, [(-1.0, -0.5)])
    assert spread.shape == (1, 2, 1, 1, 6)
    torch.testing.assert_close(spread[:, :1], volume)
    torch.testing.assert_close(spread[0, 1, 0, 0], torch.tensor([-1.0, -0.8, -0.46, 1.0, 1.0, 1.0]))
    assert spread_bands(volume, ()) is volume


def test_a_cut_out_with_its_place_has_the_positions_of_the_whole() -> None:
    embedding = PatchEmbedding(1, 8, (4, 16, 16), (4, 3, 3))
    volume = torch.randn(1, 1, 24, 64, 80)
    whole, grid = embedding(volume)
    cut = volume[:, :, 8:20, 16:48, 32:80]
    place = (((2, 5), (1, 3), (2, 5)), grid)
    tokens, cut_grid = embedding(cut, [place])
    expected = whole.unflatten(1, grid)[:, 2:5, 1:3, 2:5].flatten(1, 3)
    assert cut_grid == (3, 2, 3)
    torch.testing.assert_close(tokens, expected)
