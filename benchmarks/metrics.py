"""Figures of merit beside the packages that others use, as JSON lines.

    python benchmarks/metrics.py

Masks: Dice, IoU, HD95 and lesion matching of five 240 x 480 x 480 masks, against MONAI's Dice, IoU and HD95 (which match
no lesions). Bootstrap: 1,000 resamples of every classification figure of 3,000 cases x 18 diseases, against scikit-learn
in a loop over 20 resamples, scaled to 1,000. Reports: BLEU, ROUGE-L, CIDEr and METEOR of 1,500 reports, against
pycocoevalcap without METEOR (which needs Java). Each side runs in a process of its own on one thread, twice, and its better
time counts; ratios are theirs / ours.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from measuring import in_child, machine, peak_rss_mb

SHAPE, SPACING_MM = (240, 480, 480), (1.5, 0.75, 0.75)
CASES, DISEASES, RESAMPLES = 3000, 18, 1000
SCIKIT_RESAMPLES = 20
REPORTS = 1500
ROUNDS = 2


def ellipsoid(mask: np.ndarray, center: np.ndarray, radius: np.ndarray) -> None:
    """Draw one into a mask."""
    box = tuple(
        slice(max(0, int(c - r)), min(n, int(c + r) + 2))
        for c, r, n in zip(center, radius, mask.shape, strict=True)
    )
    axes = np.ogrid[box]
    mask[box] |= sum(((x - c) / r) ** 2 for x, c, r in zip(axes, center, radius, strict=True)) <= 1


def five_masks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predicted and true masks, from one large effusion to many small nodules; one lesion of most is missed."""
    rng = np.random.default_rng(0)
    for lesions, smallest, largest in ((1, 40, 70), (2, 40, 60), (3, 20, 40), (6, 10, 30), (8, 3, 8)):
        predicted, truth = np.zeros(SHAPE, dtype=bool), np.zeros(SHAPE, dtype=bool)
        for lesion in range(lesions):
            radius = rng.uniform(smallest, largest, 3) * [0.5, 1, 1]
            center = rng.uniform([60, 100, 100], [180, 380, 380])
            ellipsoid(truth, center, radius)
            if lesion or lesions == 1:
                ellipsoid(predicted, center + rng.uniform(-3, 3, 3), radius * rng.uniform(0.85, 1.15, 3))
        yield predicted, truth


def masks_ours() -> Callable[[], list[float]]:
    """Figures of the five masks."""
    from vlm3d.evaluation.localization import localization_figures, mask_record

    pairs = list(five_masks())

    def work() -> list[float]:
        records = [mask_record(predicted, truth, SPACING_MM) for predicted, truth in pairs]
        localization_figures({"lesion": records})
        return [value for one in records for value in (one.dice, one.iou, one.hd95_mm)]

    return work


def masks_monai() -> Callable[[], list[float]]:
    """The same without lesion matching."""
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou

    pairs = [[torch.from_numpy(mask)[None, None] for mask in pair] for pair in five_masks()]

    def work() -> list[float]:
        options = {"include_background": True, "percentile": 95, "spacing": list(SPACING_MM)}
        return [
            float(value)
            for pair in pairs
            for value in (
                compute_dice(*pair),
                compute_iou(*pair),
                compute_hausdorff_distance(*pair, **options),
            )
        ]

    return work


def table() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of rare and common diseases."""
    rng = np.random.default_rng(0)
    label = rng.random((CASES, DISEASES)) < rng.uniform(0.02, 0.4, DISEASES)
    return 1 / (1 + np.exp(-rng.normal(1.5 * label - 1, 1))), label.astype(float)


def bootstrap_ours() -> Callable[[], list[float]]:
    """AUROC, AP, F1, precision, recall, accuracy of each disease, macro and micro, and CRG."""
    from vlm3d.evaluation.bootstrap import bootstrap_classification

    probability, label = table()
    names = [str(k) for k in range(DISEASES)]

    def work() -> list[float]:
        found = bootstrap_classification(probability, label, names, resamples=RESAMPLES).intervals()
        return [found["macro"][figure].value for figure in ("auroc", "ap", "f1")]

    return work


def bootstrap_scikit_learn() -> Callable[[], list[float]]:
    """AUROC, AP, F1, precision, recall, accuracy of each disease; no micro, no CRG; a share of the resamples."""
    from sklearn import metrics as sk

    probability, label = table()
    truth = label.astype(int)

    def figures(rows: np.ndarray) -> list[float]:
        p, y = probability[rows], truth[rows]
        c = (p >= 0.5).astype(int)
        per_disease = [
            (
                sk.roc_auc_score(y[:, k], p[:, k]),
                sk.average_precision_score(y[:, k], p[:, k]),
                sk.f1_score(y[:, k], c[:, k], zero_division=0),
                sk.precision_score(y[:, k], c[:, k], zero_division=0),
                sk.recall_score(y[:, k], c[:, k], zero_division=0),
                sk.accuracy_score(y[:, k], c[:, k]),
            )
            for k in range(DISEASES)
        ]
        return np.mean(per_disease, axis=0).tolist()

    def work() -> list[float]:
        rng = np.random.default_rng(0)
        for _ in range(SCIKIT_RESAMPLES):
            figures(rng.integers(CASES, size=CASES))
        return figures(np.arange(CASES))[:3]

    return work


def texts() -> tuple[list[str], list[str]]:
    """Reports of about 200 words from some 2,000, and generated ones that share half of their sentences."""
    generator = random.Random(0)
    vocabulary = [
        "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 10)))
        for _ in range(2000)
    ]
    weight = [1 / (place + 1) for place in range(len(vocabulary))]
    sentences = [
        " ".join(generator.choices(vocabulary, weight, k=generator.randint(5, 20))) + "." for _ in range(3000)
    ]
    truth = [generator.choices(sentences, k=16) for _ in range(REPORTS)]
    predicted = [report[:8] + generator.choices(sentences, k=8) for report in truth]
    return [" ".join(report) for report in predicted], [" ".join(report) for report in truth]


def reports_ours() -> Callable[[], list[float]]:
    """BLEU, ROUGE-L, CIDEr and METEOR."""
    from vlm3d.evaluation.report import report_scores

    predicted, truth = texts()

    def work() -> list[float]:
        found = report_scores(predicted, truth).figures
        return [found[name] for name in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr")]

    return work


def reports_pycocoevalcap() -> Callable[[], list[float]]:
    """BLEU, ROUGE-L and CIDEr."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predicted, truth = texts()
    generated, reference = ({n: [text] for n, text in enumerate(side)} for side in (predicted, truth))

    def work() -> list[float]:
        bleu, _ = Bleu(4).compute_score(reference, generated, verbose=0)
        rest = [float(peer.compute_score(reference, generated)[0]) for peer in (Rouge(), Cider())]
        return [bleu[0], bleu[3], *rest]

    return work


SIDES: dict[str, Callable[[], Callable[[], list[float]]]] = {
    "masks ours": masks_ours,
    "masks MONAI": masks_monai,
    "bootstrap ours": bootstrap_ours,
    "bootstrap scikit-learn": bootstrap_scikit_learn,
    "reports ours": reports_ours,
    "reports pycocoevalcap": reports_pycocoevalcap,
}


def child(side: str) -> None:
    """Measure one side, and print it."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work = SIDES[side]()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        figures = work()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(times), "peak_rss_mb": peak_rss_mb(), "figures": figures}))


def main() -> None:
    """Measure all, and print the ratios of the bars."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    print(json.dumps(machine()), flush=True)
    for task, peer in (("masks", "MONAI"), ("bootstrap", "scikit-learn"), ("reports", "pycocoevalcap")):
        ours, theirs = in_child(__file__, f"{task} ours"), in_child(__file__, f"{task} {peer}")
        row: dict[str, Any] = {"task": task, "peer": peer}
        if task == "bootstrap":
            # The last of the peer's rounds is the figures themselves; time goes by rounds.
            theirs["seconds"] *= RESAMPLES / (SCIKIT_RESAMPLES + 1)
            row |= {"peer_resamples_run": SCIKIT_RESAMPLES, "peer_seconds_are_of": RESAMPLES}
        apart = np.abs(np.array(ours["figures"]) - theirs["figures"]) / np.maximum(
            1, np.abs(theirs["figures"])
        )
        row |= {
            "our_seconds": round(ours["seconds"], 2),
            "peer_seconds": round(theirs["seconds"], 2),
            "ratio": round(theirs["seconds"] / ours["seconds"], 1),
            "our_peak_rss_mb": round(ours["peak_rss_mb"]),
            "peer_peak_rss_mb": round(theirs["peak_rss_mb"]),
            "largest_relative_difference": float(apart.max()),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
