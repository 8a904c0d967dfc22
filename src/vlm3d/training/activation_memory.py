"""How much memory one training step needs beyond weights, found by running the step on tensors without storage.

The model's own forward and backward pass run on fake tensors, which know their shape, type and life, but hold nothing. The
largest sum of bytes alive at one time is the step's need. So attention kernels, mixed precision, gradient checkpointing and
frozen parts count as they are; cuDNN's workspaces and the allocator's fragments do not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlm3d.config import Config, PhaseConfig, ReportConfig
from vlm3d.model.language_model import LanguageModel, add_lora
from vlm3d.model.llm_architectures import architecture
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.patch_embedding import PatchBox

PROMPT_TOKENS = 96
"""Of the request and of the findings in words, around the visual tokens; a usual case."""


def own_parts_bytes(
    config: Config, phase: PhaseConfig, shape_DHW: tuple[int, int, int], *, mixed_precision: bool
) -> int:
    """Bytes of one scan's step through encoder, heads and projector, with the gradients that it makes.

    Args:
        config: The model.
        phase: Its tasks all run; its parts alone get gradients.
        shape_DHW: Grid of the scan.
        mixed_precision: Compute in bfloat16 where autocast does.
    """
    model = VLM3DMultiTask(config, load_text=False, load_llm=False, device="meta").train()
    model.freeze()
    for part in phase.parts:
        model.unfreeze(part)

    def step() -> list[Tensor]:
        volume = torch.empty(1, config.model.vision.in_channels, *shape_DHW)
        regions = torch.empty(1, *shape_DHW, dtype=torch.uint8)
        features = model.encode(volume, regions)
        outputs: list[Tensor] = []
        if "classification" in phase.tasks:
            outputs.append(model.classify(features)["logits"])
        if "localization" in phase.tasks:
            found = model.localize(volume, regions, features, boxes=_box(config, phase, shape_DHW))
            outputs += [found["mask_logits"], *found["coarser_logits"]]
        if "generation" in phase.tasks:
            with torch.no_grad():  # scans without true masks have them drawn, for the words of the request
                model.localize(volume, regions, features)
            outputs.append(
                model.report_generator.projector(
                    features.global_BC, features.region_BRC, features.patch_BNC, features.region_present_BR
                )
            )
        return [output.float().square().mean() for output in outputs]

    return _peak_bytes(model, step, mixed_precision=mixed_precision)


def _box(config: Config, phase: PhaseConfig, shape_DHW: tuple[int, int, int]) -> list[PatchBox] | None:
    """A box of the phase's crop in patches, at the scan's corner; None where whole scans are drawn in."""
    if phase.localization_crop is None:
        return None
    z, y, x = (
        max(1, min(crop, size) // patch)
        for crop, size, patch in zip(
            phase.localization_crop, shape_DHW, config.model.vision.patch_size, strict=True
        )
    )
    return [((0, z), (0, y), (0, x))]


def language_model_bytes(
    config: ReportConfig, report_tokens: int, *, train_adapters: bool, checkpointing: bool
) -> int:
    """Bytes of one report's step through the language model, its output layer's logits included.

    Two shallow copies are run, of one and two layers, and the rest is added in proportion: layers are alike.

    Args:
        config: Which language model, and its adapters.
        report_tokens: Of the report that is scored.
        train_adapters: Gradients flow into the adapters; into the visual tokens they flow in any case.
        checkpointing: Layers are computed again in the backward pass.
    """
    layers = int(architecture(config.llm_name).num_hidden_layers)
    one, two = (
        _shallow_bytes(config, count, report_tokens, train_adapters, checkpointing) for count in (1, 2)
    )
    return one + (layers - 1) * max(0, two - one)


def unpacked_layer_bytes(llm: nn.Module) -> int:
    """Bytes of the largest linear layer unpacked from 4 bit to bfloat16, as one is while it computes."""
    head = llm.get_output_embeddings()  # type: ignore[operator]
    sizes = [m.weight.numel() for m in llm.modules() if isinstance(m, nn.Linear) and m is not head]
    return 2 * max(sizes, default=0)


def _shallow_bytes(
    config: ReportConfig, layers: int, report_tokens: int, train_adapters: bool, checkpointing: bool
) -> int:
    from transformers import AutoModelForCausalLM

    sizes = architecture(config.llm_name)
    sizes.num_hidden_layers = layers
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = sizes.layer_types[:layers]
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).requires_grad_(False)
    if config.use_lora:
        network = add_lora(network, config.lora_rank, config.lora_alpha, config.lora_dropout)
    model = LanguageModel(network, None, config.llm_name).train()
    model.set_adapters_trainable(train_adapters)
    if checkpointing:
        model.enable_gradient_checkpointing()
    length = config.num_queries + PROMPT_TOKENS + report_tokens

    def step() -> list[Tensor]:
        embeds = torch.empty(1, length, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        output = model(embeds, logits_to_keep=report_tokens + 1, use_cache=False)
        labels = torch.empty(report_tokens, dtype=torch.long)
        return [functional.cross_entropy(output.logits[0, :-1].float(), labels)]

    return _peak_bytes(model, step, mixed_precision=True)


def _peak_bytes(module: nn.Module, step: Callable[[], list[Tensor]], *, mixed_precision: bool) -> int:
    """Most bytes alive at once in a forward and backward pass, weights not counted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(module)
        autocast: Any = torch.autocast("cpu", torch.bfloat16) if mixed_precision else nullcontext()
        with _LiveBytes(module) as live:
            with autocast:
                losses = [loss for loss in step() if loss.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()
            del losses
    return live.peak


def _make_fake(module: nn.Module) -> None:
    """Give a module of the meta device fake weights on the CPU, so that the CPU's fused kernels are chosen."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) not in made:
                made[id(weight)] = nn.Parameter(
                    torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad
                )
            if weight is not None:
                part._parameters[name] = made[id(weight)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are let go.

    Args:
        module: Its weights, which views keep giving out, are not counted.

    Attributes:
        peak: The most bytes that were alive at once.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weights = (*module.parameters(), *module.buffers())
        self._alive: dict[int, int] = {weight.untyped_storage()._cdata: 0 for weight in weights}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a check of values, which fake tensors do not have
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)
