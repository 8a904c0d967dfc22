"""The 18 diseases and 5 lesions: names, order, prompts, colors. The only list; everything else asks here.

The diseases are CT-RATE's, in CT-RATE's order and spelling, which the VLM3D challenge shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Organ = Literal["devices", "heart", "vessels", "mediastinum", "pleura", "lungs"]

READING_ORDERS: tuple[tuple[Organ, ...], ...] = (
    ("devices", "heart", "vessels", "mediastinum", "pleura", "lungs"),
    ("lungs", "pleura", "mediastinum", "heart", "vessels", "devices"),
)
"""In which readers go through a chest: the middle first, as most of CT-RATE's reports do, or the lungs first."""


@dataclass(frozen=True)
class Disease:
    """One of the classifier's labels.

    Attributes:
        name: CT-RATE's spelling, used in every file.
        prompt: What it looks like; empty for a label that is only numbered.
        sided: Where no mask shows it, words place it by its side of the body.
        diffuse: It fills lungs, so that words place it by the lungs in which it is seen.
        organ: Where a reader looks for it, see `READING_ORDERS`.
    """

    name: str
    prompt: str
    sided: bool = False
    diffuse: bool = False
    organ: Organ = "lungs"

    @property
    def sentence(self) -> str:
        """What the text encoder reads."""
        return f"{self.name}. {self.prompt}".strip()


@dataclass(frozen=True)
class Lesion:
    """One of the localizer's targets.

    Attributes:
        key: Identifier in outputs, files and batches.
        name: The name a person reads.
        prompt: What the localizer's text encoder reads: the lesion with its anatomical context.
        disease: The classifier's nearest label.
        color: ``#rrggbb`` on pages and in viewers.
        challenge_name: The key in the challenge's box file.
        midline: It belongs to neither side of the body.
        lung: It lies within lung, so that its place is a lobe.
        counted: Its pieces are lesions of their own, told one by one; those of others are told by their places.
    """

    key: str
    name: str
    prompt: str
    disease: str
    color: str
    challenge_name: str
    midline: bool = False
    lung: bool = False
    counted: bool = False


DISEASES: tuple[Disease, ...] = (
    Disease(
        "Medical material",
        "Medical device or foreign material in the chest: port, pacemaker, stent, clip, tube or valve.",
        sided=True,
        organ="devices",
    ),
    Disease(
        "Arterial wall calcification",
        "Calcified plaque in the wall of the aorta or its branches.",
        organ="vessels",
    ),
    Disease("Cardiomegaly", "Enlarged heart with an increased cardiothoracic ratio.", organ="heart"),
    Disease("Pericardial effusion", "Fluid in the pericardial sac around the heart.", organ="heart"),
    Disease(
        "Coronary artery wall calcification", "Calcified plaque along the coronary arteries.", organ="heart"
    ),
    Disease(
        "Hiatal hernia",
        "Part of the stomach above the diaphragm through the esophageal hiatus.",
        organ="mediastinum",
    ),
    Disease(
        "Lymphadenopathy",
        "Enlarged lymph nodes of the mediastinum, hila or axillae.",
        sided=True,
        organ="mediastinum",
    ),
    Disease(
        "Emphysema",
        "Destroyed alveoli: low-attenuation areas without walls, mostly in the upper lobes.",
        diffuse=True,
    ),
    Disease("Atelectasis", "Collapsed lung with volume loss, as bands, plates or a whole lobe."),
    Disease("Lung nodule", "Rounded opacity of up to 30 mm within the lung."),
    Disease("Lung opacity", "Area of increased lung attenuation, ground-glass or denser."),
    Disease(
        "Pulmonary fibrotic sequela",
        "Scar of past disease: fibrotic bands, pleuroparenchymal streaks, distortion.",
    ),
    Disease("Pleural effusion", "Fluid in the dependent pleural space.", sided=True, organ="pleura"),
    Disease(
        "Mosaic attenuation pattern",
        "Patchwork of lobules with lower and higher lung attenuation.",
        diffuse=True,
    ),
    Disease("Peribronchial thickening", "Thickened bronchial walls.", diffuse=True),
    Disease("Consolidation", "Airless lung that hides its vessels, often with air bronchograms."),
    Disease("Bronchiectasis", "Permanently widened bronchi, larger than the artery beside them."),
    Disease(
        "Interlobular septal thickening",
        "Thickened septa between the secondary pulmonary lobules.",
        diffuse=True,
    ),
)

IMPLIED: dict[str, str] = {"Consolidation": "Lung opacity"}
"""A finding that another one always is: consolidated lung is opaque lung."""

DISEASE_NAMES: tuple[str, ...] = tuple(disease.name for disease in DISEASES)

ORGAN_OF: dict[str, Organ] = {disease.name: disease.organ for disease in DISEASES}
"""By the name of the disease."""

MIN_LESION_ML = 0.05
"""Smaller pieces of a drawn lesion are taken for noise: 4 voxels of 3 x 2 x 2 mm, a ball of 4.6 mm."""

LESIONS: tuple[Lesion, ...] = (
    Lesion(
        "pericardial_effusion",
        "Pericardial effusion",
        "Pericardial effusion: a shell of fluid between the heart and the pericardium, deepest behind the left ventricle.",
        "Pericardial effusion",
        "#e8a33d",
        "Pericardial effusion",
        midline=True,
    ),
    Lesion(
        "pleural_effusion",
        "Pleural effusion",
        "Pleural effusion: fluid in the right or left pleural space, dependent and posterior, with a crescent-shaped edge.",
        "Pleural effusion",
        "#3d9be8",
        "Pleural effusion",
    ),
    Lesion(
        "consolidation",
        "Consolidation",
        "Consolidation: dense airless lung within a lobe, vessels hidden, air bronchograms running through it.",
        "Consolidation",
        "#e8523d",
        "Consolidation",
        lung=True,
    ),
    Lesion(
        "ground_glass_opacity",
        "Ground-glass opacity",
        "Ground-glass opacity: hazy lung of increased attenuation in which vessels and bronchi stay visible.",
        "Lung opacity",
        "#5fc97a",
        "Ground glass opacity",
        lung=True,
    ),
    Lesion(
        "lung_nodule",
        "Lung nodule",
        "Lung nodule: a rounded opacity of up to 30 mm, surrounded by lung, apart from vessels and fissures.",
        "Lung nodule",
        "#c77de8",
        "Lung nodule",
        lung=True,
        counted=True,
    ),
)

LESION_KEYS: tuple[str, ...] = tuple(lesion.key for lesion in LESIONS)

LUNG_SIGNS: tuple[Lesion, ...] = (
    Lesion(
        "atelectasis",
        "Atelectasis",
        "Atelectasis: a band, a plate or a whole lobe of collapsed lung, denser than its surroundings, often at the bases.",
        "Atelectasis",
        "#4fc3c7",
        "Atelectasis",
        lung=True,
    ),
    Lesion(
        "pulmonary_fibrotic_sequela",
        "Pulmonary fibrotic sequela",
        "Pulmonary fibrotic sequela: thin irregular bands that run inward from thickened pleura, often in the apices.",
        "Pulmonary fibrotic sequela",
        "#d9c34a",
        "Pulmonary fibrotic sequela",
        lung=True,
    ),
    Lesion(
        "bronchiectasis",
        "Bronchiectasis",
        "Bronchiectasis: bronchi with air wider than the artery beside them, as rings and as tubes that do not taper.",
        "Bronchiectasis",
        "#f08fb0",
        "Bronchiectasis",
        lung=True,
    ),
)
"""Drawn beside the five where a model has prompts for them: small in a scan, and told with their lobe in a report."""

STORED_LESIONS: tuple[Lesion, ...] = (*LESIONS, *LUNG_SIGNS)
"""All that sources may know masks of: as many as a store has bits."""

STORED_LESION_KEYS: tuple[str, ...] = tuple(lesion.key for lesion in STORED_LESIONS)

COUNTED_LESION_KEYS: frozenset[str] = frozenset(lesion.key for lesion in STORED_LESIONS if lesion.counted)

EXTRA_COLORS = ("#9aa7ff", "#a0d468", "#ff9f68")
"""Of lesions past `STORED_LESIONS`, in turn."""

TASKS: tuple[str, ...] = ("classification", "localization", "generation")
"""The model's tasks, as outputs, losses and task sampling name them."""


def first_diseases(count: int) -> tuple[Disease, ...]:
    """The first labels of a classifier: the shipped ones, then numbered ones until they get a name and a prompt."""
    more = (Disease(f"Disease {number}", "") for number in range(len(DISEASES) + 1, count + 1))
    return (*DISEASES, *more)[:count]


def first_lesions(count: int) -> tuple[Lesion, ...]:
    """The first prompts of a localizer: `STORED_LESIONS`, then each disease that none of them draws, then numbers."""
    drawn = {lesion.disease for lesion in STORED_LESIONS}
    others = [disease for disease in DISEASES if disease.name not in drawn]
    others += [
        Disease(f"Lesion {number}", "") for number in range(len(STORED_LESIONS) + len(others) + 1, count + 1)
    ]
    more = (
        Lesion(
            key=disease.name.lower().replace(" ", "_"),
            name=disease.name,
            prompt=disease.sentence,
            disease=disease.name,
            color=EXTRA_COLORS[place % len(EXTRA_COLORS)],
            challenge_name=disease.name,
        )
        for place, disease in enumerate(others)
    )
    return (*STORED_LESIONS, *more)[:count]
