"""What a name on the command line loads: a folder, shipped weights, or random ones that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.small_models import small_model
from vlm3d.inference import loading
from vlm3d.model import checkpoint
from vlm3d.model.multi_task_model import VLM3DMultiTask


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint in the package's place, under a size's name."""
    model = small_model()
    model.training_status, model.untrained_tasks = "synthetic", ()
    model.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    return model.fingerprint()


def test_a_size_that_ships_with_weights_is_loaded_by_its_name(shipped: str) -> None:
    assert VLM3DMultiTask.from_pretrained("tiny").fingerprint() == shipped
    pipeline = loading.load_pipeline(None, config="tiny", with_report=False)
    assert pipeline.model.fingerprint() == shipped
    assert pipeline.model_info.training == "synthetic"
    assert pipeline.model_info.checkpoint == "tiny (shipped)"


@pytest.mark.parametrize("name", ["../tiny", "tiny/", "missing", ""])
def test_only_a_plain_name_of_a_checkpoint_that_is_there_is_shipped(shipped: str, name: str) -> None:
    assert checkpoint.shipped_checkpoint(name) is None
