"""The whole model: one encoder, three heads, one forward pass."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm3d.anatomy.regions import MIRRORED_REGION_IDS, NUM_REGIONS
from vlm3d.config import Config, ModelConfig, with_model_fields
from vlm3d.errors import OutputError
from vlm3d.labels import TASKS, Lesion, first_diseases, first_lesions
from vlm3d.model import checkpoint
from vlm3d.model.classification_head import MultiLabelClassifier
from vlm3d.model.evaluation_mode import evaluating
from vlm3d.model.localization_module import LesionLocalizationModule
from vlm3d.model.part_sizes import PartSize, part_sizes
from vlm3d.model.patch_embedding import PatchBox, Place, cut_boxes
from vlm3d.model.report_generator import LesionEvidence, ReportGenerator
from vlm3d.model.strict_loading import copy_strictly
from vlm3d.model.text_encoder import TextEncoder, load_text_encoder, text_encoder_dim
from vlm3d.model.vision_encoder import ThreeDVisionEncoder, VisionFeatures

PARTS = ("vision", "classifier", "localizer", "projector", "adapters")
"""What `VLM3DMultiTask.freeze` and `unfreeze` take; the text encoder and the language model are always frozen."""


class VLM3DMultiTask(nn.Module):
    """Reads chest CTs: 18 disease probabilities, 5 lesion masks and a report, from one pass of the encoder or, with
    ``read_mirrored``, two.

    Every keyword but ``config`` overrides one of its fields; without a configuration the full-size defaults hold.

    Args:
        config: A whole configuration, or only its model section.
        vision_in_channels: Image channels.
        vision_embed_dim: Token width; head counts follow it where they no longer divide it.
        vision_depth: Encoder blocks.
        num_diseases: Labels of the classifier.
        num_lesion_diseases: Prompts of the localizer.
        llm_name: Language model, a Hub name or a folder.
        use_lora: Train low-rank adapters in it.
        lora_rank: Their rank.
        load_in_4bit: Hold it in NF4.
        text_encoder: A loaded frozen text encoder; by default the configured one is loaded.
        load_text: False leaves the prompt embeddings empty, for a checkpoint to fill.
        load_llm: False leaves the language model for later; reports load it when they need it.
        text_dim: Width of the text encoder where it is not loaded; the configured one's by default.
        llm_dim: Width of a language model that will be attached later; the configured one's by default.
        device: ``"meta"`` builds without storage, for counting parameters.

    Raises:
        WeightsUnavailableError: The text encoder or the language model is in none of the places looked in.
    """

    def __init__(
        self,
        config: Config | ModelConfig | None = None,
        *,
        vision_in_channels: int | None = None,
        vision_embed_dim: int | None = None,
        vision_depth: int | None = None,
        num_diseases: int | None = None,
        num_lesion_diseases: int | None = None,
        llm_name: str | None = None,
        use_lora: bool | None = None,
        lora_rank: int | None = None,
        load_in_4bit: bool | None = None,
        text_encoder: TextEncoder | None = None,
        load_text: bool = True,
        load_llm: bool = True,
        text_dim: int | None = None,
        llm_dim: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = with_model_fields(
            config,
            vision={"in_channels": vision_in_channels, "embed_dim": vision_embed_dim, "depth": vision_depth},
            classifier={"num_diseases": num_diseases},
            localizer={"num_lesion_diseases": num_lesion_diseases},
            report={
                "llm_name": llm_name,
                "use_lora": use_lora,
                "lora_rank": lora_rank,
                "load_in_4bit": load_in_4bit,
            },
        )
        self.training_status: checkpoint.Status = "untrained"
        self.untrained_tasks: tuple[str, ...] = TASKS
        # `RegionMap.method` of the training scans; empty where nobody said
        self.learned_anatomy: tuple[str, ...] = ()
        sizes = self.config.model
        if sizes.localizer.read_mirrored and sizes.vision.num_regions != NUM_REGIONS:
            raise ValueError(f"read_mirrored knows the {NUM_REGIONS} regions, not {sizes.vision.num_regions}")
        place = torch.device(device) if device is not None else torch.get_default_device()
        if load_text and text_encoder is None and place.type != "meta":
            text_encoder = load_text_encoder(sizes.classifier.text_encoder, device=place)
        if text_encoder is not None:
            text_dim = text_encoder.dim
        encoder_dim = text_encoder_dim(sizes.classifier.text_encoder) if text_dim is None else text_dim
        width = sizes.vision.embed_dim
        with place:
            self.vision_encoder = ThreeDVisionEncoder(sizes.vision)
            self.classifier = MultiLabelClassifier(sizes.classifier, width, encoder_dim)
            self.localizer = LesionLocalizationModule(
                sizes.localizer,
                width,
                encoder_dim,
                sizes.vision.in_channels,
                sizes.vision.patch_size,
                bands=sizes.vision.bands,
                num_regions=sizes.vision.num_regions,
                peak_shells=sizes.vision.peak_shells,
            )
        self.report_generator = ReportGenerator.from_config(
            sizes.report,
            width,
            sizes.localizer.num_lesion_diseases,
            device=place,
            skip_llm=not load_llm,
            llm_dim=llm_dim,
        )
        if text_encoder is not None:
            self.attach_text_encoder(text_encoder)
        else:
            self.classifier.soft_prompts.requires_grad_(False)

    # --- names -------------------------------------------------------------------------------------------------

    @property
    def disease_names(self) -> list[str]:
        """Names of the classifier's labels, in order."""
        return [disease.name for disease in first_diseases(self.config.model.classifier.num_diseases)]

    @property
    def lesions(self) -> tuple[Lesion, ...]:
        """The localizer's lesions, in the order of its masks."""
        return first_lesions(self.config.model.localizer.num_lesion_diseases)

    # --- one forward pass --------------------------------------------------------------------------------------

    def encode(
        self,
        ct_volume: Tensor,
        segmentation_mask: Tensor | None = None,
        places: Sequence[Place] | None = None,
    ) -> VisionFeatures:
        """Features of scans (B, 1, D, H, W) with anatomy (B, D, H, W) or without; see `ThreeDVisionEncoder`."""
        return self.vision_encoder(ct_volume, segmentation_mask, places)

    def classify(self, features: VisionFeatures) -> dict[str, Tensor]:
        """``logits``, ``probabilities`` (B, K); ``attention`` (B, K, R + N): where each disease looked; ``evidence``;
        ``seen`` (B, K, Z, Y, X): the attention to the patches.
        """
        found = self.classifier(features)
        attention_BKM = found["attention_BKM"]
        return {
            "logits": found["logits_BK"],
            "probabilities": found["probabilities_BK"],
            "attention": attention_BKM,
            "evidence": found["evidence_BKM"],
            "seen": attention_BKM[..., -features.patch_BNC.shape[1] :].unflatten(-1, features.grid),
        }

    def localize(
        self,
        ct_volume: Tensor,
        segmentation_mask: Tensor | None,
        features: VisionFeatures,
        *,
        boxes: Sequence[PatchBox] | None = None,
        all_scales: bool | None = None,
    ) -> dict[str, Any]:
        """``mask_logits`` (B, L, D, H, W), and what only the losses need (see `LocalizationOutput`).

        With ``boxes`` the masks are drawn only there, from features of the whole scan; then D, H, W are a box's.
        """
        regions = _without_channel(segmentation_mask)
        if boxes is not None:
            patch_size = self.config.model.vision.patch_size
            ct_volume = cut_boxes(ct_volume, boxes, patch_size)
            regions = None if regions is None else cut_boxes(regions[:, None], boxes, patch_size)[:, 0]
            features = features.within(boxes)
        found = self.localizer(ct_volume, features.patch_BNC, features.grid, regions, all_scales=all_scales)
        return {
            "mask_logits": found.mask_logits_BLDHW,
            "coarser_logits": found.coarser_logits,
            "patch_similarity": found.patch_similarity_BLZYX,
        }

    @torch.no_grad()
    def read_masks(
        self, ct_volume: Tensor, segmentation_mask: Tensor | None, features: VisionFeatures
    ) -> Tensor:
        """Mask logits (B, L, D, H, W) as prediction reads them.

        With ``read_mirrored`` they are the mean of the scan's and of its mirror image's.
        """
        logits_BLDHW: Tensor = self.localize(ct_volume, segmentation_mask, features)["mask_logits"]
        if not self.config.model.localizer.read_mirrored:
            return logits_BLDHW
        mirrored, regions = ct_volume.flip(-1), None
        if segmentation_mask is not None:
            table = torch.tensor(MIRRORED_REGION_IDS, dtype=torch.uint8, device=segmentation_mask.device)
            regions = table[segmentation_mask.flip(-1).int()]
        there: Tensor = self.localize(mirrored, regions, self.encode(mirrored, regions))["mask_logits"]
        return logits_BLDHW.add_(there.flip(-1)).div_(2)

    def forward(
        self,
        ct_volume: Tensor,
        segmentation_mask: Tensor | None = None,
        disease_labels: Tensor | None = None,
        lesion_masks_gt: Mapping[str, Tensor] | None = None,
        report_tokens: Tensor | None = None,
        *,
        report_attention_mask: Tensor | None = None,
        prompt_texts: Sequence[str] | None = None,
        seen_patches: Tensor | None = None,
        spacing_mm: tuple[float, float, float] | None = None,
        tasks: Iterable[str] = TASKS,
        localization_boxes: Sequence[PatchBox] | None = None,
        places: Sequence[Place] | None = None,
    ) -> dict[str, Any]:
        """Run the tasks on a batch.

        Args:
            ct_volume: (B, 1, D, H, W), intensities in -1..1, axes to superior, posterior, left.
            segmentation_mask: Region ids (B, D, H, W), or None.
            disease_labels: (B, K), true findings that the report may build on (NaN: unknown).
            lesion_masks_gt: Lesion key -> (B, D, H, W), true lesions that the report may build on.
            report_tokens: (B, T) from `ReportGenerator.tokenize_reports`; without it no report is scored.
            report_attention_mask: (B, T), 0 at padding.
            prompt_texts: Findings in words for the report, instead of those from labels or heads.
            seen_patches: (B, K, Z, Y, X), patches that truly show each disease, which the report may build on.
            spacing_mm: Voxel size (D, H, W), for sizes in words; the configured grid's by default.
            tasks: Which of `vlm3d.labels.TASKS` to run.
            localization_boxes: Draw masks only in one box a scan, as `localize` takes them.
            places: Where cut-outs lie in their scans, as `encode` takes them.

        Returns:
            ``features``, and ``classification``, ``localization``, ``generation`` for the tasks that ran.

        Raises:
            ValueError: A task is unknown, or shapes do not fit.
        """
        tasks = set(tasks)
        if not tasks <= set(TASKS):
            raise ValueError(f"tasks are {', '.join(TASKS)}, got {', '.join(sorted(tasks))}")
        features = self.encode(ct_volume, segmentation_mask, places)
        outputs: dict[str, Any] = {"features": features}
        if "classification" in tasks:
            outputs["classification"] = self.classify(features)
        if "localization" in tasks:
            outputs["localization"] = self.localize(
                ct_volume, segmentation_mask, features, boxes=localization_boxes
            )
        if "generation" in tasks and report_tokens is not None:
            self.report_generator.load_llm()
            evidence = None
            if prompt_texts is None or self.report_generator.location.uses_embedding:
                evidence = self._evidence(
                    ct_volume,
                    features,
                    segmentation_mask,
                    spacing_mm,
                    disease_labels,
                    lesion_masks_gt,
                    seen_patches,
                    outputs if localization_boxes is None else {**outputs, "localization": None},
                )
            outputs["generation"] = self.report_generator(
                features.global_BC,
                features.region_BRC,
                features.patch_BNC,
                report_tokens,
                report_attention_mask,
                prompt_texts=prompt_texts,
                evidence=evidence,
                region_present_BR=features.region_present_BR,
            )
        return outputs

    @torch.inference_mode()
    def predict(
        self,
        ct_volume: Tensor,
        segmentation_mask: Tensor | None = None,
        classification_threshold: float = 0.5,
        localization_threshold: float = 0.5,
        generate_report: bool = True,
        report_generation_config: Mapping[str, Any] | None = None,
        *,
        spacing_mm: tuple[float, float, float] | None = None,
    ) -> dict[str, Any]:
        """Predict a batch, each head for itself; `vlm3d.inference.pipeline` weighs them as `vlm3d tune` found.

        Args:
            ct_volume: As in `forward`.
            segmentation_mask: As in `forward`.
            classification_threshold: Probability from which a disease is positive.
            localization_threshold: Probability from which a voxel is lesion.
            generate_report: Whether to write reports.
            report_generation_config: ``max_new_tokens``, ``temperature``, ``top_p``, ``num_beams``, ``seed``.
            spacing_mm: As in `forward`.

        Returns:
            ``classification``: ``probabilities`` (B, K), ``predictions`` (B, K) bool, ``disease_names`` (the positive
            ones, a list a scan). ``localization``: ``probabilities`` and ``masks``, lesion key -> (B, D, H, W).
            ``reports``: one text a scan (empty list when not asked for), and ``report_surprisal_bits``.
        """
        with evaluating(self):
            features = self.encode(ct_volume, segmentation_mask)
            classified = self.classify(features)
            probabilities_BK = classified["probabilities"]
            positive_BK = probabilities_BK >= classification_threshold
            masks_BLDHW = self.read_masks(ct_volume, segmentation_mask, features).sigmoid()
            written = []
            if generate_report:
                self.report_generator.load_llm()
                evidence = LesionEvidence(
                    probabilities_BK,
                    masks_BLDHW,
                    _without_channel(segmentation_mask),
                    spacing_mm or self.config.preprocessing.spacing_mm,
                    features.grid,
                    classified["seen"],
                    classification_threshold,
                )
                written = self.report_generator.generate(
                    features.global_BC,
                    features.region_BRC,
                    features.patch_BNC,
                    evidence=evidence,
                    region_present_BR=features.region_present_BR,
                    **(report_generation_config or {}),
                )
        keys = [lesion.key for lesion in self.lesions]
        return {
            "classification": {
                "probabilities": probabilities_BK,
                "predictions": positive_BK,
                "disease_names": [
                    [name for name, positive in zip(self.disease_names, row, strict=True) if positive]
                    for row in positive_BK.tolist()
                ],
            },
            "localization": {
                "probabilities": dict(zip(keys, masks_BLDHW.unbind(1), strict=True)),
                "masks": dict(zip(keys, (masks_BLDHW >= localization_threshold).unbind(1), strict=True)),
            },
            "reports": [report.text for report in written],
            "report_surprisal_bits": [report.mean_surprisal_bits for report in written],
        }

    def _evidence(
        self,
        ct_volume: Tensor,
        features: VisionFeatures,
        segmentation_mask: Tensor | None,
        spacing_mm: tuple[float, float, float] | None,
        disease_labels: Tensor | None,
        lesion_masks_gt: Mapping[str, Tensor] | None,
        seen_patches: Tensor | None,
        outputs: Mapping[str, Any],
    ) -> LesionEvidence:
        """True findings where they are known, the heads' own where not; no gradient flows through words."""
        with torch.no_grad():
            classified = outputs.get("classification")
            if classified is None and (seen_patches is None or _unknown(disease_labels)):
                with evaluating(self.classifier):
                    classified = self.classify(features)
            findings_BK = _known_or_found(disease_labels, classified)
            if seen_patches is None:
                assert classified is not None
                seen_patches = classified["seen"]
            masks_BLDHW = self._drawn_or_true(
                lesion_masks_gt or {}, ct_volume, segmentation_mask, features, outputs
            )
        return LesionEvidence(
            findings_BK,
            masks_BLDHW,
            _without_channel(segmentation_mask),
            spacing_mm or self.config.preprocessing.spacing_mm,
            features.grid,
            seen_patches,
        )

    def _drawn_or_true(
        self,
        true_masks: Mapping[str, Tensor],
        ct_volume: Tensor,
        segmentation_mask: Tensor | None,
        features: VisionFeatures,
        outputs: Mapping[str, Any],
    ) -> Tensor:
        """Lesions (B, L, D, H, W): true masks where they are known, drawn ones where not; drawn only if needed."""
        keys = [lesion.key for lesion in self.lesions]
        known_B = {key: (true_masks[key].flatten(1).amin(1) >= 0) for key in keys if key in true_masks}
        if len(known_B) == len(keys) and all(bool(known.all()) for known in known_B.values()):
            return torch.stack([true_masks[key].to(ct_volume.dtype) for key in keys], dim=1)
        found = outputs.get("localization")
        if found is None:
            with evaluating(self.localizer):  # else a batch would move norms that no loss teaches here
                found = self.localize(ct_volume, segmentation_mask, features)
        drawn = found["mask_logits"]
        masks = dict(zip(keys, drawn.detach().sigmoid().unbind(1), strict=True))
        for key, known in known_B.items():
            true = true_masks[key].to(masks[key].dtype)
            masks[key] = torch.where(known[:, None, None, None], true, masks[key])
        return torch.stack(list(masks.values()), dim=1)

    # --- what trains -------------------------------------------------------------------------------------------

    def attach_text_encoder(self, encoder: TextEncoder) -> None:
        """Let the soft prompts train through a frozen text encoder, and embed the lesions' prompts with it.

        The diseases' prompts are embedded, too, unless a checkpoint brought their embeddings.
        """
        self.classifier.attach_text_encoder(encoder)
        self.localizer.text_embedder.embed(encoder)

    def freeze(self, *parts: str) -> None:
        """Stop training parts, named as in `PARTS`; all of them without a name."""
        self._set_trainable(parts, False)

    def unfreeze(self, *parts: str) -> None:
        """Train parts again."""
        self._set_trainable(parts, True)

    def unfreeze_last_blocks(self, count: int) -> None:
        """Train only the encoder's last blocks and its final norms: the steps of gradual unfreezing."""
        self.freeze("vision")
        encoder = self.vision_encoder
        for module in (
            *encoder.blocks[max(0, len(encoder.blocks) - count) :],
            encoder.norm,
            encoder.norm_region,
        ):
            module.requires_grad_(True)

    def _set_trainable(self, parts: Sequence[str], trainable: bool) -> None:
        for part in parts or PARTS:
            for parameter in self.part_parameters(part):
                parameter.requires_grad_(trainable)
        if self.classifier.text_encoder is None:  # nothing to train them through
            self.classifier.soft_prompts.requires_grad_(False)

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of one of `PARTS`.

        Raises:
            ValueError: The name is none of `PARTS`.
        """
        generator = self.report_generator
        if part == "adapters":
            return [] if generator.llm is None else list(generator.llm.adapter_parameters().values())
        modules: dict[str, list[nn.Module]] = {
            "vision": [self.vision_encoder],
            "classifier": [self.classifier],
            "localizer": [self.localizer],
            "projector": [generator.projector, generator.location],
        }
        if part not in modules:
            raise ValueError(f"the model's parts are {', '.join(PARTS)}, got {part!r}")
        return [parameter for module in modules[part] for parameter in module.parameters()]

    def get_trainable_parameters(self) -> int:
        """Number of parameters that train."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def count_parameters(self) -> list[PartSize]:
        """Parameters a part, the frozen language model included if it is loaded."""
        return part_sizes(
            {
                "3D vision encoder": self.vision_encoder,
                "classifier": self.classifier,
                "localizer: text embedder": self.localizer.text_embedder,
                "localizer: denoising transformer": self.localizer.denoiser,
                "localizer: attention U-Net": self.localizer.unet,
                "localizer: text alignment": self.localizer.alignment,
                "vision projector": self.report_generator.projector,
                "lesion location injector": self.report_generator.location,
            },
            self.report_generator.llm,
        )

    # --- checkpoints -------------------------------------------------------------------------------------------

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint: everything but the frozen text encoder and language model."""
        self.classifier.refresh_prompts()
        state = {name: tensor.detach() for name, tensor in self._own_tensors().items()}
        report = self.report_generator.checkpoint_state_dict()
        return state | {f"report_generator.{name}": tensor for name, tensor in report.items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part in ("vision_encoder", "classifier", "localizer")
            for name, tensor in self.get_submodule(part).state_dict(keep_vars=True).items()
        }

    def load_checkpoint_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `checkpoint_state_dict`, strictly.

        Raises:
            CheckpointError: A tensor is missing, foreign or of another shape; the message names it.
        """
        prefix = "report_generator."
        report = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
        copy_strictly(
            self._own_tensors(),
            {n: tensor for n, tensor in state.items() if not n.startswith(prefix)},
            "the model",
        )
        self.classifier.keep_embeddings()
        self.report_generator.load_checkpoint_state_dict(report)

    def fingerprint(self) -> str:
        """Sixteen digits that tell two sets of weights apart."""
        return checkpoint.fingerprint(self.checkpoint_state_dict())

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        training: Mapping[str, Any] | None = None,
        thresholds: checkpoint.StoredThresholds | None = None,
    ) -> None:
        """Write a checkpoint folder (see `vlm3d.model.checkpoint`), as a whole or not at all.

        Adapters are in it once a language model was there for them to train in; without, they start as no change.

        Args:
            folder: Created, or replaced if it is a checkpoint.
            training: How it was trained; ``status`` defaults to the model's own.
            thresholds: Kept beside the weights if they were tuned for these.

        Raises:
            OutputError: It cannot be written.
        """
        note = {
            "status": self.training_status,
            "untrained_tasks": list(self.untrained_tasks),
            "anatomy": list(self.learned_anatomy),
            **(training or {}),
        }
        checkpoint.write_checkpoint(Path(folder), self.config, self.checkpoint_state_dict(), note, thresholds)

    def push_to_hub(self, name: str, *, private: bool = True, **kept: Any) -> None:
        """Put a checkpoint under a Hub name, where `from_pretrained` finds it.

        Args:
            name: ``owner/name``; made if it is not there.
            private: Whether a new one is seen by its owner alone.
            kept: As `save_pretrained` takes it.

        Raises:
            OutputError: The Hub refuses or cannot be reached.
        """
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            self.save_pretrained(folder, **kept)
            try:
                HfApi().create_repo(name, private=private, exist_ok=True)
                HfApi().upload_folder(repo_id=name, folder_path=folder)
            except Exception as error:  # of the library, or of whatever carries its requests
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise OutputError(f"{name} cannot be put on the Hub: {reason}") from error

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        load_text: bool = False,
        load_llm: bool = False,
        device: torch.device | str | None = None,
    ) -> VLM3DMultiTask:
        """Load a checkpoint from a folder, from the package, or from the Hub by name.

        Args:
            name_or_folder: Where `save_pretrained` wrote, a size that ships with weights (``"tiny"``), or a Hub name.
            load_text: Also attach the text encoder, so that soft prompts go on training.
            load_llm: Load the language model now; otherwise when a report needs it.
            device: CPU by default.

        Raises:
            CheckpointError: It is incomplete, damaged, or its tensors are not those of its configuration.
            WeightsUnavailableError: It is in none of the places looked in.
        """
        folder = checkpoint.locate_checkpoint(name_or_folder)
        config = checkpoint.read_config(folder)
        training = checkpoint.read_training(folder)
        state = checkpoint.read_weights(folder)
        model = cls(
            config,
            load_text=False,
            load_llm=False,
            text_dim=_size(state, "classifier.prompt_embedding", axis=1),
            llm_dim=_size(state, "report_generator.projector.output_projection.weight", axis=0),
            device="cpu",
        )
        model.load_checkpoint_state_dict(state)
        model.training_status = training["status"]
        model.untrained_tasks = tuple(training.get("untrained_tasks", ()))
        model.learned_anatomy = tuple(training.get("anatomy", ()))
        model.to(torch.device(device or "cpu"))
        if load_text:
            encoder = load_text_encoder(
                config.model.classifier.text_encoder, device=torch.device(device or "cpu")
            )
            model.classifier.attach_text_encoder(encoder)
        if load_llm:
            model.report_generator.load_llm()
        return model.eval()


def _unknown(disease_labels: Tensor | None) -> bool:
    return disease_labels is None or bool(disease_labels.isnan().any())


def _known_or_found(disease_labels: Tensor | None, classified: Mapping[str, Tensor] | None) -> Tensor:
    """Findings (B, K): labels where they are known, probabilities where not; these may be missing if all are known."""
    if classified is None:
        assert disease_labels is not None
        return disease_labels
    found_BK = classified["probabilities"].detach()
    if disease_labels is None:
        return found_BK
    return torch.where(disease_labels.isnan(), found_BK, disease_labels.to(found_BK.dtype))


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    """Length of a saved tensor's axis; None where it is missing, which strict loading reports."""
    return state[name].shape[axis] if name in state and state[name].ndim > axis else None


def _without_channel(mask: Tensor | None) -> Tensor | None:
    return mask.squeeze(1) if mask is not None and mask.ndim == 5 else mask
