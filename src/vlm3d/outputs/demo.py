"""The demo: a phantom chest CT goes through the whole system."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vlm3d.datasets.phantom import generate_phantom
from vlm3d.inference.pipeline import Pipeline, PredictionSettings
from vlm3d.outputs.batch import predict_scans


def run_demo(
    out: Path,
    load: Callable[[], Pipeline],
    settings: PredictionSettings,
    *,
    seed: int,
    say: Callable[[str], None],
) -> Path:
    """Write a phantom as NIfTI, predict it as a user would, and return the page's path."""
    from vlm3d.datasets.phantom.writing import write_phantom

    with tempfile.TemporaryDirectory(prefix="vlm3d_demo_") as temporary:
        say(f"phantom: a procedural chest CT, seed {seed}")
        folder = write_phantom(generate_phantom(seed), Path(temporary) / f"phantom_{seed}")
        outcome = predict_scans(
            [folder / "ct.nii.gz"],
            out,
            load,
            settings,
            overwrite=True,
            say=say,
        )
    return outcome.pages[0]
