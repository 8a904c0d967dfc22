"""Running the language model for several texts at once, each with its own length, after prompts read once.

Shapes: B prompts, R rows (one a text, the samples of a prompt side by side), T tokens, P prompt tokens,
M width, V vocabulary, H key-value heads, L cached tokens, D channels of a head, N tokens of all rows, S of them whose
successors are told.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from vlm3d.model.language_model import LanguageModel
from vlm3d.model.llama_weights import transformers_model


class Step(NamedTuple):
    """What a row reads next.

    Attributes:
        keep: Tokens after the prompt that it remembers; later ones are forgotten.
        token_ids: Tokens that follow them; at least one.
        guessed: How many of these, at the end, are guesses: what follows each of them is told too.
    """

    keep: int
    token_ids: list[int]
    guessed: int = 0


class DecodingEngine(Protocol):
    """Reads tokens row by row and says what comes next."""

    def start(self, prompts: Sequence[Tensor], num_samples: int, room: int) -> Tensor:
        """Read each prompt once and open ``num_samples`` rows after it.

        Args:
            prompts: Embeddings (P, M), one a scan.
            num_samples: Rows a prompt; row ``b * num_samples + k`` is sample k of prompt b.
            room: Most tokens that a row will hold after its prompt.

        Returns:
            Logits (B, V) of the token after each prompt.
        """
        ...

    def feed(self, steps: Sequence[Step]) -> Tensor:
        """Read tokens, one step an open row.

        Returns:
            Logits (S, V) of the tokens that follow: row after row, those after its last ``1 + guessed`` tokens.
        """
        ...

    def guesses(self, rows: int) -> int:
        """Guessed tokens a row that a step of so many rows takes at little cost."""
        ...

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Close all rows but these."""
        ...


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a step stand.

    Attributes:
        row_N: Row of each token.
        place_N: Its place in its row's step, 0..T-1.
        position_N: Its position in its row's text, the prompt included.
        width: T, the longest step.
        length: L, cached tokens of the longest row after this step.
        told_S: Indices of the tokens whose successors are told.
    """

    row_N: Tensor
    place_N: Tensor
    position_N: Tensor
    width: int
    length: int
    told_S: Tensor

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        guessed: Sequence[int] | None = None,
    ) -> Layout:
        """Lay out ``counts`` tokens a row from the positions ``starts``, the last ``guessed`` of which are guesses."""
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        places = [place for count in counts for place in range(count)]
        positions = [starts[row] + place for row, place in zip(rows, places, strict=True)]
        told = list[int]()
        for row, end in enumerate(accumulate(counts)):
            told += range(end - 1 - (guessed[row] if guessed else 0), end)
        row_N, place_N, position_N = torch.tensor([rows, places, positions], device=device)
        return cls(
            row_N, place_N, position_N, max(counts), max(positions) + 1, torch.tensor(told, device=device)
        )

    def pad(self, packed_N: Tensor, rows: int) -> Tensor:
        """Spread (N, ...) over (R, T, ...), zeros where a row has fewer tokens."""
        padded = packed_N.new_zeros(rows, self.width, *packed_N.shape[1:])
        padded[self.row_N, self.place_N] = packed_N
        return padded


class TransformersEngine:
    """Any language model, run by its own transformers code.

    Args:
        llm: The language model, in evaluation mode.
    """

    def __init__(self, llm: LanguageModel) -> None:
        self._llm = llm
        self._cache = RowCache()
        self._prompt_lengths: list[int] = []
        self._cache_argument = cache_argument(llm)
        self._window = getattr(llm.config, "sliding_window", None)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Tensor], num_samples: int, room: int) -> Tensor:
        """See `DecodingEngine.start`."""
        lengths = [len(prompt) for prompt in prompts]
        if self._window is not None and max(lengths) + room > self._window:
            raise ValueError(
                f"{max(lengths)} prompt tokens and {room} to write exceed the attention window of {self._window}"
            )
        self._cache.open(len(prompts), max(lengths) + room)
        layout = Layout.of([0] * len(prompts), lengths, self._llm.device)
        logits_BV = self._run(layout.pad(torch.cat(list(prompts)), len(prompts)), layout)
        self._prompt_lengths = [length for length in lengths for _ in range(num_samples)]
        self._cache.select([scan for scan in range(len(prompts)) for _ in range(num_samples)])
        return logits_BV

    @torch.inference_mode()
    def feed(self, steps: Sequence[Step]) -> Tensor:
        """See `DecodingEngine.feed`."""
        starts = [length + step.keep for length, step in zip(self._prompt_lengths, steps, strict=True)]
        layout = Layout.of(
            starts,
            [len(step.token_ids) for step in steps],
            self._llm.device,
            [step.guessed for step in steps],
        )
        embedded_NM = self._llm.embed_ids([token for step in steps for token in step.token_ids])
        return self._run(layout.pad(embedded_NM, len(steps)), layout)

    def guesses(self, rows: int) -> int:
        """None: what a step costs is not known of every architecture."""
        return 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See `DecodingEngine.keep_rows`."""
        self._prompt_lengths = [self._prompt_lengths[row] for row in rows]
        self._cache.select(list(rows))

    def _run(self, embeddings_RTM: Tensor, layout: Layout) -> Tensor:
        rows, width = embeddings_RTM.shape[:2]
        position_RT = layout.pad(layout.position_N, rows)
        seen_RTL = torch.arange(layout.length, device=position_RT.device) <= position_RT[..., None]
        mask_R1TL = torch.zeros(seen_RTL.shape, dtype=embeddings_RTM.dtype, device=seen_RTL.device)[:, None]
        mask_R1TL = mask_R1TL.masked_fill(~seen_RTL[:, None], torch.finfo(mask_R1TL.dtype).min)
        self._cache.layout = layout
        told_row_S, told_place_S = layout.row_N[layout.told_S], layout.place_N[layout.told_S]
        first = int(told_place_S.min())
        output = self._llm(
            embeddings_RTM,
            attention_mask=mask_R1TL,
            position_ids=position_RT,
            use_cache=True,
            logits_to_keep=width - first,
            **{self._cache_argument: self._cache},
        )
        logits_SV: Tensor = output.logits[told_row_S, told_place_S - first].float()
        return logits_SV


class RowCache(Cache):
    """Keys and values in memory set aside once, where each row has its own length.

    Attributes:
        layout: Where the tokens of the step that runs now stand.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layout: Layout | None = None
        self._rows = self._room = 0
        self._stored: dict[int, list[Tensor]] = {}

    def open(self, rows: int, room: int) -> None:
        """Set up for this many rows of at most ``room`` tokens."""
        self._rows, self._room = rows, room
        self._stored = {}

    def select(self, rows: list[int]) -> None:
        """Keep, or repeat, these rows."""
        if rows != list(range(self._rows)):
            for layer, (keys, values) in self._stored.items():
                self._stored[layer] = [keys[rows], values[rows]]
            self._rows = len(rows)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (R, H, T, D) of this step; returns all (R, H, L, D)."""
        layout = self.layout
        assert layout is not None, "a step sets its layout first"
        if layer_idx not in self._stored:
            _, heads, _, channels = key_states.shape
            shape = (self._rows, heads, self._room, channels)
            self._stored[layer_idx] = [key_states.new_zeros(shape), value_states.new_zeros(shape)]
        for stored, new in zip(self._stored[layer_idx], (key_states, value_states), strict=True):
            stored[layout.row_N, :, layout.position_N] = new[layout.row_N, :, layout.place_N]
        keys, values = self._stored[layer_idx]
        return keys[:, :, : layout.length], values[:, :, : layout.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a row can hold."""
        return self._room


def cache_argument(llm: LanguageModel) -> str:
    """What the model's forward calls its cache: ``cache`` from transformers 5.24 on, before it ``past_key_values``."""
    names = inspect.signature(transformers_model(llm).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def log_softmax_rows(logits_RV: Tensor) -> Tensor:
    """Log-probabilities (R, V) in float32."""
    return functional.log_softmax(logits_RV.float(), dim=-1)
