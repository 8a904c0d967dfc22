"""The phases by number and name, and what must be true before the first of them starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from vlm3d.config import Config, PhaseConfig
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.datasets.splits import check_no_leak
from vlm3d.errors import ConfigError, DataError
from vlm3d.model.checkpoint import Status

logger = logging.getLogger(__name__)

PHASES: dict[str, str] = {
    "1.0": "local",
    "1.1": "classification",
    "1.2": "localization",
    "1.3": "alignment",
    "2": "joint",
    "3": "grpo",
}
"""Number -> name, in order; names are fields of `vlm3d.config.PhasesConfig`."""

ON_REQUEST = ("grpo",)
"""Phases that run only where they are asked for: they refine a model that is whole without them."""

_SHARDING_TORCH = "2.13"
"""The oldest that was tested; some before it refuse parameters of whole numbers (pytorch, issue 177844)."""


def chosen_phases(asked: Sequence[str] | None) -> list[str]:
    """Names of the phases to run, in their order; all but those of `ON_REQUEST` by default.

    Raises:
        ConfigError: One is neither a number nor a name of `PHASES`.
    """
    if not asked:
        return [name for name in PHASES.values() if name not in ON_REQUEST]
    names = {PHASES.get(phase, phase) for phase in asked}
    foreign = names - set(PHASES.values())
    if foreign:
        known = ", ".join(f"{number} ({name})" for number, name in PHASES.items())
        raise ConfigError(f"unknown phase '{sorted(foreign)[0]}'; phases are {known}")
    return [name for name in PHASES.values() if name in names]


def phase_config(config: Config, name: str) -> PhaseConfig:
    """Settings of a phase."""
    found: PhaseConfig = getattr(config.training.phases, name)
    return found


def phase_number(name: str) -> int:
    """Place of a phase, which tells the phases' random numbers apart."""
    return list(PHASES.values()).index(name) + 1


def check_start(phases: Sequence[str], untrained_tasks: Sequence[str]) -> None:
    """Refuse to refine reports that nothing has taught yet.

    Raises:
        ConfigError: Phase 3 is asked for, and neither the weights that it starts from nor a phase before it write reports.
    """
    taught = "generation" not in untrained_tasks or {"alignment", "joint"} & set(phases)
    if "grpo" in phases and not taught:
        raise ConfigError(
            "phase 3 (grpo) refines a model that writes reports; these weights never learned to: run phase 2 before it, "
            "or start from its checkpoint with --from"
        )


def check_sharding(phases: Sequence[str]) -> None:
    """Refuse what a sharded language model cannot do.

    Raises:
        ConfigError: Phase 3 is asked for.
    """
    if "grpo" in phases:
        raise ConfigError(
            "phase 3 (grpo) samples reports of other lengths in each process, so each needs the whole language model: "
            "set training.shard_language_model=false"
        )


def check_torch_shards_bytes() -> None:
    """Refuse a torch that was not seen to shard NF4 weights.

    Raises:
        ConfigError: It is too old.
    """
    if torch.__version__ < _SHARDING_TORCH:
        raise ConfigError(
            f"training.shard_language_model needs torch {_SHARDING_TORCH}, this is {torch.__version__}"
        )


def check_data(train: PreparedDataset, valid: PreparedDataset, config: Config, phases: Sequence[str]) -> None:
    """Refuse data that the phases cannot learn from, before anything starts.

    Raises:
        ConfigError: The store was prepared for another model.
        DataError: A split is empty, a patient stands in both, or a task has no labels at all.
    """
    train.check(config.preprocessing)
    for split, dataset in (("train", train), ("valid", valid)):
        if not len(dataset):
            raise DataError(f"{dataset.store} has no case in the split '{split}'; see `vlm3d prepare --help`")
    check_no_leak([*train.cases, *valid.cases])
    tasks = {task for name in phases for task in phase_config(config, name).tasks}
    has = {
        "classification": any(c.labels_K is not None and not np.isnan(c.labels_K).all() for c in train.cases),
        "localization": any(case.known_lesions for case in train.cases),
        "generation": any(case.report for case in train.cases),
    }
    words = {"classification": "disease labels", "localization": "lesion masks", "generation": "reports"}
    for task in sorted(tasks):
        if not has[task]:
            raise DataError(f"no training case of {train.store} has {words[task]}, which {task} learns from")


def without_blind_phases(phases: Sequence[str], dataset: PreparedDataset) -> list[str]:
    """Leave phase 1.0 out where no case tells where a finding lies: boxes of a scan could not be labeled."""
    tells = any(any(case.lesion_voxels.values()) or case.facts.get("findings") for case in dataset.cases)
    if not tells and "local" in phases:
        logger.info("phase local is left out: no training case tells where its findings lie")
    return [name for name in phases if tells or name != "local"]


def status_of(dataset: PreparedDataset) -> Status:
    """``"synthetic"`` if only phantoms train, else ``"trained"``."""
    return "synthetic" if all(case.source == "phantom" for case in dataset.cases) else "trained"
