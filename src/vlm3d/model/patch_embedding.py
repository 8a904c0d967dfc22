"""A volume becomes tokens: non-overlapping 3D patches, each with a position factorized over z, y and x.

Shape legend of `vlm3d.model`: B batch, C token width, D H W voxels, N = Z*Y*X patches (z slowest), R regions, K diseases,
L lesion prompts, T text width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]


def patch_grid(shape_DHW: Sequence[int], patch_size: Grid) -> Grid:
    """Number of patches (Z, Y, X) that cover a volume; the last ones may reach past its edge."""
    z, y, x = (-(-size // patch) for size, patch in zip(shape_DHW, patch_size, strict=True))
    return z, y, x


def pad_to_patches(volume: Tensor, patch_size: Grid, value: float) -> Tensor:
    """Pad the last three axes at their ends to whole patches; a volume that fits comes back untouched."""
    pad: list[int] = []
    for size, patch in zip(reversed(volume.shape[-3:]), reversed(patch_size), strict=True):
        pad += [0, -size % patch]
    return F.pad(volume, pad, value=value) if any(pad) else volume


def extract_patches(volume_BCDHW: Tensor, patch_size: Grid) -> Tensor:
    """Cut a volume of whole patches into (B, N, in_channels * voxels a patch)."""
    batch, channels = volume_BCDHW.shape[:2]
    pz, py, px = patch_size
    z, y, x = patch_grid(volume_BCDHW.shape[-3:], patch_size)
    cut = volume_BCDHW.reshape(batch, channels, z, pz, y, py, x, px)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, z * y * x, channels * pz * py * px)


class PatchEmbedding(nn.Module):
    """Project each patch to a token and add its position.

    The position is the sum of three learned tables, one an axis, so it costs (Z + Y + X) x C parameters instead of
    Z x Y x X x C. Any grid is accepted: a table is interpolated linearly when the grid's axis has another length.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: Grid, position_grid: Grid) -> None:
        super().__init__()
        self.patch_size = patch_size
        voxels = patch_size[0] * patch_size[1] * patch_size[2]
        self.projection = nn.Linear(in_channels * voxels, embed_dim)
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(n, embed_dim)) for n in position_grid)
        for table in self.positions:
            nn.init.trunc_normal_(table, std=0.02)

    def position_ZYXC(self, grid: Grid) -> Tensor:
        """Position of every patch of a grid, (Z, Y, X, C)."""
        z, y, x = (
            table
            if len(table) == length
            else F.interpolate(table.t()[None], size=length, mode="linear", align_corners=False)[0].t()
            for table, length in zip(self.positions, grid, strict=True)
        )
        return z[:, None, None] + y[None, :, None] + x[None, None, :]

    def forward(self, volume_BCDHW: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, N, C) of a volume (B, in_channels, D, H, W), and their grid (Z, Y, X)."""
        volume_BCDHW = pad_to_patches(volume_BCDHW, self.patch_size, value=-1.0)
        grid = patch_grid(volume_BCDHW.shape[-3:], self.patch_size)
        tokens_BNC = self.projection(extract_patches(volume_BCDHW, self.patch_size))
        return tokens_BNC + self.position_ZYXC(grid).flatten(0, 2), grid
