"""A reward that is easy to raise, and a learner of it on two scans that are given to it by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vlm3d.config import Config
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.data import Batch
from vlm3d.training.grpo import GrpoLearner
from vlm3d.training.rewards import ReportTruth


def low_characters(texts: Sequence[str], truth: ReportTruth) -> list[float]:
    """The share of characters below S."""
    return [sum(character < "S" for character in text) / max(1, len(text)) for text in texts]


def outspoken(model: VLM3DMultiTask, gain: float = 20.0) -> VLM3DMultiTask:
    """Scale the language model's frozen head to the size of a trained one.

    A head as it is drawn (deviation 0.02, width 32) bounds every logit to about 0.6 in size, whatever the adapters
    do: hidden states leave the last norm with length sqrt(32). Nothing could be learned.
    """
    assert model.report_generator.llm is not None
    with torch.no_grad():
        model.report_generator.llm.model.get_output_embeddings().weight.mul_(gain)
    return model


def toy_learner(model: VLM3DMultiTask, **phase: Any) -> GrpoLearner:
    """A learner of `low_characters`; keywords go to the phase."""
    values = model.config.model_dump()
    values["training"]["phases"]["grpo"] |= {
        "group_size": 8,
        "max_new_tokens": 8,
        "rows_per_pass": 8,
        "predicted_findings": 0.0,
        **phase,
    }
    model.freeze()
    model.unfreeze("projector", "adapters")
    parts = [p for part in ("projector", "adapters") for p in model.part_parameters(part)]
    parameters = {str(index): parameter for index, parameter in enumerate(parts)}
    dataset: Any = None  # only scans tried in place of others are read from it
    config = Config.model_validate(values)
    rewards = {"toy": (1.0, low_characters)}
    return GrpoLearner(model, config, dataset, 5, Accelerator(cpu=True), parameters, rewards)


def toy_batches() -> Iterator[Batch]:
    """The same two scans in turn, without any finding."""
    for seed in itertools.cycle((0, 1)):
        volume = 0.3 * torch.randn(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(seed))
        yield Batch(
            [f"scan_{seed}"],
            volume,
            None,
            torch.zeros(1, 5, 8, 32, 32, dtype=torch.int8),
            torch.zeros(1, 18, 2, 2, 2, dtype=torch.bool),
            torch.zeros(1, 18),
            [""],
            None,
            None,
            [],
        )


def refuse_nan(losses: Mapping[str, Tensor], batch: Batch) -> None:
    """Fail where a loss is no number."""
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())
