"""The loss of GRPO: reports that did better than others of the same scan become likelier, within bounds.

GRPO is Shao et al., DeepSeekMath, arXiv:2402.03300; DAPO is Yu et al., arXiv:2503.14476; Dr. GRPO is Liu et al.,
arXiv:2503.20783. Shapes: K reports of a scan (rows), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["grpo", "dapo", "dr_grpo"]

STD_FLOOR = 1e-4
"""Added to a group's standard deviation."""


@dataclass(frozen=True)
class Objective:
    """The bounds of the loss.

    Attributes:
        clip_low: How far a token's probability ratio may fall below 1 before it stops to matter.
        clip_high: How far it may rise above 1.
        kl_weight: Of the divergence from the reference.
    """

    clip_low: float
    clip_high: float
    kl_weight: float


@dataclass(frozen=True)
class LossTerms:
    """What some rows add to a step.

    Attributes:
        loss: To go back from; the share of these rows in the step's loss.
        kl: Sum over tokens of the divergence from the reference, in nats.
        clipped: Tokens whose gradient the clipping takes away.
        tokens: Tokens counted.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    tokens: Tensor


def group_advantages(reward_K: Tensor, *, scale_by_std: bool) -> Tensor:
    """How much better each report is than the mean of its group, in standard deviations where asked for.

    Args:
        reward_K: Of the K reports of one scan, two or more.
        scale_by_std: Divide by their standard deviation, as GRPO does (Shao 2024); Dr. GRPO does not (Liu 2025).
    """
    advantage_K = reward_K - reward_K.mean()
    return advantage_K / (reward_K.std() + STD_FLOOR) if scale_by_std else advantage_K


def token_weights(
    masks: Sequence[Tensor],
    normalization: Normalization,
    *,
    longest: int,
    rows: float | None = None,
    tokens: float | None = None,
) -> list[Tensor]:
    """What each token of a step's rows weighs in its loss; the weights of GRPO and DAPO sum to 1.

    ``grpo``: each report's mean, then the mean over reports. ``dapo``: the mean over all tokens. ``dr_grpo``: the sum over
    a report's tokens over the longest possible length, then the mean over reports, so that a long report is not
    punished less a token.

    Args:
        masks: (K, T) of each group, 1 at a report's tokens.
        normalization: Which of the three.
        longest: Tokens of the longest possible report.
        rows: Reports of the step; those of ``masks`` by default. Many processes give their mean.
        tokens: Tokens of the step; likewise.
    """
    rows = max(1.0, rows if rows is not None else sum(len(mask) for mask in masks))
    tokens = max(1.0, tokens if tokens is not None else float(sum(int(mask.sum()) for mask in masks)))
    if normalization == "grpo":
        return [mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / rows for mask in masks]
    if normalization == "dapo":
        return [mask / tokens for mask in masks]
    return [mask / (rows * longest) for mask in masks]


def kl_estimate(log_p_KT: Tensor, reference_log_p_KT: Tensor) -> Tensor:
    """Divergence of each token from the reference, never negative: r - log r - 1 with r the reference's ratio (k3)."""
    difference_KT = reference_log_p_KT - log_p_KT
    return torch.exp(difference_KT) - difference_KT - 1


def grpo_loss(
    log_p_KT: Tensor,
    old_log_p_KT: Tensor,
    reference_log_p_KT: Tensor | None,
    advantage_K: Tensor,
    weight_KT: Tensor,
    objective: Objective,
) -> LossTerms:
    """The clipped objective of some rows.

    Args:
        log_p_KT: Of the sampled tokens now.
        old_log_p_KT: When they were sampled, without gradient.
        reference_log_p_KT: Under the model that the phase began with; None leaves the divergence out.
        advantage_K: From `group_advantages`.
        weight_KT: From `token_weights`; 0 at padding.
        objective: Bounds.
    """
    ratio_KT = torch.exp(log_p_KT - old_log_p_KT)
    bounded_KT = ratio_KT.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    advantage_K1 = advantage_K[:, None]
    loss_KT = -torch.minimum(ratio_KT * advantage_K1, bounded_KT * advantage_K1)
    counts_KT = weight_KT > 0
    kl_KT = torch.zeros_like(log_p_KT)
    if reference_log_p_KT is not None:
        kl_KT = kl_estimate(log_p_KT, reference_log_p_KT)
        loss_KT = loss_KT + objective.kl_weight * kl_KT
    low = (ratio_KT < 1 - objective.clip_low) & (advantage_K1 < 0)
    high = (ratio_KT > 1 + objective.clip_high) & (advantage_K1 > 0)
    return LossTerms(
        loss=(loss_KT.masked_fill(~counts_KT, 0.0) * weight_KT).sum(),
        kl=kl_KT.detach().masked_fill(~counts_KT, 0.0).sum(),
        clipped=((low | high) & counts_KT).sum(),
        tokens=counts_KT.sum(),
    )
