"""The mean of checkpoints is their mean, says whose it is, and can be loaded."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from support.small_models import small_model
from vlm3d.model.checkpoint import THRESHOLDS_FILE, read_training, read_weights
from vlm3d.model.multi_task_model import VLM3DMultiTask

SCRIPT = Path(__file__).parents[1] / "runs" / "mean_weights.py"


def test_the_mean_of_three_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fingerprints = []
    for number in range(3):
        with torch.no_grad():
            model.vision_encoder.norm.weight.fill_(float(number))
        model.save_pretrained(tmp_path / str(number))
        fingerprints.append(model.fingerprint())
    (tmp_path / "2" / THRESHOLDS_FILE).write_text("{}")  # of other weights than the mean's
    arguments = [str(tmp_path / name) for name in ("mean", "0", "2", "2")]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    mean, last = (read_weights(tmp_path / name) for name in ("mean", "2"))
    changed = {name for name in mean if not torch.allclose(mean[name], last[name])}
    assert changed == {"vision_encoder.norm.weight"}
    torch.testing.assert_close(mean["vision_encoder.norm.weight"], torch.full((32,), 4 / 3))
    assert not (tmp_path / "mean" / THRESHOLDS_FILE).exists()
    assert read_training(tmp_path / "mean")["mean_of"] == [fingerprints[0], *[fingerprints[2]] * 2]
    VLM3DMultiTask.from_pretrained(tmp_path / "mean")
