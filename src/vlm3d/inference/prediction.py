"""What one prediction holds: the schema of `prediction.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.4"

DISCLAIMER = "Research software, not a medical device. Not for diagnosis or treatment."

Training = Literal["untrained", "synthetic", "trained"]
Policy = Literal["flag", "regenerate", "repair"]
Told = Literal["positive", "negative", "uncertain", "historical"]
Section = Literal["findings", "impression", "recommendations"]
Agreement = Literal["agrees", "wrong_side", "wrong_lobe", "unmeasured"]
ContradictionKind = Literal[
    "unsupported", "denied", "wrong_side", "wrong_lobe", "wrong_size", "called_normal", "not_mentioned"
]

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


OTHER_ANATOMY_NOTE = (
    "These weights learned with another anatomy ({learned}) than was found for this scan ({found}): "
    "expect findings and masks that are not there."
)
"""Where regions were searched by a way that no training scan's were; of a user's own mask nobody knows."""


class Model(BaseModel):
    """Base of the schema: unknown keys are refused on reading."""

    model_config = ConfigDict(extra="forbid")


class AttentionPlace(Model):
    """A place at which the classifier looked for a disease: no outline, and no finer than a patch."""

    side: Literal["right", "left"]
    region: str = Field(description="Name of a lobe; empty for what is told by its side alone.")
    level: Literal["upper", "middle", "lower"] = Field(description="Third of the lungs' height.")
    key_slice: int | None = Field(None, description="Canonical slice index of its center, 0 at the feet.")


class DiseaseFinding(Model):
    """One disease of the classifier."""

    name: str
    probability: float = Field(ge=0, le=1)
    threshold: float = Field(ge=0, le=1)
    positive: bool
    uncertainty: float = Field(ge=0, le=1, description="Binary entropy of the probability, in bits.")
    places: list[AttentionPlace] = Field(
        [], description="Of a positive disease that no mask shows, the place most looked at first."
    )


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
    key_slice: int = Field(description="Canonical slice index where its area is largest, 0 at the feet.")
    mean_probability: float = Field(ge=0, le=1)


class LesionFinding(Model):
    """One lesion of the localizer."""

    key: str
    name: str
    mask_file: str | None = Field(
        description="Relative to prediction.json; None when masks were not written."
    )
    threshold: float = Field(ge=0, le=1)
    presence: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability that the scan has it, from classifier and mask together; None where none was fitted.",
    )
    presence_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Below it nothing is drawn; above it unsure pieces can still be left out.",
    )
    expected_dice: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Dice that the mask expects, from how such voxels fared in validation, were all its pieces drawn; "
        "None where nothing was fitted.",
    )
    max_probability: float = Field(ge=0, le=1, description="Of the surest voxel; 0 where nothing is drawn.")
    uncertainty: float = Field(
        ge=0, le=1, description="Mean binary entropy inside the mask and its one-voxel rim, in bits."
    )
    volume_ml: float = Field(ge=0)
    components: list[LesionComponent] = Field(
        description="Connected pieces, those that spread over lobes or both sides parted there; largest first."
    )
    components_left_out: int = Field(
        0, ge=0, description="Smaller pieces counted in volume_ml but not listed."
    )
    volume_ml_by_region: dict[str, float] = Field(
        {}, description="By name of the anatomical region; what lies in none is left out."
    )


class ToldPlace(Model):
    """One place at which a sentence tells a finding, with the piece of a mask that is meant."""

    side: str | None = Field(None, description="right, left, midline, or None where the words leave it open.")
    region: str | None = Field(None, description="Key of the anatomical region, such as right_upper_lobe.")
    level: str | None = Field(None, description="upper, middle or lower third of the lungs.")
    size_mm: float | None = Field(None, ge=0)
    agreement: Agreement = Field(
        description="With the finding's masks, or else with where the classifier looked; unmeasured where neither tells."
    )
    lesion: str | None = Field(None, description="Key of the lesion whose mask shows it.")
    component: int | None = Field(
        None, ge=0, description="Index in the lesion's components: the piece that fits the words best."
    )
    key_slice: int | None = Field(
        None, description="Of that piece, or of where the classifier looked: canonical slice index."
    )


class SentenceFinding(Model):
    """One disease that a sentence names."""

    name: str
    status: Told
    affirmed: bool = Field(description="Whether the words make the finding present, doubt included.")
    start: int = Field(ge=0, description="Index in report.text of the words that name it.")
    end: int = Field(ge=0, description="Index past them.")
    probability: float | None = Field(
        None, ge=0, le=1, description="None: the classifier lacks this disease."
    )
    threshold: float | None = Field(None, ge=0, le=1)
    positive: bool | None = Field(None, description="Whether the probability reaches the threshold.")
    in_mask: bool = Field(False, description="A lesion mask of this disease has at least one piece.")
    places: list[ToldPlace] = Field([], description="Of affirmed findings, outside the recommendations.")


class ReportSentence(Model):
    """One sentence of the report, and what it rests on."""

    text: str
    section: Section
    start: int = Field(ge=0, description="Index in report.text of its first character.")
    end: int = Field(ge=0, description="Index past its last character.")
    findings: list[SentenceFinding] = []
    lesion: str | None = Field(None, description="Of the place that the sentence leads to first.")
    component: int | None = Field(None, ge=0)
    key_slice: int | None = None
    supported: bool | None = Field(
        None, description="False if it contradicts a head; None where it says nothing that a head knows."
    )
    origin: Literal["model", "repair"] = "model"


class Contradiction(Model):
    """Something that the report says, or leaves out, against the model's own heads."""

    kind: ContradictionKind
    finding: str = Field(description="Name of the disease; empty where the whole scan is called normal.")
    sentence: int | None = Field(None, ge=0, description="Index in report.sentences; None for an omission.")
    message: str


class ReportEdit(Model):
    """A sentence that a repair removed or added."""

    action: Literal["removed", "added"]
    section: Section
    text: str
    reason: str


class ReportCheck(Model):
    """The report held against the model's own probabilities and masks."""

    policy: Policy
    count: int = Field(ge=0, description="Contradictions that remain in the report as it stands.")
    contradictions: list[Contradiction] = []
    counts_by_attempt: list[int] = Field([], description="Contradictions of each report written, in turn.")
    attempt: int = Field(0, ge=0, description="Which of them was kept.")
    edits: list[ReportEdit] = []
    text_before_repair: str | None = Field(None, description="What the model wrote, where it was changed.")


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
    sentences: list[ReportSentence] = Field([], description="In the order of the text.")
    check: ReportCheck | None = Field(None, description="None when no report was written.")


class ScanInfo(Model):
    """The scan, without what its header says of the patient."""

    source: str = Field(description="Name of the file or folder, as the user gave it.")
    shape_dhw: tuple[int, int, int]
    spacing_mm_dhw: tuple[float, float, float]
    orientation: str = Field(
        description="Where the axes (D, H, W) of the grid point, such as 'SPL': the letters that nibabel gives, backward."
    )
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
    untrained_tasks: list[str] = Field([], description="Tasks that the weights never learned.")
    thresholds: str = Field("0.5 for every disease", description="Where the diseases' thresholds come from.")


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
