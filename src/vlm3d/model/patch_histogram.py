"""What share of a patch lies in each range of intensity, region by region: density as a radiologist measures it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm3d.model.patch_peaks import NEAR, SHAPES, Shell, box_mean, patch_peaks, standing_out

EDGES = (
    -0.98,
    -0.95,
    -0.93,
    -0.9,
    -0.87,
    -0.83,
    -0.75,
    -0.6,
    -0.3,
    -0.1,
    -0.03,
    0.02,
    0.06,
    0.12,
    0.2,
    0.3,
    0.45,
    0.65,
    0.9,
)
"""Borders of the ranges, in 1000 HU: air, emphysema, lung, ground glass, fat, fluid, muscle, calcium, metal."""

CONTRAST_EDGES = (-0.3, -0.15, -0.07, -0.03, -0.01, 0.01, 0.03, 0.07, 0.15, 0.3)
"""Borders of the ranges of local contrast, in 1000 HU."""

_STEPS = 1000  # of the table that stands for a search among the borders: 2 HU each over -1..1


class PatchHistogram(nn.Module):
    """Histograms of a patch, one a group of regions, become a part of its token.

    Three quantities are counted: the intensity, its mean over a neighborhood (noise is gone, small vessels are not seen),
    and the difference of a small and a larger mean (edges, vessels, nodules, walls). A share enters by its square root
    (Hellinger), so that few voxels of calcium in a patch speak. Beside the shares stand the peaks: how far that voxel
    stands out which does so most, in each group and at each shell (`vlm3d.model.patch_peaks.standing_out`). Nothing here is
    learned but one linear layer: density and small shapes are known from the first step on.

    Without a mask every voxel is counted in the group of what belongs to no group.

    Args:
        embed_dim: Width of a token.
        patch_size: Voxels a patch.
        region_groups: Region ids, a histogram a group; all other ids share one more.
        peak_shells: Distances at which voxels are compared with what lies around them.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: Sequence[int],
        region_groups: Sequence[Sequence[int]],
        peak_shells: Sequence[Shell] = (),
    ) -> None:
        super().__init__()
        self.peak_shells = tuple(peak_shells)
        self.patch_size = tuple(patch_size)
        self.num_groups = len(region_groups) + 1
        group_of_id = torch.full((256,), len(region_groups), dtype=torch.int32)
        for index, group in enumerate(region_groups):
            group_of_id[list(group)] = index
        self.group_of_id: Tensor
        self.register_buffer("group_of_id", group_of_id, persistent=False)
        centers = (torch.arange(2 * _STEPS + 1) - _STEPS) / _STEPS
        self.bin_of_step: Tensor
        self.contrast_of_step: Tensor
        for name, edges in (("bin_of_step", EDGES), ("contrast_of_step", CONTRAST_EDGES)):
            self.register_buffer(name, torch.bucketize(centers, torch.tensor(edges)).int(), persistent=False)
        bins = 2 * (len(EDGES) + 1) + len(CONTRAST_EDGES) + 1
        features = bins + len(SHAPES) * len(self.peak_shells)
        self.projection = nn.Linear(self.num_groups * features, embed_dim)

    def reset_parameters(self) -> None:
        """Weights large enough that few voxels are heard beside the position."""
        nn.init.normal_(self.projection.weight, std=0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, volume_BCDHW: Tensor, mask_BDHW: Tensor | None) -> Tensor:
        """Parts of tokens (B, N, C) from whole patches of a volume (B, 1, D, H, W) and its region ids (B, D, H, W)."""
        with torch.no_grad():
            volume_BCDHW = volume_BCDHW.float()
            features_BNF = self.shares(volume_BCDHW, mask_BDHW).sqrt()
            if self.peak_shells:
                features_BNF = torch.cat([features_BNF, self.peaks(volume_BCDHW, mask_BDHW)], dim=-1)
        return self.projection(features_BNF.to(self.projection.weight.dtype))

    def shares(self, volume_BCDHW: Tensor, mask_BDHW: Tensor | None) -> Tensor:
        """Shares of each patch's voxels (B, N, quantities * groups * ranges); those of each quantity sum to 1."""
        first = volume_BCDHW[:, :1]
        near = box_mean(first, NEAR)
        wide = box_mean(near, (3, 5, 5))
        group = self._group_of_voxel(first[:, 0], mask_BDHW)
        cell = self._patch_of_voxel(group) * self.num_groups + group
        counted = [
            self._count(quantity[:, 0], table, len(edges) + 1, cell)
            for quantity, table, edges in (
                (first, self.bin_of_step, EDGES),
                (wide, self.bin_of_step, EDGES),
                (near - wide, self.contrast_of_step, CONTRAST_EDGES),
            )
        ]
        return torch.cat(counted, dim=-1) / math.prod(self.patch_size)

    def peaks(self, volume_BCDHW: Tensor, mask_BDHW: Tensor | None) -> Tensor:
        """A patch's strongest spot, hole and ridge at each shell in each group (B, N, shells * shapes * groups)."""
        near_BDHW = box_mean(volume_BCDHW[:, :1], NEAR)[:, 0]
        group_BDHW = self._group_of_voxel(near_BDHW, mask_BDHW)
        cells = near_BDHW[0].numel() // math.prod(self.patch_size) * self.num_groups
        cell_BDHW = (self._patch_of_voxel(group_BDHW) * self.num_groups + group_BDHW) % cells
        found = []
        for shell in self.peak_shells:
            peaks_BSM = patch_peaks(standing_out(near_BDHW, shell), cell_BDHW, cells)
            found.append(peaks_BSM.unflatten(2, (-1, self.num_groups)).transpose(1, 2).flatten(2))
        return torch.cat(found, dim=-1)

    def _group_of_voxel(self, like_BDHW: Tensor, mask_BDHW: Tensor | None) -> Tensor:
        """Number of each voxel's group, int32 (B, D, H, W); that of all other ids where there is no mask."""
        if mask_BDHW is None:
            return torch.full_like(like_BDHW, self.num_groups - 1, dtype=torch.int32)
        return self.group_of_id[mask_BDHW.long()]

    def _patch_of_voxel(self, like_BDHW: Tensor) -> Tensor:
        """Number of each voxel's patch within its batch, int32 (B, D, H, W)."""
        batch, *shape = like_BDHW.shape
        number = torch.arange(batch, device=like_BDHW.device, dtype=torch.int32).view(batch, 1, 1, 1)
        for axis, (size, patch) in enumerate(zip(shape, self.patch_size, strict=True)):
            index = torch.arange(size, device=like_BDHW.device, dtype=torch.int32) // patch
            number = number * (size // patch) + index.view([-1 if a == axis else 1 for a in range(3)])
        return number

    def _count(self, value_BDHW: Tensor, table: Tensor, bins: int, cell_BDHW: Tensor) -> Tensor:
        """How many voxels of each cell (a group in a patch) lie in each range: (B, N, groups * ranges)."""
        step = ((value_BDHW + 1) * _STEPS).round_().clamp_(0, 2 * _STEPS).int()
        place = (cell_BDHW * bins + table[step]).flatten().long()
        patches = value_BDHW.numel() // math.prod(self.patch_size)
        # Not bincount: its size is not known before it runs, which the plan of a run's memory needs.
        counts = value_BDHW.new_zeros(patches * self.num_groups * bins)
        counts.scatter_add_(0, place, counts.new_ones(1).expand(place.shape))
        return counts.view(len(value_BDHW), -1, self.num_groups * bins)
