"""Histograms of patches: every voxel counted once, in its patch, range and group of regions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm3d.config import VisionConfig
from vlm3d.model.patch_histogram import CONTRAST_EDGES, EDGES, PatchHistogram
from vlm3d.model.vision_encoder import ThreeDVisionEncoder

PATCH = (2, 4, 4)
GROUPS = ((1, 2), (3,))
BINS = len(EDGES) + 1
CONTRASTS = len(CONTRAST_EDGES) + 1


def _scan(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    # Between two borders of the table's steps, so that rounding decides nothing.
    values = rng.integers(-999, 1000, (2, 1, 6, 8, 12)) / 1000.0
    return torch.from_numpy(values).float(), torch.from_numpy(
        rng.integers(0, 6, (2, 6, 8, 12)).astype(np.uint8)
    )


@pytest.mark.parametrize("seed", range(3))
def test_intensities_are_counted_as_numpy_counts_them(seed: int) -> None:
    volume, mask = _scan(seed)
    shares = PatchHistogram(8, PATCH, GROUPS).shares(volume, mask)
    counted = shares[..., : 3 * BINS].unflatten(-1, (3, BINS)).unflatten(1, (3, 2, 3))
    for batch, z, y, x in np.ndindex(2, 3, 2, 3):
        cut = (slice(z * 2, z * 2 + 2), slice(y * 4, y * 4 + 4), slice(x * 4, x * 4 + 4))
        inside, ids = volume[batch, 0][cut].numpy(), mask[batch][cut].numpy()
        for group, member in enumerate((np.isin(ids, (1, 2)), ids == 3, np.isin(ids, (0, 4, 5)))):
            values = inside[member].astype(np.float64)
            expected = np.histogram(values, bins=[-np.inf, *(edge + 1e-5 for edge in EDGES), np.inf])[0] / 32
            np.testing.assert_allclose(counted[batch, z, y, x, group].numpy(), expected, atol=1e-6)


def test_each_quantity_sums_to_one_a_patch() -> None:
    shares = PatchHistogram(8, PATCH, GROUPS).shares(*_scan(0))
    sizes = (3 * BINS, 3 * BINS, 3 * CONTRASTS)
    for part in shares.split(sizes, dim=-1):
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:2]))


def test_without_a_mask_all_voxels_fall_into_the_last_group() -> None:
    shares = PatchHistogram(8, PATCH, GROUPS).shares(_scan(0)[0], None)
    first = shares[..., : 3 * BINS].unflatten(-1, (3, BINS))
    assert (first[..., :2, :] == 0).all()
    torch.testing.assert_close(first[..., 2, :].sum(-1), torch.ones(first.shape[:2]))


def test_an_even_volume_has_no_contrast_even_at_its_border() -> None:
    volume = torch.full((1, 1, 4, 8, 8), -0.85)
    shares = PatchHistogram(8, PATCH, GROUPS).shares(volume, None)
    contrast = shares[..., -3 * CONTRASTS :].unflatten(-1, (3, CONTRASTS))[..., 2, :]
    assert (contrast[..., CONTRASTS // 2] == 1).all()


def test_a_patch_tells_emphysema_from_lung_before_any_training() -> None:
    """With ids of the lungs, dark holes in a patch change its token and no other patch's."""
    config = VisionConfig(
        embed_dim=32, depth=1, num_heads=2, region_dim=16, position_grid=(4, 3, 3), region_groups=((1,),)
    )
    torch.manual_seed(0)
    encoder = ThreeDVisionEncoder(config)
    volume, mask = torch.full((1, 1, 8, 32, 32), -0.86), torch.ones(1, 8, 32, 32, dtype=torch.uint8)
    holes = volume.clone()
    holes[:, :, :2, :6, :6] = -0.97
    embedding = encoder.patch_embedding
    assert embedding.histogram is not None
    gap = (embedding.histogram(holes, mask) - embedding.histogram(volume, mask)).norm(dim=-1)[0]
    assert gap[0] > 0.1
    assert (gap[1:] == 0).all()


def test_scans_of_any_size_and_cut_outs_pass_with_and_without_a_mask() -> None:
    config = VisionConfig(
        embed_dim=32, depth=1, num_heads=2, region_dim=16, position_grid=(4, 3, 3), region_groups=GROUPS
    )
    encoder = ThreeDVisionEncoder(config)
    volume, mask = (
        torch.rand(2, 1, 10, 40, 33) * 2 - 1,
        torch.randint(0, 6, (2, 10, 40, 33), dtype=torch.uint8),
    )
    assert encoder(volume, mask).patch_BNC.shape == encoder(volume).patch_BNC.shape == (2, 27, 32)


def test_groups_hold_only_ids_that_exist() -> None:
    with pytest.raises(ValueError, match="region_groups"):
        VisionConfig(region_groups=((1, 21),))
