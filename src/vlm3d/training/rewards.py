"""What a report is worth: pure functions from texts and the truth of their scan to numbers from 0 (bad) to 1 (good).

Each takes several reports of one scan. Clinical accuracy and factual consistency read the text with the project's own
labeler; fluency asks the frozen language model; form is a grammar. `ReportWatch` counts what a writer does that learns
to please these readers instead of telling the truth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm3d.anatomy.measurement import find_landmarks, measure_lesion
from vlm3d.anatomy.regions import REGIONS
from vlm3d.config import GrpoPhase
from vlm3d.evaluation.labeler import label_report
from vlm3d.evaluation.location_facts import LocatedFinding, LocationFact, compare_facts, location_facts
from vlm3d.labels import DISEASE_NAMES, Lesion
from vlm3d.model.location import MIN_VOLUME_ML
from vlm3d.model.report_sections import form_score

SIZE_TOLERANCE_MM = 3.0
"""Sizes that differ by no more are equal: a voxel's thickness in `tiny`."""

REPEATED_RUN = 4
"""Words of a run that a report should not say twice."""

_DETAILS = ("side", "region", "level", "size_mm")
_REGION_KEYS = {region.name: region.key for region in REGIONS}


@dataclass(frozen=True)
class ReportTruth:
    """What is true of a scan, as far as it is known.

    Attributes:
        labels_K: 1 present, 0 absent, NaN unknown, in the order of `vlm3d.labels.DISEASE_NAMES`.
        facts: Findings with their places.
        report: The radiologist's, or None.
    """

    labels_K: tuple[float, ...]
    facts: tuple[LocatedFinding, ...] = ()
    report: str | None = None

    def known(self, finding: str) -> bool:
        """Whether it is known if a finding is there."""
        if finding in DISEASE_NAMES[: len(self.labels_K)]:
            return not math.isnan(self.labels_K[DISEASE_NAMES.index(finding)])
        return False


Reward = Callable[[Sequence[str], ReportTruth], list[float]]
Perplexity = Callable[[Sequence[str]], list[float]]


def truth_of_report(
    labels_K: Sequence[float], report: str | None, located: Sequence[LocatedFinding] = ()
) -> ReportTruth:
    """Join what is known of a scan: labels, else what the report says; the report's places, else the masks'.

    Args:
        labels_K: 0, 1 or NaN.
        report: The radiologist's, or None.
        located: Findings measured from masks, for scans without a report.
    """
    labels = np.asarray(labels_K, dtype=np.float64)[: len(DISEASE_NAMES)]
    if report:
        said = np.array(label_report(report).labels_K[: len(labels)], dtype=np.float64)
        labels = np.where(np.isnan(labels), said, labels)
    told: tuple[LocatedFinding, ...] = tuple(location_facts(report)) if report else tuple(located)
    there = {name for name, label in zip(DISEASE_NAMES, labels, strict=False) if label == 1}
    facts = [fact for fact in told if fact.finding in there]
    bare = sorted(there - {fact.finding for fact in facts}, key=DISEASE_NAMES.index)
    facts += [LocationFact(name) for name in bare]
    return ReportTruth(tuple(labels.tolist()), tuple(facts), report or None)


def located_in_masks(
    masks_LDHW: NDArray[np.int8],
    regions_DHW: NDArray[np.uint8] | None,
    spacing_mm: tuple[float, float, float],
    lesions: Sequence[Lesion],
) -> list[LocationFact]:
    """Every piece of every annotated lesion as a fact, for scans that no radiologist reported.

    Args:
        masks_LDHW: 1 lesion, 0 none, -1 not annotated; canonical axes.
        regions_DHW: Region ids on the same grid, or None.
        spacing_mm: Voxel size along (D, H, W).
        lesions: Of the masks, in order.
    """
    landmarks = find_landmarks(regions_DHW, masks_LDHW.shape[1:])
    facts = []
    for lesion, mask_DHW in zip(lesions, masks_LDHW, strict=True):
        for piece in measure_lesion(
            mask_DHW == 1,
            regions_DHW,
            spacing_mm,
            min_volume_ml=MIN_VOLUME_ML,
            lesion=lesion,
            landmarks=landmarks,
        ):
            region = _REGION_KEYS.get(piece.region)
            facts.append(LocationFact(lesion.disease, piece.side, region, piece.level, piece.max_diameter_mm))
    return facts


def clinical_accuracy(texts: Sequence[str], truth: ReportTruth) -> list[float]:
    """How well each report names the diseases that are there: F1 over the scan's known labels.

    Without any disease it is 1 / (1 + invented diseases), which F1 leaves open.
    """
    rewards = []
    for text in texts:
        hits, invented, missed = _confusion(text, truth)
        if hits + missed:
            rewards.append(2 * hits / (2 * hits + invented + missed))
        else:
            rewards.append(1 / (1 + invented))
    return rewards


def factual_consistency(texts: Sequence[str], truth: ReportTruth) -> list[float]:
    """How well each report tells where things are: F1 of its facts against the true ones.

    Precision is the share of the report's facts that nothing true contradicts. Recall is the mean share of what is known of
    a true finding (that it is there, side, region, level, size) that its best fact tells: a vague report
    contradicts nothing, but tells little.
    """
    rewards = []
    for text in texts:
        facts = [fact for fact in location_facts(text) if truth.known(fact.finding)]
        compared = compare_facts(facts, truth.facts, size_tolerance_mm=SIZE_TOLERANCE_MM)
        if not truth.facts:
            rewards.append(1 / (1 + len(compared.wrong)))
            continue
        told = [
            max((_told_share(fact, item) for fact in compared.right), default=0.0) for item in truth.facts
        ]
        recall = float(np.mean(told))
        total = compared.precision + recall
        rewards.append(2 * compared.precision * recall / total if facts and total else 0.0)
    return rewards


def fluency(perplexity: Perplexity, usual_perplexity: float) -> Reward:
    """The reward of fluent language: the true report's perplexity over the report's own, at most 1.

    Repetition lowers a perplexity without making a text fluent, so what is said twice is taken off.

    Args:
        perplexity: Of texts, under the frozen language model.
        usual_perplexity: In place of the true report's, for scans without one.
    """

    def reward(texts: Sequence[str], truth: ReportTruth) -> list[float]:
        *own, true = perplexity([*texts, truth.report or ""])
        good = true if truth.report else usual_perplexity
        return [
            min(1.0, good / value) * (1 - repeated_share(text)) if text.strip() else 0.0
            for text, value in zip(texts, own, strict=True)
        ]

    return reward


def report_form(texts: Sequence[str], truth: ReportTruth | None = None) -> list[float]:
    """How well each report keeps the form, see `vlm3d.model.report_sections.form_score`; 1 is a valid report."""
    return [form_score(text) for text in texts]


def weighted_rewards(phase: GrpoPhase, perplexity: Perplexity) -> dict[str, tuple[float, Reward]]:
    """The rewards of phase 3 by name, with their weights; a weight of 0 leaves one out."""
    every: dict[str, tuple[float, Reward]] = {
        "clinical": (phase.weight_clinical, clinical_accuracy),
        "factual": (phase.weight_factual, factual_consistency),
        "fluency": (phase.weight_fluency, fluency(perplexity, phase.usual_perplexity)),
        "format": (phase.weight_format, report_form),
    }
    return {name: (weight, reward) for name, (weight, reward) in every.items() if weight}


def score_reports(
    texts: Sequence[str], truth: ReportTruth, rewards: Mapping[str, tuple[float, Reward]]
) -> dict[str, list[float]]:
    """Every reward of each text by name, and their weighted mean as ``total``."""
    found = {name: reward(texts, truth) for name, (_, reward) in rewards.items()}
    whole = math.fsum(weight for weight, _ in rewards.values())
    total = [
        math.fsum(rewards[name][0] * values[index] for name, values in found.items()) / whole
        for index in range(len(texts))
    ]
    return {"total": total, **found}


@dataclass(frozen=True)
class ReportWatch:
    """Signs that a writer pleases its rewards instead of telling the truth; means over some reports.

    Attributes:
        words: Length.
        length_share: Length over the true report's; NaN where there is none.
        repeated: Share of runs of four words that stood in the report before.
        invented: Diseases told that are known to be absent.
        missed: Diseases not told that are known to be there.
        vague: Share of facts about true findings that leave out a side or region that is known.
    """

    words: float
    length_share: float
    repeated: float
    invented: float
    missed: float
    vague: float


def watch_reports(texts: Sequence[str], truth: ReportTruth) -> ReportWatch:
    """Count the signs in some reports of one scan."""
    words = float(np.mean([len(text.split()) for text in texts]))
    confusion = np.array([_confusion(text, truth) for text in texts], dtype=np.float64)
    vague = [
        any(
            getattr(fact, detail) is None and getattr(item, detail) is not None
            for detail in ("side", "region")
        )
        for text in texts
        for fact in location_facts(text)
        for item in truth.facts
        if item.finding == fact.finding
    ]
    return ReportWatch(
        words=words,
        length_share=words / max(1, len(truth.report.split())) if truth.report else float("nan"),
        repeated=float(np.mean([repeated_share(text) for text in texts])),
        invented=float(confusion[:, 1].mean()),
        missed=float(confusion[:, 2].mean()),
        vague=float(np.mean(vague)) if vague else 0.0,
    )


def repeated_share(text: str, run: int = REPEATED_RUN) -> float:
    """Share of runs of some words that stood in the text before.

    >>> repeated_share("no effusion is seen. no effusion is seen.")
    0.2
    """
    words = text.lower().split()
    runs = Counter(tuple(words[start : start + run]) for start in range(len(words) - run + 1))
    total = sum(runs.values())
    return (total - len(runs)) / total if total else 0.0


def _confusion(text: str, truth: ReportTruth) -> tuple[int, int, int]:
    """Diseases told rightly, invented, missed, among those of which the truth is known."""
    said_K = label_report(text).labels_K
    hits = invented = missed = 0
    for said, label in zip(said_K, truth.labels_K, strict=False):
        hits += said and label == 1
        invented += said and label == 0
        missed += not said and label == 1
    return hits, invented, missed


def _told_share(fact: LocationFact, item: LocatedFinding) -> float:
    """Share of what is known of a finding that a fact tells; 0 where the fact contradicts it or is about another."""
    if not compare_facts([fact], [item], size_tolerance_mm=SIZE_TOLERANCE_MM).right:
        return 0.0
    known = [detail for detail in _DETAILS if getattr(item, detail) is not None]
    told = [detail for detail in known if getattr(fact, detail) is not None]
    return (1 + len(told)) / (1 + len(known))
