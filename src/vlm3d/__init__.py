"""vlm3d: one 3D vision-language model that reads a chest CT. Research software, not a medical device.

Importing this package costs no torch; the names below load it when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlm3d.version import VERSION as __version__

_PUBLIC = {
    "VLM3DMultiTask": "vlm3d.model.multi_task_model",
    "MultiTaskLoss": "vlm3d.losses",
    "MultiTaskMetrics": "vlm3d.evaluation.metrics",
    "Pipeline": "vlm3d.inference.pipeline",
    "PredictionSettings": "vlm3d.inference.pipeline",
    "Volume": "vlm3d.volume",
    "load_config": "vlm3d.config",
    "read_volume": "vlm3d.io",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from vlm3d.config import load_config as load_config
    from vlm3d.evaluation.metrics import MultiTaskMetrics as MultiTaskMetrics
    from vlm3d.inference.pipeline import Pipeline as Pipeline
    from vlm3d.inference.pipeline import PredictionSettings as PredictionSettings
    from vlm3d.io import read_volume as read_volume
    from vlm3d.losses import MultiTaskLoss as MultiTaskLoss
    from vlm3d.model.multi_task_model import VLM3DMultiTask as VLM3DMultiTask
    from vlm3d.volume import Volume as Volume


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vlm3d' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
