"""Classification and localization figures, accumulated batch by batch.

Formulas: AUROC is the probability that a positive case ranks above a negative one, ties counting half (Mann-Whitney);
AP is the mean precision at each positive case, ranked by score; CRG is the VLM3D challenge's pooled figure, defined in
`crg`. A figure that its data do not define (one class only, no lesion in truth or prediction) is NaN and left out of means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from vlm3d.labels import DISEASE_NAMES, LESION_KEYS

Floats = NDArray[np.float64]


def auroc(score_N: Floats, truth_N: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; NaN if truth has one class only."""
    positives = int(truth_N.sum())
    negatives = truth_N.size - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(score_N)
    return float((ranks[truth_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(score_N: Floats, truth_N: NDArray[np.bool_]) -> float:
    """Sum over distinct thresholds of precision x gain in recall; NaN without positives."""
    positives = int(truth_N.sum())
    if not positives:
        return float("nan")
    order = np.argsort(-score_N, kind="stable")
    score, hit = score_N[order], truth_N[order]
    last_of_tie = np.r_[np.diff(score) != 0, True]
    true_positives = np.cumsum(hit)[last_of_tie]
    called = np.flatnonzero(last_of_tie) + 1
    gained = np.diff(np.r_[0, true_positives])
    return float((true_positives / called * gained).sum() / positives)


def crg(called_NK: NDArray[np.bool_], truth_NK: NDArray[np.bool_]) -> float:
    """The challenge's CRG: ``U / (2U - s)`` with s = r TP - r FN - FP, pooled over all cases and labels.

    X is the number of cells, A of true ones, r = (X - A) / (2A), U = (X - A) / 2. Perfect is 1; all negative and all
    positive are 1/3; 0 if the denominator is 0.

    Raises:
        ValueError: There is no positive in the truth.
    """
    cells, actual = truth_NK.size, int(truth_NK.sum())
    if not actual:
        raise ValueError("CRG needs at least one positive label in the truth")
    hits = int((called_NK & truth_NK).sum())
    misses, false_alarms = actual - hits, int((called_NK & ~truth_NK).sum())
    reward, best = (cells - actual) / (2 * actual), (cells - actual) / 2
    denominator = 2 * best - (reward * hits - reward * misses - false_alarms)
    return best / denominator if denominator else 0.0


class MultiTaskMetrics:
    """Accumulates predictions and labels, then computes all figures.

    Args:
        threshold: Probability from which a disease is positive.
        mask_threshold: Probability from which a voxel is lesion.
        disease_names: In the order of the columns.
        lesion_keys: In the order of the masks.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        disease_names: Sequence[str] = DISEASE_NAMES,
        lesion_keys: Sequence[str] = LESION_KEYS,
    ) -> None:
        self.threshold = threshold
        self.mask_threshold = mask_threshold
        self.disease_names = tuple(disease_names)
        self.lesion_keys = tuple(lesion_keys)
        self.reset()

    def reset(self) -> None:
        """Forget all cases."""
        self._probabilities: list[Floats] = []
        self._labels: list[Floats] = []
        self._counts: dict[str, list[tuple[int, int, int]]] = {key: [] for key in self.lesion_keys}

    def update(
        self,
        probabilities_BK: Tensor | None = None,
        labels_BK: Tensor | None = None,
        lesion_probabilities: Mapping[str, Tensor] | None = None,
        lesion_masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch; either task may be left out.

        Args:
            probabilities_BK: Disease probabilities.
            labels_BK: 0, 1, or NaN where unknown.
            lesion_probabilities: Lesion key -> (B, D, H, W).
            lesion_masks: Lesion key -> (B, D, H, W); a negative value says that the case is not annotated.

        Raises:
            ValueError: Shapes or names do not fit, or a probability is no number.
        """
        if probabilities_BK is not None and labels_BK is not None:
            expected = (len(labels_BK), len(self.disease_names))
            if tuple(probabilities_BK.shape) != expected or tuple(labels_BK.shape) != expected:
                raise ValueError(
                    f"probabilities and labels are {expected}, got {tuple(probabilities_BK.shape)} and "
                    f"{tuple(labels_BK.shape)}"
                )
            if not bool(probabilities_BK.isfinite().all()):
                raise ValueError("a probability is NaN or infinite")
            self._probabilities.append(probabilities_BK.detach().double().cpu().numpy())
            self._labels.append(labels_BK.detach().double().cpu().numpy())
        for key, truth in (lesion_masks or {}).items():
            if key not in self._counts or lesion_probabilities is None or key not in lesion_probabilities:
                raise ValueError(
                    f"no predicted mask for the lesion '{key}'; known: {', '.join(self.lesion_keys)}"
                )
            self._add_masks(key, lesion_probabilities[key] >= self.mask_threshold, truth)

    def _add_masks(self, key: str, predicted_BDHW: Tensor, truth_BDHW: Tensor) -> None:
        if predicted_BDHW.shape != truth_BDHW.shape:
            raise ValueError(
                f"{key}: masks of {tuple(predicted_BDHW.shape)} against {tuple(truth_BDHW.shape)}"
            )
        for predicted, truth in zip(predicted_BDHW, truth_BDHW, strict=True):
            if int(truth.min()) < 0:
                continue
            positive = truth > 0
            both = int(torch.count_nonzero(predicted & positive))
            self._counts[key].append((both, int(predicted.sum()), int(positive.sum())))

    def compute(self) -> dict[str, Any]:
        """All figures.

        Returns:
            ``classification``: ``per_disease`` (auroc, ap, f1, precision, recall, accuracy, cases, positives), ``macro``
            means of these, and ``crg`` over cells that are known in every case. ``localization``: ``per_lesion`` (dice, iou
            as means over cases with the lesion in truth or prediction; cases) and ``macro``.
        """
        result: dict[str, Any] = {}
        if self._probabilities:
            result["classification"] = self._classification()
        if any(self._counts.values()):
            result["localization"] = self._localization()
        return result

    def _classification(self) -> dict[str, Any]:
        probability_NK, label_NK = np.concatenate(self._probabilities), np.concatenate(self._labels)
        known_NK = ~np.isnan(label_NK)
        truth_NK = np.where(known_NK, label_NK, 0) > 0.5
        called_NK = probability_NK >= self.threshold
        per_disease = {
            name: _disease_figures(probability_NK[known, k], called_NK[known, k], truth_NK[known, k])
            for k, (name, known) in enumerate(zip(self.disease_names, known_NK.T, strict=True))
        }
        keys = ("auroc", "ap", "f1", "precision", "recall", "accuracy")
        macro = {key: _nanmean([figures[key] for figures in per_disease.values()]) for key in keys}
        whole = known_NK.all(axis=1)
        pooled = crg(called_NK[whole], truth_NK[whole]) if truth_NK[whole].any() else float("nan")
        return {"per_disease": per_disease, "macro": macro, "crg": pooled}

    def _localization(self) -> dict[str, Any]:
        per_lesion = {}
        for key, counts in self._counts.items():
            shown = [(both, p + t) for both, p, t in counts if p + t]
            per_lesion[key] = {
                "dice": _nanmean([2 * both / total for both, total in shown]),
                "iou": _nanmean([both / (total - both) for both, total in shown]),
                "cases": len(counts),
            }
        macro = {key: _nanmean([figures[key] for figures in per_lesion.values()]) for key in ("dice", "iou")}
        return {"per_lesion": per_lesion, "macro": macro}


def _disease_figures(
    score_N: Floats, called_N: NDArray[np.bool_], truth_N: NDArray[np.bool_]
) -> dict[str, float]:
    """Precision, recall and F1 of nothing called or nothing there are 0, as the challenge counts."""
    hits = int((called_N & truth_N).sum())
    called, positives = int(called_N.sum()), int(truth_N.sum())
    return {
        "auroc": auroc(score_N, truth_N),
        "ap": average_precision(score_N, truth_N),
        "f1": 2 * hits / (called + positives) if called + positives else 0.0,
        "precision": hits / called if called else 0.0,
        "recall": hits / positives if positives else 0.0,
        "accuracy": float((called_N == truth_N).mean()) if truth_N.size else float("nan"),
        "cases": float(truth_N.size),
        "positives": float(positives),
    }


def _nanmean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
