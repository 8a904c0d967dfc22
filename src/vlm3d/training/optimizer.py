"""AdamW with a rate a part, warm-up and cosine, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm3d.config import PhaseConfig, TrainingConfig
from vlm3d.model.multi_task_model import VLM3DMultiTask


def build_optimizer(
    model: VLM3DMultiTask, extra: list[nn.Parameter], phase: PhaseConfig, training: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW over the parts that a phase trains.

    Matrices decay, biases, norms, embeddings of one row and scalars do not. A group's ``peak_lr`` is what the schedule
    scales.

    Args:
        model: Its parts are named in ``phase.parts``.
        extra: Learned task weights of the loss; they do not decay and have a rate of their own.
        phase: Parts, rate and factors.
        training: Decay, betas and that rate.
    """
    groups = []
    for part in phase.parts:
        peak_lr = phase.lr * phase.lr_scale.get(part, 1.0)
        parameters = model.part_parameters(part)
        for decay in (True, False):
            members = [parameter for parameter in parameters if _is_matrix(parameter) == decay]
            if members:
                groups.append(
                    {
                        "params": members,
                        "peak_lr": peak_lr,
                        "weight_decay": training.weight_decay if decay else 0.0,
                    }
                )
    if extra:
        groups.append({"params": extra, "peak_lr": training.task_weight_lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=phase.lr, betas=training.betas)


def _is_matrix(parameter: Tensor) -> bool:
    return sum(side > 1 for side in parameter.shape) > 1


def lr_share(step: int, phase: PhaseConfig, min_share: float) -> float:
    """Share of the peak rate at a step: linear from 1/warmup to 1, then half a cosine down to ``min_share``."""
    warmup = min(phase.warmup_steps, max(phase.steps - 1, 0))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(phase.steps - warmup, 1)
    return min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group its share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


class WeightAverage:
    """Exponential moving average of the weights that train: smoother than the last step's, and what is kept.

    The decay rises with the number of steps, ``min(decay, (1 + t) / (10 + t))``, so that the start is soon forgotten.

    Args:
        parameters: By name.
        decay: 0 is no average: `applied` then changes nothing.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._parameters = dict(parameters) if decay else {}
        self._average = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if not self._average:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        average = list(self._average.values())
        current = [self._parameters[name].detach().to(a.dtype) for name, a in self._average.items()]
        torch._foreach_lerp_(average, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the average's weights."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._copy(self._average)
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(source[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name, and how many steps it has seen."""
        return {**self._average, "steps": torch.tensor(self.steps)} if self._average else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict`."""
        if self._average:
            self.steps = int(state["steps"])
            for name, average in self._average.items():
                average.copy_(state[name])
