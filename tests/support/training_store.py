"""A prepared store of coarse phantoms and a configuration that trains on it in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from support.phantoms import COARSE_MM
from support.small_models import SMALL, small_language_model, small_text_encoder
from vlm3d.config import Config, config_from_dict
from vlm3d.datasets.phantom_source import find_phantom_cases
from vlm3d.datasets.prepare import prepare

SPACING = "x".join(f"{side:g}" for side in COARSE_MM)


def write_small_pretrained(folder: Path) -> dict[str, Any]:
    """Write the two-layer text and language model as folders; returns the settings that name them."""
    text, llm = small_text_encoder(), small_language_model(lora=False)
    text.model.save_pretrained(folder / "bert")
    text.tokenizer.save_pretrained(folder / "bert")
    llm.model.save_pretrained(folder / "llm")
    llm.tokenizer.save_pretrained(folder / "llm")
    return {"text_encoder": str(folder / "bert"), "llm_name": str(folder / "llm")}


def training_config(pretrained: dict[str, Any], **training: Any) -> Config:
    """The two-layer model with phases of a few steps; keywords go to the training section."""
    model = SMALL["model"]
    assert isinstance(model, dict)
    phase = {"steps": 6, "warmup_steps": 2, "lr": 1e-3, "batch_size": 2}
    phases = {
        "local": {**phase, "scan_crop": [16, 48, 48]},
        "classification": phase,
        "localization": {**phase, "boxes_per_scan": 1, "scan_crop": None, "localization_crop": [24, 48, 48]},
        "alignment": {**phase, "batch_size": 1},
        "joint": {
            **phase,
            "batch_size": 1,
            "localization_crop": [24, 48, 48],
            "unfreeze_blocks": [[0.0, 0], [0.5, 1]],
        },
    }
    values = {
        **SMALL,
        "model": {
            **model,
            "classifier": {**model["classifier"], "text_encoder": pretrained["text_encoder"], "dropout": 0.1},
            "report": {**model["report"], "llm_name": pretrained["llm_name"]},
        },
        "training": {
            "phases": phases,
            "loader_workers": 0,
            "log_every": 1,
            "checkpoint_every": 2,
            "validate_every": 100,
            "validation_reports": 1,
            "sample_cases": 1,
            **training,
        },
    }
    return config_from_dict(values, "test")


def phantom_store(folder: Path, config: Config, *, train: int = 5, valid: int = 2) -> Path:
    """A store of coarse phantoms, made by the same functions as any other."""
    cases = find_phantom_cases(f"phantom:0-{train}:spacing={SPACING},split=train")
    if valid:
        cases += find_phantom_cases(f"phantom:900-{900 + valid}:spacing={SPACING},split=valid")
    summary = prepare(cases, folder, config.preprocessing, anatomy="given", workers=1)
    assert not summary.failed
    return folder


def losses(metrics: list[dict[str, Any]], task: str = "total") -> np.ndarray:
    """A loss of every logged step."""
    return np.array([line[f"train/{task}"] for line in metrics if f"train/{task}" in line])
