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

_FEW_ROWS = 16
"""Up to so many rows go faster through a projection as its columns, where weights are float32 (benchmarks/report.py)."""

_MOST_GUESSES = 7
"""More are seldom right to the end."""

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""Layer number, queries (N, H, G, D), keys and after them values (N, 2H, D) -> attended (N, H * G * D)."""


class LlamaEngine:
    """A `DecodingEngine` for Llama models; `vlm3d.model.llama_weights.fits` tells which.

    Args:
        llm: The language model, in evaluation mode.
    """

    def __init__(self, llm: LanguageModel) -> None:
        self._llm = llm
        self._weights: LlamaWeights = llama_weights(llm)
        self._epsilon = torch.tensor(self._weights.norm_epsilon, device=llm.device)
        self._scans: list[int] = []
        self._lengths: list[int] = []
        self._shared: list[list[tuple[Tensor, Tensor]]] = []
        self._own: list[Tensor] = []
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
        shape = (len(self._weights.layers), 2 * heads, len(self._scans), room, channels)
        self._own = list(torch.zeros(shape, dtype=self._llm.dtype, device=self._llm.device))
        return torch.stack(logits)

    @torch.inference_mode()
    def feed(self, steps: Sequence[Step]) -> Tensor:
        """See `DecodingEngine.feed`."""
        tokens = torch.tensor([token for step in steps for token in step.token_ids])
        own = Layout.of(
            [step.keep for step in steps],
            [len(step.token_ids) for step in steps],
            self._llm.device,
            [step.guessed for step in steps],
        )
        prompt_N = torch.tensor(self._lengths, device=self._llm.device)[own.row_N]
        newest = own.width == 1 and all(step.keep == own.length - 1 for step in steps)
        of_one_scan = len(set(self._scans)) == 1
        attend = (
            self._attention_of_newest(own) if newest and of_one_scan else self._attention_after_prompt(own)
        )
        x_NM = self._layers(self._llm.embed(tokens), prompt_N + own.position_N, attend)
        return self._logits(x_NM[own.told_S])

    def guesses(self, rows: int) -> int:
        """As many as make `_FEW_ROWS` tokens with what the rows read for sure (see `_project`), in float32 alone.

        In half precision a pass over several tokens rounds otherwise than one over each: near ties fall the other way, and
        a scan's report would hang on which reports were written before it.
        """
        if self._llm.dtype != torch.float32:
            return 0
        return max(0, min(_MOST_GUESSES, _FEW_ROWS // rows - 1))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See `DecodingEngine.keep_rows`."""
        kept = list(rows)
        self._scans = [self._scans[row] for row in kept]
        self._lengths = [self._lengths[row] for row in kept]
        self._own = [keys_values[:, kept] for keys_values in self._own] if kept else []

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

        def attend(_: int, q_PHGD: Tensor, kv_P2D: Tensor) -> Tensor:
            k_HPD, v_HPD = kv_P2D.transpose(0, 1).contiguous().chunk(2)
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
        count, turned = len(x_NM), heads * (queries + 1)
        cos_N1D, sin_N1D = self._cos_LD[position_N][:, None], self._sin_LD[position_N][:, None]
        for index, layer in enumerate(weights.layers):
            projected = _project(self._norm(x_NM, layer.attention_norm_M), layer.query_key_value)
            projected = projected.view(count, turned + heads, channels)
            rotated = projected[:, :turned]
            halves = rotated.roll(channels // 2, dims=-1)
            rotated.mul_(cos_N1D).addcmul_(halves, sin_N1D)
            attended = attend(
                index,
                rotated[:, : heads * queries].view(count, heads, queries, channels),
                projected[:, heads * queries :],
            )
            x_NM = x_NM + _project(attended, layer.attention_output)
            gate, up = _project(self._norm(x_NM, layer.mlp_norm_M), layer.gate_up).chunk(2, dim=1)
            x_NM = x_NM + _project(functional.silu(gate) * up, layer.down)
        return x_NM

    def _attention_of_newest(self, own: Layout) -> Attend:
        """Attention where every row of one scan takes one token after as many: the usual step, in few operations."""
        rows, heads, length = len(self._scans), self._weights.heads, own.length
        queries, channels = self._weights.queries, self._weights.channels
        scale, shared = 1 / math.sqrt(channels), self._shared[self._scans[0]]
        prompt = shared[0][0].shape[1]
        unused = shared[0][0].new_empty(1)

        def attend(index: int, q_RHGD: Tensor, kv_R2D: Tensor) -> Tensor:
            own_2RLD = self._own[index]
            own_2RLD[:, :, length - 1] = kv_R2D.transpose(0, 1)
            own_2RLD = own_2RLD[:, :, :length].flatten(0, 1)
            own_keys, own_values = own_2RLD[: heads * rows], own_2RLD[heads * rows :]
            keys_HPD, values_HPD = shared[index]
            q_HRGD = q_RHGD.transpose(0, 1).reshape(heads, rows * queries, channels)
            scores = torch.baddbmm(unused, q_HRGD, keys_HPD.transpose(1, 2), beta=0, alpha=scale)
            own_scores = torch.baddbmm(
                unused,
                q_HRGD.view(heads * rows, queries, channels),
                own_keys.transpose(1, 2),
                beta=0,
                alpha=scale,
            )
            p = torch.cat([scores.view(heads * rows, queries, prompt), own_scores], dim=-1).softmax(dim=-1)
            out = torch.bmm(p[..., prompt:], own_values).view(heads, rows * queries, channels)
            out = torch.baddbmm(out, p.view(heads, rows * queries, -1)[..., :prompt], values_HPD)
            return out.view(heads, rows, queries * channels).transpose(0, 1).reshape(rows, -1)

        return attend

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

        def attend(index: int, q_NHGD: Tensor, kv_N2D: Tensor) -> Tensor:
            self._own[index][:, own.row_N, own.position_N] = kv_N2D.transpose(0, 1)
            keys, values = self._own[index].chunk(2)
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
        if x_NM.dtype != torch.float32:
            return functional.rms_norm(x_NM, scale_M.shape, scale_M, self._weights.norm_epsilon)
        # the same in fewer operations
        norm_N1 = torch.linalg.vector_norm(x_NM, dim=1, keepdim=True)
        mean_N1 = torch.addcmul(self._epsilon, norm_N1, norm_N1, value=1 / x_NM.shape[1])
        return x_NM * mean_N1.rsqrt_() * scale_M

    def _logits(self, x_RM: Tensor) -> Tensor:
        return _project(self._norm(x_RM, self._weights.norm_M), self._weights.head).float()


def _project(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """A projection without bias, (N, O).

    On a CPU a product with a few columns reads the weights as fast as memory gives them, one with a few rows does not, and
    nor does one with a single column: so a single row goes twice.
    """
    rows = len(x_NI)
    if rows > _FEW_ROWS or x_NI.device.type != "cpu" or x_NI.dtype != torch.float32:
        return functional.linear(x_NI, weight_OI)
    columns = x_NI.t() if rows > 1 else torch.cat([x_NI, x_NI]).t()
    return (weight_OI @ columns).t()[:rows].contiguous()
