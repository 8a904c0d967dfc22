"""How long a step of each phase takes on this machine, by running some."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from vlm3d.datasets.prepared import PreparedDataset
from vlm3d.training.phases import ON_REQUEST, learnable_phases
from vlm3d.training.tracking import read_metrics
from vlm3d.training.trainer import TrainingRequest, train


def measured_seconds_per_step(request: TrainingRequest, steps: int = 3) -> dict[str, float]:
    """Seconds a step, by phase: the mean of some real steps after the first, in a folder that is thrown away.

    A phase that starts from another's weights is timed only where the request names some.

    Args:
        request: The run that is planned; its folder is not touched.
        steps: Steps of each phase, at least 2.
    """
    quick = request.config.training.model_copy(
        update={"log_every": 1, "tensorboard": False, "wandb": False, "checkpoint_every": 10**9}
    )
    found = {}
    _, names = learnable_phases(request.config, request.phases, PreparedDataset(request.store, ("train",)))
    for name in names:
        if name in ON_REQUEST and request.start_from is None:
            continue
        with tempfile.TemporaryDirectory(prefix="vlm3d_timing_") as folder:
            trial = replace(
                request,
                config=request.config.model_copy(update={"training": quick}),
                run=Path(folder) / "run",
                phases=[name],
                stop_after=steps,
            )
            train(trial)
            told = [line["seconds"] for line in read_metrics(trial.run) if "seconds" in line]
        found[name] = (told[-1] - told[0]) / (len(told) - 1)
    return found
