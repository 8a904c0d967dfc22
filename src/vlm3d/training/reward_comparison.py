"""Are reports better after phase 3 than before? Rewards on held-out scans, written as a user gets them, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm3d.config import Config, GrpoPhase
from vlm3d.datasets.augmentation import NO_AUGMENTATION
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError
from vlm3d.evaluation.bootstrap import (
    DEFAULT_RESAMPLES,
    Difference,
    bootstrap_classification,
    difference,
    resample_means,
)
from vlm3d.evaluation.labeler import label_reports
from vlm3d.evaluation.localization import nanmean
from vlm3d.evaluation.ranking import Floats
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.checkpoint import StoredThresholds, heads_fingerprint
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training.data import ScanStream, collate
from vlm3d.training.group_sampling import FrozenPerplexity, ReportContext
from vlm3d.training.rewards import (
    ReportTruth,
    Reward,
    score_reports,
    watch_reports,
    weighted_rewards,
)
from vlm3d.training.scan_contexts import scan_contexts
from vlm3d.training.validation import Validation

if TYPE_CHECKING:
    from vlm3d.training.grpo import GrpoLearner

REPORTS_AT_ONCE = 8
"""Reports written side by side."""


@dataclass(frozen=True)
class HeldOutCase:
    """One scan that nothing trains on.

    Attributes:
        case_id: Of the scan.
        patient_id: Intervals are drawn over patients.
        context: The scan as the report generator sees it.
        truth: What is true of it.
    """

    case_id: str
    patient_id: str
    context: ReportContext
    truth: ReportTruth


@dataclass(frozen=True)
class ScoredReports:
    """One model's reports on held-out scans, with what they are worth.

    Attributes:
        case_ids: N.
        patient_ids: N.
        texts: N reports, decoded as `ReportGenerator.generate` does.
        figures: Name -> N values: ``reward``, ``reward_NAME``, and those of `ReportWatch`.
        label_NK: True labels, NaN where unknown.
    """

    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    texts: tuple[str, ...]
    figures: Mapping[str, Floats]
    label_NK: Floats

    def means(self) -> dict[str, float]:
        """Each figure's mean, and the macro F1 of the diseases that the reports tell."""
        found = {name: nanmean(values) for name, values in self.figures.items()}
        return {**found, "clinical_f1": float(_clinical(self, 0, 0).own.macro["f1"][0])}


def held_out_cases(
    model: VLM3DMultiTask,
    dataset: PreparedDataset,
    config: Config,
    limit: int | None = None,
    thresholds: StoredThresholds | None = None,
) -> Iterable[HeldOutCase]:
    """Scans of a split as they are, in an order that never changes, each encoded when its turn comes.

    Args:
        model: In evaluation mode.
        dataset: A split that was not trained on.
        config: The run's settings.
        limit: Most scans.
        thresholds: As `scan_contexts` takes them.
    """
    same = {"augmentation": NO_AUGMENTATION, "seed": 0}  # two runs' seeds would order the scans differently
    quiet = config.model_copy(update={"training": config.training.model_copy(update=same)})
    whole = {"without_regions": 0.0, "localization_crop": None, "scan_crop": None}
    phase = config.training.phases.grpo.model_copy(update=whole)
    stream = ScanStream(dataset, quiet, phase, phase_number=0)
    device = next(model.parameters()).device
    patients = {case.case_id: case.patient_id for case in dataset.cases}
    for position in range(len(dataset) if limit is None else min(limit, len(dataset))):
        batch = collate([stream[position]]).to(device)
        ((context, truth),) = scan_contexts(model, batch, thresholds=thresholds)
        case_id = batch.case_ids[0]
        yield HeldOutCase(case_id, patients[case_id], context, truth)


def score_written(
    model: VLM3DMultiTask,
    cases: Iterable[HeldOutCase],
    rewards: Mapping[str, tuple[float, Reward]],
    **decoding: Any,
) -> ScoredReports:
    """Write each scan's report and score it.

    Args:
        model: In evaluation mode, with its language model.
        cases: From `held_out_cases`.
        rewards: By name, with weights.
        decoding: As `ReportGenerator.write` takes it; by default what prediction does.
    """
    rows: list[dict[str, float]] = []
    ids, patients, texts, labels = [], [], [], []
    generator, left = model.report_generator, iter(cases)
    while some := list(islice(left, REPORTS_AT_ONCE)):
        prompts = [case.context.prompt(generator) for case in some]
        for case, (written,) in zip(some, generator.write(prompts, **decoding), strict=True):
            scores = score_reports([written.text], case.truth, rewards)
            rows.append(
                {
                    ("reward" if name == "total" else f"reward_{name}"): values[0]
                    for name, values in scores.items()
                }
                | asdict(watch_reports([written.text], case.truth))
            )
            ids.append(case.case_id)
            patients.append(case.patient_id)
            texts.append(written.text)
            labels.append(case.truth.labels_K)
    figures = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    return ScoredReports(
        tuple(ids), tuple(patients), tuple(texts), figures, np.array(labels, dtype=np.float64)
    )


@torch.no_grad()
def score_held_out(
    models: Sequence[VLM3DMultiTask],
    dataset: PreparedDataset,
    phase: GrpoPhase,
    limit: int | None = None,
    thresholds: StoredThresholds | None = None,
    temperatures: Sequence[float] = (0.0,),
) -> list[list[ScoredReports]]:
    """Write and score reports of held-out scans with checkpoints that share their heads: each scan is read once.

    Args:
        models: Loaded from checkpoints; their language models are loaded if they are not there yet.
        dataset: Prepared as the models need it.
        phase: Weights of the rewards.
        limit: Most scans.
        thresholds: Of the heads.
        temperatures: 0 writes what prediction does; above it reports are drawn from the whole distribution.

    Returns:
        A list a temperature, of one a model.

    Raises:
        ConfigError: The store was prepared for another model, or the heads differ.
        DataError: A case is damaged.
    """
    first = models[0]
    dataset.check(first.config.preprocessing)
    heads = {heads_fingerprint(model.checkpoint_state_dict(), model.config) for model in models}
    if len(heads) > 1:
        raise ConfigError(
            "rewards of reports are compared between checkpoints with the same encoder and heads"
        )
    for model in models:
        model.eval()
        model.report_generator.load_llm()
    cases = list(held_out_cases(first, dataset, first.config, limit, thresholds))
    llm = first.report_generator.llm  # without its adapters it is the same for all
    assert llm is not None
    rewards = weighted_rewards(phase, FrozenPerplexity(llm, phase.rows_per_pass))
    return [
        [score_written(model, cases, rewards, temperature=value, top_p=1.0) for model in models]
        for value in temperatures
    ]


def compare_rewards(
    before: ScoredReports,
    after: ScoredReports,
    *,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Difference]:
    """How much each figure rose from one model to the other on the same scans, with its paired interval.

    Args:
        before: The first model's reports.
        after: The second's, on the same scans.
        resamples: Of the patients.
        seed: Of the resamples.
        level: Of the interval.

    Returns:
        Each figure of `ScoredReports.figures`, and ``clinical_f1``: macro F1 of the diseases that the reports tell.

    Raises:
        ValueError: The two are not of the same scans, or there is none.
    """
    if before.case_ids != after.case_ids or not before.case_ids:
        raise ValueError("rewards are compared on the same scans, at least one, in the same order")
    names = list(before.figures)
    gain_NM = np.stack([after.figures[name] - before.figures[name] for name in names], axis=1)
    drawn_RM = resample_means(gain_NM, patient_ids=before.patient_ids, resamples=resamples, seed=seed)
    found = {name: difference(nanmean(gain_NM[:, m]), drawn_RM[:, m], level) for m, name in enumerate(names)}
    first, second = (_clinical(scored, resamples, seed) for scored in (before, after))
    found["clinical_f1"] = difference(
        float(second.own.macro["f1"][0] - first.own.macro["f1"][0]),
        second.drawn.macro["f1"] - first.drawn.macro["f1"],
        level,
    )
    return found


@torch.no_grad()
def validate_rewards(learner: GrpoLearner, dataset: PreparedDataset) -> Validation:
    """Rewards of the running phase's model on held-out scans, and their gain over the model that it began with.

    The score is the reward. The reference writes its reports once a run.

    Args:
        learner: Of the phase; its rewards count.
        dataset: The validation split, of which ``training.validation_reports`` scans are taken.
    """
    model, config = learner.model, learner.config
    model.eval()
    cases = list(
        held_out_cases(model, dataset, config, config.training.validation_reports, learner.thresholds)
    )
    if not cases:
        return Validation({}, 0.0)
    after = score_written(model, cases, learner.rewards)
    if learner.reference_reports is None:
        with learner.as_reference():
            learner.reference_reports = score_written(model, cases, learner.rewards)
    gains = compare_rewards(learner.reference_reports, after)
    figures: dict[str, Any] = {f"valid/{name}": value for name, value in after.means().items()}
    for name in ("reward", "clinical_f1"):
        figures |= {
            f"valid/{name}_gain": gains[name].value,
            f"valid/{name}_gain_low": gains[name].low,
            f"valid/{name}_gain_high": gains[name].high,
        }
    return Validation(figures, figures["valid/reward"])


def _clinical(scored: ScoredReports, resamples: int, seed: int) -> Any:
    """Classification figures of the diseases that the reports tell."""
    said_NK = label_reports(scored.texts).astype(np.float64)[:, : scored.label_NK.shape[1]]
    return bootstrap_classification(
        said_NK,
        scored.label_NK,
        DISEASE_NAMES[: said_NK.shape[1]],
        patient_ids=scored.patient_ids,
        resamples=max(resamples, 1),
        seed=seed,
    )
