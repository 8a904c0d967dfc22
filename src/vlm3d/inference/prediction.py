"""What one prediction holds: the schema of `prediction.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.0"

DISCLAIMER = "Research software, not a medical device. Not for diagnosis or treatment."

Training = Literal["untrained", "synthetic", "trained"]

TRAINING_NOTES: dict[Training, str] = {
    "untrained": "UNTRAINED weights: every probability, mask and sentence below is random and means nothing.",
    "synthetic": "Weights trained on synthetic phantoms only: nothing below has been validated on patients.",
    "trained": "",
}

UNTRAINED_TASK_NOTES: dict[str, str] = {
    "classification": "The classifier was NOT TRAINED: its probabilities are random and mean nothing.",
    "localization": "The localizer was NOT TRAINED: its masks are random and mean nothing.",
    "generation": "The report writer was NOT TRAINED: its sentences are random and mean nothing.",
}
"""By task of the model, for weights of which only a part was trained."""


class Model(BaseModel):
    """Base of the schema: unknown keys are refused on reading."""

    model_config = ConfigDict(extra="forbid")


class DiseaseFinding(Model):
    """One disease of the classifier."""

    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float = Field(ge=0, le=1)
    positive: bool
    uncertainty: float = Field(ge=0, le=1, description="Binary entropy of the probability, in bits.")


class LesionComponent(Model):
    """One connected piece of a lesion mask, measured on the scan's own grid."""

    side: Literal["right", "left", "midline"]
    region: str = Field(
        description="Name of the anatomical region that holds most of it, such as 'right upper lobe'."
    )
    level: Literal["upper", "middle", "lower"] = Field(description="Third of the lungs' height.")
    volume_ml: float = Field(ge=0)
    max_diameter_mm: float = Field(ge=0, description="Largest in-plane (axial) extent.")
    centroid_ras_mm: tuple[float, float, float]
    centroid_index_dhw: tuple[int, int, int] = Field(
        description="In the canonical array: D superior, H posterior, W left."
    )
    key_slice: int = Field(description="Canonical slice index where its area is largest.")
    mean_probability: float = Field(ge=0, le=1)


class LesionFinding(Model):
    """One lesion of the localizer."""

    key: str
    name: str
    mask_file: str | None = Field(
        description="Relative to prediction.json; None when masks were not written."
    )
    threshold: float = Field(ge=0, le=1)
    max_probability: float = Field(ge=0, le=1)
    uncertainty: float = Field(
        ge=0, le=1, description="Mean binary entropy inside the mask and its one-voxel rim, in bits."
    )
    volume_ml: float = Field(ge=0)
    components: list[LesionComponent] = Field(description="Largest first.")
    components_left_out: int = Field(
        0, ge=0, description="Smaller pieces counted in volume_ml but not listed."
    )


class Report(Model):
    """The clinical report."""

    text: str
    findings: str
    impression: str
    recommendations: str
    uncertainty: float | None = Field(
        None, ge=0, description="Mean surprisal of the written tokens, in bits."
    )
    generated: bool = Field(description="False when report generation was switched off.")


class ScanInfo(Model):
    """The scan, without patient data."""

    source: str
    shape_dhw: tuple[int, int, int]
    spacing_mm_dhw: tuple[float, float, float]
    orientation: str = Field(description="Axis codes of the file's grid, such as 'LPS'.")
    model_grid_dhw: tuple[int, int, int]
    model_spacing_mm_dhw: tuple[float, float, float]
    anatomy: str = Field(
        description="Where the regions come from: classical, file, totalsegmentator or none."
    )
    notes: list[str]


class ModelInfo(Model):
    """The model that made the prediction."""

    config: str
    checkpoint: str
    fingerprint: str = Field(description="SHA-256 over the weights, shortened to 16 digits.")
    training: Training
    llm: str
    parameters: int


class Prediction(Model):
    """All that one scan's prediction holds."""

    schema_version: str = SCHEMA_VERSION
    disclaimer: str = DISCLAIMER
    training_note: str
    created: str = Field(description="ISO 8601, UTC.")
    versions: dict[str, str]
    settings: dict[str, object]
    scan: ScanInfo
    model: ModelInfo
    diseases: list[DiseaseFinding] = Field(description="In CT-RATE's order.")
    lesions: list[LesionFinding]
    report: Report
    seconds: dict[str, float] = Field(description="Wall time a stage.")
    peak_rss_mb: float
