"""The sentences of synthetic reports: each finding with a place where one is measured, without one where none is.

Wordings in braces: ``{places}`` "the right upper lobe and the left lower lobe", ``{size}`` "12 mm", ``{volume}`` "40 ml",
``{amount}`` "small". A wording without braces serves a finding that only a label tells: it names no place and no size.
"""

from __future__ import annotations

from collections.abc import Mapping

OPENINGS: tuple[str, ...] = (
    "Chest CT, axial sections.",
    "CT of the chest was reviewed in axial sections.",
    "Thoracic CT.",
    "Axial CT of the thorax.",
)

LOCATED: Mapping[str, tuple[str, ...]] = {
    "pericardial_effusion": (
        "Pericardial effusion of about {volume}.",
        "There is a {amount} pericardial effusion, about {volume}.",
        "A {amount} amount of fluid surrounds the heart: pericardial effusion, {volume}.",
    ),
    "consolidation": (
        "Consolidation in {places}, up to {size} across.",
        "Airspace consolidation involves {places}; its largest part measures {size}.",
        "In {places} there is consolidation with a volume of about {volume}.",
    ),
    "ground_glass_opacity": (
        "Ground-glass opacity in {places}, up to {size} across.",
        "Ground-glass opacities are seen in {places}, about {volume} together.",
        "{Amount} ground-glass opacity involves {places}.",
    ),
}
"""By lesion; effusions of the pleura and nodules have wordings of their own below."""

EFFUSION_ONE_SIDE: tuple[str, ...] = (
    "{Amount} {side} pleural effusion of about {volume}.",
    "There is a {amount} pleural effusion on the {side}, about {volume}.",
    "On the {side}, pleural effusion with a volume of about {volume}.",
)
EFFUSION_BOTH_SIDES: tuple[str, ...] = (
    "Bilateral pleural effusion, about {right} on the right and {left} on the left.",
    "Pleural effusion on both sides: right about {right}, left about {left}.",
)
NODULE: tuple[str, ...] = (
    "A nodule of {size} lies in {place}.",
    "{Place_capital} contains a {size} nodule.",
    "In {place} there is a lung nodule measuring {size}.",
)
FURTHER_NODULES: tuple[str, ...] = (
    "{count} further lung nodules are smaller.",
    "There are {count} smaller lung nodules besides.",
)

PRESENT: Mapping[str, tuple[str, ...]] = {
    "Medical material": ("Medical material is in place.", "A medical device is in place."),
    "Arterial wall calcification": (
        "Calcified plaques of the aortic wall.",
        "There are atherosclerotic wall calcifications of the aorta.",
    ),
    "Cardiomegaly": ("The heart is enlarged.", "Cardiomegaly is present."),
    "Pericardial effusion": ("Pericardial effusion is present.", "There is pericardial effusion."),
    "Coronary artery wall calcification": (
        "Calcifications of the coronary arteries.",
        "The coronary arteries show wall calcifications.",
    ),
    "Hiatal hernia": ("Hiatal hernia is present.", "There is a hiatal hernia."),
    "Lymphadenopathy": (
        "Enlarged mediastinal lymph nodes are seen.",
        "There is mediastinal lymphadenopathy.",
    ),
    "Emphysema": ("Emphysema is present in the lungs.", "The lungs show emphysema."),
    "Atelectasis": ("Atelectasis is present.", "There are atelectatic changes of the lung."),
    "Lung nodule": ("A lung nodule is present.", "Nodules are seen in the lung parenchyma."),
    "Lung opacity": (
        "Lung opacity is present.",
        "There are areas of increased density in the lungs: lung opacity.",
    ),
    "Pulmonary fibrotic sequela": (
        "Fibrotic sequelae are seen in the lungs.",
        "There are fibrotic bands in the lung parenchyma.",
    ),
    "Pleural effusion": ("Pleural effusion is present.", "There is pleural effusion."),
    "Mosaic attenuation pattern": (
        "Mosaic attenuation pattern of the lungs.",
        "The lungs show a mosaic attenuation pattern.",
    ),
    "Peribronchial thickening": (
        "Peribronchial thickening is present.",
        "There is peribronchial thickening.",
    ),
    "Consolidation": ("Consolidation is present in the lung.", "There is consolidation of the lung."),
    "Bronchiectasis": ("Bronchiectasis is present.", "The bronchi are widened: bronchiectasis."),
    "Interlobular septal thickening": (
        "Interlobular septal thickening is present.",
        "The interlobular septa are thickened.",
    ),
}

ABSENT: Mapping[str, tuple[str, ...]] = {
    "Medical material": ("No medical material.",),
    "Arterial wall calcification": ("No calcification of the aortic wall.",),
    "Cardiomegaly": ("The heart is of normal size.", "No cardiomegaly."),
    "Pericardial effusion": ("No pericardial effusion.", "There is no pericardial effusion."),
    "Coronary artery wall calcification": ("No coronary artery calcification.",),
    "Hiatal hernia": ("No hiatal hernia.",),
    "Lymphadenopathy": ("No enlarged lymph nodes.", "No lymphadenopathy."),
    "Emphysema": ("No emphysema.",),
    "Atelectasis": ("No atelectasis.",),
    "Lung nodule": ("No lung nodule.", "There is no lung nodule."),
    "Lung opacity": ("No lung opacity.", "No ground-glass opacity."),
    "Pulmonary fibrotic sequela": ("No fibrotic change of the lungs.",),
    "Pleural effusion": ("No pleural effusion.", "There is no pleural effusion."),
    "Mosaic attenuation pattern": ("No mosaic attenuation.",),
    "Peribronchial thickening": ("No peribronchial thickening.",),
    "Consolidation": ("No consolidation.", "There is no consolidation."),
    "Bronchiectasis": ("No bronchiectasis.",),
    "Interlobular septal thickening": ("No interlobular septal thickening.",),
}

NOTHING_FOUND: tuple[str, ...] = ("No abnormality of the chest.", "Normal chest CT.")
NOTHING_AMONG_KNOWN: tuple[str, ...] = ("None of the findings that were looked for.",)

AMOUNTS_ML: Mapping[str, tuple[float, float]] = {
    "pericardial_effusion": (100.0, 300.0),
    "pleural_effusion": (200.0, 700.0),
    "consolidation": (20.0, 150.0),
    "ground_glass_opacity": (50.0, 400.0),
}
"""Volumes below which a lesion is called small, and from which it is called large."""

AMOUNT_WORDS: tuple[str, str, str] = ("small", "moderate", "large")
