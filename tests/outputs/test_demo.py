"""The demo goes the whole way, with the phantom's own anatomy."""

from __future__ import annotations

import json
from pathlib import Path

from support.small_models import small_model
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.outputs.demo import run_demo


def test_the_demo_predicts_its_phantom_with_the_phantoms_anatomy(tmp_path: Path) -> None:
    said: list[str] = []
    page = run_demo(
        tmp_path / "out",
        lambda: Pipeline(small_model(with_text=False), checkpoint="small"),
        PredictionSettings(report=False),
        seed=7,
        say=said.append,
    )
    assert page == tmp_path / "out" / "report.html"
    assert page.is_file()
    assert said[0].endswith("with its own anatomy as the mask")
    prediction = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert prediction["scan"]["anatomy"] == "file"
    assert "another anatomy" not in prediction["training_note"]
