"""The language models' architectures as numbers, so that their size is known without their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm3d.pretrained import resolve_weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_LLAMA_3_1: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-70B-Instruct": {
        **_LLAMA_3_1,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **_LLAMA_3_1,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "google/gemma-2-27b-it": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
}
"""Sizes as published with each model; the numbers alone are enough to count parameters and memory."""

NF4_BYTES_PER_PARAMETER = 0.5 + (1 / 64 + 4 / (64 * 256))
"""4 bits, one 8-bit scale for 64 weights, one float32 scale for 256 of those (NF4, doubly quantized)."""


def architecture(name: str) -> PretrainedConfig:
    """The configuration of a language model: from the table above, else from its folder.

    Raises:
        WeightsUnavailableError: The name is in neither.
    """
    from transformers import AutoConfig

    if name in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[name])
    return AutoConfig.from_pretrained(resolve_weights(name), local_files_only=True)


def hidden_size(name: str) -> int:
    """Width of a language model's embeddings, without loading its weights."""
    if name in ARCHITECTURES:
        return int(ARCHITECTURES[name]["hidden_size"])
    return int(architecture(name).hidden_size)


def weight_bytes(model: nn.Module, *, load_in_4bit: bool, bytes_per_parameter: int = 2) -> int:
    """Memory that a language model's frozen weights take, adapters left out.

    Args:
        model: On any device, meta included; its weights as loaded without quantization.
        load_in_4bit: Count linear layers, except the output head, as NF4.
        bytes_per_parameter: Of everything that is not quantized; 2 is bfloat16.
    """
    in_4bit, others = _parameter_counts(model, load_in_4bit)
    return round(in_4bit * NF4_BYTES_PER_PARAMETER) + others * bytes_per_parameter


def layer_bytes(model: nn.Module, *, load_in_4bit: bool, bytes_per_parameter: int = 2) -> int:
    """Of `weight_bytes`, what `ShardedLanguageModel` shards: the layers, without NF4's scales."""
    in_4bit, others = _parameter_counts(model, load_in_4bit, inside=".layers.")
    return in_4bit // 2 + others * bytes_per_parameter


def _parameter_counts(model: nn.Module, load_in_4bit: bool, inside: str = "") -> tuple[int, int]:
    """Frozen weights that are held in NF4 and those that are not, of modules whose names hold ``inside``."""
    from torch import nn

    head = getattr(model, "get_output_embeddings", lambda: None)()
    quantized = {
        id(module.weight)
        for name, module in model.named_modules()
        if load_in_4bit and isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    }
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name and inside in name]
    in_4bit = sum(parameter.numel() for parameter in frozen if id(parameter) in quantized)
    return in_4bit, sum(parameter.numel() for parameter in frozen) - in_4bit
