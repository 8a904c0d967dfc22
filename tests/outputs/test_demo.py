"""The demo goes the way of any user's scan."""

from __future__ import annotations

import json
from pathlib import Path

from support.small_models import small_model
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.outputs.demo import run_demo


def test_the_demo_predicts_its_phantom_with_the_anatomy_that_is_searched(tmp_path: Path) -> None:
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
    assert said[0] == "phantom: a procedural chest CT, seed 7"
    prediction = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert prediction["scan"]["anatomy"] == "classical"
