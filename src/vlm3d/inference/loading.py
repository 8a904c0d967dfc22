"""From names given on a command line to a pipeline that is ready to predict."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vlm3d.config import load_config
from vlm3d.errors import ConfigError
from vlm3d.inference.pipeline import Pipeline
from vlm3d.inference.thresholds import thresholds_for
from vlm3d.io.wording import shown
from vlm3d.model.checkpoint import shipped_checkpoint
from vlm3d.model.multi_task_model import VLM3DMultiTask

logger = logging.getLogger(__name__)

RANDOM = "random"
"""In the place of a checkpoint: random weights, for trying paths and speed."""


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is a GPU.

    Raises:
        ConfigError: The name is unknown, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device is auto, cpu or cuda, got '{name}'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is auto, cpu or cuda, got '{name}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


def load_pipeline(
    checkpoint: str | Path | None,
    *,
    config: str | Path = "tiny",
    device: str = "auto",
    seed: int = 0,
    with_report: bool = True,
) -> Pipeline:
    """Load a checkpoint, or build an untrained model that says so in all its outputs.

    Args:
        checkpoint: Folder or Hub name. None takes the weights that ship with ``config`` if there are any, else random
            ones; ``"random"`` takes random ones.
        config: Used only without a checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: Of the random weights.
        with_report: Load the language model too.
    """
    place = choose_device(device)
    shipped = shipped_checkpoint(str(config)) if checkpoint is None else None
    if shipped is not None:
        model = VLM3DMultiTask.from_pretrained(shipped, load_llm=with_report, device=place)
        return Pipeline(
            model,
            checkpoint=f"{config} (shipped)",
            device=place,
            thresholds=thresholds_for(model, shipped),
        )
    if checkpoint is not None and str(checkpoint) != RANDOM:
        model = VLM3DMultiTask.from_pretrained(checkpoint, load_llm=with_report, device=place)
        return Pipeline(
            model,
            checkpoint=shown(Path(checkpoint)),
            device=place,
            thresholds=thresholds_for(model, checkpoint),
        )
    settings = load_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VLM3DMultiTask(settings, load_llm=with_report, device=place)
    return Pipeline(model, checkpoint=f"none (random weights, seed {seed})", device=place)
