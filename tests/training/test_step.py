"""What a step does follows from its number alone."""

from __future__ import annotations

import numpy as np

from vlm3d.config import JointPhase
from vlm3d.training.optimizer import lr_share
from vlm3d.training.step import plan_step


def test_tasks_are_drawn_by_their_chance_and_never_none() -> None:
    phase = JointPhase(tasks={"classification": 0.9, "generation": 0.2}, steps=400)
    plans = [plan_step(phase, 4, 4, step) for step in range(400)]
    assert plans == [plan_step(phase, 4, 4, step) for step in range(400)]
    assert all(plan.tasks for plan in plans)
    assert 0.12 < np.mean(["generation" in plan.tasks for plan in plans]) < 0.32
    assert not any("localization" in plan.tasks for plan in plans)


def test_predicted_findings_come_in_gradually() -> None:
    phase = JointPhase(steps=1000, predicted_findings=0.8)
    predicted = [plan_step(phase, 1, 4, step).predicted_findings for step in range(1000)]
    assert np.mean(predicted[:200]) < 0.2
    assert np.mean(predicted[800:]) > 0.55
    assert not any(
        plan_step(phase.model_copy(update={"predicted_findings": 0.0}), 1, 4, step).predicted_findings
        for step in range(100)
    )


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    phase = JointPhase(steps=100, warmup_steps=10)
    shares = [lr_share(step, phase, 0.01) for step in range(101)]
    assert shares[0] == 0.1
    assert max(shares) == shares[10] == 1.0
    assert np.all(np.diff(shares[10:]) < 0)
    assert abs(shares[100] - 0.01) < 1e-12
