"""Training on two CPU processes, as on two GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vlm3d.config import Config


def train_in_two_processes(
    config: Config,
    store: Path,
    folder: Path,
    phases: Sequence[str],
    then: str = "",
    stop_after: int | None = None,
) -> None:
    """Train in ``folder / "two"``; both processes then run ``then``, where ``trainer`` is what trained."""
    request_file, script = folder / "request.json", folder / "two.py"
    request_file.write_text(config.model_dump_json(), encoding="utf-8")
    lines = f"""
        import json, torch
        from pathlib import Path
        torch.set_num_threads(1)
        from vlm3d.config import config_from_dict
        from vlm3d.training.trainer import Trainer, TrainingRequest
        config = config_from_dict(json.loads(Path({str(request_file)!r}).read_text()), "test")
        store, run = Path({str(store)!r}), Path({str(folder / "two")!r})
        trainer = Trainer(TrainingRequest(config, store, run, {list(phases)!r}, stop_after={stop_after!r}))
        trainer.run()
        """
    script.write_text(textwrap.dedent(lines) + then, encoding="utf-8")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            str(script),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-9000:]
