"""Losses against their formulas, with labels missing, and the ways to weigh them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vlm3d.losses import (
    GradNorm,
    MultiTaskLoss,
    classification_loss,
    dice_bce_loss,
    evidence_loss,
    scale_consistency_loss,
    stack_lesion_masks,
    text_alignment_loss,
)


def test_classification_is_bce_over_known_labels() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.2, -0.3]])
    labels = torch.tensor([[1.0, 0.0, math.nan], [math.nan, 1.0, 0.0]])
    terms = [
        F.binary_cross_entropy_with_logits(logits[i, j], labels[i, j])
        for i, j in ((0, 0), (0, 1), (1, 1), (1, 2))
    ]
    assert torch.allclose(classification_loss(logits, labels), torch.stack(terms).mean())


def test_unknown_labels_get_no_gradient_and_no_labels_give_zero() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    labels = torch.full((2, 3), math.nan)
    labels[0, 0] = 1
    classification_loss(logits, labels).backward()
    assert torch.count_nonzero(logits.grad) == 1
    assert classification_loss(logits, torch.full((2, 3), math.nan)).item() == 0.0


def test_focal_and_class_weights() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    p = logits.sigmoid()
    expected = (torch.tensor([3.0, 0.5]) * -((1 - p) ** 2) * p.log()).mean()
    found = classification_loss(logits, labels, focal_gamma=2.0, class_weights_K=torch.tensor([3.0, 0.5]))
    assert torch.allclose(found, expected)


def test_dice_bce_counts_known_pairs_only_and_takes_dice_over_the_batch() -> None:
    logits, target = torch.randn(2, 3, 2, 3, 3), torch.randint(0, 2, (2, 3, 2, 3, 3))
    target[:, 2] = 0  # no case has the third lesion: only its cross-entropy counts
    known = torch.tensor([[True, True, True], [False, True, True]])
    p, t = logits.sigmoid(), target.float()
    bce = [F.binary_cross_entropy(p[i, j], t[i, j]) for i in range(2) for j in range(3) if known[i, j]]
    dice = []
    for cases, lesion in (((0,), 0), ((0, 1), 1)):
        overlap = sum((p[i, lesion] * t[i, lesion]).sum() for i in cases)
        total = sum((p[i, lesion] + t[i, lesion]).sum() for i in cases)
        dice.append((2 * overlap + 1) / (total + 1))
    expected = torch.stack(bce).mean() - torch.stack(dice).log().mean()
    assert torch.allclose(dice_bce_loss(logits, target, known), expected, atol=1e-6)
    perfect = torch.where(target.bool(), 50.0, -50.0)
    assert dice_bce_loss(perfect, target, torch.ones(2, 3, dtype=torch.bool)).item() < 1e-5


def test_a_lesion_that_no_case_has_does_not_pull_its_mask_to_silence_through_dice() -> None:
    logits = torch.zeros(1, 2, 2, 4, 4, requires_grad=True)
    target = torch.zeros(1, 2, 2, 4, 4)
    target[0, 0, 0] = 1
    dice_bce_loss(logits, target, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert torch.allclose(logits.grad[0, 1], torch.full((2, 4, 4), 0.5 / logits.numel()))


def test_alignment_rewards_the_right_prompt() -> None:
    target = torch.zeros(1, 2, 2, 4, 4)
    target[0, 0, :, :2] = 1
    right = torch.zeros(1, 2, 1, 2, 2)
    right[0, 0, :, 0] = 1.0
    wrong = right.flip(1)
    known = torch.ones(1, 2, dtype=torch.bool)
    assert text_alignment_loss(right, target, known) < text_alignment_loss(wrong, target, known)
    assert text_alignment_loss(right, torch.zeros_like(target), known).item() == 0.0


def test_consistency_is_zero_for_equal_scales() -> None:
    full, known = torch.full((1, 1, 4, 4, 4), 0.7), torch.ones(1, 1, dtype=torch.bool)
    assert scale_consistency_loss(full, [torch.full((1, 1, 2, 2, 2), 0.7)], known).item() < 1e-12
    assert scale_consistency_loss(full, [torch.full((1, 1, 2, 2, 2), -3.0)], known).item() > 0.1
    assert scale_consistency_loss(full, [torch.full((1, 1, 2, 2, 2), -3.0)], ~known).item() == 0.0
    assert scale_consistency_loss(full, [], known).item() == 0.0


def test_masks_by_name_keep_their_place() -> None:
    nodule = torch.ones(2, 2, 2, 2)
    effusion = torch.zeros(2, 2, 2, 2)
    effusion[1] = -1
    masks, known, _ = stack_lesion_masks({"lung_nodule": nodule, "pleural_effusion": effusion}, 5)
    assert masks[:, 4].eq(1).all()
    assert known.tolist() == [[False, True, False, False, True], [False, False, False, False, True]]
    assert masks.min() >= 0
    with pytest.raises(ValueError, match="tumor"):
        stack_lesion_masks({"tumor": nodule}, 5)


def test_voxels_that_nobody_annotated_say_nothing() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    masks = torch.randint(0, 2, (1, 2, 4, 4, 4))
    outputs = {
        "localization": {
            "mask_logits": logits,
            "coarser_logits": [torch.randn(1, 2, 2, 2, 2, requires_grad=True)],
        }
    }
    in_part = masks.clone()
    in_part[:, 1, 2:] = -1
    loss = MultiTaskLoss(consistency_weight=0.0)
    loss(outputs, {"lesion_masks": in_part})["localization"].backward()
    assert (logits.grad[:, 1, 2:] == 0).all()
    assert (logits.grad[:, 1, :2] != 0).all()
    assert (logits.grad[:, 0] != 0).all()
    annotated = torch.zeros_like(masks, dtype=torch.bool)
    annotated[:, :, :2] = True
    known = torch.ones(1, 2, dtype=torch.bool)
    part = dice_bce_loss(logits, masks, known, annotated_BLDHW=annotated)
    assert torch.allclose(part, dice_bce_loss(logits[:, :, :2], masks[:, :, :2], known))


def outputs_and_batch() -> tuple[dict, dict, torch.Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(4, requires_grad=True)
    outputs = {
        "classification": {"logits": shared[:2, None] * torch.ones(2, 18)},
        "localization": {"mask_logits": shared.sum() * torch.ones(1, 5, 2, 2, 2), "coarser_logits": []},
        "generation": {"loss": shared.square().sum()},
    }
    batch = {"disease_labels": torch.ones(2, 18), "lesion_masks": torch.ones(1, 5, 2, 2, 2)}
    return outputs, batch, shared


def test_fixed_weights() -> None:
    outputs, batch, _ = outputs_and_batch()
    losses = MultiTaskLoss(3.0, 0.5, 0.0)(outputs, batch)
    assert torch.allclose(losses["total"], 3 * losses["classification"] + 0.5 * losses["localization"])


def test_tasks_without_labels_are_left_out() -> None:
    outputs, batch, _ = outputs_and_batch()
    losses = MultiTaskLoss()(outputs, {"disease_labels": batch["disease_labels"]})
    assert set(losses) == {"total", "classification", "generation"}
    with pytest.raises(ValueError, match="no task"):
        MultiTaskLoss()({}, batch)


def test_uncertainty_weighting_learns() -> None:
    outputs, batch, _ = outputs_and_batch()
    loss = MultiTaskLoss(balancing="uncertainty")
    losses = loss(outputs, batch)
    s = loss.log_variance
    expected = sum(
        torch.exp(-s[i]) * losses[task] + s[i]
        for i, task in enumerate(("classification", "localization", "generation"))
    )
    assert torch.allclose(losses["total"], expected)
    losses["total"].backward()
    assert torch.count_nonzero(s.grad) == 3


def test_uncertainty_learns_nothing_of_a_task_without_labels() -> None:
    outputs, batch, _ = outputs_and_batch()
    batch["lesion_masks"] = torch.full_like(batch["lesion_masks"], -1)
    loss = MultiTaskLoss(balancing="uncertainty")
    losses = loss(outputs, batch)
    assert losses["localization"].item() == 0.0
    losses["total"].backward()
    assert (loss.log_variance.grad != 0).tolist() == [True, False, True]


def test_gradnorm_waits_for_the_first_label_of_a_task() -> None:
    shared = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    waited, at_once = GradNorm(torch.ones(3)), GradNorm(torch.ones(3))
    losses = {"classification": 2 * shared.sum(), "localization": 3 * shared.sum()}
    waited.update(losses | {"localization": 0 * shared.sum()}, [shared])
    assert waited.weights.tolist() == [1.0, 1.0, 1.0]
    for _ in range(20):
        assert waited.update(losses, [shared]) == at_once.update(losses, [shared])


def test_gradnorm_raises_the_weak_task_and_keeps_the_sum() -> None:
    shared = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    norm = GradNorm(torch.ones(3), alpha=0.0)
    for _ in range(20):
        losses = {"classification": 0.01 * shared.sum(), "localization": 10 * shared.sum()}
        weights = norm.update(losses, [shared])
    assert weights["classification"] > 1 > weights["localization"]
    assert math.isclose(weights["classification"] + weights["localization"], 2.0, rel_tol=1e-5)
    assert weights["generation"] == 1.0


def test_patches_are_told_apart_where_places_are_known_and_not_elsewhere() -> None:
    guidance = torch.zeros(2, 3, 1, 2, 2, dtype=torch.bool)
    guidance[0, 1, 0, 1, 1] = True
    # known: disease 1 of the first scan, by its place; disease 2 of the first and 0 of the second, as absent
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, math.nan, 1.0]])
    evidence = torch.randn(2, 3, 4, requires_grad=True)
    loss = evidence_loss(evidence, guidance, labels)
    softplus = torch.nn.functional.softplus
    placed = softplus(-evidence[0, 1, 3]) + softplus(evidence[0, 1, :3]).mean()
    absent = softplus(evidence[0, 2]).mean() + softplus(evidence[1, 0]).mean()
    torch.testing.assert_close(loss, (placed + absent) / 3)
    loss.backward()
    assert evidence.grad is not None
    untouched = evidence.grad.abs().sum(dim=-1) == 0
    assert untouched.tolist() == [[True, False, False], [False, True, True]]


def test_without_known_places_and_labels_evidence_costs_nothing() -> None:
    labels = torch.tensor([[1.0, math.nan]])
    guidance = torch.zeros(1, 2, 1, 1, 4, dtype=torch.bool)
    assert float(evidence_loss(torch.randn(1, 2, 4), guidance, labels)) == 0.0
