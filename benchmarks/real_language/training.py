"""Training the language model's adapters within a budget, in checkpoints from which a killed run goes on.

```
WORK/training/
├── state.safetensors      adapters, the optimizer's moments
└── state.json             settings, steps, seconds, the loss of every step
```

With a budget of steps, a run that was cut makes the same numbers as one that was not. With a budget of seconds the rate
follows the clock, so they differ as two runs do.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from real_language.examples import Example, batches_from, report_loss
from vlm3d.config import PhaseConfig
from vlm3d.errors import CheckpointError, ConfigError, TrainingError
from vlm3d.io.writing import settle_folder, whole_folder
from vlm3d.model.language_model import LanguageModel
from vlm3d.training.optimizer import lr_share, set_learning_rate
from vlm3d.training.run_state import (
    optimizer_tensors,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from vlm3d.training.step import seed_step

logger = logging.getLogger("real_language")

FOLDER, STATE_FILE, TENSORS_FILE = "training", "state.json", "state.safetensors"
_TICKS = 1000  # the schedule's length: thousandths of the budget
_SCHEDULE = PhaseConfig(steps=_TICKS, warmup_steps=40)
_MIN_LR_SHARE = 0.05
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Settings:
    """How the adapters are trained; a run goes on only under the settings that it began with.

    Attributes:
        llm_name: Folder or Hub name.
        studies: Fingerprint of the training studies.
        lora_rank: Of the adapters; their scale is twice as much.
        lora_dropout: On their input.
        batch_size: Reports a step.
        lr: Peak rate.
        clip_norm: Largest gradient.
        max_report_tokens: Longer reports are cut.
        steps: Budget, or None.
        seconds: Budget of wall clock, checkpoints not counted, or None; what is used up first ends the training.
        seed: Of adapters, dropout and order.
    """

    llm_name: str
    studies: str
    lora_rank: int = 32
    lora_dropout: float = 0.05
    batch_size: int = 4
    lr: float = 5e-4
    clip_norm: float = 1.0
    max_report_tokens: int = 640
    steps: int | None = None
    seconds: float | None = None
    seed: int = 0

    def spent(self, steps: int, seconds: float) -> float:
        """Share of the budget that is used up; 1 and more ends the training."""
        by_steps = 0.0 if self.steps is None else steps / self.steps
        by_seconds = 0.0 if self.seconds is None else seconds / self.seconds
        return max(by_steps, by_seconds)


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        seconds: Spent on steps, over all parts of a run that was cut.
        losses: Of each step, in nats a token.
        resumed: How often it went on from a checkpoint.
    """

    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    resumed: int = 0

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self.losses)


class AdapterTraining:
    """A training of adapters, new or gone on with.

    Args:
        llm: With adapters; changed in place.
        examples: To learn from.
        settings: How.
        work: Folder of the checkpoints.
        clock: Seconds.

    Raises:
        ConfigError: There is no budget, or the folder holds a training under other settings.
        CheckpointError: It holds something damaged.
    """

    def __init__(
        self,
        llm: LanguageModel,
        examples: Sequence[Example],
        settings: Settings,
        work: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if settings.steps is None and settings.seconds is None:
            raise ConfigError("a training needs a budget: give --steps or --seconds")
        self.settings = settings
        self.progress = Progress()
        self._llm, self._examples, self._clock = llm, examples, clock
        self._folder = work / FOLDER
        llm.set_adapters_trainable(True)
        self._adapters = llm.adapter_parameters()
        self._names = {parameter: name for name, parameter in self._adapters.items()}
        self._optimizer = torch.optim.AdamW(
            [{"params": list(self._adapters.values()), "peak_lr": settings.lr}],
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        settle_folder(self._folder)
        if self._folder.exists():
            self._restore()
        else:
            torch.manual_seed(settings.seed)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return (
            self.progress.steps > 0 and self.settings.spent(self.progress.steps, self.progress.seconds) >= 1
        )

    def run(self, checkpoint_seconds: float = 180.0) -> Progress:
        """Train until the budget is used up.

        Args:
            checkpoint_seconds: Wall clock from one checkpoint to the next; there is one at the end, too.

        Raises:
            TrainingError: A loss or a gradient is no number.
            OutputError: A checkpoint cannot be written.
        """
        self._llm.train()
        kept = told = self._clock()
        lengths = [example.length for example in self._examples]
        batches = batches_from(lengths, self.settings.batch_size, self.settings.seed, self.progress.steps)
        for batch in batches:
            if self.done:
                break
            began = self._clock()
            self.progress.losses.append(self._step([self._examples[index] for index in batch]))
            now = self._clock()
            self.progress.seconds += now - began
            if now - told >= _SECONDS_BETWEEN_LINES:
                told = now
                self._tell()
            if now - kept >= checkpoint_seconds:
                self._keep()
                kept = self._clock()
        self._llm.eval()
        if self.progress.steps:
            self._keep()
        return self.progress

    def _step(self, examples: Sequence[Example]) -> float:
        seed_step(self.settings.seed, 0, self.progress.steps, 0)
        spent = self.settings.spent(self.progress.steps, self.progress.seconds)
        set_learning_rate(self._optimizer, lr_share(int(_TICKS * spent), _SCHEDULE, _MIN_LR_SHARE))
        loss = report_loss(self._llm, examples)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self._adapters.values()), self.settings.clip_norm)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"the loss or its gradient is no number in step {self.progress.steps + 1}; "
                "give a lower --lr and another --work"
            )
        self._optimizer.step()
        return value

    def _tell(self) -> None:
        recent = self.progress.losses[-20:]
        logger.info(
            "step %d, %.0f s, %.0f %% of the budget: loss %.3f",
            self.progress.steps,
            self.progress.seconds,
            100 * min(1.0, self.settings.spent(self.progress.steps, self.progress.seconds)),
            sum(recent) / len(recent),
        )

    def _keep(self) -> None:
        """Write a checkpoint, whole or not at all."""
        tensors = {
            **with_prefix("adapter", self._llm.adapter_state_dict()),
            **optimizer_tensors(self._optimizer, self._names),
        }
        state = {"settings": asdict(self.settings), "progress": asdict(self.progress)}
        with whole_folder(self._folder) as fresh:
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
                fresh / TENSORS_FILE,
            )
            (fresh / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _restore(self) -> None:
        state, tensors = _read(self._folder)
        refuse_other_settings(self.settings, state["settings"], self._folder)
        self._llm.load_adapter_state_dict(without_prefix("adapter", tensors))
        restore_optimizer(self._optimizer, self._names, tensors)
        self.progress = Progress(**state["progress"])
        self.progress.resumed += 1
        logger.info("goes on after step %d", self.progress.steps)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if set(state) != {"settings", "progress"}:
            raise ValueError("foreign fields")
        return state, load_file(folder / TENSORS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no training to go on with ({type(error).__name__}); give another --work"
        ) from error


def refuse_other_settings(settings: Settings, known: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a training that began under other settings.

    Raises:
        ConfigError: One of them differs; the message names it.
    """
    for name, value in asdict(settings).items():
        if known.get(name) != value:
            raise ConfigError(
                f"{folder} was trained with another {name} ({known.get(name)}, now {value}): "
                "give the same settings or another --work"
            )
