"""Several reports of one scan, written side by side after one prompt, and how likely a model finds given words.

Shapes: K reports, P prompt tokens, T report tokens, V words of the vocabulary, M width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm3d.model.decoding_engine import Step, log_softmax_rows
from vlm3d.model.language_model import LanguageModel
from vlm3d.model.report_decoding import open_engine
from vlm3d.model.report_generator import (
    AFTER_IMAGE_ALONE,
    BEFORE_IMAGE,
    SYSTEM_PROMPT,
    LesionEvidence,
    ReportGenerator,
)
from vlm3d.model.vision_encoder import VisionFeatures


@dataclass(frozen=True)
class SampledGroup:
    """Reports of one scan as they were sampled.

    Attributes:
        tokens_KT: Token ids; 0 behind a report's end.
        mask_KT: True at a report's tokens, the one that ends it included.
        log_p_KT: Log-probability of each token as it was drawn, in nats; 0 where the mask is False.
        finished_K: True where a report ended by itself within the budget.
        texts: In words.
    """

    tokens_KT: Tensor
    mask_KT: Tensor
    log_p_KT: Tensor
    finished_K: Tensor
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ReportContext:
    """One scan as the report generator sees it; the image was encoded once, for all reports of the scan.

    Attributes:
        features: Of the encoder, for one scan.
        prompt_text: Findings in words; empty where they are not told in words.
        evidence: Masks, where the prompt holds tokens of them.
    """

    features: VisionFeatures
    prompt_text: str
    evidence: LesionEvidence

    @classmethod
    def of(
        cls, generator: ReportGenerator, features: VisionFeatures, evidence: LesionEvidence
    ) -> ReportContext:
        """Word the findings once, and let go what no prompt needs after that: masks are large."""
        (text,) = generator.findings_in_words(evidence)
        masks = evidence.masks_BLDHW if generator.location.uses_embedding else None
        return cls(features, text, LesionEvidence(masks_BLDHW=masks, grid=evidence.grid))

    def prompt(self, generator: ReportGenerator) -> Tensor:
        """The prompt's embeddings (P, M)."""
        return generator.prompts(
            self.features.global_BC,
            self.features.region_BRC,
            self.features.patch_BNC,
            [self.prompt_text],
            self.evidence,
            self.features.region_present_BR,
        )[0]

    def log_probabilities(
        self, generator: ReportGenerator, tokens_KT: Tensor, mask_KT: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """`row_log_probabilities` of given reports after this scan's prompt."""
        llm = generator.llm
        assert llm is not None, "the language model is loaded before reports are sampled"
        return row_log_probabilities(llm, self.prompt(generator), tokens_KT, mask_KT, temperature)


def row_log_probabilities(
    llm: LanguageModel, prompt_PM: Tensor, tokens_KT: Tensor, mask_KT: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability (K, T) of each token of some reports after one prompt, in nats; 0 where the mask is False.

    The prompt and all reports stand in one row of P + N tokens, N those of the mask, and each report sees the prompt and
    itself: the prompt is read once, forward and backward, not K times.

    Args:
        llm: The language model.
        prompt_PM: The prompt's embeddings.
        tokens_KT: Token ids.
        mask_KT: True at a report's tokens, which come first in its row.
        temperature: Of the distribution.

    Raises:
        ValueError: Prompt and reports are longer than the model's window of attention, which the mask knows nothing of.
    """
    window = getattr(llm.config, "sliding_window", None)
    if window is not None and len(prompt_PM) + mask_KT.shape[1] > window:
        raise ValueError(
            f"{len(prompt_PM)} prompt tokens and reports of {mask_KT.shape[1]} exceed the attention window of {window}"
        )
    row_N, place_N = mask_KT.nonzero(as_tuple=True)
    tokens_N, prompt_length = tokens_KT[mask_KT], len(prompt_PM)
    report_L = torch.cat([row_N.new_full((prompt_length,), -1), row_N])
    position_L = torch.cat([torch.arange(prompt_length, device=row_N.device), prompt_length + place_N])
    sees_LL = (report_L == -1) | (report_L == report_L[:, None])
    sees_LL &= position_L <= position_L[:, None]
    embedded_LM = torch.cat([prompt_PM.to(llm.dtype), llm.embed(tokens_N)])
    hidden_LL = torch.zeros(sees_LL.shape, dtype=embedded_LM.dtype, device=sees_LL.device)
    hidden_LL = hidden_LL.masked_fill(~sees_LL, torch.finfo(hidden_LL.dtype).min)
    output = llm(
        embedded_LM[None],
        attention_mask=hidden_LL[None, None],
        position_ids=position_L[None],
        use_cache=False,
        logits_to_keep=len(tokens_N) + 1,  # the prompt's last token, then all that were written
    )
    log_p_NV = log_softmax_rows(output.logits[0].float() / temperature)
    index_N = torch.arange(len(tokens_N), device=row_N.device)
    told_by_N = index_N.where(
        place_N > 0, torch.zeros_like(index_N)
    )  # the token before, or the prompt's last
    log_p_KT = log_p_NV.new_zeros(mask_KT.shape)
    return log_p_KT.masked_scatter(mask_KT, log_p_NV[told_by_N, tokens_N])


@torch.no_grad()
def sample_group(
    llm: LanguageModel,
    prompt_PM: Tensor,
    group_size: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> SampledGroup:
    """Sample several reports after one prompt, which is read once.

    Words are drawn from the whole distribution, nothing forbidden and no heading forced, so that the loss later sees
    the very probabilities that were drawn from.

    Args:
        llm: In evaluation mode.
        prompt_PM: The prompt's embeddings.
        group_size: K.
        max_new_tokens: Budget of each report.
        temperature: Of the distribution.
        seed: The same seed draws the same words.

    Raises:
        FloatingPointError: The model's probabilities are no numbers.
    """
    rows = _drawn(llm, prompt_PM, group_size, max_new_tokens, temperature, seed)
    longest = max(map(len, rows))
    padded = [[*row, *[(0, 0.0)] * (longest - len(row))] for row in rows]
    length_K1 = torch.tensor([[len(row)] for row in rows], device=llm.device)
    return SampledGroup(
        torch.tensor([[token for token, _ in row] for row in padded], device=llm.device),
        torch.arange(longest, device=llm.device) < length_K1,
        torch.tensor([[log_p for _, log_p in row] for row in padded], device=llm.device),
        torch.tensor([row[-1][0] in llm.stop_token_ids for row in rows], device=llm.device),
        tuple(llm.decode([token for token, _ in row]) for row in rows),
    )


def _drawn(
    llm: LanguageModel, prompt_PM: Tensor, group_size: int, longest: int, temperature: float, seed: int
) -> list[list[tuple[int, float]]]:
    """Each report's tokens with the log-probability that each was drawn with."""
    draws = torch.Generator().manual_seed(seed)
    rows: list[list[tuple[int, float]]] = [[] for _ in range(group_size)]
    engine = open_engine(llm)
    with torch.autocast(llm.device.type, enabled=False):  # the engine's cache holds the model's own type
        logits_RV = engine.start([prompt_PM.to(llm.dtype)], group_size, longest).expand(group_size, -1)
        running = rows
        while running:
            log_p_RV = log_softmax_rows(logits_RV / temperature).cpu()
            if bool(log_p_RV.isnan().any()):
                raise FloatingPointError("the language model's probabilities are no numbers")
            token_R1 = torch.multinomial(log_p_RV.exp(), 1, generator=draws)
            log_p_R1 = log_p_RV.gather(1, token_R1)
            for row, token, log_p in zip(
                running, token_R1[:, 0].tolist(), log_p_R1[:, 0].tolist(), strict=True
            ):
                row.append((token, log_p))
            still = [
                index
                for index, row in enumerate(running)
                if row[-1][0] not in llm.stop_token_ids and len(row) < longest
            ]
            if len(still) < len(running):
                engine.keep_rows(still)
                running = [running[index] for index in still]
            if running:
                logits_RV = engine.feed([Step(len(row) - 1, [row[-1][0]]) for row in running])
    return rows


class FrozenPerplexity:
    """How surprised the frozen language model, without its adapters, is by a report that it is asked for unseen.

    Args:
        llm: The language model; its adapters are set aside for each call.
        rows: Texts a forward pass.
    """

    def __init__(self, llm: LanguageModel, rows: int = 4) -> None:
        self.llm = llm
        self.rows = rows
        head, tail = llm.chat_around_image(SYSTEM_PROMPT, BEFORE_IMAGE, AFTER_IMAGE_ALONE)
        self._prompt = [*head, *tail]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Perplexity a token, its end not counted; infinite for an empty text."""
        was_training = self.llm.training
        self.llm.eval()
        zeros = {
            p: torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape) for p in self._last_factors()
        }
        try:
            with replaced_weights(zeros):
                return [
                    value
                    for start in range(0, len(texts), self.rows)
                    for value in self._pass(texts[start : start + self.rows])
                ]
        finally:
            self.llm.train(was_training)

    def _last_factors(self) -> list[nn.Parameter]:
        """The second factor of each adapter: without it the adapter adds nothing."""
        return [p for name, p in self.llm.adapter_parameters().items() if "lora_B" in name]

    def _pass(self, texts: Sequence[str]) -> list[float]:
        ids = [self.llm.encode(text) for text in texts]
        longest = max(1, *(len(row) for row in ids))
        start = len(self._prompt)
        rows = torch.tensor([[*self._prompt, *row, *[0] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * (start + len(row)) + [0] * (longest - len(row)) for row in ids])
        output = self.llm(
            self.llm.embed(rows),
            attention_mask=mask.to(self.llm.device),
            use_cache=False,
            logits_to_keep=longest + 1,
        )
        log_p_BTV = output.logits[:, :-1].float().log_softmax(dim=2)
        chosen_BT = log_p_BTV.gather(2, rows[:, start:, None].to(log_p_BTV.device))[:, :, 0].cpu()
        nats = -(chosen_BT * mask[:, start:]).sum(dim=1)
        return [
            math.exp(min(float(total) / len(row), 80.0)) if row else math.inf
            for total, row in zip(nats, ids, strict=True)
        ]


@contextmanager
def replaced_weights(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within the block parameters hold other tensors; nothing is copied."""
    own = {parameter: parameter.data for parameter in tensors}
    try:
        for parameter, tensor in tensors.items():
            parameter.data = tensor
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
