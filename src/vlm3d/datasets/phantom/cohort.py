"""Who has which findings: draws with realistic co-occurrence, and the order in which findings are painted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import ndtri

from vlm3d.datasets.phantom.chest_signs import (
    paint_arterial_calcification,
    paint_coronary_calcification,
    paint_hiatal_hernia,
    paint_lymphadenopathy,
    paint_medical_material,
)
from vlm3d.datasets.phantom.frame import Canvas
from vlm3d.datasets.phantom.lesions import (
    paint_consolidation,
    paint_ground_glass,
    paint_nodules,
    paint_pericardial_effusion,
    paint_pleural_effusion,
)
from vlm3d.datasets.phantom.lung_signs import (
    paint_atelectasis,
    paint_bronchiectasis,
    paint_emphysema,
    paint_fibrotic_sequela,
    paint_mosaic,
    paint_peribronchial_thickening,
    paint_septal_thickening,
)
from vlm3d.datasets.phantom.truth import FindingSpec, Painted
from vlm3d.labels import DISEASE_NAMES

Painter = Callable[[Canvas, np.random.Generator, FindingSpec], list[Painted]]

# in painting order: what moves organs, what changes the lung's texture, what fills it, what displaces it last.
# Cardiomegaly is not here: the heart is built large.
PAINTERS: dict[str, Painter] = {
    "Atelectasis": paint_atelectasis,
    "Hiatal hernia": paint_hiatal_hernia,
    "Lymphadenopathy": paint_lymphadenopathy,
    "Emphysema": paint_emphysema,
    "Mosaic attenuation pattern": paint_mosaic,
    "Interlobular septal thickening": paint_septal_thickening,
    "Peribronchial thickening": paint_peribronchial_thickening,
    "Bronchiectasis": paint_bronchiectasis,
    "Pulmonary fibrotic sequela": paint_fibrotic_sequela,
    "Lung nodule": paint_nodules,
    "Lung opacity": paint_ground_glass,
    "Consolidation": paint_consolidation,
    "Pericardial effusion": paint_pericardial_effusion,
    "Pleural effusion": paint_pleural_effusion,
    "Arterial wall calcification": paint_arterial_calcification,
    "Coronary artery wall calcification": paint_coronary_calcification,
    "Medical material": paint_medical_material,
}

# Share of patients with a finding, of the order seen in a hospital, raised where rare so that a model sees enough;
# and how strongly it goes with age, heart failure, infection, smoking and scarring airways.
_PREVALENCE: dict[str, tuple[float, tuple[float, float, float, float, float]]] = {
    "Medical material": (0.15, (0.35, 0.35, 0.0, 0.0, 0.0)),
    "Arterial wall calcification": (0.30, (0.85, 0.0, 0.0, 0.2, 0.0)),
    "Cardiomegaly": (0.16, (0.4, 0.65, 0.0, 0.0, 0.0)),
    "Pericardial effusion": (0.12, (0.1, 0.6, 0.15, 0.0, 0.0)),
    "Coronary artery wall calcification": (0.27, (0.8, 0.15, 0.0, 0.2, 0.0)),
    "Hiatal hernia": (0.15, (0.45, 0.0, 0.0, 0.0, 0.0)),
    "Lymphadenopathy": (0.25, (0.0, 0.1, 0.45, 0.2, 0.0)),
    "Emphysema": (0.20, (0.3, 0.0, 0.0, 0.75, 0.0)),
    "Atelectasis": (0.27, (0.2, 0.4, 0.25, 0.0, 0.1)),
    "Lung nodule": (0.42, (0.2, 0.0, 0.0, 0.3, 0.1)),
    "Lung opacity": (0.35, (0.0, 0.2, 0.75, 0.0, 0.0)),
    "Pulmonary fibrotic sequela": (0.27, (0.3, 0.0, 0.0, 0.25, 0.45)),
    "Pleural effusion": (0.18, (0.1, 0.7, 0.3, 0.0, 0.0)),
    "Mosaic attenuation pattern": (0.12, (0.0, 0.3, 0.0, 0.1, 0.45)),
    "Peribronchial thickening": (0.16, (0.0, 0.15, 0.3, 0.3, 0.5)),
    "Consolidation": (0.20, (0.0, 0.1, 0.8, 0.0, 0.0)),
    "Bronchiectasis": (0.15, (0.1, 0.0, 0.1, 0.1, 0.75)),
    "Interlobular septal thickening": (0.13, (0.0, 0.65, 0.2, 0.0, 0.15)),
}

HIGHEST_PREVALENCE = 0.6


def sample_findings(rng: np.random.Generator, prevalence_scale: float = 1.0) -> dict[str, FindingSpec]:
    """Draw a patient's findings: five hidden causes make some findings come together.

    Args:
        rng: Source of randomness; drawn from alike, whatever the scale.
        prevalence_scale: Multiplies every prevalence, up to `HIGHEST_PREVALENCE`.

    Raises:
        ValueError: The scale is not above zero.
    """
    if not prevalence_scale > 0:
        raise ValueError(f"prevalence_scale must be above zero, got {prevalence_scale}")
    causes = rng.standard_normal(5)
    findings = {}
    for name in DISEASE_NAMES:
        prevalence, loads = _PREVALENCE[name]
        load = np.array(loads)
        score = float(load @ causes + np.sqrt(max(1 - load @ load, 0.05)) * rng.standard_normal())
        severity = float(np.clip(rng.beta(1.6, 1.9) * 0.85 + 0.15, 0, 1))
        scaled = min(prevalence * prevalence_scale, max(HIGHEST_PREVALENCE, prevalence))
        if score > ndtri(1 - scaled):
            findings[name] = FindingSpec(severity=round(severity, 3))
    return findings


def as_specs(findings: Mapping[str, Any]) -> dict[str, FindingSpec]:
    """Read a user's findings: name -> severity, True, a dict of `FindingSpec`'s fields, or a `FindingSpec`.

    Raises:
        ValueError: A name is not one of the 18, or a value is none of these.
    """
    specs = {}
    for name, value in findings.items():
        if name not in DISEASE_NAMES:
            raise ValueError(f"unknown finding '{name}'; known: {', '.join(DISEASE_NAMES)}")
        if value is False or value is None:
            continue
        if isinstance(value, FindingSpec):
            specs[name] = value
        elif value is True:
            specs[name] = FindingSpec()
        elif isinstance(value, Mapping):
            specs[name] = FindingSpec(**value)
        elif isinstance(value, (int, float)):
            specs[name] = FindingSpec(severity=float(value))
        else:
            raise ValueError(f"'{name}' takes a severity, True or a FindingSpec, got {type(value).__name__}")
    return {name: specs[name] for name in DISEASE_NAMES if name in specs}
