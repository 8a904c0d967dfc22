"""How far the voxels of a patch stand out from what lies around them: nodules, bronchi and bands as a reader spots them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shell = tuple[int, int, int]
"""Distances (z, y, x) in voxels at which a voxel is compared."""

SHAPES = ("spot", "hole", "ridge")
"""What is measured at each shell, see `standing_out`."""

NEAR = (1, 3, 3)
"""Neighborhood whose mean takes the noise away and leaves small shapes."""

_DIRECTIONS = [d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)]
_STEPS = 1000  # of the scale on which voxels are compared, as whole numbers: 1 HU each


def standing_out(volume_BDHW: Tensor, shell: Shell) -> Tensor:
    """How far each voxel stands out from 26 others around it, as 13 pairs of opposite ones.

    A *spot* is brighter than all 26 and a *hole* darker than all 26, by the value given. A *ridge* is brighter than both
    of a pair; its value is the mean over the pairs of how far, so that a ball scores above a line and a line above a sheet.

    Args:
        volume_BDHW: Smoothed intensities in -1..1; the border is repeated outward.
        shell: Distance of the 26 along each axis; on a diagonal the point of the ellipsoid in that direction.

    Returns:
        (B, 3, D, H, W) in the order of `SHAPES`, 0 where nothing stands out.
    """
    # Whole numbers of 16 bit: half the memory to walk through, 26 times a shape.
    value = (volume_BDHW.clamp(-1, 1) * _STEPS).round_().to(torch.int16)
    pad = [side for reach in reversed(shell) for side in (reach, reach)]
    padded = F.pad(volume_BDHW.unsqueeze(1), pad, mode="replicate").squeeze(1)
    padded = (padded.clamp_(-1, 1) * _STEPS).round_().to(torch.int16)
    brightest = torch.full_like(value, -2 * _STEPS)
    darkest = torch.full_like(value, 2 * _STEPS)
    ridge = torch.zeros_like(value)
    for direction in _DIRECTIONS:
        pair = [_moved(padded, value.shape, shell, direction, sign) for sign in (1, -1)]
        brighter = torch.maximum(*pair)
        torch.maximum(brightest, brighter, out=brightest)
        torch.minimum(darkest, torch.minimum(*pair), out=darkest)
        ridge += (value - brighter).clamp_(min=0)
    shapes = torch.stack([(value - brightest).clamp_(min=0), (darkest - value).clamp_(min=0), ridge], dim=1)
    scale = shapes.new_tensor([1.0, 1.0, 1.0 / len(_DIRECTIONS)], dtype=torch.float32) / _STEPS
    return shapes * scale.view(1, 3, 1, 1, 1)


@torch.no_grad()
def spots_and_holes(volume_BCDHW: Tensor, shells: Sequence[Shell]) -> Tensor:
    """How far each voxel of the first channel is a spot and a hole at each shell (B, 2 * shells, D, H, W); 1 is 500 HU."""
    near_BDHW = box_mean(volume_BCDHW[:, :1].float(), NEAR)[:, 0]
    return torch.cat([2.0 * standing_out(near_BDHW, shell)[:, :2] for shell in shells], dim=1)


def _moved(
    padded_BDHW: Tensor, shape: Sequence[int], shell: Shell, direction: Sequence[int], sign: int
) -> Tensor:
    """The volume as seen a step away: a view."""
    length = math.sqrt(sum(abs(d) for d in direction))
    view = padded_BDHW
    for axis, (reach, towards) in enumerate(zip(shell, direction, strict=True), start=1):
        view = view.narrow(axis, reach + sign * round(reach * towards / length), shape[axis])
    return view


def patch_peaks(shape_BSDHW: Tensor, cell_BDHW: Tensor, cells: int) -> Tensor:
    """The largest value of each shape in each cell: (B, S, cells a scan), 0 for a cell without voxels.

    Args:
        shape_BSDHW: At least 0.
        cell_BDHW: Which cell of its own scan a voxel belongs to.
        cells: Cells a scan.
    """
    index = cell_BDHW.flatten(1)[:, None].long().expand(-1, shape_BSDHW.shape[1], -1)
    peaks = shape_BSDHW.new_zeros(*shape_BSDHW.shape[:2], cells)
    return peaks.scatter_reduce(2, index, shape_BSDHW.flatten(2), reduce="amax")


def box_mean(volume_BCDHW: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Mean over a box around each voxel, the border repeated; one axis after the other."""
    for axis, length in enumerate(size):
        if length == 1:
            continue
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = length // 2
        padded = F.pad(volume_BCDHW, pad, mode="replicate")
        count = volume_BCDHW.shape[2 + axis]
        total = padded.narrow(2 + axis, 0, count).clone()
        for shift in range(1, length):
            total += padded.narrow(2 + axis, shift, count)
        volume_BCDHW = total / length
    return volume_BCDHW
