"""The report: image features and findings go into a language model, a three-part clinical report comes out.

The language model reads ``request | visual tokens | lesion tokens | findings in words | report``. In training
the report is given and only its words are scored; in generation it is written.

Shapes: B scans, T report tokens, L lesions, K diseases, R regions, N patches, C width of the image features,
M width of the language model, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm3d.config import ReportConfig
from vlm3d.errors import ConfigError
from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.language_model import LanguageModel, load_language_model, meta_language_model
from vlm3d.model.llm_architectures import hidden_size
from vlm3d.model.location import LesionLocationInjector
from vlm3d.model.phrase_memory import PhraseMemory
from vlm3d.model.projector import VisionToLLMProjector
from vlm3d.model.report_decoding import ReportDecoder
from vlm3d.model.report_sections import (
    HEADINGS,
    SEPARATOR,
    ReportSections,
    format_report,
    parse_report,
    tidy,
)
from vlm3d.model.report_writing import GeneratedReport
from vlm3d.model.strict_loading import copy_strictly
from vlm3d.model.token_choice import DecodingSettings

__all__ = [
    "DecodingSettings",
    "GeneratedReport",
    "LesionEvidence",
    "ReportGenerator",
    "ReportSections",
    "format_report",
    "parse_report",
]

SYSTEM_PROMPT = "You are a radiologist who reports chest CT scans."
BEFORE_IMAGE = "Scan: "
AFTER_IMAGE = (
    "\nFindings of the image analysis: {findings}.\nWrite the report: findings, impression, recommendations."
)
AFTER_IMAGE_ALONE = "\nWrite the report: findings, impression, recommendations."
IGNORED_LABEL = -100
_ADAPTER_PREFIX = "adapter."


@dataclass
class LesionEvidence:
    """What the heads say about a batch, for `LesionLocationInjector`.

    Attributes:
        disease_probabilities_BK: Probabilities, or labels in training.
        masks_BLDHW: Masks or probabilities, 0..1, on the model's voxel grid, canonical.
        regions_BDHW: Region ids on the same grid.
        spacing_mm: Voxel size along (D, H, W).
        grid: Patches along (Z, Y, X); needed by the embedding strategy.
        seen_BKZYX: How much each patch is looked at for each disease, or, as bool, known to show it; for the places of what
            no mask shows.
        disease_thresholds: One for all diseases, or one each.
    """

    disease_probabilities_BK: Tensor | None = None
    masks_BLDHW: Tensor | None = None
    regions_BDHW: Tensor | None = None
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    grid: tuple[int, int, int] | None = None
    seen_BKZYX: Tensor | None = None
    disease_thresholds: Sequence[float] | float = 0.5


class ReportGenerator(nn.Module):
    """Write a clinical report from a scan's features and findings.

    Args:
        llm: The language model, or None to add it later with `attach_llm` or `load_llm`.
        vision_dim: Width of the image features.
        config: Settings; see `vlm3d.config.ReportConfig`.
        num_lesions: Masks a scan.
        llm_dim: Width of the language model; None asks ``llm``.
    """

    def __init__(
        self,
        llm: LanguageModel | None,
        vision_dim: int,
        config: ReportConfig | None = None,
        num_lesions: int = 5,
        llm_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config or ReportConfig()
        if llm is None and llm_dim is None:
            llm_dim = hidden_size(self.config.llm_name)
        width = llm.hidden_size if llm is not None else int(llm_dim or 0)
        self.projector = VisionToLLMProjector(
            vision_dim,
            width,
            num_queries=self.config.num_queries,
            depth=self.config.projector_depth,
            num_heads=_heads(self.config.projector_dim),
            inner_dim=self.config.projector_dim,
            output_rms=0.0,
        )
        self.location = LesionLocationInjector(
            self.config.location_strategy, vision_dim, width, num_lesions, output_rms=0.0
        )
        self.llm: LanguageModel | None = None
        self._waiting_adapters: dict[str, Tensor] | None = None
        self._phrases = PhraseMemory()
        if llm is not None:
            self.attach_llm(llm)

    @classmethod
    def from_config(
        cls,
        config: ReportConfig,
        vision_dim: int,
        num_lesions: int = 5,
        *,
        device: torch.device | str | None = None,
        skip_llm: bool = False,
        llm_dim: int | None = None,
    ) -> ReportGenerator:
        """Build the generator and, unless told otherwise, load its language model.

        Args:
            config: Settings.
            vision_dim: Width of the image features.
            num_lesions: Masks a scan.
            device: ``"meta"`` builds everything without storage, for counting.
            skip_llm: Leave the language model for `load_llm`.
            llm_dim: Its width, where the settings' name does not tell it.
        """
        place = torch.device(device or "cpu")
        with place:
            generator = cls(None, vision_dim, config, num_lesions, llm_dim)
        if skip_llm:
            return generator
        if place.type == "meta":
            generator.llm = meta_language_model(config.llm_name, **_lora_settings(config))
        else:
            generator.load_llm(place)
        return generator

    def load_llm(self, device: torch.device | str | None = None) -> None:
        """Load the language model that the settings name, if it is not there yet."""
        if self.llm is None:
            self.attach_llm(
                load_language_model(
                    self.config.llm_name,
                    load_in_4bit=self.config.load_in_4bit,
                    device=device or self.projector.queries.device,
                    **_lora_settings(self.config),
                )
            )

    def attach_llm(self, llm: LanguageModel) -> None:
        """Take a loaded language model: fit the visual tokens' scale to it, restore waiting adapters.

        Raises:
            ConfigError: Its width is not the one that this generator was built for.
        """
        built_for = self.projector.output_projection.out_features
        if llm.hidden_size != built_for:
            raise ConfigError(
                f"the language model {llm.name} is {llm.hidden_size} wide, "
                f"this report generator was built for {built_for}: build it with the same llm_name"
            )
        scales = [self.projector.output_scale]
        if self.location.uses_embedding:
            scales.append(self.location.output_scale)
        if not all(scale.known for scale in scales):
            rms = llm.embedding_rms()
            for scale in scales:
                scale.set_rms(rms)
        if self._waiting_adapters is not None:
            llm.load_adapter_state_dict(self._waiting_adapters)
            self._waiting_adapters = None
        self.llm = llm

    def forward(
        self,
        global_BC: Tensor,
        region_BRC: Tensor | None,
        patch_BNC: Tensor,
        report_tokens: Tensor,
        attention_mask: Tensor | None = None,
        prompt_texts: Sequence[str] | None = None,
        evidence: LesionEvidence | None = None,
        region_present_BR: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Score given reports.

        Args:
            global_BC: One vector a scan.
            region_BRC: One vector a region, or None.
            patch_BNC: One vector a patch.
            report_tokens: (B, T) token ids from `tokenize_reports`; -100 counts as padding.
            attention_mask: (B, T), 0 at padding. Without it, padding tokens at a row's end are padding. A row
                that is all padding has no report and is not scored.
            prompt_texts: Findings in words, one a scan; None words ``evidence``.
            evidence: What the heads, or the labels, say.
            region_present_BR: False for regions that the scan lacks.

        Returns:
            ``loss``, the mean cross-entropy of a report token in nats, and ``logits`` (B, T, V), whose
            position t predicts report token t.
        """
        llm = self._llm()
        tokens = report_tokens.to(llm.device)
        keep_BT = self._report_mask(tokens, attention_mask)
        tokens = tokens.where(keep_BT, torch.zeros_like(tokens))
        prompts = self.prompts(global_BC, region_BRC, patch_BNC, prompt_texts, evidence, region_present_BR)
        embeddings, mask = _join_left_padded(prompts, llm.embed(tokens), keep_BT)
        output = llm(
            embeddings,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=tokens.shape[1] + 1,
        )
        logits_BTV = output.logits[:, :-1]
        labels = tokens.masked_fill(~keep_BT, IGNORED_LABEL)
        loss = functional.cross_entropy(
            logits_BTV.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return {"loss": loss / keep_BT.sum().clamp(min=1), "logits": logits_BTV}

    def generate(
        self,
        global_BC: Tensor,
        region_BRC: Tensor | None,
        patch_BNC: Tensor,
        prompt_texts: Sequence[str] | None = None,
        evidence: LesionEvidence | None = None,
        region_present_BR: Tensor | None = None,
        **decoding: Any,
    ) -> list[GeneratedReport]:
        """Write one report a scan; the same seed gives the same words.

        Arguments up to ``region_present_BR`` are those of `forward`, the others those of `write`.
        """
        groups = self.generate_samples(
            global_BC,
            region_BRC,
            patch_BNC,
            prompt_texts,
            evidence,
            region_present_BR,
            num_samples=1,
            **decoding,
        )
        return [group[0] for group in groups]

    @torch.inference_mode()
    def generate_samples(
        self,
        global_BC: Tensor,
        region_BRC: Tensor | None,
        patch_BNC: Tensor,
        prompt_texts: Sequence[str] | None = None,
        evidence: LesionEvidence | None = None,
        region_present_BR: Tensor | None = None,
        *,
        num_samples: int,
        **decoding: Any,
    ) -> list[list[GeneratedReport]]:
        """Write ``num_samples`` reports a scan, whose prompt is read once; sample 0 is what `generate` writes.

        Arguments are those of `generate`. Each report carries its token ids, ready for `forward`, and their
        log-probabilities. At temperature 0 the reports of a scan are all the same.
        """
        with evaluating(self):
            prompts = self.prompts(
                global_BC, region_BRC, patch_BNC, prompt_texts, evidence, region_present_BR
            )
        return self.write(prompts, num_samples, **decoding)

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Tensor],
        num_samples: int = 1,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        num_beams: int | None = None,
        seed: int = 0,
        on_text: Callable[[int, int, str], None] | None = None,
    ) -> list[list[GeneratedReport]]:
        """Write ``num_samples`` reports after each of some prompts from `prompts`, all side by side.

        Args:
            prompts: From scans of any size.
            num_samples: Reports a prompt.
            max_new_tokens: Longest report; this and what follows defaults to the settings.
            temperature: 0 takes the likeliest words.
            top_p: Nucleus of sampling.
            num_beams: Above 1, at temperature 0, each section is the likeliest that so many beams find.
            seed: Of sampling.
            on_text: Told of each report as it grows: see `ReportDecoder`.
        """
        temperature = self.config.temperature if temperature is None else temperature
        if num_beams is None:
            num_beams = 1 if temperature else self.config.num_beams
        settings = DecodingSettings(
            max_new_tokens=self.config.max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=self.config.top_p if top_p is None else top_p,
            num_beams=num_beams,
            seed=seed,
        )
        with evaluating(self):
            decoder = ReportDecoder(self._llm(), settings, on_text, self._phrases)
            return decoder.write_all(prompts, num_samples)

    def tokenize_reports(
        self, reports: Sequence[str], max_length: int | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask of reports, section by section as generation writes them, padded to the longest.

        Args:
            reports: Report texts; headings are recognized, text without any is all findings. An empty one
                gets no tokens and is not scored.
            max_length: Longer ones are cut, and then do not end with the end token.
            device: Where the result goes.

        Returns:
            ``report_tokens`` (B, T), -100 at padding, and ``attention_mask`` (B, T).
        """
        rows = [self._report_ids(report)[:max_length] for report in reports]
        length = max(1, *(len(row) for row in rows))
        tokens = torch.full((len(rows), length), IGNORED_LABEL, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[index, : len(row)] = 1
        return tokens.to(device), mask.to(device)

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """All that training changes: projector, location tokens, adapters; not the frozen language model."""
        adapters = self._waiting_adapters if self.llm is None else self.llm.adapter_state_dict()
        own = {name: tensor.detach() for name, tensor in self._own_tensors().items()}
        return own | {f"{_ADAPTER_PREFIX}{name}": tensor for name, tensor in (adapters or {}).items()}

    def load_checkpoint_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `checkpoint_state_dict`; adapters wait for the language model if it is not loaded yet.

        Raises:
            CheckpointError: A tensor is missing, foreign or of another shape; the message names it. A state without
                any adapter is that of a model whose adapters never trained: they start as no change.
        """
        adapters = {
            name.removeprefix(_ADAPTER_PREFIX): tensor
            for name, tensor in state.items()
            if name.startswith(_ADAPTER_PREFIX)
        }
        own = {name: tensor for name, tensor in state.items() if not name.startswith(_ADAPTER_PREFIX)}
        copy_strictly(self._own_tensors(), own, "the report generator")
        if self.llm is None:
            self._waiting_adapters = adapters or None
        elif adapters:
            self.llm.load_adapter_state_dict(adapters)

    def _own_tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part in ("projector", "location")
            for name, tensor in self.get_submodule(part).state_dict(keep_vars=True).items()
        }

    def _llm(self) -> LanguageModel:
        if self.llm is None:
            raise RuntimeError("the report generator has no language model yet: call load_llm() first")
        return self.llm

    def _report_ids(self, report: str) -> list[int]:
        llm = self._llm()
        if not report.strip():
            return []
        ids: list[int] = []
        for index, (heading, body) in enumerate(zip(HEADINGS, parse_report(report), strict=True)):
            ids += llm.encode(heading if index == 0 else SEPARATOR + heading)
            ids += llm.encode(tidy(body))
        return [*ids, llm.end_token_id]

    def _report_mask(self, tokens_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
        """True at the tokens that belong to a report."""
        if attention_mask is not None:
            return attention_mask.to(tokens_BT.device).bool() & (tokens_BT != IGNORED_LABEL)
        llm = self._llm()
        pad = llm.tokenizer.pad_token_id if llm.tokenizer is not None else None
        padding = (tokens_BT == IGNORED_LABEL) | (tokens_BT == pad if pad is not None else False)
        trailing = padding.flip(1).long().cumprod(dim=1).flip(1).bool()
        if pad == llm.end_token_id:  # the first of them ends the report, unless there is none
            first = trailing & ~trailing.roll(1, dims=1)
            first[:, 0] = False
            trailing = trailing & ~(first & (tokens_BT == pad))
        return ~trailing & (tokens_BT != IGNORED_LABEL)

    def prompts(
        self,
        global_BC: Tensor,
        region_BRC: Tensor | None,
        patch_BNC: Tensor,
        prompt_texts: Sequence[str] | None,
        evidence: LesionEvidence | None,
        region_present_BR: Tensor | None,
    ) -> list[Tensor]:
        """Each scan's prompt as embeddings (P, M), P as long as its words need; arguments are those of `forward`."""
        llm = self._llm()
        image_BQM = self.projector(global_BC, region_BRC, patch_BNC, region_present_BR)
        if self.location.uses_embedding:
            image_BQM = torch.cat([image_BQM, self._lesion_tokens(patch_BNC, evidence)], dim=1)
        image_BQM = image_BQM.to(device=llm.device, dtype=llm.dtype)
        texts = self.findings_in_words(evidence, len(global_BC)) if prompt_texts is None else prompt_texts
        if len(texts) != len(global_BC):
            raise ValueError(f"{len(texts)} prompt texts for {len(global_BC)} scans")
        prompts = []
        for image_QM, text in zip(image_BQM, texts, strict=True):
            after = AFTER_IMAGE.format(findings=text) if text else AFTER_IMAGE_ALONE
            head, tail = llm.chat_around_image(SYSTEM_PROMPT, BEFORE_IMAGE, after)
            prompts.append(torch.cat([llm.embed_ids(head), image_QM, llm.embed_ids(tail)]))
        return prompts

    def findings_in_words(self, evidence: LesionEvidence | None, batch: int = 1) -> Sequence[str]:
        """What the prompt tells of each scan; empty where findings are not told in words."""
        if not self.location.uses_text or evidence is None or evidence.disease_probabilities_BK is None:
            return [""] * batch
        return self.location.describe(
            evidence.disease_probabilities_BK,
            evidence.masks_BLDHW,
            evidence.regions_BDHW,
            evidence.spacing_mm,
            evidence.disease_thresholds,
            seen_BKZYX=evidence.seen_BKZYX,
        )

    def _lesion_tokens(self, patch_BNC: Tensor, evidence: LesionEvidence | None) -> Tensor:
        if evidence is None or evidence.masks_BLDHW is None or evidence.grid is None:
            raise ValueError(
                f"location strategy '{self.config.location_strategy}' needs evidence: masks_BLDHW and grid"
            )
        return self.location.embed(patch_BNC, evidence.masks_BLDHW, evidence.grid)


def _join_left_padded(prompts: list[Tensor], report_BTM: Tensor, keep_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts of different length before reports, padded on the left so that all reports start together."""
    longest = max(len(prompt) for prompt in prompts)
    rows = [functional.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
    positions = torch.arange(longest, device=keep_BT.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=keep_BT.device)
    mask_BP = positions[None] >= longest - lengths[:, None]
    return torch.cat([torch.stack(rows), report_BTM], dim=1), torch.cat([mask_BP, keep_BT], dim=1)


def _heads(inner_dim: int) -> int:
    """Heads of about 64 channels that divide the width."""
    return next(heads for heads in range(max(1, inner_dim // 64), 0, -1) if inner_dim % heads == 0)


def _lora_settings(config: ReportConfig) -> dict[str, Any]:
    return {
        "use_lora": config.use_lora,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
    }
