"""Who lies on the table: sex, size, habitus, age-dependent shapes and the contrast phase, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Contrast = Literal["none", "arterial", "venous"]


@dataclass(frozen=True)
class Patient:
    """One patient and the way the scan was taken.

    Attributes:
        sex: Shapes the breasts, the size and the muscle.
        scale_zyx: Size against the reference body along z, y and x.
        fat_mm: Thickness of the fat below the skin.
        muscle: Thickness of the muscles against the reference.
        heart_scale: Width of the heart against the reference, 1 for a cardiothoracic ratio of about 0.45.
        aorta_scale: Width of the aorta against the reference.
        diaphragm_mm: How much higher than the reference the diaphragm stands (shallow breath).
        elevation_mm: The same for the (right, left) half alone.
        vessel_scale: Width of the vessels of the lungs against the reference.
        bone_hu: Density of cancellous bone.
        arms: Above the head or beside the body.
        contrast: Phase of the contrast medium.
        blood_hu: Density of (right heart and pulmonary arteries, left heart and aorta, great veins).
        lung_hu: Density of healthy lung at mid depth.
    """

    sex: Literal["female", "male"]
    scale_zyx: tuple[float, float, float]
    fat_mm: float
    muscle: float
    heart_scale: float
    aorta_scale: float
    diaphragm_mm: float
    elevation_mm: tuple[float, float]
    vessel_scale: float
    bone_hu: float
    arms: Literal["up", "down"]
    contrast: Contrast
    blood_hu: tuple[float, float, float]
    lung_hu: float


_BLOOD_HU: dict[Contrast, tuple[float, float, float]] = {
    "none": (42.0, 42.0, 42.0),
    "arterial": (330.0, 290.0, 380.0),
    "venous": (190.0, 185.0, 190.0),
}


def sample_patient(
    rng: np.random.Generator, *, heart_scale: float | None = None, contrast: Contrast | None = None
) -> Patient:
    """Draw a patient.

    Args:
        rng: Source of randomness.
        heart_scale: Set the size of the heart instead of drawing a normal one.
        contrast: Set the contrast phase instead of drawing it.
    """
    sex: Literal["female", "male"] = "female" if rng.random() < 0.45 else "male"
    size = 0.95 if sex == "female" else 1.02
    scale = size * np.exp(rng.normal(0, [0.05, 0.05, 0.04]))
    fat = float(np.clip(rng.gamma(4.0, 4.5 if sex == "male" else 5.5), 5, 45))
    muscle = float(np.clip(rng.normal(0.85 if sex == "female" else 1.05, 0.12), 0.6, 1.4))
    normal_heart = float(np.clip(rng.normal(0.93, 0.035), 0.86, 1.0))
    phases: tuple[Contrast, ...] = ("none", "arterial", "venous")
    drawn = phases[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
    phase = drawn if contrast is None else contrast
    factor = rng.normal(1.0, 0.1)
    right, left, veins = (hu * (1.0 if phase == "none" else factor) for hu in _BLOOD_HU[phase])
    elevation = rng.normal(0, 4, 2)
    return Patient(
        sex=sex,
        scale_zyx=(float(scale[0]), float(scale[1]), float(scale[2])),
        fat_mm=fat,
        muscle=muscle,
        heart_scale=normal_heart if heart_scale is None else heart_scale,
        aorta_scale=float(np.clip(rng.normal(1.0, 0.08), 0.85, 1.25)),
        diaphragm_mm=float(rng.normal(2, 8)),
        elevation_mm=(float(elevation[0]), float(elevation[1])),
        vessel_scale=float(rng.normal(1.0, 0.08)),
        bone_hu=float(np.clip(rng.normal(190, 45), 90, 300)),
        arms="down" if rng.random() < 0.12 else "up",
        contrast=phase,
        blood_hu=(right, left, veins),
        lung_hu=float(rng.normal(-865, 15)),
    )
