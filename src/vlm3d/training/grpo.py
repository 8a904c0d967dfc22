"""Phase 3: sample reports of a scan, reward them, make the better ones likelier, stay near the phase before.

A step reads top to bottom in `GrpoLearner.learn`: scans are encoded once, several reports of each are sampled after one
prompt, scored by `vlm3d.training.rewards`, held against the others of their scan, and trained on a few times under the
loss of `vlm3d.training.grpo_loss`. The reference of the divergence is a copy of what trains (projector and adapters),
swapped in without copying where it is asked; the frozen language model is there once.

What a step samples follows from (seed, phase, position) alone, so that a resumed run samples the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlm3d.config import Config
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.model.checkpoint import StoredThresholds
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.model.report_sections import HEADINGS
from vlm3d.training.data import Batch, ScanStream, collate
from vlm3d.training.group_sampling import (
    FrozenPerplexity,
    ReportContext,
    SampledGroup,
    replaced_weights,
    sample_group,
)
from vlm3d.training.grpo_loss import LossTerms, Objective, group_advantages, grpo_loss, token_weights
from vlm3d.training.reward_comparison import ScoredReports
from vlm3d.training.rewards import (
    ReportTruth,
    Reward,
    score_reports,
    watch_reports,
    weighted_rewards,
)
from vlm3d.training.run_state import with_prefix, without_prefix
from vlm3d.training.scan_contexts import scan_contexts

logger = logging.getLogger(__name__)

RefuseNan = Callable[[Mapping[str, Tensor], Batch], None]
_REFERENCE = "reference"
_HEADING_TOKENS = 4
"""Room a heading takes in a sample; the report's own limit does not count headings."""


@dataclass
class RewardedGroup:
    """Reports of one scan with what they are worth.

    Attributes:
        batch: That the scan came in, to name it.
        context: The scan as the report generator sees it.
        truth: Of the scan.
        sampled: K reports.
        scores: Reward's name -> K values; ``total`` is what counts.
        advantage_K: Of each report over the others.
        informative: The rewards differ.
        reference_KT: Log-probabilities under the reference; None until asked for.
        old_KT: Log-probabilities when the reports were sampled; filled in by the first update.
    """

    batch: Batch
    context: ReportContext
    truth: ReportTruth
    sampled: SampledGroup
    scores: dict[str, list[float]]
    advantage_K: Tensor
    informative: bool
    reference_KT: Tensor | None = None
    old_KT: Tensor | None = None


class GrpoLearner:
    """What phase 3 does in place of a supervised step.

    Args:
        model: With its language model loaded; as the phase before left it.
        config: The run's settings, those of the phase among them.
        dataset: The training split, for scans that are tried in place of others.
        phase_number: Tells the phases' random numbers apart.
        accelerator: Of the run.
        parameters: What trains, by name.
        rewards: By name, with weights; those of the settings by default.
        thresholds: Heads are weighed and findings called by them if they fit the model's weights.
    """

    def __init__(
        self,
        model: VLM3DMultiTask,
        config: Config,
        dataset: PreparedDataset,
        phase_number: int,
        accelerator: Any,
        parameters: Mapping[str, nn.Parameter],
        rewards: Mapping[str, tuple[float, Reward]] | None = None,
        thresholds: StoredThresholds | None = None,
    ) -> None:
        if model.report_generator.llm is None:
            raise RuntimeError("reports are sampled with a language model: call load_llm() first")
        self.model = model
        self.llm = model.report_generator.llm
        self.config = config
        self.phase = phase = config.training.phases.grpo
        self.seed = (config.training.seed, phase_number)
        self.accelerator = accelerator
        self.stream = ScanStream(dataset, config, phase, phase_number)
        self.parameters = dict(parameters)
        if thresholds is not None and not thresholds.fits(model.checkpoint_state_dict(), model.config):
            logger.warning("the thresholds were tuned for other heads: each head speaks for itself, at 0.5")
            thresholds = None
        self.thresholds = thresholds
        self.rewards = rewards or weighted_rewards(phase, FrozenPerplexity(self.llm, phase.rows_per_pass))
        self.objective = Objective(phase.clip_low, phase.clip_high, phase.kl_weight)
        self.longest = phase.max_new_tokens or (
            config.model.report.max_new_tokens
            + sum(_HEADING_TOKENS + len(self.llm.encode(heading)) for heading in HEADINGS)
        )
        self.reference_reports: ScoredReports | None = None
        self.reference = {name: p.detach().clone() for name, p in self.parameters.items()}

    # --- state ---------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """The reference, which a resumed run needs."""
        return with_prefix(_REFERENCE, self.reference)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        for name, tensor in without_prefix(_REFERENCE, tensors).items():
            self.reference[name].copy_(tensor)

    def as_reference(self) -> Any:
        """Within the block the model is the one that the phase began with."""
        return replaced_weights({self.parameters[name]: tensor for name, tensor in self.reference.items()})

    # --- a step --------------------------------------------------------------------------------------------------

    def learn(
        self,
        optimizer: torch.optim.Optimizer,
        stream: Iterator[Batch],
        step: int,
        damaged: Callable[[Batch], None],
        refuse_nan: RefuseNan,
    ) -> tuple[dict[str, float], float]:
        """Sample a round of reports and train on it.

        Args:
            optimizer: Its rates are set.
            stream: Batches of this process.
            step: Steps of the phase that are done.
            damaged: Told of each batch, whose damaged scans are counted.
            refuse_nan: Stops the run at losses that are no numbers.

        Returns:
            What is logged, and the norm of the last update's gradient.
        """
        self.model.eval()  # no dropout: what is trained is what was sampled
        groups: list[RewardedGroup] = []
        tried = 0
        for micro in range(self.phase.accumulate):
            batch = next(stream).to(self.accelerator.device)
            damaged(batch)
            for group, tries in self._groups(batch, step, micro, refuse_nan):
                groups.append(group)
                tried += tries
        learning = [group for group in groups if group.informative or not self.phase.resample_tries]
        self._refer(learning)
        told: list[dict[str, float]] = []
        norm = 0.0
        for _ in range(self.phase.updates):
            losses, norm = self._update(optimizer, learning, refuse_nan)
            told.append(losses)
        mean = {name: float(np.mean([losses[name] for losses in told])) for name in told[0]}
        return {**mean, **_told_of(groups), "other_scans_tried": float(tried)}, norm

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        groups: list[RewardedGroup],
        refuse_nan: RefuseNan,
    ) -> tuple[dict[str, float], float]:
        """One step of the optimizer on all reports of the round."""
        masks = [group.sampled.mask_KT.float() for group in groups]
        counts = [float(sum(len(mask) for mask in masks)), float(sum(float(mask.sum()) for mask in masks))]
        device = self.accelerator.device
        rows, tokens = self.accelerator.reduce(torch.tensor(counts, device=device), "mean").tolist()
        weights = token_weights(
            masks, self.phase.normalization, longest=self.longest, rows=rows, tokens=tokens
        )
        with self._recomputing():
            terms = [
                term
                for group, weight_KT in zip(groups, weights, strict=True)
                for term in self._backward(group, weight_KT, refuse_nan)
            ]
        losses = _sum_of_terms(terms)
        if not rows:  # no scan of any process has reports that differ
            return losses, 0.0
        self._sync_gradients()
        learned = [p for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(learned, self.config.training.clip_norm)
        if groups:
            refuse_nan({"total": norm}, groups[0].batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses, float(norm)

    def _backward(
        self, group: RewardedGroup, weight_KT: Tensor, refuse_nan: RefuseNan
    ) -> Iterator[LossTerms]:
        """Loss and gradient of one scan's reports, some rows at a time."""
        first = group.old_KT is None
        old: list[Tensor] = []
        for rows in self._row_slices(group):
            log_p_KT = self._log_probabilities(group, rows)
            if group.old_KT is None:
                old.append(log_p_KT.detach())
            terms = grpo_loss(
                log_p_KT,
                old[-1] if group.old_KT is None else group.old_KT[rows],
                None if group.reference_KT is None else group.reference_KT[rows],
                group.advantage_K[rows],
                weight_KT[rows],
                self.objective,
            )
            refuse_nan({"total": terms.loss}, group.batch)
            self.accelerator.backward(terms.loss)
            yield replace(terms, loss=terms.loss.detach())
        if first:
            group.old_KT = torch.cat(old)

    @torch.no_grad()
    def _refer(self, groups: list[RewardedGroup]) -> None:
        """How likely the reference finds the reports."""
        with self.as_reference():
            for group in groups:
                found = [self._log_probabilities(group, rows) for rows in self._row_slices(group)]
                group.reference_KT = torch.cat(found)

    def _row_slices(self, group: RewardedGroup) -> list[slice]:
        size = self.phase.rows_per_pass
        return [slice(start, start + size) for start in range(0, len(group.sampled.texts), size)]

    def _log_probabilities(self, group: RewardedGroup, rows: slice) -> Tensor:
        sampled = group.sampled
        with self.accelerator.autocast():
            return group.context.log_probabilities(
                self.model.report_generator,
                sampled.tokens_KT[rows],
                sampled.mask_KT[rows],
                self.phase.sampling_temperature,
            )

    def _sync_gradients(self) -> None:
        """Average the processes' gradients; a process without reports that differ adds zeros."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.parameters.values():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(grad, "mean")

    # --- a round of reports --------------------------------------------------------------------------------------

    def _groups(
        self, batch: Batch, step: int, micro: int, refuse_nan: RefuseNan
    ) -> Iterator[tuple[RewardedGroup, int]]:
        """Each scan's reports; where they are all equally good, those of another scan, and how many were tried."""
        size, world = self.phase.batch_size, self.accelerator.num_processes
        forward = step * self.phase.accumulate + micro
        first = (forward * world + self.accelerator.process_index) * size
        scans = self.phase.steps * self.phase.accumulate * world * size
        for index, (context, truth) in enumerate(self.contexts(batch, first)):
            group = self._rewarded(batch, context, truth, first + index, refuse_nan)
            tries = 0
            while not group.informative and tries < self.phase.resample_tries:
                tries += 1
                position = first + index + tries * scans  # beyond all positions of the phase's own steps
                other = collate([self.stream[position]]).to(self.accelerator.device)
                ((context, truth),) = self.contexts(other, position)
                group = self._rewarded(other, context, truth, position, refuse_nan)
            yield group, tries

    def _rewarded(
        self, batch: Batch, context: ReportContext, truth: ReportTruth, position: int, refuse_nan: RefuseNan
    ) -> RewardedGroup:
        """Sample one scan's reports and hold them against each other."""
        with torch.no_grad(), self.accelerator.autocast():
            prompt_PM = context.prompt(self.model.report_generator)
            try:
                sampled = sample_group(
                    self.llm,
                    prompt_PM,
                    self.phase.group_size,
                    max_new_tokens=self.longest,
                    temperature=self.phase.sampling_temperature,
                    seed=int(np.random.default_rng([*self.seed, 3, position]).integers(2**62)),
                )
            except FloatingPointError:
                refuse_nan({"sampling": torch.tensor(float("nan"))}, batch)
                raise
        scores = score_reports(sampled.texts, truth, self.rewards)
        total_K = torch.tensor(scores["total"], device=sampled.tokens_KT.device)
        refuse_nan({"reward": total_K.sum()}, batch)
        advantage_K = group_advantages(total_K, scale_by_std=self.phase.scale_by_std)
        informative = float(total_K.std()) >= self.phase.min_reward_std
        return RewardedGroup(batch, context, truth, sampled, scores, advantage_K, informative)

    @torch.no_grad()
    def contexts(self, batch: Batch, first: int) -> list[tuple[ReportContext, ReportTruth]]:
        """Each scan of a batch as the report generator sees it, and what is true of it; the image is encoded once."""
        with self.accelerator.autocast():
            return scan_contexts(
                self.model,
                batch,
                [
                    np.random.default_rng([*self.seed, 4, first + index]).random()
                    < self.phase.predicted_findings
                    for index in range(len(batch.case_ids))
                ],
                self.thresholds,
            )

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers of the language model recompute their activations where that is asked for; dropout stays off."""
        if self.config.model.vision.gradient_checkpointing:
            self.llm.train()
            for module in self.llm.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
        try:
            yield
        finally:
            self.llm.eval()


def _sum_of_terms(terms: list[LossTerms]) -> dict[str, float]:
    tokens = max(1, sum(int(term.tokens) for term in terms))
    return {
        "total": float(sum(float(term.loss) for term in terms)),
        "kl": float(sum(float(term.kl) for term in terms)) / tokens,
        "clipped": float(sum(int(term.clipped) for term in terms)) / tokens,
    }


def _told_of(groups: list[RewardedGroup]) -> dict[str, float]:
    """Rewards, lengths and the signs of `vlm3d.training.rewards.ReportWatch` over a round.

    ``sampling_gap`` is how far the probabilities that were drawn from lie from those that are trained, in nats a
    token: rounding and no more, or what is sampled is not what learns.
    """
    told: dict[str, list[float]] = {}
    for group in groups:
        values = {
            f"reward_{name}" if name != "total" else "reward": float(np.mean(v))
            for name, v in group.scores.items()
        }
        values |= {
            f"reports/{n}": v for n, v in asdict(watch_reports(group.sampled.texts, group.truth)).items()
        }
        values["reward_std"] = float(np.std(group.scores["total"], ddof=1))
        values["informative"] = float(group.informative)
        values["reports/tokens"] = float(group.sampled.mask_KT.sum(1).float().mean())
        if group.old_KT is not None:
            gap_KT = (group.sampled.log_p_KT - group.old_KT).abs()
            values["sampling_gap"] = float(gap_KT.sum() / group.sampled.mask_KT.sum())
        values["reports/finished"] = float(group.sampled.finished_K.float().mean())
        for name, value in values.items():
            told.setdefault(name, []).append(value)
    return {
        name: float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
        for name, values in told.items()
    }
