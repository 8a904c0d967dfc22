"""GRPO: its loss against the formulas written out, and the phase in the trainer: what changes, what is resumed."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.grpo_toy import low_characters
from support.training_store import losses, phantom_store, training_config
from vlm3d.config import Config
from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.errors import ConfigError, TrainingError
from vlm3d.labels import DISEASE_NAMES
from vlm3d.model.checkpoint import (
    StoredThresholds,
    heads_fingerprint,
    read_config,
    read_thresholds,
    read_weights,
    write_thresholds,
)
from vlm3d.model.multi_task_model import VLM3DMultiTask
from vlm3d.training import grpo
from vlm3d.training.grpo_loss import Objective, group_advantages, grpo_loss, kl_estimate, token_weights
from vlm3d.training.phases import chosen_phases
from vlm3d.training.reward_comparison import compare_rewards, held_out_cases, score_held_out
from vlm3d.training.tracking import read_metrics
from vlm3d.training.trainer import Trainer, TrainingRequest, train


def grpo_config(pretrained: dict[str, Any], phase: dict[str, Any] | None = None, **training: Any) -> Config:
    """The two-layer model with a short phase 3 that logs every step."""
    config = training_config(pretrained, ema_decay=0.0, **training)
    settings = {
        "steps": 4,
        "warmup_steps": 0,
        "lr": 1e-2,
        "group_size": 4,
        "max_new_tokens": 8,
        "rows_per_pass": 3,
        "predicted_findings": 0.0,
        **(phase or {}),
    }
    values = config.model_dump()
    values["training"]["phases"]["grpo"] |= settings
    values["training"]["validation_reports"] = 2
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pretrained: dict[str, Any]) -> Path:
    return phantom_store(
        tmp_path_factory.mktemp("data") / "store", training_config(pretrained), train=3, valid=1
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pretrained: dict[str, Any]) -> Path:
    """A checkpoint that claims to write reports, as phase 2 leaves one."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    torch.manual_seed(3)
    model = VLM3DMultiTask(grpo_config(pretrained))
    model.untrained_tasks = ()
    model.save_pretrained(folder)
    return folder


# --- the loss ----------------------------------------------------------------------------------------------------


def step_tensors(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 2, 4, 1])
    mask = torch.arange(5)[None] < lengths[:, None]
    noise = [torch.randn(4, 5, generator=rng) for _ in range(3)]
    log_p = -1.5 + 0.3 * noise[0]
    return {
        "log_p": log_p,
        "old": log_p + 0.3 * noise[1],
        "reference": log_p + 0.3 * noise[2],
        "mask": mask.float(),
        "reward": torch.rand(4, generator=rng),
    }


def literal_loss(
    values: dict[str, Tensor], normalization: str, low: float, high: float, beta: float, longest: int
) -> float:
    """The objective token by token, as the papers print it, in plain numbers."""
    rewards = values["reward"].tolist()
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    rows = []
    for i, reward in enumerate(rewards):
        advantage = reward - mean if normalization == "dr_grpo" else (reward - mean) / (std + 1e-4)
        row = []
        for t in range(int(values["mask"][i].sum())):
            p, old, ref = (float(values[name][i, t]) for name in ("log_p", "old", "reference"))
            ratio = math.exp(p - old)
            clipped = min(max(ratio, 1 - low), 1 + high)
            kl = math.exp(ref - p) - (ref - p) - 1
            row.append(-(min(ratio * advantage, clipped * advantage) - beta * kl))
        rows.append(row)
    if normalization == "grpo":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if normalization == "dapo":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(map(sum, rows)) / (len(rows) * longest)


@pytest.mark.parametrize("normalization", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_the_papers(normalization: Any, seed: int) -> None:
    values = step_tensors(seed)
    (weight,) = token_weights([values["mask"]], normalization, longest=7)
    found = grpo_loss(
        values["log_p"],
        values["old"],
        values["reference"],
        group_advantages(values["reward"], scale_by_std=normalization != "dr_grpo"),
        weight,
        Objective(0.2, 0.28, 0.04),
    )
    expected = literal_loss(values, normalization, 0.2, 0.28, 0.04, 7)
    assert float(found.loss) == pytest.approx(expected, abs=1e-6)
    assert int(found.tokens) == 12


@pytest.mark.parametrize("normalization", ["grpo", "dapo", "dr_grpo"])
def test_a_step_in_parts_is_the_step_in_one(normalization: Any) -> None:
    first, second = step_tensors(4), step_tensors(5)
    objective = Objective(0.2, 0.2, 0.1)

    def loss(values: dict[str, Tensor], weight: Tensor, rows: slice) -> Tensor:
        advantage = group_advantages(values["reward"], scale_by_std=True)
        return grpo_loss(
            values["log_p"][rows],
            values["old"][rows],
            values["reference"][rows],
            advantage[rows],
            weight[rows],
            objective,
        ).loss

    weights = token_weights([first["mask"], second["mask"]], normalization, longest=9)
    whole = sum(loss(v, w, slice(None)) for v, w in zip((first, second), weights, strict=True))
    parts = sum(
        loss(v, w, rows)
        for v, w in zip((first, second), weights, strict=True)
        for rows in (slice(0, 3), slice(3, 6))
    )
    torch.testing.assert_close(whole, parts)


def test_at_the_first_update_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    values = step_tensors(6)
    log_p = values["log_p"].requires_grad_()
    advantage = group_advantages(values["reward"], scale_by_std=True)
    (weight,) = token_weights([values["mask"]], "grpo", longest=5)
    grpo_loss(log_p, log_p.detach(), None, advantage, weight, Objective(0.2, 0.2, 0.0)).loss.backward()
    torch.testing.assert_close(log_p.grad, -weight * advantage[:, None])


def test_clipping_stops_the_gradient_only_where_a_step_went_far_enough() -> None:
    old = torch.zeros(4, 1)
    log_p = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weight = torch.full((4, 1), 0.25)
    found = grpo_loss(log_p, old, None, advantage, weight, Objective(0.2, 0.2, 0.0))
    found.loss.backward()
    assert (log_p.grad[:, 0] != 0).tolist() == [False, True, True, False]  # type: ignore[index]
    assert int(found.clipped) == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-8, 0), min_size=4, max_size=4), st.lists(st.floats(-8, 0), min_size=4, max_size=4))
def test_the_divergence_is_never_negative_and_zero_only_where_nothing_differs(
    own: list[float], other: list[float]
) -> None:
    a, b = torch.tensor([own], dtype=torch.float64), torch.tensor([other], dtype=torch.float64)
    assert bool((kl_estimate(a, b) >= -1e-12).all())
    assert float(kl_estimate(a, a).abs().sum()) == 0.0


def test_the_divergence_is_right_on_average() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = float((p * (p / q).log()).sum())
    assert float((p * kl_estimate(p.log(), q.log())).sum()) == pytest.approx(exact)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_advantages_are_centered_and_equal_rewards_have_none(rewards: list[float]) -> None:
    for scale in (True, False):
        advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale_by_std=scale)
        assert float(advantages.sum()) == pytest.approx(0, abs=1e-6)
        equal = group_advantages(torch.full((3,), 0.7, dtype=torch.float64), scale_by_std=scale)
        assert float(equal.abs().max()) < 1e-9


# --- the phase ---------------------------------------------------------------------------------------------------


def test_phase_3_runs_only_where_it_is_asked_for() -> None:
    assert "grpo" not in chosen_phases(None)
    assert chosen_phases(["3", "2"]) == ["joint", "grpo"]


def test_it_does_not_refine_what_was_never_taught(
    tmp_path: Path, store: Path, pretrained: dict[str, Any]
) -> None:
    config = grpo_config(pretrained)
    with pytest.raises(ConfigError, match="never learned to"):
        Trainer(TrainingRequest(config, store, tmp_path / "run", ["3"]))
    Trainer(TrainingRequest(config, store, tmp_path / "run", ["2", "3"]))  # phase 2 will have taught it


def test_only_projector_and_adapters_change_and_the_start_stays_the_reference(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any]
) -> None:
    config = grpo_config(pretrained, {"steps": 2})
    trainer = Trainer(TrainingRequest(config, store, tmp_path / "run", ["3"], start_from=start, stop_after=1))
    before = VLM3DMultiTask.from_pretrained(start).checkpoint_state_dict()
    trainer.run()
    after = trainer.model.checkpoint_state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"projector", "adapter"}
    assert trainer._grpo is not None
    with trainer._grpo.as_reference():
        inside = trainer.model.checkpoint_state_dict()
        assert all(torch.equal(before[name], inside[name]) for name in before)
    assert all(torch.equal(after[n], t) for n, t in trainer.model.checkpoint_state_dict().items())


def test_a_resumed_run_samples_and_scores_the_same_reports(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rewards differ, so that the weights move away from a reference that resuming has to bring back."""
    monkeypatch.setattr(grpo, "weighted_rewards", lambda phase, perplexity: {"toy": (1.0, low_characters)})
    config = grpo_config(
        pretrained,
        {"resample_tries": 1, "min_reward_std": 0.15, "normalization": "dapo", "predicted_findings": 1.0},
    )

    def request(name: str, stop_after: int | None = None) -> TrainingRequest:
        return TrainingRequest(config, store, tmp_path / name, ["3"], start_from=start, stop_after=stop_after)

    train(request("whole"))
    for stop_after in (1, 2, None):
        train(request("parts", stop_after))
    whole, parts = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for name in (
        "total",
        "kl",
        "gradient_norm",
        "reward",
        "reward_std",
        "reports/tokens",
        "other_scans_tried",
    ):
        np.testing.assert_array_equal(losses(parts, name), losses(whole, name), err_msg=name)
    assert losses(whole, "informative").sum() >= 2
    assert losses(whole, "kl")[1:].max() > 0
    begun, *ended = (
        VLM3DMultiTask.from_pretrained(folder).fingerprint()
        for folder in (start, tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    )
    assert ended[0] == ended[1] != begun


def test_masks_are_read_as_in_prediction(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = grpo_config(pretrained, {"steps": 1})
    trainer = Trainer(TrainingRequest(config, store, tmp_path / "run", ["3"], start_from=start))
    model, read = trainer.model.eval(), trainer.model.read_masks
    model.report_generator.load_llm()
    heads = heads_fingerprint(read_weights(start), read_config(start))
    always = StoredThresholds(dict.fromkeys(DISEASE_NAMES, 0.0), "every finding", heads)
    told = []
    for logit in (-50.0, 50.0):
        monkeypatch.setattr(
            model, "read_masks", lambda *scan, logit=logit: torch.full_like(read(*scan), logit)
        )
        (case,) = held_out_cases(model, PreparedDataset(store, ("train",)), config, 1, always)
        told.append(" ml" in case.context.prompt_text)
    assert told == [False, True]


def test_thresholds_call_the_findings_and_stay_with_heads_that_do_not_learn(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any]
) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(start, tuned)
    heads = heads_fingerprint(read_weights(start), read_config(start))
    never = StoredThresholds(dict.fromkeys(DISEASE_NAMES, 1.0), "no finding at all", heads)
    write_thresholds(tuned, never)
    config = grpo_config(pretrained, {"steps": 1, "predicted_findings": 1.0})
    trainer = Trainer(TrainingRequest(config, store, tmp_path / "run", ["3"], start_from=tuned))
    trainer.run()
    for folder in ("final", "grpo", "last/checkpoint"):
        assert read_thresholds(tmp_path / "run" / folder) == never
    prompts = {}
    for name, thresholds in (
        ("never", never),
        ("always", replace(never, values=dict.fromkeys(DISEASE_NAMES, 0.0))),
    ):
        dataset = PreparedDataset(store, ("train",))
        (case,) = held_out_cases(trainer.model.eval(), dataset, config, 1, thresholds)
        prompts[name] = case.context.prompt_text
    assert not any(disease.lower() in prompts["never"].lower() for disease in DISEASE_NAMES)
    assert all(disease.lower() in prompts["always"].lower() for disease in DISEASE_NAMES)

    config = grpo_config(pretrained, {"steps": 1})
    joint = TrainingRequest(config, store, tmp_path / "joint", ["joint"], start_from=tuned)
    assert read_thresholds(train(joint)) is None  # its heads are others now


def test_equal_rewards_are_sampled_elsewhere_and_teach_nothing(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        grpo, "weighted_rewards", lambda phase, perplexity: {"flat": (1.0, lambda t, truth: [0.5] * len(t))}
    )
    config = grpo_config(pretrained, {"steps": 1, "resample_tries": 2})
    final = train(TrainingRequest(config, store, tmp_path / "run", ["3"], start_from=start))
    (line,) = [line for line in read_metrics(tmp_path / "run") if "train/reward" in line]
    assert line["train/other_scans_tried"] == 2
    assert line["train/informative"] == line["train/gradient_norm"] == 0
    before, after = (VLM3DMultiTask.from_pretrained(f).fingerprint() for f in (start, final))
    assert before == after


def test_broken_weights_stop_with_the_cases(
    tmp_path: Path, store: Path, start: Path, pretrained: dict[str, Any]
) -> None:
    trainer = Trainer(
        TrainingRequest(grpo_config(pretrained), store, tmp_path / "run", ["3"], start_from=start)
    )
    with torch.no_grad():
        trainer.model.report_generator.projector.queries.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 0 \(grpo\) is no number; the batch's cases: phantom_\d+"):
        trainer.run()
    assert not (tmp_path / "run" / "final").exists()


def test_held_out_rewards_are_compared_pair_by_pair(
    store: Path, start: Path, pretrained: dict[str, Any]
) -> None:
    model = VLM3DMultiTask.from_pretrained(start)
    phase = grpo_config(pretrained).training.phases.grpo
    dataset = PreparedDataset(store, ("train",))
    ((before,),) = score_held_out([model], dataset, phase, limit=2)
    assert len(before.case_ids) == 2
    assert set(before.figures) >= {"reward", "reward_clinical", "reward_factual", "reward_format", "words"}
    training = model.config.training.model_copy(update={"seed": 7})  # of a run that ended there
    model.config = model.config.model_copy(update={"training": training})
    (again,), drawn = score_held_out([model], dataset, phase, limit=2, temperatures=(0.0, 1.0))
    assert drawn[0].texts != before.texts
    same = compare_rewards(before, again)
    assert all(gain.value == 0 for gain in same.values() if not math.isnan(gain.value))
    raised = {**before.figures, "reward": before.figures["reward"] + np.array([0.1, 0.3])}
    after = replace(before, figures=raised)
    gain = compare_rewards(before, after)["reward"]
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == pytest.approx((0.1, 0.3))  # either scan may be drawn twice
    other = VLM3DMultiTask.from_pretrained(start)
    with torch.no_grad():
        other.classifier.soft_prompts.add_(1.0)
    with pytest.raises(ConfigError, match="same encoder and heads"):
        score_held_out([model, other], dataset, phase, limit=2)
    with pytest.raises(ValueError, match="same scans"):
        compare_rewards(before, replace(before, case_ids=before.case_ids[::-1]))
