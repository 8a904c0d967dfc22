"""What a caller may choose for a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vlm3d.errors import ConfigError
from vlm3d.inference.prediction import Policy
from vlm3d.labels import MIN_LESION_ML

AnatomyMethod = Literal["classical", "totalsegmentator", "none"]
MaskLabels = Literal["auto", "vlm3d", "totalsegmentator"]


@dataclass(frozen=True)
class PredictionSettings:
    """What a caller may choose for a prediction.

    Attributes:
        anatomy: Where the regions come from when no mask file is given.
        mask_labels: Whose ids a mask file holds; see `read_region_mask`.
        classification_threshold: Probabilities from here on are positive; None takes the thresholds that are stored
            with the checkpoint, else 0.5.
        localization_threshold: Voxel probabilities from here on are lesion.
        min_lesion_ml: Smaller pieces are removed from the masks.
        report: Whether to write a report.
        max_new_tokens: Longest report; None takes the model's own.
        temperature: 0 decodes greedily; None takes the model's own.
        top_p: Nucleus of sampling; None takes the model's own.
        num_beams: Above 1 the report's sections are the likeliest that so many beams find, at temperature 0; None takes
            the model's own.
        seed: Makes sampling reproducible.
        on_contradiction: What happens to a report that contradicts the model's own findings: it is flagged, written
            again, or repaired; see `vlm3d.inference.consistency.consistent_report`.
        regenerate_attempts: How often it is written again at most.
    """

    anatomy: AnatomyMethod = "classical"
    mask_labels: MaskLabels = "auto"
    classification_threshold: float | None = None
    localization_threshold: float = 0.5
    min_lesion_ml: float = MIN_LESION_ML
    report: bool = True
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    num_beams: int | None = None
    seed: int = 0
    on_contradiction: Policy = "repair"
    regenerate_attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("classification_threshold", "localization_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"{name} is a probability between 0 and 1, got {value}")
        if self.min_lesion_ml < 0:
            raise ConfigError(f"min_lesion_ml is a volume of 0 or more, got {self.min_lesion_ml}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is 1 or more, got {self.max_new_tokens}")
        if self.temperature is not None and self.temperature < 0:
            raise ConfigError(f"temperature is 0 or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is above 0 and at most 1, got {self.top_p}")
        if self.num_beams is not None and (self.num_beams < 1 or (self.num_beams > 1 and self.temperature)):
            raise ConfigError(f"num_beams is 1 or more, and 1 where words are sampled, got {self.num_beams}")
        if self.on_contradiction not in get_args(Policy):
            raise ConfigError(
                f"on_contradiction is {', '.join(get_args(Policy))}, got '{self.on_contradiction}'"
            )
        if self.regenerate_attempts < 1:
            raise ConfigError(f"regenerate_attempts is 1 or more, got {self.regenerate_attempts}")
