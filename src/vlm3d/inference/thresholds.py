"""From which probability on a disease is positive: tuned on a validation split, kept with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm3d.errors import CheckpointError, ConfigError, InputError
from vlm3d.evaluation.fusion_fitting import MASK_VARIATIONS
from vlm3d.evaluation.thresholds import Objective
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.checkpoint import (
    THRESHOLDS_FILE,
    StoredThresholds,
    heads_fingerprint,
    locate_checkpoint,
    read_thresholds,
    write_thresholds,
)
from vlm3d.model.multi_task_model import VLM3DMultiTask


def thresholds_for(model: VLM3DMultiTask, checkpoint: str | Path) -> StoredThresholds | None:
    """The thresholds that lie beside a checkpoint; None where none do.

    Raises:
        CheckpointError: The file is damaged, or was tuned for other weights than the model's.
    """
    folder = locate_checkpoint(checkpoint)
    thresholds = read_thresholds(folder)
    if thresholds is not None and not thresholds.fits(model.checkpoint_state_dict(), model.config):
        raise CheckpointError(
            f"{folder}/{THRESHOLDS_FILE} was tuned for other weights than these: delete it, or tune it again "
            "with 'vlm3d tune'"
        )
    return thresholds


def tune_checkpoint(
    checkpoint: str | Path,
    store: Path,
    *,
    split: str = "valid",
    objective: Objective = "f1",
    device: str = "cpu",
    variations: int = MASK_VARIATIONS,
    progress: Callable[[int, int], None] | None = None,
) -> StoredThresholds:
    """Weigh classifier and localizer on a split of a prepared store, choose thresholds and cuts, and keep all.

    A disease without a positive case there keeps 0.5.

    Args:
        checkpoint: Folder or Hub name; ``thresholds.json`` is written into its folder.
        store: Prepared as the model needs it.
        split: To tune on; never the one that the weights were trained on.
        objective: What the thresholds maximize.
        device: That the model runs on.
        variations: How often each scan is varied, as in the training of these weights, for the rules of the masks.
        progress: Called with the number of cases done and of all.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The split is the training split, the store was prepared for another model, or ``variations`` is
            below 0.
        InputError: The split holds no labeled case.
        OutputError: The folder cannot be written to.
    """
    from vlm3d.datasets.prepared import PreparedDataset
    from vlm3d.evaluation.evaluator import EvaluationSettings
    from vlm3d.evaluation.model_evaluation import tune_on_store

    if split == "train":
        raise ConfigError("thresholds tuned on the training split are too strict; take --split valid")
    if variations < 0:
        raise ConfigError(f"scans are varied 0 times or more, got --variations {variations}")
    dataset = PreparedDataset(store, (split,))
    if not dataset.cases:
        raise InputError(f"{store} holds no case of the split '{split}'; --split names another one")
    folder = locate_checkpoint(checkpoint)
    model = VLM3DMultiTask.from_pretrained(folder, device=device)
    tuned = tune_on_store(
        model,
        dataset,
        EvaluationSettings(objective=objective),
        name=f"split '{split}'",
        variations=variations,
        progress=progress,
    )
    values = {
        name: min(max(float(value), 0.0), 1.0)
        for name, value in zip(DISEASE_NAMES, tuned.thresholds.value_K, strict=True)
    }
    heads = heads_fingerprint(model.checkpoint_state_dict(), model.config)
    stored = StoredThresholds(values, tuned.thresholds.source, heads, tuned.fusion)
    write_thresholds(folder, stored)
    return stored
