"""A checkpoint folder: written as a whole or not at all, read strictly, enough alone to predict.

```
CHECKPOINT/
├── config.json          every setting of the model and its input (vlm3d.config.Config)
├── model.safetensors    encoder, classifier with its prompt embeddings, localizer, projector, adapters
├── training.json        how it was trained: {"status": "untrained" | "synthetic" | "trained", …}
└── thresholds.json      optional: from which probability on each disease is positive, how classifier and localizer are
                         weighed before that, and how masks are drawn, tuned for these weights
```

The language model's frozen weights are not in it: they are named in config.json and found by `vlm3d.pretrained`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm3d.config import Config, config_from_dict
from vlm3d.errors import CheckpointError, ConfigError, OutputError
from vlm3d.io import whole_folder, write_atomically
from vlm3d.model.head_fusion import HeadFusion
from vlm3d.pretrained import resolve_weights

SHIPPED = Path(str(files("vlm3d"))) / "checkpoints"
"""Checkpoints that come with the package, each under the name of its size."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
THRESHOLDS_FILE = "thresholds.json"
Status = Literal["untrained", "synthetic", "trained"]
STATUSES: tuple[Status, ...] = ("untrained", "synthetic", "trained")
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class StoredThresholds:
    """From which probability on each disease is positive, kept beside the weights that it was tuned for.

    Attributes:
        values: Disease -> probability, 0..1.
        source: How they were chosen, in words.
        fingerprint: Of what they were tuned for, from `heads_fingerprint`.
        fusion: How classifier and localizer are weighed before the thresholds, and masks drawn; None leaves each to itself.
    """

    values: Mapping[str, float]
    source: str
    fingerprint: str
    fusion: HeadFusion | None = None

    def fits(self, state: Mapping[str, Tensor], config: Config) -> bool:
        """Whether they were tuned for these weights, of `VLM3DMultiTask.checkpoint_state_dict`, read as ``config`` says."""
        return self.fingerprint == heads_fingerprint(state, config)


def threshold_of(disease: str, thresholds: StoredThresholds | None) -> float:
    """The stored threshold of a disease, else 0.5."""
    return DEFAULT_THRESHOLD if thresholds is None else thresholds.values.get(disease, DEFAULT_THRESHOLD)


def write_checkpoint(
    folder: Path,
    config: Config,
    state: Mapping[str, Tensor],
    training: Mapping[str, Any],
    thresholds: StoredThresholds | None = None,
) -> None:
    """Write a checkpoint folder atomically; an earlier checkpoint there is replaced only by a complete one.

    Args:
        folder: Of the checkpoint.
        config: Its settings.
        state: Its tensors.
        training: How it was trained.
        thresholds: Left out if they were tuned for other weights.

    Raises:
        OutputError: The folder exists and is no checkpoint, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (_is_checkpoint(folder) or not any(folder.iterdir()))):
        raise OutputError(f"{folder} exists and is no checkpoint of vlm3d; name another folder")
    with whole_folder(folder) as fresh:
        (fresh / CONFIG_FILE).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        (fresh / TRAINING_FILE).write_text(json.dumps(training, indent=2), encoding="utf-8")
        if thresholds is not None and thresholds.fits(state, config):
            (fresh / THRESHOLDS_FILE).write_text(_as_json(thresholds), encoding="utf-8")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        try:
            save_file(tensors, fresh / WEIGHTS_FILE)
            (fresh / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone
        except SafetensorError as error:
            raise OSError(str(error).splitlines()[0]) from error


def shipped_checkpoint(name: str) -> Path | None:
    """The folder of a checkpoint that comes with the package, or None."""
    folder = SHIPPED / name
    return folder if re.fullmatch(r"[\w-]+", name) and _is_checkpoint(folder) else None


def locate_checkpoint(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint: a folder, a size that ships with weights, or a Hub name.

    Raises:
        CheckpointError: It is a file.
        WeightsUnavailableError: It is in none of the places looked in.
    """
    folder = Path(name_or_folder)
    if not folder.exists():
        folder = shipped_checkpoint(str(name_or_folder)) or resolve_weights(str(name_or_folder))
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder that vlm3d wrote")
    return folder


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
    """How a checkpoint was trained: ``status`` of `STATUSES`; ``untrained_tasks`` and ``anatomy``, if there, list words.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    training = _read_json(folder, TRAINING_FILE)
    if training.get("status") not in STATUSES:
        raise CheckpointError(f"{folder}/{TRAINING_FILE}: status must be one of {', '.join(STATUSES)}")
    for key in ("untrained_tasks", "anatomy"):
        words = training.get(key, [])
        if not (
            isinstance(words, list)
            and all(isinstance(word, str) and re.fullmatch(r"[\w-]{1,40}", word) for word in words)
        ):
            raise CheckpointError(f"{folder}/{TRAINING_FILE}: {key} must be a list of words")
    return training


def read_thresholds(folder: Path) -> StoredThresholds | None:
    """The diseases' thresholds of a checkpoint; None where it has none.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not (folder / THRESHOLDS_FILE).exists():
        return None
    stored = _read_json(folder, THRESHOLDS_FILE)
    values, source, weights = (stored.get(key) for key in ("values", "source", "fingerprint"))
    if not isinstance(values, dict) or not isinstance(source, str) or not isinstance(weights, str):
        raise CheckpointError(
            f"{folder}/{THRESHOLDS_FILE} is damaged: it lacks values, source or fingerprint; delete or tune it again"
        )
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise CheckpointError(
                f"{folder}/{THRESHOLDS_FILE} is damaged: the threshold of {name} is no probability from 0 to 1"
            )
    try:
        fusion = None if stored.get("fusion") is None else HeadFusion.from_json(stored["fusion"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/{THRESHOLDS_FILE} is damaged, or older than this vlm3d: its fusion cannot be read; tune it again"
        ) from error
    return StoredThresholds({name: float(value) for name, value in values.items()}, source, weights, fusion)


def write_thresholds(folder: Path, thresholds: StoredThresholds) -> Path:
    """Put thresholds beside a checkpoint's weights.

    Raises:
        CheckpointError: The folder is no checkpoint.
        OutputError: It cannot be written.
    """
    if not _is_checkpoint(folder):
        raise CheckpointError(f"{folder} is no checkpoint: it lacks {CONFIG_FILE} or {WEIGHTS_FILE}")
    write_atomically(folder / THRESHOLDS_FILE, _as_json(thresholds))
    return folder / THRESHOLDS_FILE


def _as_json(thresholds: StoredThresholds) -> str:
    return json.dumps(asdict(thresholds), indent=2) + "\n"


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


def heads_fingerprint(state: Mapping[str, Tensor], config: Config) -> str:
    """`fingerprint` of what probabilities and masks depend on: it stays when a report writer is trained later.

    Args:
        state: From `VLM3DMultiTask.checkpoint_state_dict`.
        config: Of the model; how masks are read counts.
    """
    parts = ("vision_encoder.", "classifier.", "localizer.")
    heads = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    if config.model.localizer.read_mirrored:
        heads["localizer.read_mirrored"] = torch.ones(())
    return fingerprint(heads)


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
