"""What stands out of a patch, beside a walk over its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vlm3d.config import VisionConfig
from vlm3d.model.patch_histogram import PatchHistogram
from vlm3d.model.patch_peaks import NEAR, SHAPES, box_mean, patch_peaks, spots_and_holes, standing_out

SHELL = (1, 2, 3)


def _walk(volume: torch.Tensor) -> torch.Tensor:
    """The definition of `standing_out` of one scan, voxel by voxel."""
    shape = volume.shape
    pairs = []
    for d in itertools.product((-1, 0, 1), repeat=3):
        if d > (0, 0, 0):
            length = math.sqrt(sum(v * v for v in d))
            pairs.append([round(reach * v / length) for reach, v in zip(SHELL, d, strict=True)])
    found = torch.zeros(3, *shape)

    def at(*place: int) -> float:
        inside = [min(max(p, 0), n - 1) for p, n in zip(place, shape, strict=True)]
        return float(volume[tuple(inside)])

    for z, y, x in itertools.product(*(range(n) for n in shape)):
        own = at(z, y, x)
        around = [(at(z + dz, y + dy, x + dx), at(z - dz, y - dy, x - dx)) for dz, dy, dx in pairs]
        everyone = [value for pair in around for value in pair]
        found[0, z, y, x] = max(0.0, own - max(everyone))
        found[1, z, y, x] = max(0.0, min(everyone) - own)
        found[2, z, y, x] = sum(max(0.0, own - max(pair)) for pair in around) / len(around)
    return found


def test_equals_a_walk_over_the_definition() -> None:
    volume = torch.rand(1, 4, 6, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(standing_out(volume, SHELL)[0], _walk(volume[0]), atol=2e-3)  # whole HU


def _on_a_tube(shape: str) -> torch.Tensor:
    """A bright ball, line or sheet in dark lung."""
    z, y, x = torch.meshgrid(*(torch.arange(13) - 6 for _ in range(3)), indexing="ij")
    distance = {"ball": z**2 + y**2 + x**2, "line": y**2 + x**2, "sheet": x**2}[shape]
    return torch.where(distance < 4, 0.0, -0.8)[None]


def test_a_ball_is_a_spot_and_a_vessel_is_not() -> None:
    spot = {
        shape: standing_out(_on_a_tube(shape), (4, 4, 4))[0, 0].max() for shape in ("ball", "line", "sheet")
    }
    assert spot["ball"] == pytest.approx(0.8)
    assert spot["line"] == spot["sheet"] == 0


def test_ridges_rank_ball_line_and_sheet_by_how_many_pairs_they_outshine() -> None:
    ridge = {
        shape: standing_out(_on_a_tube(shape), (4, 4, 4))[0, 2].max() for shape in ("ball", "line", "sheet")
    }
    assert ridge["ball"] > ridge["line"] > ridge["sheet"] > 0


def test_a_hole_is_a_spot_of_the_negative() -> None:
    volume = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(1)) - 0.5
    shapes, negative = standing_out(volume, SHELL), standing_out(-volume, SHELL)
    assert torch.allclose(shapes[:, 0], negative[:, 1], atol=1e-3)


def test_peaks_are_the_largest_of_each_cell_and_zero_where_there_is_none() -> None:
    shapes = torch.tensor([[[[[0.1, 0.4, 0.2]]]], [[[[0.3, 0.0, 0.5]]]]])
    cell = torch.tensor([[[[0, 0, 2]]], [[[1, 1, 1]]]])
    assert torch.equal(patch_peaks(shapes, cell, 3)[:, 0], torch.tensor([[0.4, 0.0, 0.2], [0.0, 0.5, 0.0]]))


def test_a_nodule_is_told_in_the_lung_of_its_own_patch_alone() -> None:
    counted = PatchHistogram(8, (4, 8, 8), [(1,), (2,)], [(2, 3, 3)])
    volume, mask = torch.full((2, 1, 8, 16, 16), -0.8), torch.ones(2, 8, 16, 16, dtype=torch.uint8)
    volume[1, 0, 5:7, 11:14, 3:6] = 0.0
    peaks = counted.peaks(volume, mask).unflatten(2, (len(SHAPES), 3))  # two groups and all else
    assert peaks.shape == (2, 8, 3, 3)
    at = torch.nonzero(peaks[:, :, SHAPES.index("spot")] > 0.1).tolist()
    assert at == [[1, 6, 0]]  # second scan, lower half and back left, the first group


def test_shells_need_groups_and_reach() -> None:
    with pytest.raises(ValueError, match="peak_shells need region_groups"):
        VisionConfig(peak_shells=((2, 2, 2),))
    with pytest.raises(ValueError, match="at least 1 voxel"):
        VisionConfig(region_groups=((1,),), peak_shells=((0, 2, 2),))


def test_channels_are_spots_and_holes_of_the_smoothed_first_channel() -> None:
    volume = torch.rand(2, 2, 4, 6, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shells = [SHELL, (1, 1, 1)]
    found = spots_and_holes(volume, shells)
    assert found.shape == (2, 4, 4, 6, 7)
    near = box_mean(volume[:, :1], NEAR)[:, 0]
    for number, shell in enumerate(shells):
        expected = 2 * standing_out(near, shell)[:, :2]
        torch.testing.assert_close(found[:, 2 * number : 2 * number + 2], expected)
