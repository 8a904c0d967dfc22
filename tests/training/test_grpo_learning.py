"""GRPO learns: the reward of fresh samples rises, and the divergence from where it began grows from nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from support.grpo_toy import low_characters, outspoken, refuse_nan, toy_batches, toy_learner
from support.small_models import small_model
from vlm3d.training.group_sampling import ReportContext, SampledGroup, sample_group
from vlm3d.training.grpo import GrpoLearner
from vlm3d.training.rewards import ReportTruth

FRESH = 48
"""Reports that are sampled a scan to see what was learned."""


@dataclass(frozen=True)
class Behaviour:
    """What a model writes of one scan when it is asked anew."""

    context: ReportContext
    sampled: SampledGroup
    reward: float
    divergence: float


def behaviour(learner: GrpoLearner, seed: int) -> Behaviour:
    """Sample reports that no step has seen; divergence from the reference in nats a token, by its definition."""
    ((context, truth),) = learner.contexts(next(toy_batches()), 0)
    generator = learner.model.report_generator
    with torch.no_grad():
        sampled = sample_group(learner.llm, context.prompt(generator), FRESH, max_new_tokens=8, seed=seed)
        own = context.log_probabilities(generator, sampled.tokens_KT, sampled.mask_KT)
        with learner.as_reference():
            reference = context.log_probabilities(generator, sampled.tokens_KT, sampled.mask_KT)
    reward = torch.tensor(low_characters(sampled.texts, truth)).mean()
    divergence = (own - reference).sum() / sampled.mask_KT.sum()
    return Behaviour(context, sampled, float(reward), float(divergence))


def train(learner: GrpoLearner, steps: int, lr: float = 1e-2) -> list[dict[str, float]]:
    """Run the loop; returns what it tells of each step."""
    optimizer = torch.optim.AdamW(learner.parameters.values(), lr=lr, weight_decay=0.0)
    stream = toy_batches()
    return [
        learner.learn(optimizer, stream, step, lambda batch: None, refuse_nan)[0] for step in range(steps)
    ]


def test_the_reward_of_fresh_samples_rises_and_the_divergence_grows_from_nothing() -> None:
    learner = toy_learner(outspoken(small_model()), kl_weight=0.02)
    kept = {name: tensor.clone() for name, tensor in learner.reference.items()}
    before = behaviour(learner, seed=100)
    told = train(learner, 20)
    after = behaviour(learner, seed=200)
    assert before.divergence == 0
    assert after.divergence > 0.3
    assert before.reward < 0.5
    assert after.reward > before.reward + 0.3
    assert max(step["sampling_gap"] for step in told) < 1e-4
    early, late = told[:4], told[-4:]
    for name in ("reward", "kl"):
        assert sum(step[name] for step in late) > sum(step[name] for step in early)
    assert all(torch.equal(learner.reference[name], tensor) for name, tensor in kept.items())


def test_one_update_makes_better_reports_likelier_and_worse_ones_rarer() -> None:
    learner = toy_learner(outspoken(small_model()), kl_weight=0.0, updates=1, group_size=16)
    batch = next(toy_batches())
    ((group, _),) = learner._groups(batch, 0, 0, refuse_nan)

    def log_p_K() -> torch.Tensor:
        with torch.no_grad():
            return learner._log_probabilities(group, slice(None)).sum(dim=1)

    before = log_p_K()
    told = train(learner, 1, lr=1e-3)
    gain_K = log_p_K() - before
    assert told[0]["kl"] == 0  # the first update still sees the model that the phase began with
    assert float((gain_K * group.advantage_K).sum()) > 0
    better = group.advantage_K > 0
    assert float(gain_K[better].mean()) > float(gain_K[~better].mean())


def test_a_strong_divergence_weight_holds_the_model_back() -> None:
    free, held = (toy_learner(outspoken(small_model()), kl_weight=weight) for weight in (0.0, 3.0))
    for learner in (free, held):
        train(learner, 5)
    assert 0 < behaviour(held, seed=300).divergence < 0.7 * behaviour(free, seed=300).divergence


def test_one_scan_gets_the_same_reports_at_the_same_step_only() -> None:
    first, again = (toy_learner(small_model()) for _ in range(2))
    batch = next(toy_batches())
    texts = [
        next(iter(learner._groups(batch, step, 0, refuse_nan)))[0].sampled.texts
        for learner, step in ((first, 0), (again, 0), (again, 1))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_toy_reward_is_the_share_of_low_characters() -> None:
    assert low_characters(["AzBz", "", "z"], ReportTruth(())) == [0.5, 0.0, 0.0]
    assert low_characters(["ABC"], ReportTruth(())) == pytest.approx([1.0])
