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
    """Names of the phases that are asked for, in their order; all but those of `ON_REQUEST` by default.

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


def check_start(config: Config, phases: Sequence[str], untrained_tasks: Sequence[str]) -> None:
    """Refuse to refine reports that nothing has taught yet, and warn of masks that are first learned from single scans.

    Raises:
        ConfigError: Phase 3 is asked for, and neither the weights that it starts from nor a phase before it write reports.
    """
    draws = [name for name in phases if "localization" in phase_config(config, name).tasks]
    if draws and "localization" in untrained_tasks and _sees_one_scan(phase_config(config, draws[0])):
        logger.warning(
            "phase %s is the first to learn masks, from single scans, of which the localizer's norms collect nothing: run "
            "phase 1.2 before it, with training.phases.localization.batch_size above its boxes_per_scan",
            draws[0],
        )
    taught = "generation" not in untrained_tasks or {"alignment", "joint"} & set(phases)
    if "grpo" in phases and not taught:
        raise ConfigError(
            "phase 3 (grpo) refines a model that writes reports; these weights never learned to: run phase 2 before it, "
            "or start from its checkpoint with --from"
        )


def _sees_one_scan(phase: PhaseConfig) -> bool:
    return phase.batch_size <= phase.boxes_per_scan


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


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse 16 bits where the device only emulates them.

    Raises:
        ConfigError: It does.
    """
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError("this GPU does not compute in bfloat16: set training.precision=fp32")


_LEARNS_FROM = {"classification": "disease labels", "localization": "lesion masks", "generation": "reports"}


def learnable_phases(
    config: Config, asked: Sequence[str] | None, dataset: PreparedDataset
) -> tuple[Config, list[str]]:
    """The phases to run and what they learn of what the data tells.

    Phase 1.0 is left out where no case tells where a finding lies, since its boxes could not be labeled. A task without a
    single label is left out of a phase that has other tasks; a phase without any is left out, unless it was asked for.

    Args:
        config: Every setting.
        asked: Numbers or names of phases; None are the usual ones.
        dataset: The training split.

    Returns:
        The settings, with ``tasks`` of each phase as it will run, and the names of the phases, in order.

    Raises:
        ConfigError: A phase is unknown.
        DataError: A phase that was asked for, or each of the usual ones, has nothing to learn from.
    """
    told = _told_tasks(dataset)
    tells_places = any(
        case.is_annotated_throughout and (any(case.lesion_voxels.values()) or case.facts.get("findings"))
        for case in dataset.cases
    )
    phases, names = dict[str, PhaseConfig](), list[str]()
    chosen = chosen_phases(asked)
    for name in PHASES.values():
        phase = phase_config(config, name)
        tasks = {task: share for task, share in phase.tasks.items() if task in told}
        phases[name] = phase.model_copy(update={"tasks": tasks}) if tasks else phase
        silent = sorted(set(phase.tasks) - told)
        lacks = " or ".join(_LEARNS_FROM[task] for task in silent)
        if name not in chosen:
            continue
        if not tasks and asked:
            raise DataError(
                f"no training case of {dataset.store} has {lacks}, which phase {name} learns from"
            )
        if not tasks:
            logger.info("phase %s is left out: no training case has %s", name, lacks)
        elif name == "local" and not tells_places:
            logger.info("phase local is left out: no training case tells where its findings lie")
        else:
            names.append(name)
            if silent:
                logger.info(
                    "phase %s goes without %s: no training case has %s", name, ", ".join(silent), lacks
                )
    if not names:
        raise DataError(f"no training case of {dataset.store} has labels, masks or reports to learn from")
    training = config.training.model_copy(update={"phases": config.training.phases.model_copy(update=phases)})
    return config.model_copy(update={"training": training}), names


def _told_tasks(dataset: PreparedDataset) -> set[str]:
    """Tasks of which a case has a label."""
    cases = dataset.cases
    has = {
        "classification": any(c.labels_K is not None and not np.isnan(c.labels_K).all() for c in cases),
        "localization": any(case.known_lesions for case in cases),
        "generation": any(case.report for case in cases),
    }
    return {task for task, any_case in has.items() if any_case}


def check_splits(train: PreparedDataset, valid: PreparedDataset, config: Config) -> None:
    """Refuse splits that a run cannot use, before anything starts.

    Raises:
        ConfigError: The store was prepared for another model.
        DataError: A split is empty, or a patient stands in both.
    """
    train.check(config.preprocessing)
    for split, dataset in (("train", train), ("valid", valid)):
        if not len(dataset):
            raise DataError(f"{dataset.store} has no case in the split '{split}'; see `vlm3d prepare --help`")
    check_no_leak([*train.cases, *valid.cases])


def status_of(dataset: PreparedDataset) -> Status:
    """``"synthetic"`` if only phantoms train, else ``"trained"``."""
    return "synthetic" if all(case.source == "phantom" for case in dataset.cases) else "trained"
