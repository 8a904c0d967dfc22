"""The losses of the three tasks, and the ways to weigh them.

A case may lack labels: a NaN disease label, a negative voxel in a lesion mask or a lesion missing from the dictionary, and
a report token of -100 (or a masked one) are left out of the sums. A task without any label in a batch contributes zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm3d.config import LossConfig
from vlm3d.labels import TASKS, first_lesions


def classification_loss(
    logits_BK: Tensor, labels_BK: Tensor, *, focal_gamma: float = 0.0, class_weights_K: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy over diseases, focal where asked, averaged over the known labels.

    Focal: ``-(1 - p_t)^gamma log p_t`` (Lin 2017). A class weight multiplies its disease's terms.

    Args:
        logits_BK: (B, K).
        labels_BK: 0, 1, or NaN where unknown.
        focal_gamma: 0 is plain cross-entropy.
        class_weights_K: (K,).
    """
    known_BK = ~labels_BK.isnan()
    target_BK = labels_BK.nan_to_num(0.0).to(logits_BK.dtype)
    loss_BK = F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none")
    if focal_gamma:
        probability_of_truth = torch.exp(-loss_BK)
        loss_BK = (1.0 - probability_of_truth) ** focal_gamma * loss_BK
    if class_weights_K is not None:
        loss_BK = loss_BK * class_weights_K
    return (loss_BK * known_BK).sum() / known_BK.sum().clamp(min=1)


def dice_bce_loss(
    logits_BLDHW: Tensor,
    target_BLDHW: Tensor,
    known_BL: Tensor,
    *,
    annotated_BLDHW: Tensor | None = None,
    smooth: float = 1.0,
) -> Tensor:
    """Minus the logarithm of each lesion's soft Dice over the whole batch, plus binary cross-entropy; known pairs only.

    ``Dice = (2 sum(p t) + s) / (sum(p) + sum(t) + s)`` with the sums over all cases of the batch, as nnU-Net's batch Dice
    (Isensee 2021); its logarithm as in Wong 2018. Where a small lesion is not drawn yet, ``1 - Dice`` is flat and only the
    large ones would learn; the logarithm's slope there is that of the mean over the lesion's voxels, whatever its size.
    A lesion that no case of the batch has is taught by the cross-entropy alone: its Dice would reward silence past all
    else, and most scans lack most lesions.

    Args:
        logits_BLDHW: Mask logits.
        target_BLDHW: Shares of 0 to 1; ignored where ``known_BL`` is False.
        known_BL: Whether the case's mask of that lesion is known.
        annotated_BLDHW: False at voxels that are left out; None counts all.
        smooth: s above, in voxels.
    """
    target = target_BLDHW.to(logits_BLDHW.dtype)
    bce_BLDHW = F.binary_cross_entropy_with_logits(logits_BLDHW, target, reduction="none")
    probability = logits_BLDHW.sigmoid()
    if annotated_BLDHW is None:
        bce_BL = bce_BLDHW.flatten(2).mean(-1)
    else:
        voxels_BL = annotated_BLDHW.flatten(2).sum(-1).clamp(min=1)
        bce_BL = (bce_BLDHW * annotated_BLDHW).flatten(2).sum(-1) / voxels_BL
        probability, target = probability * annotated_BLDHW, target * annotated_BLDHW
    bce = (bce_BL * known_BL).sum() / known_BL.sum().clamp(min=1)
    overlap_L = ((probability * target).flatten(2).sum(-1) * known_BL).sum(0)
    truth_L = (target.flatten(2).sum(-1) * known_BL).sum(0)
    total_L = (probability.flatten(2).sum(-1) * known_BL).sum(0) + truth_L
    dice_L = (2 * overlap_L + smooth) / (total_L + smooth)
    present_L = truth_L > 0
    return bce - (dice_L.log() * present_L).sum() / present_L.sum().clamp(min=1)


def text_alignment_loss(
    similarity_BLZYX: Tensor, target_BLDHW: Tensor, known_BL: Tensor, *, temperature: float = 0.07
) -> Tensor:
    """A patch inside a lesion must resemble that lesion's prompt more than the others.

    Cross-entropy over prompts at patches that a lesion covers, weighted by the covered share; patches outside every
    lesion say nothing.

    Args:
        similarity_BLZYX: Cosine similarity of each patch to each prompt.
        target_BLDHW: Lesion masks, 0 or 1.
        known_BL: False where a lesion was not annotated; it says nothing either.
        temperature: Divides the similarity.
    """
    share = F.adaptive_avg_pool3d(
        target_BLDHW.float() * known_BL[..., None, None, None], _spatial(similarity_BLZYX)
    )
    log_probability = (similarity_BLZYX / temperature).log_softmax(dim=1)
    return -(share * log_probability).sum() / share.sum().clamp(min=1e-6)


def evidence_loss(evidence_BKN: Tensor, guidance_BKZYX: Tensor, labels_BK: Tensor) -> Tensor:
    """A patch that shows a disease must look like it, and one that does not must not.

    Binary cross-entropy of the logits of the classifier's attention, patch by patch: the mean over patches that show the
    disease plus the mean over those that do not, so that two patches of a nodule weigh as much as all others. Averaged
    over positive labels whose place is known and over negative labels, where no patch shows it; the others say nothing.

    Args:
        evidence_BKN: Logits over the patches.
        guidance_BKZYX: True where a patch shows the disease; False throughout where its place is not known.
        labels_BK: 0, 1, or NaN where unknown.
    """
    shown_BKN = guidance_BKZYX.flatten(2)
    counts_BK = torch.where(labels_BK > 0.5, shown_BKN.any(dim=-1), labels_BK < 0.5)
    shown_BKN = shown_BKN & (labels_BK > 0.5).unsqueeze(-1)
    loss_BKN = F.binary_cross_entropy_with_logits(evidence_BKN.float(), shown_BKN.float(), reduction="none")
    inside_BK = (loss_BKN * shown_BKN).sum(-1) / shown_BKN.sum(-1).clamp(min=1)
    outside_BK = (loss_BKN * ~shown_BKN).sum(-1) / (~shown_BKN).sum(-1).clamp(min=1)
    return ((inside_BK + outside_BK) * counts_BK).sum() / counts_BK.sum().clamp(min=1)


def scale_consistency_loss(
    full_logits_BLDHW: Tensor, coarser_logits: Sequence[Tensor], known_BL: Tensor
) -> Tensor:
    """Mean squared difference between the full-resolution probabilities, averaged down, and each coarser scale's.

    Args:
        full_logits_BLDHW: Mask logits.
        coarser_logits: Of the same masks at coarser scales.
        known_BL: False where a lesion was not annotated; it says nothing.
    """
    if not coarser_logits:
        return full_logits_BLDHW.new_zeros(())
    probability = full_logits_BLDHW.sigmoid()
    terms_BL = [
        (coarse.sigmoid() - F.adaptive_avg_pool3d(probability, _spatial(coarse))).square().flatten(2).mean(-1)
        for coarse in coarser_logits
    ]
    return (torch.stack(terms_BL).mean(0) * known_BL).sum() / known_BL.sum().clamp(min=1)


def _spatial(tensor: Tensor) -> tuple[int, int, int]:
    d, h, w = tensor.shape[-3:]
    return d, h, w


def stack_lesion_masks(
    lesion_masks: Mapping[str, Tensor] | Tensor, num_lesions: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Masks by name become one tensor and what is known of them.

    Args:
        lesion_masks: Lesion key -> (B, D, H, W), or one tensor (B, L, D, H, W). A negative value says that a voxel was not
            annotated for that lesion; so does a missing key of all voxels.
        num_lesions: L; keys are those of `vlm3d.labels.first_lesions`.

    Returns:
        Masks (B, L, D, H, W) of 0 and 1; known (B, L), where any voxel is annotated; and annotated (B, L, D, H, W), or None
        where no mask is annotated in part.

    Raises:
        ValueError: A name is unknown, or no mask is given.
    """
    if isinstance(lesion_masks, Mapping):
        names = [lesion.key for lesion in first_lesions(num_lesions)]
        foreign = set(lesion_masks) - set(names)
        if foreign or not lesion_masks:
            raise ValueError(
                f"lesion masks are {', '.join(names)}; got {', '.join(sorted(lesion_masks)) or 'none'}"
            )
        template = next(iter(lesion_masks.values()))
        unknown = template.new_full((), -1, dtype=torch.int8).expand(template.shape)
        stacked = torch.stack([lesion_masks.get(name, unknown).to(torch.int8) for name in names], dim=1)
    else:
        stacked = lesion_masks
    voxels_BLN = stacked.flatten(2)
    known_BL = voxels_BLN.amax(-1) >= 0
    in_part = bool((known_BL & (voxels_BLN.amin(-1) < 0)).any())
    return stacked.clamp(min=0), known_BL, stacked >= 0 if in_part else None


class MultiTaskLoss(nn.Module):
    """Weighted sum of the three tasks' losses.

    Args:
        weight_classification: Fixed weight, or the starting weight where ``balancing`` learns them.
        weight_localization: Likewise.
        weight_generation: Likewise.
        balancing: ``"fixed"``; ``"uncertainty"`` learns ``exp(-s_t) L_t + s_t`` (Kendall 2018), s starting at
            -log(weight); ``"gradnorm"`` learns weights through `GradNorm`.
        focal_gamma: See `classification_loss`.
        class_weights: (K,), see `classification_loss`.
        text_alignment_weight: Of `text_alignment_loss` within localization.
        consistency_weight: Of `scale_consistency_loss` within localization.
        evidence_weight: Of `evidence_loss` within classification, where places are known.
    """

    def __init__(
        self,
        weight_classification: float = 1.0,
        weight_localization: float = 2.0,
        weight_generation: float = 1.5,
        balancing: str = "fixed",
        focal_gamma: float = 0.0,
        class_weights: Sequence[float] | None = None,
        text_alignment_weight: float = 0.1,
        consistency_weight: float = 0.05,
        evidence_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if balancing not in ("fixed", "uncertainty", "gradnorm"):
            raise ValueError(f"balancing is fixed, uncertainty or gradnorm, got {balancing!r}")
        start = torch.tensor(
            [weight_classification, weight_localization, weight_generation], dtype=torch.float32
        )
        self.balancing = balancing
        self.focal_gamma = focal_gamma
        self.text_alignment_weight = text_alignment_weight
        self.consistency_weight = consistency_weight
        self.evidence_weight = evidence_weight
        self.start_weights: Tensor
        self.class_weights: Tensor | None
        self.register_buffer("start_weights", start)
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))
        self.log_variance = nn.Parameter(-start.clamp(min=1e-6).log()) if balancing == "uncertainty" else None
        self.gradnorm = GradNorm(start) if balancing == "gradnorm" else None

    @classmethod
    def from_config(cls, config: LossConfig, class_weights: Sequence[float] | None = None) -> MultiTaskLoss:
        """From the ``loss`` section of a configuration."""
        return cls(**config.model_dump(), class_weights=class_weights)

    def forward(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            outputs: What `VLM3DMultiTask.forward` returned; only tasks that were run are in it.
            batch: ``disease_labels`` (B, K); ``lesion_masks`` (see `stack_lesion_masks`) on the grid of the mask logits;
                ``guidance`` (B, K, Z, Y, X), see `evidence_loss`. The report loss is already in the outputs: the
                language model computes it.

        Returns:
            ``total`` and one entry a task that was run (unweighted), all scalars.
        """
        losses: dict[str, Tensor] = {}
        if "classification" in outputs and batch.get("disease_labels") is not None:
            losses["classification"] = self._classification(outputs, batch)
        if "localization" in outputs and batch.get("lesion_masks") is not None:
            losses["localization"] = self._localization(outputs["localization"], batch["lesion_masks"])
        if outputs.get("generation") is not None and outputs["generation"].get("loss") is not None:
            losses["generation"] = outputs["generation"]["loss"]
        if not losses:
            raise ValueError("no task has both an output and a label in this batch")
        return {"total": self._weigh(losses), **losses}

    def _classification(self, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Tensor:
        output, labels = outputs["classification"], batch["disease_labels"]
        loss = classification_loss(
            output["logits"], labels, focal_gamma=self.focal_gamma, class_weights_K=self.class_weights
        )
        guidance = batch.get("guidance")
        if not self.evidence_weight or guidance is None:
            return loss
        patches = guidance[0, 0].numel()  # regions come first among what is looked at, then the patches
        evidence_BKN = output["evidence"][..., -patches:]
        return loss + self.evidence_weight * evidence_loss(evidence_BKN, guidance, labels)

    def _localization(self, output: Mapping[str, Any], lesion_masks: Mapping[str, Tensor] | Tensor) -> Tensor:
        logits = output["mask_logits"]
        target, known_BL, annotated = stack_lesion_masks(lesion_masks, logits.shape[1])
        target = target.to(logits.dtype)
        loss = dice_bce_loss(logits, target, known_BL, annotated_BLDHW=annotated)
        coarser = output["coarser_logits"]
        for level, coarse in enumerate(coarser, start=1):
            size = _spatial(coarse)
            pooled = F.adaptive_avg_pool3d(target, size)
            whole = (
                None if annotated is None else F.adaptive_avg_pool3d(annotated.to(logits.dtype), size) == 1
            )
            loss = loss + 0.5**level * dice_bce_loss(coarse, pooled, known_BL, annotated_BLDHW=whole)
        loss = loss / sum(0.5**level for level in range(len(coarser) + 1))
        if output.get("patch_similarity") is not None:
            loss = loss + self.text_alignment_weight * text_alignment_loss(
                output["patch_similarity"], target, known_BL
            )
        return loss + self.consistency_weight * scale_consistency_loss(logits, coarser, known_BL)

    def _weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        if self.log_variance is not None:
            terms = []
            for task, loss in losses.items():
                log_variance = self.log_variance[TASKS.index(task)]
                taught = (loss.detach() > 0).float()  # without a label there is nothing to be unsure of
                terms.append(torch.exp(-log_variance) * loss + log_variance * taught)
        else:
            weights = self.start_weights if self.gradnorm is None else self.gradnorm.weights.detach()
            terms = [weights[TASKS.index(task)].to(loss.device) * loss for task, loss in losses.items()]
        return torch.stack([term.float() for term in terms]).sum()


class GradNorm(nn.Module):
    """Task weights that even out the gradients of the tasks on a shared tensor (Chen 2018).

    Each step minimizes ``sum_t | w_t G_t - mean(w G) * r_t^alpha |`` over w, where G_t is the norm of task t's gradient on
    the shared parameters and r_t its loss over its first loss, relative to the mean of these. The weights keep their sum.
    Call `update` after the losses and before ``total.backward()``.
    """

    def __init__(self, start_weights: Tensor, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        self.alpha = alpha
        self.lr = lr
        self.weights = nn.Parameter(start_weights.clone(), requires_grad=False)
        self.first_losses: Tensor
        self.register_buffer("first_losses", torch.full_like(start_weights, float("nan")))

    def update(self, losses: Mapping[str, Tensor], shared: Iterable[nn.Parameter]) -> dict[str, float]:
        """One step on the weights; returns them by task.

        Args:
            losses: Unweighted losses a task, with their graph; other keys such as ``total`` are ignored, and so is a loss
                of 0, whose task had no label.
            shared: Parameters that all tasks train, such as the encoder's last block.
        """
        ran = [task for task in TASKS if task in losses and losses[task].requires_grad]
        shared = [parameter for parameter in shared if parameter.requires_grad]
        # of each task, labeled here or not: another process, whose layers this one holds, may have a label
        norm_of = (
            {task: self._gradient_norm(losses[task], shared) for task in ran}
            if len(ran) > 1 and shared
            else {}
        )
        present = [task for task in norm_of if bool(losses[task] > 0)]
        if len(present) > 1:
            index = torch.tensor([TASKS.index(task) for task in present], device=self.weights.device)
            norms = torch.stack([norm_of[task] for task in present])
            value = torch.stack([losses[task].detach().float() for task in present]).to(self.weights.device)
            first = self.first_losses[index]
            self.first_losses[index] = torch.where(first.isnan(), value, first)
            progress = value / self.first_losses[index].clamp(min=1e-8)
            rate = progress / progress.mean().clamp(min=1e-8)
            weighted = self.weights[index] * norms
            target = weighted.mean() * rate**self.alpha
            gradient = torch.sign(weighted - target) * norms
            total = self.weights[index].sum()
            stepped = (self.weights[index] - self.lr * gradient / norms.mean().clamp(min=1e-8)).clamp(
                min=1e-3
            )
            self.weights.data[index] = stepped * total / stepped.sum()
        return {task: float(self.weights[TASKS.index(task)]) for task in TASKS}

    def _gradient_norm(self, loss: Tensor, shared: Sequence[nn.Parameter]) -> Tensor:
        gradients = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        return torch.stack(squares).sum().sqrt() if squares else self.weights.new_zeros(())
