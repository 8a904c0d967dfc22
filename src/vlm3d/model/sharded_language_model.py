"""One frozen language model sharded over several devices: each holds a part of every layer (FSDP2 of torch).

Only frozen weights inside the layers are sharded; adapters, embeddings and the output head stay whole on every device, so
that optimizer, moving average, checkpoints and gradients are those of a run that shards nothing. A layer's shards are
gathered when it runs, forward or backward, and dropped after it.

NF4 stays in bytes. Stored as bfloat16 (``bnb_4bit_quant_storage``), bytes that read as NaN are changed on the way
(bitsandbytes, issue 1945).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from vlm3d.model.language_model import LanguageModel, keep_nf4_layout
from vlm3d.model.llama_weights import transformers_model


class ShardedLanguageModel(LanguageModel):
    """A language model of which each process holds a shard, and which all processes therefore run together.

    In training each process runs it as often as the others. Where process 0 alone has work, it works within `leading` and
    the others call `follow`.

    Args:
        llm: The whole model, loaded alike in every process of the default group; its weights are sharded in place.
    """

    def __init__(self, llm: LanguageModel) -> None:
        super().__init__(llm.model, llm.tokenizer, llm.name)
        _shard(llm)
        self._leads = False

    def forward(self, inputs_embeds: Tensor, **options: Any) -> Any:
        """As `LanguageModel.forward`."""
        if self._leads:
            self._tell(True)
        return super().forward(inputs_embeds, **options)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """See `LanguageModel.leading`; an error leaves the others waiting, for the launcher to end them."""
        self._leads = True
        try:
            yield
        finally:
            self._leads = False
        self._tell(False)

    @torch.no_grad()
    def follow(self) -> None:
        """See `LanguageModel.follow`."""
        while self._tell(False):
            super().forward(self.embed_ids([0])[None], use_cache=False)

    def _tell(self, runs: bool) -> bool:
        """Process 0 says whether it runs the model next; the others hear it."""
        word = torch.tensor(int(runs), device=self.device)
        distributed.broadcast(word, src=0)
        return bool(word)


def layer_parameters(llm: LanguageModel) -> list[nn.Parameter]:
    """The frozen weights inside the layers: what `ShardedLanguageModel` shards."""
    adapters = set(llm.adapter_parameters().values())
    return [p for p in transformers_model(llm).model.layers.parameters() if p not in adapters]


def _shard(llm: LanguageModel) -> None:
    base = transformers_model(llm)
    keep_nf4_layout(base)
    # a group of its own: gathering layers and reducing gradients may then come in any order
    mesh = DeviceMesh.from_group(distributed.new_group(), llm.device.type)
    whole = set(base.parameters()) - set(layer_parameters(llm))
    for module in (*base.model.layers, base):
        fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
