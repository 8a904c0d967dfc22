"""What a run needs to go on exactly where it was: everything but the weights that a checkpoint holds.

```
RUN/last/
├── checkpoint/            weights as they train, a checkpoint folder like any other
├── state.safetensors      the optimizer's moments, the average's weights, the loss's weights
└── state.json             phase, step, best checkpoints, damaged cases
```

No pickle: tensors are safetensors, the rest JSON. The folder is replaced whole, so a kill leaves the one before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm3d.config import AugmentationConfig, Config
from vlm3d.errors import CheckpointError, ConfigError
from vlm3d.io import whole_folder
from vlm3d.model.checkpoint import StoredThresholds
from vlm3d.model.multi_task_model import VLM3DMultiTask

CHECKPOINT_FOLDER = "checkpoint"
STATE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        phase: Name of the running phase.
        step: Steps of it that are done.
        total_steps: Steps of all phases that are done.
        seconds: Spent on them.
        finished: Phases that are done.
        best: Checkpoint's name -> its score, of the running phase.
        damaged: Case id -> how often it was passed over.
        origin: ``training.json`` of the checkpoint that the run started from; None for random weights.
        cases: Digest of the training cases' names.
        processes: That share the work; 0 where a run did not say.
    """

    phase: str
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    finished: list[str] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    origin: dict[str, Any] | None = None
    cases: str = ""
    processes: int = 0


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimizer's moments by parameter and name."""
    return {
        f"optimizer/{names[parameter]}/{key}": value if torch.is_tensor(value) else torch.tensor(value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter_name, _, key = rest.rpartition("/")
            found.setdefault(parameter_name, {})[key] = tensor
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = found.get(names[parameter])
            if state is not None:
                optimizer.state[parameter] = {
                    key: tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True)
                    for key, tensor in state.items()
                }


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that start with a prefix."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, by their own names."""
    return {
        name.removeprefix(f"{prefix}/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def write_state(
    folder: Path,
    model: VLM3DMultiTask,
    state: RunState,
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Any],
    thresholds: StoredThresholds | None = None,
) -> None:
    """Write a point to resume from, whole or not at all; thresholds as `VLM3DMultiTask.save_pretrained` takes them.

    Raises:
        OutputError: It cannot be written.
    """
    with whole_folder(folder) as fresh:
        model.save_pretrained(fresh / CHECKPOINT_FOLDER, training=training, thresholds=thresholds)
        try:
            save_file(
                {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, fresh / TENSORS_FILE
            )
        except SafetensorError as error:
            raise OSError(str(error).splitlines()[0]) from error
        (fresh / STATE_FILE).write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")


def read_state(folder: Path) -> tuple[RunState, dict[str, Tensor]]:
    """Read what `write_state` wrote, without the weights.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not set(values) <= {item.name for item in fields(RunState)}:
            raise ValueError("foreign fields")
        return RunState(**values), load_file(folder / TENSORS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is no point to resume from: {str(error).splitlines()[0]}. Start the phase anew in another folder."
        ) from error


def refuse_other_settings(known: Path, config: Config) -> None:
    """Let a run go on only with the settings that it began with.

    Args:
        known: ``config.json`` of the run.
        config: Of now.

    Raises:
        ConfigError: A setting is another; the message names it.
    """
    before, now = json.loads(known.read_text(encoding="utf-8")), config.model_dump(mode="json")
    # a phase that came to vlm3d later changes none of those that this run knew
    before["training"]["phases"] = now["training"]["phases"] | before["training"]["phases"]
    usual = AugmentationConfig().model_dump(mode="json")  # what came later is off by itself
    before["training"]["augmentation"] = usual | before["training"]["augmentation"]
    # where weights lie changes nothing that is learned
    before["training"]["shard_language_model"] = now["training"]["shard_language_model"]
    before["training"].setdefault("task_weight_lr", now["training"]["task_weight_lr"])
    before["model"]["localizer"].setdefault("read_mirrored", False)
    changed = sorted(_differences(before, now))
    if changed:
        raise ConfigError(
            f"{known.parent} holds a run with another {changed[0]}: give the same settings, or another folder"
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key
