"""The language model that writes reports: frozen weights, loaded by name, and low-rank adapters to train."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlm3d.errors import ConfigError, WeightsUnavailableError
from vlm3d.extras import require
from vlm3d.model.chat import chat_around_image, encode, end_of_turn_id, special_ids
from vlm3d.model.llm_architectures import architecture
from vlm3d.model.strict_loading import copy_strictly
from vlm3d.pretrained import quiet_transformers, resolve_weights

logger = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers that get adapters; Llama, Gemma-2 and SmolLM2 name them alike."""

_EMBEDDING_SAMPLE = 2048


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer, behind the few calls that report generation needs.

    Attributes:
        name: Hub name or folder that it was loaded from.
        model: The transformers model, wrapped by PEFT where it has adapters.
        tokenizer: Its tokenizer; None on the meta device.
        end_token_id: Ends an answer, and so a report.
        stop_token_ids: Any of these ends an answer in generation.
        control_token_ids: Never part of a report's text.
    """

    def __init__(self, model: Any, tokenizer: Any | None, name: str) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        if tokenizer is not None:
            self.end_token_id = end_of_turn_id(tokenizer)
            self.stop_token_ids = {self.end_token_id, int(tokenizer.eos_token_id or self.end_token_id)}
            self.control_token_ids = special_ids(tokenizer)

    def train(self, mode: bool = True) -> LanguageModel:
        """As `torch.nn.Module.train`; from the first time on NF4 weights stay as gradients pass through them.

        Raises:
            RuntimeError: They have been laid out for inference already.
        """
        if mode:
            keep_nf4_layout(self.model)
        super().train(mode)
        return self

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return int(self.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie, and so where inputs go."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings, and so of inputs."""
        return self._embedding.weight.dtype

    @property
    def _embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.get_input_embeddings()
        return embedding

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings of tokens as the model's first layer expects them (Gemma's scale included)."""
        embedded: Tensor = self._embedding(token_ids.to(self.device))
        return embedded

    def embed_ids(self, token_ids: list[int]) -> Tensor:
        """Embeddings (T, hidden_size) of a list of token ids."""
        return self.embed(torch.tensor(token_ids, dtype=torch.long))

    @torch.no_grad()
    def embedding_rms(self) -> float:
        """Median root mean square of a word's embedding: the size that foreign embeddings should have."""
        rows = self._embedding.num_embeddings
        sample = torch.arange(0, rows, max(1, rows // _EMBEDDING_SAMPLE))
        return float(self.embed(sample).float().pow(2).mean(dim=1).sqrt().median())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return encode(self.tokenizer, text)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, control tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))  # type: ignore[union-attr]

    def chat_around_image(self, system: str, before: str, after: str) -> tuple[list[int], list[int]]:
        """Token ids of a request before and after the image, in this family's chat format."""
        return chat_around_image(self.tokenizer, system, before, after)

    def forward(self, inputs_embeds: Tensor, **options: Any) -> Any:
        """Run the transformers model on embeddings; options pass through."""
        return self.model(inputs_embeds=inputs_embeds, **options)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by stable name, such as ``layers.0.self_attn.q_proj.lora_A``."""
        return {
            _stable_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }

    def set_adapters_trainable(self, trainable: bool) -> None:
        """Let the adapters train, or freeze them too."""
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(trainable)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What training changed: the adapters, without the frozen model. Names do not depend on PEFT."""
        return {name: parameter.detach() for name, parameter in self.adapter_parameters().items()}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put saved adapters in place.

        Raises:
            CheckpointError: A tensor is missing, foreign or of another shape; the message names it.
        """
        copy_strictly(self.adapter_parameters(), state, "the language model's adapters")

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Within the block this process alone runs the model, as often as it likes, while the others `follow`."""
        yield

    def follow(self) -> None:
        """Help the process that is `leading` until it is done; there is nothing to do where each has the whole model."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        settings = {"use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):  # its name from transformers 5 on
            self.model.activation_checkpointing_enable(settings)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def load_language_model(
    name: str,
    *,
    load_in_4bit: bool = False,
    use_lora: bool = True,
    lora_rank: int = 64,
    lora_alpha: int = 128,
    lora_dropout: float = 0.05,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Load a language model with frozen weights and, unless told otherwise, adapters that start as no change.

    Args:
        name: Folder or Hub name.
        load_in_4bit: Hold the linear layers in NF4; needs the extra ``quant``.
        use_lora: Add low-rank adapters to every attention and MLP projection.
        lora_rank: Their rank.
        lora_alpha: Their scale, over the rank.
        lora_dropout: Dropout on their input.
        dtype: Of the frozen weights; None picks the fastest exact enough for the device.
        device: None is the CPU.

    Raises:
        WeightsUnavailableError: The weights are nowhere, or damaged.
        MissingExtraError: 4 bits were asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device(device or "cpu")
    dtype = dtype or default_dtype(place)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if load_in_4bit:
        options |= {"quantization_config": _nf4(dtype), "device_map": {"": str(place)}}
    folder = resolve_weights(name)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsUnavailableError(
            f"{folder} is not a language model that transformers loads ({reason}); "
            "remove it to have it fetched anew"
        ) from error
    if not load_in_4bit:
        model.to(place)
    model.requires_grad_(False)
    if use_lora:
        model = add_lora(model, lora_rank, lora_alpha, lora_dropout)
    logger.info("language model %s on %s in %s", name, place, "NF4" if load_in_4bit else dtype)
    return LanguageModel(model.eval(), tokenizer, name)


def meta_language_model(
    name: str,
    *,
    use_lora: bool = True,
    lora_rank: int = 64,
    lora_alpha: int = 128,
    lora_dropout: float = 0.05,
) -> LanguageModel:
    """The same model without storage, on the meta device: for counting parameters and memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(name))
    model.requires_grad_(False)
    if use_lora:
        model = add_lora(model, lora_rank, lora_alpha, lora_dropout)
    return LanguageModel(model.eval(), None, name)


def add_lora(model: Any, rank: int, alpha: int, dropout: float) -> Any:
    """Add low-rank adapters to every attention and MLP projection; the second factor starts at zero.

    Raises:
        ConfigError: The architecture names its projections otherwise.
    """
    from peft import LoraConfig, get_peft_model

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [target for target in LORA_TARGETS if target not in present]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} has no layers named {', '.join(missing)}, so adapters cannot be added: "
            "set use_lora=false or take a Llama, Gemma-2 or SmolLM2 model"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    on_meta = next(model.parameters()).device.type == "meta"
    with warnings.catch_warnings():  # PEFT asks transformers 5 for a property by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, low_cpu_mem_usage=on_meta)


def keep_nf4_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from laying out NF4 weights anew on a CPU at the first inference: faster, but without gradients.

    Raises:
        RuntimeError: It has done so already.
    """
    linears: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for linear in linears:
        if getattr(linear.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                "the 4-bit language model was laid out for inference on a CPU: load it anew to train it"
            )
        linear.support_avx512bf16_for_cpu = False


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it (most GPUs, CPUs with AVX512-BF16 or AMX), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.float32


def _nf4(dtype: torch.dtype) -> Any:
    require("bitsandbytes", extra="quant", purpose="hold the language model in 4 bit")
    require("accelerate", extra="quant", purpose="hold the language model in 4 bit")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _stable_name(name: str) -> str:
    """``base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight`` without what PEFT adds."""
    return name.removeprefix("base_model.model.").removeprefix("model.").replace(".default.weight", "")
