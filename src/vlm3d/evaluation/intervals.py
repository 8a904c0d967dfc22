"""How intervals are drawn, and figures as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Intervals:
    """How intervals are drawn.

    Attributes:
        resamples: Of patients; 0 leaves the intervals out.
        level: Share of resamples inside.
        seed: Same seed, same patients.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """In words and numbers."""
        method = "percentile bootstrap over patients" if self.resamples else "none"
        return {"method": method, "level": self.level, "resamples": self.resamples, "seed": self.seed}


def as_json(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists, NaN and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
