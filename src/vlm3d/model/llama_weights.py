"""A Llama model's weights laid out for writing: adapters added in, projections of the same input side by side.

Shapes: M width, H key-value heads, G queries that share one, D channels of a head, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlm3d.model.language_model import LanguageModel

MOST_COPIED_BYTES = 4 * 1024**3
"""Larger models are run by transformers: a second copy of their weights would not pay for what it saves."""


@dataclass(frozen=True)
class LlamaLayer:
    """One layer.

    Attributes:
        attention_norm_M: Scale of the norm before attention.
        query_key_value: Projections to (H * G + 2 * H) * D channels: queries, keys, values.
        attention_output: Back to M channels.
        mlp_norm_M: Scale of the norm before the perceptron.
        gate_up: The perceptron's two first projections, gate first.
        down: Its last.
    """

    attention_norm_M: Tensor
    query_key_value: Tensor
    attention_output: Tensor
    mlp_norm_M: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class LlamaWeights:
    """All that writing needs of a Llama model.

    Attributes:
        layers: Bottom to top.
        norm_M: Scale of the last norm.
        head: To the vocabulary's logits.
        norm_epsilon: Of all norms.
        heads: H.
        queries: G.
        channels: D.
        rotary: Gives cosines and sines (1, L, D) of positions.
    """

    layers: tuple[LlamaLayer, ...]
    norm_M: Tensor
    head: Tensor
    norm_epsilon: float
    heads: int
    queries: int
    channels: int
    rotary: nn.Module


_known: WeakKeyDictionary[LanguageModel, tuple[Any, LlamaWeights]] = WeakKeyDictionary()


def fits(llm: LanguageModel) -> bool:
    """Whether `llama_weights` can lay this model out: a plain Llama, neither quantized nor too large to copy."""
    if llm.config.model_type != "llama" or type(llm).forward is not LanguageModel.forward:
        return False
    config = llm.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.hidden_act != "silu" or rope not in ("default", "linear", "llama3"):
        return False
    if config.attention_bias or config.mlp_bias:
        return False
    base = transformers_model(llm)
    plain = all(
        type(_frozen(part)) is nn.Linear for layer in base.model.layers for part in _projections(layer)
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    return plain and size <= MOST_COPIED_BYTES


@torch.no_grad()
def llama_weights(llm: LanguageModel) -> LlamaWeights:
    """The weights as they are now; laid out anew only after one of them has changed."""
    state = _fingerprint(llm)
    known = _known.get(llm)
    if known is None or known[0] != state:
        _known.pop(llm, None)  # frees the old copy before the new one is made
        known = _known[llm] = state, _lay_out(llm)
    return known[1]


def _lay_out(llm: LanguageModel) -> LlamaWeights:
    base, config = transformers_model(llm), llm.config
    layers = []
    for layer in base.model.layers:
        query, key, value, output, gate, up, down = map(_merged, _projections(layer))
        layers.append(
            LlamaLayer(
                layer.input_layernorm.weight.detach(),
                torch.cat([query, key, value]),
                output,
                layer.post_attention_layernorm.weight.detach(),
                torch.cat([gate, up]),
                down,
            )
        )
    return LlamaWeights(
        tuple(layers),
        base.model.norm.weight.detach(),
        base.lm_head.weight.detach(),
        float(config.rms_norm_eps),
        int(config.num_key_value_heads),
        int(config.num_attention_heads // config.num_key_value_heads),
        int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        base.model.rotary_emb,
    )


def transformers_model(llm: LanguageModel) -> Any:
    """The model as transformers built it, without what PEFT puts around it."""
    return llm.model.get_base_model() if hasattr(llm.model, "get_base_model") else llm.model


def _projections(layer: Any) -> tuple[Any, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _frozen(projection: Any) -> Any:
    """The linear layer under an adapter."""
    return projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection


def _merged(projection: Any) -> Tensor:
    """A projection's weight with its adapters added; the model's own weights stay as they are."""
    weight: Tensor = _frozen(projection).weight.detach()
    if _frozen(projection) is projection or projection.disable_adapters or projection.merged:
        return weight
    for name in projection.active_adapters:
        weight = weight + projection.get_delta_weight(name).to(weight.dtype)
    return weight


def _fingerprint(llm: LanguageModel) -> tuple[Any, ...]:
    """Differs after any change to the weights: other memory, an operation in place, adapters switched."""
    parameters = list(llm.model.parameters())
    places = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)
    projections = [part for layer in transformers_model(llm).model.layers for part in _projections(layer)]
    switches = tuple(
        (part.disable_adapters, part.merged, tuple(part.active_adapters))
        for part in projections
        if _frozen(part) is not part
    )
    adapters = [parameter.detach() for parameter in llm.adapter_parameters().values()]
    # what goes past the version counter, as writing through .data does, still changes the sum
    total = float(sum(float(norm) for norm in torch._foreach_norm(adapters))) if adapters else 0.0
    return places, switches, total
