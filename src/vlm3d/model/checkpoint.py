"""A checkpoint folder: written as a whole or not at all, read strictly, enough alone to predict.

```
CHECKPOINT/
├── config.json          every setting of the model and its input (vlm3d.config.Config)
├── model.safetensors    encoder, classifier with its prompt embeddings, localizer, projector, adapters
└── training.json        how it was trained: {"status": "untrained" | "synthetic" | "trained", …}
```

The language model's frozen weights are not in it: they are named in config.json and found by `vlm3d.pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm3d.config import Config, config_from_dict
from vlm3d.errors import CheckpointError, ConfigError, OutputError
from vlm3d.io import whole_folder

SHIPPED = Path(str(files("vlm3d"))) / "checkpoints"
"""Checkpoints that come with the package, each under the name of its size."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
Status = Literal["untrained", "synthetic", "trained"]
STATUSES: tuple[Status, ...] = ("untrained", "synthetic", "trained")


def write_checkpoint(
    folder: Path, config: Config, state: Mapping[str, Tensor], training: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder atomically; an earlier checkpoint there is replaced only by a complete one.

    Raises:
        OutputError: The folder exists and is no checkpoint, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (_is_checkpoint(folder) or not any(folder.iterdir()))):
        raise OutputError(f"{folder} exists and is no checkpoint of vlm3d; name another folder")
    with whole_folder(folder) as fresh:
        (fresh / CONFIG_FILE).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        (fresh / TRAINING_FILE).write_text(json.dumps(training, indent=2), encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        try:
            save_file(tensors, fresh / WEIGHTS_FILE)
        except SafetensorError as error:
            raise OSError(str(error).splitlines()[0]) from error


def shipped_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that comes with the package, or None."""
    folder = SHIPPED / name
    return folder if re.fullmatch(r"[\w-]+", name) and _is_checkpoint(folder) else None


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read_config(folder: Path) -> Config:
    """The settings of a checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged, or of another version of this package.
    """
    values = _read_json(folder, CONFIG_FILE)
    try:
        return config_from_dict(values, f"{folder}/{CONFIG_FILE}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def read_training(folder: Path) -> dict[str, Any]:
    """How a checkpoint was trained; ``status`` is one of `STATUSES`.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    training = _read_json(folder, TRAINING_FILE)
    if training.get("status") not in STATUSES:
        raise CheckpointError(f"{folder}/{TRAINING_FILE}: status must be one of {', '.join(STATUSES)}")
    return training


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or holds values that are no numbers.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it lacks {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    broken = [
        name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise CheckpointError(f"{path}: tensor {broken[0]} holds NaN or infinity")
    return state


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, shortened to 16 digits: tells two sets of weights apart."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint: {name} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: not JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: expected settings by name")
    return values
