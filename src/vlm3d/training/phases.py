"""The phases by number and name, and what must be true before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm3d.config import Config, PhaseConfig
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.datasets.splits import check_no_leak
from vlm3d.errors import ConfigError, DataError
from vlm3d.model.checkpoint import Status

PHASES: dict[str, str] = {
    "1.1": "classification",
    "1.2": "localization",
    "1.3": "alignment",
    "2": "joint",
}
"""Number -> name, in order; names are fields of `vlm3d.config.PhasesConfig`."""


def chosen_phases(asked: Sequence[str] | None) -> list[str]:
    """Names of the phases to run, in their order; all by default.

    Raises:
        ConfigError: One is neither a number nor a name of `PHASES`.
    """
    if not asked:
        return list(PHASES.values())
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


def status_of(dataset: PreparedDataset) -> Status:
    """``"synthetic"`` if only phantoms train, else ``"trained"``."""
    return "synthetic" if all(case.source == "phantom" for case in dataset.cases) else "trained"
