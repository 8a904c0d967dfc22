"""A volume becomes tokens: non-overlapping 3D patches, each with a position factorized over z, y and x.

Shape legend of `vlm3d.model`: B batch, C token width, D H W voxels, N = Z*Y*X patches (z slowest), R regions, K diseases,
L lesion prompts, T text width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.model.patch_histogram import PatchHistogram
from vlm3d.model.patch_peaks import Shell, spots_and_holes

Grid = tuple[int, int, int]
PatchBox = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Start and stop along z, y and x, in patches."""
Place = tuple[PatchBox, Grid]
"""Where a cut-out lies: its box, and the grid of the whole scan."""


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


def cut_boxes(volume_BCDHW: Tensor, boxes: Sequence[PatchBox], patch_size: Grid = (1, 1, 1)) -> Tensor:
    """Cut one box a scan out of a batch; all boxes have one shape.

    Args:
        volume_BCDHW: On the voxels that ``patch_size`` speaks of; (1, 1, 1) for a grid of patches.
        boxes: In patches.
        patch_size: Voxels a patch.
    """
    return torch.stack(
        [
            volume[:, z[0] * pz : z[1] * pz, y[0] * py : y[1] * py, x[0] * px : x[1] * px]
            for volume, (z, y, x) in zip(volume_BCDHW, boxes, strict=True)
            for pz, py, px in [patch_size]
        ]
    )


def scale_strides(patch_size: Grid) -> list[Grid]:
    """Strides from full resolution to the patch grid, one entry a step down; their product is the patch.

    Steps that an axis does not need are left out at the finest and coarsest scales first, so that (4, 16, 16) becomes
    (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2).

    Raises:
        ValueError: A side of the patch is not a power of two.
    """
    steps = [side.bit_length() - 1 for side in patch_size]
    if any(2**step != side for step, side in zip(steps, patch_size, strict=True)):
        raise ValueError(f"patch sides must be powers of two, got {patch_size}")
    total = max(steps)
    strides = []
    for level in range(total):
        z, y, x = (2 if (total - step) // 2 <= level < (total - step) // 2 + step else 1 for step in steps)
        strides.append((z, y, x))
    return strides


def spread_bands(volume_BCDHW: Tensor, bands: Sequence[tuple[float, float]]) -> Tensor:
    """The volume, and after it each band of its values spread over -1..1: (B, C * (1 + bands), D, H, W).

    From -1000 to 1000 HU, emphysema lies 0.04 below healthy lung and fluid 0.02 below muscle; a band makes that plain.
    """
    channels = [volume_BCDHW]
    channels += [((volume_BCDHW - low) * (2 / (high - low)) - 1).clamp(-1, 1) for low, high in bands]
    return torch.cat(channels, dim=1) if bands else volume_BCDHW


def with_shapes(
    volume_BCDHW: Tensor, bands: Sequence[tuple[float, float]], shells: Sequence[Shell]
) -> Tensor:
    """The volume, its bands (`spread_bands`), and its spots and holes at each shell (`spots_and_holes`), as channels."""
    channels = spread_bands(volume_BCDHW, bands)
    if not shells:
        return channels
    return torch.cat([channels, spots_and_holes(volume_BCDHW, shells).to(channels.dtype)], dim=1)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each voxel: unlike a norm over space it leaves a voxel's value its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) to the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ResidualConvolution(nn.Conv3d):
    """A 3x3x3 convolution whose rectified result is added to what went in."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        return x + F.gelu(super().forward(x))


class ConvolutionalStem(nn.Module):
    """Strided convolutions from voxels to the patch grid, each step but the last followed by residual convolutions.

    Args:
        in_channels: Image channels.
        embed_dim: Width after the last step.
        patch_size: Voxels a patch; sides are powers of two.
        channels: Widths after the steps before the last.

    Raises:
        ValueError: There are not as many widths as the patch needs.
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: Grid, channels: Sequence[int]) -> None:
        super().__init__()
        strides = scale_strides(patch_size)
        if len(channels) != len(strides) - 1:
            raise ValueError(
                f"a stem to patches of {patch_size} takes {len(strides) - 1} widths, got {list(channels)}"
            )
        widths = [in_channels, *channels, embed_dim]
        self.steps = nn.ModuleList(
            nn.Conv3d(widths[i], widths[i + 1], 3, stride=stride, padding=1)
            for i, stride in enumerate(strides)
        )
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths[1:])
        self.refine = nn.ModuleList(
            nn.Sequential(*(ResidualConvolution(width) for _ in range(1 if step == 0 else 2)))
            for step, width in enumerate(channels)
        )

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        """(B, in_channels, D, H, W) to (B, embed_dim, Z, Y, X)."""
        x = volume_BCDHW.contiguous(memory_format=torch.channels_last_3d)
        for index, (step, norm) in enumerate(zip(self.steps, self.norms, strict=True)):
            x = F.gelu(norm(step(x)))
            if index < len(self.refine):
                x = self.refine[index](x)
        return x


class PatchEmbedding(nn.Module):
    """Turn each patch into a token and add its position.

    The stem is one linear projection of the patch's voxels, or a few strided convolutions down to the patch grid: a
    texture then looks the same wherever it lies in a patch, and few cases suffice to learn it (Xiao 2021).

    The position is the sum of three learned tables, one an axis, so it costs (Z + Y + X) x C parameters instead of
    Z x Y x X x C. Any grid is accepted: a table is interpolated linearly when the grid's axis has another length.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: Grid,
        position_grid: Grid,
        stem_channels: Sequence[int] | None = None,
        bands: Sequence[tuple[float, float]] = (),
        region_groups: Sequence[Sequence[int]] = (),
        peak_shells: Sequence[Shell] = (),
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.bands = tuple(bands)
        self.histogram = (
            PatchHistogram(embed_dim, patch_size, region_groups, peak_shells) if region_groups else None
        )
        self.peak_shells = tuple(peak_shells)
        in_channels = in_channels * (1 + len(self.bands)) + 2 * len(self.peak_shells)
        voxels = patch_size[0] * patch_size[1] * patch_size[2]
        self.stem = (
            None
            if stem_channels is None
            else ConvolutionalStem(in_channels, embed_dim, patch_size, stem_channels)
        )
        self.projection = nn.Linear(in_channels * voxels if self.stem is None else embed_dim, embed_dim)
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

    def forward(
        self,
        volume_BCDHW: Tensor,
        places: Sequence[Place] | None = None,
        mask_BDHW: Tensor | None = None,
    ) -> tuple[Tensor, Grid]:
        """Tokens (B, N, C) of a volume (B, in_channels, D, H, W), and their grid (Z, Y, X).

        A cut-out that tells its place has the positions that its patches have in the whole scan. Region ids (B, D, H, W)
        say in which group a voxel's intensity is counted.
        """
        volume_BCDHW = pad_to_patches(volume_BCDHW, self.patch_size, value=-1.0)
        grid = patch_grid(volume_BCDHW.shape[-3:], self.patch_size)
        counted_BNC = None
        if self.histogram is not None:
            if mask_BDHW is not None:
                mask_BDHW = pad_to_patches(mask_BDHW, self.patch_size, value=0)
            counted_BNC = self.histogram(volume_BCDHW, mask_BDHW)
        seen_BCDHW = with_shapes(volume_BCDHW, self.bands, self.peak_shells)
        if self.stem is None:
            patches = extract_patches(seen_BCDHW, self.patch_size)
        else:
            patches = self.stem(seen_BCDHW).flatten(2).transpose(1, 2)
        tokens_BNC = self.projection(patches)
        if counted_BNC is not None:
            tokens_BNC = tokens_BNC + counted_BNC
        if places is None:
            return tokens_BNC + self.position_ZYXC(grid).flatten(0, 2), grid
        positions = []
        for (z, y, x), whole in places:
            own_ZYXC = self.position_ZYXC(whole)[z[0] : z[1], y[0] : y[1], x[0] : x[1]]
            missing = [size - length for size, length in zip(grid, own_ZYXC.shape, strict=False)]
            padding = (0, 0, 0, missing[2], 0, missing[1], 0, missing[0])  # patches of padding have none
            positions.append(F.pad(own_ZYXC, padding).flatten(0, 2))
        return tokens_BNC + torch.stack(positions), grid
