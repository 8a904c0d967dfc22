"""The localizer draws at the input's resolution, from one pass for all prompts."""

from __future__ import annotations

import pytest
import torch

from vlm3d.config import LocalizerConfig, load_config
from vlm3d.model.attention_unet import CollectedNorm, scale_channels
from vlm3d.model.localization_module import LesionLocalizationModule
from vlm3d.model.patch_embedding import scale_strides

CONFIG = LocalizerConfig(
    base_channels=8,
    bottleneck_channels=16,
    denoiser_depth=1,
    denoiser_heads=2,
    text_dim=16,
    num_lesion_diseases=5,
)


def build(lesions: int = 5) -> LesionLocalizationModule:
    torch.manual_seed(0)
    module = LesionLocalizationModule(CONFIG.model_copy(update={"num_lesion_diseases": lesions}), 32, 24)
    torch.nn.init.normal_(module.text_embedder.prompt_embedding)
    return module


@pytest.mark.parametrize("shape", [(4, 16, 16), (8, 32, 32), (11, 40, 23)])
def test_masks_have_the_inputs_resolution_on_any_grid(shape: tuple[int, int, int]) -> None:
    grid = tuple(-(-n // p) for n, p in zip(shape, (4, 16, 16), strict=True))
    patches = torch.randn(1, grid[0] * grid[1] * grid[2], 32)
    output = build()(torch.randn(1, 1, *shape), patches, grid)
    assert output.mask_logits_BLDHW.shape == (1, 5, *shape)
    assert len(output.coarser_logits) == 2


def test_masks_depend_on_image_patches_and_text() -> None:
    module = build().eval()
    volume, patches = torch.randn(1, 1, 8, 32, 32), torch.randn(1, 8, 32)
    base = module(volume, patches, (2, 2, 2)).mask_logits_BLDHW
    assert not torch.allclose(base, module(volume.flip(-1), patches, (2, 2, 2)).mask_logits_BLDHW, atol=1e-4)
    assert not torch.allclose(base, module(volume, -patches, (2, 2, 2)).mask_logits_BLDHW, atol=1e-4)
    module.text_embedder.prompt_embedding[2] *= -1
    changed = module(volume, patches, (2, 2, 2)).mask_logits_BLDHW
    assert not torch.allclose(base[:, 2], changed[:, 2], atol=1e-4)


def test_masks_depend_on_each_voxels_region_and_no_anatomy_is_background() -> None:
    module = build().eval()
    volume, patches = torch.randn(1, 1, 7, 30, 32), torch.randn(1, 8, 32)  # one voxel short of whole patches
    regions = torch.zeros(1, 7, 30, 32, dtype=torch.uint8)
    blind = module(volume, patches, (2, 2, 2)).mask_logits_BLDHW
    assert torch.equal(module(volume, patches, (2, 2, 2), regions).mask_logits_BLDHW, blind)
    regions[:, 3, 10, 10] = 7
    change = (module(volume, patches, (2, 2, 2), regions).mask_logits_BLDHW - blind).abs().amax(dim=1)[0]
    assert change[3, 10, 10] > 5 * change[:, 25:, 25:].mean() > 0


def test_a_localizer_can_leave_the_regions_out() -> None:
    config = CONFIG.model_copy(update={"region_channels": 0})
    module = LesionLocalizationModule(config, 32, 24).eval()
    volume, patches = torch.randn(1, 1, 4, 16, 16), torch.randn(1, 1, 32)
    regions = torch.full((1, 4, 16, 16), 3, dtype=torch.uint8)
    assert torch.equal(
        module(volume, patches, (1, 1, 1), regions).mask_logits_BLDHW,
        module(volume, patches, (1, 1, 1)).mask_logits_BLDHW,
    )


def test_a_single_voxel_can_be_told_apart() -> None:
    """A nodule smaller than a patch changes the mask where it lies more than far away."""
    module = build().eval()
    volume, patches = torch.zeros(1, 1, 8, 64, 64), torch.zeros(1, 32, 32)
    before = module(volume, patches, (2, 4, 4)).mask_logits_BLDHW
    volume[..., 4, 20, 20] = 1.0
    change = (module(volume, patches, (2, 4, 4)).mask_logits_BLDHW - before).abs().amax(dim=1)[0]
    assert change[4, 20, 20] > 5 * change[:, 40:, 40:].mean()


def test_more_prompts_add_parameters_nowhere() -> None:
    count = [sum(p.numel() for p in build(lesions).parameters()) for lesions in (5, 18)]
    assert count[0] == count[1]
    assert (
        build(18)(torch.randn(1, 1, 4, 16, 16), torch.randn(1, 1, 32), (1, 1, 1)).mask_logits_BLDHW.shape[1]
        == 18
    )


def test_a_batch_of_one_trains() -> None:
    module = build().train()
    output = module(torch.randn(1, 1, 4, 16, 16), torch.randn(1, 1, 32), (1, 1, 1))
    output.mask_logits_BLDHW.sum().backward()
    assert module.unet.stem.conv.weight.grad.abs().sum() > 0


def test_strides_multiply_to_the_patch() -> None:
    assert scale_strides((4, 16, 16)) == [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]
    for patch in ((4, 8, 8), (8, 8, 8), (2, 16, 8)):
        steps = scale_strides(patch)
        assert tuple(torch.tensor(steps).prod(dim=0).tolist()) == patch
    with pytest.raises(ValueError, match="powers of two"):
        scale_strides((3, 16, 16))
    assert scale_channels(64, 448, 5) == [16, 32, 64, 128, 448]


def test_the_large_localizer_has_45_million_parameters() -> None:
    config = load_config("large").model
    with torch.device("meta"):
        module = LesionLocalizationModule(config.localizer, config.vision.embed_dim, 768)
    count = sum(parameter.numel() for parameter in module.parameters())
    assert abs(count / 45e6 - 1) < 0.10


def test_statistics_are_collected_over_several_scans_and_stand_still_on_one() -> None:
    norm = CollectedNorm(3).train()
    several, one = torch.randn(4, 3, 2, 2, 2) * 3 + 5, torch.randn(1, 3, 2, 2, 2)
    peer = torch.nn.BatchNorm3d(3, momentum=0.05).train()
    torch.testing.assert_close(norm(several), peer(several))
    assert norm.running_mean is not None
    collected = norm.running_mean.clone()
    assert collected.abs().min() > 0
    trained = norm(one)
    assert torch.equal(norm.running_mean, collected)
    assert torch.equal(trained, norm.eval()(one))
    assert "num_batches_tracked" not in norm.state_dict()


def test_a_voxel_is_drawn_alike_whatever_lies_far_from_it() -> None:
    """As no norm over a scan's own space would."""
    module = build().eval()
    near = torch.randn(1, 1, 8, 32, 32)
    long = torch.cat([near, torch.full((1, 1, 8, 32, 160), -1.0)], dim=-1)
    far = long.clone()
    far[..., 160:] = 1.0
    patches = torch.zeros(1, 2 * 2 * 12, 32)
    first, second = (module(volume, patches, (2, 2, 12)).mask_logits_BLDHW for volume in (long, far))
    torch.testing.assert_close(first[..., :32], second[..., :32])
    assert not torch.allclose(first[..., -32:], second[..., -32:], atol=1e-2)


def test_spots_are_seen_where_shells_are_given() -> None:
    module = LesionLocalizationModule(CONFIG, 32, 24, peak_shells=[(1, 2, 2), (2, 4, 4)])
    plain = LesionLocalizationModule(CONFIG, 32, 24)
    assert (
        module.unet.stem.conv.in_channels == plain.unet.stem.conv.in_channels + 4
    )  # a spot and a hole at each shell
    volume = torch.randn(2, 1, 8, 32, 32)
    assert module(volume, torch.randn(2, 8, 32), (2, 2, 2)).mask_logits_BLDHW.shape == (2, 5, 8, 32, 32)
