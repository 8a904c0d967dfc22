"""Stage 3 of the localizer: one U-Net draws the masks of all prompts at the volume's own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.model.patch_embedding import Grid, pad_to_patches, scale_strides, with_shapes
from vlm3d.model.patch_peaks import Shell


def scale_channels(base: int, bottleneck: int, num_scales: int) -> list[int]:
    """Widths from full resolution down: base is two scales below it, halved upward (at least 8), doubled downward."""
    widths = [max(8, round(base * 2.0 ** (scale - 2))) for scale in range(num_scales - 1)]
    return [*widths, bottleneck]


class CollectedNorm(nn.BatchNorm3d):
    """Batch norm whose statistics stand still while a batch has one scan.

    What is drawn at a voxel then does not hang on what else is in view: a box and the whole scan are scaled alike, and
    density keeps its meaning, which a norm over each scan's own space takes away (docs/decisions/0010).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.05)
        self.register_buffer("num_batches_tracked", None)  # a fixed momentum needs no count

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same."""
        if self.training and len(x) > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class ConvNormAct(nn.Module):
    """3x3x3 convolution, `CollectedNorm`, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: Grid = (1, 1, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(
            self.conv.weight, a=0.01
        )  # until statistics are collected, norms pass on the scale
        self.norm = CollectedNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, D, H, W) to (B, out, D/stride, …)."""
        return F.leaky_relu(self.norm(self.conv(x)), 0.01, inplace=True)


class TextAttentionGate(nn.Module):
    """Additive attention gate on a skip connection that opens where any prompt asks for it.

    As in Attention U-Net (Oktay 2018) the skip and the coarser signal are added and rectified; here the result is
    compared with each prompt, and the strongest match opens the gate: ``skip * sigmoid(max_l h . t_l)``.
    """

    def __init__(self, channels: int, text_dim: int) -> None:
        super().__init__()
        inner = max(4, channels // 2)
        self.skip = nn.Conv3d(channels, inner, 1, bias=False)
        self.signal = nn.Conv3d(channels, inner, 1)
        self.text = nn.Linear(text_dim, inner)
        self.scale = inner**-0.5

    def forward(self, skip: Tensor, signal: Tensor, text_LT: Tensor) -> Tensor:
        """Gated skip (B, C, D, H, W); ``signal`` is the upsampled decoder on the same grid."""
        hidden = F.relu(self.skip(skip).add_(self.signal(signal)), inplace=True)
        match = prompt_logits(hidden, self.text(text_LT) * self.scale)
        # At the start the gate is half open everywhere; doubled, it leaves the skip's scale as it was.
        return skip * (2.0 * match.amax(dim=1, keepdim=True).sigmoid())


def prompt_logits(features: Tensor, kernel_LC: Tensor, bias_L: Tensor | None = None) -> Tensor:
    """Inner product of every voxel's features with every prompt's kernel: (B, C, D, H, W), (L, C) -> (B, L, D, H, W)."""
    return F.conv3d(features, kernel_LC[:, :, None, None, None].to(features.dtype), bias_L)


class DecoderScale(nn.Module):
    """One step up: upsample, gate the skip with the text, join, convolve twice."""

    def __init__(self, below: int, channels: int, text_dim: int, stride: Grid) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(below, channels, stride, stride=stride)
        self.gate = TextAttentionGate(channels, text_dim)
        self.join = ConvNormAct(2 * channels, channels)
        self.refine = ConvNormAct(channels, channels)

    def forward(self, x: Tensor, skip: Tensor, text_LT: Tensor) -> Tensor:
        """Features on the skip's grid."""
        x = self.up(x)
        gated = self.gate(skip, x, text_LT)
        x = torch.cat([x, gated], dim=1)
        del gated, skip
        return self.refine(self.join(x))


class MaskHead(nn.Module):
    """A prompt's text becomes a kernel and a bias, and its inner product with the features is the prompt's mask."""

    def __init__(self, channels: int, text_dim: int) -> None:
        super().__init__()
        self.kernel = nn.Sequential(
            nn.Linear(text_dim, text_dim), nn.GELU(), nn.Linear(text_dim, channels + 1)
        )

    def forward(self, features: Tensor, text_LT: Tensor) -> Tensor:
        """Mask logits (B, L, D, H, W)."""
        kernel_LK = self.kernel(text_LT)
        bias_L = kernel_LK[:, -1] - 2.0  # lesions are rare: start near the probability 0.1
        return prompt_logits(features, kernel_LK[:, :-1], bias_L)


@dataclass
class MaskLogits:
    """What the U-Net draws.

    Attributes:
        full_BLDHW: Logits on the input's own grid.
        coarser: Logits of the next scales, finest first, for supervision at several scales; empty unless asked for.
    """

    full_BLDHW: Tensor
    coarser: list[Tensor]


class TextGuidedAttentionUNet(nn.Module):
    """U-Net whose skips come from the volume and whose bottleneck takes the denoised patch features.

    All prompts share the convolutions: text enters as gates on every skip and as one kernel a prompt and scale at the
    end, so another prompt costs one more output channel and nothing else.

    Args:
        in_channels: Image channels.
        patch_dim: Width C of the denoised patch features.
        text_dim: Width T of the prompt features.
        patch_size: Voxels a patch; sides are powers of two.
        base_channels: Width two scales below full resolution.
        bottleneck_channels: Width on the patch grid.
        supervised_scales: Scales with a mask head, the full resolution included.
        bands: As in `vlm3d.config.VisionConfig`.
        region_channels: Channels of a learned embedding of each voxel's region; 0 leaves the regions out.
        num_regions: Regions without background.
        peak_shells: Distances at which spots and holes are marked for it (`spots_and_holes`); none by default.
    """

    def __init__(
        self,
        in_channels: int,
        patch_dim: int,
        text_dim: int,
        patch_size: Grid,
        base_channels: int,
        bottleneck_channels: int,
        supervised_scales: int = 3,
        bands: Sequence[tuple[float, float]] = (),
        region_channels: int = 0,
        num_regions: int = 20,
        peak_shells: Sequence[Shell] = (),
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.bands = tuple(bands)
        self.peak_shells = tuple(peak_shells)
        strides = scale_strides(patch_size)
        widths = scale_channels(base_channels, bottleneck_channels, len(strides) + 1)
        self.region_embedding = nn.Embedding(num_regions + 1, region_channels) if region_channels else None
        seen = in_channels * (1 + len(self.bands)) + region_channels + 2 * len(self.peak_shells)
        self.stem = ConvNormAct(seen, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(widths[i], widths[i + 1], stride), ConvNormAct(widths[i + 1], widths[i + 1])
            )
            for i, stride in enumerate(strides)
        )
        self.patch_projection = nn.Linear(patch_dim, bottleneck_channels)
        self.fuse = nn.Sequential(*(ConvNormAct(bottleneck_channels, bottleneck_channels) for _ in range(2)))
        self.up = nn.ModuleList(
            DecoderScale(widths[i + 1], widths[i], text_dim, stride) for i, stride in enumerate(strides)
        )
        self.heads = nn.ModuleList(
            MaskHead(widths[i], text_dim) for i in range(min(supervised_scales, len(strides)))
        )

    def forward(
        self,
        volume_BCDHW: Tensor,
        denoised_BNC: Tensor,
        grid: Grid,
        text_LT: Tensor,
        regions_BDHW: Tensor | None = None,
        *,
        all_scales: bool = True,
    ) -> MaskLogits:
        """Draw the masks.

        Args:
            volume_BCDHW: Intensities in -1..1.
            denoised_BNC: Denoised patch features on ``grid``.
            grid: (Z, Y, X) of the patches.
            text_LT: Prompt features.
            regions_BDHW: Region ids; without them every voxel is background.
            all_scales: Also return the coarser scales' logits.
        """
        shape = volume_BCDHW.shape[-3:]
        padded_BCDHW = pad_to_patches(volume_BCDHW, self.patch_size, value=-1.0)
        x = with_shapes(padded_BCDHW, self.bands, self.peak_shells)
        if self.region_embedding is not None:
            x = torch.cat([x, self._regions(self.region_embedding, regions_BDHW, x)], dim=1)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        x = self.stem(x)
        skips = [x]
        for down in self.down:
            x = down(x)
            skips.append(x)
        patches = self.patch_projection(denoised_BNC).transpose(1, 2).unflatten(2, grid)
        x = self.fuse(skips.pop() + patches)
        coarser: list[Tensor] = []
        for scale in reversed(range(len(self.up))):
            x = self.up[scale](x, skips.pop(), text_LT)
            if scale and scale < len(self.heads) and all_scales:
                coarser.insert(0, self.heads[scale](x, text_LT))
        full = self.heads[0](x, text_LT)
        return MaskLogits(full[..., : shape[0], : shape[1], : shape[2]], coarser)

    def _regions(self, embedding: nn.Embedding, regions_BDHW: Tensor | None, like: Tensor) -> Tensor:
        """Each voxel's region (B, E, D, H, W) on the padded grid of ``like``; padding is background."""
        if regions_BDHW is None:
            return embedding.weight[0].view(1, -1, 1, 1, 1).expand(len(like), -1, *like.shape[2:])
        ids = pad_to_patches(regions_BDHW, self.patch_size, value=0).int()
        return embedding(ids).movedim(-1, 1).to(like.dtype)
