"""Settings: every field typed, with one line of documentation, and one YAML file a model size.

`load_config("tiny")` reads a shipped size, `load_config("my.yaml", ["model.vision.depth=8"])` a file with overrides.
A YAML file states only what differs from the defaults below, and may name the size it starts from with ``base:``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm3d.errors import ConfigError

Task = Literal["classification", "localization", "generation"]
Part = Literal["vision", "classifier", "localizer", "projector", "adapters"]
SHIPPED_CONFIGS = ("tiny", "small", "medium", "large")


class Section(BaseModel):
    """A group of settings; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PreprocessingConfig(Section):
    """How a scan becomes the model's input."""

    spacing_mm: tuple[float, float, float] = Field(
        (1.5, 0.75, 0.75), description="Voxel size (D, H, W) in mm."
    )
    max_shape: tuple[int, int, int] = Field(
        (240, 480, 480), description="Largest grid (D, H, W); larger scans are cropped."
    )
    fixed_shape: bool = Field(False, description="Pad every scan to max_shape, as CT-CLIP does.")
    crop: Literal["center", "lungs"] = Field(
        "lungs", description="Where max_shape is cut: around the lungs, or the middle."
    )
    crop_margin_mm: float = Field(20.0, ge=0, description="Kept around the lungs on each side, in mm.")
    hu_window: tuple[float, float] = Field(
        (-1000.0, 1000.0), description="HU that map to -1 and 1; clipped outside."
    )
    size_multiple: tuple[int, int, int] = Field(
        (4, 16, 16), description="The grid is padded to multiples of the patch."
    )
    antialias: bool = Field(True, description="Average over what one voxel covers where the grid coarsens.")
    ctclip_sizes: bool = Field(
        False, description="Size int(shape x scale) with the spacing stretched to fit, as CT-CLIP does."
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> PreprocessingConfig:
        if min(self.spacing_mm) <= 0 or min(self.size_multiple) < 1 or min(self.max_shape) < 1:
            raise ValueError("spacing_mm, size_multiple and max_shape must be positive")
        if any(size % multiple for size, multiple in zip(self.max_shape, self.size_multiple, strict=True)):
            raise ValueError(
                f"max_shape {self.max_shape} is not a multiple of size_multiple {self.size_multiple}"
            )
        if self.hu_window[0] >= self.hu_window[1]:
            raise ValueError(f"hu_window {self.hu_window} must be (lower, upper)")
        return self


class VisionConfig(Section):
    """`ThreeDVisionEncoder`."""

    in_channels: int = Field(1, ge=1, description="Image channels.")
    patch_size: tuple[int, int, int] = Field((4, 16, 16), description="Voxels a patch (D, H, W).")
    bands: tuple[tuple[float, float], ...] = Field(
        (),
        description="Ranges of the input (-1..1) also shown spread out, a channel each, as a reader sets windows.",
    )
    region_groups: tuple[tuple[int, ...], ...] = Field(
        (),
        description="Groups of region ids in which each patch's intensities are counted; empty counts none.",
    )
    peak_shells: tuple[tuple[int, int, int], ...] = Field(
        (),
        description="Distances (D, H, W) in voxels at which each voxel is compared with those around it, to tell spots, "
        "holes and ridges of that size: a patch tells its strongest, and spots and holes are channels besides; "
        "needs region_groups.",
    )
    stem_channels: tuple[int, ...] | None = Field(
        None,
        description="Widths of a convolutional stem before the last step; None is one linear projection.",
    )
    embed_dim: int = Field(768, ge=4, description="Width C of a token.")
    depth: int = Field(12, ge=1, description="Transformer blocks.")
    num_heads: int = Field(12, ge=1, description="Attention heads; must divide embed_dim.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of a block's MLP over embed_dim.")
    position_grid: tuple[int, int, int] = Field(
        (64, 32, 32), description="Entries of the z, y, x position tables."
    )
    max_slice_distance: int = Field(
        64, ge=1, description="Slice distances (in patches) with a bias of their own; larger share the last."
    )
    num_regions: int = Field(20, ge=1, description="Anatomical regions, without background.")
    region_every: int = Field(3, ge=1, description="Every n-th block also attends to region tokens.")
    region_dim: int = Field(128, ge=4, description="Inner width of region attention.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute blocks in the backward pass to save memory."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> VisionConfig:
        if any(low >= high for low, high in self.bands):
            raise ValueError(f"bands are (lower, upper), got {self.bands}")
        foreign = {region for group in self.region_groups for region in group} - set(
            range(1, self.num_regions + 1)
        )
        if foreign:
            raise ValueError(f"region_groups hold ids 1..{self.num_regions}, got {sorted(foreign)}")
        if self.peak_shells and not self.region_groups:
            raise ValueError("peak_shells need region_groups, in which their peaks are told apart")
        if any(min(shell) < 1 for shell in self.peak_shells):
            raise ValueError(f"peak_shells are at least 1 voxel along each axis, got {self.peak_shells}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class ClassifierConfig(Section):
    """`MultiLabelClassifier`."""

    num_diseases: int = Field(18, ge=1, description="Labels; the first 18 are CT-RATE's.")
    text_encoder: str = Field(
        "emilyalsentzer/Bio_ClinicalBERT", description="Frozen text encoder: Hub name or folder."
    )
    shared_dim: int = Field(256, ge=1, description="Width of the space where image and text meet.")
    num_soft_prompts: int = Field(
        4, ge=0, description="Learned vectors in front of each prompt's text features."
    )
    class_weights: tuple[float, ...] | None = Field(None, description="Weight of each disease in the loss.")
    dropout: float = Field(0.1, ge=0, lt=1, description="On the image features.")

    @model_validator(mode="after")
    def _one_weight_a_class(self) -> ClassifierConfig:
        if self.class_weights is not None and len(self.class_weights) != self.num_diseases:
            raise ValueError(f"{len(self.class_weights)} class_weights for {self.num_diseases} diseases")
        return self


class LocalizerConfig(Section):
    """`LesionLocalizationModule`."""

    num_lesion_diseases: int = Field(
        5, ge=1, description="Lesion prompts: 5 lesions, 3 lung signs, then diseases."
    )
    denoiser_depth: int = Field(4, ge=1, description="Layers of the denoising transformer.")
    denoiser_heads: int = Field(12, ge=1, description="Its attention heads.")
    denoiser_mlp_ratio: float = Field(1.0, gt=0, description="Its MLP's hidden width over embed_dim.")
    base_channels: int = Field(
        64, ge=4, description="U-Net width two scales below full resolution; halves upward, doubles downward."
    )
    bottleneck_channels: int = Field(
        448, ge=4, description="U-Net width on the patch grid, where denoised features enter."
    )
    text_dim: int = Field(128, ge=4, description="Width of the text features that gate the U-Net.")
    region_channels: int = Field(
        4,
        ge=0,
        description="Channels that tell the U-Net each voxel's region beside its intensity; 0 tells none.",
    )
    read_mirrored: bool = Field(
        False,
        description="In prediction, also draw in the scan mirrored left to right and take the mean: for masks learned with "
        "`flip_probability`. Encoding and localizing take twice as long.",
    )


class ReportConfig(Section):
    """`ReportGenerator`."""

    llm_name: str = Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct", description="Language model: Hub name or folder."
    )
    num_queries: int = Field(32, ge=1, description="Visual tokens that the projector hands to the LLM.")
    projector_dim: int = Field(768, ge=4, description="Inner width of the projector.")
    projector_depth: int = Field(4, ge=1, description="Cross-attention layers of the projector.")
    use_lora: bool = Field(True, description="Train low-rank adapters in the LLM.")
    lora_rank: int = Field(64, ge=1, description="Rank of the adapters.")
    lora_alpha: int = Field(128, ge=1, description="Scale of the adapters, over the rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in the adapters.")
    load_in_4bit: bool = Field(False, description="Hold the LLM in NF4 (needs the extra 'quant').")
    location_strategy: Literal["text", "embedding", "both", "none"] = Field(
        "text", description="How findings and lesion locations reach the LLM."
    )
    max_new_tokens: int = Field(256, ge=1, description="Longest report, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily.")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of sampling.")
    num_beams: int = Field(1, ge=1, description="Beams of the search for the likeliest report; 1 is greedy.")


class LossConfig(Section):
    """`MultiTaskLoss`."""

    weight_classification: float = Field(1.0, ge=0, description="Fixed weight of the classification loss.")
    weight_localization: float = Field(2.0, ge=0, description="Fixed weight of the localization loss.")
    weight_generation: float = Field(1.5, ge=0, description="Fixed weight of the report loss.")
    balancing: Literal["fixed", "uncertainty", "gradnorm"] = Field(
        "fixed", description="How the tasks are weighed."
    )
    focal_gamma: float = Field(0.0, ge=0, description="0 is plain BCE; 2 is the usual focal loss.")
    text_alignment_weight: float = Field(
        0.1, ge=0, description="Weight of the text-alignment term of localization."
    )
    consistency_weight: float = Field(0.05, ge=0, description="Weight of the consistency between scales.")
    evidence_weight: float = Field(
        0.5,
        ge=0,
        description="Weight of telling patches that show a disease from others, within classification; 0 leaves it out.",
    )


class AugmentationConfig(Section):
    """`vlm3d.datasets.augmentation.Augmenter`: how a training scan is varied, so that none is shown twice alike.

    The defaults keep what a CT measures: Hounsfield units move by less than the step from fluid to soft tissue, the table
    stays below the patient, nothing is blanked out, and no side changes.
    """

    geometry_probability: float = Field(
        0.8, ge=0, le=1, description="Share of scans that are turned, scaled and moved."
    )
    rotate_degrees: float = Field(8.0, ge=0, le=45, description="Turned in the axial plane by up to +- this.")
    scale: float = Field(
        0.08, ge=0, le=0.5, description="Each axis grows or shrinks on its own by up to this share."
    )
    translate_voxels: tuple[float, float, float] = Field(
        (3.0, 8.0, 8.0), description="Moved along (D, H, W) by up to +- this many voxels."
    )
    flip_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share mirrored left to right, sided regions and words with it; 0 as no patient's heart is there.",
    )
    intensity_probability: float = Field(
        0.5, ge=0, le=1, description="Share whose HU are moved by gamma, contrast and brightness_hu."
    )
    gamma: float = Field(
        0.03, ge=0, le=1, description="Bends -1000..1000 HU by a power of up to exp(+- this)."
    )
    contrast: float = Field(0.03, ge=0, lt=1, description="Scales HU about water by up to this share.")
    brightness_hu: float = Field(12.0, ge=0, description="Shifts all HU by up to +- this.")
    noise_probability: float = Field(0.3, ge=0, le=1, description="Share that gets noise.")
    noise_hu: float = Field(
        25.0, ge=0, description="Largest standard deviation of the noise, before the kernel."
    )
    blur_probability: float = Field(0.3, ge=0, le=1, description="Share with a softer or sharper kernel.")
    blur_mm: float = Field(
        0.8, ge=0, description="Widest Gaussian of the kernel's change, its sigma in mm within the slice."
    )
    lowres_probability: float = Field(0.15, ge=0, le=1, description="Share averaged into thick slices.")
    lowres_slices: float = Field(3.0, ge=1, description="Most slices that become one thick slice.")
    motion_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share that breathes, and share whose heart (if its region is known) beats; 0 as real scans move.",
    )
    breath_mm: float = Field(6.0, ge=0, description="Largest shift of the diaphragm's second contour.")
    heartbeat_mm: float = Field(4.0, ge=0, description="Largest shift of the heart's second contour.")
    cutout_boxes: int = Field(
        0,
        ge=0,
        description="Boxes blanked, never over a lesion mask; 0 as a finding without a mask may lie in one.",
    )
    cutout_mm: float = Field(30.0, gt=0, description="Longest edge of such a box, in mm.")

    @model_validator(mode="after")
    def _moves_both_ways(self) -> AugmentationConfig:
        if min(self.translate_voxels) < 0:
            raise ValueError(
                f"translate_voxels {self.translate_voxels} are largest moves and cannot be negative"
            )
        return self


class ModelConfig(Section):
    """Everything that fixes the model's tensors."""

    vision: VisionConfig = VisionConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    localizer: LocalizerConfig = LocalizerConfig()
    report: ReportConfig = ReportConfig()


class PhaseConfig(Section):
    """One phase of training: what learns, from which tasks, for how long."""

    tasks: dict[Task, float] = Field({}, description="Task -> chance that a step runs it.")
    parts: tuple[Part, ...] = Field((), description="Parts of the model that learn; all others stand still.")
    steps: int = Field(10_000, ge=1, description="Steps of the optimizer.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    lr_scale: dict[Part, float] = Field({}, description="Part -> factor on the learning rate.")
    warmup_steps: int = Field(500, ge=0, description="Steps of linear warm-up; a cosine follows.")
    batch_size: int = Field(1, ge=1, description="Scans a process and forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes a step of the optimizer.")
    localization_crop: tuple[int, int, int] | None = Field(
        None, description="Voxels (D, H, W) of the box that masks are drawn in; None draws the whole scan."
    )
    scan_crop: tuple[int, int, int] | None = Field(
        None,
        description="Voxels (D, H, W) of the box that is all the model sees of a scan; None shows it whole.",
    )
    boxes_per_scan: int = Field(
        1,
        ge=1,
        description="Boxes drawn from a scan once it is read and varied; reading one costs as much as a box.",
    )
    lesion_crops: float = Field(0.67, ge=0, le=1, description="Share of boxes laid over a lesion.")
    unfreeze_blocks: tuple[tuple[float, int], ...] = Field(
        (),
        description="(Share of the steps, blocks): from there on the encoder's last blocks learn; empty: all, at once.",
    )
    predicted_findings: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of steps, at the end, whose reports build on predicted findings; rises from 0.",
    )
    train_prompts: bool = Field(
        True, description="Whether the soft prompts learn; if not, no step runs the text encoder."
    )
    without_regions: float = Field(0.1, ge=0, le=1, description="Share of scans shown without their anatomy.")

    @model_validator(mode="after")
    def _makes_sense(self) -> PhaseConfig:
        if any(not 0 < chance <= 1 for chance in self.tasks.values()):
            raise ValueError("a task's chance lies in (0, 1]; leave a task out to never run it")
        if any(not 0 <= start < 1 or count < 0 for start, count in self.unfreeze_blocks):
            raise ValueError("unfreeze_blocks takes (share of the steps in 0..1, blocks)")
        return self


class LocalPhase(PhaseConfig):
    """Phase 1.0: encoder and classifier on boxes where findings are known to lie; only if some case tells places."""

    tasks: dict[Task, float] = {"classification": 1.0}
    parts: tuple[Part, ...] = ("vision", "classifier")
    scan_crop: tuple[int, int, int] | None = (48, 80, 80)
    lesion_crops: float = 0.9
    batch_size: int = 6
    boxes_per_scan: int = 2
    train_prompts: bool = False


class ClassificationPhase(PhaseConfig):
    """Phase 1.1: the encoder and the classifier."""

    tasks: dict[Task, float] = {"classification": 1.0}
    parts: tuple[Part, ...] = (
        "vision",
        "classifier",
    )


class LocalizationPhase(PhaseConfig):
    """Phase 1.2: the localizer on the encoder of phase 1.1, in boxes; its norms learn from batches of several."""

    tasks: dict[Task, float] = {"localization": 1.0}
    parts: tuple[Part, ...] = ("localizer",)
    scan_crop: tuple[int, int, int] | None = (64, 192, 192)
    batch_size: int = 4
    boxes_per_scan: int = 2


class AlignmentPhase(PhaseConfig):
    """Phase 1.3: the projector, the language model frozen."""

    tasks: dict[Task, float] = {"generation": 1.0}
    parts: tuple[Part, ...] = ("projector",)


class JointPhase(PhaseConfig):
    """Phase 2: everything together, with low-rank adapters in the language model."""

    tasks: dict[Task, float] = {
        "classification": 1.0,
        "localization": 1.0,
        "generation": 1.0,
    }
    parts: tuple[Part, ...] = (
        "vision",
        "classifier",
        "localizer",
        "projector",
        "adapters",
    )
    lr_scale: dict[Part, float] = {"vision": 0.1}
    unfreeze_blocks: tuple[tuple[float, int], ...] = ((0.0, 0), (0.2, 2), (0.4, 4), (0.6, 1000))
    predicted_findings: float = 0.5


class GrpoPhase(PhaseConfig):
    """Phase 3: reports are sampled, rewarded, and made likelier the better they are than others of the same scan.

    DAPO is ``clip_high=0.28, normalization="dapo", resample_tries=4, kl_weight=0``; Dr. GRPO is
    ``normalization="dr_grpo", scale_by_std=false, kl_weight=0``.
    """

    tasks: dict[Task, float] = {"generation": 1.0}
    parts: tuple[Part, ...] = ("projector", "adapters")
    steps: int = Field(200, ge=1, description="Rounds of sampling; each trains `updates` times.")
    lr: float = Field(2e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up; a cosine follows.")
    predicted_findings: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of scans whose reports build on predicted findings, from the start on.",
    )
    group_size: int = Field(
        8, ge=2, description="Reports sampled a scan, which are compared with each other."
    )
    updates: int = Field(2, ge=1, description="Steps of the optimizer on what one round sampled.")
    sampling_temperature: float = Field(1.0, gt=0, description="Of the samples, and of their probabilities.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest sample; None is the report's own limit with room for headings."
    )
    normalization: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "grpo",
        description="Mean over a report's tokens, over all tokens, or over the longest possible report.",
    )
    scale_by_std: bool = Field(True, description="Divide advantages by the group's standard deviation.")
    clip_low: float = Field(
        0.2, ge=0, lt=1, description="How far a token's probability ratio may fall below 1."
    )
    clip_high: float = Field(0.2, ge=0, description="How far it may rise above 1.")
    kl_weight: float = Field(
        0.04, ge=0, description="Of the divergence from the model that the phase began with."
    )
    resample_tries: int = Field(
        0, ge=0, description="Other scans tried in place of one whose reports are all equally good."
    )
    min_reward_std: float = Field(
        1e-3, ge=0, description="Reports whose rewards spread less are equally good."
    )
    rows_per_pass: int = Field(
        4,
        ge=1,
        description="Reports that share a prompt in a pass of the loss; attention's memory may grow with the square.",
    )
    weight_clinical: float = Field(0.4, ge=0, description="Of naming the right diseases.")
    weight_factual: float = Field(0.3, ge=0, description="Of telling them at the right places.")
    weight_fluency: float = Field(0.2, ge=0, description="Of fluent language.")
    weight_format: float = Field(0.1, ge=0, description="Of the three sections.")
    usual_perplexity: float = Field(
        8.0,
        gt=1,
        description="Of a fluent report under the frozen language model, where no true report tells it.",
    )


class PhasesConfig(Section):
    """The phases, in the order in which they run."""

    local: LocalPhase = LocalPhase()
    classification: ClassificationPhase = ClassificationPhase()
    localization: LocalizationPhase = LocalizationPhase()
    alignment: AlignmentPhase = AlignmentPhase()
    joint: JointPhase = JointPhase()
    grpo: GrpoPhase = GrpoPhase()

    @model_validator(mode="after")
    def _each_learns_something(self) -> PhasesConfig:
        for name in type(self).model_fields:
            phase: PhaseConfig = getattr(self, name)
            if not phase.tasks or not phase.parts:
                raise ValueError(f"phase {name} needs tasks and parts; --phase chooses which phases run")
        return self


class TrainingConfig(Section):
    """`vlm3d.training.trainer.train`: what all phases share."""

    phases: PhasesConfig = PhasesConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    seed: int = Field(0, ge=0, description="Of the order of cases, their variation, the tasks and dropout.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of activations; weights stay float32.")
    shard_language_model: bool = Field(
        False, description="Each of several devices holds a shard of the frozen language model (FSDP2)."
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW's, on matrices; not on biases and norms.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's.")
    min_lr_share: float = Field(0.01, ge=0, le=1, description="Of the peak, where the cosine ends.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    task_weight_lr: float = Field(
        0.01, gt=0, description="Peak learning rate of the weights that loss.balancing=uncertainty learns."
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Of the moving average of the weights, which is what is kept; 0 is none.",
    )
    loader_workers: int = Field(
        1, ge=0, description="Processes that read and vary scans, a training process."
    )
    log_every: int = Field(10, ge=1, description="Steps.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between points that a run resumes from.")
    validate_every: int = Field(1000, ge=1, description="Steps; the end of a phase is validated anyway.")
    validation_cases: int = Field(200, ge=1, description="Most cases of a validation, the same in every run.")
    validation_reports: int = Field(8, ge=0, description="Most reports written in a validation.")
    sample_cases: int = Field(4, ge=0, description="Cases of a validation kept as pictures and texts.")
    keep_top: int = Field(
        2, ge=0, description="Best checkpoints kept a phase, at least one, beside the last."
    )
    tensorboard: bool = Field(False, description="Also write for TensorBoard.")
    wandb: bool = Field(False, description="Also write for Weights & Biases.")


class Config(Section):
    """One run: the model, its input, its losses and its training."""

    name: str = Field("custom", description="Shown in outputs.")
    model: ModelConfig = ModelConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _patches_fit(self) -> Config:
        for multiple, patch in zip(
            self.preprocessing.size_multiple, self.model.vision.patch_size, strict=True
        ):
            if multiple % patch:
                raise ValueError(
                    f"preprocessing.size_multiple {self.preprocessing.size_multiple} is not a multiple of "
                    f"model.vision.patch_size {self.model.vision.patch_size}"
                )
        return self


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: A shipped size (``tiny small medium large``) or a YAML file.
        overrides: Settings such as ``"model.vision.depth=8"``; the right side is YAML.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds an unknown or impossible setting.
    """
    values = _read_yaml(source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{override}' is not of the form key=value, such as model.vision.depth=8")
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"'{override}' goes below '{parent}', which is a single value")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{override}': the value is not YAML") from error
    return config_from_dict(values, str(source))


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """Check settings and build a `Config`; a fault is named by its dotted key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "configuration"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {key}: {first['msg']}{more}") from error


def with_model_fields(config: Config | ModelConfig | None, **sections: Mapping[str, Any]) -> Config:
    """A configuration with single fields of its model replaced; None values are not given.

    Head counts follow a width that they no longer divide.

    Args:
        config: A whole configuration, only its model section, or None for the full-size defaults.
        sections: Fields by section, such as ``vision={"depth": 2}``.
    """
    config = Config(model=config) if isinstance(config, ModelConfig) else config or Config()
    given = {
        section: {name: value for name, value in fields.items() if value is not None}
        for section, fields in sections.items()
    }
    width = given["vision"].get("embed_dim")
    if width is not None:
        if width % config.model.vision.num_heads:
            given["vision"]["num_heads"] = _heads_for(width)
        if width % config.model.localizer.denoiser_heads:
            given["localizer"]["denoiser_heads"] = _heads_for(width)
    values = config.model_dump()
    for section, fields in given.items():
        values["model"][section].update(fields)
    return Config.model_validate(values)


def _heads_for(width: int) -> int:
    """The most heads of at least 32 channels that divide a width."""
    return next(heads for heads in range(max(1, width // 32), 0, -1) if width % heads == 0)


def _read_yaml(source: str | Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if str(source) in seen:
        raise ConfigError(f"{source} is its own base: {' -> '.join((*seen, str(source)))}")
    try:
        if str(source) in SHIPPED_CONFIGS:
            text = files("vlm3d").joinpath("configs").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
        else:
            text = Path(source).read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(
            f"no configuration '{source}': give a YAML file or one of {', '.join(SHIPPED_CONFIGS)}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold settings by name, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if str(base) not in SHIPPED_CONFIGS and str(source) not in SHIPPED_CONFIGS:
        base = Path(source).parent / str(base)
    return _merge(_read_yaml(base, (*seen, str(source))), values)


_WHOLE = ("tasks", "lr_scale")
"""Settings that are dictionaries themselves: a file replaces them, as ``key=value`` does."""


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in _WHOLE
        merged[key] = _merge(merged[key], value) if both else value
    return merged
