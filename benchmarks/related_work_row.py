"""What every row of the related-work table is, and the one loop that trains them all.

The loop is the trainer's step with a clock in place of a number of steps: scans, their variation and their order come from
`vlm3d.training.data`, the rule of decay, the schedule, the clipping and the moving average of the weights from
`vlm3d.training.optimizer` and the configuration, the same for each row.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlm3d.config import Config, PhaseConfig, TrainingConfig
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import TrainingError
from vlm3d.training.data import Batch, ScanStream, batches
from vlm3d.training.optimizer import WeightAverage, lr_share, set_learning_rate

logger = logging.getLogger(__name__)

_ENDLESS = 10**9
_TICKS = 1000  # the schedule's length: thousandths of the budget
WARMUP_SHARE = 0.04
"""Of the budget, in which the rate rises; `tiny`'s phase 1.0 warms up over 60 of 1,300 steps."""
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Found:
    """What a row says of one scan; None where it says nothing.

    Attributes:
        probability_K: Of the 18 diseases.
        mask_probability_LDHW: Of the 5 lesions, on the scan's grid.
    """

    probability_K: Tensor | None = None
    mask_probability_LDHW: Tensor | None = None


class Row(nn.Module):
    """A network with its own loss and its own way to predict.

    Attributes:
        phase: Batch size, boxes, share of scans without anatomy: how its scans are handed to it.
        peak_lr: Peak of AdamW's rate.
    """

    phase: PhaseConfig
    peak_lr: float

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Of one batch, a scalar."""

    @abstractmethod
    def predict(self, intensity_11DHW: Tensor, regions_1DHW: Tensor | None) -> Found:
        """Read one scan; called in evaluation mode, without gradients."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Budget:
    """How long a row may train.

    Attributes:
        seconds: Wall clock, from the request for the first batch.
        steps: Stop after so many steps at the latest, for trying; None sets no such end.
    """

    seconds: float
    steps: int | None = None

    def done(self, elapsed: float, steps: int) -> float:
        """Share of the budget that is used up."""
        by_steps = 0.0 if self.steps is None else steps / self.steps
        return max(elapsed / self.seconds, by_steps)


@dataclass
class Trained:
    """What training took.

    Attributes:
        average: Holds the weights to judge: ``with trained.average.applied(): ...``.
        seconds: Wall clock.
        waited_seconds: Of these, spent waiting for scans.
        steps: Of the optimizer.
        parameters: Numbers that were trained.
        losses: Of each step.
        damaged: Cases that could not be read and were passed over.
    """

    average: WeightAverage
    seconds: float = 0.0
    waited_seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)


def adamw(row: Row, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW as the trainer sets it up: matrices decay, biases, norms and scalars do not."""
    parameters = row.trained().values()
    groups = [
        {
            "params": [parameter for parameter in parameters if (parameter.ndim > 1) == decay],
            "peak_lr": row.peak_lr,
            "weight_decay": training.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=row.peak_lr, betas=training.betas
    )


def train_row(
    row: Row,
    dataset: PreparedDataset,
    config: Config,
    budget: Budget,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train a row until its budget is used up; a step that would end less than half within it is not begun.

    Args:
        row: Changed in place; the weights to judge are in the result's average.
        dataset: The training split.
        config: Augmentation, seed, decay, clipping, averaging.
        budget: At least one step is made.
        clock: Seconds.

    Raises:
        TrainingError: A loss or a gradient is no number.
    """
    training = config.training
    phase = row.phase.model_copy(update={"steps": _ENDLESS, "accumulate": 1})
    schedule = phase.model_copy(update={"steps": _TICKS, "warmup_steps": round(_TICKS * WARMUP_SHARE)})
    scans = ScanStream(dataset, config, phase, phase_number=0)
    optimizer = adamw(row, training)
    trained = Trained(WeightAverage(row.trained(), training.ema_decay))
    trained.parameters = sum(parameter.numel() for parameter in row.trained().values())
    row.train()
    start = told = clock()
    stream = iter(batches(scans, phase, first_step=0, rank=0, world_size=1, workers=training.loader_workers))
    last_step = 0.0
    while trained.steps == 0 or budget.done(trained.seconds + last_step / 2, trained.steps) < 1:
        began = clock()
        batch = next(stream)
        trained.waited_seconds += clock() - began
        trained.damaged.update(batch.damaged)
        tick = int(_TICKS * budget.done(clock() - start, trained.steps))
        set_learning_rate(optimizer, lr_share(tick, schedule, training.min_lr_share))
        trained.losses.append(_step(row, batch, optimizer, training.clip_norm))
        trained.average.update()
        trained.steps += 1
        trained.seconds, last_step = clock() - start, clock() - began
        if clock() - told > _SECONDS_BETWEEN_LINES:
            told = clock()
            logger.info(
                "step %d, %.0f of %.0f s: loss %.4f",
                trained.steps,
                trained.seconds,
                budget.seconds,
                trained.losses[-1],
            )
    return trained


def _step(row: Row, batch: Batch, optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    loss = row.loss(batch)
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"the loss is no number; the batch's cases: {', '.join(batch.case_ids)}. Lower the rate with --lr-factor"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for p in row.trained().values() if p.grad is not None], clip_norm)
    if not bool(torch.isfinite(norm)):
        raise TrainingError(
            "the gradient is no number, though the loss is one. Lower the rate with --lr-factor"
        )
    optimizer.step()
    return float(loss.detach())
