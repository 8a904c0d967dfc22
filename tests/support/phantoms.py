"""Coarse phantoms, made once a session."""

from __future__ import annotations

from functools import cache

from vlm3d.datasets.phantom import Phantom, generate_phantom

COARSE_MM = (6.0, 4.0, 4.0)


@cache
def coarse_phantom(seed: int = 1) -> Phantom:
    """A phantom with a nodule and an effusion on a coarse grid."""
    return generate_phantom(
        seed, spacing_mm=COARSE_MM, findings={"Lung nodule": 0.8, "Pleural effusion": 0.7}
    )
