"""How many parameters each part of a model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from vlm3d.model.language_model import LanguageModel


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model."""

    name: str
    parameters: int
    trainable: int


def part_sizes(parts: Mapping[str, nn.Module], llm: LanguageModel | None) -> list[PartSize]:
    """One row a part, then the language model without its adapters, then these."""
    rows = [
        PartSize(name, _count(module.parameters()), _count(module.parameters(), trainable=True))
        for name, module in parts.items()
    ]
    if llm is not None:
        adapters = llm.adapter_parameters().values()
        frozen = _count(llm.parameters()) - _count(adapters)
        rows.append(PartSize("language model (frozen)", frozen, 0))
        rows.append(PartSize("LoRA adapters", _count(adapters), _count(adapters, trainable=True)))
    return rows


def _count(parameters: Iterable[nn.Parameter], *, trainable: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable)
