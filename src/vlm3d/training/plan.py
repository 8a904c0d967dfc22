"""What a training run will need, before it starts: parameters, memory a device, steps and time, a phase at a time.

Works without weights, data or an accelerator: the model is built on the meta device and its step is run on fake tensors
(`vlm3d.training.activation_memory`). What is counted is exact; what is not says 'estimated'.

Memory of a device, in bytes a parameter: 4 for our own float32 weights; for those that train 4 more for their gradients, 4
for DDP's copy of them, 8 for AdamW's two moments, 4 for the moving average; the frozen language model in NF4, bfloat16 or,
on most CPUs, float32, its layers divided by the number of devices where they are sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vlm3d.config import Config, PhaseConfig
from vlm3d.errors import ConfigError, ResourceError
from vlm3d.model.language_model import LanguageModel, default_dtype
from vlm3d.model.llm_architectures import layer_bytes, weight_bytes
from vlm3d.model.multi_task_model import PARTS, VLM3DMultiTask
from vlm3d.model.part_sizes import PartSize
from vlm3d.training.activation_memory import language_model_bytes, own_parts_bytes, unpacked_layer_bytes
from vlm3d.training.phases import check_sharding, chosen_phases, phase_config

GIB = 2**30
_CONTEXT_BYTES = 1 * GIB  # CUDA's, with its kernels
_WORKSPACE_SHARE = 0.2  # kernels' workspaces and the allocator's fragments, of activations

_TEXT_ENCODER_PARAMETERS = {
    "emilyalsentzer/Bio_ClinicalBERT": 108_310_272,
    "dmis-lab/biobert-v1.1": 108_310_272,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
}
"""Of the frozen text encoders that the shipped sizes name; others are taken to be as large as BERT."""
_BERT_PARAMETERS = 108_310_272


@dataclass(frozen=True)
class MemoryLine:
    """One use of a device's memory.

    Attributes:
        name: What it is for.
        bytes: On one device.
        estimated: Not counted, but found from a simulated step or a rule of thumb.
    """

    name: str
    bytes: int
    estimated: bool = False


@dataclass(frozen=True)
class PhasePlan:
    """What one phase needs.

    Attributes:
        name: Of the phase.
        settings: Of the phase.
        shape_DHW: Grid of its scans.
        trainable: Parameters that train in it.
        memory: Uses of one device's memory.
        loading_bytes: Memory of one device before the language model is sharded; 0 where it is not.
        scans: Scans shown in the phase, all devices together.
        seconds_per_step: Measured; None where it was not.
    """

    name: str
    settings: PhaseConfig
    shape_DHW: tuple[int, int, int]
    trainable: int
    memory: tuple[MemoryLine, ...]
    scans: int
    seconds_per_step: float | None = None
    loading_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Memory of one device."""
        return max(sum(line.bytes for line in self.memory), self.loading_bytes)

    @property
    def seconds(self) -> float | None:
        """Of the whole phase; None where a step was not measured."""
        each = self.seconds_per_step
        return None if each is None else each * self.settings.steps


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs.

    Attributes:
        config_name: The model's size.
        world_size: Devices.
        device_memory_gib: Of one device; None where it is not known.
        sharded: The frozen language model is sharded over the devices.
        parts: Parameters a part of the model.
        phases: In order.
    """

    config_name: str
    world_size: int
    device_memory_gib: float | None
    sharded: bool
    parts: tuple[PartSize, ...]
    phases: tuple[PhasePlan, ...]

    @property
    def largest(self) -> PhasePlan:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda plan: plan.total_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits a device; None where its memory is not known."""
        if self.device_memory_gib is None:
            return None
        return self.largest.total_bytes <= self.device_memory_gib * GIB

    @property
    def seconds(self) -> float | None:
        """Of all phases; None where one was not measured."""
        each = [plan.seconds for plan in self.phases]
        return None if None in each else math.fsum(seconds for seconds in each if seconds is not None)

    def check(self) -> None:
        """Refuse a run that will not fit.

        Raises:
            ResourceError: A phase needs more memory than a device has; the message says which and for what most.
        """
        if self.fits is not False:
            return
        plan = self.largest
        if plan.total_bytes == plan.loading_bytes:
            raise ResourceError(
                f"phase '{plan.name}' of '{self.config_name}' needs an estimated {plan.total_bytes / GIB:.1f} GiB on each "
                f"device to load the language model, before it is sharded; a device has {self.device_memory_gib:.1f}. "
                "Set model.report.load_in_4bit=true, or take a smaller language model."
            )
        most = max(plan.memory, key=lambda line: line.bytes)
        raise ResourceError(
            f"phase '{plan.name}' of '{self.config_name}' needs an estimated {plan.total_bytes / GIB:.1f} GiB on "
            f"each device, which has {self.device_memory_gib:.1f}; most of it, {most.bytes / GIB:.1f} GiB, is for "
            f"{most.name}. {_remedy(most.name, self)}"
        )

    def table(self) -> str:
        """The plan as ``--dry-run`` prints it."""
        lines = [_headline(self), f"  {'part':36}{'parameters':>16}"]
        lines += [f"  {part.name:36}{part.parameters:16,}" for part in self.parts]
        lines.append(f"  {'total':36}{sum(part.parameters for part in self.parts):16,}")
        for plan in self.phases:
            lines += ["", *_phase_lines(plan, self)]
        seconds = self.seconds
        lines += [
            "",
            f"All phases: {sum(plan.settings.steps for plan in self.phases):,} steps, {_duration(seconds)}",
        ]
        return "\n".join(lines)


def plan_training(
    config: Config,
    phases: Sequence[str] | None = None,
    *,
    world_size: int = 1,
    device: str = "cuda",
    device_memory_gib: float | None = None,
    shape_DHW: tuple[int, int, int] | None = None,
    report_tokens: int = 256,
    seconds_per_step: Mapping[str, float] | None = None,
) -> TrainingPlan:
    """Find what a run needs, without weights or data.

    Args:
        config: The model, its input and its training.
        phases: Numbers or names; by default all but those of `phases.ON_REQUEST`.
        world_size: Devices.
        device: ``"cuda"`` or ``"cpu"``; need not be there.
        device_memory_gib: Memory of one device, for the verdict.
        shape_DHW: Largest grid of a training scan; the configuration's ``preprocessing.max_shape`` by default.
        report_tokens: Of a long report.
        seconds_per_step: Measured on the device that will train, by the phase's name.

    Raises:
        ConfigError: A phase is unknown, or cannot have a sharded language model; or scans are no multiple of the model's
            patches.
        WeightsUnavailableError: The language model is neither a known one nor in a folder.
    """
    if world_size < 1:
        raise ConfigError(f"a plan needs at least one device, got {world_size}")
    shape_DHW = shape_DHW or config.preprocessing.max_shape
    patch = config.model.vision.patch_size
    if min(shape_DHW) < 1 or any(size % step for size, step in zip(shape_DHW, patch, strict=True)):
        raise ConfigError(f"scans of {shape_DHW} voxels are no multiple of the patch {patch}")
    sharded = config.training.shard_language_model and world_size > 1
    if sharded:
        check_sharding(chosen_phases(phases))
    model = VLM3DMultiTask(config, load_text=False, device="meta")
    measured = seconds_per_step or {}
    plans = []
    for name in chosen_phases(phases):
        phase = phase_config(config, name)
        shown_DHW = _shown(phase, shape_DHW, patch)
        trainable = sum(p.numel() for part in set(phase.parts) for p in model.part_parameters(part))
        memory = _state_lines(config, phase, model, trainable, device, world_size)
        step = _step_lines(config, phase, model, shown_DHW, report_tokens)
        memory += step
        context = _CONTEXT_BYTES if device == "cuda" else 0
        memory.append(
            MemoryLine(
                "context, workspaces and fragments",
                round(context + _WORKSPACE_SHARE * sum(line.bytes for line in step)),
                estimated=True,
            )
        )
        scans = phase.steps * phase.batch_size * phase.accumulate * world_size
        lines = tuple(line for line in memory if line.bytes)
        loading = 0
        if sharded and "generation" in phase.tasks and model.report_generator.llm is not None:
            whole, _ = _language_model_bytes(config, model.report_generator.llm, device)
            held = ("own weights", "frozen text encoder")
            loading = whole + context + sum(line.bytes for line in lines if line.name.startswith(held))
        plans.append(PhasePlan(name, phase, shown_DHW, trainable, lines, scans, measured.get(name), loading))
    parts = tuple(model.count_parameters())
    return TrainingPlan(config.name, world_size, device_memory_gib, sharded, parts, tuple(plans))


def gpus_here() -> tuple[int, float | None]:
    """CUDA devices of this machine, and the memory of the smallest in GiB."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(device).total_memory / 2**30 for device in range(count)]
    return count, min(sizes, default=None)


def _shown(
    phase: PhaseConfig, shape_DHW: tuple[int, int, int], patch_size: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Voxels of a scan that a phase shows the model: the whole, or a box of whole patches."""
    if phase.scan_crop is None:
        return shape_DHW
    depth, height, width = (
        max(1, min(crop, size) // side) * side
        for crop, size, side in zip(phase.scan_crop, shape_DHW, patch_size, strict=True)
    )
    return depth, height, width


def _state_lines(
    config: Config, phase: PhaseConfig, model: VLM3DMultiTask, trainable: int, device: str, world_size: int
) -> list[MemoryLine]:
    """What stays on the device from step to step."""
    own = sum(parameter.numel() for part in PARTS for parameter in model.part_parameters(part))
    text_encoder = _TEXT_ENCODER_PARAMETERS.get(config.model.classifier.text_encoder)
    lines = [
        MemoryLine("own weights (float32)", 4 * own),
        MemoryLine("gradients", 4 * trainable),
        MemoryLine("DDP's copy of the gradients", 4 * trainable if world_size > 1 else 0),
        MemoryLine("AdamW's moments", 8 * trainable),
        MemoryLine("moving average", 4 * trainable if config.training.ema_decay else 0),
        MemoryLine("frozen text encoder", 4 * (text_encoder or _BERT_PARAMETERS), text_encoder is None),
    ]
    llm = model.report_generator.llm
    if "generation" in phase.tasks and llm is not None:
        lines += _language_model_lines(config, llm, device, world_size)
    return lines


def _language_model_lines(
    config: Config, llm: LanguageModel, device: str, world_size: int
) -> list[MemoryLine]:
    """The frozen language model: all of it, or a shard of its layers and room for those that run."""
    four_bit = config.model.report.load_in_4bit
    whole, dtype = _language_model_bytes(config, llm, device)
    name = f"frozen language model ({'NF4' if four_bit else str(dtype).removeprefix('torch.')})"
    if not (config.training.shard_language_model and world_size > 1):
        return [MemoryLine(name, whole)]
    layers = layer_bytes(llm.model, load_in_4bit=four_bit, bytes_per_parameter=dtype.itemsize)
    # the layer that runs and the next one, whole, and as much again on its way
    gathered = 4 * layers // int(llm.config.num_hidden_layers)
    return [
        MemoryLine(name, whole - layers + math.ceil(layers / world_size)),
        MemoryLine("layers gathered from the others", gathered, estimated=True),
    ]


def _language_model_bytes(config: Config, llm: LanguageModel, device: str) -> tuple[int, torch.dtype]:
    """Bytes of the whole frozen language model, and the type of what is not quantized."""
    dtype = torch.bfloat16 if device == "cuda" else default_dtype(torch.device("cpu"))
    four_bit = config.model.report.load_in_4bit
    return weight_bytes(llm.model, load_in_4bit=four_bit, bytes_per_parameter=dtype.itemsize), dtype


def _step_lines(
    config: Config,
    phase: PhaseConfig,
    model: VLM3DMultiTask,
    shape_DHW: tuple[int, int, int],
    report_tokens: int,
) -> list[MemoryLine]:
    """What a step needs and gives back."""
    own_bytes = own_parts_bytes(config, phase, shape_DHW, mixed_precision=config.training.precision == "bf16")
    lines = [MemoryLine("activations of encoder and heads", own_bytes * phase.batch_size, estimated=True)]
    llm = model.report_generator.llm
    if "generation" in phase.tasks and llm is not None:
        report = config.model.report
        needed = language_model_bytes(
            report,
            report_tokens,
            train_adapters="adapters" in phase.parts,
            checkpointing=config.model.vision.gradient_checkpointing,
        )
        unpacked = unpacked_layer_bytes(llm.model) if report.load_in_4bit else 0
        lines.append(
            MemoryLine(
                "activations of the language model", needed * phase.batch_size + unpacked, estimated=True
            )
        )
    return lines


def _headline(plan: TrainingPlan) -> str:
    devices = f"{plan.world_size} device{'s' if plan.world_size > 1 else ''}"
    if plan.device_memory_gib is not None:
        devices += f" of {plan.device_memory_gib:.1f} GiB"
    spread = ", the language model sharded over them" if plan.sharded else ""
    return f"Plan of '{plan.config_name}' on {devices}{spread}"


def _phase_lines(plan: PhasePlan, whole: TrainingPlan) -> list[str]:
    phase = plan.settings
    size = " x ".join(str(voxels) for voxels in plan.shape_DHW)
    box = phase.localization_crop
    where = f", masks in {' x '.join(str(voxels) for voxels in box)}" if box else ""
    lines = [
        f"Phase {plan.name}: {phase.steps:,} steps, {plan.scans:,} {'scans' if phase.scan_crop is None else 'boxes'} "
        f"({phase.batch_size} a device x {phase.accumulate} accumulated x {whole.world_size} devices)",
        f"  {', '.join(phase.tasks)} on {size} voxels{where}",
        f"  trains {', '.join(phase.parts)}: {plan.trainable:,} parameters",
    ]
    for line in plan.memory:
        lines.append(f"  {line.name:36}{line.bytes / GIB:10.2f} GiB{'  estimated' if line.estimated else ''}")
    if plan.loading_bytes:
        lines.append(
            f"  {'before the model is sharded':36}{plan.loading_bytes / GIB:10.2f} GiB  estimated, not in the sum"
        )
    verdict = ""
    if whole.device_memory_gib is not None:
        verdict = "  fits" if plan.total_bytes <= whole.device_memory_gib * GIB else "  DOES NOT FIT"
    lines.append(f"  {'a device in all':36}{plan.total_bytes / GIB:10.2f} GiB  estimated{verdict}")
    lines.append(f"  time: {_duration(plan.seconds)}")
    return lines


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known, no step was measured"
    hours = seconds / 3600
    return (
        f"{hours:.1f} h estimated from measured steps"
        if hours >= 1
        else f"{seconds / 60:.1f} min estimated from measured steps"
    )


def _remedy(largest: str, plan: TrainingPlan) -> str:
    if largest.startswith("activations"):
        return "Take a smaller batch_size or smaller scans, or set model.vision.gradient_checkpointing=true."
    if largest.startswith("frozen language model") and "NF4" not in largest:
        return "Set model.report.load_in_4bit=true, or take a smaller language model."
    if largest.startswith("frozen language model") and not plan.sharded:
        start = "Set" if plan.world_size > 1 else "Take more devices and set"
        return f"{start} training.shard_language_model=true, or take a smaller language model."
    return "Take a smaller size, or devices with more memory."
