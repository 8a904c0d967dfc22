"""Llama models written with few operations: each layer is a handful of matrix products on the newest tokens.

The prompt's keys and values are kept once for all samples of a scan; each sample adds its own after them.

Shapes: B prompts, R rows, N tokens of all rows, T tokens of the longest step, P prompt tokens, L own tokens of
the longest row, M width, V vocabulary, H key-value heads, G queries that share one, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from vlm3d.model.decoding_engine import Layout, Step
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.llama_weights import LlamaWeights, llama_weights

_FEW_ROWS = range(2, 5)
"""So many rows go faster through a wide projection as its columns (benchmarks/report.py, cost of samples)."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer number, queries (N, H, G, D), keys (N, H, D), values (N, H, D) -> attended (N, H * G * D)."""


class LlamaEngine:
    """A `DecodingEngine` for Llama models; `vlm3d.model.llama_weights.fits` tells which.

    Args:
        llm: The language model, in evaluation mode.
    """

    def __init__(self, llm: LanguageModel) -> None:
        self._llm = llm
        self._weights: LlamaWeights = llama_weights(llm)
        self._scans: list[int] = []
        self._lengths: list[int] = []
        self._shared: list[list[tuple[Tensor, Tensor]]] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._cos_LD = self._sin_LD = torch.empty(0)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Tensor], num_samples: int, room: int) -> Tensor:
        """See `DecodingEngine.start`."""
        lengths = [len(prompt) for prompt in prompts]
        self._set_rotations(max(lengths) + room)
        self._shared = []
        logits = [self._read_prompt(prompt) for prompt in prompts]
        self._scans = [scan for scan in range(len(prompts)) for _ in range(num_samples)]
        self._lengths = [lengths[scan] for scan in self._scans]
        heads, channels = self._weights.heads, self._weights.channels
        shape = (2, len(self._weights.layers), heads, len(self._scans), room, channels)
        stored = torch.zeros(shape, dtype=self._llm.dtype, device=self._llm.device)
        self._own = list(zip(stored[0], stored[1], strict=True))
        return torch.stack(logits)

    @torch.inference_mode()
    def feed(self, steps: Sequence[Step]) -> Tensor:
        """See `DecodingEngine.feed`."""
        tokens = torch.tensor([token for step in steps for token in step.token_ids])
        own = Layout.of(
            [step.keep for step in steps], [len(step.token_ids) for step in steps], self._llm.device
        )
        prompt_N = torch.tensor(self._lengths, device=self._llm.device)[own.row_N]
        attend = self._attention_after_prompt(own)
        x_NM = self._layers(self._llm.embed(tokens), prompt_N + own.position_N, attend)
        return self._logits(x_NM[own.last_R])

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See `DecodingEngine.keep_rows`."""
        kept = list(rows)
        self._scans = [self._scans[row] for row in kept]
        self._lengths = [self._lengths[row] for row in kept]
        self._own = [(keys[:, kept], values[:, kept]) for keys, values in self._own] if kept else []

    def _set_rotations(self, length: int) -> None:
        """Cosines and sines of all positions; the sine's first half bears the rotation's minus."""
        positions = torch.arange(length, device=self._llm.device)[None]
        like = torch.empty(0, dtype=self._llm.dtype, device=self._llm.device)
        cos_1LD, sin_1LD = self._weights.rotary(like, positions)
        half = sin_1LD.shape[-1] // 2
        self._cos_LD = cos_1LD[0]
        self._sin_LD = torch.cat([-sin_1LD[0, :, :half], sin_1LD[0, :, half:]], dim=1)

    def _read_prompt(self, prompt_PM: Tensor) -> Tensor:
        """Run a prompt, keep its keys and values for all rows after it; returns the logits (V,) that follow."""
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(_: int, q_PHGD: Tensor, k_PHD: Tensor, v_PHD: Tensor) -> Tensor:
            k_HPD, v_HPD = k_PHD.transpose(0, 1).contiguous(), v_PHD.transpose(0, 1).contiguous()
            kept.append((k_HPD, v_HPD))
            out_1EPD = functional.scaled_dot_product_attention(
                q_PHGD.flatten(1, 2).transpose(0, 1)[None],
                k_HPD.repeat_interleave(self._weights.queries, dim=0)[None],
                v_HPD.repeat_interleave(self._weights.queries, dim=0)[None],
                is_causal=True,
            )
            return out_1EPD[0].transpose(0, 1).flatten(1)

        positions = torch.arange(len(prompt_PM), device=prompt_PM.device)
        x_PM = self._layers(prompt_PM, positions, attend)
        self._shared.append(kept)
        return self._logits(x_PM[-1:])[0]

    def _layers(self, x_NM: Tensor, position_N: Tensor, attend: Attend) -> Tensor:
        """All layers, without the last norm."""
        weights = self._weights
        heads, queries, channels = weights.heads, weights.queries, weights.channels
        count, turned = len(x_NM), heads * (queries + 1) * channels
        cos_N1D, sin_N1D = self._cos_LD[position_N][:, None], self._sin_LD[position_N][:, None]
        for index, layer in enumerate(weights.layers):
            projected = _project(self._norm(x_NM, layer.attention_norm_M), layer.query_key_value)
            straight = projected[:, :turned].view(count, heads * (queries + 1), channels)
            rotated = straight * cos_N1D + straight.roll(channels // 2, dims=-1) * sin_N1D
            attended = attend(
                index,
                rotated[:, : heads * queries].unflatten(1, (heads, queries)),
                rotated[:, heads * queries :],
                projected[:, turned:].view(count, heads, channels),
            )
            x_NM = x_NM + _project(attended, layer.attention_output)
            gate, up = _project(self._norm(x_NM, layer.mlp_norm_M), layer.gate_up).chunk(2, dim=1)
            x_NM = x_NM + _project(functional.silu(gate) * up, layer.down)
        return x_NM

    def _attention_after_prompt(self, own: Layout) -> Attend:
        """Attention of one step's tokens to their prompt and to their own row."""
        rows, heads, queries, channels = (
            *(len(self._scans), self._weights.heads),
            *(self._weights.queries, self._weights.channels),
        )
        scale, width, length = 1 / math.sqrt(channels), own.width, own.length
        one_each = width == 1
        hidden_RTL = self._hidden(own)
        groups = [(scan, len(list(members))) for scan, members in groupby(self._scans)]
        longest = max(self._lengths)

        def attend(index: int, q_NHGD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
            keys, values = self._own[index]
            keys[:, own.row_N, own.position_N] = k_NHD.transpose(0, 1)
            values[:, own.row_N, own.position_N] = v_NHD.transpose(0, 1)
            q_RTHGD = q_NHGD[:, None] if one_each else own.pad(q_NHGD, rows)
            q_HRED = q_RTHGD.permute(2, 0, 1, 3, 4).reshape(heads, rows, width * queries, channels) * scale
            scores = q_HRED @ keys[:, :, :length].transpose(2, 3)
            if hidden_RTL is not None:
                by_query = scores.unflatten(2, (width, queries))
                scores = by_query.masked_fill(hidden_RTL[None, :, :, None], -math.inf).flatten(2, 3)
            parts, first = [], 0
            for scan, members in groups:
                prompt_keys = self._shared[scan][index][0]
                q_HED = q_HRED[:, first : first + members].reshape(heads, -1, channels)
                part = (q_HED @ prompt_keys.transpose(1, 2)).unflatten(1, (members, width * queries))
                missing = longest - prompt_keys.shape[1]
                parts.append(functional.pad(part, (0, missing), value=-math.inf) if missing else part)
                first += members
            prompt_scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            p = torch.cat([prompt_scores, scores], dim=-1).softmax(dim=-1)
            out_HRED = p[..., longest:] @ values[:, :, :length]
            first = 0
            for scan, members in groups:
                prompt_values = self._shared[scan][index][1]
                p_HEP = p[:, first : first + members, :, : prompt_values.shape[1]].flatten(1, 2)
                out_HRED[:, first : first + members] += (p_HEP @ prompt_values).unflatten(1, (members, -1))
                first += members
            out_RTHGD = out_HRED.unflatten(2, (width, queries)).permute(1, 2, 0, 3, 4)
            return (out_RTHGD[:, 0] if one_each else out_RTHGD[own.row_N, own.place_N]).flatten(1)

        return attend

    def _hidden(self, own: Layout) -> Tensor | None:
        """True at own tokens (R, T, L) that a token may not see; None where all see all."""
        rows = len(self._scans)
        position_RT = own.pad(own.position_N, rows)
        if own.width == 1 and int(position_RT.min()) == own.length - 1:
            return None
        return torch.arange(own.length, device=position_RT.device) > position_RT[..., None]

    def _norm(self, x_NM: Tensor, scale_M: Tensor) -> Tensor:
        return functional.rms_norm(x_NM, scale_M.shape, scale_M, self._weights.norm_epsilon)

    def _logits(self, x_RM: Tensor) -> Tensor:
        return _project(self._norm(x_RM, self._weights.norm_M), self._weights.head).float()


def _project(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """A projection without bias, (N, O); the order of the product is that which reads the weights fastest."""
    if len(x_NI) in _FEW_ROWS and len(weight_OI) >= x_NI.shape[1] and x_NI.device.type == "cpu":
        return (weight_OI @ x_NI.t()).t().contiguous()
    return functional.linear(x_NI, weight_OI)
